"""A model run in float64, whatever its code asks for: so that a rewrite is judged by its algebra and not by rounding."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from calibrate.modes import evaluating
from calibrate.signature import Batch, Signature

__all__ = ["difference", "doubled", "in_double", "output", "single_output"]

_PLAIN = ("compress.layers.plain", "compress.layers.packed")


class _Double(TorchFunctionMode):
    """float32 named anywhere becomes float64: norms and softmax of many libraries compute in float32 by name."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.float:
            func = Tensor.double
        given = tuple(_wide(argument) for argument in args)
        return func(*given, **{name: _wide(value) for name, value in (kwargs or {}).items()})


def _wide(argument: Any) -> Any:
    return torch.float64 if isinstance(argument, torch.dtype) and argument == torch.float32 else argument


@contextmanager
def in_double() -> Iterator[None]:
    """Torch functions that are called meanwhile, in this thread, compute in float64 where they would in float32."""
    kept = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _Double():
            yield
    finally:
        torch.set_default_dtype(kept)


@contextmanager
def doubled(model: nn.Module) -> Iterator[nn.Module]:
    """The model with its parameters and buffers in float64; those that nothing replaced meanwhile are the very same after, and
    what came in has the model's own type. Copies that share tensors keep theirs. Compressed layers compute in their own types,
    between float64."""
    closed = _compressed_layers(model)
    inside = {id(module) for layer in closed for module in layer.modules()}
    usual = next((parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()), torch.float32)
    cached, originals = _cached(model), _Originals()
    _convert(model, inside, originals.widen)
    handles = [handle for layer in closed for handle in _InOwnTypes().watch(layer)]
    try:
        yield model
    finally:
        for handle in handles:
            handle.remove()
        _convert(model, inside, lambda tensor: originals.narrow(tensor, usual))
        for module, name, kept in cached:
            setattr(module, name, kept)


class _Originals:
    """Tensors in float64 for those of a model, and back; what is one stays one."""

    def __init__(self) -> None:
        self.wide: dict[int, Tensor] = {}
        self.own: dict[int, Tensor] = {}
        self.alive: list[Tensor] = []

    def widen(self, tensor: Tensor) -> Tensor:
        if id(tensor) not in self.wide:
            made = _like(tensor, torch.float64)
            self.wide[id(tensor)], self.own[id(made)] = made, tensor
            self.alive.append(made)
        return self.wide[id(tensor)]

    def narrow(self, tensor: Tensor, usual: torch.dtype) -> Tensor:
        if id(tensor) not in self.own:
            self.own[id(tensor)] = _like(tensor, usual)
            self.alive.append(tensor)
        return self.own[id(tensor)]


def _like(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    values = tensor.detach().to(dtype)
    return nn.Parameter(values, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else values


def _compressed_layers(model: nn.Module) -> list[nn.Module]:
    """The layers that passes left in a model and that compute in types of their own, those inside others left out."""
    found: list[nn.Module] = []
    inside: set[nn.Module] = set()
    for module in model.modules():
        home = type(module).__module__
        if module not in inside and home.startswith("compress.layers.") and home not in _PLAIN and _stores(module):
            found.append(module)
            inside.update(module.modules())
    return found


def output(model: nn.Module, signature: Signature, batch: Batch) -> Tensor:
    """The output of a model that is in float64, for a batch; what the model draws at random is the same each time."""
    wide = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in batch.items()}
    with torch.random.fork_rng(devices=[]), evaluating(model), in_double():
        torch.manual_seed(0)
        return signature.call(model, wide).clone()


def single_output(model: nn.Module, signature: Signature, batch: Batch) -> Tensor:
    """The output of a model as it is, for a batch; what the model draws at random is the same each time."""
    with torch.random.fork_rng(devices=[]), evaluating(model):
        torch.manual_seed(0)
        return signature.call(model, batch).clone()


def difference(before: Tensor, after: Tensor) -> float:
    """The largest difference, relative to the largest value; infinite where one is not finite and the other is."""
    if before.shape != after.shape or not torch.equal(before.isfinite(), after.isfinite()):
        return float("inf")
    finite = before.isfinite()
    scale = before.detach()[finite].abs().amax() if bool(finite.any()) else before.new_ones(())
    return float((before - after).detach()[finite].abs().amax() / scale.clamp(min=1e-300)) if bool(finite.any()) else 0.0


def _stores(module: nn.Module) -> bool:
    return any(True for _ in module.parameters()) or any(True for _ in module.buffers())


def _cached(model: nn.Module) -> list[tuple[nn.Module, str, dict[Any, Any]]]:
    """Mappings in which modules keep tensors for later calls (LeViT's biases), with a copy of what is in them now."""
    own = ("_parameters", "_buffers", "_modules")
    return [
        (module, name, dict(value))
        for module in model.modules()
        for name, value in vars(module).items()
        if name not in own
        and "hooks" not in name
        and type(value) is dict
        and all(isinstance(entry, Tensor) for entry in value.values())
    ]


def _convert(model: nn.Module, inside: set[int], change: Callable[[Tensor], Tensor]) -> None:
    for module in model.modules():
        if id(module) not in inside:
            held: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
            for tensors in held:
                for name, tensor in tensors.items():
                    if tensor is not None and tensor.is_floating_point():
                        tensors[name] = change(tensor)


class _InOwnTypes:
    """While a compressed layer runs, float32 means float32 and it is given nothing wider; what it gives is made float64."""

    def __init__(self) -> None:
        self.guards: list[Any] = []

    def watch(self, layer: nn.Module) -> list[RemovableHandle]:
        """What takes it off again."""
        return [
            layer.register_forward_pre_hook(self._before, with_kwargs=True),
            layer.register_forward_hook(self._after, always_call=True),
        ]

    def _before(self, module: nn.Module, args: Any, kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        self.guards.append(torch._C.DisableTorchFunction())
        self.guards[-1].__enter__()
        torch.set_default_dtype(torch.float32)
        return tuple(_short(value) for value in args), {name: _short(value) for name, value in kwargs.items()}

    def _after(self, module: nn.Module, args: Any, result: Any) -> Any:
        wide = result.double() if isinstance(result, Tensor) and result.dtype == torch.float32 else result
        torch.set_default_dtype(torch.float64)
        self.guards.pop().__exit__(None, None, None)
        return wide


def _short(value: Any) -> Any:
    return value.to(torch.float32) if isinstance(value, Tensor) and value.dtype == torch.float64 else value
