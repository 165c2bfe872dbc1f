"""The scale of attention scores into the query projection."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from compress.anatomy.attention import Attention, find_attention
from compress.anatomy.flow import Flow
from compress.rewrites.rule import Found, Rewrite, Rule, View, folded_out

__all__ = ["AttentionScaleIntoQuery"]

_SUMS = frozenset({"add", "sub", "neg", "cat", "concat", "stack"})


class AttentionScaleIntoQuery(Rule):
    """Scores are s (q k^T) (Vaswani et al. 2017, arXiv 1706.03762, eq. 1) with q = W x + b, so the scale s can lie in the query
    projection: q' = (s W) x + s b. One multiplication of all scores less for each attention.

    Between the projection and the scores q may be moved, multiplied by what does not depend on it and added to itself (rotary
    positions), but not normalised or biased. The code has to read its scale from an attribute of the module, which becomes 1:
    whether it does is seen in the graph after it.

    Runtimes multiply the scores by the scale within their product (ONNX Runtime's FusedMatMul), so it saves them nothing, and the
    smaller queries make a later ``quantize`` lose more; it is applied only where it is named.
    """

    name = "attention_scale"
    default = False

    def find(self, view: View) -> Found:
        found = Found()
        for attention in find_attention(view.flow)[0]:
            core = attention.core[0]
            path = view.flow.steps[core].path or view.flow.steps[core].op
            made = self._place(view, attention)
            if isinstance(made, str):
                found.left[path] = made
            else:
                found.rewrites.append(made)
        return found

    def holds(self, view: View, rewrite: Rewrite) -> str | None:
        path = rewrite.sets[0][0]
        inside = [step.index for step in view.flow.steps if step.path == path]
        if any(scale not in (None, 1.0) for index in inside for scale in _scales(view.flow, index)):
            return f"the code of {path} does not read its scale from {rewrite.sets[0][1]}"
        return None

    def _place(self, view: View, attention: Attention) -> Rewrite | str:
        flow, queries, core = view.flow, attention.roles["attention.query"], attention.core[0]
        if len(queries) != 1:
            return f"its queries come from {len(queries)} layers"
        path = flow.projections[queries[0]].path
        if any(queries[0] in attention.roles[f"attention.{other}"] for other in ("key", "value")):
            return f"{path} makes keys or values too"
        if reason := view.fixed(queries[0], ("linear", "conv1d")):
            return reason
        reached = _multiples(flow, queries[0])
        if reached is None or not set(flow.steps[core].inputs) & reached:
            return "its queries are normalised or biased before the scores"
        reading = {user for index in reached for user in flow.steps[index].users if flow.steps[user].users}
        if reading - reached - set(attention.core):
            return "its queries are read by more than the scores"
        return self._with_attribute(view, path, core, reached)

    def _with_attribute(self, view: View, layer: str, core: int, reached: set[int]) -> Rewrite | str:
        flow = view.flow
        holder = flow.steps[core].path
        scales = {scale for index in (core, *flow.steps[core].users, *reached) for scale in _scales(flow, index)} - {None, 1.0}
        if not scales:
            return "its code states no scale"
        module = view.model.get_submodule(holder)
        names = [name for name, value in vars(module).items() if isinstance(value, float) and value in scales]
        if len(scales) != 1 or len(names) != 1:
            return "the scale is no attribute of its module"
        if sum(id(other) == id(module) for other in view.model.modules()) != 1:
            return "its module is shared"
        scale: float = getattr(module, names[0])

        def values() -> dict[str, dict[str, Tensor]]:
            projection = view.model.get_submodule(layer)
            weight = projection.get_parameter("weight")
            outputs = weight.shape[1] if view.flow.projections[view.calls[layer][0]].kind == "conv1d" else weight.shape[0]
            return {layer: folded_out(projection, torch.full((outputs,), scale, dtype=torch.float64), None)}

        return Rewrite(layer, {layer: f"takes the scale {scale:.4g} of its scores"}, values, sets=((holder, names[0], 1.0),))


def _scales(flow: Flow, index: int) -> Iterator[float | None]:
    """The numbers that a step multiplies by."""
    step = flow.steps[index]
    if step.op == "scaled_dot_product_attention":
        scale = step.options.get("scale")
        yield scale if isinstance(scale, float) else None
    elif step.op in ("mul", "div") and len(step.inputs) == 1:
        for argument in step.arguments:
            if isinstance(argument, float):
                yield argument if step.op == "mul" else 1 / argument


def _multiples(flow: Flow, start: int) -> set[int] | None:
    """The steps whose value grows as the queries do; None where queries meet something that does not."""
    found, bits = {start}, 1 << start
    for step in flow.steps[start + 1 :]:
        mine = [source for source in step.inputs if bits >> source & 1]
        if not mine or not step.users or step.index in flow.products or step.op == "scaled_dot_product_attention":
            continue
        live = [source for source in step.inputs if flow.steps[source].live]
        scaled = len(mine) == 1 and (step.op == "mul" or (step.op == "div" and mine == step.inputs[:1]))
        summed = step.op in _SUMS and mine == step.inputs
        moved = step.op not in _SUMS and step.op not in ("mul", "div") and flow.is_layout(step.index) and live == mine
        if not (scaled or summed or moved):
            return None
        found.add(step.index)
        bits |= 1 << step.index
    return found
