"""What came out: the verdict, what each file gained at what cost, and the final table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from compress.page import wording
from compress.report import Figure, Latency, Limit, Report, Row

__all__ = ["Cell", "Gain", "Line", "Table", "Verdict", "gains", "marks", "table", "verdict"]

Tone = Literal["met", "missed", "unchecked"]

_COLUMN = {
    "accept.metric_drop": "drop",
    "accept.agreement": "agreement",
    "accept.sqnr_db": "sqnr",
    "accept.latency_ratio": "time",
    "accept.size_ratio": "size",
    "accept.unvalidated": "validated",
}


@dataclass(frozen=True)
class Verdict:
    """The answer on top: a word, a sentence, and each line that was missed."""

    tone: Tone
    word: str
    says: str
    missed: tuple[str, ...] = ()


@dataclass(frozen=True)
class Gain:
    """What one file gained at what cost: a sentence in pieces, each (text, whether it is a gain and stands out)."""

    label: str
    mark: int
    sentence: tuple[tuple[str, bool], ...]


@dataclass(frozen=True)
class Cell:
    """One figure of the table: its value, what stands below it in a lighter tone, and the line of the contract it missed."""

    kind: str
    heading: str
    value: str
    below: tuple[str, ...] = ()
    missed: str = ""


@dataclass(frozen=True)
class Line:
    """One row of the table."""

    label: str
    mark: int
    reference: bool
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Table:
    """The final table; ``headings`` are (name, what stands below it, kind)."""

    headings: tuple[tuple[str, str, str], ...]
    lines: tuple[Line, ...]


def marks(rows: list[Row]) -> dict[str, int]:
    """The number of the colour and symbol of each label; 0 is the float model, files count from 1 on in their order."""
    labels = dict.fromkeys(row.label for row in rows if row.validated != "reference")
    return {row.label: 0 for row in rows if row.validated == "reference"} | {
        label: number for number, label in enumerate(labels, 1)
    }


def verdict(report: Report) -> Verdict:
    """Whether the contract of the recipe was met; by how much each missed line missed it."""
    missed = tuple(limit.says or f"{limit.artifact}: {limit.line}" for limit in report.limits if not limit.met)
    count = len(report.limits)
    if not count:
        return Verdict("unchecked", "No contract was checked", _unchecked(report))
    if report.met:
        every = "The one line of the contract holds." if count == 1 else f"All {count} lines of the contract hold."
        return Verdict("met", "Contract met", every)
    says = f"{len(missed)} of {count} lines {'was' if len(missed) == 1 else 'were'} missed. The files stay."
    return Verdict("missed", "Contract missed", says, missed)


def _unchecked(report: Report) -> str:
    if not any(row.validated == "reference" for row in report.rows):
        return "Nothing was run on evaluation rows: the files were written and their integers were read back, no more."
    return "The recipe has no accept section; the figures below stand for themselves."


def gains(report: Report) -> list[Gain]:
    """One sentence for each file and runtime."""
    numbers, found = marks(report.rows), []
    for row in report.rows:
        if row.validated == "reference":
            continue
        pieces = [piece for piece in (_smaller(row), *_paces(row), _lost(row), _agrees(row), _untimed(row)) if any(piece)]
        sentence: list[tuple[str, bool]] = []
        for number, (bold, rest) in enumerate(pieces):
            end = "." if number == len(pieces) - 1 else ", " if bold and pieces[number + 1][0] else "; "
            sentence += [(bold, True), (rest + end, False)]
        found.append(Gain(row.label, numbers[row.label], tuple(sentence)))
    return found


def _smaller(row: Row) -> tuple[str, str]:
    if row.size_bytes is None:
        return "", ""
    now = wording.size(row.size_bytes)
    if not row.size_ratio:
        return now, ""
    return wording.times(row.size_ratio, "smaller", "larger"), f" ({wording.size(row.size_bytes / row.size_ratio)} → {now})"


def _paces(row: Row) -> list[tuple[str, str]]:
    """The change of time at each batch size; no claim where a wide interval holds 1, the interval itself where it does not."""
    return [_pace(latency, latency.ratio) for latency in row.latency if latency.ratio is not None]


def _pace(latency: Latency, ratio: float) -> tuple[str, str]:
    low = ratio if latency.ratio_low is None else latency.ratio_low
    high = ratio if latency.ratio_high is None else latency.ratio_high
    at = f" at batch {latency.batch}"
    if low <= 1 <= high:
        return ("as fast as float", at) if high < 1.25 * low else ("", f"time{at} within noise of float")
    return (wording.times(ratio, "faster", "slower") if high < 1.25 * low else wording.paces(low, high)), at


def _lost(row: Row) -> tuple[str, str]:
    if row.drop is None or row.metric is None:
        return "", ""
    drop = f"drop {wording.figure(row.drop.value, '+')} {wording.interval(row.drop, '+')}".rstrip()
    return "", f"{row.metric.name} {wording.figure(row.metric.value)}, {drop}{_seen(row.drop)}"


def _seen(drop: Figure) -> str:
    """Whether the rows are enough to tell the drop from none."""
    if drop.low is None or drop.high is None:
        return ""
    return ", which includes no loss" if drop.low <= 0 <= drop.high else ""


def _agrees(row: Row) -> tuple[str, str]:
    if row.agreement is None:
        return "", "" if row.validated == "none" or row.sqnr_db is None else f"{row.sqnr_db:.1f} dB against float"
    return "", f"{wording.share(row.agreement)} of predictions as float"


def _untimed(row: Row) -> tuple[str, str]:
    if row.validated == "none":
        return "", f"not run: {row.note}" if row.note else "not run"
    where = {"proxy": ", as the file itself was not run (proxy)", "interpreter": ", as an interpreter ran the file"}
    return "", "" if row.latency else f"time not measured{where.get(row.validated, '')}"


def table(report: Report, rows: list[Row] | None = None, limits: list[Limit] | None = None) -> Table:
    """The final table: float first, then each file; the same figures as in the terminal, and two more intervals."""
    rows, limits = report.rows if rows is None else rows, report.limits if limits is None else limits
    batches = sorted({latency.batch for row in rows for latency in row.latency})
    metric = next((row.metric.name for row in rows if row.metric), "metric")
    numbers = marks(rows) | marks(report.rows)
    lines = tuple(
        Line(row.label, numbers[row.label], row.validated == "reference", _cells(row, metric, batches, limits)) for row in rows
    )
    headings = (
        (metric, "95 % interval", "metric"),
        ("drop", "paired, 95 %", "drop"),
        ("agreement", "with float", "agreement"),
        ("SQNR", "dB", "sqnr"),
        *((f"batch {batch}", "ms, × float", "time") for batch in batches),
        ("size", "× float file", "size"),
        ("validated", "", "validated"),
    )
    return Table(headings, lines)


def _cells(row: Row, metric: str, batches: list[int], limits: list[Limit]) -> tuple[Cell, ...]:
    compared = row.validated != "reference"
    measured = {latency.batch: latency for latency in row.latency}
    cells = [
        Cell("metric", metric, wording.figure(row.metric.value) if row.metric else "-", _below(wording.interval(row.metric))),
        _drop(row) if compared else Cell("drop", "drop", ""),
        _agreement(row) if compared else Cell("agreement", "agreement", ""),
        Cell("sqnr", "SQNR, dB", wording.decibel(row) if compared else ""),
        *(_time(measured.get(batch), row, batch) for batch in batches),
        _size(row),
        _validated(row),
    ]
    return tuple(_marked(cell, row, limits) for cell in cells)


def _below(*parts: str) -> tuple[str, ...]:
    return tuple(part for part in parts if part)


def _drop(row: Row) -> Cell:
    value = wording.figure(row.drop.value, "+") if row.drop else "-"
    return Cell("drop", "drop", value, _below(wording.interval(row.drop, "+")))


def _agreement(row: Row) -> Cell:
    return Cell("agreement", "agreement", wording.share(row.agreement) if row.agreement else "-")


def _time(latency: Latency | None, row: Row, batch: int) -> Cell:
    heading = f"ms, batch {batch}"
    if latency is None:
        return Cell("time", heading, "not measured" if row.path else "-")
    below = _below(wording.ratio(latency.ratio), wording.ratio_interval(latency))
    return Cell("time", heading, f"{latency.median_ms:.3g}", below)


def _size(row: Row) -> Cell:
    value = "-" if row.size_bytes is None else wording.size(row.size_bytes)
    return Cell("size", "size", value, _below(wording.ratio(row.size_ratio)))


def _validated(row: Row) -> Cell:
    words = {"reference": ("reference", row.runtime), "none": ("not run", row.note)}
    value, below = words.get(row.validated, (row.validated, row.runtime))
    return Cell("validated", "validated", value, _below(below))


def _over(row: Row, cell: Cell, limit: Limit) -> bool:
    """Whether it is the batch size of this cell that is over the limit: the line of the contract is for the slowest."""
    ratios = [latency.ratio for latency in row.latency if cell.heading.endswith(f" {latency.batch}") and latency.ratio]
    return not isinstance(limit.limit, float) or any(ratio > limit.limit for ratio in ratios)


def _marked(cell: Cell, row: Row, limits: list[Limit]) -> Cell:
    """The cell with the limit that it missed, if it did."""
    for limit in limits:
        if not limit.met and limit.artifact == row.label and _COLUMN.get(limit.line) == cell.kind:
            if cell.kind == "time" and not _over(row, cell, limit):
                continue
            least = limit.line in ("accept.agreement", "accept.sqnr_db")
            bound = f"{limit.limit:g}" if isinstance(limit.limit, float) else str(limit.limit)
            wanted = bound if cell.kind == "validated" else f"{'≥' if least else '≤'} {bound}"
            return Cell(cell.kind, cell.heading, cell.value, cell.below, f"wanted {wanted}")
    return cell
