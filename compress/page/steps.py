"""What each pass was asked, what it changed, what it brought, and its figures for each site."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from compress.page import wording
from compress.page.outcome import Table, marks, table
from compress.page.tokens import Mosaic, token_pictures
from compress.report import Report, StepRecord, Worth
from compress.worth import brings, costs

__all__ = ["Brought", "Sites", "StepShown", "steps"]

_KNOWN = ("sites", "skipped", "ties", "pictures")
_WORST = ("output_sqnr_db", "sqnr_db", "weight_sqnr_db")


@dataclass(frozen=True)
class Sites:
    """The figures that a pass gave for each place it changed, the worst first where there is a figure to sort by; what is
    ``same`` everywhere is no column."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[str, ...]], ...]
    sorted_by: str
    same: tuple[tuple[str, str], ...]


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
    pictures: tuple[Mosaic, ...] = ()


def steps(report: Report, words: Mapping[int, str] | None = None) -> list[StepShown]:
    """Every pass in its order; ``words`` are those of token ids."""
    numbers = marks(report.rows)
    return [_step(report, number, step, numbers, words or {}) for number, step in enumerate(report.steps, 1)]


def _step(report: Report, number: int, step: StepRecord, numbers: dict[str, int], words: Mapping[int, str]) -> StepShown:
    asked = tuple((name, wording.plain(value)) for name, value in step.options.items() if value not in (None, [], {}))
    sites = step.report.get("sites")
    skipped, ties = step.report.get("skipped"), step.report.get("ties")
    return StepShown(
        number=number,
        name=step.name,
        says=step.says,
        state=_state(step),
        asked=asked,
        unset=tuple(name for name, value in step.options.items() if value in (None, [], {})),
        facts=_facts(step),
        worth=_brought(step.worth, numbers) if step.worth else None,
        table=table(report, step.rows, []) if step.rows else None,
        sites=_sites(sites) if isinstance(sites, dict) and sites else None,
        skipped=tuple((str(path), str(why)) for path, why in skipped.items()) if isinstance(skipped, dict) else (),
        ties=tuple(map(str, ties)) if isinstance(ties, list) else (),
        other=tuple((name, wording.plain(value)) for name, value in step.report.items() if name not in _KNOWN),
        pictures=_pictures(step, words),
    )


def _pictures(step: StepRecord, words: Mapping[int, str]) -> tuple[Mosaic, ...]:
    told, protected = step.report.get("pictures"), step.report.get("protected", 0)
    return token_pictures(told, int(protected), words) if isinstance(told, list) else ()


def _state(step: StepRecord) -> str:
    """What a pass was worth, in two words."""
    if step.undone:
        return "taken back"
    if step.paid is None:
        return ""
    if not step.paid:
        return "did not pay"
    if not brings(step.worth):
        return "neutral"
    return "paid, at a cost" if costs(step.worth) else "paid"


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
    facts += _repair(step.report.get("repair"))
    if isinstance(chosen := step.report.get("accuracy_driven"), dict):
        start, end, rows = chosen["start"]["loss"], chosen["end"]["loss"], chosen["validation"]["rows"]
        facts.append((f"loss on the {rows:,} validation rows that chose", f"{start:.4g} → {end:.4g}", ""))
        facts.append(("tried", f"{len(chosen['tried']):,}", f"{sum(one['taken'] for one in chosen['tried']):,} stayed"))
    facts.append(("time", wording.seconds(step.seconds), ""))
    return tuple(facts)


def _repair(told: object) -> list[tuple[str, str, str]]:
    """What a repair brought on the rows held out, and by labels where there were some."""
    if not isinstance(told, dict) or not {"sqnr_db_before", "sqnr_db_after"} <= told.keys():
        return []
    before, after = (wording.plain(told[f"sqnr_db_{when}"]) for when in ("before", "after"))
    facts = [("SQNR on rows held out, before and after the repair, dB", f"{before} → {after}", "")]
    judged = [told.get(f"validation_{when}", {}).get("metric") for when in ("before", "after")]
    if all(isinstance(metric, float) for metric in judged):
        facts.append(("metric on the validation rows", " → ".join(wording.figure(metric) for metric in judged), ""))
    return facts


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
    flat = {path: wording.flat(told) for path, told in sites.items()}
    names = dict.fromkeys(name for told in flat.values() for name in told)
    told = {name: [_figure(name, found.get(name)) for found in flat.values()] for name in names}
    same = tuple((name, figures[0]) for name, figures in told.items() if len(figures) > 1 and len(set(figures)) == 1)
    columns = [name for name in names if name not in dict(same)]
    by = next((name for name in (*_WORST, *columns) if name in columns and name.endswith("_db")), "")
    order = list(flat)
    if by:
        order.sort(key=lambda path: _number(flat[path].get(by)))
        columns.remove(by)
        columns.insert(0, by)
    rows = tuple((path, tuple(_figure(name, flat[path].get(name)) for name in columns)) for path in order)
    return Sites(tuple(columns), rows, by, same)


def _figure(name: str, value: Any) -> str:
    return f"{value:.1f}" if name.endswith("_db") and isinstance(value, float) else wording.plain(value)


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else math.inf
