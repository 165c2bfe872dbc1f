"""Signs through which gradients pass: a float number is trained, and its sign computed with. Tensors in, tensors out.

Shapes: O outputs, I inputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from compress.algorithms.binarizing import nearest

__all__ = ["stepped", "through_bits"]


def through_bits(weight: Tensor, scale: Tensor, multiples: Tensor | None, shift: Tensor | None) -> Tensor:
    """``scale * nearest(weight / scale)`` [O, I]: the gradient passes to the weight as it is (Bengio et al. 2013, arXiv
    1308.3432), and to the scale [O, 1] as the integers say (Esser et al. 2020, arXiv 1902.08153, eq. 3, inside the range)."""
    made: Tensor = _Bits.apply(weight, scale, multiples, shift)  # type: ignore[no-untyped-call]
    return made


def stepped(x: Tensor, threshold: Tensor, scale: Tensor, nonnegative: bool) -> Tensor:
    """``scale`` where x reaches the threshold, else ``-scale`` (or 0); the gradient passes where x is within a scale of it
    (BiPFT: Xing et al. 2024, AAAI; for the scale's and its factor: Esser et al. 2020, arXiv 1902.08153).

    Args:
        threshold: broadcasts with x; scale: one number.
    """
    made: Tensor = _Step.apply(x, threshold, scale, nonnegative)  # type: ignore[no-untyped-call]
    return made


class _Bits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, scale: Tensor, multiples: Tensor | None, shift: Tensor | None) -> Tensor:
        whole = nearest(weight if multiples is None else weight / scale, multiples, shift)
        ctx.save_for_backward(whole)
        return whole * scale

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (gradient,) = gradients
        (whole,) = ctx.saved_tensors
        return gradient, (gradient * whole).sum(1, keepdim=True), None, None


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, threshold: Tensor, scale: Tensor, nonnegative: bool) -> Tensor:
        above = x >= threshold
        level = above.to(x.dtype) if nonnegative else torch.where(above, 1.0, -1.0).to(x.dtype)
        ctx.save_for_backward(x - threshold, level, scale)
        ctx.shape = threshold.shape
        return level * scale

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        (gradient,) = gradients
        off, level, scale = ctx.saved_tensors
        inside = gradient * (off.abs() <= scale)
        rough = (gradient * level).sum() * (gradient.numel() ** -0.5)
        return inside, -inside.sum_to_size(ctx.shape), rough, None
