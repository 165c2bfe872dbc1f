"""One factor and one constant for each channel: what is left of a normalisation whose statistics are numbers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["ChannelAffine"]


class ChannelAffine(nn.Module):
    """``weight * x + bias`` for ``x`` [..., C]; ``affine`` false: ``x`` itself, where both were folded into what reads it."""

    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(self, channels: int, affine: bool = True) -> None:
        super().__init__()
        self.channels, self.affine = channels, affine
        self.register_parameter("weight", nn.Parameter(torch.ones(channels), requires_grad=False) if affine else None)
        self.register_parameter("bias", nn.Parameter(torch.zeros(channels), requires_grad=False) if affine else None)

    def config(self) -> dict[str, Any]:
        """What rebuilds the layer, as JSON."""
        return {"channels": self.channels, "affine": self.affine}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> ChannelAffine:
        return cls(**config)

    def forward(self, x: Tensor) -> Tensor:
        if self.weight is None or self.bias is None:
            return x
        return x * self.weight + self.bias

    def extra_repr(self) -> str:
        return f"{self.channels}, affine={self.affine}"
