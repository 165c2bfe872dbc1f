"""AdaRound against round-to-nearest, and every way to round a tiny weight."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from calibrate.grid import Grid
from compress.algorithms.adaround import adaround
from compress.algorithms.gptq import output_error
from compress.algorithms.rounding import codes_of, scales_of

GRIDS = [Grid(8), Grid(4), Grid(2), Grid(4, False), Grid(4, True, "tensor"), Grid(4, False, "group", 8), Grid(3, False)]
each_grid = pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: f"{grid.bits}-{grid.granularity}-{grid.symmetric}")


def problem(outputs: int = 12, inputs: int = 32, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(300, inputs, generator=generator) @ torch.randn(inputs, inputs, generator=generator)
    return torch.randn(outputs, inputs, generator=generator), x.t() @ x / len(x)


@each_grid
def test_no_row_is_worse_than_where_it_began_and_the_whole_is_much_better(grid: Grid) -> None:
    weight, hessian = problem()
    scale, zero = scales_of(weight, grid, "minmax")
    nearest = codes_of(weight, grid, scale, zero)
    made = adaround(weight, hessian, grid, scale, zero, nearest)
    before, after = (output_error(weight, grid.dequantize(codes, scale, zero), hessian) for codes in (nearest, made))
    assert (after <= before).all()
    assert after.sum() < 0.6 * before.sum()
    assert made.dtype == torch.int8
    assert grid.low <= int(made.min()) <= int(made.max()) <= grid.high


@each_grid
def test_each_weight_goes_up_or_down_and_the_hessians_size_does_not_matter(grid: Grid) -> None:
    weight, hessian = problem(seed=1)
    scale, zero = scales_of(weight, grid, "minmax")
    nearest = codes_of(weight, grid, scale, zero)
    made = adaround(weight, hessian, grid, scale, zero, nearest)
    away = (grid.dequantize(made, scale, zero) - grid.dequantize(nearest, scale, zero)).abs()
    assert (grid.blocks(away) <= scale.unsqueeze(-1) * (1 + 1e-4)).all()
    assert torch.equal(made, adaround(weight, hessian, grid, scale, zero, nearest))
    assert torch.equal(made, adaround(weight, 1024 * hessian, grid, scale, zero, nearest))


def test_weights_on_the_grid_stay() -> None:
    weight, hessian = problem(seed=2)
    grid = Grid(4)
    scale, _ = scales_of(weight, grid, "minmax")
    codes = codes_of(weight, grid, scale, None)
    assert torch.equal(adaround(grid.dequantize(codes, scale, None), hessian, grid, scale, None, codes), codes)


def test_it_gains_much_of_what_the_best_of_all_roundings_does() -> None:
    weight, hessian = problem(outputs=8, inputs=8, seed=3)
    grid = Grid(4)
    scale, _ = scales_of(weight, grid, "minmax")
    nearest = codes_of(weight, grid, scale, None)
    made = adaround(weight, hessian, grid, scale, None, nearest, steps=400)
    below = (weight / scale).floor()
    every = [(below + torch.tensor(up)).clamp(grid.low, grid.high) for up in itertools.product((0, 1), repeat=8)]
    errors = torch.stack([output_error(weight, codes * scale, hessian) for codes in every])
    best, reached, start = (
        errors.amin(0).sum(),
        output_error(weight, made * scale, hessian).sum(),
        output_error(weight, nearest * scale, hessian).sum(),
    )
    assert best <= reached * (1 + 1e-5)
    assert start - reached > 0.4 * (start - best)
