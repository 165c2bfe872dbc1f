"""``find``: traces a model and puts its parts together."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field, replace
from io import StringIO
from typing import Any

import torch
from torch import nn

from calibrate.errors import UserError
from calibrate.signature import Batch, Signature
from compress.anatomy.attention import Attention, find_attention
from compress.anatomy.feedforward import FeedForward, find_feedforward
from compress.anatomy.flow import CONVOLUTIONS, PRODUCTS, Flow, Weight
from compress.anatomy.grouping import Unit, container_of, group, units, within
from compress.anatomy.ledger import Ledger
from compress.anatomy.named import layers, must_name, named_blocks, resolve
from compress.anatomy.parts import ROLES, Anatomy, Block, Kind, Site
from export.graph import Traceable

__all__ = ["find"]

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
class _Draught:
    """What was read from a graph: drafts of sites by path, units by block, the joins, and FLOPs of products by module."""

    sites: dict[str, _Draft] = field(default_factory=dict)
    blocks: dict[str, list[Unit]] = field(default_factory=dict)
    joins: int = 0
    product_flops: list[tuple[str, int]] = field(default_factory=list)
    read: set[int] = field(default_factory=set)
    """Identities of the tensors that the graph reads in any way."""


def find(
    model: nn.Module, signature: Signature, example: Batch, roles: Mapping[str, Sequence[str]] | None = None
) -> Anatomy:
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
        draught = _read(_trace(model, signature, example), model)
    except _Untraced as failure:
        if not roles:
            raise must_name(str(failure)) from failure.__cause__
        draught = _Draught()
    called = {id(model.get_submodule(path)) for path, site in draught.sites.items() if site.whole}
    for path, kind in layers(model).items():
        if path not in draught.sites and id(model.get_submodule(path)) not in called:
            draught.sites[path] = _Draft(kind, roles=_obvious(kind, _tensors(model, path) & draught.read))
    given = resolve(roles or {}, list(draught.sites))
    for path, named in given.items():
        draught.sites[path].roles = set(named)
    for path in named_blocks(model, given, list(draught.blocks)):
        draught.blocks[path] = []
    return _assemble(model, draught, given)


def _tensors(model: nn.Module, path: str) -> set[int]:
    return {id(tensor) for tensor in model.get_submodule(path)._parameters.values() if tensor is not None}


def _obvious(kind: Kind, read: set[int]) -> set[str]:
    """The role of a layer that was not called: a norm stays one, and a table whose rows are read whole is an embedding."""
    return {"norm"} if kind == "norm" else {"embedding"} if kind == "embedding" and read else set()


class _Untraced(Exception):
    """torch.export failed; the message is the first line of its own."""


def _trace(model: nn.Module, signature: Signature, example: Batch) -> torch.export.ExportedProgram:
    # torch.export prints the graph so far when it fails: the message says enough.
    with _left_as_it_was(model), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        try:
            return Traceable(model, signature, example).program(batch=_ROWS)
        except UserError:
            raise
        except Exception as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            raise _Untraced(f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__) from error


@contextmanager
def _left_as_it_was(model: nn.Module) -> Iterator[None]:
    """Modes of all modules are put back; PyTorch's fused encoder layer, which hides its parts, is off meanwhile."""
    modes = [(module, module.training) for module in model.modules()]
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for module, training in modes:
            module.training = training


def _read(program: torch.export.ExportedProgram, model: nn.Module) -> _Draught:
    flow = Flow(program, model, _ROWS)
    attentions, joins = find_attention(flow)
    taken = {index for attention in attentions for index in attention.projections}
    feedforwards = find_feedforward(flow, joins, {attention.core[-1] for attention in attentions}, taken)
    blocks = _blocks(flow, attentions, feedforwards, joins)
    draught = _Draught(blocks=blocks, joins=len(joins))
    kept = [unit.part for inside in blocks.values() for unit in inside]
    for index, weight in sorted((flow.projections | flow.tables).items()):
        site = draught.sites.setdefault(weight.path, _Draft(_kind(weight), weight.shape, whole=weight.whole))
        site.flops += _flops(flow, index) // _ROWS if index in flow.projections else 0
    parts: list[Attention | FeedForward] = [*attentions, *(part for part in feedforwards if _among(part, kept, flow))]
    for part in parts:
        for role, indices in part.roles.items():
            for index in indices:
                draught.sites[flow.projections[index].path].roles.add(role)
    _place_rest(flow, draught, joins, attentions)
    for path in flow.norms.values():
        if path:
            shape = _vector_shape(model.get_submodule(path))
            draught.sites.setdefault(path, _Draft("norm", shape)).roles.add("norm")
    draught.product_flops = _product_flops(flow, attentions)
    named = dict(model.named_parameters(remove_duplicate=False))
    draught.read = {id(named.get(str(step.tensor))) for step in flow.steps if step.tensor and step.users}
    return draught


def _blocks(
    flow: Flow, attentions: list[Attention], feedforwards: list[FeedForward], joins: set[int]
) -> dict[str, list[Unit]]:
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
        {flow.projections[index].path for index in other.projections} == paths
        for other in kept
        if isinstance(other, FeedForward)
    )


def _place_rest(flow: Flow, draught: _Draught, joins: set[int], attentions: list[Attention]) -> None:
    """Embeddings, head and convolutions: by where they lie between inputs, blocks and output."""
    placed = {path for path, site in draught.sites.items() if site.roles}
    work = sum(1 << i for i, weight in flow.projections.items() if weight.path in placed)
    work |= sum(1 << attention.core[-1] for attention in attentions)
    last = _last_projections(flow, joins)
    output = flow.steps[-1].index
    guesses: dict[str, str] = {}
    for index, weight in flow.projections.items():
        site = draught.sites[weight.path]
        if weight.path in placed or not flow.steps[index].live or any(within(weight.path, b) for b in draught.blocks):
            continue
        before, after = flow.before[index], flow.after[index]
        convolution = flow.steps[index].op in CONVOLUTIONS
        reads_input = not before & flow.projection_bits & _live_bits(flow) and not _reads_table(flow, index)
        if index in last and (before & work or not work):
            site.roles.add("head")
        elif reads_input and after & work:
            site.roles.add("embedding")
        elif not convolution and not before & work and after & work:
            guesses[weight.path] = "embedding"
        elif not convolution and before & work and not after & work and after >> output & 1:
            guesses[weight.path] = "head"
    _place_alike(flow, draught, guesses)
    for index, weight in flow.projections.items():
        site = draught.sites[weight.path]
        if not site.roles:
            site.roles.add("conv" if flow.steps[index].op in CONVOLUTIONS else "linear")
    for weight in flow.tables.values():
        draught.sites[weight.path].roles.add("embedding")


def _place_alike(flow: Flow, draught: _Draught, guesses: dict[str, str]) -> None:
    """Guesses by place hold unless a layer of the same name in another entry of a list lies elsewhere (between blocks)."""
    alike: dict[str, set[str]] = {}
    for weight in flow.projections.values():
        roles = draught.sites[weight.path].roles or {guesses.get(weight.path, "")}
        alike.setdefault(re.sub(r"\b\d+\b", "*", weight.path), set()).update(roles)
    for path, role in guesses.items():
        if alike[re.sub(r"\b\d+\b", "*", path)] == {role}:
            draught.sites[path].roles.add(role)


def _live_bits(flow: Flow) -> int:
    return sum((1 << index for index in flow.projections if flow.steps[index].live), 0)


def _reads_table(flow: Flow, index: int) -> bool:
    return any(flow.before[index] >> table & 1 for table in flow.tables)


def _last_projections(flow: Flow, joins: set[int]) -> list[int]:
    """The projections that reach the output without a residual join after them."""

    def stop(index: int) -> bool:
        return index in joins or index in flow.projections or index in flow.products

    return [index for index in flow.backward(flow.steps[-1].index, stop) if index in flow.projections]


def _kind(weight: Weight) -> Kind:
    kinds: dict[str, Kind] = {"linear": "linear", "conv1d": "conv1d", "conv2d": "conv2d", "embedding": "embedding"}
    return kinds.get(weight.kind, "other")


def _vector_shape(module: nn.Module) -> tuple[int, ...]:
    return next((tuple(p.shape) for p in module._parameters.values() if p is not None), ())


def _flops(flow: Flow, index: int) -> int:
    """2 * multiply-accumulates of one step, over the whole traced batch."""
    step = flow.steps[index]
    if step.op == "scaled_dot_product_attention":
        query, key, value = (flow.steps[argument.index].shape for argument in step.arguments[:3])
        return int(2 * math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1]))
    if step.op == "einsum":
        given = step.arguments[0].replace(" ", "").partition("->")[0].split(",")
        sizes: dict[str, int] = {}
        for letters, operand in zip(given, flow.operands(index), strict=True):
            sizes |= dict(zip(letters, flow.steps[operand].shape, strict=False))
        return 2 * math.prod(sizes.values())
    if step.op in PRODUCTS:
        return 2 * math.prod(step.shape) * flow.steps[flow.operands(index)[0]].shape[-1]
    if index not in flow.projections:
        return 0
    return 2 * math.prod(step.shape) * math.prod(flow.projections[index].shape[1:])


def _product_flops(flow: Flow, attentions: list[Attention]) -> list[tuple[str, int]]:
    """FLOPs of one row of the products of two computed values, with the layer that they serve or the module they are in."""
    serves = {
        index: flow.projections[attention.projections[-1]].path
        for attention in attentions
        if attention.projections
        for index in attention.core
    }
    cores = {attention.core[-1] for attention in attentions}
    steps = {index for index in flow.products if flow.steps[index].live} | cores
    return [(serves.get(index, flow.steps[index].path), _flops(flow, index) // _ROWS) for index in sorted(steps)]


def _assemble(model: nn.Module, draught: _Draught, given: Mapping[str, Any]) -> Anatomy:
    generic = {path for path, site in draught.sites.items() if site.roles <= {"linear"} and site.kind != "norm"}
    ledger = Ledger(model, draught.sites)
    paths = list(draught.blocks)
    sites = []
    for path, entry in ledger.entries.items():
        draft = draught.sites.get(path) or _Draft("other", tuple(model.state_dict(keep_vars=True)[path].shape))
        if path in generic and not draft.roles:
            draft.roles = {"embedding" if draft.kind == "embedding" else "conv" if draft.kind == "conv2d" else "linear"}
        shape = draft.shape or _weight_shape(model.get_submodule(path))
        block = _innermost(path, paths)
        ordered = tuple(role for role in ROLES if role in draft.roles)
        stored = (entry.parameters, draft.flops, entry.bytes)
        tied = (entry.tied, entry.tied_parameters, entry.tied_bytes)
        sites.append(Site(path, ordered, draft.kind, block, shape, *stored, *tied))
    loose, inside = _split_flops(draught.product_flops, paths)
    blocks = [_block(model, index, path, draught.blocks[path], sites, inside[index]) for index, path in enumerate(paths)]
    unplaced = [path for path in ledger.entries if path in generic]
    return Anatomy(
        type(model).__name__, tuple(sites), tuple(blocks), draught.joins, tuple(unplaced), loose, tuple(given)
    )


def _weight_shape(module: nn.Module) -> tuple[int, ...]:
    weight = getattr(getattr(module, "quantized_weight", None), "shape", None)
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
