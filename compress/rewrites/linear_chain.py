"""A linear layer right after a linear layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from compress.layers.conversion import is_conv1d
from compress.layers.plain import Identity
from compress.rewrites.channels import chain
from compress.rewrites.rule import Found, Rewrite, Rule, View, axis_of, conv_like, linear_like

__all__ = ["LinearAfterLinear"]


class LinearAfterLinear(Rule):
    """Two linear layers with nothing between are one: W2 (W1 x + b1) + b2 = (W2 W1) x + (W2 b1 + b2); so are two convolutions
    with kernels of one pixel (VanillaNet, Chen et al. 2023, arXiv 2305.12972, sec. 3.1, at slope one).

    Applied where the one layer has no more weights than the two: a narrow middle is a factorisation, and cheaper as it is.
    """

    name = "linear_chain"

    def find(self, view: View) -> Found:
        found = Found()
        taken: set[str] = set()
        for index, weight in view.flow.projections.items():
            if not view.flow.steps[index].live:
                continue
            reader = chain(view.flow, index, axis_of(view, index), moves=False)
            if reader is None or reader.index not in view.flow.projections or view.flow.data(reader.index) != reader.source:
                continue
            second = view.flow.projections[reader.index].path
            reason = _unfit(view, index, reader.index)
            if reason:
                found.left[second] = reason
            elif not taken & {weight.path, second}:
                taken |= {weight.path, second}
                found.rewrites.append(_rewrite(view, weight.path, second))
        return found


def _unfit(view: View, first: int, second: int) -> str | None:
    reason = view.fixed(first) or view.fixed(second)
    if reason:
        return reason
    one, two = (view.flow.projections[index] for index in (first, second))
    spatial = [weight.path for weight in (one, two) if weight.kind == "conv2d"]
    if len(spatial) == 1:
        return f"{one.path} before it is of another kind"
    if any(not _single_pixel(view.model.get_submodule(path)) for path in spatial):
        return "not both kernels are single pixels at stride one"
    (middle, inputs), (outputs, again) = _matrix(view.model, one.path).shape, _matrix(view.model, two.path).shape
    if middle != again:
        return f"it reads other channels than {one.path} gives"
    if outputs * inputs > middle * (inputs + outputs):
        return f"one layer of {inputs} inputs and {outputs} outputs costs more than two with {middle} between them"
    return None


def _single_pixel(module: Any) -> bool:
    plain = (module.groups == 1, all(size == 1 for size in (*module.kernel_size, *module.stride)))
    return all(plain) and all(size == 0 for size in module.padding)


def _matrix(model: nn.Module, path: str) -> Tensor:
    module = model.get_submodule(path)
    weight = module.get_parameter("weight").detach()
    return weight.t() if is_conv1d(module) else weight.flatten(1)


def _rewrite(view: View, first: str, second: str) -> Rewrite:
    model = view.model
    one, two = model.get_submodule(first), model.get_submodule(second)
    biased = any(module._parameters.get("bias") is not None for module in (one, two))
    outputs = _matrix(model, second).shape[0]
    if one.get_parameter("weight").dim() == 4:
        layer: nn.Module = conv_like(one, biased, out_channels=outputs)
    else:
        layer = linear_like(one, outputs=outputs, bias=biased)

    def values() -> dict[str, dict[str, Tensor]]:
        left, right = _matrix(model, second), _matrix(model, first)
        made = {"weight": (left @ right).reshape(layer.get_parameter("weight").shape)}
        if biased:
            made["bias"] = torch.zeros(outputs, dtype=left.dtype, device=left.device)
            if (bias := model.get_submodule(first)._parameters.get("bias")) is not None:
                made["bias"] = made["bias"] + left @ bias.detach()
            if (bias := model.get_submodule(second)._parameters.get("bias")) is not None:
                made["bias"] = made["bias"] + bias.detach()
        return {first: made}

    says = {first: f"becomes one layer with {second}", second: f"goes into {first}"}
    return Rewrite(second, says, values, {first: layer, second: Identity()})
