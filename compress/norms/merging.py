"""Factors and constants of channels moved into the linear layers that read them.

``W (a x + b) + c = (W diag(a)) x + (c + W b)``. Whether a layer is the only reader is not read from a table of architectures: it
is tried with random factors and constants, and taken only if the model's output stays.
Shapes: O outputs, I inputs, C channels.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from calibrate.fidelity import sqnr_db
from calibrate.modes import evaluating
from calibrate.signature import Batch
from compress.anatomy import Anatomy
from compress.layers import ChannelAffine, Identity
from compress.rewrites.rule import folded_in
from compress.surgery import Surgery

__all__ = ["candidates", "merge", "readers"]

_ATTENTION = {"attention.query", "attention.key", "attention.value"}
_MLP = {"mlp.up", "mlp.gate"}
_SAME_DB = 80.0
"""What float32 leaves of the same function computed in another order; a reader that was missed leaves a few dB."""


def candidates(anatomy: Anatomy, path: str) -> list[list[str]]:
    """Linear layers that may read what the norm at a path gives, by way of windows or of a selection: projections of attention
    or the first of the MLP in its block, outside of blocks the head."""
    block = next((site.block for site in anatomy.sites if site.path == path), None)
    beside = [site for site in anatomy.sites if site.block == block and site.kind == "linear"]
    wanted = [_ATTENTION, _MLP] if block is not None else [{"head"}]
    return [[site.path for site in beside if roles & set(site.roles)] for roles in wanted]


def merge(
    model: nn.Module,
    surgery: Surgery,
    path: str,
    call: Callable[[nn.Module, Batch], Tensor],
    row: Batch,
    others: Sequence[Sequence[str]] = (),
) -> list[str]:
    """Folds the ``ChannelAffine`` at a path into what reads it, and leaves the identity there.

    Args:
        row: one row, to try it with.
        others: see ``candidates``; what receives the very tensor is tried first.

    Returns:
        The layers that took it; none: it stays, because something else reads it too.
    """
    for chosen in (readers(model, path, call, row), *map(list, others)):
        if chosen and all(_suits(model, one, path) for one in chosen) and _holds(model, path, call, row, chosen):
            layer = _affine(model, path)
            _fold(model, chosen, layer.weight, layer.bias)
            surgery.replace(model, path, Identity())
            return chosen
    return []


def readers(model: nn.Module, path: str, call: Callable[[nn.Module, Batch], Tensor], row: Batch) -> list[str]:
    """Modules without children that are given the very tensor that the module at a path returns, in the order of their calls."""
    made: list[weakref.ref[Tensor]] = []
    found: dict[str, None] = {}

    def after(module: nn.Module, args: object, output: object) -> None:
        if isinstance(output, Tensor):
            made.append(weakref.ref(output))

    def before(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[object, ...]) -> None:
            if args and any(one() is args[0] for one in made):
                found[name] = None

        return hook

    leaves = [name for name, module in model.named_modules() if name != path and not list(module.children())]
    handles = [model.get_submodule(path).register_forward_hook(after)]
    handles += [model.get_submodule(name).register_forward_pre_hook(before(name)) for name in leaves]
    try:
        with torch.no_grad(), evaluating(model):
            call(model, row)
    finally:
        for handle in handles:
            handle.remove()
    return list(found)


def _affine(model: nn.Module, path: str) -> ChannelAffine:
    layer = model.get_submodule(path)
    assert isinstance(layer, ChannelAffine)
    return layer


def _suits(model: nn.Module, reader: str, path: str) -> bool:
    """Whether it is a linear layer of float weights with a bias, of as many inputs, whose weight is nobody else's."""
    module = model.get_submodule(reader)
    weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
    if not isinstance(module, nn.Linear) or weight is None or bias is None or weight.shape[1] != _affine(model, path).channels:
        return False
    held = [own for other in model.modules() for own in other._parameters.values()]
    return all(sum(own is one for own in held) == 1 for one in (weight, bias))


def _fold(model: nn.Module, chosen: Sequence[str], factor: Tensor, constant: Tensor) -> None:
    """Parameters are replaced, not written to: a copy of the model that shares them keeps its own."""
    for reader in chosen:
        module = model.get_submodule(reader)
        for name, tensor in folded_in(module, factor, constant).items():
            old = module.get_parameter(name)
            setattr(module, name, nn.Parameter(tensor, requires_grad=old.requires_grad))


def _holds(model: nn.Module, path: str, call: Callable[[nn.Module, Batch], Tensor], row: Batch, chosen: list[str]) -> bool:
    """Whether the output stays when random factors and constants are folded."""
    layer = _affine(model, path)
    generator = torch.Generator().manual_seed(0)
    factor = torch.randint(-2, 3, (layer.channels,), generator=generator).float().exp2()
    constant = torch.randn(layer.channels, generator=generator)
    touched = [layer, *map(model.get_submodule, chosen)]
    kept = [dict(module._parameters) for module in touched]
    try:
        with torch.no_grad(), evaluating(model):
            layer.weight, layer.bias = (nn.Parameter(one, requires_grad=False) for one in (factor, constant))
            before = call(model, row).float()
            _fold(model, chosen, factor, constant)
            layer.weight, layer.bias = (nn.Parameter(one, requires_grad=False) for one in (factor * 0 + 1, constant * 0))
            after = call(model, row).float()
    finally:
        for module, parameters in zip(touched, kept, strict=True):
            for name, parameter in parameters.items():
                module._parameters[name] = parameter
    return bool(after.isfinite().all()) and (torch.equal(before, after) or sqnr_db(before, after) >= _SAME_DB)
