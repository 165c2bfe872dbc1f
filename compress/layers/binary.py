"""Layers whose weights are planes of bits, and whose inputs may be one bit too.

Shapes: O outputs, I inputs, G groups, K bases, C channels.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from calibrate import ops
from calibrate.bits import integers, pack_signs, plane_bytes
from compress.layers.quantized import ActivationGrid, QuantConv2d, QuantLinear

__all__ = ["BinaryActivation", "BinaryCodes", "BinaryConv2d", "BinaryLinear"]


class BinaryCodes(nn.Module):
    """A weight of the given shape as ``scale * (shift + sum_k multiples_k b_k)`` with b_k in {-1, +1} (``calibrate.bits``).

    One base without groups or shift has no ``multiples``: the weight is ``scale * b``.
    """

    codes: Tensor
    multiples: Tensor | None
    shift: Tensor | None
    scale: Tensor

    def __init__(self, shape: tuple[int, ...], bases: int = 1, group_size: int | None = None, shift: bool = False) -> None:
        super().__init__()
        self.shape, self.bases, self.group_size = tuple(shape), bases, group_size
        self.groups = 1 if group_size is None else math.prod(shape[1:]) // group_size
        plain = bases == 1 and self.groups == 1 and not shift
        self.register_buffer("codes", torch.zeros(bases * plane_bytes(shape), dtype=torch.uint8))
        ones = None if plain else torch.ones(shape[0], self.groups, bases, dtype=torch.int8)
        self.register_buffer("multiples", ones)
        self.register_buffer("shift", torch.zeros(shape[0], self.groups, dtype=torch.int8) if shift else None)
        self.register_buffer("scale", torch.ones(shape[0], 1))

    def config(self) -> dict[str, Any]:
        """What rebuilds it, as JSON."""
        shifted = self.shift is not None
        return {"shape": list(self.shape), "bases": self.bases, "group_size": self.group_size, "shift": shifted}

    def store(self, planes: Tensor, multiples: Tensor | None, shift: Tensor | None, scale: Tensor) -> BinaryCodes:
        """Keeps planes of signs [K, ...] with their whole numbers and scales; returns itself."""
        self.codes, self.scale = pack_signs(planes), scale.detach().float().reshape(self.scale.shape)
        if self.multiples is not None and multiples is not None:
            self.multiples = multiples.to(torch.int8).reshape(self.multiples.shape)
        if self.shift is not None and shift is not None:
            self.shift = shift.to(torch.int8).reshape(self.shift.shape)
        return self

    def integers(self) -> Tensor:
        """What the bits stand for, less the scale: int8 in the weight's shape."""
        return integers(self.codes, self.multiples, self.shift, self.shape)

    def forward(self) -> Tensor:
        values: Tensor = ops.binary(self.codes, self.multiples, self.shift, self.scale, list(self.shape))
        return values

    def extra_repr(self) -> str:
        return f"{list(self.shape)}, bases={self.bases}, group_size={self.group_size}, shift={self.shift is not None}"


class BinaryActivation(nn.Module):
    """One bit a value: ``scale`` where the input reaches its channel's ``threshold``, and below it ``-scale``, or 0 where inputs
    are never negative (BiPFT: Xing et al. 2024, AAAI; their learnable shift is minus the threshold).

    The result is a number of an 8-bit grid (code 1 or -1), and carried as such: integer kernels take it.
    """

    kind, bits, symmetric, factor = "binary", 8, True, None
    threshold: Tensor
    scale: Tensor
    zero_point: Tensor

    def __init__(self, channels: int, nonnegative: bool = False) -> None:
        super().__init__()
        self.nonnegative = nonnegative
        self.register_buffer("threshold", torch.zeros(channels))
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("zero_point", torch.zeros((), dtype=torch.int8))

    def config(self) -> dict[str, Any]:
        """What rebuilds it, as JSON."""
        return {"kind": self.kind, "channels": self.threshold.numel(), "nonnegative": self.nonnegative}

    def forward(self, x: Tensor) -> Tensor:
        low = torch.zeros_like(self.scale) if self.nonnegative else -self.scale
        level = torch.where(x >= self.threshold, self.scale, low)
        rounded: Tensor = ops.quantize_dequantize(level, self.scale, self.zero_point, self.bits)
        return rounded

    def extra_repr(self) -> str:
        return f"{self.threshold.numel()}, nonnegative={self.nonnegative}"


def _input(config: dict[str, Any] | None) -> ActivationGrid | BinaryActivation | None:
    if config is None:
        return None
    if config["kind"] == "binary":
        return BinaryActivation(config["channels"], config["nonnegative"])
    return ActivationGrid(**config)


class BinaryLinear(QuantLinear):
    """``linear(input(x), weight, bias)`` with the weight [O, I] from planes of bits."""

    def __init__(self, weight: dict[str, Any], activation: dict[str, Any] | None, bias: bool) -> None:
        nn.Module.__init__(self)
        _fill(self, weight, activation, bias)

    def config(self) -> dict[str, Any]:
        return _config(self)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> BinaryLinear:
        return cls(**config)


class BinaryConv2d(QuantConv2d):
    """A 2-D convolution with the weight [O, I/groups, kh, kw] from planes of bits."""

    def __init__(self, weight: dict[str, Any], activation: dict[str, Any] | None, bias: bool, geometry: dict[str, Any]) -> None:
        nn.Module.__init__(self)
        _fill(self, weight, activation, bias)
        self.geometry = geometry
        self.stride, self.dilation = tuple(geometry["stride"]), tuple(geometry["dilation"])
        self.groups = geometry["groups"]
        self.padding = geometry["padding"] if isinstance(geometry["padding"], str) else tuple(geometry["padding"])

    def config(self) -> dict[str, Any]:
        return _config(self) | {"geometry": self.geometry}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> BinaryConv2d:
        return cls(**config)


def _fill(layer: Any, weight: dict[str, Any], activation: dict[str, Any] | None, bias: bool) -> None:
    codes = BinaryCodes(**{**weight, "shape": tuple(weight["shape"])})
    layer.quantized_weight, layer.activation = codes, _input(activation)
    layer.bias = nn.Parameter(torch.zeros(codes.shape[0]), requires_grad=False) if bias else None


def _config(layer: Any) -> dict[str, Any]:
    activation = layer.activation
    return {
        "weight": layer.quantized_weight.config(),
        "activation": activation and activation.config(),
        "bias": layer.bias is not None,
    }
