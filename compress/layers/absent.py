"""What stands where a projection was taken out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Absent"]


class Absent(nn.Module):
    """Zeros, or a bias, [..., O] for an input [..., I]: a projection whose weights were removed.

    Only the input's shape is used, so that everything that computed the input is dead in a traced graph and no exporter
    writes it.
    """

    bias: nn.Parameter | None

    def __init__(self, features: int, bias: bool = False) -> None:
        super().__init__()
        self.out_features = features
        self.register_parameter("bias", nn.Parameter(torch.zeros(features)) if bias else None)

    def config(self) -> dict[str, Any]:
        """What rebuilds the layer, as JSON."""
        return {"features": self.out_features, "bias": self.bias is not None}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Absent:
        return cls(**config)

    def forward(self, x: Tensor) -> Tensor:
        zeros = torch.zeros((*x.shape[:-1], self.out_features), dtype=x.dtype, device=x.device)
        return zeros if self.bias is None else zeros + self.bias

    def extra_repr(self) -> str:
        return f"out_features={self.out_features}, bias={self.bias is not None}"
