"""The axes of a transformer's weights: which dimension of which parameter counts the channels of the residual stream, the units
of a head, the neurons of an MLP. Two dimensions on one axis can only be put in another order together.

What the roles say is not believed but proved: every axis is put in a random order, and the function may not change.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor, nn

from calibrate.errors import UserError
from calibrate.fidelity import sqnr_db
from calibrate.modes import evaluating
from calibrate.signature import Batch, Signature
from compress.anatomy import Anatomy, Block, Site
from compress.layers import is_quantized
from compress.layers.conversion import is_conv1d
from compress.rehearsal import stand_in

__all__ = ["SAME_DB", "Axis", "Layout", "Piece", "layout_of", "proved", "random_orders", "reordered", "with_parameters"]

Side = Literal["out", "in"]
Kind = Literal["stream", "branch", "query_key", "value", "neurons", "features"]
SAME_DB = 80.0
"""Least agreement of a model whose axes are in another order: float32 sums in another order differ by 100 dB or more."""


@dataclass(frozen=True)
class Axis:
    """One set of units.

    Attributes:
        kind: ``stream`` and ``branch`` are the residual stream before a join and what is added to it there: all of them are one
            axis, of which a plan may differ from place to place. ``features`` are made by a layer behind the blocks (a pooler).
        heads: into which it parts; 1: none.
        block: index of the block, of those that are in one.
        ordered: units inside a head have an order of their own (rotary positions), so that only heads can move.
    """

    name: str
    kind: Kind
    size: int
    heads: int = 1
    block: int | None = None
    ordered: bool = False


@dataclass(frozen=True)
class Piece:
    """A run of one dimension of a parameter: the units of an axis, that the layer gives (``out``) or reads (``in``)."""

    axis: str
    start: int
    size: int
    side: Side


@dataclass
class Layout:
    """The axes of a model.

    Attributes:
        uses: parameter name -> dimension -> its pieces, which cover it; other dimensions are fixed (classes, tokens, pixels).
        made: for each axis the outputs that hold its units: module path and piece.
        sinks: paths of the layers whose outputs are added to the stream, in the order in which they run.
        output: whether the model's output is the stream itself.
        left: parameters that take no part, and why.
        scales: modules that scale what a branch gives before it is added (LayerScale): they have the axis of the stream.
    """

    axes: dict[str, Axis] = field(default_factory=dict)
    uses: dict[str, dict[int, tuple[Piece, ...]]] = field(default_factory=dict)
    made: dict[str, list[tuple[str, Piece]]] = field(default_factory=dict)
    sinks: list[str] = field(default_factory=list)
    output: bool = False
    left: dict[str, str] = field(default_factory=dict)
    scales: list[str] = field(default_factory=list)

    @property
    def width(self) -> int:
        return self.axes["stream.0"].size

    def of_block(self, index: int, kind: Kind) -> Axis | None:
        return next((axis for axis in self.axes.values() if axis.block == index and axis.kind == kind), None)


def layout_of(model: nn.Module, anatomy: Anatomy, where: str) -> Layout:
    """The axes of a model by its roles, proved on the two rows that it was traced with.

    Args:
        where: what errors call the model.

    Raises:
        UserError: a part has no role or has one that this cannot be done with, or another order changes the function.
    """
    signature, example = anatomy.traced
    found = _Reading(model, anatomy, where).layout()
    if proved(model, signature, example, found):
        return found
    rotary = {name: replace(axis, ordered=True) if axis.kind == "query_key" else axis for name, axis in found.axes.items()}
    ordered = replace(found, axes=rotary)
    if proved(model, signature, example, ordered):
        return ordered
    what = "with its heads, neurons and channels in another order it computes something else, so they cannot be matched"
    raise UserError(where, what, "Plain encoders can be fused: ViT, DeiT, BERT, RoBERTa, DistilBERT and the like.")


class _Reading:
    """Walks through the layers in the order in which they run; ``place`` counts the joins that were passed."""

    def __init__(self, model: nn.Module, anatomy: Anatomy, where: str) -> None:
        self.model, self.anatomy, self.where = model, anatomy, where
        self.names = {id(one): name for name, one in model.named_parameters()}
        self.found = Layout()
        self.place = 0
        self.current = ""
        """The axis of what a layer behind the blocks made; empty: the stream."""

    def layout(self) -> Layout:
        found, sites = self.found, {site.path: site for site in self.anatomy.sites}
        self._check()
        calls = _calls(self.model, *self.anatomy.traced)
        behind = self._behind(calls, sites)
        self._axis("stream.0", "stream", self._width())
        for previous, path in zip(["", *calls], calls, strict=False):
            site = sites.get(path)
            if site is None or site.kind == "other":
                self._loose(path, previous)
            elif site.kind == "norm":
                self._norm(path)
            elif site.block is None:
                self._outside(path, behind)
            else:
                self._inside(site, self.anatomy.blocks[site.block])
        for name, _ in self.model.named_parameters():
            if name.rpartition(".")[0] not in calls:
                found.left[name] = "the model does not run it"
        signature = self.anatomy.traced[0]
        found.output = not behind or signature.output in ("last_hidden_state", "mean_pooling")
        return found

    def _check(self) -> None:
        blocks = self.anatomy.blocks
        if not blocks:
            raise UserError(self.where, "no blocks were found in it", "See what was found with: compress inspect.")
        if any(is_quantized(module) for module in self.model.modules()):
            raise UserError(self.where, "it is quantized, and codes cannot be averaged", "Put fuse_models before quantize.")
        for block in blocks:
            missing = [role for role in ("attention.query", "attention.key", "attention.value", "attention.out", "mlp.up",
                                         "mlp.down") if role not in block.roles]  # fmt: skip
            if missing:
                what = f"{block.path or 'its block'} has no {missing[0]}"
                raise UserError(self.where, what, "Name it under model.roles, if it has one; see: compress inspect.")
            if block.kv_heads != block.heads:
                what = f"{block.path}: {block.heads} heads of queries share {block.kv_heads} of keys and values"
                raise UserError(self.where, what, "Models with grouped queries cannot be fused.")

    def _width(self) -> int:
        widths = {_sizes(self.model.get_submodule(path))[0]: path for b in self.anatomy.blocks for path in _sinks(b)}
        if len(widths) > 1:
            told = " and ".join(f"{path} gives {width}" for width, path in widths.items())
            raise UserError(self.where, f"its residual stream changes its width: {told}", "Models of one width can be fused.")
        return next(iter(widths))

    def _behind(self, calls: list[str], sites: Mapping[str, Site]) -> list[str]:
        """Linear layers behind the blocks, in order; the last gives the output."""
        last = max((calls.index(path) for block in self.anatomy.blocks for path in _sinks(block) if path in calls), default=0)
        linear = ("linear", "conv1d")
        return [path for path in calls[last:] if path in sites and sites[path].block is None and sites[path].kind in linear]

    def _axis(self, name: str, kind: Kind, size: int, block: int | None = None, heads: int = 1) -> str:
        self.found.axes.setdefault(name, Axis(name, kind, size, heads, block))
        return name

    def _stream(self) -> str:
        return self.current or self._axis(f"stream.{self.place}", "stream", self.found.width)

    def _use(self, tensor: Tensor | None, dim: int, pieces: list[Piece]) -> None:
        if tensor is not None:
            self.found.uses.setdefault(self.names[id(tensor)], {}).setdefault(dim, tuple(pieces))

    def _gives(self, path: str, axes: list[str]) -> None:
        """The outputs of a layer are the units of these axes, one after the other."""
        module, start = self.model.get_submodule(path), 0
        pieces = []
        for axis in axes:
            pieces.append(Piece(axis, start, self.found.axes[axis].size, "out"))
            start += self.found.axes[axis].size
            self.found.made.setdefault(axis, []).append((path, pieces[-1]))
        if start != _sizes(module)[0]:
            what = f"{path} gives {_sizes(module)[0]} numbers, where {start} are read"
            raise UserError(self.where, what, "This layout is not known; see: compress inspect.")
        self._use(module._parameters["weight"], 1 if is_conv1d(module) else 0, pieces)
        self._use(module._parameters.get("bias"), 0, pieces)

    def _reads(self, path: str, axis: str) -> None:
        module = self.model.get_submodule(path)
        inputs, size = _sizes(module)[1], self.found.axes[axis].size
        if inputs % size == 0:  # twice as many where a head reads two tokens side by side
            pieces = [Piece(axis, start, size, "in") for start in range(0, inputs, size)]
            self._use(module._parameters["weight"], 0 if is_conv1d(module) else 1, pieces)

    def _piece(self, axis: str, side: Side) -> Piece:
        return Piece(axis, 0, self.found.axes[axis].size, side)

    def _loose(self, path: str, previous: str) -> None:
        """Tables and tokens that no layer owns: their last dimension counts the channels of the stream. A vector that runs next
        after a layer that ends a branch, or is owned by a module around such a layer, may scale the branch."""
        sinks = [sink for block in self.anatomy.blocks for sink in _sinks(block)]
        inside = any(path == block.path or path.startswith(f"{block.path}.") for block in self.anatomy.blocks if block.path)
        ends = previous in sinks or (inside and any(sink.startswith(f"{path}.") for sink in sinks))
        for tensor in self.model.get_submodule(path)._parameters.values():
            if tensor is not None and tensor.dim() and tensor.shape[-1] == self.found.width:
                self._use(tensor, tensor.dim() - 1, [self._piece(self._stream(), "out")])
                if ends and tensor.numel() == self.found.width:
                    self.found.scales.append(path)

    def _norm(self, path: str) -> None:
        axis = self._stream()
        for tensor in self.model.get_submodule(path)._parameters.values():
            if tensor is not None and tensor.shape == (self.found.axes[axis].size,):
                self._use(tensor, 0, [self._piece(axis, "out")])

    def _outside(self, path: str, behind: list[str]) -> None:
        module = self.model.get_submodule(path)
        weight = module._parameters.get("weight")
        if path in behind:
            self._reads(path, self._stream())
            after = [self.model.get_submodule(following) for following in behind[behind.index(path) + 1 :]]
            if not after or _sizes(after[0])[1] != _sizes(module)[0]:
                return  # it gives the output, or one part of it
            tied = self.names[id(after[0]._parameters["weight"])] in self.found.uses
            self.current = self._stream() if tied else self._axis(path, "features", _sizes(module)[0])
            self._gives(path, [self.current])
        elif weight is not None and isinstance(module, nn.Embedding):
            if weight.shape[1] != self.found.width:
                what = f"{path} is {weight.shape[1]} wide, and is projected to the {self.found.width} channels of the stream"
                raise UserError(self.where, what, "Models with factorized embeddings cannot be fused.")
            self._use(weight, 1, [self._piece(self._stream(), "out")])
        elif weight is not None and _sizes(module)[0] == self.found.width:
            self._gives(path, [self._stream()])

    def _inside(self, site: Site, block: Block) -> None:
        roles, module, index = set(site.roles), self.model.get_submodule(site.path), block.index
        if roles & {"attention.out", "mlp.down"}:
            reads = f"value.{index}" if "attention.out" in roles else f"neurons.{index}"
            if reads in self.found.axes:
                self._reads(site.path, reads)
            self.found.sinks.append(site.path)
            self.place += 1
            self._gives(site.path, [self._axis(f"branch.{self.place}", "branch", self.found.width)])
            return
        self._reads(site.path, self._stream())
        outputs = _sizes(module)[0]
        if parts := [role for role in ("attention.query", "attention.key", "attention.value") if role in roles]:
            value = _sizes(self.model.get_submodule(block.roles["attention.out"][0]))[1]
            if "attention.value" in parts:
                self._axis(f"value.{index}", "value", value, index, block.heads or 1)
            others = len(parts) - ("attention.value" in parts)
            each = (outputs - value * ("attention.value" in parts)) // max(others, 1)
            if others:
                self._axis(f"query_key.{index}", "query_key", each, index, block.heads or 1)
            self._gives(site.path, [f"{'value' if role.endswith('value') else 'query_key'}.{index}" for role in parts])
        elif roles & {"mlp.up", "mlp.gate"}:
            hidden = _sizes(self.model.get_submodule(block.roles["mlp.down"][0]))[1]
            axis = self._axis(f"neurons.{index}", "neurons", hidden, index)
            self._gives(site.path, [axis] * max(1, outputs // hidden))
        else:
            raise UserError(self.where, f"{site.path} has no part that is known", "Name it under model.roles.")


def _sinks(block: Block) -> list[str]:
    return [path for role in ("attention.out", "mlp.down") for path in block.roles.get(role, [])]


def _sizes(module: nn.Module) -> tuple[int, int]:
    """Outputs and inputs of a projection (a convolution's channels)."""
    shape = module.get_parameter("weight").shape
    return (int(shape[1]), int(shape[0])) if is_conv1d(module) else (int(shape[0]), int(shape[1]))


def _calls(model: nn.Module, signature: Signature, example: Batch) -> list[str]:
    """Paths of the modules that own parameters, in the order in which they first run."""
    order: dict[str, None] = {}
    handles = []
    for path, module in model.named_modules():
        if any(one is not None for one in module._parameters.values()):
            handles.append(module.register_forward_pre_hook(lambda m, a, p=path: order.setdefault(p)))
    try:
        with evaluating(model):
            signature.call(model, example)
    finally:
        for handle in handles:
            handle.remove()
    return list(order)


def proved(model: nn.Module, signature: Signature, example: Batch, layout: Layout) -> bool:
    """Whether a copy of the model with every axis in a random order computes the same."""
    orders = random_orders(layout)
    moved = {name: reordered(one.detach(), layout.uses.get(name, {}), orders) for name, one in model.named_parameters()}
    copy = with_parameters(model, moved)
    with evaluating(model):
        expected = signature.call(model, example)
    with evaluating(copy):
        found = signature.call(copy, example)
    if layout.output:
        expected = expected.index_select(-1, orders["stream.0"])
    return found.shape == expected.shape and not sqnr_db(expected, found) < SAME_DB


def with_parameters(model: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """A copy of a model, of the same buffers, with other parameters (by the names of ``named_parameters``); tied ones stay tied
    in value."""
    copy, names = stand_in(model), {id(tensor): name for name, tensor in model.named_parameters()}
    for module in copy.modules():
        for key, tensor in module._parameters.items():
            if tensor is not None:
                module._parameters[key] = nn.Parameter(tensors[names[id(tensor)]], requires_grad=False)
    return copy


def reordered(tensor: Tensor, dims: Mapping[int, tuple[Piece, ...]], orders: Mapping[str, Tensor]) -> Tensor:
    """A parameter whose units are in another order: unit ``orders[axis][i]`` comes to place i."""
    for dim, pieces in dims.items():
        chosen = torch.arange(tensor.shape[dim])
        for piece in pieces:
            chosen[piece.start : piece.start + piece.size] = piece.start + orders[piece.axis]
        tensor = tensor.index_select(dim, chosen)
    return tensor


def random_orders(layout: Layout, seed: int = 0) -> dict[str, Tensor]:
    """An order of the units of each axis that leaves the function alone: heads stay whole, the stream has one for all places."""
    generator = torch.Generator().manual_seed(seed)
    stream = torch.randperm(layout.width, generator=generator)
    heads: dict[int | None, Tensor] = {}
    orders = {}
    for name, axis in layout.axes.items():
        if axis.kind in ("stream", "branch"):
            orders[name] = stream
            continue
        each = axis.size // axis.heads
        if axis.block is None or axis.kind == "neurons":
            order = torch.zeros(1, dtype=torch.long)
        else:
            order = heads.setdefault(axis.block, torch.randperm(axis.heads, generator=generator))
        inside = [torch.arange(each) if axis.ordered else torch.randperm(each, generator=generator) for _ in range(axis.heads)]
        orders[name] = torch.cat([int(head) * each + units for head, units in zip(order, inside, strict=True)])
    return orders
