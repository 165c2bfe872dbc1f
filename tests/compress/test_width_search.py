"""The choice of units under a budget: against all subsets, within a step of the budget, nested as ranked."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.width.search import Group, TooSmall, choose


def group(scores: list[float], cost: float, step: int = 1, least: int = 0) -> Group:
    return Group(torch.tensor(scores, dtype=torch.float64), cost, step, least)


def spent(groups: list[Group], gone: list[list[int]], fixed: float) -> float:
    return fixed + sum((len(one.scores) - len(numbers)) * one.cost for one, numbers in zip(groups, gone, strict=True))


groups_drawn = st.lists(
    st.builds(
        group,
        st.lists(st.floats(0, 100), min_size=1, max_size=9),
        st.floats(0.5, 20),
        st.integers(1, 4),
    ),
    min_size=1,
    max_size=5,
)


@settings(max_examples=150, deadline=None)
@given(groups_drawn, st.floats(0, 1), st.floats(0, 50))
def test_budgets_hold_are_used_and_follow_the_ranks(groups: list[Group], share: float, fixed: float) -> None:
    total = fixed + sum(len(one.scores) * one.cost for one in groups)
    budget = fixed + share * (total - fixed)
    gone = choose(groups, fixed, budget)
    used = spent(groups, gone, fixed)
    assert used <= budget * (1 + 1e-8) + 1e-8
    for one, numbers in zip(groups, gone, strict=True):
        assert numbers == sorted(one.ranked[: len(numbers)]), "the least missed of each group go"
        kept = len(one.scores) - len(numbers)
        assert not numbers or kept % one.step == 0
        if numbers:
            at = one.sizes.index(len(numbers))
            back = (one.sizes[at] - one.sizes[at - 1]) * one.cost
            assert used + back > budget, "nothing that is gone would fit"


@settings(max_examples=60, deadline=None)
@given(groups_drawn, st.floats(0, 1), st.floats(0, 1))
def test_within_a_group_a_larger_budget_keeps_a_superset_or_a_subset(groups: list[Group], one: float, other: float) -> None:
    total = sum(len(each.scores) * each.cost for each in groups)
    for less, more in zip(choose(groups, 0, one * total), choose(groups, 0, other * total), strict=True):
        assert set(less) <= set(more) or set(more) <= set(less)


def test_equal_costs_give_nested_sets() -> None:
    scores = torch.rand(3, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    groups = [Group(row, 1.0) for row in scores]
    before: set[tuple[int, int]] = set()
    for budget in range(24, -1, -1):
        gone = {(at, unit) for at, numbers in enumerate(choose(groups, 0, budget)) for unit in numbers}
        assert len(gone) == 24 - budget
        assert before <= gone
        before = gone


@pytest.mark.parametrize("seed", range(5))
def test_it_is_near_the_best_of_all_subsets(seed: int) -> None:
    """The loss is at most that of the best set plus the largest step: the bound of a knapsack's relaxation."""
    generator = torch.Generator().manual_seed(seed)
    groups = [Group(torch.rand(4, generator=generator, dtype=torch.float64), cost) for cost in (1.0, 3.0)]
    for budget in (13.0, 9.0, 5.0):
        gone = choose(groups, 0, budget)
        loss = sum(float(one.scores[numbers].sum()) for one, numbers in zip(groups, gone, strict=True))
        best = min(
            sum(float(one.scores[one.ranked[:count]].sum()) for one, count in zip(groups, counts, strict=True))
            for counts in itertools.product(range(5), repeat=2)
            if spent(groups, [one.ranked[:count] for one, count in zip(groups, counts, strict=True)], 0) <= budget
        )
        assert best <= loss + 1e-12
        assert loss <= best + max(float(one.scores.max()) for one in groups)


def test_free_units_go_first_and_ties_by_number() -> None:
    groups = [group([5, 0, 5, 0], 1), group([1, 1, 1, 1], 1)]
    assert choose(groups, 0, 6) == [[1, 3], []]
    assert choose(groups, 0, 4) == [[1, 3], [0, 1]]


def test_first_step_makes_a_multiple() -> None:
    one = group([float(value) for value in range(10)], 1, step=4)
    assert one.sizes == [0, 2, 6, 10]
    assert choose([one], 0, 9) == [[0, 1]]


def test_too_small_tells_the_least() -> None:
    one = group([1, 2, 3, 4], 2, least=1)
    with pytest.raises(TooSmall) as caught:
        choose([one], 10, 11)
    assert caught.value.least == 12
    assert choose([one], 10, 12) == [[0, 1, 2]]


def test_what_saves_more_when_more_goes_is_taken_as_one() -> None:
    """Three units whose last one frees nearly all the time, beside a group of linear cost that is dearer per cost."""
    fixed = Group(torch.tensor([1.0, 1.0, 1.0], dtype=torch.float64), [0.0, 8.0, 9.0, 10.0])
    plain = group([1.0] * 10, 1)
    assert choose([fixed, plain], 0, 10) == [[0, 1, 2], []]
    alone = choose([fixed], 0, 9)
    assert alone == [[0]], "what still fits comes back"


@pytest.mark.parametrize("seed", range(5))
def test_curves_of_cost_are_held_and_near_the_best_set(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    groups = []
    for _ in range(2):
        curve = torch.rand(6, generator=generator, dtype=torch.float64).cumsum(0)
        groups.append(Group(torch.rand(5, generator=generator, dtype=torch.float64), (curve - curve[0]).tolist()))
    total = sum(one.costs(5) for one in groups)

    def needs(counts: tuple[int, ...]) -> float:
        return sum(one.costs(5 - count) for one, count in zip(groups, counts, strict=True))

    for budget in (0.75 * total, 0.5 * total, 0.25 * total):
        gone = choose(groups, 0, budget)
        loss = sum(float(one.scores[numbers].sum()) for one, numbers in zip(groups, gone, strict=True))
        assert needs(tuple(map(len, gone))) <= budget * (1 + 1e-8)
        losses = {
            counts: sum(float(one.scores[one.ranked[:count]].sum()) for one, count in zip(groups, counts, strict=True))
            for counts in itertools.product(range(6), repeat=2)
            if needs(counts) <= budget
        }
        assert min(losses.values()) <= loss + 1e-12
        edge = max(float(one.scores.sum()) for one in groups)
        assert loss <= min(losses.values()) + edge


def test_units_that_save_nothing_stay() -> None:
    idle, busy = Group(torch.zeros(3, dtype=torch.float64), [1.0] * 4), group([5.0, 6.0], 1)
    assert choose([idle, busy], 0, 2) == [[], [0]]
