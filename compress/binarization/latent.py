"""Layers that are trained: they compute with bits, and a float weight behind them says which bits (straight-through gradients).

Shapes: O outputs, I inputs, G groups, K bases, C channels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compress.algorithms.binarizing import Binarized, nearest, rebinarized
from compress.layers.conversion import weight_of

__all__ = ["Latent", "LatentActivation"]


class _Through(torch.autograd.Function):
    """``scale * nearest(weight / scale)``: the gradient passes to the weight as it is (Bengio et al. 2013, arXiv 1308.3432), and
    to the scale as the integers say (Esser et al. 2020, arXiv 1902.08153, eq. 3, for weights that are inside the range)."""

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
    """``scale`` where x reaches the threshold, else ``-scale`` (or 0); the gradient passes where x is within a scale of it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, threshold: Tensor, scale: Tensor, nonnegative: bool) -> Tensor:
        above = x >= threshold
        level = above.to(x.dtype) if nonnegative else torch.where(above, 1.0, -1.0).to(x.dtype)
        ctx.save_for_backward(x - threshold, level, scale)
        ctx.channels = threshold.numel()
        return level * scale

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        (gradient,) = gradients
        off, level, scale = ctx.saved_tensors
        inside = gradient * (off.abs() <= scale)
        rough = (gradient * level).sum() * (gradient.numel() ** -0.5)
        return inside, -inside.reshape(-1, ctx.channels).sum(0), rough, None


class LatentActivation(nn.Module):
    """What a ``BinaryActivation`` is while it is trained: a threshold for each channel, one scale (BiPFT)."""

    def __init__(self, mean: Tensor, size: Tensor, nonnegative: bool) -> None:
        """
        Args:
            mean: of each channel [C], where sign is to begin.
            size: mean of |x - threshold|, the best factor for signs.
        """
        super().__init__()
        self.nonnegative = nonnegative
        self.threshold, self.scale = nn.Parameter(mean.clone()), nn.Parameter(size.clone().reshape(()))

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = _Step.apply(x, self.threshold, self.scale, self.nonnegative)  # type: ignore[no-untyped-call]
        return made


class Latent(nn.Module):
    """A linear layer or convolution whose weight is the bits nearest to a float weight. Whole numbers of groups, bases and shift
    stay; the float weight, the scales [O, 1] and the bias are trained."""

    multiples: Tensor | None
    shift: Tensor | None

    def __init__(self, module: nn.Module, kind: str, bits: Binarized, bias: Tensor | None) -> None:
        super().__init__()
        self.kind = kind
        self.weight = nn.Parameter(weight_of(module, kind).float().clone())
        self.scale = nn.Parameter(bits.scale.clone())
        self.bias = None if bias is None else nn.Parameter(bias.detach().float().clone())
        self.register_buffer("multiples", bits.multiples)
        self.register_buffer("shift", bits.shift)
        self.activation: nn.Module | None = None
        if kind == "conv2d":
            conv: Any = module
            self.geometry = (conv.stride, conv.padding, conv.dilation, conv.groups)
        self.requires_grad_(False)

    def binary(self) -> Tensor:
        """The weight that the bits make, in the weight's shape."""
        flat = self.weight.flatten(1)
        made: Tensor = _Through.apply(flat, self.scale, self.multiples, self.shift)  # type: ignore[no-untyped-call]
        return made.reshape(self.weight.shape)

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.activation is None else self.activation(x)
        if self.kind == "conv2d":
            return F.conv2d(x, self.binary(), self.bias, *self.geometry)
        return F.linear(x, self.binary(), self.bias)

    @torch.no_grad()
    def bits(self, found: Binarized) -> Binarized:
        """The bits now. ``found``: those it began with, whose form they keep."""
        return rebinarized(self.weight.flatten(1), found, self.scale)
