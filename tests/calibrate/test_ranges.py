"""Laws of the observers: what they keep, what range they end in, and that batches do not matter."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from calibrate.grid import Grid
from calibrate.histogram import Histogram
from calibrate.ranges import (
    Channels,
    Entropy,
    MeanSquare,
    MinMax,
    MovingAverage,
    Percentile,
    RangeObserver,
    range_observer,
    storable,
)

SYMMETRIC, ASYMMETRIC = Grid(8, True, "tensor"), Grid(8, False, "tensor")
METHODS = ("minmax", "moving_average", "percentile", "mse", "entropy")


def heavy(rows: int = 400, channels: int = 24, seed: int = 0) -> Tensor:
    """Values with a heavy tail, as activations have: [N, C]."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, channels, generator=generator)
    return values * (1 + 0.2 * torch.randn(rows, channels, generator=generator).exp())


def fed(observer: RangeObserver, values: Tensor, size: int = 400) -> RangeObserver:
    for batch in values.split(size):
        observer.update(batch)
    return observer


def error(values: Tensor, grid: Grid, low: float, high: float) -> float:
    """The squared error of rounding, computed on the values themselves."""
    scale, zero_point = grid.parameters(torch.tensor([[low]]), torch.tensor([[high]]))
    codes = grid.quantize(values, scale, zero_point)
    return float((values - grid.dequantize(codes, scale, zero_point)).double().square().sum())


@pytest.mark.parametrize("grid", [SYMMETRIC, ASYMMETRIC], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("method", METHODS)
def test_the_range_lies_in_what_was_seen(method: str, grid: Grid) -> None:
    values = heavy()
    low, high = fed(range_observer(method), values, 50).range(grid)  # type: ignore[arg-type]
    assert float(values.min()) - 1e-6 <= low < 0 < high <= float(values.max()) + 1e-6


@pytest.mark.parametrize("method", [m for m in METHODS if m != "moving_average"])
@pytest.mark.parametrize("grid", [SYMMETRIC, ASYMMETRIC], ids=["symmetric", "asymmetric"])
def test_how_rows_are_cut_into_batches_changes_nothing(method: str, grid: Grid) -> None:
    values = heavy()
    ranges = {fed(range_observer(method), values, size).range(grid) for size in (1, 7, 400)}  # type: ignore[arg-type]
    shuffled = values[torch.randperm(len(values))]
    ranges.add(fed(range_observer(method), shuffled, 13).range(grid))  # type: ignore[arg-type]
    assert len(ranges) == 1


def test_moving_average_is_the_recursion() -> None:
    batches = heavy().split(100)
    observer = MovingAverage(0.9)
    expected = None
    for batch in batches:
        observer.update(batch)
        seen = torch.tensor([batch.min(), batch.max()], dtype=torch.float64)
        expected = seen if expected is None else 0.9 * expected + 0.1 * seen
    assert expected is not None
    assert torch.allclose(torch.tensor(observer.range(SYMMETRIC), dtype=torch.float64), expected, rtol=1e-12)


def test_the_histogram_has_one_size_and_exact_counts() -> None:
    histogram = Histogram(256)
    values = torch.cat([torch.zeros(5), torch.randn(1000) * 1e-3, torch.randn(1000) * 1e4, torch.tensor([-0.0, 1e-38])])
    for batch in values.split(17):
        histogram.update(batch)
    assert len(histogram.counts) == 256
    assert histogram.total == len(values)
    index = (values.double() / histogram.width).floor().long() + 128
    assert torch.equal(histogram.counts, torch.bincount(index, minlength=256))


@given(st.floats(1e-30, 1e30), st.integers(0, 100))
def test_the_width_of_a_bin_is_bounded_by_the_largest_value(scale: float, seed: int) -> None:
    values = torch.randn(50, generator=torch.Generator().manual_seed(seed)).clamp(-4, 4) * min(scale, 1e30)
    histogram = Histogram(512)
    histogram.update(values[:20])
    histogram.update(values)
    largest = float(values.abs().max())
    assert largest < 256 * histogram.width <= 2 * largest * (1 + 1e-12)


def test_all_zeros_have_a_range_of_zero() -> None:
    for method in METHODS:
        assert fed(range_observer(method), torch.zeros(10, 3)).range(SYMMETRIC) == (0.0, 0.0)  # type: ignore[arg-type]


@pytest.mark.parametrize("percentile", [90.0, 99.0, 99.9, 100.0])
def test_percentile_is_exact_to_a_bin_and_never_clips_more(percentile: float) -> None:
    values = heavy()
    observer = Percentile(percentile)
    fed(observer, values, 31)
    width = observer.histogram.width
    exact = float(values.abs().flatten().sort().values[math.ceil(percentile / 100 * values.numel()) - 1])
    edge = max(-observer.range(SYMMETRIC)[0], observer.range(SYMMETRIC)[1])
    assert exact - 1e-6 <= edge <= exact + width
    low, high = observer.range(ASYMMETRIC)
    outside = float(((values < low) | (values > high)).double().mean())
    assert outside <= 1 - percentile / 100 + 1e-9
    beyond = (1 - percentile / 100) / 2
    ordered = values.flatten().double().sort().values
    last = ordered[min(len(ordered), math.ceil((1 - beyond) * len(ordered))) - 1]
    assert float(last) - 1e-6 <= high <= float(last) + width


@pytest.mark.parametrize("grid", [SYMMETRIC, ASYMMETRIC, Grid(4, True, "tensor"), Grid(4, False, "tensor")])
@pytest.mark.parametrize("seed", range(3))
def test_mse_is_never_worse_than_minmax(grid: Grid, seed: int) -> None:
    for values in (heavy(seed=seed), heavy(seed=seed).relu(), torch.rand(300, 4) - 0.1, torch.randn(30, 2) ** 9):
        best = error(values, grid, *fed(MeanSquare(), values).range(grid))
        assert best <= error(values, grid, *fed(MinMax(), values).range(grid)) * (1 + 1e-9)


def test_mse_finds_what_a_plain_search_finds() -> None:
    values, grid = heavy(2000), Grid(4, True, "tensor")
    edge = float(values.abs().max())
    least = min(error(values, grid, -edge * k / 200, edge * k / 200) for k in range(4, 201))
    assert error(values, grid, *fed(MeanSquare(), values).range(grid)) <= 1.01 * least


def test_mse_with_importance_minds_the_channel_that_counts() -> None:
    values = heavy(500, 8)
    values[:, 0] *= 30
    plain = fed(MeanSquare(), values).range(Grid(4, True, "tensor"))
    importance = torch.ones(8)
    importance[1:] = 1e4
    minding = fed(MeanSquare(importance), values).range(Grid(4, True, "tensor"))
    assert minding[1] < plain[1]
    ones = fed(MeanSquare(torch.ones(8)), values).range(Grid(4, True, "tensor"))
    assert ones == plain


def slow_divergence(values: Tensor, grid: Grid, threshold: float, width: float, low: float, high: float) -> float:
    """Migacz's divergence in plain loops over bins, from the values."""
    bottom, top = max(low, -threshold), min(high, threshold)
    inside: dict[int, int] = {}
    clipped: dict[int, int] = {}
    first, last = math.floor(bottom / width), math.ceil(top / width) - 1
    for value in values.flatten().tolist():
        place = math.floor(value / width)
        kept = min(max(place, first), last)
        clipped[kept] = clipped.get(kept, 0) + 1
        if kept == place:
            inside[place] = inside.get(place, 0) + 1
    scale, shift = grid.parameters(torch.tensor(bottom), torch.tensor(top))
    zero = 0 if shift is None else int(shift)
    rounded = {place: round((place + 0.5) * width / float(scale)) + zero for place in clipped}
    codes = {place: min(max(code, grid.low), grid.high) for place, code in rounded.items()}
    spread = {}
    for place, code in codes.items():
        fellows = [other for other in codes if codes[other] == code]
        spread[place] = sum(inside.get(other, 0) for other in fellows) / len(fellows)
    if any(value == 0 for value in spread.values()):
        return math.inf
    given, coded = sum(clipped.values()), sum(spread.values())
    return sum(n / given * math.log((n / given) / (spread[place] / coded)) for place, n in clipped.items())


@pytest.mark.parametrize("grid", [Grid(4, True, "tensor"), Grid(4, False, "tensor")])
def test_entropy_equals_a_brute_force_oracle(grid: Grid) -> None:
    values = heavy(60, 10)
    observer = Entropy(bins=256)
    fed(observer, values)
    low, high = observer.low, observer.high
    width = observer.histogram.width
    divergences = {}
    for step in range(grid.high + 1, math.ceil(max(-low, high) / width) + 1):
        divergences[step] = slow_divergence(values, grid, step * width, width, low, high)
    least = min(divergences.values())
    best = max(step for step, divergence in divergences.items() if divergence <= least + 1e-12)
    expected = max(low, -best * width), min(high, best * width)
    assert observer.range(grid) == pytest.approx(expected)


def test_entropy_clips_a_lone_outlier() -> None:
    values = torch.cat([torch.randn(20000), torch.tensor([60.0])]).unsqueeze(1)
    assert fed(Entropy(), values, 30000).range(SYMMETRIC)[1] < 30


def test_channels_are_exact_whatever_the_batches() -> None:
    values = heavy()
    whole, cut = Channels(), Channels()
    whole.update(values)
    for batch in values.split(9):
        cut.update(batch)
    for channels in (whole, cut):
        assert torch.equal(channels.absmax, values.abs().amax(0))
        assert torch.equal(channels.low, values.amin(0))
        assert torch.equal(channels.high, values.amax(0))
        assert torch.allclose(channels.mean, values.double().mean(0).float(), rtol=1e-6, atol=1e-9)
        assert torch.allclose(channels.mean_square, values.double().square().mean(0).float(), rtol=1e-6)


def test_clipped_is_the_fraction_outside() -> None:
    values = heavy(1000)
    observer = fed(Percentile(95.0), values)
    low, high = observer.range(SYMMETRIC)
    outside = float(((values < low) | (values > high)).double().mean())
    assert abs(observer.clipped(low, high) - outside) < 2e-3
    assert observer.clipped(-math.inf, math.inf) == 0


@given(st.floats(2.0**-10, 1e4), st.floats(0, 1), st.booleans())
def test_storable_scales_are_float16_and_still_cover(span: float, part: float, symmetric: bool) -> None:
    grid = Grid(8, symmetric, "tensor")
    low, high = torch.tensor(-span * part), torch.tensor(span * (1 - part))
    scale, zero_point = storable(grid, low, high)
    exact, _ = grid.parameters(low, high)
    assert float(scale) == float(scale.half()) or float(exact) < 2.0**-14
    assert float(exact) <= float(scale) <= float(exact) * (1 + 2.0**-10)
    values = torch.linspace(float(low), float(high), 201)
    shaped = None if zero_point is None else zero_point.reshape(1, 1)
    back = grid.dequantize(grid.quantize(values, scale.reshape(1, 1), shaped), scale.reshape(1, 1), shaped)
    assert float((values - back).abs().max()) <= float(scale) / 2 * (1 + 1e-5)


def test_nothing_seen_is_an_error() -> None:
    for method in METHODS:
        with pytest.raises(ValueError, match="nothing was observed"):
            range_observer(method).range(SYMMETRIC)  # type: ignore[arg-type]
