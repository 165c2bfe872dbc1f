"""Round-to-nearest: scales for a weight, its codes, and what the rounding cost. Tensors in, tensors out.

Shapes: O outputs, I inputs, G groups.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from calibrate.grid import Grid
from calibrate.ranges import storable

__all__ = ["WeightRange", "codes_of", "multiples", "rounding_loss", "scales_of"]

WeightRange = Literal["minmax", "mse"]

_PIECE = 2**20
_SEARCH = {8: (0.8, 21), 6: (0.65, 36), 4: (0.5, 51), 3: (0.35, 66), 2: (0.2, 81)}
"""Bits -> the smallest fraction of the range that is tried, and how many fractions."""
_OCTAVES = (1.0, 0.5, 0.25, 2.0)
"""Fractions that are tried where scales are powers of two: others between them give no other scale."""


def scales_of(weight: Tensor, grid: Grid, how: WeightRange) -> tuple[Tensor, Tensor | None]:
    """Scale (float32) and zero point (int8 or None) for a weight of any rank seen as [O, I], in the layout of ``Grid``.

    ``minmax`` covers every weight. ``mse`` shrinks the range of each channel or group by the fraction that returns it
    with the least squared error (Nagel et al. 2021, arXiv 2106.08295, sec. 3.1): the fraction 1 is among those tried,
    so no channel gets worse. Of a grid with powers of two it takes the best of the shifts from two below to one above that of
    ``minmax``.
    """
    parts = [_scales(piece, grid, how) for piece in _pieces(weight, grid)]
    scale = torch.cat([part[0] for part in parts])
    zero_points = [part[1] for part in parts if part[1] is not None]
    return scale, torch.cat(zero_points) if zero_points else None


def multiples(scale: Tensor, grid: Grid, weight: Tensor | None = None) -> Tensor:
    """Scales [O, G] moved to whole multiples of one step for each output: code less zero point, times multiple, is an int8.

    With them a weight of few bits in groups has an int8 weight with one scale for each output that equals it exactly, so
    that integer kernels run it (the two levels of Lin et al. 2024, arXiv 2405.04532, sec. 3.2.1). Steps are float16 numbers.
    The largest scale of an output moves by at most 2**-10 of itself, the others by half a step. The int8 weight of a reduced
    grid lies in ``[-64, 64]``. Powers of two stay powers of two: only those that are too small for their output's largest change,
    and the multiples are shifts. Groups of zeros in ``weight`` [O, I] have any scale and do not widen the others' step.
    """
    if weight is not None:
        used = weight.reshape(*scale.shape, -1).ne(0).any(-1)
        least = torch.where(used, scale, torch.inf).amin(1, keepdim=True)
        scale = torch.where(used | least.isinf(), scale, least)
    widest = 64 if grid.reduced else 128
    most = widest >> (grid.bits - 1) if grid.symmetric else (widest - 1) // (2**grid.bits - 1)
    if grid.power_of_two:
        return scale.clamp(min=scale.amax(1, keepdim=True) / (1 << (most.bit_length() - 1)))
    step = storable(Grid(8), torch.zeros_like(scale), scale.amax(1, keepdim=True) * (127 / most))[0]
    return (scale / step).round().clamp(1, most) * step


def codes_of(weight: Tensor, grid: Grid, scale: Tensor, zero_point: Tensor | None) -> Tensor:
    """Codes (int8, the shape of ``weight``), made piece by piece: no second float copy of a large weight."""
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    start = 0
    for piece in _pieces(weight, grid):
        rows = slice(start, start + piece.shape[0])
        codes[rows] = grid.quantize(piece, *_rows(scale, zero_point, rows, grid))
        start += piece.shape[0]
    return codes


def rounding_loss(weight: Tensor, codes: Tensor, grid: Grid, scale: Tensor, zero_point: Tensor | None) -> float:
    """The weight's SQNR in dB after rounding: infinite when every weight lies on the grid."""
    signal = noise = 0.0
    start = 0
    for piece in _pieces(weight, grid):
        rows = slice(start, start + piece.shape[0])
        back = grid.dequantize(codes[rows], *_rows(scale, zero_point, rows, grid))
        signal += float(piece.double().square().sum())
        noise += float((piece - back).double().square().sum())
        start += piece.shape[0]
    return 10 * math.log10(signal / noise) if noise else math.inf


def _scales(weight: Tensor, grid: Grid, how: WeightRange) -> tuple[Tensor, Tensor | None]:
    blocks = grid.blocks(weight.float())
    low, high = blocks.amin(-1), blocks.amax(-1)
    if how == "minmax":
        return storable(grid, low, high)
    smallest, count = _SEARCH[grid.bits]
    evenly = [1 - (1 - smallest) * step / (count - 1) for step in range(count)]
    best, least = torch.ones_like(low), torch.full_like(low, torch.inf)
    for fraction in _OCTAVES if grid.power_of_two else evenly:
        scale, zero_point = storable(grid, low * fraction, high * fraction)
        codes = (blocks / scale.unsqueeze(-1)).round_()
        if zero_point is not None:
            codes += zero_point.unsqueeze(-1)
        codes.clamp_(grid.low, grid.high)
        if zero_point is not None:
            codes -= zero_point.unsqueeze(-1)
        error = codes.mul_(scale.unsqueeze(-1)).sub_(blocks).square_().sum(-1)
        better = error < least
        best, least = torch.where(better, fraction, best), torch.where(better, error, least)
    return storable(grid, low * best, high * best)


def _pieces(weight: Tensor, grid: Grid) -> Iterator[Tensor]:
    """Whole rows, about a million weights at a time; a grid with one scale for the tensor needs all of it at once."""
    if grid.granularity == "tensor":
        yield weight
        return
    rows = max(1, _PIECE // max(1, weight[0].numel()))
    for start in range(0, weight.shape[0], rows):
        yield weight[start : start + rows]


def _rows(scale: Tensor, zero_point: Tensor | None, rows: slice, grid: Grid) -> tuple[Tensor, Tensor | None]:
    if grid.granularity == "tensor":
        return scale, zero_point
    return scale[rows], None if zero_point is None else zero_point[rows]
