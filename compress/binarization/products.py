"""Which attentions get products of one bit, and what those begin with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from calibrate.errors import UserError
from calibrate.modes import evaluating
from calibrate.signature import Batch
from compress.anatomy import Anatomy, Block
from compress.hashing.attentions import Heard, listening
from compress.layers import BinaryProducts, HashedAttention, TopKAttention
from compress.layers.attached import attached_to

if TYPE_CHECKING:
    from compress.passes.contract import Context

__all__ = ["Products", "attach_products", "find_products"]


@dataclass(frozen=True)
class Products:
    """An attention that runs as ``scaled_dot_product_attention`` in a block, and its sizes."""

    block: Block
    heads: int
    head_dim: int
    value_dim: int

    def layer(self) -> BinaryProducts:
        return BinaryProducts(self.heads, self.head_dim, self.value_dim)


def find_products(
    where: str, model: nn.Module, anatomy: Anatomy, blocks: Sequence[Block]
) -> tuple[list[Products], dict[str, str]]:
    """Of the blocks given, the attentions whose products can be of one bit, and why others cannot; the model runs once.

    Raises:
        UserError: there is none.
    """
    signature, example = anatomy.traced
    paths = [block.path for block in blocks]
    with evaluating(model), listening(model, paths) as heard:
        signature.call(model, example)
    found, reasons = [], {}
    for block in blocks:
        reason = _reason(model, block, heard[block.path])
        if reason:
            reasons[block.path] = reason
            continue
        call = heard[block.path].calls[0]
        found.append(Products(block, call.queries.shape[1], call.queries.shape[-1], call.values.shape[-1]))
    if not found:
        why = next((f"{path}: {reason}." for path, reason in reasons.items()), "See what it has with: compress inspect.")
        raise UserError(where, "products: binary finds no attention", why)
    return found, reasons


def attach_products(
    model: nn.Module, context: Context, found: Sequence[Products], batches: Sequence[Batch]
) -> list[BinaryProducts]:
    """Attaches a layer to each block; they begin with what the attentions received on the first of the batches."""
    seen = _seen(model, context, found, batches[0]) if batches else {}
    layers = []
    for one in found:
        layer = one.layer()
        if one.block.path in seen:
            layer.begin(*seen[one.block.path])
        context.surgery.attach(model, one.block.path, layer)
        layers.append(layer)
    return layers


def _seen(
    model: nn.Module, context: Context, found: Sequence[Products], batch: Batch
) -> Mapping[str, tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Queries, keys and values [N, H, D] of positions that count, and the mean probability of a key."""
    with evaluating(model), listening(model, [one.block.path for one in found]) as heard:
        context.call(model, batch)
    seen = {}
    for path, one in heard.items():
        call = one.calls[0]
        mask = batch.get("attention_mask")
        parts = [x.movedim(1, 2) for x in (call.queries, call.keys, call.values)]
        counts = mask is not None and all(part.shape[:2] == mask.shape for part in parts)
        chosen = [part[mask.bool()] if counts and mask is not None else part.flatten(0, 1) for part in parts]
        keys = mask.sum(1).float() if counts and mask is not None else torch.full((1,), float(call.keys.shape[-2]))
        seen[path] = (chosen[0], chosen[1], chosen[2], (1 / keys.clamp(min=1)).mean())
    return seen


def _reason(model: nn.Module, block: Block, heard: Heard) -> str:
    module = model.get_submodule(block.path)
    if any(attached_to(module, kind) is not None for kind in (HashedAttention, TopKAttention, BinaryProducts)):
        return "its attention is another already"
    if isinstance(module, nn.Sequential | nn.ModuleList):
        return "it is a list of modules, which would run what is put into it"
    if len(heard.calls) != 1:
        return f"{len(heard.calls)} calls of scaled_dot_product_attention run in it, not one"
    return "" if heard.calls[0].queries.dim() == 4 else "its queries have no dimension of heads"
