"""Reads the files of a run folder that the page is made from."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from calibrate.errors import UserError
from compress.report import Report
from compress.report import read as read_report

__all__ = ["Found", "read"]

_BESIDE = {".md", ".py", ".swift", ".cpp", ".cc"}
_AGAIN = "Run the recipe again."


@dataclass(frozen=True)
class Found:
    """What a run folder holds that the page shows.

    Attributes:
        report: ``report.json``.
        manifest: ``manifest.json``; None where it is not there.
        validation: ``validation.json``, made by a later ``compress validate``; None where it is not there.
        beside: model cards and programs next to the files, as paths in the folder.
    """

    report: Report
    manifest: dict[str, Any] | None = None
    validation: Report | None = None
    beside: tuple[str, ...] = ()
    words: Mapping[int, str] = field(default_factory=dict)
    """Of token ids, from the tokenizer that lies in the folder."""


def read(folder: Path) -> Found:
    """Reads what the page is made from.

    Raises:
        UserError: there is no report in the folder, or one of its files cannot be read.
    """
    if not os.path.isfile(folder / "report.json"):  # a folder that is closed has none either
        if os.path.isfile(folder / "recipe.yaml"):
            raise UserError(
                str(folder), "its run is not finished: there is no report.json", "Run it again; it goes on from there."
            )
        what = "holds no report.json" if os.path.isdir(folder) else "is no folder"
        raise UserError(str(folder), what, "Name the folder of a finished run, such as runs/quickstart.")
    report = read_report(folder)
    validation = read_report(folder, "validation.json") if (folder / "validation.json").is_file() else None
    return Found(
        report,
        _manifest(folder / "manifest.json"),
        validation,
        _beside(folder, report),
        _words(folder / "source" / "tokenizer.json"),
    )


def _manifest(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        raise UserError(str(path), "cannot be read as JSON", _AGAIN) from None
    if not isinstance(content, dict) or not _is_manifest(content):
        raise UserError(str(path), "is not a manifest", _AGAIN)
    return content


def _words(path: Path) -> dict[int, str]:
    """The vocabulary of a tokenizer's file, by id; nothing where there is none, or in another form."""
    try:
        vocabulary = json.loads(path.read_text("utf-8"))["model"]["vocab"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    if isinstance(vocabulary, dict):
        return {number: word for word, number in vocabulary.items() if isinstance(number, int)}
    return {number: str(entry[0]) for number, entry in enumerate(vocabulary) if isinstance(entry, list) and entry}


def _is_manifest(content: dict[str, Any]) -> bool:
    """Whether the parts that the page walks through have the shape that a run gives them."""
    parts = [content.get(name, {}) for name in ("files", "versions", "machine", "data")]
    if not all(isinstance(part, dict) for part in parts):
        return False
    files, _, machine, _ = parts
    sizes = [entry.get("bytes", 0) if isinstance(entry, dict) else "" for entry in files.values()]
    return all(isinstance(size, int) for size in [*sizes, machine.get("memory_bytes", 0)])


def _beside(folder: Path, report: Report) -> tuple[str, ...]:
    """Cards and programs in the folders of the files, sorted; nothing outside the run folder."""
    places = {PurePosixPath(row.path).parts[0] for row in report.rows if len(PurePosixPath(row.path).parts) > 1}
    found = [
        path.relative_to(folder).as_posix()
        for place in places
        if place not in ("/", "..") and (folder / place).is_dir()
        for path in (folder / place).iterdir()
        if path.is_file() and path.suffix in _BESIDE
    ]
    return tuple(sorted(found))
