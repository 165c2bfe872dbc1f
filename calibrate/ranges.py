"""Observed values -> the range a grid has to cover: streaming, in constant memory, one observer for each tensor.

Every observer is fed matrices [N, C] (N counted positions, C channels last); its state has a size that does not depend
on how many it saw. Shapes: N positions, C channels, B bins, K candidates.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Hashable
from typing import Literal

import torch
from torch import Tensor

from calibrate.grid import Grid
from calibrate.histogram import Histogram

__all__ = [
    "Channels",
    "Entropy",
    "MeanSquare",
    "MinMax",
    "MovingAverage",
    "Observer",
    "Percentile",
    "RangeMethod",
    "RangeObserver",
    "range_observer",
    "storable",
]

RangeMethod = Literal["minmax", "moving_average", "percentile", "mse", "entropy"]


class Observer(ABC):
    """Statistics of one tensor, gathered batch by batch in constant memory."""

    @abstractmethod
    def update(self, values: Tensor) -> None:
        """Takes in finite values [N, C], N >= 1, floating point."""

    @property
    @abstractmethod
    def key(self) -> Hashable:
        """What is gathered: observers with equal keys stand for each other at sites that see the same tensor."""


class Channels(Observer):
    """Per channel: extremes, mean and mean square, as [C] float32 on the CPU."""

    def __init__(self) -> None:
        self.count = 0
        self._extremes = torch.zeros(2, 0)
        self._sums = torch.zeros(2, 0, dtype=torch.float64)

    @property
    def key(self) -> Hashable:
        return "channels"

    def update(self, values: Tensor) -> None:
        low, high = torch.aminmax(values, dim=0)
        extremes = torch.stack([-low, high]).float().cpu()
        sums = torch.stack([values.sum(0, dtype=torch.float64), values.square().sum(0, dtype=torch.float64)]).cpu()
        if self.count:
            extremes, sums = torch.maximum(self._extremes, extremes), self._sums + sums
        self._extremes, self._sums = extremes, sums
        self.count += values.shape[0]

    @property
    def low(self) -> Tensor:
        return -self._extremes[0]

    @property
    def high(self) -> Tensor:
        return self._extremes[1].clone()

    @property
    def absmax(self) -> Tensor:
        return self._extremes.amax(0).clamp(min=0.0)

    @property
    def mean(self) -> Tensor:
        return (self._sums[0] / max(self.count, 1)).float()

    @property
    def mean_square(self) -> Tensor:
        return (self._sums[1] / max(self.count, 1)).float()


class RangeObserver(Observer):
    """An observer that ends in one range ``[low, high]`` for the whole tensor."""

    def __init__(self) -> None:
        self.low, self.high = math.inf, -math.inf

    def update(self, values: Tensor) -> None:
        low, high = torch.aminmax(values)
        self.low, self.high = min(self.low, float(low)), max(self.high, float(high))

    @property
    def empty(self) -> bool:
        return self.low > self.high

    @abstractmethod
    def range(self, grid: Grid) -> tuple[float, float]:
        """The range that ``grid`` shall cover, inside the smallest and largest value seen.

        Raises:
            ValueError: nothing was observed.
        """

    def clipped(self, low: float, high: float) -> float:
        """The fraction of the observed values outside ``[low, high]``, but for those in the bins of its two ends."""
        return 0.0 if low <= self.low and high >= self.high else math.nan

    def _extremes(self) -> tuple[float, float]:
        if self.empty:
            raise ValueError("nothing was observed")
        return self.low, self.high


class MinMax(RangeObserver):
    """The smallest and the largest value: nothing is clipped."""

    @property
    def key(self) -> Hashable:
        return "minmax"

    def range(self, grid: Grid) -> tuple[float, float]:
        return self._extremes()


class _Counted(RangeObserver):
    """A range observer that keeps a histogram."""

    def __init__(self, bins: int = 8192, importance: Tensor | None = None) -> None:
        super().__init__()
        self.histogram = Histogram(bins, importance)

    def update(self, values: Tensor) -> None:
        super().update(values)
        self.histogram.update(values)

    def clipped(self, low: float, high: float) -> float:
        centres, counts = self.histogram.occupied()
        half = self.histogram.width / 2
        outside = (centres + half <= low) | (centres - half >= high)
        return float(counts[outside].sum() / counts.sum())


class MovingAverage(_Counted):
    """Exponential moving average of each batch's extremes (Jacob et al. 2018, arXiv 1712.05877, sec. 3.1).

    Depends on the order and the size of the batches, unlike the others.
    """

    def __init__(self, momentum: float = 0.9) -> None:
        super().__init__()
        self.momentum = momentum
        self.average: tuple[float, float] | None = None

    @property
    def key(self) -> Hashable:
        return "moving_average", self.momentum

    def update(self, values: Tensor) -> None:
        super().update(values)
        low, high = (float(extreme) for extreme in torch.aminmax(values))
        if self.average is None:
            self.average = low, high
        else:
            keep = self.momentum
            self.average = keep * self.average[0] + (1 - keep) * low, keep * self.average[1] + (1 - keep) * high

    def range(self, grid: Grid) -> tuple[float, float]:
        if self.average is None:
            raise ValueError("nothing was observed")
        return self.average


class Percentile(_Counted):
    """The range that holds ``percentile`` per cent of the values.

    For a symmetric grid the percentile of the magnitudes; otherwise half of the rest is cut off at each end. Bound: the
    edges are at most one histogram bin (4 * largest magnitude / bins) outside the exact percentile, never inside it.
    """

    def __init__(self, percentile: float = 99.99) -> None:
        super().__init__()
        self.percentile = percentile

    @property
    def key(self) -> Hashable:
        return "percentile", self.percentile

    def range(self, grid: Grid) -> tuple[float, float]:
        low, high = self._extremes()
        fraction = self.percentile / 100
        if grid.symmetric:
            edge = self.histogram.folded().quantile(fraction)
            return max(low, -edge), min(high, edge)
        beyond = (1 - fraction) / 2
        return max(low, self.histogram.quantile(beyond, upper=False)), min(high, self.histogram.quantile(1 - beyond))


class MeanSquare(_Counted):
    """The range whose grid returns the values with the least mean squared error, searched on the histogram.

    Clipping few large values makes the step smaller for all others (Banner et al. 2019, arXiv 1810.05723, sec. 3;
    searched as in Nagel et al. 2021, arXiv 2106.08295, sec. 3.1). The extremes stay unless the search saves more than
    1 % of their error, which is more than the bins can feign: the result is never worse than min-max.

    With ``importance`` [C] the error of each channel counts by what the layer makes of it. With the squared norms of the
    weight's columns this is the error of the layer's output, rounding errors being independent; without it, a few large
    activations that the output hangs on are clipped for the sake of many small ones.
    """

    def __init__(self, importance: Tensor | None = None) -> None:
        super().__init__(importance=importance)

    @property
    def key(self) -> Hashable:
        return "mse" if self.histogram.importance is None else ("mse", id(self))

    def range(self, grid: Grid) -> tuple[float, float]:
        low, high = self._extremes()
        centres, counts = self.histogram.occupied()
        best, least = (low, high), float(self._errors(grid, centres, counts, [(low, high)])[0])
        start = least
        for fractions in (_steps(0.03, 1.0, 98), None):
            for _ in range(1 if grid.symmetric else 3):
                for candidates in self._candidates(best, (low, high), grid, fractions):
                    errors = self._errors(grid, centres, counts, candidates)
                    if float(errors.min()) < least:
                        least, best = float(errors.min()), candidates[int(errors.argmin())]
        return best if least < 0.99 * start else (low, high)

    @staticmethod
    def _candidates(
        best: tuple[float, float], full: tuple[float, float], grid: Grid, fractions: list[float] | None
    ) -> list[list[tuple[float, float]]]:
        if grid.symmetric:
            edge = max(-full[0], full[1])
            around = max(-best[0], best[1]) / edge if edge else 1.0
            chosen = fractions or _steps(max(around - 0.01, 0.001), min(around + 0.01, 1.0), 41)
            return [[(max(full[0], -part * edge), min(full[1], part * edge)) for part in chosen]]
        sweeps = []
        for side in (0, 1):
            around = best[side] / full[side] if full[side] else 1.0
            chosen = fractions or _steps(max(around - 0.01, 0.001), min(around + 0.01, 1.0), 21)
            sweeps.append([(part * full[0], best[1]) if side == 0 else (best[0], part * full[1]) for part in chosen])
        return sweeps

    @staticmethod
    def _errors(grid: Grid, centres: Tensor, counts: Tensor, candidates: list[tuple[float, float]]) -> Tensor:
        """The summed squared error for each candidate range: [K] float64."""
        pairs = torch.tensor(candidates, dtype=torch.float64)
        scale, zero_point = grid.parameters(pairs[:, 0], pairs[:, 1])
        scale = scale.double().unsqueeze(1)
        shift = torch.zeros_like(scale) if zero_point is None else zero_point.double().unsqueeze(1)
        codes = ((centres / scale).round() + shift).clamp(grid.low, grid.high)
        return (((codes - shift) * scale - centres).square() * counts).sum(1)


class Entropy(_Counted):
    """The range that loses the least information: the Kullback-Leibler divergence of TensorRT's calibration.

    Migacz 2017, "8-bit inference with TensorRT" (GTC), with at least 2,048 bins for each sign. For a threshold t the
    reference P is the histogram clipped to [-t, t], with what lies outside added to the outermost bins; Q spreads the
    unclipped mass of each code evenly over those of its bins that are not empty in P. Two defects of common versions
    are avoided: bins are given to codes by the grid's own rounding (not by an integer division that drops the last
    bins), and a threshold whose outermost bin Q cannot explain is refused (not smoothed).
    """

    candidates = 128

    @property
    def key(self) -> Hashable:
        return "entropy"

    def range(self, grid: Grid) -> tuple[float, float]:
        low, high = self._extremes()
        centres, counts = self.histogram.occupied()
        width, edge = self.histogram.width, max(-low, high)
        last = max(1, math.ceil(edge / width))
        best, least = (low, high), math.inf
        if edge == 0:
            return best
        for step in _thresholds(min(last, grid.high + 1), last, self.candidates):
            pair = max(low, -step * width), min(high, step * width)
            divergence = self._divergence(grid, centres, counts, width, pair)
            if divergence < least:
                best, least = pair, divergence
        return best

    @staticmethod
    def _divergence(grid: Grid, centres: Tensor, counts: Tensor, width: float, pair: tuple[float, float]) -> float:
        first = int((centres + width / 2 <= pair[0]).sum())
        last = int((centres - width / 2 < pair[1]).sum())
        reference = counts[first:last].clone()
        reference[0] += counts[:first].sum()
        reference[-1] += counts[last:].sum()
        scale, zero_point = grid.parameters(torch.tensor(pair[0]), torch.tensor(pair[1]))
        shift = 0.0 if zero_point is None else float(zero_point)
        codes = ((centres[first:last] / float(scale)).round() + shift).clamp(grid.low, grid.high)
        codes = (codes - grid.low).long()
        filled = reference > 0
        levels = grid.high - grid.low + 1
        mass = torch.zeros(levels, dtype=torch.float64).index_add_(0, codes, counts[first:last])
        share = torch.zeros(levels, dtype=torch.float64).index_add_(0, codes, filled.double())
        spread = (mass / share.clamp(min=1))[codes][filled]
        if bool((spread == 0).any()):
            return math.inf
        given, coded = reference[filled] / reference.sum(), spread / spread.sum()
        return float((given * (given / coded).log()).sum())


def range_observer(method: RangeMethod, percentile: float = 99.99, importance: Tensor | None = None) -> RangeObserver:
    """A new observer for a method by its recipe name; ``importance`` [C] is used by ``mse``."""
    made: dict[str, RangeObserver] = {
        "minmax": MinMax(),
        "moving_average": MovingAverage(),
        "percentile": Percentile(percentile),
        "mse": MeanSquare(importance),
        "entropy": Entropy(),
    }
    return made[method]


def storable(grid: Grid, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor | None]:
    """``Grid.parameters`` with the scale rounded up to the next float16: float16 and float32 files hold the same one.

    Rounding up, by at most 2**-10 of the scale, keeps the whole range covered: the bound of ``Grid`` stands. A scale
    that is no normal float16 number, or a power of two, is left as it is.
    """
    scale, zero_point = grid.parameters(low, high)
    if grid.power_of_two:
        return scale, zero_point
    half = scale.half()
    half = torch.where(half.float() < scale, (half.view(torch.int16) + 1).view(torch.float16), half)
    scale = torch.where((scale >= 2.0**-14) & (scale <= 65504.0), half.float(), scale)
    if zero_point is None:
        return scale, None
    shift = (grid.low - low.float().clamp(max=0.0) / scale).round().clamp(grid.low, grid.high)
    return scale, shift.to(torch.int8)


def _steps(first: float, last: float, count: int) -> list[float]:
    return [first + (last - first) * step / (count - 1) for step in range(count)]


def _thresholds(first: int, last: int, count: int) -> list[int]:
    return sorted({round(step) for step in _steps(first, last, count)}, reverse=True)
