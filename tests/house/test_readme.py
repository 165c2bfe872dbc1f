"""Every ``compress`` command and every Python import that the documents show exists."""

from __future__ import annotations

import ast
import importlib
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer.main

from compress.cli import app
from compress.shipped import find_recipe, shipped_recipes

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "recipes" / "README.md", ROOT / "compress" / "passes" / "README.md"]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`(compress [^`]+)`")
COMMANDS: dict[str, Any] = dict(getattr(typer.main.get_command(app), "commands", {}))


def blocks(path: Path, *languages: str) -> list[str]:
    return [text for language, text in BLOCK.findall(path.read_text("utf-8")) if language in languages]


def shell_commands(text: str) -> list[list[str]]:
    """The words of every ``compress ...`` in shell text; ``&&``, ``|``, ``;`` and ``>`` end a command."""
    joined = re.sub(r"\\\n\s*", " ", text)
    found = []
    for line in joined.split("\n"):
        words = shlex.split(line, comments=True)
        words = [part for word in words for part in re.split(r"(&&|\|\||;|\||>)", word) if part]
        while "compress" in words:
            words = words[words.index("compress") + 1 :]
            end = next((number for number, word in enumerate(words) if word in ("&&", "||", ";", "|", ">")), len(words))
            found.append(words[:end])
            words = words[end:]
    return found


def wrong(words: list[str]) -> str:
    """What is wrong with the words after ``compress``; empty when nothing is."""
    if not words or words[0].startswith("-"):
        return "" if words in (["--help"], ["--version"], ["-h"]) else f"compress {' '.join(words)}"
    if words[0] not in COMMANDS:
        return f"no command {words[0]}"
    known = {option for parameter in COMMANDS[words[0]].params for option in (*parameter.opts, *parameter.secondary_opts)}
    unknown = [word for word in words[1:] if word.startswith("-") and word.partition("=")[0] not in known | {"--help", "-h"}]
    return f"{words[0]} has no {unknown}" if unknown else ""


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_command_exists(path: Path) -> None:
    commands = [words for text in blocks(path, "bash", "sh", "console", "shell") for words in shell_commands(text)]
    commands += [words for text in INLINE.findall(path.read_text("utf-8")) for words in shell_commands(text)]
    assert commands, "a document that shows no command is not read by anybody"
    assert [found for words in commands if (found := wrong(words))] == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_recipe_that_a_command_names_is_shipped(path: Path) -> None:
    names = {shipped.name for shipped in shipped_recipes()}
    for text in blocks(path, "bash", "sh", "console", "shell"):
        for words in shell_commands(text):
            for word in words[1:]:
                if word in names:
                    assert find_recipe(word)
                if word.startswith("recipes/") and word.endswith(".yaml"):
                    assert (ROOT / word).is_file(), word


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_python_blocks_parse_and_import_what_exists(path: Path) -> None:
    ours = ("calibrate", "compress", "export")
    for text in blocks(path, "python"):
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "compress":
                assert hasattr(importlib.import_module("compress"), node.attr), f"compress.{node.attr}"
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in ours:
                module = importlib.import_module(node.module or "")
                for alias in node.names:
                    assert hasattr(module, alias.name), f"{node.module}.{alias.name}"


@pytest.mark.parametrize("words", [["aply", "x"], ["apply", "x", "--ot", "y"], []])
def test_a_wrong_command_is_seen(words: list[str]) -> None:
    assert wrong(words) or words == []


def test_shell_text_is_read_to_its_end() -> None:
    text = "python -m venv v && . v/bin/activate && compress apply quickstart --out x \\\n  --quiet; compress schema>s.json"
    assert shell_commands(text) == [["apply", "quickstart", "--out", "x", "--quiet"], ["schema"]]
