"""Ordinary layers that stand where exact rewrites put them: torch's own, made again from their shapes."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["Conv2d", "Identity", "Linear", "PlainNorm", "Sequence"]


class Linear(nn.Linear):
    """``torch.nn.Linear`` with weight [O, I], made from its shape."""

    def config(self) -> dict[str, Any]:
        """What makes the layer again, as JSON."""
        return {"inputs": self.in_features, "outputs": self.out_features, "bias": self.bias is not None}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Linear:
        return cls(config["inputs"], config["outputs"], config["bias"])


class Conv2d(nn.Conv2d):
    """``torch.nn.Conv2d`` with weight [O, I/groups, kh, kw] and zero padding, made from its geometry."""

    def config(self) -> dict[str, Any]:
        """What makes the layer again, as JSON."""
        padding = self.padding if isinstance(self.padding, str) else list(self.padding)
        return {
            "inputs": self.in_channels, "outputs": self.out_channels, "kernel": list(self.kernel_size),
            "stride": list(self.stride), "padding": padding, "dilation": list(self.dilation), "groups": self.groups,
            "bias": self.bias is not None,
        }  # fmt: skip

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Conv2d:
        geometry = {name: _pair(config[name]) for name in ("stride", "padding", "dilation")}
        kernel, bias = tuple(config["kernel"]), config["bias"]
        return cls(config["inputs"], config["outputs"], kernel, groups=config["groups"], bias=bias, **geometry)


class Identity(nn.Identity):
    """What it is given, where a layer was folded into another or gives back its very input.

    ``p`` and ``drop_prob`` are what code asks of a dropout that stood here.
    """

    p = 0.0
    drop_prob = 0.0

    def config(self) -> dict[str, Any]:
        """What makes the layer again, as JSON."""
        return {}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Identity:
        return cls()

    def forward(self, input: Tensor, *others: Any, **named: Any) -> Tensor:
        return input


class PlainNorm(nn.Module):
    """A normalisation [..., C] without weights, after its own went into the layers that read it.

    ``layer``: (x - mean) / sqrt(var + eps) (Ba et al. 2016, arXiv 1607.06450); ``rms``: x / sqrt(mean(x^2) + eps) (Zhang and
    Sennrich 2019, arXiv 1910.07467).
    """

    def __init__(self, kind: Literal["layer", "rms"], width: int, eps: float) -> None:
        super().__init__()
        self.kind, self.width, self.eps = kind, width, eps

    def config(self) -> dict[str, Any]:
        """What makes the layer again, as JSON."""
        return {"kind": self.kind, "width": self.width, "eps": self.eps}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> PlainNorm:
        return cls(**config)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "layer":
            return F.layer_norm(x, (self.width,), None, None, self.eps)
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)

    def extra_repr(self) -> str:
        return f"{self.kind}, {self.width}, eps={self.eps}"


class Sequence(nn.Sequential):
    """Layers one after the other, under names of their own: what a module becomes whose branches are one convolution."""


def _pair(value: Any) -> Any:
    return value if isinstance(value, str) else tuple(value)
