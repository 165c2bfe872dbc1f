"""Layers that are trained: they compute with bits, and a float weight behind them says which bits (straight-through gradients).

Shapes: O outputs, I inputs, G groups, K bases, C channels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compress.algorithms.binarizing import Binarized, rebinarized
from compress.algorithms.straight_through import stepped, through_bits
from compress.layers.conversion import weight_of

__all__ = ["Latent", "LatentActivation"]


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
        return stepped(x, self.threshold, self.scale, self.nonnegative)


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
        return through_bits(flat, self.scale, self.multiples, self.shift).reshape(self.weight.shape)

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.activation is None else self.activation(x)
        if self.kind == "conv2d":
            return F.conv2d(x, self.binary(), self.bias, *self.geometry)
        return F.linear(x, self.binary(), self.bias)

    @torch.no_grad()
    def bits(self, found: Binarized) -> Binarized:
        """The bits now. ``found``: those it began with, whose form they keep."""
        return rebinarized(self.weight.flatten(1), found, self.scale)
