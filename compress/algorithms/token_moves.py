"""Fewer tokens: picking some out of a sequence, and merging some into others, in operations that every exporter can write.

Tokens are picked by TopK and Gather, and merged by products with 0/1 matrices that are made by comparing numbers. Nothing is
scattered, and no shape depends on values. Of equal scores the earlier token comes first.

Shapes: B batch, T tokens, K tokens that are picked, R tokens that go, D tokens that take some in, C channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["LEAST", "TIE", "Merge", "ascending", "assigned", "best", "merged", "mixed", "picked"]

TIE = 2.0**-17
"""What a score loses for each position: equal ones are told apart, with room for what runtimes round differently."""

LEAST = 1e-6
"""Least sum of weights that a mean is divided by."""


def picked(x: Tensor, index: Tensor) -> Tensor:
    """The tokens of ``x`` [B, T, ...] at ``index`` [B, K] -> [B, K, ...]; each row has an index of its own."""
    if x.dtype == torch.bool:  # Core ML gathers numbers only
        return picked(x.to(torch.float32), index) > 0
    if x.shape[0] != 1:
        index = index + torch.arange(x.shape[0], device=x.device).unsqueeze(1) * x.shape[1]
    return x.flatten(0, 1).index_select(0, index.flatten()).reshape(-1, index.shape[1], *x.shape[2:])


def best(score: Tensor, count: int) -> Tensor:
    """Positions of the ``count`` highest scores [B, T] -> [B, count], the highest first; of equal ones the earlier.

    Scores are to be of the order of one: ``TIE`` is taken off for each position.
    """
    order = torch.arange(score.shape[1], device=score.device).to(score.dtype)
    return (score - order * TIE).topk(count, dim=1).indices


def ascending(index: Tensor) -> Tensor:
    """Positions [B, K] in ascending order."""
    return index.to(torch.float32).topk(index.shape[1], dim=1, largest=False).values.to(torch.int64)


@dataclass(frozen=True)
class Merge:
    """Which tokens go into which.

    Attributes:
        left: tokens [B, T - R] that are left, in the order that they then have.
        gone: tokens [B, R] that are taken in.
        into: for each of these the number of the one among those left that takes it in, [B, R].
    """

    left: Tensor
    gone: Tensor
    into: Tensor

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """[B, T - R, R]: 1 where a token goes into another."""
        number = torch.arange(self.left.shape[1], device=self.into.device).unsqueeze(1)
        return (self.into.unsqueeze(1) == number).to(dtype)


def merged(x: Tensor, merge: Merge) -> Tensor:
    """Sums of what is merged, [B, T, C] -> [B, T - R, C]."""
    return picked(x, merge.left) + merge.matrix(x.dtype) @ picked(x, merge.gone)


def mixed(x: Tensor, weight: Tensor, merge: Merge) -> Tensor:
    """Weighted means of what is merged, with weights [B, T]: [B, T, C] -> [B, T - R, C]; where all weights are 0 it is 0."""
    weight = weight.unsqueeze(-1)
    sums = merged(torch.cat([x * weight, weight], dim=2), merge)
    width = x.shape[2]
    return sums[:, :, :width] / sums[:, :, width:].clamp(min=LEAST)


def assigned(merge: Merge, tokens: int) -> Tensor:
    """For each token the number of the one among those left that stands for it, [B, T]."""
    number = torch.arange(tokens, device=merge.left.device).reshape(1, 1, -1)
    there = (merge.left.unsqueeze(2) == number).to(torch.float32)
    gone = (merge.gone.unsqueeze(2) == number).to(torch.float32)
    return (there + merge.matrix(torch.float32) @ gone).argmax(dim=1)
