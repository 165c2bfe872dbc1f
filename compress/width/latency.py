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

from calibrate.fidelity import Estimate
from calibrate.latency import Timing
from compress.width.search import Group, TooSmall, choose
from compress.width.units import Units

if TYPE_CHECKING:
    from compress.passes.contract import Latency

__all__ = ["Curve", "Fit", "Trial", "curves", "fit", "monotone", "timed_groups"]

Make = Callable[[list[list[int]]], nn.Module]
"""The model without the given units of each group."""

_PARTS = 4
_TRIES = 4
_LOOSE = 0.02
"""Share of the time that the chosen set may stay below the budget, before a larger set is looked for."""


_FURTHEST = 0.5
"""Least share of what was asked that a corrected budget may be: predictions that are off by more are told, not followed."""


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


@dataclass(frozen=True)
class Trial:
    """A set of units that was timed: the budget that it was searched for, what was predicted, what was measured."""

    gone: list[list[int]]
    budget: float
    predicted: float
    timing: Timing

    @property
    def ratio(self) -> float:
        return self._estimate.value

    @property
    def low(self) -> float:
        return self._estimate.low

    @property
    def high(self) -> float:
        return self._estimate.high

    @property
    def _estimate(self) -> Estimate:
        assert self.timing.ratio is not None
        return self.timing.ratio


@dataclass(frozen=True)
class Fit:
    """The set that was chosen among those timed; ``met``: whether it takes no longer than asked, as far as can be told."""

    chosen: Trial
    tried: tuple[Trial, ...]
    met: bool


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


def fit(groups: Sequence[Group], fixed: float, ratio: float, measure: Callable[[list[list[int]]], Timing]) -> Fit:
    """Searches, times what was found, and corrects the budget until the time is as asked or nothing else is found.

    Of the sets that take no longer than asked (the lower end of the interval counts), the one that was searched with the largest
    budget is chosen; of none, the fastest.

    Args:
        groups: with time as their cost.
        measure: the timing of a model without the given units, its ratio being to the whole model.

    Raises:
        TooSmall: not even the smallest model is predicted to be as fast; ``least`` tells how long that takes.
    """
    tried: list[Trial] = []
    budget = ratio
    for _ in range(_TRIES):
        gone = _chosen(groups, fixed, budget, first=not tried)
        if any(gone == trial.gone for trial in tried):
            break
        predicted = fixed + sum(group.costs(len(group.scores) - len(one)) for group, one in zip(groups, gone, strict=True))
        tried.append(Trial(gone, budget, predicted, measure(gone)))
        last = tried[-1]
        if last.low <= ratio <= last.high + _LOOSE:
            break
        saved, wanted = max(1.0 - last.ratio, 1e-3), 1.0 - ratio
        budget = max(_FURTHEST * ratio, min(1.0, 1.0 - wanted * (1.0 - last.predicted) / saved))
    meeting = [trial for trial in tried if trial.low <= ratio]
    chosen = max(meeting, key=lambda trial: trial.budget) if meeting else min(tried, key=lambda trial: trial.ratio)
    return Fit(chosen, tuple(tried), bool(meeting))


def _chosen(groups: Sequence[Group], fixed: float, budget: float, first: bool) -> list[list[int]]:
    try:
        return choose(groups, fixed, budget)
    except TooSmall as error:
        if first:
            raise
        return choose(groups, fixed, error.least * (1 + 1e-9))
