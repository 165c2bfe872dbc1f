"""Widths under a budget of measured time: what blocks take at a few widths, and the set whose model takes no longer than asked.

Blocks of equal shape are narrowed together, so that what one width saves stands out of the noise; each then counts for its share.
Between the widths that were timed, time is taken as linear, and it never grows when units go. Blocks and kinds of units are taken
to add up; how far that holds is measured on the chosen set, and the budget is corrected by what was found.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import nn

from calibrate.latency import Timing
from compress import time_budget
from compress.time_budget import Fit
from compress.width.search import Group, TooSmall, choose
from compress.width.units import Units

if TYPE_CHECKING:
    from compress.passes.contract import Latency

__all__ = ["Curve", "Gone", "curves", "fit", "monotone", "timed_groups"]

Gone = list[list[int]]
"""Numbers of the units that go, for each group."""
Make = Callable[[Gone], nn.Module]
"""The model without the given units of each group."""

_PARTS = 4


@dataclass(frozen=True)
class Curve:
    """Time of the whole model, over that with all units, when each of some blocks of equal shape keeps a number of units.

    Attributes:
        members: numbers of the groups that were narrowed together.
        kept: units that stay, ascending; the last is all.
        measured: ratio of the median times; low, high: its 95 % interval.
        ratios: the same, made never to descend.
    """

    members: tuple[int, ...]
    kept: tuple[int, ...]
    measured: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]

    @property
    def ratios(self) -> list[float]:
        return [min(ratio, 1.0) for ratio in monotone([*self.measured[:-1], 1.0], [*[1.0] * (len(self.kept) - 1), 1e9])]

    def at(self, kept: int) -> float:
        """The ratio at any number of units, linear between those that were timed."""
        ratios = self.ratios
        if len(ratios) == 1:
            return 1.0
        right = max(1, bisect_left(self.kept, kept))
        start, end = self.kept[right - 1], self.kept[right]
        share = (kept - start) / (end - start)
        return ratios[right - 1] + share * (ratios[right] - ratios[right - 1])


def curves(units: Sequence[Units], groups: Sequence[Group], make: Make, latency: Latency) -> list[Curve]:
    """Times the model at a few widths of each kind of block, all in one interleaved measurement."""
    alike: dict[tuple[Any, ...], list[int]] = {}
    for number, (one, group) in enumerate(zip(units, groups, strict=True)):
        alike.setdefault((one.kind, len(one), one.heads, one.flops, group.step, group.least), []).append(number)
    widths = [(members, kept) for members in alike.values() for kept in _widths(groups[members[0]])]

    def models() -> Iterator[nn.Module]:
        yield make([[] for _ in units])
        for members, kept in widths:
            yield make([list(range(kept, len(one))) if number in members else [] for number, one in enumerate(units)])

    timings = latency(models())
    found = []
    for members in alike.values():
        mine = [
            (kept, timing.ratio)
            for (others, kept), timing in zip(widths, timings[1:], strict=True)
            if others is members and timing.ratio is not None
        ]
        kept = (*(number for number, _ in mine), len(units[members[0]]))
        ratios = [(ratio.value, ratio.low, ratio.high) for _, ratio in mine] + [(1.0, 1.0, 1.0)]
        measured, low, high = zip(*ratios, strict=True)
        found.append(Curve(tuple(members), kept, measured, low, high))
    return found


def _widths(group: Group) -> list[int]:
    """Numbers of units to time, ascending: none (or the least that stay), one step, and quarters of all."""
    count = len(group.scores)
    allowed = sorted(count - gone for gone in group.sizes[1:])
    quarters = [count * part / _PARTS for part in range(1, _PARTS)] if allowed else []
    return sorted({*allowed[:2], *(min(allowed, key=lambda kept: (abs(kept - wanted), kept)) for wanted in quarters)})


def monotone(values: Sequence[float], weights: Sequence[float]) -> list[float]:
    """The nearest values, in weighted squares, that never descend: neighbours that do are pooled (Barlow et al. 1972)."""
    pools: list[tuple[float, float, int]] = []
    for value, weight in zip(values, weights, strict=True):
        pools.append((value, weight, 1))
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            (first, one, count), (second, other, more) = pools[-2:]
            pools[-2:] = [((first * one + second * other) / (one + other), one + other, count + more)]
    return [value for value, _, count in pools for _ in range(count)]


def timed_groups(groups: Sequence[Group], found: Sequence[Curve]) -> tuple[list[Group], float]:
    """The groups with time as their cost, a share of the whole model's, and what the rest of the model takes."""
    timed = list(groups)
    for curve in found:
        for number in curve.members:
            nothing = curve.at(curve.kept[0])
            costs = [max(0.0, curve.at(kept) - nothing) / len(curve.members) for kept in range(len(groups[number].scores) + 1)]
            timed[number] = replace(groups[number], cost=costs)
    return timed, 1.0 - sum(group.costs(len(group.scores)) for group in timed)


def fit(groups: Sequence[Group], fixed: float, ratio: float, measure: Callable[[Gone], Sequence[Timing]]) -> Fit[Gone]:
    """The units of each group that go, so that the model takes no longer than asked; see ``compress.time_budget.fit``.

    Args:
        groups: with time as their cost.
        measure: timings of the whole model and of one without the given units, side by side.

    Raises:
        TooSmall: not even the smallest model is predicted to be as fast; ``least`` tells how long that takes.
    """

    def propose(budget: float, first: bool) -> tuple[Gone, float]:
        gone = _chosen(groups, fixed, budget, first)
        return gone, fixed + sum(group.costs(len(group.scores) - len(one)) for group, one in zip(groups, gone, strict=True))

    return time_budget.fit(propose, ratio, measure)


def _chosen(groups: Sequence[Group], fixed: float, budget: float, first: bool) -> Gone:
    try:
        return choose(groups, fixed, budget)
    except TooSmall as error:
        if first:
            raise
        return choose(groups, fixed, error.least * (1 + 1e-9))
