"""Follows the channels of a value through the graph, as long as what happens to it happens to each channel alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from compress.anatomy.flow import Flow

__all__ = ["Reader", "chain", "onward", "readers", "users"]

_SAME = frozenset({"dropout", "feature_dropout", "clone", "contiguous", "alias", "detach", "to", "_to_copy", "float", "type_as"})
_RESHAPES = frozenset({"view", "reshape", "_unsafe_view", "flatten", "unflatten", "reshape_as", "view_as"})
_LIKE = frozenset({"reshape_as", "view_as", "expand_as", "type_as"})
"""Of their second argument only shape or type matter."""


@dataclass(frozen=True)
class Reader:
    """A step that reads a value whose channels lie along ``axis``, coming from step ``source``."""

    index: int
    source: int
    axis: int


def users(flow: Flow, index: int) -> list[int]:
    """The steps that read the values of a step, not only its shape."""
    return [user for user in flow.steps[index].users if flow.steps[user].op not in _LIKE or flow.given(user, 0) == index]


def onward(flow: Flow, index: int, source: int, axis: int) -> int | None:
    """The axis of the channels after a step, if it only moves or picks or averages whole channel vectors; else None."""
    step, before = flow.steps[index], flow.steps[source].shape
    rank = len(before)
    if step.op in _SAME:
        return axis if step.shape == before else None
    if step.op in _RESHAPES:
        return _reshaped(before, step.shape, axis)
    if step.op == "permute":
        order = [int(dim) % rank for dim in step.arguments[1]]
        return order.index(axis)
    if step.op in ("transpose", "swapaxes"):
        one, two = (int(dim) % rank for dim in step.arguments[1:3])
        return two if axis == one else one if axis == two else axis
    if step.op in ("t", "numpy_T", "mT"):
        return {rank - 1: rank - 2, rank - 2: rank - 1}.get(axis) if rank == 2 or step.op == "mT" else None
    if step.op in ("select", "slice"):
        dim = int(step.arguments[1] if len(step.arguments) > 1 else 0) % rank
        return None if dim == axis else axis - (step.op == "select" and dim < axis)
    if step.op == "roll" and len(step.arguments) > 2:
        return None if axis in [int(dim) % rank for dim in step.arguments[2]] else axis
    if step.op == "mean" and len(step.arguments) > 1:
        return _averaged(step.arguments, rank, axis)
    if step.op == "unsqueeze":
        dim = int(step.arguments[1]) % (rank + 1)
        return axis + (dim <= axis)
    if step.op == "squeeze" and len(step.arguments) > 1 and isinstance(step.arguments[1], int):
        dim = step.arguments[1] % rank
        return None if dim == axis else axis - (dim < axis and before[dim] == 1)
    return None


def readers(flow: Flow, start: int, axis: int) -> tuple[list[Reader], int]:
    """The steps that read what a step gives, after it was moved about, each with the axis of the channels in what it reads;
    and the steps that moved it, as bits."""
    found, seen, queue = [], 0, [(start, axis)]
    while queue:
        source, at = queue.pop()
        for user in users(flow, source):
            moved = onward(flow, user, source, at) if _alone(flow, user, source) else None
            if moved is None:
                found.append(Reader(user, source, at))
            elif not seen >> user & 1:
                seen |= 1 << user
                queue.append((user, moved))
    return sorted(found, key=lambda reader: reader.index), seen


def chain(flow: Flow, start: int, axis: int, moves: bool = True) -> Reader | None:
    """The one reader of a step, where each value on the way has one reader too; ``moves``: values may be moved on the way."""
    source, at = start, axis
    while len(reading := users(flow, source)) == 1:
        user = reading[0]
        moving = _alone(flow, user, source) and (moves or flow.steps[user].op in _SAME)
        moved = onward(flow, user, source, at) if moving else None
        if moved is None:
            return Reader(user, source, at)
        source, at = user, moved
    return None


def _alone(flow: Flow, user: int, source: int) -> bool:
    """Whether a step reads no other values."""
    step = flow.steps[user]
    return step.inputs == [source] or (step.op in _LIKE and flow.given(user, 0) == source)


def _reshaped(before: tuple[int, ...], after: tuple[int, ...], axis: int) -> int | None:
    """Where an axis lies after a reshape: where as many values come before it and it is as long."""
    ahead = math.prod(before[:axis])
    for new, size in enumerate(after):
        if size == before[axis] and math.prod(after[:new]) == ahead and math.prod(after) == math.prod(before):
            return new
    return None


def _averaged(arguments: tuple[Any, ...], rank: int, axis: int) -> int | None:
    given = arguments[1]
    if given is None:
        return None
    gone = [int(dim) % rank for dim in (given if isinstance(given, list) else [given])]
    if axis in gone:
        return None
    kept = len(arguments) > 2 and bool(arguments[2])
    return axis if kept else axis - sum(dim < axis for dim in gone)
