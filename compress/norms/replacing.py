"""Which normalisations of a model can become affine functions of their channels, and what they are exchanged for meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from calibrate.fidelity import sqnr_db
from calibrate.modes import evaluating
from calibrate.signature import Batch
from compress.layers import FadedActivation, LinearAttention
from compress.norms.rep_norm import Moments, RepNorm
from compress.surgery import parent_of

__all__ = ["NormExchange", "Other", "obstacles", "own_parameters"]

Other = LinearAttention | FadedActivation
"""What is exchanged in step with norms."""

_SAME_DB = 30.0
"""Of a norm's output for its input and for 16 times that: what the constant under its root leaves of it."""
_SETTLING = 32
"""Most batches that statistics are taken from."""


def obstacles(model: nn.Module, call: Callable[[nn.Module, Batch], Tensor], batch: Batch, paths: Sequence[str]) -> dict[str, str]:
    """Why norms cannot be replaced, by path: tried on a batch, not read from their classes.

    A norm that can be runs once, works on each position of the last axis alone, and takes out the scale of what it gets.
    """
    calls: dict[str, list[tuple[Tensor, Tensor]]] = {path: [] for path in paths}

    def after(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if args and isinstance(args[0], Tensor) and isinstance(output, Tensor):
                calls[path].append((args[0].detach(), output.detach()))

        return hook

    handles = [model.get_submodule(path).register_forward_hook(after(path)) for path in paths]
    try:
        with torch.no_grad(), evaluating(model):
            call(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    found = {path: _obstacle(model.get_submodule(path), calls[path]) for path in paths}
    return {path: reason for path, reason in found.items() if reason}


def _obstacle(module: nn.Module, calls: list[tuple[Tensor, Tensor]]) -> str:
    if not calls:
        return "it does not run, or not as a module of one tensor"
    if len(calls) > 1:
        return f"it runs {len(calls)} times, each time on other numbers"
    (x, y) = calls[0]
    if x.shape != y.shape or x.dim() < 2:
        return f"it makes {list(y.shape)} of {list(x.shape)}"
    with torch.no_grad(), evaluating(module):
        try:
            alone = module(x.reshape(-1, 1, x.shape[-1])[:8]).reshape(-1, x.shape[-1])
            larger = module(x * 16)
        except Exception:  # whatever a foreign forward raises
            return "it does not work on positions one by one"
    if alone.shape[0] and not bool(y.reshape(-1, x.shape[-1])[: len(alone)].isclose(alone, rtol=1e-3, atol=1e-4).all()):
        return "its channels are not the last axis, or positions are normalised together"
    if sqnr_db(y, larger) < _SAME_DB:
        return "it does not take out the scale of its input: it is no normalisation by position"
    return ""


@dataclass
class NormExchange:
    """Norms that are being exchanged for ``RepNorm``.

    Attributes:
        parts: by path.
        others: what is exchanged in step with them.
        done: paths of norms whose share stays 0.
        done_others: of the others, those whose share does.
    """

    parts: Mapping[str, RepNorm]
    others: Sequence[Other] = ()
    done: frozenset[str] = frozenset()
    done_others: Sequence[Other] = ()

    @classmethod
    def of(
        cls,
        model: nn.Module,
        paths: Mapping[str, int],
        batches: Sequence[Batch],
        call: Callable[[Batch], Any],
        others: Sequence[Other] = (),
        fixed: bool = False,
    ) -> NormExchange:
        """Puts a ``RepNorm`` around each norm, fitted to what it gives on these rows; ``paths`` with their channels."""
        moments = {path: Moments(channels) for path, channels in paths.items()}

        def after(path: str) -> Callable[..., None]:
            return lambda module, args, output: moments[path].add(args[0], output)

        handles = [model.get_submodule(path).register_forward_hook(after(path)) for path in paths]
        try:
            with torch.no_grad(), evaluating(model):
                for batch in batches[:_SETTLING]:
                    call(batch)
        finally:
            for handle in handles:
                handle.remove()
        parts = {}
        for path, channels in paths.items():
            parent, name = parent_of(model, path)
            parts[path] = RepNorm(model.get_submodule(path), channels, fixed)
            parts[path].fit(moments[path])
            parts[path].train(parent.training)
            setattr(parent, name, parts[path])
        return cls(parts, others)

    def set(self, share: float, learning: bool) -> None:
        for path, part in self.parts.items():
            part.share, part.learning = 0.0 if path in self.done else share, learning
        for other in self.others:
            other.share, other.learning = 0.0 if any(other is one for one in self.done_others) else share, learning

    def settle(self, batches: list[Batch], call: Callable[[Batch], Any]) -> None:
        """Of the norms that run."""
        learning = [part for part in self.parts.values() if not part.fixed]
        self.set(0.0, True)
        for part in learning:
            part.collect()
        for batch in batches[:_SETTLING] if learning else ():
            call(batch)
        for part in learning:
            part.settle()
        self.set(0.0, False)


def own_parameters(model: nn.Module) -> None:
    """Gives a model copies of its floating-point parameters, so that others which share them keep theirs; tied ones stay tied."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, old in module._parameters.items():
            if old is not None and old.is_floating_point():
                new = made.setdefault(id(old), nn.Parameter(old.detach().clone(), requires_grad=old.requires_grad))
                module._parameters[name] = new
