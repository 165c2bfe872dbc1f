"""FLOPs from the shapes in a graph: 2 * multiply-accumulates of projections and products."""

from __future__ import annotations

import math
from collections.abc import Sequence

from compress.anatomy.attention import Attention
from compress.anatomy.flow import PRODUCTS, Flow

__all__ = ["flops_of", "product_flops"]


def flops_of(flow: Flow, index: int) -> int:
    """2 * multiply-accumulates of one step, over the whole traced batch."""
    step = flow.steps[index]
    if step.op == "scaled_dot_product_attention":
        query, key, value = (flow.steps[argument.index].shape for argument in step.arguments[:3])
        return int(2 * math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1]))
    if step.op == "einsum":
        given = step.arguments[0].replace(" ", "").partition("->")[0].split(",")
        sizes: dict[str, int] = {}
        for letters, operand in zip(given, flow.operands(index), strict=True):
            sizes |= dict(zip(letters, flow.steps[operand].shape, strict=False))
        return 2 * math.prod(sizes.values())
    if step.op in PRODUCTS:
        return 2 * math.prod(step.shape) * flow.steps[flow.operands(index)[0]].shape[-1]
    if index not in flow.projections:
        return 0
    return 2 * math.prod(step.shape) * math.prod(flow.projections[index].shape[1:])


def product_flops(flow: Flow, attentions: Sequence[Attention], rows: int) -> list[tuple[str, int]]:
    """FLOPs of one row of the products of two computed values, with the layer that they serve or the module they are in."""
    serves = {
        index: flow.projections[attention.projections[-1]].path
        for attention in attentions
        if attention.projections
        for index in attention.core
    }
    cores = {attention.core[-1] for attention in attentions}
    steps = {index for index in flow.products if flow.steps[index].live} | cores
    return [(serves.get(index, flow.steps[index].path), flops_of(flow, index) // rows) for index in sorted(steps)]
