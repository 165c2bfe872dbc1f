"""Attention: cores (scaled_dot_product_attention, products around a softmax, linear attention) and the weights around them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from compress.anatomy.flow import Flow, members
from compress.anatomy.joins import find_joins, rejoins

__all__ = ["Attention", "find_attention"]

_FUSED = "scaled_dot_product_attention"
_SOFTMAX = frozenset({"softmax", "_softmax", "special_softmax"})


@dataclass(frozen=True)
class _Core:
    """Where queries, keys and values meet; each operand is a step. ``steps`` are the products, the last one gives values.

    ``contracted`` is the size that queries and keys are summed over; 0 where they only weigh each other.
    """

    steps: tuple[int, ...]
    query: int | None
    key: int | None
    value: int
    contracted: int


@dataclass(frozen=True)
class Attention:
    """One attention: projections (steps of the graph) by role, heads, and the operations of its core."""

    roles: dict[str, tuple[int, ...]]
    core: tuple[int, ...]
    heads: int | None
    kv_heads: int | None
    head_dim: int | None

    @property
    def projections(self) -> list[int]:
        return sorted({index for indices in self.roles.values() for index in indices})

    def joined(self, other: Attention) -> Attention:
        """This attention with the heads of another that shares a projection with it."""
        roles = {role: tuple(sorted({*indices, *other.roles[role]})) for role, indices in self.roles.items()}
        core = tuple(sorted({*self.core, *other.core}))
        if self.head_dim is None or other.head_dim is None:
            known = other if self.head_dim is None else self
            return Attention(roles, core, known.heads, known.kv_heads, known.head_dim)
        heads, kv_heads = (self.heads or 0) + (other.heads or 0), (self.kv_heads or 0) + (other.kv_heads or 0)
        return Attention(roles, core, heads, kv_heads, self.head_dim)


def find_attention(flow: Flow) -> tuple[list[Attention], set[int]]:
    """All attentions in order of the graph, and the residual joins (which end the search for their weights)."""
    cores = _cores(flow)
    inside = {index for core in cores for index in _inside(flow, core)}
    joins = find_joins(flow, inside)
    ends = joins | {core.steps[-1] for core in cores}
    found = [_attention(flow, core, ends) for core in cores]
    within = {index for attention in found for index in _between(flow, attention)}
    return found, joins - within


def _between(flow: Flow, attention: Attention) -> Iterator[int]:
    """The steps from the queries to the output projection: an add there (MViT adds queries to values) is no join."""
    starts, ends = 0, 0
    for index in attention.roles["attention.query"]:
        starts |= flow.after[index]
    for index in attention.roles["attention.out"]:
        ends |= flow.before[index]
    return members(starts & ends)


def _inside(flow: Flow, core: _Core) -> Iterator[int]:
    """The steps between the products of a core."""
    return members(flow.after[core.steps[0]] & flow.before[core.steps[-1]])


def _cores(flow: Flow) -> list[_Core]:
    cores = [_fused(flow, step.index) for step in flow.steps if step.op == _FUSED and step.live]
    claimed = {index for core in cores for index in core.steps}
    for step in flow.steps:
        if step.op in _SOFTMAX and step.live:
            core = _around_softmax(flow, step.index)
            if core and not claimed & set(core.steps):
                cores.append(core)
                claimed |= set(core.steps)
    cores += _linear(flow, claimed)
    return sorted(cores, key=lambda core: core.steps[-1])


def _fused(flow: Flow, index: int) -> _Core:
    query, key, value = (argument.index for argument in flow.steps[index].arguments[:3])
    return _Core((index,), query, key, value, flow.steps[query].shape[-1])


def _around_softmax(flow: Flow, softmax: int) -> _Core | None:
    passable = _passes(flow)
    scores = flow.backward(softmax, lambda index: index in flow.products or not passable(index))
    fitting = [i for i in scores if i in flow.products and flow.numel(i) <= flow.numel(softmax) * 2]
    fitting.sort(key=lambda i: (sum(not flow.steps[o].live for o in flow.operands(i)), i))
    mixed = [
        index
        for index in flow.forward(softmax, lambda index: index in flow.products or not passable(index))
        if index in flow.products and _other_operand(flow, index, softmax) is not None
    ]
    if not mixed:
        return _weighted_sum(flow, softmax) if not fitting else None
    value = _other_operand(flow, mixed[0], softmax)
    if value is None:
        return None
    if not fitting:
        # A softmax straight over a projection: its product may be the first half of a linear attention (CoAT), found later.
        onward = flow.forward(mixed[0], lambda index: index in flow.products or not passable(index))
        linear = any(index in flow.products for index in onward)
        return None if linear else _Core((mixed[0],), None, None, value, flow.steps[value].shape[-1])
    query, key = flow.operands(fitting[0])
    return _Core((fitting[0], mixed[0]), query, key, value, _contracted(flow, fitting[0]))


def _passes(flow: Flow) -> Callable[[int], bool]:
    """Between the scores and the values only projections over heads may lie (talking heads): they keep the shape."""

    def passable(index: int) -> bool:
        if index in flow.projections:
            weight = flow.projections[index]
            return weight.pointwise and flow.steps[flow.data(index)].shape == flow.steps[index].shape
        return index not in flow.norms or flow.steps[index].op == "batch_norm"

    return passable


def _other_operand(flow: Flow, product: int, softmax: int) -> int | None:
    """The operand of a product that does not come from the softmax, where the other one does."""
    left, right = flow.operands(product)
    from_softmax = [bool((flow.before[side] | 1 << side) >> softmax & 1) for side in (left, right)]
    if from_softmax == [True, False]:
        return right
    return left if from_softmax == [False, True] else None


def _weighted_sum(flow: Flow, softmax: int) -> _Core | None:
    """Separable attention (MobileViTV2): softmax scores weigh the keys, their sum multiplies the values."""

    def is_gate(index: int) -> bool:
        step = flow.steps[index]
        return step.op == "mul" and sum(flow.steps[source].live for source in step.inputs) == 2

    def stop(index: int) -> bool:
        return is_gate(index) or index in flow.projections or index in flow.products

    def partner(index: int, origin: int) -> int | None:
        others = [s for s in flow.steps[index].inputs if s != origin and not flow.before[s] >> origin & 1]
        return others[0] if len(others) == 1 else None

    weighted = [index for index in flow.forward(softmax, stop) if is_gate(index)]
    for first in weighted:
        key = partner(first, softmax)
        for second in (index for index in flow.forward(first, stop) if is_gate(index)):
            value = partner(second, first)
            summed = any(flow.steps[i].op == "sum" for i in range(first, second) if flow.before[i] >> first & 1)
            if key is not None and value is not None and summed:
                return _Core((first, second), flow.steps[softmax].inputs[0], key, value, 0)
    return None


def _linear(flow: Flow, claimed: set[int]) -> list[_Core]:
    """Linear attention: keys and values are multiplied first, then queries with the result, and no softmax in between.

    Keys are the operand whose channels the second product sums over (Katharopoulos et al. 2020, arXiv 2006.16236, eq. 5).
    """
    found: list[_Core] = []
    for first in sorted(flow.products - claimed):
        if first in claimed or not all(flow.steps[operand].live for operand in flow.operands(first)):
            continue

        def stop(index: int) -> bool:
            return index in flow.products or index in flow.projections or flow.steps[index].op in _SOFTMAX

        seconds = [index for index in flow.forward(first, stop) if index in flow.products and index not in claimed]
        for second in seconds[:1]:
            left, right = flow.operands(second)
            from_first = [bool((flow.before[side] | 1 << side) >> first & 1) for side in (left, right)]
            if from_first not in ([True, False], [False, True]):
                continue
            one, other = flow.operands(first)
            key, value = (one, other) if from_first[1] else (other, one)
            query = left if from_first[1] else right
            found.append(_Core((first, second), query, key, value, _contracted(flow, second)))
            claimed |= {first, second}
    return found


def _contracted(flow: Flow, product: int) -> int:
    """The size that a product sums over."""
    step = flow.steps[product]
    left = flow.operands(product)[0]
    if step.op != "einsum":
        return flow.steps[left].shape[-1]
    given, _, kept = step.arguments[0].replace(" ", "").partition("->")
    gone = [letter for letter in given.split(",")[0] if letter not in kept]
    return flow.steps[left].shape[given.index(gone[0])] if gone else 0


def _attention(flow: Flow, core: _Core, ends: set[int]) -> Attention:
    roles = {
        f"attention.{name}": tuple(flow.backward_projections(operand, ends)) if operand is not None else ()
        for name, operand in (("query", core.query), ("key", core.key), ("value", core.value))
    }
    inputs = [index for indices in roles.values() for index in indices]
    around = {index for index in ends if index in core.steps or rejoins(flow, index, [*inputs, core.steps[-1]])}
    cores = {index for index in ends if flow.steps[index].op != "add"}
    roles["attention.out"] = tuple(_projections_after(flow, core.steps[-1], around | cores))
    heads, kv_heads, head_dim = _heads(flow, core, roles)
    return Attention(roles, core.steps, heads, kv_heads, head_dim)


def _projections_after(flow: Flow, core: int, ends: set[int]) -> list[int]:
    def stop(index: int) -> bool:
        return index in ends or index in flow.products or index in flow.projections

    reached = [index for index in flow.forward(core, stop) if index in flow.projections and index not in ends]
    through = [index for index in reached if flow.projections[index].groups > 1]
    further = [later for index in through for later in _projections_after(flow, index, ends)]
    return sorted({index for index in reached if index not in through} | set(further)) or reached


def _heads(flow: Flow, core: _Core, roles: dict[str, tuple[int, ...]]) -> tuple[int | None, int | None, int | None]:
    """Heads, heads of keys and values, and channels of one head, from the shapes at the core."""
    if core.query is None or core.key is None:
        return None, None, None
    if not core.contracted:
        return 1, 1, _outputs(flow, roles["attention.key"]) // 2 or None
    shape, width = flow.steps[core.query].shape, core.contracted
    queries, keys, values = (roles[f"attention.{name}"] for name in ("query", "key", "value"))
    outputs = _outputs(flow, queries) // (3 if queries == keys == values else 1)
    heads = shape[-3] if len(shape) == 4 else max(outputs // max(width, 1), 1)
    if flow.steps[core.steps[0]].op == "einsum":
        heads = _einsum_heads(flow, core.steps[0])
    if outputs and heads * width != outputs and len(shape) == 4 and heads * shape[-2] == outputs:
        width = shape[-2]
    return heads, _kv_heads(flow, core, roles, heads, width), width


def _einsum_heads(flow: Flow, product: int) -> int:
    """The size of the last letter that both factors and the result of an einsum share; the first is the batch."""
    step = flow.steps[product]
    given, _, kept = step.arguments[0].replace(" ", "").partition("->")
    left, right = given.split(",")
    shared = [letter for letter in left if letter in right and letter in kept]
    return flow.steps[flow.operands(product)[0]].shape[left.index(shared[-1])] if len(shared) > 1 else 1


def _kv_heads(flow: Flow, core: _Core, roles: dict[str, tuple[int, ...]], heads: int, width: int) -> int:
    """From the outputs of the projections: keys alone, keys with values, or all three in one."""
    queries, keys, values = (roles[f"attention.{name}"] for name in ("query", "key", "value"))
    outputs = _outputs(flow, keys)
    if keys == values:
        outputs -= heads * width if queries == keys else 0
        value_width = flow.steps[core.value].shape[-1]
        count = outputs / (width + value_width)
    else:
        count = outputs / width
    return int(count) if count and count == int(count) and heads % count == 0 else heads


def _outputs(flow: Flow, projections: tuple[int, ...]) -> int:
    """Output channels of the first projection."""
    if not projections:
        return 0
    weight = flow.projections[projections[0]]
    return weight.shape[1] if weight.kind == "conv1d" else weight.shape[0]
