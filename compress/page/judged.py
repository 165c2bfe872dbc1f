"""How each file was validated, what was checked, and what it holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from compress.page import wording
from compress.page.outcome import marks
from compress.report import Check, Report, Row

__all__ = ["HOW", "Judged", "judged"]

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
    details: tuple[tuple[str, str], ...]


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
    # A second runtime opens the same file, whose writer has spoken already.
    details = {name: value for name, value in row.details.items() if name != "run_in_float" and row.label == row.format}
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
        details=wording.pairs(details),
    )


def _kept(row: Row) -> str:
    """What export lost: the file against the compressed torch model."""
    if row.validated == "none":
        return ""
    parts = ["equal outputs" if row.sqnr_to_compressed_db is None else f"{row.sqnr_to_compressed_db:.1f} dB"]
    if row.agreement_to_compressed is not None:
        parts.append(f"{wording.share(row.agreement_to_compressed)} of predictions the same")
    return ", ".join(parts)
