"""One factor and one constant for each channel: what is left of a normalisation whose statistics are numbers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["ChannelAffine"]


class ChannelAffine(nn.Module):
    """``weight * x + bias`` for ``x`` [..., C]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.weight = nn.Parameter(torch.ones(channels), requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(channels), requires_grad=False)

    def config(self) -> dict[str, Any]:
        """What rebuilds the layer, as JSON."""
        return {"channels": self.channels}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> ChannelAffine:
        return cls(**config)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight + self.bias

    def extra_repr(self) -> str:
        return f"{self.channels}"
