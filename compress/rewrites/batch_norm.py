"""BatchNorm in eval mode into the convolution or linear layer before it, or behind it."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compress.rewrites.channels import onward, readers, users
from compress.rewrites.rule import Found, Rewrite, Rule, View, axis_of, conv_like, folded_in, folded_out, linear_like

__all__ = ["BatchNormIntoLayer", "Scaling", "scaling_of"]


_NOTHING = "no layer lies right before it"


@dataclass(frozen=True)
class Scaling:
    """What a BatchNorm does to its channels: factor * x + shift, each [C]; ``then`` are the children that run after it."""

    factor: Tensor
    shift: Tensor
    then: tuple[str, ...] = ()


class BatchNormIntoLayer(Rule):
    """In eval mode a BatchNorm is y = a x + s with a = gamma / sqrt(var + eps) and s = beta - a mean (Ioffe and Szegedy 2015,
    arXiv 1502.03167, alg. 2). After a convolution or linear layer x = W u + b it is one with it: W' = diag(a) W, b' = a b + s.
    Before one, W' = W diag(a), b' = b + W s, if every reader is such a layer and none pads: a padded zero is not shifted.

    One operator less for each. What the norm's module computes after it (an activation function) stays.
    """

    name = "batch_norm"

    def find(self, view: View) -> Found:
        found = Found()
        taken: set[str] = set()
        for index, path in sorted(view.flow.norms.items()):
            step = view.flow.steps[index]
            if "batch_norm" not in step.op or not path or not step.live:
                continue
            made = self._before(view, index, path)
            if isinstance(made, str):
                other = self._behind(view, index, path)
                made = made if isinstance(other, str) and made != _NOTHING else other
            if isinstance(made, str):
                found.left[path] = made
            elif taken & set(made.touches):
                found.left[path] = "its neighbour takes another norm"
            else:
                taken |= set(made.touches)
                found.rewrites.append(made)
        return found

    def _before(self, view: View, index: int, path: str) -> Rewrite | str:
        """Into the projection whose output the norm reads."""
        flow = view.flow
        if reason := _unfit(view, path):
            return reason
        source = flow.given(index, 0)
        chain = [] if source is None else _back(view, source)
        maker = chain[-1] if chain else -1
        if maker not in flow.projections:
            return _NOTHING
        if any(len(users(flow, step)) > 1 for step in chain):
            return f"what {flow.projections[maker].path} gives is read by more than the norm"
        axis: int | None = axis_of(view, maker)
        for source, step in zip(reversed(chain), [*reversed(chain[:-1])], strict=False):
            axis = None if axis is None else onward(flow, step, source, axis)
        if axis != 1:
            return f"its channels are not the outputs of {flow.projections[maker].path}"
        layer = flow.projections[maker].path
        return view.fixed(maker) or _rewrite(view, path, [layer], ahead=True)

    def _behind(self, view: View, index: int, path: str) -> Rewrite | str:
        """Into the projections that read what the norm gives."""
        flow, layers = view.flow, []
        scaling = scaling_of(view.model.get_submodule(path))
        if scaling is None or scaling.then:
            return "more than a norm lies between it and what reads it"
        for reader in readers(flow, index, 1)[0]:
            weight = flow.projections.get(reader.index)
            if weight is None or flow.data(reader.index) != reader.source:
                return view.other_reader(reader.index)
            module: Any = view.model.get_submodule(weight.path) if weight.whole else None
            if reason := view.fixed(reader.index):
                return reason
            if reader.axis != (1 if weight.kind == "conv2d" else len(flow.steps[reader.source].shape) - 1):
                return f"{weight.path} does not read its channels"
            if weight.kind == "conv2d" and any(size != 0 for size in module.padding):
                return f"{weight.path} pads: a padded zero is not shifted"
            layers.append(weight.path)
        return _rewrite(view, path, layers, ahead=False)


def scaling_of(module: nn.Module) -> Scaling | None:
    """What a module does if it is a BatchNorm, alone or with its children after it; found by trying it on random values."""
    mean, var = module._buffers.get("running_mean"), module._buffers.get("running_var")
    eps = getattr(module, "eps", None)
    if mean is None or var is None or not isinstance(eps, float):
        return None
    weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
    wide = torch.float64
    factor = (var.to(wide) + eps).rsqrt() * (1.0 if weight is None else weight.detach().to(wide))
    shift = -factor * mean.to(wide) + (0.0 if bias is None else bias.detach().to(wide))
    trial: Any = copy.deepcopy(module).double().eval()
    names = tuple(name for name, child in trial.named_children() if not isinstance(child, nn.Identity))
    generator = torch.Generator().manual_seed(0)
    for rank in (4, 2):
        x = torch.randn((2, mean.shape[0], 3, 3)[:rank], generator=generator, dtype=wide).to(mean.device)
        across = (1, -1, 1, 1)[:rank]
        expected = factor.reshape(across) * x + shift.reshape(across)
        try:
            with torch.no_grad():
                given = trial(x)
                for name in names:
                    expected = trial.get_submodule(name)(expected)
        except Exception:  # a norm of another rank
            continue
        if given.shape == expected.shape and bool((given - expected).abs().amax() <= 1e-9 * expected.abs().amax()):
            return Scaling(factor, shift, names)
    return None


def _unfit(view: View, path: str) -> str | None:
    if sum(other == path for other in view.flow.norms.values()) > 1:
        return "it is called more than once"
    if scaling_of(view.model.get_submodule(path)) is None:
        return "it computes more than a BatchNorm and its children"
    return view.tied(path) or view.watched(path)


def _back(view: View, start: int) -> list[int]:
    """The steps from what a norm reads back to the nearest projection, as long as each only moves what is before it."""
    flow, found = view.flow, [start]
    while found[-1] not in flow.projections and len(flow.steps[found[-1]].inputs) == 1:
        if not flow.is_layout(found[-1]):
            break
        found.append(flow.steps[found[-1]].inputs[0])
    return found


def _rewrite(view: View, path: str, layers: list[str], ahead: bool) -> Rewrite:
    model = view.model
    scaling = scaling_of(model.get_submodule(path))
    assert scaling is not None
    puts: dict[str, nn.Module] = {}
    for layer in layers:
        module = model.get_submodule(layer)
        if module._parameters.get("bias") is None:
            puts[layer] = conv_like(module) if module.get_parameter("weight").dim() == 4 else linear_like(module)
    merges: dict[str, tuple[nn.Module | None, list[str]]] = {path: (None, list(scaling.then))}

    def values() -> dict[str, dict[str, Tensor]]:
        current = scaling_of(model.get_submodule(path))
        assert current is not None
        fold = folded_out if ahead else folded_in
        return {layer: fold(model.get_submodule(layer), current.factor, current.shift) for layer in layers}

    says = dict.fromkeys(layers, f"takes {path} into its weights")
    return Rewrite(path, {path: "goes into its neighbour", **says}, values, puts, merges)
