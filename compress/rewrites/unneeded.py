"""What does nothing when a model runs, and what is there twice."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from compress.layers.plain import Identity
from compress.rewrites.rule import Found, Rewrite, Rule, View

__all__ = ["DropoutRemoved", "DuplicatesTied"]


class DropoutRemoved(Rule):
    """A module without weights or children that in eval mode gives back its very input, f(x) = x, becomes an identity.

    Seen by trying it on random values. Files have no such operators anyway, and a model that is trained later loses its dropout,
    so it is applied only where it is named.
    """

    name = "dropout"
    default = False
    reshapes = False

    def find(self, view: View) -> Found:
        found = Found()
        for path, module in view.model.named_modules():
            if not path or isinstance(module, nn.Identity) or not _is_identity(module):
                continue
            if reason := view.watched(path):
                found.left[path] = reason
            else:
                found.rewrites.append(Rewrite(path, {path: "does nothing, taken out"}, puts={path: Identity()}))
        return found


class DuplicatesTied(Rule):
    """Layers of the same class and settings whose weights are equal bit for bit become one module: f = g, stored once.

    Layers with a matrix only: vectors that are equal are usually so because nothing trained them.
    """

    name = "duplicates"
    reshapes = False

    def find(self, view: View) -> Found:
        found = Found()
        first: list[tuple[str, nn.Module]] = []
        for path, module in _matrices(view.model):
            twin = next((other for other, known in first if _equal(known, module)), None)
            if twin is None:
                first.append((path, module))
            elif reason := view.tied(path) or view.watched(path) or view.watched(twin):
                found.left[path] = reason
            else:
                found.rewrites.append(Rewrite(path, {path: f"becomes {twin}, which equals it"}, shares=((path, twin),)))
        return found


def _is_identity(module: nn.Module) -> bool:
    if any(module.children()) or any(True for _ in (*module.parameters(), *module.buffers())):
        return False
    x = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    try:
        with torch.no_grad():
            given = copy.deepcopy(module).eval()(x)
    except Exception:  # a module that takes something else
        return False
    return isinstance(given, Tensor) and torch.equal(given, x)


def _matrices(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for path, module in model.named_modules():
        own = [parameter for parameter in module._parameters.values() if parameter is not None]
        if path and not list(module.children()) and any(parameter.dim() > 1 for parameter in own):
            yield path, module


def _equal(one: nn.Module, other: nn.Module) -> bool:
    """Whether two layers compute the same and do not share everything already."""
    if type(one) is not type(other) or one.extra_repr() != other.extra_repr():
        return False
    mine, theirs = ({**module._parameters, **module._buffers} for module in (one, other))
    equal = mine.keys() == theirs.keys() and all(_same(mine[name], theirs[name]) for name in mine)
    return equal and any(mine[name] is not theirs[name] for name in mine)


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return one is other or (one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other))
