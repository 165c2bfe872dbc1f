"""The first blocks of a model alone, where most of what an exchange of norms costs arises in them.

In vision transformers it does: the norms behind a patch embedding see contrasts that differ from patch to patch, those of later
blocks a residual stream whose deviation hardly changes. A step of the first block costs a fraction of a step of the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from calibrate.signature import Batch
from compress.distillation.listening import hear, still
from compress.distillation.training import valid
from compress.norms.rep_norm import RepNorm
from compress.norms.replacing import NormExchange, Other

__all__ = ["FirstBlocks", "first_blocks"]

Call = Callable[[nn.Module, Batch], Tensor]

_MOST = 0.9
"""Of the error of all blocks, which the first ones must make to learn alone."""
_LEAST = 1e-3
"""Of the square of what blocks give; an error of all blocks below it needs no training of its own."""


@dataclass(frozen=True)
class FirstBlocks:
    """Which blocks learn first, and what the exchange costs in each block by itself.

    Attributes:
        paths: the first blocks, in the order in which they run; none: see ``because``.
        norms: paths of the norms that run before the last of them ends.
        others: what else is exchanged in them.
        errors: by block, squared error over square of its output with nothing exchanged but what runs in it, or between it and
            the block before.
        because: why no block learns first; "": some do.
    """

    paths: tuple[str, ...]
    norms: frozenset[str]
    others: tuple[Other, ...]
    errors: Mapping[str, float]
    because: str = ""


def first_blocks(
    model: nn.Module,
    call: Call,
    batches: Sequence[Batch],
    blocks: Sequence[str],
    exchange: NormExchange,
    others: Sequence[tuple[str, Other]],
) -> FirstBlocks:
    """Exchanges what is in each block alone, and says in which of them the error arises.

    Args:
        batches: rows to judge on; padded positions do not count.
        others: what is exchanged beside norms, with the block that each is in.
    """
    order, norms = _order(model, call, batches[0], blocks, exchange.parts)
    inside = {
        path: [exchange.parts[norm] for norm in norms[path]] + [one for block, one in others if block == path] for path in order
    }
    errors = {}
    for block in order:
        exchange.set(1.0, True)
        whole = _given(model, call, batches, block)
        for exchanged in inside[block]:
            exchanged.share, exchanged.learning = 0.0, False
        now = _given(model, call, batches, block)
        pairs = [*zip(whole, now, strict=True)]
        square = sum(float(one.square().sum()) for one in whole)
        errors[block] = sum(float((other - one).square().sum()) for one, other in pairs) / max(square, 1e-30)
    exchange.set(0.0, False)
    total = sum(errors.values())
    if not math.isfinite(total):
        return FirstBlocks((), frozenset(), (), errors, "what they give without norms is not finite")
    if total < _LEAST:
        return FirstBlocks((), frozenset(), (), errors, "the exchange costs them hardly anything")
    count = next(n for n in range(len(order) + 1) if sum([*errors.values()][:n]) >= _MOST * total)
    if 2 * count > len(order):
        return FirstBlocks((), frozenset(), (), errors, "the error is spread over more than half of the blocks")
    paths = tuple(order[:count])
    done = frozenset(norm for path in paths for norm in norms[path])
    return FirstBlocks(paths, done, tuple(one for block, one in others if block in paths), errors)


@torch.no_grad()
def _given(model: nn.Module, call: Call, batches: Sequence[Batch], block: str) -> list[Tensor]:
    """What a block gives for each batch, at the positions that count."""
    found = []
    with still(model):
        for batch in batches:
            found.append(valid(hear(model, call, batch, {block: None}, False)[block], batch).double())
    return found


def _order(
    model: nn.Module, call: Call, batch: Batch, blocks: Sequence[str], parts: Mapping[str, RepNorm]
) -> tuple[list[str], dict[str, list[str]]]:
    """The blocks in the order in which they end, and with each the norms that run since the one before it ended."""
    order: list[str] = []
    norms: dict[str, list[str]] = {path: [] for path in blocks}
    since: list[str] = []

    def ended(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if path not in order:
                order.append(path)
                norms[path] += since
                since.clear()

        return hook

    handles = [model.get_submodule(path).register_forward_hook(ended(path)) for path in blocks]
    handles += [
        part.register_forward_pre_hook(lambda module, args, path=path: since.append(path)) for path, part in parts.items()
    ]
    try:
        with still(model):
            call(model, {name: tensor[:1] for name, tensor in batch.items()})
    finally:
        for handle in handles:
            handle.remove()
    return order, norms
