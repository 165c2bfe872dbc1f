"""Simplified linear attention: rectified queries and keys in the place of a softmax, and a depth-wise convolution of the values.

Guo et al. 2024 (SLAB, arXiv 2405.11582), sec. 3.2. Shapes: B batch, H heads, T queries, S keys, D their width,
V that of the values.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from compress.layers.attention_terms import AttentionCall
from compress.layers.redirected import Redirecting

__all__ = ["LinearAttention"]

_FLOOR = 1e-6
_HIDDEN = -1e3
"""What a mask adds at most to the score of a key that is left out."""
_KERNEL = 5


class LinearAttention(Redirecting, nn.Module):
    """``relu(q) relu(k)^T v / (relu(q) sum relu(k))``, and what a 5x5 convolution of each channel of the values adds.

    It is attached to a module, is its child ``linear_attention``, and takes the place of every ``scaled_dot_product_attention``
    that runs in the module's forward. Products are taken in the order that costs less: keys with values first where there are
    more tokens than a head is wide. Both sums are over the number of keys, so that float16 holds them.

    Attributes:
        share: of softmax attention while it is being exchanged; it counts only while ``learning``.
    """

    child = "linear_attention"
    kernel: nn.Parameter | None
    share: float
    learning: bool

    def __init__(self, head_dim: int, value_dim: int, grid: tuple[int, int] | None = None, prefix: int = 0) -> None:
        """
        Args:
            grid: rows and columns of the patches, whose values are convolved; None: there are none.
            prefix: tokens before them, which get nothing from the convolution.
        """
        super().__init__()
        self.head_dim, self.value_dim, self.grid, self.prefix = head_dim, value_dim, grid, prefix
        made = nn.Parameter(torch.zeros(value_dim, 1, _KERNEL, _KERNEL), requires_grad=False) if grid else None
        self.register_parameter("kernel", made)
        self.share, self.learning = 1.0, False
        self.order: Literal["cheaper", "keys first", "queries first"] = "cheaper"

    def config(self) -> dict[str, Any]:
        """What makes it again without its tensors, as JSON."""
        grid = list(self.grid) if self.grid else None
        return {"head_dim": self.head_dim, "value_dim": self.value_dim, "grid": grid, "prefix": self.prefix}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> LinearAttention:
        return cls(**{**config, "grid": tuple(config["grid"]) if config["grid"] else None})

    def attach(self, model: nn.Module, path: str) -> list[RemovableHandle]:
        module = model.get_submodule(path)
        self.train(module.training)
        module.add_module(self.child, self)
        return super().attach(model, path)

    def redirect(self, func: Any, args: Any, kwargs: Any) -> Any:
        return self._attend(AttentionCall(*args, **kwargs)) if func is F.scaled_dot_product_attention else func(*args, **kwargs)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        """Queries [B, H, T, D], keys [B, H, S, D], values [B, H, S, V]; of a mask as torch's attention takes it the first
        query's row counts for all. Gives [B, H, T, V]."""
        query, key = query.relu(), key.relu()
        if mask is not None:
            key = key * _visible(mask, key)
        whole = query @ key.mean(-2, keepdim=True).transpose(-1, -2) + _FLOOR
        keys = key.shape[-2]
        first = self.order == "keys first" or (self.order == "cheaper" and keys > self.head_dim)
        mixed = query @ (key.transpose(-1, -2) @ value / keys) if first else (query @ key.transpose(-1, -2) / keys) @ value
        mixed = mixed / whole
        return mixed if self.grid is None else mixed + self._convolved(value)

    def _convolved(self, value: Tensor) -> Tensor:
        assert self.grid is not None
        assert self.kernel is not None
        batch, heads, tokens, width = value.shape
        patches = value[:, :, self.prefix :].transpose(-1, -2).reshape(batch * heads, width, *self.grid)
        made = F.conv2d(patches, self.kernel, padding=_KERNEL // 2, groups=width)
        return F.pad(made.reshape(batch, heads, width, tokens - self.prefix).transpose(-1, -2), (0, 0, self.prefix, 0))

    def _attend(self, call: AttentionCall) -> Tensor:
        """
        Raises:
            ValueError: attention is causal.
        """
        if call.is_causal:
            raise ValueError("linear attention has no causal form")
        call = call.expanded
        share = self.share if self.learning else 0.0
        soft = replace(call, dropout_p=0.0).softmax_attention() if share else None
        if soft is not None and share == 1:
            return soft
        mixed: Tensor = self(call.query, call.key, call.value, call.attn_mask)
        return mixed if soft is None else share * soft + (1 - share) * mixed

    def extra_repr(self) -> str:
        return f"head_dim={self.head_dim}, value_dim={self.value_dim}, grid={self.grid}, prefix={self.prefix}"


def _visible(mask: Tensor, like: Tensor) -> Tensor:
    """1 for the keys that a mask [..., T, S] lets count, 0 for the others: [..., S, 1]."""
    row = mask[..., :1, :].transpose(-1, -2)
    return (row if row.dtype == torch.bool else row > _HIDDEN).to(like.dtype)
