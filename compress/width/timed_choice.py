"""The units that go so that a model's file takes no longer than asked, and what a report says of how they were found."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from calibrate.latency import Timing
from compress.width.latency import Curve, Fit, curves, fit, timed_groups
from compress.width.search import Group
from compress.width.units import Units

if TYPE_CHECKING:
    from compress.passes.contract import Latency

__all__ = ["chosen_by_time"]

Progress = Callable[[int, int, str], None]


def chosen_by_time(
    units: Sequence[Units],
    groups: Sequence[Group],
    ratio: float,
    make: Callable[[list[list[int]]], nn.Module],
    latency: Latency,
    progress: Progress = lambda done, total, what: None,
) -> tuple[list[list[int]], dict[str, Any]]:
    """Numbers of the units that go, for each group, and what is to be told: the table of times, every set that was tried, what
    was predicted and what was measured.

    Args:
        groups: the units with their scores; their cost is measured here.
        ratio: largest time of the narrowed model over that of the whole one.
        make: the model without the given units.

    Raises:
        TooSmall: not even the smallest model is predicted to be as fast.
    """
    progress(0, 2, "time of a few widths")
    found = curves(units, groups, make, latency)
    timed, fixed = timed_groups(groups, found)
    whole: list[Timing] = []

    def measure(gone: list[list[int]]) -> Timing:
        progress(1, 2, "time of the chosen widths")
        before, after = latency([make([[] for _ in units]), make(gone)])
        whole.append(before)
        return after

    done = fit(timed, fixed, ratio, measure)
    return done.chosen.gone, _told(units, found, done, ratio, whole) | latency.conditions


def _told(units: Sequence[Units], found: Sequence[Curve], done: Fit, ratio: float, whole: Sequence[Timing]) -> dict[str, Any]:
    chosen = done.chosen
    return {
        "asked": ratio,
        "predicted": _short(chosen.predicted),
        "measured": _short(chosen.ratio),
        "low": _short(chosen.low),
        "high": _short(chosen.high),
        "met": done.met,
        "ms_before": _short(whole[done.tried.index(chosen)].median_ms),
        "ms_after": _short(chosen.timing.median_ms),
        "tried": [
            {"budget": _short(trial.budget), "predicted": _short(trial.predicted), "measured": _short(trial.ratio)}
            for trial in done.tried
        ],
        "table": [_row(units, curve) for curve in found],
    }


def _row(units: Sequence[Units], curve: Curve) -> dict[str, Any]:
    """Blocks of one shape: the time of the model when all of them keep so many units, over that of the whole model."""
    return {
        "kind": units[curve.members[0]].kind,
        "blocks": [units[number].block for number in curve.members],
        "stay": list(curve.kept),
        "measured": [_short(value) for value in curve.measured],
        "taken_as": [_short(value) for value in curve.ratios],
    }


def _short(value: float) -> float:
    return float(f"{value:.4g}")
