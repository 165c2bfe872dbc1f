"""Laws of 8-bit floating point, beside a reading of the format's definition and against integers."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from calibrate import float8, ops
from calibrate.grid import Grid
from compress.algorithms.rounding import codes_of, scales_of

FINITE = torch.tensor([bits for bits in range(-128, 128) if bits & 127 != 127], dtype=torch.int8)
"""All codes but the two that are no numbers."""


def number(bits: int) -> float:
    """What the definition says of eight bits: 1 of sign, 4 of exponent (bias 7), 3 of mantissa; subnormal at exponent 0."""
    sign, exponent, mantissa = (-1) ** (bits >> 7), bits >> 3 & 15, bits & 7
    return sign * (mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))


def sqnr(values: Tensor, back: Tensor) -> float:
    return 10 * math.log10(float(values.double().square().sum() / (values.double() - back.double()).square().sum()))


def test_codes_stand_for_the_numbers_of_the_definition_and_come_back_unchanged() -> None:
    wanted = torch.tensor([number(int(bits) & 255) for bits in FINITE])
    assert torch.equal(float8.values(FINITE), wanted)
    assert torch.equal(float8.codes(wanted), FINITE)
    assert float(wanted.max()) == float8.LARGEST == 448.0


@given(st.floats(-448, 448, width=32))
def test_the_nearest_number_is_taken(value: float) -> None:
    given_, numbers = torch.tensor([value]), float8.values(FINITE).double()
    made = float(float8.rounded(given_))
    assert abs(made - float(given_.double())) == float((numbers - given_.double()).abs().min())
    if abs(value) >= 2.0**-6:
        assert abs(made - value) <= 2.0**-4 * abs(value)
    else:
        assert abs(made - value) <= 2.0**-10


@pytest.mark.parametrize("value", [449.0, 1e9, math.inf])
def test_what_is_too_large_is_cut_off(value: float) -> None:
    assert float8.rounded(torch.tensor([value, -value])).tolist() == [448.0, -448.0]


@given(st.integers(-5, 5), st.integers(0, 50))
def test_a_power_of_two_moves_scales_and_no_code(power: int, seed: int) -> None:
    weight = torch.randn(6, 16, generator=torch.Generator().manual_seed(seed))
    grid = Grid(8, e4m3=True)
    scale, zero_point = scales_of(weight, grid, "minmax")
    assert zero_point is None
    moved = scales_of(weight * 2.0**power, grid, "minmax")[0]
    assert torch.equal(moved, scale * 2.0**power)
    codes = codes_of(weight, grid, scale, None)
    assert torch.equal(codes, codes_of(weight * 2.0**power, grid, moved, None))
    error = (weight - grid.dequantize(codes, scale, None)).abs()
    assert bool((error <= 2.0**-4 * weight.abs() + 2.0**-10 * scale).all())


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_heavy_tails_fit_floats_better_and_even_ones_integers(granularity: str) -> None:
    """The signal-to-noise ratio of E4M3 hangs little on the values; that of integers on how far the largest is from the rest."""
    generator = torch.Generator().manual_seed(0)
    heavy = torch.randn(64, 512, generator=generator)
    heavy = torch.where(torch.rand(64, 512, generator=generator) < 0.005, 40 * heavy, heavy)
    even = torch.rand(64, 512, generator=generator) * 2 - 1
    found = {}
    for name, values in (("heavy", heavy), ("even", even)):
        for e4m3 in (True, False):
            grid = Grid(8, True, granularity, e4m3=e4m3)  # type: ignore[arg-type]
            scale, _ = scales_of(values, grid, "minmax")
            found[name, e4m3] = sqnr(values, grid.dequantize(codes_of(values, grid, scale, None), scale, None))
    assert found["heavy", True] > found["heavy", False] + 1
    assert found["even", True] < found["even", False] - 5
    assert 3 * abs(found["heavy", True] - found["even", True]) < found["even", False] - found["heavy", False]


def test_the_ops_compute_what_the_grid_says() -> None:
    weight, grid = torch.randn(6, 4, 2, 2), Grid(8, e4m3=True)
    scale, _ = scales_of(weight, grid, "minmax")
    codes = codes_of(weight, grid, scale, None)
    dense = ops.dequantize_e4m3(codes.reshape(-1), scale, list(weight.shape))
    assert torch.equal(dense, grid.dequantize(codes, scale, None))
    x = torch.tensor([0.0, 0.3, -1.0, 5.0, -7.0])
    made = ops.quantize_dequantize_e4m3(x, torch.tensor(2.0**-7))
    assert torch.equal(made, float8.rounded(x * 128) / 128)
    assert made[-2:].tolist() == [3.5, -3.5]
    torch.library.opcheck(ops.dequantize_e4m3, (codes.reshape(-1), scale, list(weight.shape)))
    torch.library.opcheck(ops.quantize_dequantize_e4m3, (x, torch.tensor(0.5)))
