"""Scales fitted to codes: no row gets worse, and a scale that explains the weight is found."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from calibrate.grid import Grid
from compress.algorithms.gptq import gptq, output_error, refined
from compress.algorithms.rounding import codes_of, scales_of
from compress.algorithms.scale_fitting import fitted_scales

GRIDS = [Grid(8), Grid(4), Grid(4, True, "group", 8), Grid(4, False, "group", 16), Grid(2, False, "group", 8)]
each_grid = pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: f"{grid.bits}-{grid.granularity}-{grid.symmetric}")


def problem(seed: int = 0, outputs: int = 12, inputs: int = 32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(200, inputs, generator=generator) @ torch.randn(inputs, inputs, generator=generator)
    return torch.randn(outputs, inputs, generator=generator), x.t() @ x / 200


def errors(weight: Tensor, codes: Tensor, hessian: Tensor, grid: Grid, scale: Tensor, zero_point: Tensor | None) -> Tensor:
    return output_error(weight, grid.dequantize(codes, scale, zero_point), hessian)


@each_grid
@pytest.mark.parametrize("seed", [0, 1])
def test_no_row_gets_worse_and_the_whole_gets_better(grid: Grid, seed: int) -> None:
    weight, hessian = problem(seed)
    scale, zero_point = scales_of(weight, grid, "minmax")
    codes = gptq(weight, hessian, grid, scale, zero_point)
    fitted = fitted_scales(weight, codes, hessian, grid, scale, zero_point)
    before = errors(weight, codes, hessian, grid, scale, zero_point)
    after = errors(weight, codes, hessian, grid, fitted, zero_point)
    assert (after <= before).all()
    assert after.sum() < 0.999 * before.sum()
    assert torch.equal(fitted, fitted.half().float()) or bool((fitted == scale).any())
    again = refined(weight, codes, hessian, grid, fitted, zero_point, 2)
    assert (errors(weight, again, hessian, grid, fitted, zero_point) <= after * (1 + 1e-5)).all()


@each_grid
def test_it_is_the_least_of_all_scales(grid: Grid) -> None:
    """Small steps away from what was found cost more, within what float16 can tell apart."""
    weight, hessian = problem(2)
    scale, zero_point = scales_of(weight, grid, "minmax")
    codes = codes_of(weight, grid, scale, zero_point)
    fitted = fitted_scales(weight, codes, hessian, grid, scale, zero_point)
    least = errors(weight, codes, hessian, grid, fitted, zero_point)
    moved = fitted != scale
    assert moved.any()
    for part in (0.97, 1.03):
        for group in range(scale.shape[1]):
            other = fitted.clone()
            other[:, group] *= part
            worse = errors(weight, codes, hessian, grid, other, zero_point)
            assert (worse >= least * (1 - 1e-3))[moved.any(1)].all()


@each_grid
def test_scales_that_explain_the_weight_are_found(grid: Grid) -> None:
    weight, hessian = problem(3)
    scale, zero_point = scales_of(weight, grid, "minmax")
    codes = codes_of(weight, grid, scale, zero_point)
    true = (scale * (1 + 0.2 * torch.rand(scale.shape, generator=torch.Generator().manual_seed(0)))).half().float()
    exact = grid.dequantize(codes, true, zero_point)
    fitted = fitted_scales(exact, codes, hessian, grid, scale, zero_point)
    assert (errors(exact, codes, hessian, grid, fitted, zero_point)
            <= 1e-3 * errors(exact, codes, hessian, grid, scale, zero_point)).all()  # fmt: skip


def test_groups_of_zeros_and_weights_on_the_grid_keep_their_scales() -> None:
    weight, hessian = problem(4)
    grid = Grid(4, True, "group", 8)
    weight[:, 8:16] = 0
    scale, _ = scales_of(weight, grid, "minmax")
    codes = codes_of(weight, grid, scale, None)
    assert torch.equal(fitted_scales(weight, codes, hessian, grid, scale, None)[:, 1], scale[:, 1])
    exact = grid.dequantize(codes, scale, None)
    assert torch.equal(fitted_scales(exact, codes, hessian, grid, scale, None), scale)
