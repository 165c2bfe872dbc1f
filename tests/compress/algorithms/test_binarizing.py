"""Signs and factors: least squares, in whole numbers, for whatever rows there are."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from calibrate.bits import signs
from compress.algorithms.binarizing import Binarized, binarized, nearest, rebinarized

FORMS = list(itertools.product((1, 2, 3), (None, 16), (False, True)))


def _weight(outputs: int = 24, inputs: int = 64, mean: float = 0.0, seed: int = 0) -> Tensor:
    return 0.05 * torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed)) + mean


def _error(weight: Tensor, found: Binarized) -> float:
    return float((found.values - weight).double().square().sum())


def test_one_base_is_the_sign_and_the_mean_size() -> None:
    weight = _weight()
    found = binarized(weight)
    assert found.multiples is None
    assert torch.equal(found.planes[0], signs(weight))
    best = weight.abs().mean(1, keepdim=True)
    assert torch.equal(found.scale, best.half().float())
    for factor in (0.9, 1.1):
        worse = Binarized(found.planes, None, None, found.scale * factor)
        assert _error(weight, worse) > _error(weight, found)


@pytest.mark.parametrize(("bases", "group", "shift"), FORMS)
def test_what_is_carried_is_whole_numbers_that_kernels_hold(bases: int, group: int | None, shift: bool) -> None:
    found = binarized(_weight(mean=0.01), bases, group, shift)
    whole = (found.values / found.scale).round()
    assert torch.equal(whole * found.scale, found.values)
    narrow = group is None and not shift
    assert float(whole.abs().max()) <= (7 if narrow else 63)
    assert torch.equal(found.scale.half().float(), found.scale)


@pytest.mark.parametrize(("bases", "group", "shift"), FORMS)
def test_it_begins_again_with_what_it_gave(bases: int, group: int | None, shift: bool) -> None:
    found = binarized(_weight(mean=0.01), bases, group, shift)
    again = rebinarized(found.values, found, found.scale)
    assert torch.equal(again.values, found.values)
    steps = nearest(_weight(seed=5) / found.scale, found.multiples, found.shift)
    assert torch.equal(steps * found.scale, rebinarized(_weight(seed=5), found, found.scale).values)


def test_more_bases_groups_and_the_mean_bring_it_nearer() -> None:
    weight = _weight(mean=0.02)
    errors = [_error(weight, binarized(weight, bases)) for bases in (1, 2, 3)]
    assert errors[0] > 2 * errors[1] > 4 * errors[2]
    assert _error(weight, binarized(weight, 1, 16)) < errors[0]
    assert _error(weight, binarized(weight, 1, None, True)) < errors[0]
    assert _error(weight, binarized(weight, scale="tensor")) > errors[0]


@pytest.mark.parametrize("bases", [2, 3])
def test_least_squares_beat_greedy_bases(bases: int) -> None:
    weight = _weight()
    assert _error(weight, binarized(weight, bases, 16)) < _error(weight, binarized(weight, bases, 16, rounds=0))


@pytest.mark.parametrize(("bases", "group", "shift"), FORMS)
def test_a_sum_of_signs_is_found_again(bases: int, group: int | None, shift: bool) -> None:
    """A weight that is one of those that can be carried loses nothing but what float16 rounds of its scale."""
    planes = signs(_weight(8, 64, seed=2))
    factor = torch.linspace(0.5, 2.0, 8).unsqueeze(1)
    weight = planes * factor
    found = binarized(weight, bases, group, shift)
    assert _error(weight, found) <= 2.0**-13 * float(weight.square().sum())


@pytest.mark.parametrize(("bases", "group", "shift"), FORMS)
@pytest.mark.parametrize("value", [0.0, 0.5, -0.5])
def test_constant_rows_are_kept(value: float, bases: int, group: int | None, shift: bool) -> None:
    weight = torch.full((3, 32), value)
    found = binarized(weight, bases, group, shift)
    assert found.values.isfinite().all()
    assert float((found.values - weight).abs().max()) <= max(2.0**-11 * abs(value), 2.0**-20)


def test_the_brute_force_best_of_two_bases_is_not_far() -> None:
    """For one short row all sign patterns can be tried with their best factors: the search in turns is near, and never better."""
    weight = _weight(1, 8, seed=4)
    patterns = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=8)))
    best = torch.inf
    for first in patterns[:128]:
        terms = torch.stack([first.expand_as(patterns), patterns], -1)
        solved = torch.linalg.lstsq(terms, weight.t().expand(len(patterns), 8, 1), driver="gelsd").solution
        best = min(best, float((terms @ solved - weight.t()).square().sum((1, 2)).min()))
    found = _error(weight, binarized(weight, 2))
    assert best <= found * (1 + 1e-6)
    assert found - best <= 0.03 * float(weight.square().sum())
