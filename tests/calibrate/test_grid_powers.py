"""Laws of grids whose scales are powers of two (BCT, arXiv 2304.01483)."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from calibrate.fidelity import sqnr_db
from calibrate.grid import Bits, Grid
from calibrate.ranges import MeanSquare, storable
from compress.algorithms.rounding import codes_of, multiples, rounding_loss, scales_of

BITS: tuple[Bits, ...] = (8, 4, 3, 2)


def blockwise(bits: Bits, symmetric: bool = True) -> Grid:
    return Grid(bits, symmetric, "group", 16, power_of_two=True)


def returned(values: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    scale, zero_point = scales_of(values, grid, "minmax")
    return grid.dequantize(grid.quantize(values, scale, zero_point), scale, zero_point), scale


def powers(scale: Tensor) -> bool:
    return bool((torch.frexp(scale).mantissa == 0.5).all())


def drawn(seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(12, 64, generator=generator) * (6 * torch.randn(12, 1, generator=generator)).exp()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", BITS)
def test_every_scale_is_a_power_of_two_and_free_ones_are_not(bits: Bits, symmetric: bool) -> None:
    for how in ("minmax", "mse"):
        assert powers(scales_of(drawn(), blockwise(bits, symmetric), how)[0])  # type: ignore[arg-type]
        assert not powers(scales_of(drawn(), Grid(bits, symmetric, "group", 16), how)[0])  # type: ignore[arg-type]


@given(st.floats(2.0**-100, 2.0**100, width=32), st.sampled_from(BITS))
def test_the_shift_is_that_of_the_formula(largest: float, bits: Bits) -> None:
    """ceil(log2(absmax)) - (bits - 1), in whole numbers: a logarithm in floating point is off by one beside powers of two."""
    found = Fraction(float(Grid(bits, power_of_two=True).parameters(torch.tensor(-largest), torch.tensor(0.0))[0]))
    shift = found * 2 ** (bits - 1)
    assert shift / 2 < Fraction(largest) <= shift
    assert math.log2(found).is_integer()


@pytest.mark.parametrize("bits", BITS)
def test_a_block_of_zeros_stays_zero(bits: Bits) -> None:
    values = drawn()
    values[:, 16:32] = 0
    for symmetric in (True, False):
        back, scale = returned(values, blockwise(bits, symmetric))
        assert torch.equal(back[:, 16:32], torch.zeros(12, 16))
        assert bool(back.isfinite().all() & scale.isfinite().all())


@pytest.mark.parametrize("bits", BITS)
def test_multiples_of_the_scale_come_back_unchanged(bits: Bits) -> None:
    generator = torch.Generator().manual_seed(bits)
    high = 2 ** (bits - 1) - 1
    codes = torch.randint(-high, high + 1, (6, 32), generator=generator)
    codes[:, ::16] = -(2 ** (bits - 1))  # so that the block's largest value says this scale
    values = codes.float() * 2.0 ** torch.randint(-9, 9, (6, 1), generator=generator)
    assert torch.equal(returned(values, blockwise(bits))[0], values)


@pytest.mark.parametrize("bits", BITS)
def test_one_block_is_the_whole_tensor(bits: Bits) -> None:
    values = drawn()[:1]
    whole = returned(values, Grid(bits, granularity="tensor", power_of_two=True))
    block = returned(values, Grid(bits, granularity="group", group_size=64, power_of_two=True))
    assert torch.equal(whole[0], block[0])
    assert torch.equal(whole[1], block[1])


@pytest.mark.parametrize("bits", BITS)
def test_the_error_is_within_the_last_bit_of_the_blocks_largest_value(bits: Bits) -> None:
    grid, values = blockwise(bits), drawn(bits)
    values = torch.cat([values, -values, values.sign() * values.abs().amax(1, keepdim=True)])
    error = grid.blocks((values - returned(values, grid)[0]).abs()).amax(-1)
    largest = grid.blocks(values.abs()).amax(-1)
    assert bool((error <= largest * 2.0 ** -(bits - 1)).all())
    assert bool((error > largest * 2.0 ** -(bits + 2)).any())  # or the bound would say nothing


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("how", ["minmax", "mse"])
def test_a_power_of_two_times_the_values_moves_the_exponent_alone(how: str, symmetric: bool) -> None:
    for bits in BITS:
        grid = blockwise(bits, symmetric)
        scale, shift = scales_of(drawn(), grid, how)  # type: ignore[arg-type]
        moved, again = scales_of(drawn() * 32, grid, how)  # type: ignore[arg-type]
        assert torch.equal(moved, 32 * scale)
        assert torch.equal(codes_of(drawn() * 32, grid, moved, again), codes_of(drawn(), grid, scale, shift))
        other, _ = scales_of(drawn() * 3, grid, how)  # type: ignore[arg-type]
        assert not torch.equal(other, 3 * scale)


@pytest.mark.parametrize("bits", BITS)
def test_smaller_blocks_and_a_search_are_never_worse_on_average(bits: Bits) -> None:
    values = drawn(3)
    quality = []
    for size, how in ((64, "minmax"), (16, "minmax"), (16, "mse")):
        grid = Grid(bits, granularity="group", group_size=size, power_of_two=True)
        scale, _ = scales_of(values, grid, how)  # type: ignore[arg-type]
        quality.append(rounding_loss(values, codes_of(values, grid, scale, None), grid, scale, None))
    assert quality == sorted(quality)


def test_a_range_with_zero_points_is_covered() -> None:
    for low, high in ((-0.3, 5.1), (0.0, 4.0), (-7.0, -2.0)):
        grid = Grid(8, False, "tensor", power_of_two=True)
        scale, zero_point = storable(grid, torch.tensor(low), torch.tensor(high))
        assert zero_point is not None
        ends = torch.tensor([[min(low, 0.0), max(high, 0.0)]])
        back = grid.dequantize(grid.quantize(ends, scale.reshape(1, 1), zero_point.reshape(1, 1)),
                               scale.reshape(1, 1), zero_point.reshape(1, 1))  # fmt: skip
        assert float((back - ends).abs().max()) <= float(scale) / 2
        assert powers(scale)


def test_an_observed_range_is_clipped_to_the_better_power() -> None:
    """Values up to 1.05 need 2**-6; clipped to 1 they have 2**-7, which the search by squared error finds."""
    observer = MeanSquare()
    values = torch.randn(4000, 1, generator=torch.Generator().manual_seed(0)).clamp(-3, 3) / 3
    values[0] = 1.05
    observer.update(values)
    grid = Grid(8, True, "tensor", power_of_two=True)
    scales = [
        float(storable(grid, *map(torch.tensor, ends))[0]) for ends in (observer.range(grid), (observer.low, observer.high))
    ]
    assert scales == [2.0**-7, 2.0**-6]


@pytest.mark.parametrize("reduced", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 3, 2])
def test_scales_that_are_multiples_stay_powers_of_two(bits: Bits, symmetric: bool, reduced: bool) -> None:
    grid = Grid(bits, symmetric, "group", 16, reduced, power_of_two=True)
    weight = drawn(1)
    weight[:, :16] /= 300
    free, shift = scales_of(weight, grid, "mse")
    scale = multiples(free, grid)
    assert powers(scale)
    centred = codes_of(weight, grid, scale, shift).reshape(12, 4, 16).int() - (0 if shift is None else shift.int().unsqueeze(-1))
    wide = centred * (scale / scale.amin(1, keepdim=True)).int().unsqueeze(-1)
    limit = 64 if reduced else 128
    assert -limit <= int(wide.min()) <= int(wide.max()) < limit + reduced
    assert bool((scale >= free).all())
    assert bool((scale > free).any())


@pytest.mark.parametrize("power_of_two", [False, True])
def test_a_group_of_zeros_does_not_widen_the_steps_of_the_others(power_of_two: bool) -> None:
    grid = Grid(4, granularity="group", group_size=8, power_of_two=power_of_two)
    weight = torch.randn(6, 32, generator=torch.Generator().manual_seed(0)) * 0.05
    weight[:, 8:16] = 0
    scale, _ = scales_of(weight, grid, "mse")
    levels = []
    for known in (None, weight):
        moved = multiples(scale, grid, known)
        back = grid.dequantize(codes_of(weight, grid, moved, None), moved, None)
        levels.append(sqnr_db(weight, back))
    assert levels[1] > levels[0] + 5
    assert bool((multiples(scale, grid, torch.zeros_like(weight)) > 0).all())
