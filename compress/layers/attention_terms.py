"""A call of ``scaled_dot_product_attention``, for layers that stand in for it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["AttentionCall"]


@dataclass(frozen=True)
class AttentionCall:
    """The arguments, in its order: queries [..., H, T, D], keys and values [..., G, S, D]."""

    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None = None
    dropout_p: float = 0.0
    is_causal: bool = False
    scale: float | None = None
    enable_gqa: bool = False

    @property
    def expanded(self) -> AttentionCall:
        """The same with as many heads of keys and values as of queries: each is repeated for the queries that share it."""
        if not self.enable_gqa:
            return self
        times = self.query.shape[-3] // self.key.shape[-3]
        key, value = self.key.repeat_interleave(times, -3), self.value.repeat_interleave(times, -3)
        return replace(self, key=key, value=value, enable_gqa=False)

    @property
    def factor(self) -> float:
        """What products of queries and keys are multiplied with."""
        return self.query.shape[-1] ** -0.5 if self.scale is None else self.scale

    def masked(self, scores: Tensor) -> Tensor:
        """Scores [..., T, S] with those at the lowest number that a causal or a boolean mask (true: attend) hides; a mask of
        numbers is added."""
        lowest, mask = torch.finfo(scores.dtype).min, self.attn_mask
        if self.is_causal:
            before = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
            scores = scores.masked_fill(~before, lowest)
        if mask is None:
            return scores
        return scores.masked_fill(~mask, lowest) if mask.dtype == torch.bool else scores + mask

    @property
    def scores(self) -> Tensor:
        """What the softmax is taken of, [..., H, T, S]; heads have to be expanded."""
        return self.masked(self.query @ self.key.transpose(-1, -2) * self.factor)

    def softmax_attention(self) -> Tensor:
        """What torch's own function gives."""
        return F.scaled_dot_product_attention(
            self.query,
            self.key,
            self.value,
            self.attn_mask,
            self.dropout_p,
            self.is_causal,
            scale=self.scale,
            enable_gqa=self.enable_gqa,
        )
