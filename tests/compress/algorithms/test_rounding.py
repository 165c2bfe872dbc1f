"""Scales of groups that are multiples of one step."""

from __future__ import annotations

import pytest
import torch

from calibrate.grid import Grid
from compress.algorithms.rounding import codes_of, multiples, rounding_loss, scales_of


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4])
def test_code_times_multiple_is_an_int8_and_equals_the_weight(bits: int, symmetric: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(48, 128, generator=generator) * torch.randn(48, 1, generator=generator).exp()
    grid = Grid(bits, symmetric, "group", 32)
    free, shift = scales_of(weight, grid, "mse")
    scale = multiples(free, grid)
    codes = codes_of(weight, grid, scale, shift)
    most = 128 >> (bits - 1) if symmetric else 127 // (2**bits - 1)
    step = scale.amax(1, keepdim=True) / most
    numbers = scale / step
    assert torch.equal(numbers, numbers.round())
    assert torch.equal(step, step.half().float())
    centred = codes.reshape(48, 4, 32).int() - (0 if shift is None else shift.int().unsqueeze(-1))
    wide = centred * numbers.int().unsqueeze(-1)
    assert -128 <= int(wide.min()) <= int(wide.max()) <= 127
    assert torch.equal((wide * step.unsqueeze(-1)).reshape(48, 128), grid.dequantize(codes, scale, shift))
    assert (scale - free).abs().max() <= (step / 2 + free * 2.0**-10).max()
    losses = [rounding_loss(weight, codes_of(weight, grid, each, shift), grid, each, shift) for each in (free, scale)]
    assert losses[1] > losses[0] - 1
