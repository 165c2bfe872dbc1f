"""``torch.nn.MultiheadAttention`` taken apart, so that passes and exporters see its projections as linear layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["SplitAttention", "split_attention"]


class SplitAttention(nn.Module):
    """Multi-head attention (Vaswani et al. 2017, arXiv 1706.03762, sec. 3.2.2) with linear layers ``query``, ``key``, ``value``
    and ``out_proj``; called like ``torch.nn.MultiheadAttention`` and equal to it in eval mode.

    ``in_proj_bias`` is None and ``_qkv_same_embed_dim`` False: torch's encoder layers then take their plain path.
    """

    in_proj_bias: None = None
    _qkv_same_embed_dim = False

    def __init__(self, packed: nn.MultiheadAttention) -> None:
        super().__init__()
        self.embed_dim, self.num_heads, self.batch_first = packed.embed_dim, packed.num_heads, packed.batch_first
        if packed._qkv_same_embed_dim:
            weights = packed.in_proj_weight.detach().chunk(3)
        else:
            weights = tuple(weight.detach() for weight in (packed.q_proj_weight, packed.k_proj_weight, packed.v_proj_weight))
        biases = (None,) * 3 if packed.in_proj_bias is None else packed.in_proj_bias.detach().chunk(3)
        self.query, self.key, self.value = (_linear(w, b) for w, b in zip(weights, biases, strict=True))
        self.out_proj = _linear(packed.out_proj.weight.detach(), packed.out_proj.bias)
        self.train(packed.training)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Inputs [B, T, C] (``batch_first``), [T, B, C], or [T, C]; masks as in torch. Returns output and weights, or None."""
        single = query.dim() == 2
        if single:
            query, key, value = (x.unsqueeze(0) for x in (query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        q, k, v = self._heads(self.query(query)), self._heads(self.key(key)), self._heads(self.value(value))
        mask = self._mask(q, k, attn_mask, key_padding_mask)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        output: Tensor = self.out_proj(mixed.transpose(1, 2).flatten(2))
        weights = self._weights(q, k, mask, average_attn_weights) if need_weights else None
        if single:
            return output.squeeze(0), None if weights is None else weights.squeeze(0)
        return (output if self.batch_first else output.transpose(0, 1)), weights

    def _heads(self, x: Tensor) -> Tensor:  # [B, T, C] -> [B, H, T, D]
        return x.reshape(*x.shape[:2], self.num_heads, -1).transpose(1, 2)

    def _mask(self, q: Tensor, k: Tensor, attn_mask: Tensor | None, padding: Tensor | None) -> Tensor | None:
        """Both masks as one that is added to the scores, [B or 1, H or 1, T, S]."""
        whole: Tensor | None = None
        if attn_mask is not None:
            whole = _added(attn_mask, q)
            whole = whole.reshape(-1, self.num_heads, *whole.shape[1:]) if whole.dim() == 3 else whole[None, None]
        if padding is not None:
            padded = _added(padding, q)[:, None, None, :]
            whole = padded if whole is None else whole + padded
        return whole

    def _weights(self, q: Tensor, k: Tensor, mask: Tensor | None, average: bool) -> Tensor:
        scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        weights: Tensor = (scores if mask is None else scores + mask).softmax(-1)
        return weights.mean(1) if average else weights


def split_attention(model: nn.Module) -> int:
    """Replaces every ``torch.nn.MultiheadAttention`` in a model by an equal ``SplitAttention``; returns how many.

    Those with extra key and value rows (``bias_kv``, ``add_zero_attn``) stay as they are, and so do subclasses.
    """
    made: dict[nn.Module, SplitAttention] = {}
    for holder in list(model.modules()):
        for name, child in list(holder.named_children()):
            if type(child) is nn.MultiheadAttention and child.bias_k is None and not child.add_zero_attn:
                made.setdefault(child, SplitAttention(child))
                setattr(holder, name, made[child])
    return len(made)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    with torch.device("meta"):
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return layer


def _added(mask: Tensor, like: Tensor) -> Tensor:
    """A mask as numbers that are added: booleans (True is left out) become the lowest number or 0."""
    if mask.dtype != torch.bool:
        return mask.to(like.dtype)
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill(mask, torch.finfo(like.dtype).min)
