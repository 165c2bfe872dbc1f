"""Weights of a LayerNorm or RMSNorm into the layers that read it."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from compress.anatomy.flow import NORMS
from compress.layers.plain import PlainNorm
from compress.rewrites.channels import Reader, readers
from compress.rewrites.precision import in_double
from compress.rewrites.rule import Found, Rewrite, Rule, View, folded_in, linear_like

__all__ = ["LayerNormIntoReaders", "RmsNormIntoReaders"]

Kind = Literal["layer", "rms"]


@dataclass(frozen=True)
class _Norm:
    """A module that computes ``factor * normalised(x) + shift`` over its last axis, factor and shift [C]."""

    kind: Kind
    eps: float
    factor: Tensor
    shift: Tensor | None


class _NormIntoReaders(Rule):
    """With y = g * n(x) + s and readers W y + b: n(x) is read by (W diag(g)) and b + W s instead. All readers of y have to be
    linear layers or Conv1D that can take it; between, y may only be moved, sliced or averaged over tokens."""

    kind: ClassVar[Kind]

    def find(self, view: View) -> Found:
        found = Found()
        for index, path in _norms(view).items():
            norm = _read(view.model.get_submodule(path))
            if norm is None:
                if self._alike(view, index):
                    found.left[path] = "it computes more than a norm over its last axis and weights"
            elif norm.kind == self.kind:
                reason = self._reason(view, index, path)
                if reason:
                    found.left[path] = reason
                else:
                    found.rewrites.append(_rewrite(view, path, norm, readers(view.flow, index, _last(view, index))[0]))
        return found

    def _alike(self, view: View, index: int) -> bool:
        op = view.flow.steps[index].op
        return (op not in NORMS or "rms" in op) if self.kind == "rms" else "layer_norm" in op

    def _reason(self, view: View, index: int, path: str) -> str | None:
        if sum(other == path for other in _norms(view).values()) > 1:
            return "it is called more than once"
        if reason := view.tied(path) or view.watched(path):
            return reason
        for reader in readers(view.flow, index, _last(view, index))[0]:
            if reason := _unfit(view, reader):
                return reason
        return None


class LayerNormIntoReaders(_NormIntoReaders):
    """The factor g and the shift s of a LayerNorm y = g * n(x) + s (Ba et al. 2016, arXiv 1607.06450, eq. 4) go into the linear
    layers that read y: W y + b = (W diag(g)) n(x) + (b + W s).

    Every reader of y has to be a linear layer with a weight of its own; y may be moved, sliced or averaged over tokens before.
    No runtime has fewer operators after it, and a later ``quantize`` loses the place where its factors would cost nothing, so it
    is applied only where it is named.
    """

    name = "layer_norm"
    default = False
    kind = "layer"


class RmsNormIntoReaders(_NormIntoReaders):
    """The factor g of an RMSNorm y = g * x / rms(x) (Zhang and Sennrich 2019, arXiv 1910.07467, eq. 4) goes into the linear
    layers that read y: W y = (W diag(g)) (x / rms(x)). One multiplication less for each norm.

    Every reader of y has to be a linear layer with a weight of its own; y may be moved, sliced or averaged over tokens before.
    """

    name = "rms_norm"
    kind = "rms"


def _norms(view: View) -> dict[int, str]:
    """The steps that give what a norm with weights gives, with its path; a cast of the norm's input is none."""
    steps = [view.flow.steps[index] for index, path in view.flow.norms.items() if path]
    casts = ("to", "_to_copy", "float")
    return {step.index: view.flow.norms[step.index] for step in steps if step.live and step.users and step.op not in casts}


def _last(view: View, index: int) -> int:
    return len(view.flow.steps[index].shape) - 1


def _unfit(view: View, reader: Reader) -> str | None:
    """Why a reader of a norm cannot take its weights."""
    flow = view.flow
    if reader.index not in flow.projections:
        return view.other_reader(reader.index)
    if flow.data(reader.index) != reader.source or reader.axis != len(flow.steps[reader.source].shape) - 1:
        return f"{flow.projections[reader.index].path} does not read its channels"
    return view.fixed(reader.index, ("linear", "conv1d"))


def _rewrite(view: View, path: str, norm: _Norm, reading: list[Reader]) -> Rewrite:
    model, layers = view.model, [view.flow.projections[reader.index].path for reader in reading]
    puts: dict[str, nn.Module] = {path: PlainNorm(norm.kind, norm.factor.shape[0], norm.eps)}
    for layer in layers:
        if norm.shift is not None and model.get_submodule(layer)._parameters.get("bias") is None:
            puts[layer] = linear_like(model.get_submodule(layer))

    def values() -> dict[str, dict[str, Tensor]]:
        current = _read(model.get_submodule(path))
        assert current is not None
        return {layer: folded_in(model.get_submodule(layer), current.factor, current.shift) for layer in layers}

    says = dict.fromkeys(layers, f"takes the weights of {path}")
    return Rewrite(path, {path: "loses its weights", **says}, values, puts)


def _read(module: nn.Module) -> _Norm | None:
    """What a module is if it is a norm with weights, found by trying it on random rows in float64."""
    weight = module._parameters.get("weight")
    if weight is None or weight.dim() != 1 or list(module.children()) or not weight.is_floating_point():
        return None
    trial = copy.deepcopy(module).double().eval()
    width, biased = weight.shape[0], module._parameters.get("bias") is not None
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(4, width, generator=generator, dtype=torch.float64) * torch.tensor([1, 3, 0.1, 0.01])[:, None] + 0.2
    rows = rows.to(weight.device)
    try:
        with torch.no_grad(), in_double():
            given: Any = trial(rows)
    except Exception:  # whatever a foreign forward raises on a plain row, it is no norm over its last axis
        return None
    if not isinstance(given, Tensor) or given.shape != rows.shape:
        return None
    kinds: tuple[Kind, ...] = ("layer", "rms")
    for kind in kinds:
        for eps in _small_numbers(module):
            norm = _fitted(kind, eps, rows, given, biased)
            if norm is not None:
                return norm
    return None


def _fitted(kind: Kind, eps: float, rows: Tensor, given: Tensor, biased: bool) -> _Norm | None:
    """Factor and shift that explain two rows, if they explain the others too."""
    plain = PlainNorm(kind, rows.shape[1], eps)(rows)
    factor = (given[0] - given[1]) / (plain[0] - plain[1]) if biased else given[0] / plain[0]
    shift = given[0] - factor * plain[0] if biased else torch.zeros_like(factor)
    error = (factor * plain + shift - given).abs().amax()
    if not bool(error <= 1e-7 * given.abs().amax()):  # the quotient of small differences loses digits
        return None
    return _Norm(kind, eps, factor, shift if biased else None)


def _small_numbers(module: nn.Module) -> list[float]:
    """Attributes that may be the norm's epsilon."""
    return list(dict.fromkeys(value for value in vars(module).values() if isinstance(value, float) and 0 < value < 0.01))
