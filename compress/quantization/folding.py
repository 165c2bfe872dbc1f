"""Factors of a layer's input channels moved into the layer that makes the input, where nothing else reads it.

A factor that is folded costs nothing when the model runs. Whether it can be is not read from a table of architectures: each
place that the anatomy suggests is tried on a row with random powers of two, and taken only if the model's output stays.
Shapes: O outputs, I inputs, C channels.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from calibrate.fidelity import sqnr_db
from calibrate.modes import evaluating
from calibrate.signature import Batch
from compress.anatomy import Anatomy, Site

if TYPE_CHECKING:
    from compress.passes.contract import Context

__all__ = ["Fold", "folds"]

_SAME_DB = 110.0
"""Powers of two commute with rounding: a fold that holds changes no bit but where a kernel sums in another order."""

_SHIFTED_DB = 70.0
"""With shifts sums are rounded elsewhere."""


@dataclass(frozen=True)
class Fold:
    """``consumers`` read a tensor whose channels are the last ``channels`` outputs of ``producer``, and nothing else does."""

    producer: str
    consumers: tuple[str, ...]
    channels: int

    def apply(self, model: nn.Module, factor: Tensor, shift: Tensor | None = None) -> None:
        """Multiplies what the producer gives by the factor [C], and divides the consumers' columns by it.

        With a ``shift`` [C], which is added after the factor, the biases take it up; all of them have one then.
        Parameters are replaced, not written to: a copy of the model that shares them keeps its own.
        """
        maker = model.get_submodule(self.producer)
        for name in ("weight", "bias"):
            if getattr(maker, name, None) is not None:
                _replace(maker, name, lambda old: _scaled_rows(old, factor, self.channels))
        for path in self.consumers:
            consumer = model.get_submodule(path)
            _replace(consumer, "weight", lambda old: _divided(old, factor))
            if shift is not None:
                weight = consumer.get_parameter("weight").detach()
                _add(consumer, -(weight.double() @ shift.to(weight.device, torch.float64)))
        if shift is not None:
            _add(maker, shift)


def folds(model: nn.Module, context: Context, groups: Sequence[Sequence[Site]], *, shifted: bool = False) -> dict[str, Fold]:
    """For the first site of each group of layers that read one tensor: where its factors can go, if anywhere.

    With ``shifted`` only into norms with a bias in front of layers with a bias, where a shift can go with them. Groups of linear
    layers only. Costs one row through the model for each place that is tried.
    """
    first = next(iter(context.calibration()), None)
    if first is None:
        return {}
    row = {name: tensor[:1] for name, tensor in first.items()}
    wanted = [tuple(group) for group in groups if all(site.kind == "linear" for site in group)]
    makers = _norms(model, context, row, {group[0].path for group in wanted})
    found = {}
    for group in wanted:
        leader = group[0]
        width = leader.shape[1]
        for producer in (makers.get(leader.path), *(() if shifted else _values(context.anatomy, leader))):
            if producer is None or not _suits(model, producer, width, group, shifted):
                continue
            fold = Fold(producer, tuple(site.path for site in group), width)
            if _holds(model, context, row, fold, shifted):
                found[leader.path] = fold
                break
    return found


def _norms(model: nn.Module, context: Context, row: Batch, readers: set[str]) -> dict[str, str]:
    """The norm whose very output each reader receives, by the reader's path."""
    made: dict[int, tuple[weakref.ref[Tensor], str]] = {}
    found: dict[str, str] = {}

    def after(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: object, output: object) -> None:
            if isinstance(output, Tensor):
                made[id(output)] = (weakref.ref(output), path)

        return hook

    def before(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[object, ...]) -> None:
            known = made.get(id(args[0])) if args else None
            if known is not None and known[0]() is args[0]:
                found[path] = known[1]

        return hook

    norms = [site.path for site in context.anatomy.sites if site.kind == "norm"]
    handles = [model.get_submodule(path).register_forward_hook(after(path)) for path in norms]
    handles += [model.get_submodule(path).register_forward_pre_hook(before(path)) for path in readers]
    try:
        with evaluating(model):
            context.call(model, row)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _values(anatomy: Anatomy, reader: Site) -> list[str]:
    """Layers of the same block whose outputs reach the reader channel by channel: values, and what a gate is multiplied by."""
    role = {"attention.out": "attention.value", "mlp.down": "mlp.up"}
    wanted = {role[own] for own in reader.roles if own in role}
    inside = [site for site in anatomy.sites if site.block is not None and site.block == reader.block]
    return [site.path for site in inside if site.kind == "linear" and wanted & set(site.roles)]


def _suits(model: nn.Module, producer: str, width: int, group: Sequence[Site], shifted: bool) -> bool:
    """Whether the producer has parameters of its own, with at least ``width`` outputs, and the readers have theirs."""
    holders: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                holders[id(parameter)] = holders.get(id(parameter), 0) + 1
    modules = [model.get_submodule(path) for path in (producer, *(site.path for site in group))]
    own = [module._parameters.get("weight") for module in modules]
    own += [module._parameters.get("bias") for module in modules if shifted]
    if any(weight is None or not weight.is_floating_point() or holders[id(weight)] > 1 for weight in own):
        return False
    assert own[0] is not None
    return own[0].shape[0] >= width and not {producer} & {site.path for site in group}


def _holds(model: nn.Module, context: Context, row: Batch, fold: Fold, shifted: bool) -> bool:
    """Whether the model's output stays when random powers of two are folded, and random numbers of about 1 with them."""
    generator = torch.Generator().manual_seed(context.seed)
    weight = model.get_submodule(fold.producer).get_parameter("weight")
    factor = torch.randint(-4, 5, (fold.channels,), generator=generator).float().exp2().to(weight)
    shift = torch.randn(fold.channels, generator=generator).to(weight) if shifted else None
    touched = [model.get_submodule(path) for path in (fold.producer, *fold.consumers)]
    kept = [dict(module._parameters) for module in touched]
    with evaluating(model):
        before = context.call(model, row).float()
    try:
        fold.apply(model, factor, shift)
        with evaluating(model):
            after = context.call(model, row).float()
    except RuntimeError:  # shapes that do not meet: this is not the layer's producer
        return False
    finally:
        for module, parameters in zip(touched, kept, strict=True):
            for name, parameter in parameters.items():
                module._parameters[name] = parameter
    return not bool((after.isnan() | before.isnan()).any()) and _db(before, after) >= (_SHIFTED_DB if shifted else _SAME_DB)


def _db(before: Tensor, after: Tensor) -> float:
    return math.inf if torch.equal(before, after) else sqnr_db(before, after)


def _replace(module: nn.Module, name: str, change: Callable[[Tensor], Tensor]) -> None:
    old = module.get_parameter(name)
    setattr(module, name, nn.Parameter(change(old.detach()), requires_grad=old.requires_grad))


def _add(module: nn.Module, shift: Tensor) -> None:
    _replace(module, "bias", lambda old: (old.double() + shift.to(old.device, torch.float64)).to(old))


def _divided(old: Tensor, factor: Tensor) -> Tensor:
    wide = torch.promote_types(old.dtype, factor.dtype)
    return (old.to(wide) / factor.to(old.device, wide)).to(old.dtype)


def _scaled_rows(old: Tensor, factor: Tensor, channels: int) -> Tensor:
    """The last ``channels`` rows of a weight [O, I] or of a vector [O], each times its factor."""
    new = old.clone()
    part = factor.to(old)
    new[-channels:] *= part if old.dim() == 1 else part.unsqueeze(1)
    return new
