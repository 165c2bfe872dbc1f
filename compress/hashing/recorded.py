"""What hash codes are learnt from: the queries and keys of one attention on calibration rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from calibrate.errors import UserError
from calibrate.modes import frozen
from calibrate.signature import Batch
from compress.algorithms.hash_learning import Maps
from compress.hashing.attentions import Call, listening

__all__ = ["record"]

_QUERIES = 64
"""Most queries of one row that are learnt from."""
_NUMBERS = 1 << 26
"""Most numbers of queries and keys that are kept; beyond that, fewer rows."""


def record(
    model: nn.Module,
    call: Callable[[nn.Module, Batch], Tensor],
    path: str,
    batches: Iterable[Batch],
    generator: torch.Generator,
) -> Maps:
    """Runs the rows and keeps the queries and keys of the attention in the module at ``path``, padded to one length.

    Raises:
        UserError: the attention has, on these rows, a mask that differs from query to query.
    """
    kept: list[Maps] = []
    numbers = 0
    with frozen(model):
        for batch in batches:
            with listening(model, [path]) as heard:
                call(model, batch)
            for one in heard[path].calls:
                if one.obstacle:
                    raise UserError("hash_attention", f"{path}: {one.obstacle}", "Name other blocks.")
                kept.append(_thinned(_maps(one), generator))
                numbers += kept[-1].queries.numel() + kept[-1].keys.numel()
            if numbers > _NUMBERS:
                break
    return _joined(kept)


def _maps(call: Call) -> Maps:
    rows, _, queries, _ = call.queries.shape
    keys = call.keys.shape[2]
    if call.bias is None:
        allowed = torch.ones(rows, keys, dtype=torch.bool)
    else:
        allowed = (call.bias > torch.finfo(call.bias.dtype).min / 2).any(1).squeeze(-1).expand(rows, -1)
    asked = allowed if queries == keys else torch.ones(rows, queries, dtype=torch.bool)
    bias = None if call.bias is None else call.bias.expand(rows, -1, -1, -1)
    return Maps(call.queries.float(), call.keys.float(), bias, asked, allowed, call.scale)


def _thinned(maps: Maps, generator: torch.Generator) -> Maps:
    """Some of the queries of each row, those that count first."""
    if maps.asked.shape[1] <= _QUERIES:
        return maps
    order = (torch.rand(maps.asked.shape, generator=generator) + maps.asked).argsort(1, descending=True)[:, :_QUERIES]
    index = order[:, None, :, None].expand(-1, maps.queries.shape[1], -1, maps.queries.shape[3])
    queries, asked = maps.queries.gather(2, index), maps.asked.gather(1, order)
    return Maps(queries, maps.keys, maps.bias, asked, maps.allowed, maps.scale)


def _joined(parts: list[Maps]) -> Maps:
    """Rows of several batches, filled up to the longest: what is filled up does not count."""
    queries, keys = (max(getattr(part, name).shape[2] for part in parts) for name in ("queries", "keys"))
    ragged = any(part.keys.shape[2] < keys for part in parts)
    masked = ragged or any(part.bias is not None for part in parts)
    heads = max(1 if part.bias is None else part.bias.shape[1] for part in parts)
    biases = []
    for part in parts:
        bias = torch.zeros(len(part), 1, part.keys.shape[2], 1) if part.bias is None else part.bias
        filled = F.pad(bias, (0, 0, 0, keys - bias.shape[2]), value=torch.finfo(bias.dtype).min)
        biases.append(filled.expand(-1, heads, -1, -1))
    return Maps(
        torch.cat([F.pad(part.queries, (0, 0, 0, queries - part.queries.shape[2])) for part in parts]),
        torch.cat([F.pad(part.keys, (0, 0, 0, keys - part.keys.shape[2])) for part in parts]),
        torch.cat(biases) if masked else None,
        torch.cat([F.pad(part.asked, (0, queries - part.asked.shape[1])) for part in parts]),
        torch.cat([F.pad(part.allowed, (0, keys - part.allowed.shape[1])) for part in parts]),
        parts[0].scale,
    )
