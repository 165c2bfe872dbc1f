"""Which units go: the cheapest set under a budget."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

__all__ = ["Group", "TooSmall", "choose"]


class TooSmall(Exception):
    """The budget is below what stays in any case; ``least`` tells that."""

    def __init__(self, least: float) -> None:
        super().__init__(f"at least {least:g} stays")
        self.least = least


@dataclass(frozen=True)
class Group:
    """Units of one block that are ranked among themselves.

    Attributes:
        scores: how much each is missed, [units].
        cost: of one unit, in the budget's currency; or of 0, 1 ... all units together, [units + 1], never descending.
        step: what stays is a multiple of it (the first units that go make it one).
        least: how many stay in any case.
    """

    scores: Tensor
    cost: float | Sequence[float]
    step: int = 1
    least: int = 0

    @cached_property
    def ranked(self) -> list[int]:
        """Units, the least missed first; of equals the one with the lower number."""
        return [int(unit) for unit in torch.argsort(self.scores, stable=True)]

    @cached_property
    def sizes(self) -> list[int]:
        """How many units can be gone, ascending from 0."""
        count = len(self.scores)
        return [0] + [count - kept for kept in range((count - 1) // self.step * self.step, self.least - 1, -self.step)]

    def costs(self, kept: int) -> float:
        """Of so many units together."""
        return kept * self.cost if isinstance(self.cost, (int, float)) else self.cost[kept]


def choose(groups: Sequence[Group], fixed: float, budget: float) -> list[list[int]]:
    """Numbers of the units that go, for each group: those that are missed least for what they cost.

    The losses of a group over its costs have a lower convex hull; taking its edges in the order of loss per cost over all
    groups is the optimum of the linear relaxation, which includes the split between heads and neurons. The last edge is taken
    step by step; what still fits then comes back, the most missed first.

    Args:
        fixed: what costs are there beside the units.

    Raises:
        TooSmall: even without all units that may go it is more than the budget.
    """
    spent = fixed + sum(group.costs(len(group.scores)) for group in groups)
    least = fixed + sum(group.costs(len(group.scores) - group.sizes[-1]) for group in groups)
    slack = 1e-9 * spent
    if least > budget + slack:
        raise TooSmall(least)
    taken = [0] * len(groups)
    for _, number, _ in _steps(groups):
        if spent <= budget + slack:
            break
        spent -= _cost(groups[number], taken[number])
        taken[number] += 1
    while True:
        back = [
            (_loss(groups[number], taken[number] - 1), number)
            for number in range(len(groups))
            if taken[number] and spent + _cost(groups[number], taken[number] - 1) <= budget + slack
        ]
        if not back:
            break
        _, number = max(back, key=lambda entry: (entry[0], -entry[1]))
        taken[number] -= 1
        spent += _cost(groups[number], taken[number])
    return [sorted(group.ranked[: group.sizes[count]]) for group, count in zip(groups, taken, strict=True)]


def _steps(groups: Sequence[Group]) -> list[tuple[float, int, int]]:
    """(loss per cost, group, step) of all steps, ascending; those of a group in their order, and those of one edge of its hull
    at the same rate."""
    return sorted(
        (rate, number, step)
        for number, group in enumerate(groups)
        for start, end, rate in _edges(group)
        for step in range(start, end)
    )


def _edges(group: Group) -> list[tuple[int, int, float]]:
    """The lower convex hull of what is lost over what is saved: (first step, step after the last, loss per cost)."""
    edges: list[tuple[int, int, float, float]] = []
    for step in range(len(group.sizes) - 1):
        start, loss, saved = step, _loss(group, step), _cost(group, step)
        while edges and _rate(edges[-1][2], edges[-1][3]) > _rate(loss, saved):
            before = edges.pop()
            start, loss, saved = before[0], before[2] + loss, before[3] + saved
        edges.append((start, step + 1, loss, saved))
    return [(start, end, _rate(loss, saved)) for start, end, loss, saved in edges]


def _rate(loss: float, saved: float) -> float:
    """Loss per cost; what saves nothing goes last."""
    return loss / saved if saved > 0 else math.inf


def _cost(group: Group, step: int) -> float:
    count = len(group.scores)
    return group.costs(count - group.sizes[step]) - group.costs(count - group.sizes[step + 1])


def _loss(group: Group, step: int) -> float:
    gone = group.ranked[group.sizes[step] : group.sizes[step + 1]]
    return float(group.scores[gone].sum())
