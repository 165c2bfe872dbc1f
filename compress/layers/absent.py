"""What stands where a projection was taken out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Absent"]


class Absent(nn.Module):
    """Zeros [..., O] for an input [..., I]: a projection that was removed, weights and all.

    Only the input's shape is used, so that everything that computed the input is dead in a traced graph and no exporter
    writes it.
    """

    def __init__(self, features: int) -> None:
        super().__init__()
        self.out_features = features

    def config(self) -> dict[str, Any]:
        """What rebuilds the layer, as JSON."""
        return {"features": self.out_features}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Absent:
        return cls(**config)

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros((*x.shape[:-1], self.out_features), dtype=x.dtype, device=x.device)

    def extra_repr(self) -> str:
        return f"out_features={self.out_features}"
