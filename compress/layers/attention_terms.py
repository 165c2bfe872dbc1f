"""What layers that stand in for ``scaled_dot_product_attention`` do with its arguments as it does."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["masked", "shared_heads"]


def shared_heads(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values [..., G, S, D] of grouped queries [..., H, T, D], each repeated for the heads that share it."""
    times = query.shape[-3] // key.shape[-3]
    return key.repeat_interleave(times, -3), value.repeat_interleave(times, -3)


def masked(scores: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """Scores [..., T, S] with those at the lowest number that a causal or a boolean mask (true: attend) hides; a mask of numbers
    is added."""
    lowest = torch.finfo(scores.dtype).min
    if causal:
        before = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~before, lowest)
    if mask is None:
        return scores
    return scores.masked_fill(~mask, lowest) if mask.dtype == torch.bool else scores + mask
