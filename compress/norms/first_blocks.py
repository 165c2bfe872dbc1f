"""The first blocks of a model alone, where most of what an exchange of norms costs arises in them.

In vision transformers it does: the norms behind a patch embedding see contrasts that differ from patch to patch, those of later
blocks a residual stream whose deviation hardly changes. A step of the first block costs a fraction of a step of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from calibrate.signature import Batch
from compress.distillation.listening import hear, still
from compress.norms.rep_norm import RepNorm
from compress.norms.replacing import NormExchange, Other

__all__ = ["FirstBlocks", "first_blocks"]

Call = Callable[[nn.Module, Batch], Tensor]

_MOST = 0.9
"""Of the error of all blocks, which the first ones must make to learn alone."""


@dataclass(frozen=True)
class FirstBlocks:
    """Which blocks learn first, and what the exchange costs in each block by itself.

    Attributes:
        paths: the first blocks, in order; none: the error is spread over more than half of the model.
        norms: paths of the norms in them and before them.
        errors: by block, squared error over square of its output with nothing exchanged but what is in it.
    """

    paths: tuple[str, ...]
    norms: frozenset[str]
    errors: Mapping[str, float]


def first_blocks(
    model: nn.Module,
    call: Call,
    batch: Batch,
    blocks: Sequence[str],
    exchange: NormExchange,
    others: Sequence[tuple[str, Other]],
) -> FirstBlocks:
    """Exchanges what is in each block alone, and says in which of them the error arises.

    Args:
        blocks: paths, in the order in which they run; norms before the first of them count as its own.
        others: what is exchanged beside norms, with the block that each is in.
    """
    inside: dict[str, list[RepNorm | Other]] = {path: [] for path in blocks}
    before = _before(model, call, batch, blocks, exchange.parts)
    for path, part in exchange.parts.items():
        if owner := next((block for block in blocks if path.startswith(f"{block}.")), blocks[0] if path in before else ""):
            inside[owner].append(part)
    for block, other in others:
        inside[block].append(other)
    errors = {}
    with still(model):
        for block in blocks:
            exchange.set(1.0, True)
            whole = hear(model, call, batch, {block: None}, False)[block].double()
            for exchanged in inside[block]:
                exchanged.share, exchanged.learning = 0.0, False
            now = hear(model, call, batch, {block: None}, False)[block].double()
            errors[block] = float((now - whole).square().sum() / whole.square().sum().clamp(min=1e-30))
    exchange.set(0.0, False)
    count = next(n for n in range(len(blocks) + 1) if sum([*errors.values()][:n]) >= _MOST * sum(errors.values()))
    paths = tuple(blocks[:count]) if 2 * count <= len(blocks) else ()
    norms = {path for path in exchange.parts if path in before or path.startswith(tuple(f"{one}." for one in paths))}
    return FirstBlocks(paths, frozenset(norms if paths else ()), errors)


def _before(model: nn.Module, call: Call, batch: Batch, blocks: Sequence[str], parts: Mapping[str, RepNorm]) -> set[str]:
    """Paths of the norms that run before the first block is done, and are in none."""
    seen: set[str] = set()
    handles = [
        part.register_forward_pre_hook(lambda module, args, path=path: seen.add(path))
        for path, part in parts.items()
        if not path.startswith(tuple(f"{block}." for block in blocks))
    ]
    try:
        with still(model), torch.no_grad():
            hear(model, call, {name: tensor[:1] for name, tensor in batch.items()}, {blocks[0]: None}, False)
    finally:
        for handle in handles:
            handle.remove()
    return seen
