"""The multiple-choice knapsack against trying everything."""

from __future__ import annotations

import itertools
import random

import pytest

from compress.algorithms.knapsack import Frontier, frontier

Groups = list[list[tuple[int, float]]]


def drawn(seed: int, groups: int, largest: int = 50) -> Groups:
    rng = random.Random(seed)
    return [[(rng.randrange(largest), rng.random()) for _ in range(rng.randint(1, 4))] for _ in range(groups)]


def hard(groups: int) -> Groups:
    """Dearer choices lose less, so that few states beat others."""
    rng = random.Random(groups)
    costs = [sorted(rng.randrange(10**7) for _ in range(3)) for _ in range(groups)]
    return [list(zip(some, sorted((rng.random() for _ in some), reverse=True), strict=True)) for some in costs]


def tried(groups: Groups) -> list[tuple[int, float]]:
    return [(sum(c for c, _ in picked), sum(x for _, x in picked)) for picked in itertools.product(*groups)]


def made(groups: Groups, most: int = 1000) -> Frontier:
    return frontier([[c for c, _ in group] for group in groups], [[x for _, x in group] for group in groups], most)


@pytest.mark.parametrize("seed", range(25))
def test_every_budget_and_every_loss_has_the_best_assignment(seed: int) -> None:
    groups = drawn(seed, 5)
    found, every = made(groups), tried(groups)
    assert found.exact
    for budget in range(0, 260, 7):
        point = found.within(budget)
        possible = [loss for cost, loss in every if cost <= budget]
        assert (point is None) == (not possible)
        if point is not None:
            assert found.losses[point] == pytest.approx(min(possible), abs=1e-12)
    for loss in (0.3, 1.0, 1.7, 2.4):
        point = found.least(loss)
        possible_costs = [cost for cost, other in every if other <= loss]
        assert (point is None) == (not possible_costs)
        if point is not None:
            assert found.costs[point] == min(possible_costs)


@pytest.mark.parametrize("seed", range(10))
def test_the_choices_of_a_point_add_up_to_it(seed: int) -> None:
    groups = drawn(seed, 12)
    found = made(groups)
    for point in range(len(found)):
        picked = [group[choice] for group, choice in zip(groups, found.choices(point), strict=True)]
        assert sum(cost for cost, _ in picked) == found.costs[point]
        assert sum(loss for _, loss in picked) == pytest.approx(found.losses[point], abs=1e-9)


def test_with_too_many_states_the_budget_holds_and_the_loss_is_within_the_bound_that_is_told() -> None:
    groups = hard(11)
    exact, rough = made(groups, 10**6), made(groups, 40)
    assert exact.exact
    assert not rough.exact
    for budget in range(20_000_000, 100_000_000, 3_000_000):
        best, point, bound = exact.within(budget), rough.within(budget), exact.within(budget - len(groups) * rough.unit)
        if point is None:
            assert bound is None
            continue
        assert best is not None
        assert rough.costs[point] <= budget
        assert rough.losses[point] >= exact.losses[best] - 1e-9
        if bound is not None:
            assert rough.losses[point] <= exact.losses[bound] + 1e-9


def test_a_larger_budget_never_loses_more_even_with_too_many_states() -> None:
    found = made(hard(30), 300)
    assert not found.exact
    assert list(found.costs) == sorted(found.costs)
    assert list(found.losses) == sorted(found.losses, reverse=True)
