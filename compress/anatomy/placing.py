"""Roles by place: what is neither attention nor MLP lies before the blocks, after them, or between."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from compress.anatomy.flow import CONVOLUTIONS, Flow
from compress.anatomy.grouping import within

__all__ = ["place_rest"]


def place_rest(flow: Flow, roles: Mapping[str, set[str]], blocks: Iterable[str], joins: set[int], cores: Iterable[int]) -> None:
    """Adds embeddings, head and convolutions, and what is left over, to the roles by path of all projections and tables.

    Args:
        roles: by path of the weight; attention and MLP roles are there already.
        blocks: module paths; a layer inside a block is neither embedding nor head.
        cores: the last steps of attentions.
    """
    placed = {path for path, found in roles.items() if found}
    work = sum(1 << index for index, weight in flow.projections.items() if weight.path in placed)
    work |= sum(1 << index for index in cores)
    last, inside = _last_projections(flow, joins), list(blocks)
    guesses: dict[str, str] = {}
    for index, weight in flow.projections.items():
        outside = not any(within(weight.path, block) for block in inside)
        if weight.path not in placed and flow.steps[index].live and outside:
            role, sure = _by_place(flow, index, work, index in last)
            if role and sure:
                roles[weight.path].add(role)
            elif role:
                guesses[weight.path] = role
    _place_alike(flow, roles, guesses)
    for index, weight in flow.projections.items():
        if not roles[weight.path]:
            roles[weight.path].add("conv" if flow.steps[index].op in CONVOLUTIONS else "linear")
    for weight in flow.tables.values():
        roles[weight.path].add("embedding")


def _by_place(flow: Flow, index: int, work: int, last: bool) -> tuple[str, bool]:
    """A role ("" for none), and whether it is sure; ``work`` are the steps of attention and MLPs.

    What reads the raw input and what gives the output are sure; linear layers before or after all blocks are guesses.
    """
    before, after, output = flow.before[index], flow.after[index], flow.steps[-1].index
    convolution = flow.steps[index].op in CONVOLUTIONS
    if last and (before & work or not work):
        return "head", True
    if after & work and not before & _live_bits(flow) and not _reads_table(flow, index):
        return "embedding", True
    if not convolution and not before & work and after & work:
        return "embedding", False
    if not convolution and before & work and not after & work and after >> output & 1:
        return "head", False
    return "", False


def _place_alike(flow: Flow, roles: Mapping[str, set[str]], guesses: Mapping[str, str]) -> None:
    """Guesses by place hold unless a layer of the same name in another entry of a list lies elsewhere (between blocks)."""
    alike: dict[str, set[str]] = {}
    for weight in flow.projections.values():
        found = roles[weight.path] or {guesses.get(weight.path, "")}
        alike.setdefault(re.sub(r"\b\d+\b", "*", weight.path), set()).update(found)
    for path, role in guesses.items():
        if alike[re.sub(r"\b\d+\b", "*", path)] == {role}:
            roles[path].add(role)


def _live_bits(flow: Flow) -> int:
    return sum((1 << index for index in flow.projections if flow.steps[index].live), 0)


def _reads_table(flow: Flow, index: int) -> bool:
    return any(flow.before[index] >> table & 1 for table in flow.tables)


def _last_projections(flow: Flow, joins: set[int]) -> list[int]:
    """The projections that reach the output without a residual join after them."""

    def stop(index: int) -> bool:
        return index in joins or index in flow.projections or index in flow.products

    return [index for index in flow.backward(flow.steps[-1].index, stop) if index in flow.projections]
