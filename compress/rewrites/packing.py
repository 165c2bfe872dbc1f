"""Query, key and value projections of one tensor into one product."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from compress.anatomy.attention import find_attention
from compress.layers.conversion import is_conv1d, outputs_of
from compress.layers.packed import PackedPart
from compress.rewrites.rule import Found, Rewrite, Rule, View

__all__ = ["QueryKeyValuePacked"]

_ROLES = ("attention.query", "attention.key", "attention.value")


class QueryKeyValuePacked(Rule):
    """Projections of the same tensor are one: [q; k; v] = [Wq; Wk; Wv] x + [bq; bk; bv], cut apart afterwards. One that has no
    bias gets zeros where another has some; with grouped heads the parts differ in size.

    They have to be linear layers that read the very same step of the graph each time they are called; where keys and values come
    from elsewhere (cross-attention), those two are packed.
    """

    name = "qkv"
    reshapes = False

    def find(self, view: View) -> Found:
        found = Found()
        done: set[str] = set()
        for attention in find_attention(view.flow)[0]:
            steps = list(dict.fromkeys(index for role in _ROLES for index in attention.roles[role]))
            paths = list(dict.fromkeys(view.flow.projections[index].path for index in steps))
            if done & set(paths):
                continue
            done |= set(paths)
            if len(paths) < 2:
                for path in paths:
                    found.left[path] = "query, key and value are one layer already"
                continue
            groups: dict[tuple[int, ...], list[str]] = {}
            for path in paths:
                groups.setdefault(tuple(view.flow.data(index) for index in view.calls.get(path, [])), []).append(path)
            for group in groups.values():
                reason = _unfit(view, group)
                if reason:
                    found.left[group[0]] = reason
                else:
                    found.rewrites.append(_rewrite(view, group))
        return found


def _unfit(view: View, paths: list[str]) -> str | None:
    for path in paths:
        for index in view.calls[path]:
            if reason := view.fixed(index, ("linear", "conv1d"), calls=None):
                return reason
    if len(paths) < 2:
        return "no other projection of its attention reads what it reads"
    widths = {view.model.get_submodule(path).get_parameter("weight").dtype for path in paths}
    return "their weights are of different types" if len(widths) > 1 else None


def _rewrite(view: View, paths: list[str]) -> Rewrite:
    model, modules = view.model, [view.model.get_submodule(path) for path in paths]
    sizes = [outputs_of(module) for module in modules]
    inputs = modules[0].get_parameter("weight").shape[0 if is_conv1d(modules[0]) else 1]
    biased = any(module._parameters.get("bias") is not None for module in modules)
    with torch.device("meta"):
        puts: dict[str, nn.Module] = {
            path: PackedPart(inputs, sizes, index, biased).requires_grad_(False) for index, path in enumerate(paths)
        }

    def values() -> dict[str, dict[str, Tensor]]:
        layers = [model.get_submodule(path) for path in paths]
        weights = [layer.get_parameter("weight").detach() for layer in layers]
        rows = [weight.t() if is_conv1d(layer) else weight for layer, weight in zip(layers, weights, strict=True)]
        made = {"weight": torch.cat(rows)}
        if biased:
            own = [layer._parameters.get("bias") for layer in layers]
            given = zip(own, rows, strict=True)
            made["bias"] = torch.cat([row.new_zeros(len(row)) if bias is None else bias.detach() for bias, row in given])
        return {f"{paths[0]}.packed.linear": made}

    shares = tuple((f"{path}.packed", f"{paths[0]}.packed") for path in paths[1:])
    says = {path: f"becomes a part of one product of {len(paths)}" for path in paths}
    return Rewrite(paths[0], says, values, puts, shares=shares)
