"""LayerScale into the layer before it."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from compress.layers.plain import Identity
from compress.rewrites.channels import Reader, chain
from compress.rewrites.rule import Found, Rewrite, Rule, View, axis_of, folded_out

__all__ = ["LayerScaleIntoLayer"]


class LayerScaleIntoLayer(Rule):
    """A factor for each channel right after a layer (LayerScale, Touvron et al. 2021, arXiv 2103.17239, eq. 5) is one with it:
    g * (W x + b) = (diag(g) W) x + g b. One multiplication less for each.

    The factor has to be the only parameter of a module that does nothing but multiply by it; one that the code of a larger
    module multiplies by itself is left, and named.
    """

    name = "layer_scale"

    def find(self, view: View) -> Found:
        found = Found()
        for index, weight in view.flow.projections.items():
            if not view.flow.steps[index].live or not weight.whole:
                continue
            reader = chain(view.flow, index, axis_of(view, index))
            scale = None if reader is None else _factor(view, reader)
            if scale is None:
                continue
            holder, _, name = scale.rpartition(".")
            reason = _unfit(view, holder, name) or view.fixed(index)
            if reason:
                found.left[scale] = reason
            else:
                found.rewrites.append(_rewrite(view, weight.path, holder, name))
        return found


def _factor(view: View, reader: Reader) -> str | None:
    """Name of the parameter that the one reader multiplies the channels by, if that is what it does."""
    flow, step = view.flow, view.flow.steps[reader.index]
    others = [source for source in step.inputs if source != reader.source]
    if step.op != "mul" or len(others) != 1 or flow.steps[others[0]].live:
        return None
    stored, rank = others[0], len(flow.steps[reader.source].shape)
    shape = (1,) * (rank - len(flow.steps[stored].shape)) + flow.steps[stored].shape
    while flow.steps[stored].tensor is None and len(flow.steps[stored].inputs) == 1 and flow.is_layout(stored):
        stored = flow.steps[stored].inputs[0]
    name = flow.steps[stored].tensor
    wide = [axis for axis, size in enumerate(shape) if size > 1]
    if name is None or wide != [reader.axis] or shape[reader.axis] != flow.steps[reader.source].shape[reader.axis]:
        return None
    holder, _, leaf = name.rpartition(".")
    parameter = view.model.get_submodule(holder)._parameters.get(leaf)
    return name if parameter is not None and parameter.numel() == shape[reader.axis] else None


def _unfit(view: View, holder: str, name: str) -> str | None:
    module = view.model.get_submodule(holder)
    tensors = [*module.parameters(), *module.buffers()]
    if not holder or len(tensors) > 1 or list(module.children()):
        return f"the code of {holder or 'the model'} multiplies by it itself"
    trial = copy.deepcopy(module).double().eval()
    factor = trial.get_parameter(name).detach()
    for shape, axis in (((2, 3, factor.numel()), 2), ((2, factor.numel(), 3, 3), 1), ((2, 3, 3, factor.numel()), 3)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(factor.device)
        expected = x * factor.reshape([-1 if at == axis else 1 for at in range(len(shape))])
        try:
            with torch.no_grad():
                given = trial(x)
        except Exception:  # a module that takes other shapes
            continue
        if given.shape == x.shape and bool((given - expected).abs().amax() <= 1e-12 * expected.abs().amax()):
            return view.tied(holder) or view.watched(holder)
    return f"{holder} does more than multiply by it"


def _rewrite(view: View, layer: str, holder: str, name: str) -> Rewrite:
    model = view.model

    def values() -> dict[str, dict[str, Tensor]]:
        factor = model.get_submodule(holder).get_parameter(name).detach().flatten()
        return {layer: folded_out(model.get_submodule(layer), factor, None)}

    puts: dict[str, nn.Module] = {holder: Identity()}
    return Rewrite(holder, {holder: "goes into the layer before", layer: f"takes the factor of {holder}"}, values, puts)
