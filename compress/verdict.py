"""The rows of a report held against the contract of the recipe."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from compress.report import Latency, Limit, Row

if TYPE_CHECKING:
    from compress.recipe import Accept

__all__ = ["verdict", "with_float_times"]

_TIMES = ("median_ms", "low_ms", "high_ms")
_RUNTIME_LIMITS = ("metric_drop", "agreement", "sqnr_db", "latency_ratio", "size_ratio")


def with_float_times(rows: list[Row]) -> list[Row]:
    """The rows with the float row's times filled in: those of the float file in the first runtime that measured any."""
    measured = next((row.latency for row in rows if row.latency and row.latency[0].float_median_ms is not None), [])
    times = [
        Latency(
            **{key: getattr(latency, f"float_{key}") for key in _TIMES},
            **latency.model_dump(include={"batch", "runs", "threads", "processor", "runtime"}),
        )
        for latency in measured
    ]
    return [row.model_copy(update={"latency": times}) if row.validated == "reference" else row for row in rows]


def verdict(rows: list[Row], accept: Accept) -> list[Limit]:
    """Every line of ``accept`` for every file, met or not. A figure that a limit needs and that is missing is a miss, unless
    the recipe lists the runtime under ``unvalidated``. Without ``accept`` only failed checks of a file count."""
    limits: list[Limit] = []
    for row in rows:
        if row.validated == "reference" or row.format == "torch":
            continue
        if row.label != row.format and row.validated == "none" and accept.silent(row.label):
            continue
        for line in _RUNTIME_LIMITS:
            limit = accept.limit(line, row.label)
            if limit is not None:
                limits.append(_limit(row, line, limit, row.label in accept.unvalidated))
        if row.validated in ("none", "proxy") and accept != type(accept)():
            allowed = row.label in accept.unvalidated or row.format in accept.unvalidated
            permits = "permits" if allowed else "can permit"
            says = f"{row.label} was not run in its own runtime ({row.validated}); accept.unvalidated {permits} that"
            limits.append(
                Limit(line="accept.unvalidated", artifact=row.label, limit="run", value=row.validated, met=allowed, says=says)
            )
        for check in row.checks:
            if check.passed is False:
                says = f"{row.label}: {check.name}: {check.detail}"
                limits.append(Limit(line=check.name, artifact=row.label, limit="pass", value="fail", met=False, says=says))
    return limits


def _limit(row: Row, line: str, limit: float, excused: bool) -> Limit:
    found = _found(row, line)
    name = f"accept.{line}"
    if found is None:
        # A latency that cannot be measured here is not a miss of a file that may stay unvalidated.
        why = row.note or ("it was not measured here" if line == "latency_ratio" else "there is no such figure")
        return Limit(line=name, artifact=row.label, limit=limit, value=None, met=excused, says=f"{row.label}: {line}: {why}")
    least = line in ("agreement", "sqnr_db")
    met = found >= limit if least else found <= limit
    gap = abs(found - limit)
    word = ("at least" if least else "at most") + f" {limit:g}"
    says = f"{row.label}: {line} {found:.4g}, {word}" + ("" if met else f": missed by {gap:.4g}")
    return Limit(line=name, artifact=row.label, limit=limit, value=found, met=met, says=says)


def _found(row: Row, line: str) -> float | None:
    if line == "metric_drop":
        return row.drop.value if row.drop else None
    if line == "latency_ratio":
        ratios = [latency.ratio for latency in row.latency if latency.ratio is not None]
        return max(ratios) if ratios else None
    if line == "sqnr_db" and row.sqnr_db is None and row.validated != "none":
        return math.inf
    if line == "agreement":
        return row.agreement.value if row.agreement else None
    value: float | None = getattr(row, line)
    return value
