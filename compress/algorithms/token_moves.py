"""Fewer tokens: picking some out of a sequence, and merging some into others, in operations that every exporter can write.

Tokens are picked by TopK and Gather, and merged by products with 0/1 matrices that are made by comparing numbers. Nothing is
scattered, and no shape depends on values. Of equal scores the earlier token comes first.

Shapes: B batch, T tokens, K tokens that are picked, R tokens that go, D tokens that take some in, C channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["TIE", "Merge", "ascending", "best", "merged", "mixed", "picked"]

TIE = 2.0**-17
"""What a score loses for each position: equal ones are told apart, with room for what runtimes round differently."""


def picked(x: Tensor, index: Tensor) -> Tensor:
    """The tokens of ``x`` [B, T, ...] at ``index`` [B, K] -> [B, K, ...]; each row has an index of its own."""
    if x.dtype == torch.bool:  # Core ML gathers numbers only
        return picked(x.to(torch.float32), index) > 0
    rows = torch.arange(x.shape[0], device=x.device).unsqueeze(1) * x.shape[1]
    flat = x.flatten(0, 1).index_select(0, (index + rows).flatten())
    return flat.reshape(-1, index.shape[1], *x.shape[2:])


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
        stays: tokens [B, S] that are left as they are; they come first in what is left.
        targets: tokens [B, D] that take others in; they follow.
        gone: tokens [B, R] that are taken in.
        into: for each of these the number of its target, [B, R].
        before: whether the targets come before those that stay.
    """

    stays: Tensor
    targets: Tensor
    gone: Tensor
    into: Tensor
    before: bool = False

    @property
    def matrix(self) -> Tensor:
        """[B, D, R]: 1 where a token goes into a target."""
        number = torch.arange(self.targets.shape[1], device=self.into.device).reshape(1, -1, 1)
        return (self.into.unsqueeze(1) == number).to(torch.float32)


def merged(x: Tensor, merge: Merge) -> Tensor:
    """Sums of what is merged, [B, T, C] -> [B, T - R, C]."""
    taken = picked(x, merge.targets) + merge.matrix.to(x.dtype) @ picked(x, merge.gone)
    stays = picked(x, merge.stays)
    return torch.cat([taken, stays] if merge.before else [stays, taken], dim=1)


def mixed(x: Tensor, weight: Tensor, merge: Merge, least: float = 1e-6) -> Tensor:
    """Weighted means of what is merged: [B, T, C] and weights [B, T] -> [B, T - R, C]; where all weights are 0 it is 0."""
    weight = weight.unsqueeze(-1)
    return merged(x * weight, merge) / merged(weight, merge).clamp(min=least)
