"""``find``: traces a model and puts its parts together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from calibrate.modes import modes_kept
from calibrate.signature import Batch, Signature
from compress.anatomy.attention import Attention, find_attention
from compress.anatomy.bridges import Bridge, find_bridges
from compress.anatomy.feedforward import FeedForward, find_feedforward
from compress.anatomy.flops import flops_of, product_flops
from compress.anatomy.flow import Flow, Weight
from compress.anatomy.grouping import Unit, container_of, group, units, within
from compress.anatomy.ledger import Ledger
from compress.anatomy.named import layers, must_name, named_blocks, resolve
from compress.anatomy.parts import ROLES, Anatomy, Block, Kind, Site
from compress.anatomy.placing import place_rest
from export.graph import Traceable, Untraceable

__all__ = ["find", "flow_of"]

_ROWS = 2


@dataclass
class _Draft:
    """What is known of a site before parameters are counted."""

    kind: Kind
    shape: tuple[int, ...] = ()
    roles: set[str] = field(default_factory=set)
    flops: int = 0
    whole: bool = True


@dataclass
class _Reading:
    """What was read from a graph: drafts of sites by path, units by block, the joins, and FLOPs of products by module."""

    sites: dict[str, _Draft] = field(default_factory=dict)
    blocks: dict[str, list[Unit]] = field(default_factory=dict)
    joins: int = 0
    product_flops: list[tuple[str, int]] = field(default_factory=list)
    bridges: list[Bridge] = field(default_factory=list)
    read: set[int] = field(default_factory=set)
    """Identities of the tensors that the graph reads in any way."""


def find(model: nn.Module, signature: Signature, example: Batch, roles: Mapping[str, Sequence[str]] | None = None) -> Anatomy:
    """The parts of a model, from its own traced graph; the model is not changed.

    Args:
        model: any module that ``torch.export`` can trace; compressed layers are seen through.
        signature: its inputs and output.
        example: one batch, with padding where the data can have it.
        roles: role -> patterns of layer paths (``fnmatch``). The layers they match get exactly the roles named for them;
            all others keep what was found.

    Raises:
        UserError: the model cannot be traced and no roles are named; a role or pattern of ``roles`` does not exist.
    """
    try:
        reading = _read(flow_of(model, signature, example))
    except Untraceable as failure:
        if not roles:
            raise must_name(failure.reason) from failure.__cause__
        reading = _Reading()
    called = {id(model.get_submodule(path)) for path, site in reading.sites.items() if site.whole}
    for path, kind in layers(model).items():
        if path not in reading.sites and id(model.get_submodule(path)) not in called:
            reading.sites[path] = _Draft(kind, roles=_obvious(kind, _tensors(model, path) & reading.read))
    given = resolve(roles or {}, list(reading.sites))
    for path, named in given.items():
        reading.sites[path].roles = set(named)
    for path in named_blocks(model, given, list(reading.blocks)):
        reading.blocks[path] = []
    rows = {name: tensor[:_ROWS] for name, tensor in example.items()}
    made = _assemble(model, reading, given)
    return replace(made, signature=signature, example=rows, bridges=tuple(reading.bridges))


def _tensors(model: nn.Module, path: str) -> set[int]:
    return {id(tensor) for tensor in model.get_submodule(path)._parameters.values() if tensor is not None}


def _obvious(kind: Kind, read: set[int]) -> set[str]:
    """The role of a layer that was not called: a norm stays one, and a table whose rows are read whole is an embedding."""
    return {"norm"} if kind == "norm" else {"embedding"} if kind == "embedding" and read else set()


def flow_of(model: nn.Module, signature: Signature, example: Batch) -> Flow:
    """The traced graph of a model, made walkable; the model is not changed.

    Raises:
        Untraceable: ``torch.export`` fails.
    """
    with modes_kept(model):
        return Flow(Traceable(model, signature, example).program(batch=_ROWS), model, _ROWS)


def _read(flow: Flow) -> _Reading:
    attentions, joins = find_attention(flow)
    taken = {index for attention in attentions for index in attention.projections}
    feedforwards = find_feedforward(flow, joins, {attention.core[-1] for attention in attentions}, taken)
    blocks = _blocks(flow, attentions, feedforwards, joins)
    reading = _Reading(blocks=blocks, joins=len(joins))
    kept = [unit.part for inside in blocks.values() for unit in inside]
    for index, weight in sorted((flow.projections | flow.tables).items()):
        site = reading.sites.setdefault(weight.path, _Draft(_kind(weight), weight.shape, whole=weight.whole))
        site.flops += flops_of(flow, index) // _ROWS if index in flow.projections else 0
    parts: list[Attention | FeedForward] = [*attentions, *(part for part in feedforwards if _among(part, kept, flow))]
    for part in parts:
        for role, indices in part.roles.items():
            for index in indices:
                reading.sites[flow.projections[index].path].roles.add(role)
    roles = {path: site.roles for path, site in reading.sites.items()}
    place_rest(flow, roles, reading.blocks, joins, [attention.core[-1] for attention in attentions])
    for path in flow.norms.values():
        if path:
            shape = _vector_shape(flow.model.get_submodule(path))
            reading.sites.setdefault(path, _Draft("norm", shape)).roles.add("norm")
    reading.bridges = find_bridges(flow, attentions, feedforwards)
    reading.product_flops = product_flops(flow, attentions, _ROWS)
    named = dict(flow.model.named_parameters(remove_duplicate=False))
    reading.read = {id(named.get(str(step.tensor))) for step in flow.steps if step.tensor and step.users}
    return reading


def _blocks(flow: Flow, attentions: list[Attention], feedforwards: list[FeedForward], joins: set[int]) -> dict[str, list[Unit]]:
    """Blocks by path. A chain with filters inside is an MLP only where a block with attention has one of the same make."""
    blocks = group(flow.model, units(flow, [*attentions, *feedforwards], joins))
    make = {
        unit.part.inner
        for inside in blocks.values()
        if any(isinstance(unit.part, Attention) for unit in inside)
        for unit in inside
        if isinstance(unit.part, FeedForward)
    }
    sure = [part for part in feedforwards if not part.inner or part.inner in make]
    return group(flow.model, units(flow, [*attentions, *sure], joins))


def _among(part: FeedForward, kept: list[Attention | FeedForward], flow: Flow) -> bool:
    """Whether the MLP, or the same layers called at another time, is part of a block."""
    paths = {flow.projections[index].path for index in part.projections}
    return any(
        {flow.projections[index].path for index in other.projections} == paths for other in kept if isinstance(other, FeedForward)
    )


def _kind(weight: Weight) -> Kind:
    kinds: dict[str, Kind] = {"linear": "linear", "conv1d": "conv1d", "conv2d": "conv2d", "embedding": "embedding"}
    return kinds.get(weight.kind, "other")


def _vector_shape(module: nn.Module) -> tuple[int, ...]:
    return next((tuple(p.shape) for p in module._parameters.values() if p is not None), ())


def _assemble(model: nn.Module, reading: _Reading, given: Mapping[str, Any]) -> Anatomy:
    generic = {path for path, site in reading.sites.items() if site.roles <= {"linear"} and site.kind != "norm"}
    ledger = Ledger(model, reading.sites)
    paths = list(reading.blocks)
    modules = dict(model.named_modules(remove_duplicate=False))
    sites = []
    for path, entry in ledger.entries.items():
        draft = reading.sites.get(path) or _Draft("other", tuple(model.state_dict(keep_vars=True)[path].shape))
        if path in generic and not draft.roles:
            draft.roles = {"embedding" if draft.kind == "embedding" else "conv" if draft.kind == "conv2d" else "linear"}
        shape = draft.shape or (_weight_shape(modules[path]) if path in modules else ())  # a parameter may be one number
        block = _innermost(path, paths)
        ordered = tuple(role for role in ROLES if role in draft.roles)
        stored = (entry.parameters, draft.flops, entry.bytes)
        tied = (entry.tied, entry.tied_parameters, entry.tied_bytes)
        sites.append(Site(path, ordered, draft.kind, block, shape, *stored, *tied))
    loose, inside = _split_flops(reading.product_flops, paths)
    blocks = [_block(model, index, path, reading.blocks[path], sites, inside[index]) for index, path in enumerate(paths)]
    unplaced = [path for path in ledger.entries if path in generic]
    return Anatomy(type(model).__name__, tuple(sites), tuple(blocks), reading.joins, tuple(unplaced), loose, tuple(given))


def _weight_shape(module: nn.Module) -> tuple[int, ...]:
    weight = getattr(getattr(module, "quantized_weight", None), "shape", None)
    weight = getattr(getattr(getattr(module, "stored", None), "values", None), "shape", weight)
    if weight is None:
        own = module._parameters.get("weight")
        weight = own.shape if own is not None else _vector_shape(module)
    return tuple(weight)


def _innermost(path: str, blocks: list[str]) -> int | None:
    around = [index for index, block in enumerate(blocks) if within(path, block)]
    return max(around, key=lambda index: len(blocks[index]), default=None)


def _split_flops(products: list[tuple[str, int]], blocks: list[str]) -> tuple[int, list[int]]:
    loose, inside = 0, [0] * len(blocks)
    for path, flops in products:
        block = _innermost(path, blocks)
        if block is None:
            loose += flops
        else:
            inside[block] += flops
    return loose, inside


def _block(model: nn.Module, index: int, path: str, found: list[Unit], sites: list[Site], attention_flops: int) -> Block:
    attentions = [unit.part for unit in found if isinstance(unit.part, Attention)]
    largest = max(attentions, key=lambda a: (a.heads or 0) * (a.head_dim or 0), default=None)
    heads = (largest.heads, largest.kv_heads, largest.head_dim) if largest else (None, None, None)
    container, position = container_of(model, path)
    held = tuple(replace(site, block=index) for site in sites if site.block == index)
    return Block(index, path, container, position, *heads, held, attention_flops)
