"""The multiple-choice knapsack: one choice of each group, least loss for every cost, by dynamic programming.

Kellerer, Pferschy and Pisinger, Knapsack Problems (2004), ch. 11: states that cost more and lose more than another are dropped
(Nemhauser and Ullmann 1969), so that what is left after the last group is the whole frontier of cost and loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Frontier", "frontier"]

_MOST = 200_000
"""States that are kept after a group; with more, costs are rounded up to a unit that gives no more."""


@dataclass(frozen=True)
class Frontier:
    """The assignments that no other beats in cost and loss, from the cheapest to the one that loses least.

    Attributes:
        costs: ascending, as given (not rounded).
        losses: strictly descending.
        unit: costs were rounded up to multiples of it while searching; 1: the frontier is exact. Otherwise each budget B has an
            answer at least as good as the best for B - groups * unit, and never one above B.
    """

    costs: NDArray[np.int64]
    losses: NDArray[np.float64]
    unit: int
    _last: NDArray[np.int64]
    _steps: tuple[tuple[NDArray[np.int32], NDArray[np.int16]], ...]

    def __len__(self) -> int:
        return len(self.costs)

    @property
    def exact(self) -> bool:
        return self.unit == 1

    def within(self, cost: float) -> int | None:
        """The point of least loss that costs no more; None where there is none."""
        found = np.nonzero(self.costs <= cost)[0]
        return int(found[-1]) if len(found) else None

    def least(self, loss: float) -> int | None:
        """The cheapest point that loses no more; None where there is none."""
        found = np.nonzero(self.losses <= loss)[0]
        return int(found[0]) if len(found) else None

    def choices(self, point: int) -> list[int]:
        """Which choice each group has at a point."""
        state, made = int(self._last[point]), []
        for parents, choice in reversed(self._steps):
            made.append(int(choice[state]))
            state = int(parents[state])
        return made[::-1]


def frontier(costs: Sequence[Sequence[int]], losses: Sequence[Sequence[float]], most: int = _MOST) -> Frontier:
    """The frontier of all assignments.

    Args:
        costs: of each choice of each group, whole numbers from 0.
        losses: of the same, from 0; they add up.
        most: states that may be kept after a group.
    """
    unit = 1
    while True:
        found = _search(costs, losses, unit, most)
        if found is not None:
            return found
        total = sum(max(group) for group in costs)
        unit = max(2 * unit, -(-total // most))


def _search(costs: Sequence[Sequence[int]], losses: Sequence[Sequence[float]], unit: int, most: int) -> Frontier | None:
    """The frontier with costs rounded up to multiples of ``unit``; None where it takes more states than ``most``."""
    rounded, true = np.zeros(1, np.int64), np.zeros(1, np.int64)
    loss = np.zeros(1)
    steps: list[tuple[NDArray[np.int32], NDArray[np.int16]]] = []
    for group_costs, group_losses in zip(costs, losses, strict=True):
        price = np.asarray(group_costs, np.int64)
        count, size = len(price), len(rounded)
        spent = (rounded[None] + -(-price // unit)[:, None]).reshape(-1)
        paid = (true[None] + price[:, None]).reshape(-1)
        lost = (loss[None] + np.asarray(group_losses, np.float64)[:, None]).reshape(-1)
        order = _undominated(spent, lost)
        if len(order) > most and unit * most < sum(max(group) for group in costs):
            return None
        parents, choice = np.tile(np.arange(size), count)[order], np.repeat(np.arange(count), size)[order]
        steps.append((parents.astype(np.int32), choice.astype(np.int16)))
        rounded, true, loss = spent[order], paid[order], lost[order]
    last = _undominated(true, loss)
    return Frontier(true[last], loss[last], unit, last, tuple(steps))


def _undominated(costs: NDArray[np.int64], losses: NDArray[np.float64]) -> NDArray[np.int64]:
    """Indices of the states that lose less than every state that costs no more, ascending in cost."""
    order = np.lexsort((losses, costs))
    best = np.minimum.accumulate(losses[order])
    keep = np.ones(len(order), bool)
    keep[1:] = losses[order][1:] < best[:-1]
    return order[keep]
