"""What was done: the steps, how each file was validated, how long it took, and how to do it again."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import quote

from compress.page import wording
from compress.page.folder import Found
from compress.page.outcome import Table, marks, table
from compress.report import Check, Report, Row, StepRecord, Worth

__all__ = ["HOW", "Brought", "Judged", "Sites", "StepShown", "about", "again", "judged", "link", "measured_on", "parts", "steps"]

_KNOWN = ("sites", "skipped", "ties")
_WORST = ("output_sqnr_db", "sqnr_db", "weight_sqnr_db")
HOW = {
    "runtime": "Run in its own runtime on this machine: the figures and times are those of the file as it will run.",
    "interpreter": "Its own runtime is not on this machine. The saved program was run operator by operator by an interpreter: "
    "its arithmetic is checked, its time is not, and what a device rounds differently is not seen.",
    "proxy": "The file was built, not run. The exact graph that was given to its builder ran in another runtime: "
    "the integers and the arithmetic are checked, the built file and its time are not.",
    "none": "Not run. Its contents were read back, no more.",
    "reference": "The float model, before any pass: everything is compared with it.",
}
"""What each way of validation means."""


@dataclass(frozen=True)
class Sites:
    """The figures that a pass gave for each place it changed, the worst first where there is a figure to sort by."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[str, ...]], ...]
    sorted_by: str


@dataclass(frozen=True)
class Brought:
    """What a pass brought: the names of the figures and, for each file, its mark and (value, interval) of each."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, int, tuple[tuple[str, str], ...]], ...]


@dataclass(frozen=True)
class StepShown:
    """One pass as the page shows it."""

    number: int
    name: str
    says: str
    state: str
    asked: tuple[tuple[str, str], ...]
    unset: tuple[str, ...]
    facts: tuple[tuple[str, str, str], ...]
    worth: Brought | None
    table: Table | None
    sites: Sites | None
    skipped: tuple[tuple[str, str], ...]
    ties: tuple[str, ...]
    other: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Judged:
    """How one file was validated and what was found in it."""

    label: str
    mark: int
    how: str
    means: str
    runtime: str
    path: str
    note: str
    kept: str
    beside: tuple[str, ...]
    checks: tuple[Check, ...]
    audit: str
    whole: bool
    float_layers: tuple[str, ...]
    run_in_float: tuple[str, ...]
    details: str


def about(report: Report) -> list[str]:
    """The model, its task and size, the rows and the machine, as far as the report tells."""
    model, evaluation = report.model, report.data.get("evaluation")
    found = [str(model[name]) for name in ("name", "task") if model.get(name)]
    if isinstance(stored := model.get("float_bytes"), int):
        found.append(f"{wording.size(stored)} in float")
    if isinstance(evaluation, dict):
        found.append(f"{wording.plain(evaluation.get('rows'))} rows of {evaluation.get('path')}")
    return [*found, *([measured_on(report)] if measured_on(report) else [])]


def measured_on(report: Report) -> str:
    """The processor and its threads; empty where the report does not tell."""
    processor, threads = report.machine.get("processor"), report.machine.get("threads")
    return f"{processor}, {threads} thread{'s'[: threads != 1]}" if processor else ""


def steps(report: Report) -> list[StepShown]:
    """Every pass in its order."""
    numbers = marks(report.rows)
    return [_step(report, number, step, numbers) for number, step in enumerate(report.steps, 1)]


def _step(report: Report, number: int, step: StepRecord, numbers: dict[str, int]) -> StepShown:
    asked = tuple((name, wording.plain(value)) for name, value in step.options.items() if value not in (None, [], {}))
    sites = step.report.get("sites")
    skipped, ties = step.report.get("skipped"), step.report.get("ties")
    return StepShown(
        number=number,
        name=step.name,
        says=step.says,
        state="taken back" if step.undone else {True: "paid", False: "did not pay", None: ""}[step.paid],
        asked=asked,
        unset=tuple(name for name, value in step.options.items() if value in (None, [], {})),
        facts=_facts(step),
        worth=_brought(step.worth, numbers) if step.worth else None,
        table=table(report, step.rows, []) if step.rows else None,
        sites=_sites(sites) if isinstance(sites, dict) and sites else None,
        skipped=tuple((str(path), str(why)) for path, why in skipped.items()) if isinstance(skipped, dict) else (),
        ties=tuple(map(str, ties)) if isinstance(ties, list) else (),
        other=tuple((name, wording.plain(value)) for name, value in step.report.items() if name not in _KNOWN),
    )


def _facts(step: StepRecord) -> tuple[tuple[str, str, str], ...]:
    """(name, value, what stands beside it) of what a pass changed."""
    ratio = wording.ratio(step.bytes_after / step.bytes_before) if step.bytes_before else ""
    facts = [
        ("bytes in memory", f"{wording.size(step.bytes_before)} → {wording.size(step.bytes_after)}", ratio),
        ("tensors changed", f"{step.changed:,}", ""),
    ]
    sites = step.report.get("sites")
    if changed := len(sites) if isinstance(sites, dict) else step.sites:
        facts.append(("sites", f"{changed:,}", ""))
    if isinstance(rows := step.report.get("calibration_rows"), int) and rows:
        facts.append(("calibration rows", f"{rows:,}", ""))
    facts.append(("time", wording.seconds(step.seconds), ""))
    return tuple(facts)


def _brought(worth: list[Worth], numbers: dict[str, int]) -> Brought:
    figures = [(one.label, _worth(one)) for one in worth]
    columns = tuple(dict.fromkeys(name for _, found in figures for name in found))
    empty = ("–", "")
    rows = ((label, numbers.get(label, 0), tuple(found.get(name, empty) for name in columns)) for label, found in figures)
    return Brought(columns, tuple(rows))


def _worth(worth: Worth) -> dict[str, tuple[str, str]]:
    """(value, interval) of what a pass brought to one file, by name."""
    found = {}
    if worth.drop is not None:
        found[worth.drop.name] = (wording.figure(worth.drop.value, "+"), wording.interval(worth.drop, "+"))
    if worth.agreement is not None:
        found["agreement"] = (wording.share(worth.agreement), "")
    if worth.sqnr_db is not None or worth.compared:
        found["SQNR, dB"] = ("equal" if worth.sqnr_db is None else f"{worth.sqnr_db:.1f}", "")
    if worth.size_ratio is not None:
        stored = f"({wording.size(worth.size_bytes)})" if worth.size_bytes is not None else ""
        found["size"] = (wording.ratio(worth.size_ratio), stored)
    if worth.latency_ratio is not None:
        known = worth.latency_low is not None and worth.latency_high is not None
        interval = f"[{worth.latency_low:.2f}, {worth.latency_high:.2f}]" if known else ""
        found["time"] = (wording.ratio(worth.latency_ratio), interval)
    return found


def _sites(sites: dict[str, Any]) -> Sites:
    flat = {path: _flat(told) for path, told in sites.items()}
    columns = list(dict.fromkeys(name for told in flat.values() for name in told))
    by = next((name for name in (*_WORST, *columns) if name in columns and name.endswith("_db")), "")
    order = list(flat)
    if by:
        order.sort(key=lambda path: _number(flat[path].get(by)))
        columns.remove(by)
        columns.insert(0, by)
    rows = tuple((path, tuple(wording.plain(flat[path].get(name)) for name in columns)) for path in order)
    return Sites(tuple(columns), rows, by)


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else math.inf


def _flat(told: Any, before: str = "") -> dict[str, Any]:
    """A site's figures with those of inner parts beside them: ``activation`` with ``scale`` becomes ``activation scale``."""
    if not isinstance(told, dict):
        return {before.strip() or "figure": told}
    found: dict[str, Any] = {}
    for name, value in told.items():
        found |= _flat(value, f"{before}{name} ") if isinstance(value, dict) else {f"{before}{name}": value}
    return found


def judged(report: Report, beside: Sequence[str] = ()) -> list[Judged]:
    """Each file and runtime: how it was run, what was checked, what it holds, and what lies next to it."""
    numbers, found = marks(report.rows), []
    for row in report.rows:
        if row.validated != "reference":
            folder = f"{PurePosixPath(row.path).parts[0]}/" if row.path else "/"
            near = tuple(path for path in beside if path.startswith(folder)) if row.label == row.format else ()
            found.append(_judged(row, numbers[row.label], near))
    return found


def _judged(row: Row, mark: int, near: tuple[str, ...]) -> Judged:
    audit, whole = "", True
    if row.audit is not None:
        whole = row.audit.equal == row.audit.layers
        audit = (
            f"{row.audit.equal:,} of {row.audit.layers:,} quantized layers hold exactly the integers of the model "
            f"({row.audit.codes:,} codes compared)."
        )
    details = {name: value for name, value in row.details.items() if name != "run_in_float"}
    in_float = row.details.get("run_in_float")
    return Judged(
        label=row.label,
        mark=mark,
        how={"none": "not run"}.get(row.validated, row.validated),
        means=HOW[row.validated],
        runtime=row.runtime,
        path=row.path,
        note=row.note,
        kept=_kept(row),
        beside=near,
        checks=tuple(row.checks),
        audit=audit,
        whole=whole,
        float_layers=tuple(row.audit.float_layers) if row.audit else (),
        run_in_float=tuple(map(str, in_float)) if isinstance(in_float, list) else (),
        details=json.dumps(details, indent=2, ensure_ascii=False) if details else "",
    )


def _kept(row: Row) -> str:
    """What export lost: the file against the compressed torch model."""
    if row.validated == "none":
        return ""
    parts = ["equal outputs" if row.sqnr_to_compressed_db is None else f"{row.sqnr_to_compressed_db:.1f} dB"]
    if row.agreement_to_compressed is not None:
        parts.append(f"{wording.share(row.agreement_to_compressed)} of predictions the same")
    return ", ".join(parts)


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
    lines = [
        (f"compress apply {shlex.quote(recipe)} --out .{trust}", "the same run again, into this folder"),
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
