"""The units that go so that a model's file takes no longer than asked, and what a report says of how they were found."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from calibrate.latency import Timing
from compress.time_budget import Fit, short
from compress.width.latency import Curve, Gone, curves, fit, timed_groups
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
) -> tuple[Fit[Gone], dict[str, Any]]:
    """Numbers of the units that go, for each group, as they were found, and what is to be told: the table of times, every set
    that was tried, what was predicted and what was measured.

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

    def measure(gone: Gone) -> Sequence[Timing]:
        progress(1, 2, "time of the chosen widths")
        return latency([make([[] for _ in units]), make(gone)])

    done = fit(timed, fixed, ratio, measure)
    return done, done.json() | {"table": [_row(units, curve) for curve in found]} | latency.conditions


def _row(units: Sequence[Units], curve: Curve) -> dict[str, Any]:
    """Blocks of one shape: the time of the model when all of them keep so many units, over that of the whole model."""
    return {
        "kind": units[curve.members[0]].kind,
        "blocks": [units[number].block for number in curve.members],
        "stay": list(curve.kept),
        "measured": [short(value) for value in curve.measured],
        "taken_as": [short(value) for value in curve.ratios],
    }
