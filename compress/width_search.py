"""Which units go: the cheapest set under a budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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
        cost: of one unit, in the budget's currency.
        step: what stays is a multiple of it (the first units that go make it one).
        least: how many stay in any case.
    """

    scores: Tensor
    cost: float
    step: int = 1
    least: int = 0

    @property
    def ranked(self) -> list[int]:
        """Units, the least missed first; of equals the one with the lower number."""
        return [int(unit) for unit in torch.argsort(self.scores, stable=True)]

    @property
    def sizes(self) -> list[int]:
        """How many units can be gone, ascending from 0."""
        count = len(self.scores)
        return [0] + [count - kept for kept in range((count - 1) // self.step * self.step, self.least - 1, -self.step)]


def choose(groups: Sequence[Group], fixed: float, budget: float) -> list[list[int]]:
    """Numbers of the units that go, for each group: those that are missed least for what they cost.

    Within a group the losses of its steps ascend, so that taking steps in the order of loss per cost over all groups is the
    optimum of the linear relaxation, which includes the split between heads and neurons. Steps overshoot by less than one;
    what still fits then comes back, the most missed first.

    Args:
        fixed: what costs are there beside the units.

    Raises:
        TooSmall: even without all units that may go it is more than the budget.
    """
    spent = fixed + sum(len(group.scores) * group.cost for group in groups)
    least = spent - sum(group.sizes[-1] * group.cost for group in groups)
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
    """(loss per cost, group, step) of all steps, ascending; those of a group in their order."""
    found = []
    for number, group in enumerate(groups):
        rate = 0.0
        for step in range(len(group.sizes) - 1):
            rate = max(rate, _loss(group, step) / _cost(group, step))
            found.append((rate, number, step))
    return sorted(found)


def _cost(group: Group, step: int) -> float:
    return (group.sizes[step + 1] - group.sizes[step]) * group.cost


def _loss(group: Group, step: int) -> float:
    gone = group.ranked[group.sizes[step] : group.sizes[step + 1]]
    return float(group.scores[gone].sum())
