"""Layers that learn what to take over from a block that goes: they stand in the place of linear layers while they are trained,
and are folded into them at the end."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from calibrate.capture import counted
from calibrate.modes import evaluating
from calibrate.signature import Batch
from compress.algorithms.grafting import grafted, started
from compress.algorithms.similarity import Sums
from compress.anatomy import Block
from compress.layers.conversion import is_conv1d, obstacle
from compress.surgery import parent_of
from compress.width.restart import Restart, first_tensor

__all__ = ["Graft", "Pair", "grafting", "influences", "neighbours", "pairs", "passing"]

Call = Callable[[nn.Module, Batch], Tensor]

BASE = ("base_out", "base_in")
COEFFICIENTS = ("coefficient_out", "coefficient_in", "coefficient_bias")


class Graft(nn.Module):
    """A linear layer, or GPT-2's ``Conv1D``, whose weight is W + B A + (C1 C2) * W_out, and whose bias is b + c * b_out.

    It computes with the layer's own ``forward``, so that at first it gives the very same numbers.
    """

    def __init__(self, own: nn.Module, other: nn.Module, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        self._layers = (own, other)  # a tuple: their parameters are not this module's
        self.turned = is_conv1d(own)
        outputs, inputs = self._matrix(own).shape
        rank = min(rank, outputs, inputs)
        like = self._matrix(own)
        for names in (BASE, COEFFICIENTS[:2]):
            for name, value in zip(names, started(outputs, inputs, rank, generator), strict=True):
                self.register_parameter(name, nn.Parameter(value.to(like)))
        both = all(getattr(layer, "bias", None) is not None for layer in self._layers)
        self.register_parameter("coefficient_bias", nn.Parameter(torch.zeros(outputs).to(like)) if both else None)

    def _matrix(self, layer: nn.Module) -> Tensor:
        weight = layer.get_parameter("weight").detach()
        return weight.t() if self.turned else weight

    @property
    def weight(self) -> Tensor:
        """The weight now, in the layout of the layer."""
        factors = [(self.get_parameter(out), self.get_parameter(into)) for out, into in (BASE, COEFFICIENTS[:2])]
        merged = grafted(self._matrix(self._layers[0]), factors[0], factors[1], self._matrix(self._layers[1]))
        return merged.t().contiguous() if self.turned else merged

    @property
    def bias(self) -> Tensor | None:
        own: Tensor | None = getattr(self._layers[0], "bias", None)
        if own is None or self.coefficient_bias is None:
            return own
        return own.detach() + self.get_parameter("coefficient_bias") * self._layers[1].get_parameter("bias").detach()

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        values = {"weight": self.weight} if self.bias is None else {"weight": self.weight, "bias": self.bias}
        found: Tensor = torch.func.functional_call(self._layers[0], values, args, kwargs)
        return found

    @torch.no_grad()
    def fold(self) -> nn.Module:
        """The layer with the weights that were learnt, in new parameters."""
        layer = self._layers[0]
        values = {"weight": self.weight} | ({} if self.coefficient_bias is None else {"bias": self.bias})
        for name, value in values.items():
            assert value is not None
            old = layer.get_parameter(name)
            layer.register_parameter(name, nn.Parameter(value.detach().clone(), requires_grad=old.requires_grad))
        return layer


@dataclass(frozen=True)
class Pair:
    """A layer that stays, and the layer of the same name in the block that goes (paths); why nothing is injected, or ""."""

    own: str
    other: str
    obstacle: str = ""


def neighbours(block: Block, blocks: Sequence[Block], size: int) -> list[Block]:
    """``size`` neighbouring blocks of one list around ``block``, itself among them, moved to lie within the list."""
    inside = sorted((one for one in blocks if one.container == block.container), key=lambda one: one.position)
    size = min(size, len(inside))
    start = min(max(inside.index(block) - size // 2, 0), len(inside) - size)
    return inside[start : start + size]


def pairs(model: nn.Module, block: Block, now: str, group: Mapping[str, Block]) -> list[Pair]:
    """The linear layers of the blocks of a group that stay, each with the one of the same name in the block that goes.

    Args:
        now: where the block is in the model; group: the blocks that stay, by where they are.
    """
    names = {site.path.removeprefix(f"{block.path}."): site for site in block.sites}
    every = dict(model.named_modules(remove_duplicate=False))
    found = []
    for path, stays in group.items():
        for site in stays.sites:
            name = site.path.removeprefix(f"{stays.path}.")
            if site.kind not in ("linear", "conv1d") or f"{path}.{name}" not in every:
                continue
            pair = Pair(f"{path}.{name}", f"{now}.{name}")
            other = names.get(name)
            reason = "the block that goes has no such layer"
            if other is not None:
                reason = _reason(model, pair.own, site.kind) or _reason(model, pair.other, other.kind)
                reason = reason or ("its weight is tied" if site.tied or _shared(model, pair.own) else "")
                reason = reason or _unlike(model.get_submodule(pair.own), model.get_submodule(pair.other))
            found.append(Pair(pair.own, pair.other, reason))
    return found


def _reason(model: nn.Module, path: str, kind: str) -> str:
    if path not in dict(model.named_modules(remove_duplicate=False)):
        return "the block that goes has no such layer"
    reason = obstacle(model, path, kind)
    if reason is None and not isinstance(getattr(model.get_submodule(path), "weight", None), nn.Parameter):
        return "its weight is quantized, or gone"
    return reason or ""


def _unlike(own: nn.Module, other: nn.Module) -> str:
    shapes = [tuple(layer.get_parameter("weight").shape) for layer in (own, other)]
    if shapes[0] != shapes[1]:
        return f"its weight is {list(shapes[0])}, that of the block that goes {list(shapes[1])}"
    return "" if type(own) is type(other) else f"a {type(own).__name__} is no {type(other).__name__}"


def _shared(model: nn.Module, path: str) -> bool:
    weight = model.get_submodule(path).get_parameter("weight")
    return sum(value is weight for module in model.modules() for value in module._parameters.values()) > 1


@contextmanager
def grafting(model: nn.Module, grafts: Mapping[str, nn.Module]) -> Iterator[None]:
    """The grafts stand in the place of their layers while it is open."""
    places = {path: parent_of(model, path) for path in grafts}
    own = {path: parent._modules[name] for path, (parent, name) in places.items()}
    try:
        for path, (parent, name) in places.items():
            parent._modules[name] = grafts[path]
        yield
    finally:
        for path, (parent, name) in places.items():
            parent._modules[name] = own[path]


@contextmanager
def passing(block: nn.Module) -> Iterator[None]:
    """While it is open the block gives the stream on as it received it."""
    own, forward = block.__dict__.get("forward"), block.forward

    def unchanged(*args: Any, **kwargs: Any) -> Any:
        stream = _stream(args, kwargs).clone()
        output = forward(*args, **kwargs)
        given = first_tensor(output)
        return _pytree.tree_map(lambda leaf: stream if leaf is given else leaf, output)

    try:
        block.__dict__["forward"] = unchanged
        yield
    finally:
        block.__dict__.pop("forward", None)
        if own is not None:
            block.__dict__["forward"] = own


def _stream(args: Any, kwargs: Any) -> Tensor:
    return first_tensor(args) if any(isinstance(leaf, Tensor) for leaf in _pytree.tree_leaves(args)) else kwargs["hidden_states"]


def influences(
    model: nn.Module,
    call: Call,
    batches: Sequence[Batch],
    blocks: Sequence[str],
    asked: Sequence[str] | None = None,
    progress: Callable[[int, int, str], None] = lambda done, total, what: None,
) -> dict[str, float]:
    """For each block the mean over tokens of the cosine between what the last block gives with it and without it (FuseGPT, sec.
    3.2): 1 is a block that nothing hangs on. Padded positions do not count.

    Args:
        blocks: paths of all blocks of the model.
        asked: of those that are asked about, which give a stream of the shape that they receive; by default all.
    """
    found = {path: Sums() for path in (blocks if asked is None else asked)}
    restart = Restart(model, call, blocks)
    with evaluating(model):
        for number, batch in enumerate(batches):
            restart.begin(batch)
            last = restart.order[-1]
            for path in found:
                restart.exact(path)  # asked of the model as it is, once
            whole = _tokens(model, last, restart.reference(0).features[last], batch)
            for path, sums in found.items():
                with passing(model.get_submodule(path)):
                    without = restart.run(0, path).features[last]
                sums.add(whole, _tokens(model, last, without, batch))
            progress(number + 1, len(batches), "influence of each block")
    return {path: sums.similarity for path, sums in found.items()}


def _tokens(model: nn.Module, path: str, x: Tensor, batch: Batch) -> Tensor:
    """The positions that count, [N, C]."""
    valid = counted(x, batch.get("attention_mask"))
    if valid is not None:
        x = x[valid]
    elif x.dim() == 4 and any(isinstance(module, nn.Conv2d) for module in model.get_submodule(path).modules()):
        x = x.movedim(1, -1)
    return x.reshape(-1, x.shape[-1]).float()
