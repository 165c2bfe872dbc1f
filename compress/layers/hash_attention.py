"""Attention by hash codes: its time and memory grow with the number of tokens, not with its square."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from compress.algorithms.hash_codes import FLOOR, HashCodes, blend, through
from compress.layers.attention_terms import AttentionCall
from compress.layers.redirected import Redirecting

__all__ = ["HashedAttention"]


class HashedAttention(Redirecting, nn.Module):
    """Attention that weighs keys by how many bits of their code they share with the query's; see ``HashCodes``.

    It is attached to a module, is its child ``hash_attention``, and takes the place of every ``scaled_dot_product_attention``
    that runs in the module's forward. Codes and blend are products of matrices, exponentials and a choice by sign; no matrix of
    queries and keys is made. A mask may leave keys out, or add to their scores, for all queries alike: padded keys have the
    weight 0. What was learnt holds the scale of the scores; attention dropout has no place in it.
    """

    child = "hash_attention"
    learning = False
    """Whether gradients pass its signs, as those of clamping."""

    centre: Tensor
    anchors: Tensor
    width: Tensor
    projection: Tensor
    shift: Tensor
    weights: Tensor
    gate: Tensor

    def __init__(self, heads: int, head_dim: int, bits: int, anchors: int, projections: int = 2) -> None:
        """
        Args:
            heads: of the queries; head_dim: their width.
            projections: 2: queries and keys have their own; 1: one for both.
        """
        super().__init__()
        self.heads, self.head_dim, self.bits, self.anchor_count, self.projections = heads, head_dim, bits, anchors, projections
        shapes = {
            "centre": (2, heads, head_dim), "anchors": (heads, anchors, head_dim), "width": (heads,),
            "projection": (projections, heads, bits, anchors), "shift": (projections, heads, bits),
            "weights": (heads, bits), "gate": (heads, head_dim),
        }  # fmt: skip
        for name, shape in shapes.items():
            self.register_buffer(name, torch.zeros(shape))
        self.width.fill_(1.0)
        self.weights.fill_((1 - FLOOR) / bits)

    @property
    def hashed(self) -> HashCodes:
        """Its tensors by name."""
        return HashCodes(self.centre, self.anchors, self.width, self.projection, self.shift, self.weights, self.gate)

    @classmethod
    def holding(cls, codes: HashCodes) -> HashedAttention:
        """A layer with these tensors."""
        heads, anchors, head_dim = codes.anchors.shape
        made = cls(heads, head_dim, codes.weights.shape[1], anchors, len(codes.projection))
        for name, tensor in codes.tensors().items():
            made.register_buffer(name, tensor.detach().clone())
        return made

    def config(self) -> dict[str, Any]:
        """What makes it again without its tensors, as JSON."""
        names = {"heads": self.heads, "head_dim": self.head_dim, "bits": self.bits}
        return {**names, "anchors": self.anchor_count, "projections": self.projections}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> HashedAttention:
        return cls(**config)

    def attach(self, model: nn.Module, path: str) -> list[RemovableHandle]:
        module = model.get_submodule(path)
        self.train(module.training)
        module.add_module(self.child, self)
        return super().attach(model, path)

    @staticmethod
    def detach(model: nn.Module, path: str, handles: list[RemovableHandle]) -> None:
        """Takes back what ``attach`` did."""
        for handle in handles:
            handle.remove()
        delattr(model.get_submodule(path), HashedAttention.child)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        """Queries [B, H, T, D], keys and values [B, H, S, D]; a mask as torch's attention takes it, of which the first query's
        row counts for all."""
        codes = self.hashed
        logits = codes.key_logits(key, None if mask is None else _key_bias(mask, key))
        signed = through if self.learning else None
        return blend(codes.codes(query, 0, signed), codes.codes(key, 1, signed), codes.weights, logits, value)

    def redirect(self, func: Any, args: Any, kwargs: Any) -> Any:
        return self._attend(AttentionCall(*args, **kwargs)) if func is F.scaled_dot_product_attention else func(*args, **kwargs)

    def _attend(self, call: AttentionCall) -> Tensor:
        """
        Raises:
            ValueError: attention is causal.
        """
        if call.is_causal:
            raise ValueError("hash attention has no causal form")
        call = call.expanded
        mixed: Tensor = self(call.query, call.key, call.value, call.attn_mask)
        return mixed

    def extra_repr(self) -> str:
        return f"heads={self.heads}, head_dim={self.head_dim}, bits={self.bits}, anchors={self.anchor_count}"


def _key_bias(mask: Tensor, like: Tensor) -> Tensor:
    """What a mask [..., T, S] adds to the scores of each key, [..., S, 1]."""
    row = mask[..., :1, :].transpose(-1, -2)
    if row.dtype != torch.bool:
        return row
    return torch.where(row, 0.0, torch.finfo(like.dtype).min)
