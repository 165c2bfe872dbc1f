"""Pairs of products that fit 16 bits: against an emulation of the instruction that cuts off what does not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from calibrate.grid import Grid
from compress.algorithms.gptq import gptq, output_error, refined
from compress.algorithms.pair_sums import PairLimit, roomier
from compress.algorithms.rounding import codes_of, scales_of

GRID = Grid(8)


def problem(outputs: int = 24, inputs: int = 48, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """A weight, second moments of its inputs, and the unsigned codes [rows, I] of inputs of which some reach far."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(400, inputs, generator=generator) @ torch.randn(inputs, inputs, generator=generator)
    scale = float(x.abs().max()) / 127
    codes = ((x / scale).round() + 128).clamp(0, 255)
    return torch.randn(outputs, inputs, generator=generator), x.t() @ x / len(x), codes


def cut_off(inputs: Tensor, weights: Tensor) -> Tensor:
    """``vpmaddubsw`` and a sum in 32 bits: the products of inputs 2j and 2j + 1 are added in 16 bits, and cut off."""
    products = inputs.unsqueeze(1) * weights.unsqueeze(0)
    return products.reshape(*products.shape[:2], -1, 2).sum(-1).clamp(-32768, 32767).sum(-1)


def overflows(inputs: Tensor, weights: Tensor) -> bool:
    return not torch.equal(cut_off(inputs, weights), inputs @ weights.t())


def limit_of(weight: Tensor) -> PairLimit:
    return PairLimit(torch.ones(weight.shape[1]))


LARGEST = torch.full((1, 48), 255.0)


def test_the_instruction_is_emulated() -> None:
    inputs = torch.full((1, 4), 255.0)
    assert cut_off(inputs, torch.tensor([[127.0, 127.0, 0.0, 0.0]])).item() == 32767
    assert cut_off(inputs, torch.tensor([[0.0, 127.0, 127.0, 0.0]])).item() == 2 * 127 * 255


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_projected_codes_never_overflow_on_any_input_up_to_the_largest_and_the_nearest_codes_do(seed: int) -> None:
    weight, _, inputs = problem(seed=seed)
    scale, _ = scales_of(weight, GRID, "minmax")
    nearest, limit = codes_of(weight, GRID, scale, None), limit_of(weight)
    extremes = (LARGEST, LARGEST * torch.tensor([0.0, 1.0]).repeat(24), inputs)
    assert any(overflows(x, nearest.float()) for x in extremes)
    made = limit.project(nearest)
    assert bool(limit.holds(made).all())
    assert not any(overflows(x, made.float()) for x in extremes)
    assert 0 < limit.overflowing(nearest) < 0.2
    assert limit.overflowing(made) == 0


def test_only_pairs_that_do_not_fit_give_way_and_towards_zero() -> None:
    weight, _, _ = problem()
    nearest, limit = codes_of(weight, GRID, scales_of(weight, GRID, "minmax")[0], None), limit_of(weight)
    made = limit.project(nearest)
    pairs = nearest.float().reshape(len(weight), -1, 2)
    too_much = torch.maximum(pairs.clamp(min=0).sum(-1), (-pairs).clamp(min=0).sum(-1)) > 128
    changed = (made != nearest).reshape(len(weight), -1, 2)
    assert torch.equal(changed.any(-1), too_much)
    assert (made.int().abs() <= nearest.int().abs()).all()
    assert torch.equal(limit.project(made), made)


def test_a_pair_loses_no_more_than_it_must() -> None:
    limit = PairLimit(torch.ones(2))
    assert limit.project(torch.tensor([[100, 100]], dtype=torch.int8)).tolist() == [[64, 64]]
    assert limit.project(torch.tensor([[-100, -100]], dtype=torch.int8)).tolist() == [[-64, -64]]
    assert limit.project(torch.tensor([[127, -127]], dtype=torch.int8)).tolist() == [[127, -127]]
    assert limit.project(torch.tensor([[127, 1]], dtype=torch.int8)).tolist() == [[127, 1]]
    heavy = PairLimit(torch.tensor([1e6, 1.0]))
    assert heavy.project(torch.tensor([[100, 100]], dtype=torch.int8)).tolist() == [[100, 28]]


@pytest.mark.parametrize("order", [True, False])
def test_gptq_and_its_refinement_keep_to_it_and_lose_less_than_seven_bits(order: bool) -> None:
    weight, hessian, _ = problem(seed=4)
    scale, _ = scales_of(weight, GRID, "minmax")
    limit = limit_of(weight)
    free = gptq(weight, hessian, GRID, scale, None, order=order)
    assert not bool(limit.holds(free).all())
    scale = roomier(weight, GRID, scale, limit)
    made = gptq(weight, hessian, GRID, scale, None, order=order, limit=limit)
    better = refined(weight, made, hessian, GRID, scale, None, 2, limit)
    for codes in (made, better):
        assert bool(limit.holds(codes).all())
    errors = [output_error(weight, GRID.dequantize(codes, scale, None), hessian) for codes in (made, better)]
    assert (errors[1] <= errors[0] * (1 + 1e-5)).all()
    half = scales_of(weight, GRID, "minmax")[0] * (127 / 64)
    reduced = refined(weight, gptq(weight, hessian, GRID, half, None, order=order), hessian, GRID, half, None, 2)
    assert errors[1].sum() < 0.7 * output_error(weight, GRID.dequantize(reduced, half, None), hessian).sum()


def test_where_every_pair_fits_nothing_changes() -> None:
    weight, hessian, _ = problem(seed=5)
    weight[:, 1::2] *= 1e-3
    scale, _ = scales_of(weight, GRID, "minmax")
    limit = limit_of(weight)
    nearest = codes_of(weight, GRID, scale, None)
    assert limit.project(nearest) is nearest
    assert torch.equal(roomier(weight, GRID, scale, limit), scale)
    assert torch.equal(gptq(weight, hessian, GRID, scale, None, limit=limit), gptq(weight, hessian, GRID, scale, None))


def test_a_wider_scale_is_taken_only_where_it_costs_less() -> None:
    weight, _, _ = problem(seed=6)
    scale, _ = scales_of(weight, GRID, "minmax")
    limit = limit_of(weight)
    wider = roomier(weight, GRID, scale, limit)
    assert (wider >= scale).all()
    assert (wider > scale).any()
    errors = [
        (GRID.dequantize(limit.project(GRID.quantize(weight, given, None)), given, None) - weight).square().sum(1)
        for given in (scale, wider)
    ]
    assert (errors[1] <= errors[0]).all()


def test_codes_that_may_move_by_one_still_fit() -> None:
    weight, _, _ = problem(seed=7)
    limit = limit_of(weight)
    codes = limit.project(codes_of(weight, GRID, scales_of(weight, GRID, "minmax")[0], None))
    free = limit.loose(codes)
    assert 0 < float(free.mean()) < 1
    moved = codes.float() + torch.where(codes >= 0, 1.0, -1.0) * free
    assert bool(limit.holds(moved).all())
