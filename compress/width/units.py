"""The parts of a block that can be taken out one by one: attention heads and neurons of an MLP.

Which rows of which weights belong to a head is read from gradients, not from names: a head owns a row of the query, key or
value projection when its own slice of the output projection's input depends on it. So fused and interleaved projections,
grouped queries and gated MLPs need no table of layouts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from calibrate.capture import Enough
from calibrate.modes import modes_kept
from calibrate.signature import Batch, Signature
from compress.anatomy import Anatomy, Block, Site

__all__ = ["Units", "Unseparable", "find_units", "masked"]

Kind = Literal["head", "neuron"]
_PROBES = 5


@dataclass(frozen=True)
class Units:
    """The heads, or the neurons, of one block.

    A unit is the least that can go on its own: with grouped-query attention the query heads that share keys and values.

    Attributes:
        block: index of the block.
        kind: ``head`` or ``neuron``.
        sink: module path of the projection that reads the units (attention.out, mlp.down).
        columns: inputs of the sink that each unit feeds, [units, c].
        rows: outputs that each unit owns in each layer that makes it, by module path, [units, r].
        heads: query heads in one unit (0 for neurons).
        flops: 2 * multiply-accumulates that one unit costs for one row of the batch.
    """

    block: int
    kind: Kind
    sink: str
    columns: Tensor
    rows: dict[str, Tensor]
    heads: int
    flops: float

    def __len__(self) -> int:
        return int(self.columns.shape[0])


@dataclass(frozen=True)
class Unseparable:
    """Why the heads or neurons of a block cannot be told apart."""

    block: int
    kind: Kind
    reason: str


def find_units(model: nn.Module, signature: Signature, anatomy: Anatomy, example: Batch) -> list[Units | Unseparable]:
    """Heads and neurons of every block, in the model's order; a block without attention or MLP has none.

    Args:
        example: a few rows; two suffice.
    """
    plans = [plan for block in anatomy.blocks for plan in _plans(model, block)]
    wanted = [plan for plan in plans if isinstance(plan, _Plan)]
    with modes_kept(model), torch.enable_grad(), _watched(model, wanted) as seen:
        with suppress(Enough):
            signature.call(model.eval(), {name: value[:2] for name, value in example.items()})
        return [plan if isinstance(plan, Unseparable) else _read(plan, seen) for plan in plans]


@contextmanager
def masked(model: nn.Module, units: Units, gone: Sequence[int]) -> Iterator[nn.Module]:
    """The model with the given units switched off: what they feed to the sink is zero."""
    columns = units.columns[list(gone)].flatten()

    def off(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        x = inputs[0].clone()
        x[_at(x, module, columns)] = 0
        return (x, *inputs[1:])

    handle = model.get_submodule(units.sink).register_forward_pre_hook(off)
    try:
        yield model
    finally:
        handle.remove()


def _at(x: Tensor, sink: nn.Module, columns: Tensor) -> tuple[Any, ...]:
    """The index of input channels of a sink: of a convolution along the second axis, else along the last."""
    return (slice(None), columns) if isinstance(sink, nn.Conv2d) else (..., columns)


@dataclass(frozen=True)
class _Plan:
    block: Block
    kind: Kind
    sources: tuple[Site, ...]
    sink: Site
    between: tuple[str, ...]
    axes: dict[str, int]


def _plans(model: nn.Module, block: Block) -> Iterator[_Plan | Unseparable]:
    parts: tuple[tuple[Kind, str, str], ...] = (("head", "attention.", "attention.out"), ("neuron", "mlp.", "mlp.down"))
    for kind, prefix, last in parts:
        sites = [site for site in block.sites if any(role.startswith(prefix) for role in site.roles)]
        if not sites:
            continue
        sinks = [site for site in sites if last in site.roles]
        sources = tuple(site for site in sites if last not in site.roles)
        reason = _obstacle(model, block, kind, sinks, sources)
        if reason:
            yield Unseparable(block.index, kind, reason)
        else:
            known = {site.path for site in sites}
            between = [path for path in _weighted(model, block.path) if path not in known]
            axes = {path: _channel_axis(model.get_submodule(path)) for path in (*known, *between)}
            yield _Plan(block, kind, sources, sinks[0], tuple(between), axes)


def _obstacle(model: nn.Module, block: Block, kind: Kind, sinks: list[Site], sources: tuple[Site, ...]) -> str | None:
    if len(sinks) != 1:
        return f"it has {len(sinks)} layers that end its {'attention' if kind == 'head' else 'MLP'}"
    if not sources:
        return "no layer was found that makes them"
    if kind == "head" and not (block.heads and block.head_dim):
        return "its heads were not found"
    if kind == "head" and block.heads == 1:
        return "it has one head only"
    for site in (*sinks, *sources):
        if site.kind not in ("linear", "conv1d", "conv2d"):
            return f"{site.path} is a {site.kind}"
        if site.tied is not None:
            return f"{site.path} shares its weight with {site.tied}"
        if not isinstance(getattr(model.get_submodule(site.path), "weight", None), nn.Parameter):
            return f"{site.path} is quantized already"
    return None


def _channel_axis(module: nn.Module) -> int:
    return 1 if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.BatchNorm1d, nn.BatchNorm2d, nn.GroupNorm)) else -1


def _weighted(model: nn.Module, path: str) -> list[str]:
    """Modules below ``path`` that own parameters or running statistics."""
    return [
        f"{path}.{name}" if path else name
        for name, module in model.get_submodule(path).named_modules()
        if name and (module._parameters or module._buffers)
    ]


@contextmanager
def _watched(model: nn.Module, plans: list[_Plan]) -> Iterator[dict[str, Tensor]]:
    """Outputs of the sources and of what lies between, and inputs of the sinks, by module path, as the model runs."""
    seen: dict[str, Tensor] = {}
    sinks = {plan.sink.path for plan in plans}
    handles = []

    def source(path: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> Any:
            seen[path] = output.detach().requires_grad_()
            return seen[path].clone()  # what follows may work in place

        return hook

    def carrier(path: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.requires_grad:
                seen[path] = output

        return hook

    def sink(path: str) -> Any:
        def hook(module: nn.Module, inputs: Any) -> None:
            seen[f"{path} in"] = inputs[0]
            if all(f"{other} in" in seen for other in sinks):
                raise Enough

        return hook

    for plan in plans:
        handles += [model.get_submodule(site.path).register_forward_hook(source(site.path)) for site in plan.sources]
        handles += [model.get_submodule(path).register_forward_hook(carrier(path)) for path in plan.between]
        handles.append(model.get_submodule(plan.sink.path).register_forward_pre_hook(sink(plan.sink.path)))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _read(plan: _Plan, seen: dict[str, Tensor]) -> Units | Unseparable:
    fed = seen.get(f"{plan.sink.path} in")
    layers = [site.path for site in plan.sources] + [path for path in plan.between if path in seen]
    if fed is None or not fed.requires_grad or any(site.path not in seen for site in plan.sources):
        return Unseparable(plan.block.index, plan.kind, "the model does not run through all of its layers")
    probe = _Probe(fed, plan.sink.kind, {path: seen[path] for path in layers}, plan.axes)
    found = _heads(plan, probe) if plan.kind == "head" else _neurons(plan, probe)
    return Unseparable(plan.block.index, plan.kind, found) if isinstance(found, str) else found


@dataclass(frozen=True)
class _Probe:
    """Asks which channels of each layer a set of the sink's inputs depends on."""

    fed: Tensor
    sink_kind: str
    outputs: dict[str, Tensor]
    axes: dict[str, int]

    @property
    def width(self) -> int:
        return int(self.fed.shape[1 if self.sink_kind == "conv2d" else -1])

    def __call__(self, columns: Sequence[int]) -> dict[str, Tensor]:
        part = self.fed.index_select(1 if self.sink_kind == "conv2d" else -1, torch.tensor(list(columns)))
        weights = torch.randn(part.shape, generator=torch.Generator().manual_seed(0))
        gradients = torch.autograd.grad((part * weights).sum(), list(self.outputs.values()), retain_graph=True, allow_unused=True)
        return {
            path: torch.zeros(0, dtype=torch.long) if gradient is None else self._touched(gradient, self.axes[path])
            for path, gradient in zip(self.outputs, gradients, strict=True)
        }

    @staticmethod
    def _touched(gradient: Tensor, axis: int) -> Tensor:
        return gradient.transpose(axis, -1).reshape(-1, gradient.shape[axis]).ne(0).any(0).nonzero().flatten()


def _heads(plan: _Plan, probe: _Probe) -> Units | str:
    heads = plan.block.heads or 1
    if probe.width % heads:
        return f"{probe.width} inputs of {plan.sink.path} do not divide into {heads} heads"
    each = probe.width // heads
    columns = [list(range(head * each, (head + 1) * each)) for head in range(heads)]
    owned = [probe(part) for part in columns]
    sources = [site.path for site in plan.sources]
    groups = _sharing(owned, sources)
    if len(groups) == 1:
        return "all of them depend on the same rows (one norm over all heads, or keys and values that all share)"
    if len({len(group) for group in groups}) > 1:
        return "they share keys and values unevenly"
    rows: dict[str, Tensor] = {}
    for path in probe.outputs:
        found = [_sorted(torch.cat([owned[head][path] for head in group])) for group in groups]
        if path not in sources and all(part.equal(found[0]) for part in found):
            continue  # the same for all heads, such as a norm over the channels of one head
        if len({part.numel() for part in found}) > 1 or not found[0].numel():
            return f"they own different numbers of rows of {path}"
        rows[path] = torch.stack(found)
        if _sorted(rows[path].flatten()).numel() < rows[path].numel():
            return f"{path} mixes them"
    cost = _cost(plan, rows) + plan.block.attention_flops / len(groups)
    merged = torch.tensor([[column for head in group for column in columns[head]] for group in groups])
    return Units(plan.block.index, "head", plan.sink.path, merged, rows, len(groups[0]), cost)


def _sharing(owned: list[dict[str, Tensor]], sources: list[str]) -> list[list[int]]:
    """Heads that own a row together, in one group; groups in the order of their first head."""
    groups: list[list[int]] = []
    taken: list[set[tuple[str, int]]] = []
    for head, rows in enumerate(owned):
        mine = {(path, int(row)) for path in sources for row in rows[path]}
        together = [at for at, others in enumerate(taken) if others & mine]
        for at in reversed(together[1:]):
            groups[together[0]] += groups.pop(at)
            taken[together[0]] |= taken.pop(at)
        if together:
            groups[together[0]].append(head)
            taken[together[0]] |= mine
        else:
            groups.append([head])
            taken.append(mine)
    return [sorted(group) for group in groups]


def _neurons(plan: _Plan, probe: _Probe) -> Units | str:
    """Neuron j of the sink's input against rows j, or j and j + width, or 2j and 2j + 1 of each layer before it."""
    width = probe.width
    asked = sorted({0, 1, width // 2, width - 2, width - 1} & set(range(width)))[:_PROBES]
    answers = {column: probe([column]) for column in asked}
    rows: dict[str, Tensor] = {}
    every = torch.arange(width).unsqueeze(1)
    layouts = (every, torch.cat([every, every + width], 1), torch.cat([2 * every, 2 * every + 1], 1), every + width)
    for path in probe.outputs:
        if not any(answers[column][path].numel() for column in asked):
            continue
        layout = next((at for at in layouts if all(answers[j][path].equal(at[j]) for j in asked)), None)
        if layout is None:
            return f"{path} mixes them"
        rows[path] = layout
    if any(site.path not in rows for site in plan.sources):
        return "the layers that make them are not all read by the one that ends the MLP"
    return Units(plan.block.index, "neuron", plan.sink.path, every, rows, 0, _cost(plan, rows))


def _cost(plan: _Plan, rows: dict[str, Tensor]) -> float:
    """FLOPs of one unit in the layers that make it and in the one that reads it; what lies between is left out."""
    units = next(iter(rows.values())).shape[0]
    made = sum(site.flops * rows[site.path].shape[1] / site.shape[1 if site.kind == "conv1d" else 0] for site in plan.sources)
    return made + plan.sink.flops / units


def _sorted(indices: Tensor) -> Tensor:
    """Each index once, in order."""
    return torch.tensor(sorted(set(indices.tolist())), dtype=torch.long)
