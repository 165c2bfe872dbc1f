"""How little a part of a transformer changes the residual stream, and which parts to take out for it.

He et al. 2024, "What Matters in Transformers? Not All Attention is Needed" (arXiv 2406.15786), sec. 3: the similarity of a
part is the mean over tokens of the cosine between the stream before and after it.

Shapes: N tokens, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor

__all__ = ["Sums", "best_run", "cosines", "first_allowed"]

Key = TypeVar("Key")


def cosines(before: Tensor, after: Tensor) -> Tensor:
    """The cosine of each token before and after, [N, C] and [N, C] -> [N], in float64.

    Exactly 1 where nothing changed (sqrt(s * s) is s in floating point); a token that is zero before or after, but not both,
    has none: 0.
    """
    before, after = before.double(), after.double()
    power = before.square().sum(-1) * after.square().sum(-1)
    found = (before * after).sum(-1) / power.sqrt()
    return torch.where(power > 0, found, (before == after).all(-1).double()).clamp(-1.0, 1.0)


class Sums:
    """Sums over tokens: of the cosines, and of what a part adds; the same however the rows are cut into batches, but for the
    order of the float64 sums."""

    def __init__(self) -> None:
        self.tokens = 0
        self.cosine = 0.0
        self.added: Tensor | None = None

    def add(self, before: Tensor, after: Tensor, added: Tensor | None = None) -> None:
        """Counts the tokens [N, C]; ``added`` is what the part adds to each, if its mean is wanted."""
        self.tokens += before.shape[0]
        self.cosine += float(cosines(before, after).sum())
        if added is not None:
            total = added.double().sum(0)
            self.added = total if self.added is None else self.added + total

    @property
    def similarity(self) -> float:
        return self.cosine / self.tokens if self.tokens else 0.0

    @property
    def mean(self) -> Tensor | None:
        """The mean that the part adds to a token, [C]: the constant nearest to it in squares."""
        return None if self.added is None else self.added / max(self.tokens, 1)


def first_allowed(
    scores: Mapping[Key, float], count: int, allowed: Callable[[Sequence[Key], Key], bool] = lambda chosen, key: True
) -> list[Key]:
    """The keys with the highest scores, the highest first; of equal ones the first.

    Args:
        allowed: whether a key may follow those that were chosen so far.
    """
    chosen: list[Key] = []
    for key in sorted(scores, key=lambda key: -scores[key]):
        if len(chosen) < count and allowed(chosen, key):
            chosen.append(key)
    return chosen


def best_run(gaps: Mapping[Key, float]) -> Key:
    """Where the run starts whose own gap has the highest similarity; of equal ones the first.

    ``gaps[i]`` compares the stream before part i with the stream after the last part of the run that starts there. (The
    published code reads the column of runs one longer.)
    """
    return max(gaps, key=lambda key: gaps[key])
