"""Residual joins: adds of a hidden state and of what was computed from it."""

from __future__ import annotations

from collections.abc import Iterable

from compress.anatomy.flow import Flow

__all__ = ["find_joins", "rejoins"]

_ADDS = frozenset({"add", "addcmul"})


def find_joins(flow: Flow, inside: set[int]) -> set[int]:
    """Adds in which one side is an earlier hidden state, only moved about, and the other came from it through a weight.

    ``inside`` are steps within the cores of attention, where biases are added to scores.

    Sums of parallel branches (attention and MLP of GPT-J), positions added to tokens, and the two halves of a rotary
    embedding are not joins: no side of theirs is the source of the other.
    """
    work = flow.projection_bits | sum(1 << index for index in flow.norms)
    joins: set[int] = set()
    for step in flow.steps:
        if step.op in _ADDS and step.live and step.index not in inside and _joins(flow, step.index, work, joins):
            joins.add(step.index)
    return joins


def rejoins(flow: Flow, join: int, parts: Iterable[int]) -> bool:
    """Whether steps lie on the one side of a join that was computed, and the other side is older than they are."""
    bits = sum(1 << part for part in parts)
    sides = [bool((flow.before[side] | 1 << side) & bits) for side in flow.steps[join].inputs]
    return sides in ([True, False], [False, True])


def _joins(flow: Flow, index: int, work: int, joins: set[int]) -> bool:
    sides = flow.steps[index].inputs
    if len(sides) != 2:
        return False
    return any(_is_source(flow, skip, branch, work, joins) for skip, branch in ((sides[0], sides[1]), (sides[1], sides[0])))


def _is_source(flow: Flow, skip: int, branch: int, work: int, joins: set[int]) -> bool:
    """Whether ``branch`` was computed, through a step of ``work``, from what ``skip`` still is.

    Parallel branches may be added one after the other (Cohere): then the source lies under the first join.
    """
    moved, queue, passed = {skip}, [skip], False
    while queue:
        step = queue.pop()
        under_join = step in joins and not passed and not flow.before[branch] >> step & 1
        passed = passed or under_join
        if under_join or flow.is_layout(step):
            fresh = [source for source in flow.sources(step) if source not in moved]
            moved.update(fresh)
            queue.extend(fresh)
    before = flow.before[branch] | 1 << branch
    return any(flow.after[source] & before & work for source in moved if before >> source & 1)
