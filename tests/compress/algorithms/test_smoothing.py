"""Laws of the channel factors, and their noise formula against measured noise."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from calibrate.grid import Grid
from compress.algorithms.rounding import codes_of, scales_of
from compress.algorithms.smoothing import Smoothing, aligned, balanced, rounding_noise, smoothing

WEIGHTS, INPUTS = Grid(8), Grid(8, True, "tensor")


def seen(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return x.amin(0), x.amax(0), x.square().mean(0)


def measured(weight: Tensor, x: Tensor, factor: Tensor, weights: Grid, inputs: Grid) -> float:
    """The mean over rows of the squared error of the output, summed over its channels."""
    scaled, divided = x * factor, weight / factor
    step, zero_point = inputs.parameters(scaled.amin().reshape(1, 1), scaled.amax().reshape(1, 1))
    rounded = inputs.dequantize(inputs.quantize(scaled, step, zero_point), step, zero_point)
    scale, shift = scales_of(divided, weights, "minmax")
    dense = weights.dequantize(codes_of(divided, weights, scale, shift), scale, shift)
    return float((rounded @ dense.T - x @ weight.T).square().sum(1).mean())


def with_outliers(rows: int = 4000, channels: int = 64) -> Tensor:
    x = torch.randn(rows, channels)
    x[:, :3] *= torch.tensor([40.0, 25.0, 60.0])
    return x


@pytest.mark.parametrize("weights", [Grid(8), Grid(8, True, "tensor"), Grid(4, True, "group", 16)], ids=str)
@pytest.mark.parametrize("inputs", [INPUTS, Grid(8, False, "tensor")], ids=str)
def test_the_noise_formula_is_what_is_measured(weights: Grid, inputs: Grid) -> None:
    """Within 1 dB; in small groups it may tell too much, because the largest weight of each lies on the grid."""
    over = 3 if weights.group_size else 1
    weight = torch.randn(48, 64) / 8
    for x in (torch.randn(4000, 64), with_outliers()):
        for factor in (torch.ones(64), smoothing(weight, *seen(x), weights, inputs).factor):
            expected = rounding_noise(weight, factor, *seen(x), weights, inputs)
            found = measured(weight, x, factor, weights, inputs)
            assert -over < 10 * math.log10(found / expected) < 1


def test_outlier_channels_are_taken_off_the_input() -> None:
    x, weight = with_outliers(), torch.randn(48, 64) / 8
    found = smoothing(weight, *seen(x), WEIGHTS, INPUTS)
    assert found.gain_db > 10
    clean = float((x @ weight.T).square().sum(1).mean())
    rounded = measured(weight, x, torch.ones(64), WEIGHTS, INPUTS)
    assert abs(10 * math.log10(clean / rounded) - found.before_db) < 1.5
    gained = measured(weight, x, torch.ones(64), WEIGHTS, INPUTS) / measured(weight, x, found.factor, WEIGHTS, INPUTS)
    assert abs(10 * math.log10(gained) - found.gain_db) < 1.5
    assert torch.equal(found.factor, found.factor.half().float())


def test_equal_channels_gain_next_to_nothing() -> None:
    x = torch.rand(500, 32) * 2 - 1
    assert smoothing(torch.randn(8, 32), *seen(x), WEIGHTS, INPUTS).gain_db < 1


def test_nothing_to_gain_is_no_factor() -> None:
    found = smoothing(torch.ones(4, 8), -torch.ones(8), torch.ones(8), torch.ones(8), WEIGHTS, INPUTS)
    assert found.gain_db < 1e-6


def test_a_channel_that_hardly_woke_is_not_blown_up() -> None:
    x = with_outliers()
    x[:, 10] *= 1e-4
    factor = smoothing(torch.randn(48, 64) / 8, *seen(x), WEIGHTS, INPUTS).factor
    assert float(factor[10]) < 2 * float(factor[11:].max())


@pytest.mark.parametrize("how", [smoothing, balanced])
@pytest.mark.parametrize("symmetric", [True, False])
def test_factors_are_moved_so_that_a_power_of_two_is_filled(how: Callable[..., Smoothing], symmetric: bool) -> None:
    """One number for all channels: by the formula never worse, as measured better, and what it leaves empty of the range is
    less than an eighth of an octave."""
    weights, inputs = Grid(8, power_of_two=True), Grid(8, symmetric, "tensor", power_of_two=True)
    weight, x = torch.randn(96, 64, generator=torch.Generator().manual_seed(1)) / 8, 1.07 * with_outliers()
    given = how(weight, *seen(x), weights, inputs)
    found = aligned(given, weight, *seen(x), weights, inputs)
    noise = [rounding_noise(weight, one.factor, *seen(x), weights, inputs) for one in (given, found)]
    assert noise[1] <= noise[0]
    assert found.gain_db == pytest.approx(
        10 * math.log10(rounding_noise(weight, torch.ones(64), *seen(x), weights, inputs) / noise[1])
    )
    number = found.factor / given.factor
    assert float(number.max() / number.min()) < 1 + 2**-9  # float16 numbers, each rounded
    assert 1 <= float(number.mean()) < 2
    assert measured(weight, x, found.factor, weights, inputs) < 0.95 * measured(weight, x, given.factor, weights, inputs)
