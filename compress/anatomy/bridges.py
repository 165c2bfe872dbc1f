"""Bridges of hybrids: where feature maps of convolutions become token sequences that attend to each other, and back."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from compress.anatomy.attention import Attention
from compress.anatomy.feedforward import FeedForward
from compress.anatomy.flow import Flow

__all__ = ["Bridge", "find_bridges"]

Crossing = Literal["into tokens", "into features", "through attention"]

_MOVES = frozenset(
    {"view", "reshape", "_unsafe_view", "permute", "transpose", "t", "mT", "numpy_T", "flatten", "unflatten", "movedim",
     "moveaxis", "swapaxes", "im2col", "col2im"}
)  # fmt: skip
"""Operations that can give positions of a feature map another place; those of channels leave the last two sizes alone."""


@dataclass(frozen=True)
class Bridge:
    """The layers on both sides of one boundary, with no other layer between them.

    Attributes:
        crossing: ``into tokens``: from a convolution to the layers of an attention (or a part of it) that read its features as
            tokens; ``into features``: from tokens to the convolution that reads them; ``through attention``: convolutions that
            make queries, keys and values, and the one that reads what attention gives.
        before, after: module paths, in the order of the graph.
    """

    crossing: Crossing
    before: tuple[str, ...]
    after: tuple[str, ...]

    @property
    def paths(self) -> tuple[str, ...]:
        return (*self.before, *self.after)


def find_bridges(flow: Flow, attentions: Sequence[Attention], feedforwards: Sequence[FeedForward]) -> list[Bridge]:
    """All bridges in the order of the graph: those that share a layer are one.

    A convolution that reads the model's input begins none: the patches of a plain vision transformer are no features.
    """
    layouts = _Layouts(flow, {index for attention in attentions for index in attention.core})
    inside = {index for attention in attentions for role, found in attention.roles.items() for index in found
              if role != "attention.out"}  # fmt: skip
    inside |= {index for part in feedforwards for role in ("mlp.up", "mlp.gate") for index in part.roles.get(role, ())}
    attending = {index for attention in attentions for index in attention.projections}
    found: list[tuple[Crossing, set[int], set[int]]] = []
    for index, (source, moved) in layouts.sources.items():
        if source is None or not moved:
            continue
        features = (source in layouts.features, index in layouts.features)
        if features == (True, False) and index in attending and flow.before[source] & flow.projection_bits:
            found.append(("into tokens", {source}, {index}))
        elif features == (False, True) and source not in inside and layouts.attended(index):
            found.append(("into features", {source}, {index}))
    for attention in attentions:
        outs = set(attention.roles["attention.out"])
        makers = set(attention.projections) - outs
        if makers <= layouts.features and outs <= layouts.features and makers and any(layouts.sources[o][1] for o in outs):
            found.append(("through attention", makers, outs))
    return [_named(flow, *one) for one in sorted(_joined(found), key=lambda one: min(one[1] | one[2]))]


class _Layouts:
    """Which projections give feature maps, and for each the nearest one before it.

    ``sources``: for each projection the latest one that it reads from, and whether positions are moved between the two.
    """

    def __init__(self, flow: Flow, cores: set[int]) -> None:
        self.flow, self.cores = flow, sum(1 << index for index in cores)
        self.features: set[int] = set()
        self.sources: dict[int, tuple[int | None, bool]] = {}
        homes: dict[int, tuple[int, ...]] = {}
        for index in sorted(flow.projections):
            source = self._source(index)
            moved = source is not None and self._moved(source, index)
            self.sources[index] = source, moved
            home = homes.get(source) if source is not None else None
            if self._gives_features(index, source, moved, home):
                self.features.add(index)
                homes[index] = flow.steps[index].shape[-2:]
            elif home is not None:
                homes[index] = home

    def attended(self, index: int) -> bool:
        """Whether an attention lies before a step."""
        return bool(self.flow.before[index] & self.cores)

    def _gives_features(self, index: int, source: int | None, moved: bool, home: tuple[int, ...] | None) -> bool:
        weight, shape = self.flow.projections[index], self.flow.steps[self.flow.data(index)].shape
        if weight.kind != "conv2d" or len(shape) != 4:
            return False
        if not weight.pointwise or source is None:
            return True
        if not moved:
            return source in self.features
        if source in self.features:
            between = self.flow.after[source] & self.flow.before[index] & self.cores
            return bool(between)
        return shape[-2:] == home

    def _source(self, index: int) -> int | None:
        """The latest projection before another, not counting those that give one number a channel (squeeze and excite)."""
        flow = self.flow
        nearest = flow.backward(flow.data(index), lambda step: step in flow.projections)
        shapes = {step: flow.steps[step].shape for step in nearest if step in flow.projections}
        wide = [step for step, shape in shapes.items() if len(shape) != 4 or shape[-2:] != (1, 1)]
        return max(wide, default=None)

    def _moved(self, source: int, index: int) -> bool:
        """Whether positions change their place on a way from one projection to the next."""
        flow, seen, queue = self.flow, {source}, [source]
        while queue:
            for user in flow.steps[queue.pop()].users:
                if user in seen or user in flow.projections or not flow.before[index] >> user & 1:
                    continue
                step = flow.steps[user]
                given = next((flow.steps[one].shape for one in step.inputs if flow.steps[one].live), ())
                if step.op in _MOVES and step.shape[-2:] != given[-2:]:
                    return True
                seen.add(user)
                queue.append(user)
        return False


def _joined(found: Iterable[tuple[Crossing, set[int], set[int]]]) -> list[tuple[Crossing, set[int], set[int]]]:
    """Crossings of one kind that share a layer, as one."""
    whole: list[tuple[Crossing, set[int], set[int]]] = []
    for crossing, before, after in found:
        alike = [one for one in whole if one[0] == crossing and (one[1] | one[2]) & (before | after)]
        for one in alike:
            before, after = before | one[1], after | one[2]
        whole = [one for one in whole if not any(one is other for other in alike)]
        whole.append((crossing, before, after))
    return whole


def _named(flow: Flow, crossing: Crossing, before: set[int], after: set[int]) -> Bridge:
    def paths(indices: set[int]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(flow.projections[index].path for index in sorted(indices)))

    return Bridge(crossing, paths(before), paths(after))
