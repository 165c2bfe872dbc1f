"""Blocks: the smallest modules that hold one attention and its MLP."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from compress.anatomy.attention import Attention
from compress.anatomy.feedforward import FeedForward
from compress.anatomy.flow import Flow
from compress.anatomy.joins import rejoins

__all__ = ["Unit", "container_of", "group", "units", "within"]


@dataclass(frozen=True)
class Unit:
    """An attention or an MLP: the paths of its weights, and the module where its output joins the residual stream."""

    part: Attention | FeedForward
    paths: tuple[str, ...]
    joined_in: str | None
    first: int


def within(path: str, module: str) -> bool:
    """Whether a path is a module or lies in it ("" is the model)."""
    return not module or path == module or path.startswith(module + ".")


def units(flow: Flow, parts: Iterable[Attention | FeedForward], joins: set[int]) -> list[Unit]:
    """One unit for each set of weights: a layer that is called many times (ALBERT) counts once, and attentions that share
    a projection (EfficientViT's cascade of heads, ConvBERT's two kinds of heads) are one."""
    found: dict[tuple[str, ...], Unit] = {}
    for part in _merged(flow, list(parts)):
        indices = part.projections or (list(part.core) if isinstance(part, Attention) else [])
        paths = tuple(sorted({flow.projections[i].path if i in flow.projections else flow.steps[i].path for i in indices}))
        last = (part.roles.get("attention.out") or part.roles.get("mlp.down") or tuple(indices))[-1]
        reached = flow.forward(last, lambda index: index in joins or index in flow.projections or index in flow.products)
        joined = [flow.steps[index].path for index in reached if index in joins and rejoins(flow, index, [last])]
        found.setdefault(paths, Unit(part, paths, joined[0] if joined else None, min(indices)))
    return sorted(found.values(), key=lambda unit: unit.first)


def _merged(flow: Flow, parts: list[Attention | FeedForward]) -> list[Attention | FeedForward]:
    merged: list[Attention | FeedForward] = []
    for part in parts:
        shared = [other for other in merged if isinstance(other, Attention) and set(other.projections) & set(part.projections)]
        if isinstance(part, Attention) and shared:
            merged[merged.index(shared[0])] = shared[0].joined(part)
        else:
            merged.append(part)
    return merged


def group(model: nn.Module, found: list[Unit]) -> dict[str, list[Unit]]:
    """The units of each block, by the block's module path, in order of the graph."""
    attentions = [unit for unit in found if isinstance(unit.part, Attention)]
    feedforwards = [unit for unit in found if isinstance(unit.part, FeedForward)]
    blocks: dict[str, list[Unit]] = {}
    for unit in attentions:
        blocks.setdefault(_block_of(unit, attentions, feedforwards), [])
    for unit in feedforwards:
        if not any(_holds(path, unit) for path in blocks):
            own = _common((*unit.paths, *([unit.joined_in] if unit.joined_in is not None else [])))
            beneath = [path for path in blocks if path != own and within(path, own)]
            blocks.setdefault(_common(unit.paths) if beneath else own, [])
    for unit in found:
        blocks[max((path for path in blocks if _holds(path, unit)), key=len)].append(unit)
    widened: dict[str, list[Unit]] = {}
    for path, inside in blocks.items():
        widened.setdefault(_widen(model, path, inside, found), []).extend(inside)
    return dict(sorted(widened.items(), key=lambda item: min(unit.first for unit in item[1])))


def _block_of(unit: Unit, attentions: list[Unit], feedforwards: list[Unit]) -> str:
    """The smallest module with this attention, no other, and an MLP; failing that, the one where its residual join is."""
    for module in _ancestors(_common(unit.paths)):
        if sum(_holds(module, other) for other in attentions) > 1:
            break
        if any(_holds(module, other) for other in feedforwards):
            return module
    return _common((*unit.paths, *([unit.joined_in] if unit.joined_in is not None else [])))


def _widen(model: nn.Module, path: str, inside: list[Unit], found: list[Unit]) -> str:
    """The entry of a list of modules that holds nothing but this block, if there is one around it."""
    for module in _ancestors(path):
        if sum(_holds(module, unit) for unit in found) > len(inside):
            break
        if container_of(model, module)[0] is not None:
            return module
    return path


def container_of(model: nn.Module, path: str) -> tuple[str | None, int]:
    """The ``ModuleList`` or ``Sequential`` that directly holds a module, and the module's position in it."""
    parent, _, name = path.rpartition(".")
    if not path:
        return None, 0
    holder = model.get_submodule(parent)
    if not isinstance(holder, (nn.ModuleList, nn.Sequential)):
        return None, 0
    return parent, list(dict(holder.named_children())).index(name)


def _holds(module: str, unit: Unit) -> bool:
    return all(within(path, module) for path in unit.paths)


def _ancestors(path: str) -> list[str]:
    """A path and all that hold it, the model last."""
    parts = path.split(".") if path else []
    return [".".join(parts[:count]) for count in range(len(parts), -1, -1)]


def _common(paths: Iterable[str]) -> str:
    """The smallest module that holds all paths (a single path: what holds it)."""
    split = [path.split(".") if path else [] for path in paths]
    shared: list[str] = []
    for names in zip(*split, strict=False):
        if len(set(names)) > 1:
            break
        shared.append(names[0])
    return ".".join(shared)
