"""Counts of values in bins of a fixed number, whatever their range: streaming, exact under any cut into batches."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["Histogram"]


class Histogram:
    """Counts of values in ``bins`` equal bins around zero, whose width doubles when a value falls outside.

    Bin ``j`` holds ``[(j - bins/2) * width, (j + 1 - bins/2) * width)`` with ``width`` a power of two. Doubling the
    width merges neighbouring bins exactly, so the counts and the width depend on the values alone: neither on their
    order nor on how they were cut into batches.

    Bound: with the largest magnitude m >= 1e-30, ``width <= 4 * m / bins`` once it was seen; every quantile is
    therefore known to within ``4 * m / bins``.

    With ``importance`` [C] a value counts as much as its channel; counts then are float64 sums.
    """

    def __init__(self, bins: int = 8192, importance: Tensor | None = None) -> None:
        self.counts = torch.zeros(bins, dtype=torch.int64 if importance is None else torch.float64)
        self.importance = None if importance is None else importance.double().clamp(min=1e-30)
        self.exponent = -120

    @property
    def width(self) -> float:
        return math.ldexp(1.0, self.exponent)

    @property
    def total(self) -> int:
        return int(self.counts.sum())

    @property
    def centres(self) -> Tensor:
        """[B] float64."""
        half = len(self.counts) // 2
        return (torch.arange(-half, half, dtype=torch.float64) + 0.5) * self.width

    def update(self, values: Tensor) -> None:
        """Counts finite values of any shape, [..., C] where channels have an importance."""
        half = len(self.counts) // 2
        flat = values.detach().reshape(-1).float()
        largest = float(flat.abs().amax())
        if largest > 0:
            self._widen(math.frexp(largest)[1] - int(math.log2(half)))
        index = (flat * 2.0**-self.exponent).floor_().to(torch.int64).add_(half)
        weights = None
        if self.importance is not None:
            weights = self.importance.to(flat.device).expand(values.shape).reshape(-1)
        self.counts += torch.bincount(index, weights, minlength=2 * half).cpu()

    def _widen(self, exponent: int) -> None:
        steps = exponent - self.exponent
        if steps <= 0:
            return
        half = len(self.counts) // 2
        merged = torch.zeros_like(self.counts)
        index = (torch.arange(-half, half) >> min(steps, 62)) + half
        self.counts, self.exponent = merged.index_add_(0, index, self.counts), exponent

    def quantile(self, fraction: float, upper: bool = True) -> float:
        """The edge of the bin in which the cumulated count reaches ``fraction``: its upper edge, or its lower one."""
        reached = int(torch.searchsorted(self.counts.cumsum(0), max(1, math.ceil(fraction * self.total))))
        return (reached - len(self.counts) // 2 + int(upper)) * self.width

    def folded(self) -> Histogram:
        """The histogram of the magnitudes."""
        half = len(self.counts) // 2
        folded = Histogram(2 * half)
        folded.exponent = self.exponent
        folded.counts[half:] = self.counts[half:] + self.counts[:half].flip(0)
        return folded

    def occupied(self) -> tuple[Tensor, Tensor]:
        """Centres (float64) and counts (float64) of the bins between the first and the last that are not empty."""
        filled = self.counts.nonzero()
        first, last = int(filled[0]), int(filled[-1]) + 1
        return self.centres[first:last], self.counts[first:last].double()
