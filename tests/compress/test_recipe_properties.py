"""Whatever is done to a recipe, reading it ends in a recipe or in faults with a place; never in a traceback."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calibrate.errors import UserError
from compress.recipe import Recipe, RecipeError, parse_recipe, read
from compress.shipped import recipes_folder
from compress.yaml_positions import parse

TEXTS = [path.read_text() for path in sorted(recipes_folder().glob("*.yaml"))]
PIECES = [
    "\t", ":", "- ", "[", "]", "{", "}", "'", '"', "#", "&a", "*a", "!x", "!!python/name:os.system ", "<<: ", "? ", "|", ">", "%",
    "\n", "\r", "  ", "0", "-", "~", "\0", "\x1b", "\x7f", "é", "\ufeff", "\u2028", "\ud800", "𝕏", "\u202e",
]  # fmt: skip
NAMES = ["weights", "path", "rows", "start", "count", "text", "onnx", "quantize", "source", "roles", "when", ""]
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(min_value=2**63, max_value=10**290)
    | st.floats()
    | st.sampled_from(
        ["", "all", "0-9", "9-0", "hf:x", "x.py:f", "onnx", "quantize", "accuracy", "8", "~/x", "\0", "1e999", "each_pass"]
    )
    | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=3),
    max_leaves=6,
)


def lawful(text: str) -> None:
    """The law: a recipe that is the same when it is read again, or faults in order, each with a place in the text."""
    first, second = outcome(text), outcome(text)
    if isinstance(first, Recipe):
        assert isinstance(second, Recipe)
        assert first.text == text
        assert first.model_dump_json() == second.model_dump_json()
        return
    breaks = sum(text.count(character) for character in "\n\r\x85\u2028\u2029")
    assert first.faults
    assert list(first.faults) == sorted(first.faults)
    for fault in first.faults:
        assert 1 <= fault.line <= breaks + 1
        assert fault.column >= 1
        assert fault.what
        assert fault.hint
        assert not set("\n\r") & set(fault.what + fault.hint)
        assert len(fault.what) < 500
    assert str(first) == str(second)
    assert str(first).startswith("r.yaml:")
    assert len(str(first).split("\n")) <= 42, "twenty faults and how many more"
    assert first.exit_code == 2


def outcome(text: str) -> Recipe | RecipeError:
    try:
        return parse_recipe(text, where="r.yaml", base=Path("folder"))
    except RecipeError as error:
        return error


@st.composite
def edited(draw: st.DrawFn) -> str:
    """A shipped recipe with up to four short stretches replaced."""
    text = draw(st.sampled_from(TEXTS))
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(text)))
        end = min(len(text), start + draw(st.integers(0, 12)))
        text = text[:start] + draw(st.sampled_from(["", *PIECES]) | st.text(max_size=3)) + text[end:]
    return text


def _renamed(line: str, draw: st.DrawFn) -> list[str]:
    before, colon, after = line.partition(":")
    at = draw(st.integers(0, max(len(before) - 1, 0)))
    return [before[:at] + draw(st.sampled_from(["", "x", "é", "\t", "-"])) + before[at + 1 :] + colon + after]


def _indented(line: str, draw: st.DrawFn) -> list[str]:
    bare = line.lstrip(" ")
    return [" " * draw(st.integers(0, len(line) - len(bare) + 3)) + bare]


def _revalued(line: str, draw: st.DrawFn) -> list[str]:
    before, colon, _ = line.partition(":")
    return [f"{before}{colon} {json.dumps(draw(VALUES))}"]


MUTATIONS: dict[str, Callable[[str, st.DrawFn], list[str]]] = {
    "delete": lambda line, draw: [],
    "duplicate": lambda line, draw: [line, line],
    "rename": _renamed,
    "indent": _indented,
    "revalue": _revalued,
    "empty": lambda line, draw: [line.partition(":")[0] + ":"],
    "to item": lambda line, draw: [line.replace("- ", "  ", 1) if "- " in line else "- " + line],
    "brackets": lambda line, draw: [line.translate(str.maketrans("{}[]", "[]{}"))],
    "anchor": lambda line, draw: [line.replace(": ", ": &a ", 1), "  <<: *a"],
    "break": lambda line, draw: [line + draw(st.sampled_from(["\r", "\x85", "\u2028", "\x0c"]))],
}


@st.composite
def mutated(draw: st.DrawFn) -> str:
    """A shipped recipe with up to three of its lines changed as people (and their tools) change them."""
    lines = draw(st.sampled_from(TEXTS)).split("\n")
    for _ in range(draw(st.integers(1, 3))):
        written = [number for number, line in enumerate(lines) if line.strip() and not line.lstrip().startswith("#")]
        if written:
            at = draw(st.sampled_from(written))
            lines[at : at + 1] = MUTATIONS[draw(st.sampled_from(sorted(MUTATIONS)))](lines[at], draw)
    return draw(st.sampled_from(["\n", "\r\n"])).join(lines)


@st.composite
def restructured(draw: st.DrawFn) -> str:
    """A shipped recipe with values replaced, taken out, renamed and swapped between lists and mappings, as JSON."""
    document = parse(draw(st.sampled_from(TEXTS)))
    assert document.root is not None
    data: Any = document.root.data()
    for _ in range(draw(st.integers(1, 3))):
        holder = data
        while isinstance(holder, dict | list) and holder:
            step = draw(st.sampled_from(sorted(holder) if isinstance(holder, dict) else list(range(len(holder)))))
            inner = holder[step]
            if isinstance(inner, dict | list) and inner and draw(st.booleans()):
                holder = inner
                continue
            holder[step] = _other(holder.pop(step) if isinstance(holder, dict) else inner, draw)
            if isinstance(holder, dict) and not draw(st.integers(0, 4)):
                holder[draw(st.sampled_from(NAMES))] = holder.pop(step)
            break
    return json.dumps(data, indent=1)


def _other(value: Any, draw: st.DrawFn) -> Any:
    if isinstance(value, dict) and draw(st.booleans()):
        return list(value.values()) if draw(st.booleans()) else [{key: inner} for key, inner in value.items()]
    if isinstance(value, list) and draw(st.booleans()):
        return {str(number): inner for number, inner in enumerate(value)} if draw(st.booleans()) else next(iter(value), None)
    return draw(VALUES)


def test_the_shipped_recipes_are_read_and_controls_are_refused() -> None:
    """Control: the law is not kept by refusing everything, or nothing."""
    assert TEXTS
    assert all(isinstance(outcome(text), Recipe) for text in TEXTS)
    assert all(isinstance(outcome(text.replace("\n", "\r\n")), Recipe) for text in TEXTS)
    assert all(isinstance(outcome(text.replace("model:", "modle:")), RecipeError) for text in TEXTS)


@settings(max_examples=250)
@given(edited())
def test_any_edit_of_the_text(text: str) -> None:
    lawful(text)


@settings(max_examples=250)
@given(mutated())
def test_any_line_changed(text: str) -> None:
    lawful(text)


@settings(max_examples=250)
@given(restructured())
def test_any_value_anywhere(text: str) -> None:
    lawful(text)


@settings(max_examples=150)
@given(st.text(max_size=60) | st.text(alphabet="".join(PIECES) + "ab", max_size=60))
def test_any_text(text: str) -> None:
    lawful(text)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bytes") / "r.yaml"


@settings(max_examples=200)
@given(
    content=st.binary(max_size=80) | edited().map(lambda text: text.encode("utf-16", "surrogatepass")), cut=st.integers(0, 400)
)
def test_any_bytes(file: Path, content: bytes, cut: int) -> None:
    """Bytes in a file, alone and in the middle of a recipe: the place is a line of the file."""
    whole = TEXTS[0].encode()
    for raw in (content, whole[:cut] + content + whole[cut:]):
        file.write_bytes(raw)
        told = refusal(file)
        if told is not None:
            line, column, rest = str(told).removeprefix(f"{file}:").split(":", 2)
            breaks = sum(raw.count(end) for end in (b"\n", b"\r", b"\x85", b"\xe2\x80\xa8", b"\xe2\x80\xa9"))
            assert 1 <= int(line) <= breaks + 1
            assert int(column) >= 1
            assert told.hint
            assert rest


def refusal(file: Path) -> UserError | None:
    try:
        read(file)
    except UserError as error:
        return error
    return None
