"""What the run was of, how long it took, and how to do it again."""

from __future__ import annotations

import re
import shlex
from pathlib import PurePosixPath
from urllib.parse import quote

from compress.page import wording
from compress.page.folder import Found
from compress.report import Report

__all__ = ["about", "again", "link", "measured_on", "notes", "parts"]


def about(report: Report) -> list[str]:
    """The model, its task and size, the rows and the machine, as far as the report tells."""
    model, evaluation = report.model, report.data.get("evaluation")
    found = [str(model[name]) for name in ("name", "task") if model.get(name)]
    if isinstance(stored := model.get("float_bytes"), int):
        found.append(f"{wording.size(stored)} in float")
    if isinstance(evaluation, dict):
        found.append(f"{wording.plain(evaluation.get('rows'))} rows of {evaluation.get('path')}")
    return [*found, *([measured_on(report)] if measured_on(report) else [])]


def notes(report: Report) -> list[str]:
    """What was found when the model was read, in the reader's words."""
    found = report.model.get("notes")
    return [str(note) for note in found] if isinstance(found, list) else []


def measured_on(report: Report) -> str:
    """The processor and its threads; empty where the report does not tell."""
    processor, threads = report.machine.get("processor"), report.machine.get("threads")
    return f"{processor}, {threads} thread{'s'[: threads != 1]}" if processor else ""


def parts(report: Report) -> list[tuple[str, str, float]]:
    """(part of the run, its time, per cent of the longest part), in the order they ran."""
    longest = max(report.seconds.values(), default=0.0) or 1.0
    return [(name, wording.seconds(value), round(100 * value / longest, 2)) for name, value in report.seconds.items()]


def again(found: Found) -> str:
    """The commands that make the run again, for a shell in the run folder."""
    manifest = found.manifest or {}
    place, name = manifest.get("base"), manifest.get("recipe", found.report.name)
    recipe = (PurePosixPath(str(place)) / f"{name}.yaml").as_posix() if place else "recipe.yaml"
    model = manifest.get("model")
    source = str(model.get("source", "")) if isinstance(model, dict) else ""
    trust = " --trust" if ".py:" in source and not source.startswith(("hf:", "timm:", "embedded:")) else ""
    beside = re.sub(r"[^\w.-]+", "-", f"{name}-again")
    lines = [
        (f"compress apply {shlex.quote(recipe)} --out ../{beside}{trust}", "the same run again, into a folder beside this one"),
        (f"compress validate .{trust}", "judge these files again, here or on another machine"),
        ("compress report .", "this page and the table again"),
    ]
    return "\n\n".join(f"# {what}\n{command}" for command, what in lines)


def link(path: str) -> str:
    """A path in the run folder as a relative address; empty where it would lead out of the folder."""
    clean = PurePosixPath(path)
    if not path or clean.is_absolute() or ".." in clean.parts:
        return ""
    return "./" + quote(clean.as_posix())
