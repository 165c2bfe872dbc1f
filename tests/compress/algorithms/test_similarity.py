"""Laws of the similarity of parts, and of the choice by it."""

from __future__ import annotations

import itertools
import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from compress.algorithms.similarity import Sums, best_run, cosines, first_allowed


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_what_changes_nothing_has_similarity_exactly_one() -> None:
    x = drawn(500, 37) * torch.logspace(-15, 15, 500).unsqueeze(-1)
    assert (cosines(x, x) == 1).all()
    sums = Sums()
    sums.add(x, x + torch.zeros_like(x))
    assert sums.similarity == 1


def test_cosines_agree_with_torch_and_zero_tokens_have_none() -> None:
    before, after = drawn(64, 12), drawn(64, 12, seed=1)
    assert torch.allclose(cosines(before, after), torch.cosine_similarity(before.double(), after.double(), dim=-1), atol=1e-12)
    zero = torch.zeros(2, 3)
    assert cosines(zero, torch.tensor([[0.0, 0, 0], [1, 0, 0]])).tolist() == [1, 0]


def test_a_larger_orthogonal_output_is_less_similar() -> None:
    x = torch.cat([drawn(50, 4), torch.zeros(50, 4)], 1)
    out = torch.cat([torch.zeros(50, 4), drawn(50, 4, seed=1)], 1)
    found = []
    for scale in (0.0, 0.5, 1.0, 2.0, 4.0):
        sums = Sums()
        sums.add(x, x + scale * out)
        found.append(sums.similarity)
    assert found[0] == 1
    assert all(first > second for first, second in itertools.pairwise(found))
    expected = (x.norm(dim=1) / (x.norm(dim=1) ** 2 + 4 * out.norm(dim=1) ** 2).sqrt()).mean()
    assert math.isclose(found[3], float(expected), rel_tol=1e-6)


@given(st.lists(st.integers(1, 20), min_size=1, max_size=6))
def test_sums_do_not_depend_on_how_the_tokens_are_cut(sizes: list[int]) -> None:
    before, added = drawn(sum(sizes), 5), drawn(sum(sizes), 5, seed=1) + 3
    whole, cut = Sums(), Sums()
    whole.add(before, before + added, added)
    start = 0
    for size in sizes:
        piece = slice(start, start + size)
        cut.add(before[piece], before[piece] + added[piece], added[piece])
        start += size
    assert math.isclose(whole.similarity, cut.similarity, rel_tol=1e-12)
    assert whole.mean is not None
    assert cut.mean is not None
    assert torch.allclose(whole.mean, cut.mean, rtol=1e-12)
    assert torch.allclose(whole.mean, added.double().mean(0))


def test_the_mean_is_the_nearest_constant() -> None:
    added = drawn(200, 6) * 2 + 1
    sums = Sums()
    sums.add(added, added, added)
    assert sums.mean is not None
    least = (added - sums.mean).square().sum()
    for seed in range(5):
        assert (added - sums.mean - 0.01 * drawn(6, seed=seed)).square().sum() > least


def test_the_highest_go_first_and_of_equal_ones_the_first() -> None:
    assert first_allowed({"a": 0.5, "b": 0.9, "c": 0.9, "d": 0.1}, 3) == ["b", "c", "a"]
    assert first_allowed({0: 1.0, 1: 2.0, 2: 3.0}, 3, lambda chosen, key: len(chosen) < 2) == [2, 1]
    assert best_run({0: 0.3, 1: 0.8, 2: 0.8}) == 1
