"""Projections of one tensor that are one product: the layers that made them each give their part of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from compress.layers.plain import Linear

__all__ = ["Packed", "PackedPart"]


class _Last:
    """The tensor that was projected last, its parts, and which of them are still to be read; copies begin empty."""

    def __init__(self) -> None:
        self.held: tuple[Any, tuple[Tensor, ...], set[int]] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> _Last:
        return _Last()

    def __reduce__(self) -> tuple[type[_Last], tuple[()]]:
        return _Last, ()


class Packed(nn.Module):
    """One linear layer ``linear`` [sum(O), I] whose outputs are the parts one after the other.

    The parts of a tensor are computed at the first call with it and handed out to the calls after, each part once; nothing is
    kept when all are read. A part that is read twice, or of a tensor that was changed meanwhile, is computed anew.
    """

    def __init__(self, inputs: int, sizes: Sequence[int], bias: bool) -> None:
        super().__init__()
        self.sizes = tuple(sizes)
        self.linear = Linear(inputs, sum(sizes), bias)
        self._last = _Last()

    def part(self, x: Tensor, index: int) -> Tensor:
        """Part ``index`` [..., O] of the projection of x [..., I]."""
        key = (x, x._version if not x.is_inference() else 0, torch.is_grad_enabled())
        held = self._last.held
        if held is None or not _same(held[0], key) or index not in held[2]:
            held = (key, self(x), set(range(len(self.sizes))))
        held[2].discard(index)
        self._last.held = held if held[2] else None
        return held[1][index]

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """All parts; after heads were taken out each part has the share of what is left that it had before."""
        y, total = self.linear(x), sum(self.sizes)
        left = y.shape[-1]
        return torch.split(y, [left * size // total for size in self.sizes], -1)

    def extra_repr(self) -> str:
        return f"sizes={list(self.sizes)}"


class PackedPart(nn.Module):
    """Stands where one of the projections stood; all of them hold the same ``packed``."""

    def __init__(self, inputs: int, sizes: Sequence[int], index: int, bias: bool) -> None:
        super().__init__()
        self.index = index
        self.packed = Packed(inputs, sizes, bias)

    @property
    def in_features(self) -> int:
        return self.packed.linear.in_features

    @property
    def out_features(self) -> int:
        return self.packed.linear.out_features * self.packed.sizes[self.index] // sum(self.packed.sizes)

    def config(self) -> dict[str, Any]:
        """What makes the layer again, as JSON; that it shares ``packed`` is another edit."""
        linear = self.packed.linear
        sizes = list(self.packed.sizes)
        return {"inputs": linear.in_features, "sizes": sizes, "index": self.index, "bias": linear.bias is not None}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> PackedPart:
        return cls(**config)

    def forward(self, x: Tensor) -> Tensor:
        return self.packed.part(x, self.index)

    def extra_repr(self) -> str:
        return f"index={self.index}"


def _same(one: tuple[Tensor, int, bool], other: tuple[Tensor, int, bool]) -> bool:
    return one[0] is other[0] and one[1:] == other[1:]
