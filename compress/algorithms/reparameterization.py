"""A scale and a zero point for each channel of an activation, turned into one for all. Tensors in, tensors out.

Shapes: C channels.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from calibrate.grid import Grid

__all__ = ["Reparameterization", "reparameterization"]

_NARROWEST = 0.25
"""Channels narrower than this part of the median one are treated as if they were as wide: other rows may wake them."""


@dataclass(frozen=True)
class Reparameterization:
    """``x * factor + shift`` on the grid of ``scale`` and ``zero_point`` has the codes that x has on a grid for each channel.

    Attributes:
        factor, shift: [C] float64.
        scale: a float16 number where it can be; ``zero_point``: an integer code of the grid.
        scales, zero_points: [C] float64, of the channels; the zero points are integers and may lie outside the codes.
    """

    factor: Tensor
    shift: Tensor
    scale: float
    zero_point: int
    scales: Tensor
    zero_points: Tensor


def reparameterization(low: Tensor, high: Tensor, grid: Grid) -> Reparameterization:
    """The scale reparameterization of Li et al. 2023 (RepQ-ViT, arXiv 2212.08254, eq. 8 to 11), with an integer zero point.

    The shared scale is the mean of the channels' scales. The shared zero point is the mean of theirs too, rounded and clamped to
    the grid: with the mean itself, as in the paper's code, codes would differ from those of the channels' grids by rounding.

    Args:
        low, high: [C], the range of each channel; it need not hold zero.
        grid: an asymmetric one.
    """
    low, high = low.double(), high.double()
    width = high - low
    wider = width.clamp(min=max(_NARROWEST * float(width.median()), 1e-8))
    low = low - (wider - width) / 2
    scales = wider / (grid.high - grid.low)
    zero_points = (grid.low - low / scales).round()
    mean = scales.mean()
    half = float(mean.half())
    scale = half if 2.0**-14 <= half <= 65504 else float(mean.float())
    zero_point = int(zero_points.mean().round().clamp(grid.low, grid.high))
    return Reparameterization(scale / scales, (zero_points - zero_point) * scale, scale, zero_point, scales, zero_points)
