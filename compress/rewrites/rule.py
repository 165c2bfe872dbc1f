"""What a rule is: it looks at a traced model and says which places it matches, and why others not."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from calibrate.signature import Batch, Signature
from compress.anatomy.finding import flow_of
from compress.anatomy.flow import Flow, Weight
from compress.layers.conversion import is_conv1d, obstacle
from compress.layers.plain import Conv2d, Linear
from compress.surgery import Surgery

__all__ = ["Found", "Rewrite", "Rule", "View", "axis_of", "conv_like", "folded_in", "folded_out", "linear_like"]

Values = dict[str, dict[str, Tensor]]
"""Parameters and buffers by module path and name."""


@dataclass(frozen=True)
class Rewrite:
    """One place that a rule rewrites.

    Attributes:
        site: the module path that stands for it in the report.
        touches: what becomes of each module that changes, by path.
        values: computes the new tensors from the modules as they are; called before anything is put in.
        puts: layers of ``compress.layers`` that replace modules, on the ``meta`` device.
        merges: modules that become a sequence of a layer (or None) and of those of their children that are named.
        shares: (path, path of the module that it becomes).
        sets: (path, attribute, value).
    """

    site: str
    touches: Mapping[str, str]
    values: Callable[[], Values] = dict
    puts: Mapping[str, nn.Module] = field(default_factory=dict)
    merges: Mapping[str, tuple[nn.Module | None, list[str]]] = field(default_factory=dict)
    shares: tuple[tuple[str, str], ...] = ()
    sets: tuple[tuple[str, str, Any], ...] = ()

    def apply(self, model: nn.Module, surgery: Surgery, rehearsed: bool = False) -> Callable[[], None]:
        """Rewrites the place and returns what takes it back; ``rehearsed``: shapes only, the new layers mean nothing."""
        from compress.passes.contract import blank

        values = {} if rehearsed else self.values()
        count, undo = len(surgery.edits), [_keeper(model, path) for path in (*self.puts, *self.merges)]
        undo += [_keeper(model, path) for path, _ in self.shares if not self._new(path)]
        undo += [_parameters_keeper(model.get_submodule(path)) for path in values if not self._new(path)]
        undo += [_attribute_keeper(model.get_submodule(path), name) for path, name, _ in self.sets]
        for path, layer in self.puts.items():
            surgery.replace(model, path, blank(layer, len(surgery.edits)) if rehearsed else layer)
        for path, (merged, then) in self.merges.items():
            surgery.merge(model, path, blank(merged, len(surgery.edits)) if rehearsed and merged is not None else merged, then)
        for path, other in self.shares:
            surgery.share(model, path, other)
        for path, name, value in self.sets:
            surgery.set(model, path, name, value)
        for path, tensors in values.items():
            _store(model.get_submodule(path), tensors)

        def back() -> None:
            for one in reversed(undo):
                one()
            del surgery.edits[count:]

        return back

    def _new(self, path: str) -> bool:
        return any(path == put or path.startswith(put + ".") for put in (*self.puts, *self.merges))


@dataclass
class Found:
    """What a rule found in a model: the places, and those that look alike and why it leaves them."""

    rewrites: list[Rewrite] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)


class View:
    """A model with its traced graph, and what rules ask of both."""

    def __init__(self, model: nn.Module, signature: Signature, example: Batch) -> None:
        self.model = model
        self.flow: Flow = flow_of(model, signature, example)

    @cached_property
    def calls(self) -> dict[str, list[int]]:
        """Steps of each layer with a weight, by module path."""
        found: dict[str, list[int]] = {}
        for index, weight in self.flow.projections.items():
            if self.flow.steps[index].live:
                found.setdefault(weight.path, []).append(index)
        return found

    @cached_property
    def holders(self) -> dict[int, list[str]]:
        """Paths of the modules that hold each parameter."""
        found: dict[int, list[str]] = {}
        for path, module in self.model.named_modules(remove_duplicate=False):
            for parameter in module._parameters.values():
                if parameter is not None:
                    found.setdefault(id(parameter), []).append(path)
        return found

    def forget(self) -> None:
        """Modules were replaced that the graph does not tell apart: what is known of their parameters is looked up again."""
        self.__dict__.pop("holders", None)

    def tied(self, path: str) -> str | None:
        """Why a module's parameters are not its own, or None."""
        for parameter in self.model.get_submodule(path)._parameters.values():
            others = [other for other in self.holders.get(id(parameter), []) if other != path] if parameter is not None else []
            if others:
                return f"it shares its weights with {others[0]}"
        return None

    def fixed(self, index: int, kinds: tuple[str, ...] = ("linear", "conv1d", "conv2d"), calls: int | None = 1) -> str | None:
        """Why the weight of a projection cannot be changed, or None. Quantized and other compressed layers never are."""
        weight: Weight = self.flow.projections[index]
        if not weight.whole:
            return f"{weight.path} is a parameter of its own, not a layer"
        module = self.model.get_submodule(weight.path)
        if _compressed(module):
            return f"{weight.path} is compressed already ({type(module).__name__})"
        if weight.kind not in kinds:
            return f"{weight.path} is a {type(module).__name__}"
        reason = obstacle(self.model, weight.path, weight.kind) or self.tied(weight.path)
        if reason:
            return f"{weight.path}: {reason}"
        times = len(self.calls.get(weight.path, []))
        if calls is not None and times != calls:
            return f"{weight.path} is called {times} times"
        return self.watched(weight.path)

    def other_reader(self, index: int) -> str:
        """Who a step that is no projection belongs to, as the reason why what it reads cannot change."""
        step = self.flow.steps[index]
        if step.op == "output":
            return "the model's output reads it"
        parts = step.path.split(".")
        for end in range(1, len(parts) + 1):
            module = self.model.get_submodule(path := ".".join(parts[:end]))
            if _compressed(module):
                return f"{path}, which reads it, is compressed already ({type(module).__name__})"
        return f"{step.op} in {step.path} reads it too" if step.path else f"{step.op} reads it too"

    def watched(self, path: str) -> str | None:
        """Why a module that something acts on must stay, or None."""
        module = self.model.get_submodule(path)
        return f"{path}: a layer is attached to it" if module._forward_hooks or module._forward_pre_hooks else None


class Rule(ABC):
    """One exact rewrite. The docstring is its algebra.

    ``default``: whether it is applied where no rules are named. ``reshapes``: whether the graph has to be traced again after it.
    """

    name: ClassVar[str]
    default: ClassVar[bool] = True
    reshapes: ClassVar[bool] = True

    @abstractmethod
    def find(self, view: View) -> Found:
        """The places that the rule rewrites; the model is not changed."""

    def holds(self, view: View, rewrite: Rewrite) -> str | None:
        """Why a place has to be taken back that only the graph after it can tell, or None."""
        return None


def axis_of(view: View, index: int) -> int:
    """The axis of a projection's output channels."""
    return 1 if view.flow.projections[index].kind == "conv2d" else len(view.flow.steps[index].shape) - 1


def linear_like(module: nn.Module, outputs: int | None = None, inputs: int | None = None, bias: bool = True) -> Linear:
    """A linear layer on the ``meta`` device with the sizes of a linear layer or Conv1D, but for those given."""
    rows, columns = module.get_parameter("weight").shape
    if is_conv1d(module):
        rows, columns = columns, rows
    with torch.device("meta"):
        layer = Linear(inputs or columns, outputs or rows, bias)
    layer.requires_grad_(False)
    return layer


def conv_like(module: Any, bias: bool = True, **changes: Any) -> Conv2d:
    """A convolution on the ``meta`` device with the geometry of another, but for the changes (names of ``torch.nn.Conv2d``)."""
    weight = module.weight
    geometry = {
        "in_channels": weight.shape[1] * module.groups, "out_channels": weight.shape[0], "kernel_size": tuple(weight.shape[2:]),
        "stride": module.stride, "padding": module.padding, "dilation": module.dilation, "groups": module.groups,
    }  # fmt: skip
    with torch.device("meta"):
        layer = Conv2d(**(geometry | changes), bias=bias)
    layer.requires_grad_(False)
    return layer


def folded_out(module: nn.Module, factor: Tensor, shift: Tensor | None) -> dict[str, Tensor]:
    """The tensors of a projection whose outputs [O] are multiplied by a factor and shifted: a (W x + b) + s."""
    weight, bias = module.get_parameter("weight").detach(), module._parameters.get("bias")
    rows = factor.to(weight) if is_conv1d(module) else factor.to(weight).reshape(-1, *[1] * (weight.dim() - 1))
    made = {"weight": weight * rows}
    moved = None if bias is None else bias.detach() * factor.to(bias)
    if shift is not None:
        moved = shift.to(weight) if moved is None else moved + shift.to(moved)
    return made if moved is None else made | {"bias": moved}


def folded_in(module: Any, factor: Tensor, shift: Tensor | None) -> dict[str, Tensor]:
    """The tensors of a projection whose inputs [I] are multiplied by a factor and shifted, in float64: W (a x + s) + b."""
    weight, bias = module.get_parameter("weight").detach(), module._parameters.get("bias")
    wide, factor = weight.double(), factor.to(weight.device, torch.float64)
    shift = None if shift is None else shift.to(weight.device, torch.float64)
    if is_conv1d(module):
        made, added = wide * factor[:, None], None if shift is None else shift @ wide
    elif weight.dim() == 2:
        made, added = wide * factor, None if shift is None else wide @ shift
    else:
        groups, each = module.groups, weight.shape[0] // module.groups
        mine = torch.arange(groups, device=weight.device).repeat_interleave(each)
        made = wide * factor.reshape(groups, -1)[mine][:, :, None, None]
        added = None if shift is None else (wide.sum((2, 3)) * shift.reshape(groups, -1)[mine]).sum(1)
    if added is not None and bias is not None:
        added = added + bias.detach()
    return {"weight": made.to(weight)} | ({} if added is None else {"bias": added.to(weight)})


def _compressed(module: nn.Module) -> bool:
    home = type(module).__module__
    return home.startswith("compress.layers.") and home not in ("compress.layers.plain", "compress.layers.packed")


def _store(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Parameters are replaced, not written to: a copy of the model that shares them keeps its own."""
    for name, tensor in tensors.items():
        old = module._parameters.get(name)
        if name in module._buffers:
            module._buffers[name] = tensor
        else:
            setattr(module, name, nn.Parameter(tensor.contiguous(), requires_grad=old is not None and old.requires_grad))


def _keeper(model: nn.Module, path: str) -> Callable[[], None]:
    holder, _, name = path.rpartition(".")
    parent, child = model.get_submodule(holder), model.get_submodule(path)
    return lambda: setattr(parent, name, child)


def _parameters_keeper(module: nn.Module) -> Callable[[], None]:
    kept = dict(module._parameters)
    return lambda: module._parameters.update(kept)


def _attribute_keeper(module: nn.Module, name: str) -> Callable[[], None]:
    kept = getattr(module, name)
    return lambda: setattr(module, name, kept)
