"""Ranges searched by what rounding does where the outputs hang on it."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from calibrate.grid import Grid
from calibrate.ranges import storable
from compress.algorithms.range_search import Ranges, Reader, search_ranges
from compress.algorithms.rounding import codes_of, scales_of

INPUTS = [Grid(8, True, "tensor"), Grid(8, False, "tensor"), Grid(4, True, "tensor"), Grid(4, False, "tensor")]
each = pytest.mark.parametrize("inputs", INPUTS, ids=lambda grid: f"{grid.bits}-{grid.symmetric}")


def problem(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs [N, C] with a long tail, a weight [O, C], squared gradients [N, O]."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(64, 16, generator=generator)
    return x * x.abs(), torch.randn(12, 16, generator=generator), torch.rand(64, 12, generator=generator)


def objective(x: Tensor, weight: Tensor, slopes: Tensor, found: Ranges, grid: Grid, inputs: Grid) -> float:
    """Written out: both rounded, the outputs compared."""
    scale, shift = storable(inputs, torch.tensor(found.low), torch.tensor(found.high))
    rounded = inputs.dequantize(inputs.quantize(x, scale.reshape(1, 1), None if shift is None else shift.reshape(1, 1)),
                                scale.reshape(1, 1), None if shift is None else shift.reshape(1, 1))  # fmt: skip
    dense = grid.dequantize(codes_of(weight, grid, *found.weights[0]), *found.weights[0])
    return float(((x @ weight.t() - rounded @ dense.t()).square() * slopes).double().sum())


@each
@pytest.mark.parametrize("weights", [Grid(8), Grid(4), Grid(4, False, "group", 8), Grid(8, True, "tensor")], ids=str)
def test_the_objective_never_grows_and_is_what_it_says(inputs: Grid, weights: Grid) -> None:
    x, weight, slopes = problem()
    low, high = float(x.min()), float(x.max())
    found = search_ranges(x, [Reader(weight, weights, "minmax", slopes, F.linear)], inputs, low, high)
    begun = Ranges(low, high, (scales_of(weight, weights, "minmax"),), 0, 0)
    assert found.after <= found.before
    assert found.before == pytest.approx(objective(x, weight, slopes, begun, weights, inputs), rel=1e-3)
    assert found.after == pytest.approx(objective(x, weight, slopes, found, weights, inputs), rel=1e-3)
    if inputs.bits < 8:
        assert found.after < 0.8 * found.before


@each
def test_an_outlier_is_clipped_where_nothing_hangs_on_it_and_only_there(inputs: Grid) -> None:
    x, weight, slopes = problem(1)
    x[5, 3] = 40 * float(x.abs().max())
    ranges = {}
    for name, slope in (("nothing", 0.0), ("everything", 1e4)):
        slopes[5] = slope
        reader = Reader(weight, Grid(8), "minmax", slopes, F.linear)
        ranges[name] = search_ranges(x, [reader], inputs, float(x.min()), float(x.max()))
    assert ranges["nothing"].high < 0.1 * float(x.max())
    assert ranges["nothing"].after < (1e-2 if inputs.bits == 8 else 5e-2) * ranges["nothing"].before
    assert ranges["everything"].high > 0.9 * float(x.max())


@each
def test_it_goes_with_the_data_and_does_not_depend_on_the_size_of_the_gradients(inputs: Grid) -> None:
    x, weight, slopes = problem(2)
    low, high = float(x.min()), float(x.max())
    first, scaled, steeper = (
        search_ranges(x * size, [Reader(weight, Grid(8), "minmax", slopes * slope, F.linear)], inputs, low * size, high * size)
        for size, slope in ((1, 1), (8, 1), (1, 64))
    )
    assert (scaled.low, scaled.high) == (8 * first.low, 8 * first.high)
    assert (steeper.low, steeper.high) == (first.low, first.high)
    assert torch.equal(steeper.weights[0][0], first.weights[0][0])


def test_layers_that_read_one_tensor_share_its_range() -> None:
    x, weight, slopes = problem(3)
    inputs = Grid(6, True, "tensor")
    readers = [Reader(weight[:4], Grid(8), "minmax", slopes[:, :4], F.linear),
               Reader(weight[4:], Grid(8), "minmax", slopes[:, 4:], F.linear)]  # fmt: skip
    both = search_ranges(x, readers, inputs, float(x.min()), float(x.max()))
    one = search_ranges(x, [Reader(weight, Grid(8), "minmax", slopes, F.linear)], inputs, float(x.min()), float(x.max()))
    assert (both.low, both.high) == (one.low, one.high)
    assert torch.equal(torch.cat([scale for scale, _ in both.weights]), one.weights[0][0])


def test_a_convolution_is_a_linear_layer_of_its_windows() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(4, 3, 8, 8, generator=generator), torch.randn(5, 3, 2, 2, generator=generator)
    slopes = torch.rand(4, 5, 4, 4, generator=generator)
    inputs = Grid(4, True, "tensor")
    apply = functools.partial(F.conv2d, stride=2)
    found = search_ranges(x, [Reader(weight, Grid(8), "minmax", slopes, apply)], inputs, float(x.min()), float(x.max()))
    windows = F.unfold(x, 2, stride=2).transpose(1, 2).reshape(-1, 12)
    flat = Reader(weight.reshape(5, 12), Grid(8), "minmax", slopes.flatten(2).transpose(1, 2).reshape(-1, 5), F.linear)
    same = search_ranges(windows, [flat], inputs, float(x.min()), float(x.max()))
    assert (found.low, found.high) == (same.low, same.high)
    assert found.after == pytest.approx(same.after, rel=1e-4)


@each
def test_a_search_that_begins_with_found_ranges_is_never_worse_than_they_are(inputs: Grid) -> None:
    x, weight, slopes = problem(5)
    low, high = float(x.min()), float(x.max())
    wanted = x @ weight.t()
    alone = search_ranges(x, [Reader(weight, Grid(8), "minmax", slopes, F.linear)], inputs, low, high)
    given = x + 0.1 * x.square()  # as rounding before it would change it
    reader = Reader(weight, Grid(8), "minmax", slopes, F.linear, wanted)
    joint = search_ranges(given, [reader], inputs, low, high, begun=alone)
    assert joint.after <= joint.before
    again = search_ranges(given, [reader], inputs, low, high, begun=joint)
    assert again.before == pytest.approx(joint.after, rel=1e-6)
    assert joint.before > 2 * alone.after  # the error of what came before is in it


def test_without_gradients_nothing_moves() -> None:
    x, weight, slopes = problem(4)
    found = search_ranges(x, [Reader(weight, Grid(8), "minmax", slopes * 0, F.linear)], Grid(8, True, "tensor"), -9.0, 9.0)
    assert (found.low, found.high) == (-9.0, 9.0)
    assert torch.equal(found.weights[0][0], scales_of(weight, Grid(8), "minmax")[0])
