"""Laws of the grid and of packing."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from calibrate.grid import Bits, Granularity, Grid, offset, pack, unpack

GRIDS = [
    Grid(bits, symmetric, granularity, 8 if granularity == "group" else None)
    for bits in (8, 4, 3, 2)
    for symmetric in (True, False)
    for granularity in ("tensor", "channel", "group")
] + [Grid(8, symmetric, "channel", None, True) for symmetric in (True, False)]


def fitted(grid: Grid, values: Tensor) -> tuple[Tensor, Tensor | None]:
    blocks = grid.blocks(values)
    return grid.parameters(blocks.amin(-1), blocks.amax(-1))


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_codes_lie_in_their_range_and_errors_within_half_a_step(grid: Grid) -> None:
    values = torch.randn(12, 32) * torch.rand(12, 1).exp()
    scale, zero_point = fitted(grid, values)
    codes = grid.quantize(values, scale, zero_point)
    assert codes.dtype == torch.int8
    assert grid.low <= int(codes.min())
    assert int(codes.max()) <= grid.high
    error = grid.blocks((values - grid.dequantize(codes, scale, zero_point)).abs())
    assert bool((error <= scale.unsqueeze(-1) / 2 * (1 + 1e-4)).all())


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_values_on_the_grid_come_back_unchanged(grid: Grid) -> None:
    codes = torch.randint(-grid.high, grid.high + 1, (6, 16), dtype=torch.int8)
    scale = torch.rand_like(fitted(grid, codes.float())[0]) + 0.1
    zero_point = None if grid.symmetric else torch.full(scale.shape, 1, dtype=torch.int8)
    values = grid.dequantize(codes, scale, zero_point)
    assert torch.equal(grid.quantize(values, scale, zero_point), codes)


@pytest.mark.parametrize("symmetric", [True, False])
def test_zero_is_returned_exactly(symmetric: bool) -> None:
    grid = Grid(4, symmetric)
    values = torch.rand(5, 10) + 0.5
    values[:, 3] = 0
    scale, zero_point = fitted(grid, values)
    assert torch.equal(grid.dequantize(grid.quantize(values, scale, zero_point), scale, zero_point)[:, 3], torch.zeros(5))


@pytest.mark.parametrize("granularity", ["tensor", "channel", "group"])
def test_more_bits_are_never_worse(granularity: Granularity) -> None:
    values = torch.randn(16, 64)
    quality = []
    choices: tuple[Bits, ...] = (2, 3, 4, 8)
    for bits in choices:
        grid = Grid(bits, False, granularity, 16 if granularity == "group" else None)
        scale, zero_point = fitted(grid, values)
        noise = values - grid.dequantize(grid.quantize(values, scale, zero_point), scale, zero_point)
        quality.append(10 * math.log10(float(values.square().sum() / noise.square().sum())))
    assert quality == sorted(quality)
    assert quality[3] > 35


def test_a_row_of_zeros_survives() -> None:
    grid, values = Grid(8), torch.zeros(2, 4)
    scale, zero_point = fitted(grid, values)
    assert bool((scale > 0).all())
    assert torch.equal(grid.dequantize(grid.quantize(values, scale, zero_point), scale, zero_point), values)


def test_groups_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="group_size 5 does not divide the 12 inputs"):
        Grid(4, True, "group", 5).blocks(torch.zeros(3, 12))


@given(st.sampled_from([2, 3, 4, 8]), st.integers(1, 5), st.integers(1, 17), st.integers(0, 99))
def test_packing_is_reversible_and_as_small_as_promised(bits: int, rows: int, columns: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    half = 2 ** (bits - 1)
    codes = torch.randint(-half, half, (rows, columns), dtype=torch.int8, generator=generator)
    packed = pack(codes, bits)
    assert packed.numel() == -(-rows * columns * bits // 8)
    assert torch.equal(unpack(packed, bits, (rows, columns)), codes)


def test_the_first_code_takes_the_lowest_bits() -> None:
    assert pack(torch.tensor([1, -2], dtype=torch.int8), 4).tolist() == [0xE1]
    assert pack(torch.tensor([1, -2, 0, -1], dtype=torch.int8), 2).tolist() == [0b11001001]
    assert pack(torch.tensor([1, -2, -1], dtype=torch.int8), 3).tolist() == [0b11110001, 0b1]


@given(st.sampled_from([2, 3, 4]), st.integers(1, 9), st.integers(0, 99))
def test_codes_without_sign_are_the_same_fields_moved_by_half(bits: int, units: int, seed: int) -> None:
    half = 2 ** (bits - 1)
    codes = torch.randint(-half, half, (24 * units,), dtype=torch.int8, generator=torch.Generator().manual_seed(seed))
    moved = offset(pack(codes, bits), bits).numpy()
    stream = np.unpackbits(moved, bitorder="little").reshape(-1, bits)
    assert np.array_equal((stream << np.arange(bits)).sum(1) - half, codes.numpy())
    assert torch.equal(offset(torch.from_numpy(moved), bits), pack(codes, bits))
