"""Which attentions of a model can be made linear, heard while it runs once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from calibrate.modes import evaluating
from compress.anatomy import Anatomy, Block
from compress.layers import BinaryProducts, HashedAttention, TopKAttention
from compress.layers.attached import attached_to
from compress.layers.attention_terms import AttentionCall
from compress.layers.redirected import Redirecting

__all__ = ["Call", "Hashable", "Heard", "find_attentions", "listening"]

_SOFTMAX = (torch.softmax, F.softmax, Tensor.softmax, torch.special.softmax)


@dataclass(frozen=True)
class Call:
    """One attention that ran.

    Attributes:
        queries: [B, H, T, D]; keys: [B, H, S, D]; values: [B, H, S, E], with as many heads as the queries.
        bias: [B or 1, H or 1, S, 1], what the mask adds to the scores of each key; None: there is no mask.
        scale: of the scores.
        obstacle: why it cannot be made linear; empty: it can.
    """

    queries: Tensor
    keys: Tensor
    values: Tensor
    bias: Tensor | None
    scale: float
    obstacle: str = ""

    @classmethod
    def of(cls, call: AttentionCall) -> Call:
        """Of a call of ``scaled_dot_product_attention``."""
        call = call.expanded
        query, mask, obstacle = call.query, call.attn_mask, ""
        if call.is_causal:
            obstacle = "it is causal, and sums over the keys before each query are no product of matrices"
        elif query.dim() != 4:
            obstacle = f"its queries have {query.dim()} dimensions instead of batch, heads, tokens and channels"
        elif mask is not None and not torch.equal(mask, mask[..., :1, :].expand_as(mask)):
            obstacle = "its mask or position bias differs from query to query (causal, windowed, or relative positions)"
        bias = None if mask is None or obstacle else _bias(mask, query)
        return cls(query, call.key, call.value, bias, call.factor, obstacle)


@dataclass
class Heard(Redirecting):
    """What ran in a module's forward; softmaxes that look like an attention's are counted."""

    calls: list[Call] = field(default_factory=list)
    softmaxes: int = 0

    def __post_init__(self) -> None:
        super().__init__()

    def redirect(self, func: Any, args: Any, kwargs: Any) -> Any:
        if func is F.scaled_dot_product_attention:
            self.calls.append(Call.of(AttentionCall(*args, **kwargs)))
        elif func in _SOFTMAX:
            self.softmaxes += 1
        return func(*args, **kwargs)


@dataclass(frozen=True)
class Hashable:
    """A block whose attention can be made linear.

    Attributes:
        queries, keys: how many there were in the batch that the model was traced with.
        value_dim: width of the values of one head.
    """

    block: Block
    heads: int
    head_dim: int
    value_dim: int
    queries: int
    keys: int

    def layer(self, bits: int, anchors: int, shared: bool) -> HashedAttention:
        """The layer that takes its place, on the ``meta`` device."""
        with torch.device("meta"):
            return HashedAttention(self.heads, self.head_dim, bits, anchors, 1 if shared else 2)

    def macs(self, tokens: int | None = None) -> int:
        """Multiply-accumulates of both products of softmax attention, for one row of the batch."""
        queries, keys = (tokens, tokens) if tokens else (self.queries, self.keys)
        return self.heads * queries * keys * (self.head_dim + self.value_dim)

    def hash_macs(self, bits: int, anchors: int, tokens: int | None = None) -> int:
        """Of hash attention: distances to the anchors, bits, gate, what keys hold together, and what queries take from it."""
        queries, keys = (tokens, tokens) if tokens else (self.queries, self.keys)
        hashed = (queries + keys) * anchors * (self.head_dim + bits)
        held = keys * (self.head_dim + bits * (self.value_dim + 1) + self.value_dim)
        return self.heads * (hashed + held + queries * bits * (self.value_dim + 1))

    def even_tokens(self, bits: int, anchors: int) -> int:
        """The least number of tokens with which hash attention has fewer multiply-accumulates than softmax attention."""
        return self.hash_macs(bits, anchors, 1) // self.macs(1) + 1


def find_attentions(model: nn.Module, anatomy: Anatomy) -> tuple[dict[str, Hashable], dict[str, str]]:
    """By the path of each block: the attention that can be made linear, or why there is none. The model runs once."""
    signature, example = anatomy.traced
    with evaluating(model), listening(model, [block.path for block in anatomy.blocks]) as heard:
        signature.call(model, example)
    found, reasons = {}, {}
    for block in anatomy.blocks:
        reason = _reason(model, block, heard[block.path])
        if reason:
            reasons[block.path] = reason
            continue
        call = heard[block.path].calls[0]
        _, heads, queries, head_dim = call.queries.shape
        found[block.path] = Hashable(block, heads, head_dim, call.values.shape[-1], queries, call.keys.shape[-2])
    return found, reasons


@contextmanager
def listening(model: nn.Module, paths: Sequence[str]) -> Iterator[Mapping[str, Heard]]:
    """While it is open, the attentions that run in the modules at the paths are heard."""
    heard = {path: Heard() for path in paths}
    handles = [handle for path, one in heard.items() for handle in one.attach(model, path)]
    try:
        yield heard
    finally:
        for handle in handles:
            handle.remove()


def _reason(model: nn.Module, block: Block, heard: Heard) -> str:
    module = model.get_submodule(block.path)
    if attached_to(module, HashedAttention) is not None:
        return "its attention is hashed already"
    if attached_to(module, TopKAttention) is not None:
        return "its largest scores count alone: that has no linear form"
    if attached_to(module, BinaryProducts) is not None:
        return "its products are of one bit already: hash it first, and binarize what is left"
    if not any("attention.value" in site.roles for site in block.sites):
        return "it has no attention"
    if isinstance(module, nn.Sequential | nn.ModuleList):
        return "it is a list of modules, which would run what is put into it"
    if len(heard.calls) != 1:
        if not heard.calls and heard.softmaxes:
            return (
                "its attention is written out as a softmax over all scores; only torch's scaled_dot_product_attention is replaced"
            )
        return f"{len(heard.calls)} attentions run in it" if heard.calls else "no scaled_dot_product_attention runs in it"
    return heard.calls[0].obstacle


def _bias(mask: Tensor, like: Tensor) -> Tensor:
    """[..., T, S] -> [B or 1, H or 1, S, 1]."""
    row = mask[..., :1, :].transpose(-1, -2)
    row = row[(None,) * (4 - row.dim())]
    if row.dtype != torch.bool:
        return row.to(like.dtype)
    return torch.zeros_like(row, dtype=like.dtype).masked_fill(~row, torch.finfo(like.dtype).min)
