"""Fills in the templates of a run folder's cards and programs, and writes them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.cards.card import Card
from compress.cards.interface import interface
from compress.cards.program import Program

if TYPE_CHECKING:
    from jinja2 import Environment

    from compress.recipe import Recipe
    from compress.report import Report, Row
    from compress.sources import Source
    from export.contract import Exporter

__all__ = ["write"]

_PROGRAMS = {
    "onnx": {"run.py": "onnx-run.py.j2"},
    "coreml": {"Run.swift": "coreml-Run.swift.j2", "prepare.py": "coreml-prepare.py.j2"},
    "tensorrt": {"run.py": "tensorrt-run.py.j2", "run.cpp": "tensorrt-run.cpp.j2"},
}
_CPP = {
    "int64": ("I64", 8), "int32": ("I32", 4), "float32": ("F32", 4), "float16": ("F16", 2), "bool": ("BOOL", 1),
    "uint8": ("U8", 1), "int8": ("I8", 1),
}  # fmt: skip
"""Element types as safetensors writes them, and their bytes."""
_MACOS = {"iOS16": 13, "iOS17": 14, "iOS18": 15}
"""The macOS of the same year as a target."""


def write(folder: Path, report: Report, recipe: Recipe, source: Source) -> list[Path]:
    """Writes, next to each file of a run folder, a model card (``README.md``) and programs that run the file on new rows.

    The text depends on nothing but the arguments and the folder's files, and names no place on this machine.

    Args:
        folder: a run folder with its files, ``manifest.json`` and, where rows were kept, ``kept.safetensors``.
        report: what was measured; every figure of a card is from it.
        recipe: what was run; its exporters say which files there are.
        source: the float model: the names of its classes, and whether it has a tokenizer.

    Returns the written paths. Raises ``UserError`` where a file of the run cannot be read.
    """
    environment, written = _environment(), []
    for exporter in recipe.export:
        rows = [row for row in report.rows if row.format == exporter.format]
        if not rows or exporter.format not in _PROGRAMS:
            continue
        path = folder / exporter.filename
        library = "tensorrt_rtx" if "RTX" in str(rows[0].details.get("builder", "RTX")) else "tensorrt"
        program = Program.of(report, source, interface(exporter, rows[0], path), folder, library)
        for name, text in _texts(environment, exporter, program, rows, report, recipe, folder):
            written.append(_put(path.parent / name, text))
    return written


def _texts(
    environment: Environment, exporter: Exporter, program: Program, rows: list[Row], report: Report, recipe: Recipe, folder: Path
) -> Iterator[tuple[str, str]]:
    """Name and text of everything that lies next to one file."""
    told = _told(exporter, program)
    for name, template in _PROGRAMS[exporter.format].items():
        yield name, environment.get_template(template).render(program=program, **told)
    if program.labels:
        yield "labels.txt", "\n".join(program.labels) + "\n"
    card = Card(exporter, program, rows, report, recipe, folder)
    yield "README.md", card.text(environment.get_template("card.md.j2"))


def _told(exporter: Exporter, program: Program) -> dict[str, Any]:
    """What the templates of the programs need beside the ``Program``."""
    names = [port.name for port in program.inputs]
    text_names = tuple(names) if program.masked or program.answer != "token" else (*names, "attention_mask")
    rtx = program.library == "tensorrt_rtx"
    usage = {"text": " FILE.txt", "running text": " FILE.txt", "images": " IMAGE.png ...", "arrays": " ROWS.npz"}
    return {
        "cpp": _CPP,
        "names": ", ".join(names),
        "text_names": text_names,
        "image": _image(program.settings) if program.reads == "images" else None,
        "labelled": program.kept and program.answer != "token",
        "text_at_hand": program.reads in ("text", "running text"),
        "description": f"Runs {Path(exporter.filename).name} on new rows.",
        "usage": usage[program.reads],
        "product": "TensorRT-RTX" if rtx else "TensorRT",
        "package": "tensorrt-rtx" if rtx else "tensorrt",
        "mask_index": names.index("attention_mask") if program.masked else 0,
        "macos": _MACOS.get(getattr(exporter, "target", ""), 15),
    }


def _image(settings: dict[str, Any]) -> dict[str, Any]:
    """The steps that ``ImageEncoder`` takes: to the shorter edge or a first size, then cut or resized to the model's size."""
    size, resize = list(settings["size"]), settings["resize"]
    first = list(resize) if isinstance(resize, list | tuple) else None
    then = "" if first == size else "crop" if settings["crop"] else "resize"
    return {
        **{key: settings[key] for key in ("channels", "mean", "std", "scale")},
        "size": size,
        "shorter": resize if isinstance(resize, int) else None,
        "first": first,
        "then": then,
        "filter": str(settings["interpolation"]).upper(),
    }


@cache
def _environment() -> Environment:
    """Kept, with the templates that it has compiled."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    made = Environment(
        loader=FileSystemLoader(Path(__file__).with_name("templates")),
        undefined=StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
        lstrip_blocks=True,
        autoescape=False,
    )
    made.filters |= {"quoted": _quoted, "plain": _plain, "cell": _cell, "rows_shape": _rows_shape, "arguments": _arguments}
    return made


def _quoted(text: str) -> str:
    """A string literal of Python, C++ and Swift alike."""
    return json.dumps(text, ensure_ascii=False)


def _arguments(given: dict[str, Any]) -> str:
    """Keyword arguments of a Python call, each after a comma."""
    return "".join(f", {name}={_quoted(value) if isinstance(value, str) else value}" for name, value in given.items())


def _plain(text: str) -> str:
    """Text that neither ends a comment nor a docstring."""
    return " ".join(str(text).split()).replace("\\", "/").replace('"', "'").replace("*/", "* /")


def _cell(text: object) -> str:
    """Text that stays in its cell of a table."""
    return " ".join(str(text).split()).replace("|", "\\|")


def _rows_shape(shape: tuple[int | str, ...]) -> str:
    """Sizes of a row for C++; one that may vary is -1."""
    return ", ".join(str(size if isinstance(size, int) else -1) for size in shape)


def _put(path: Path, text: str) -> Path:
    """Writes a file under a temporary name and renames it."""
    unfinished = path.with_name(f".{path.name}.part")
    unfinished.write_text(text.rstrip("\n") + "\n", encoding="utf-8")
    os.replace(unfinished, path)
    return path
