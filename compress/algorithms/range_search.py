"""Ranges of a tensor and of the weights that meet it, searched by what their rounding does to the model's outputs.

Tensors in, tensors out. Shapes: N positions, C channels, O outputs, G groups, B batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from calibrate.grid import Grid
from calibrate.ranges import storable
from compress.algorithms.rounding import WeightRange, scales_of

__all__ = ["Ranges", "Reader", "search_ranges"]

_WEIGHT_PARTS = [1.2 * 0.955**step for step in range(26)]
_COARSE, _FINE = [1.2 * 0.88**step for step in range(38)], [1 + 0.02 * step for step in range(-5, 6) if step]
"""Parts of the range that are tried: down to 0.38 of a weight's, to 0.01 of a tensor's, then around the best."""


Ends = tuple[float, float]


@dataclass(frozen=True)
class Reader:
    """A layer that reads the tensor.

    Attributes:
        weight: [O, C] or a convolution's, as it will be rounded.
        slopes: mean squared gradients at its outputs, in their shape; channels are last, or second of four.
        apply: (inputs, weight) -> outputs without bias.
        wanted: what it shall give, without bias; None: what it gives on the inputs of the search, not rounded.
    """

    weight: Tensor
    grid: Grid
    how: WeightRange
    slopes: Tensor
    apply: Callable[[Tensor, Tensor], Tensor]
    wanted: Tensor | None = None


@dataclass(frozen=True)
class Ranges:
    """What a search found.

    Attributes:
        low, high: of the tensor.
        weights: scale and zero point for each reader, as ``scales_of`` gives them.
        before, after: the objective with the ranges that the search began with, and with those found: never more.
    """

    low: float
    high: float
    weights: tuple[tuple[Tensor, Tensor | None], ...]
    before: float
    after: float


def search_ranges(
    inputs: Tensor,
    readers: Sequence[Reader],
    grid: Grid,
    low: float,
    high: float,
    *,
    rounds: int = 2,
    begun: Ranges | None = None,
) -> Ranges:
    """The ranges with the least squared error of the readers' outputs, each output weighted by its squared gradient.

    The Hessian-guided search of PTQ4ViT (Yuan et al. 2022, arXiv 2111.12293, sec. 3.3, eq. 7 to 9) to the nearest codes: the
    tensor, and weights channel by channel, in turn, each with the other as it is rounded by then; candidates are parts of the
    range that is given, which is among them. Both ends move together, with zero points one after the other too. The tensor comes
    first here, so that weights are not fitted to a range that an outlier made.

    Args:
        inputs: the tensor at some positions, [N, C] or [B, C, h, w], float.
        grid: of the tensor.
        begun: ranges that the search begins with, in the place of those that are given and of the weights' own.
    """
    search = _Search(inputs, readers, grid)
    if begun is not None:
        search.scales = list(begun.weights)
    weights = [search.dense(reader, *scales) for reader, scales in zip(readers, search.scales, strict=True)]
    best = (low, high) if begun is None else (begun.low, begun.high)
    before = least = search.error(search.rounded(best), weights)
    for _ in range(rounds):
        start = best
        for candidates in _sweeps(low, high, grid.symmetric):
            for ends in candidates(best):
                error = search.error(search.rounded(ends), weights)
                if error < least:
                    best, least = ends, error
        given = search.rounded(best)
        for number in range(len(readers)):
            weights[number] = search.improve_weight(number, given)
        least = search.error(given, weights)
        if best == start:
            break
    return Ranges(*best, tuple(search.scales), before, least)


class _Search:
    def __init__(self, inputs: Tensor, readers: Sequence[Reader], grid: Grid) -> None:
        self.inputs, self.readers, self.grid = inputs, readers, grid
        self.wanted = [reader.apply(inputs, reader.weight) if reader.wanted is None else reader.wanted for reader in readers]
        self.scales = [scales_of(reader.weight, reader.grid, reader.how) for reader in readers]

    def rounded(self, ends: tuple[float, float]) -> Tensor:
        scale, zero_point = storable(self.grid, torch.tensor(ends[0]), torch.tensor(ends[1]))
        shift = 0.0 if zero_point is None else zero_point.float()
        codes = ((self.inputs / scale).round_() + shift).clamp_(self.grid.low, self.grid.high)
        return (codes - shift) * scale

    @staticmethod
    def dense(reader: Reader, scale: Tensor, zero_point: Tensor | None) -> Tensor:
        grid = reader.grid
        return grid.dequantize(grid.quantize(reader.weight, scale, zero_point), scale, zero_point)

    def errors(self, number: int, given: Tensor, weight: Tensor) -> Tensor:
        """[O]: of one reader's outputs."""
        reader = self.readers[number]
        off = (reader.apply(given, weight) - self.wanted[number]).square_().mul_(reader.slopes)
        return off.sum((0, 2, 3) if off.dim() == 4 else tuple(range(off.dim() - 1)), dtype=torch.float64)

    def error(self, given: Tensor, weights: Sequence[Tensor]) -> float:
        return sum(float(self.errors(number, given, weight).sum()) for number, weight in enumerate(weights))

    def improve_weight(self, number: int, given: Tensor) -> Tensor:
        """Gives each output of a reader the best range that is tried, and returns the weight on it."""
        reader, (scale, zero_point) = self.readers[number], self.scales[number]
        grid = reader.grid
        best = self.dense(reader, scale, zero_point)
        least = self.errors(number, given, best)
        blocks = grid.blocks(reader.weight.float())
        low, high = blocks.amin(-1), blocks.amax(-1)
        for part in _WEIGHT_PARTS:
            tried = storable(grid, low * part, high * part)
            dense = self.dense(reader, *tried)
            errors = self.errors(number, given, dense)
            better = errors < least
            if grid.granularity == "tensor":
                better = torch.full_like(better, bool(errors.sum() < least.sum()))
            least = torch.where(better, errors, least)
            best = torch.where(better.reshape(-1, *[1] * (best.dim() - 1)), dense, best)
            rows = better[: len(scale)].unsqueeze(1)
            scale = torch.where(rows, tried[0], scale)
            if zero_point is not None and tried[1] is not None:
                zero_point = torch.where(rows, tried[1], zero_point)
        self.scales[number] = (scale, zero_point)
        return best


def _sweeps(low: float, high: float, symmetric: bool) -> tuple[Callable[[Ends], list[Ends]], ...]:
    """Lists of candidates, one after the other; each is made from what is best by then."""
    both = (
        lambda now: [(part * low, part * high) for part in _COARSE],
        lambda now: [(part * now[0], part * now[1]) for part in _FINE],
    )
    upper = (lambda now: [(now[0], part * high) for part in _COARSE], lambda now: [(now[0], part * now[1]) for part in _FINE])
    lower = (lambda now: [(part * low, now[1]) for part in _COARSE], lambda now: [(part * now[0], now[1]) for part in _FINE])
    if symmetric:
        return both
    return (*both, *(upper if high > 0 else ()), *(lower if low < 0 else ()))
