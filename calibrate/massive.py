"""Massive activations: a handful of entries of a hidden state that are orders of magnitude larger than all others.

Shapes: B rows, T positions, C channels.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

__all__ = ["LEAST", "MassiveEntries", "massive"]

LEAST = 100.0
_TIMES = 1000.0
"""What a massive activation is larger than, and how many times the median magnitude of its hidden state."""

_FEW = 0.01
"""Of all entries of a tensor, the share that a handful is at most."""

_NAMED = 8
"""Channels, positions and tokens that are named, at most: the most frequent ones."""


def massive(values: Tensor, counts: Tensor | None = None) -> Tensor:
    """Which entries are massive: of a magnitude above 100 and above 1,000 times the median of their row, a hidden state.

    The definition of Sun et al. 2024 (arXiv 2402.17762, sec. 2), who say "around" 1,000 times.

    Args:
        values: [B, ..., C]; [N, C] is taken for one row.
        counts: booleans over the leading dimensions; what does not count is not massive, and is left out of the median.

    Returns:
        Booleans, the shape of ``values``.
    """
    rows = (values.unsqueeze(0) if values.dim() < 3 else values).detach().abs()
    rows = rows.reshape(rows.shape[0], -1, rows.shape[-1])
    found = rows > LEAST
    if counts is not None:
        found &= counts.reshape(rows.shape[:2]).unsqueeze(-1).to(found.device)
    for row in found.flatten(1).any(1).nonzero().flatten().tolist():
        state = rows[row] if counts is None else rows[row][counts.reshape(rows.shape[:2])[row].to(rows.device)]
        found[row] &= rows[row] > _TIMES * state.median()
    return found.reshape(values.shape)


@dataclass
class MassiveEntries:
    """What was massive in one tensor over many batches.

    Attributes:
        width: channels; ``count``: entries in all, massive or not.
        rows: rows with a massive entry; ``of``: rows seen.
        largest: the largest magnitude; ``typical``: the median one of that row.
    """

    width: int = 0
    entries: int = 0
    count: int = 0
    rows: int = 0
    of: int = 0
    largest: float = 0.0
    typical: float = 0.0
    channels: Counter[int] = field(default_factory=Counter)
    positions: Counter[int] = field(default_factory=Counter)
    tokens: Counter[int] = field(default_factory=Counter)

    def add(self, values: Tensor, found: Tensor, counts: Tensor | None, ids: Tensor | None) -> None:
        """Takes in a batch [B, T, C] and which of its entries are massive.

        Args:
            counts: [B, T], which positions count.
            ids: [B, T], the tokens.
        """
        self.count += values.numel() if counts is None else int(counts.sum()) * values.shape[-1]
        self.of += values.shape[0]
        self.width = values.shape[-1]
        if not bool(found.any()):
            return
        where = found.nonzero()
        self.entries += len(where)
        self.rows += int(found.flatten(1).any(1).sum())
        self.channels.update(where[:, 2].tolist())
        places = found.any(-1)
        self.positions.update(places.nonzero()[:, 1].tolist())
        if ids is not None:
            self.tokens.update(ids[places.to(ids.device)].tolist())
        magnitudes = torch.where(found, values.abs(), torch.zeros_like(values))
        row = int(magnitudes.flatten(1).amax(1).argmax())
        if float(magnitudes[row].max()) > self.largest:
            state = values[row] if counts is None else values[row][counts[row]]
            self.largest, self.typical = float(magnitudes[row].max()), float(state.abs().median())

    @property
    def handful(self) -> bool:
        """Whether there are some, and few: at most one entry in a hundred, at most half of the positions."""
        places = self.count // self.width if self.width else 0
        return 0 < self.entries <= _FEW * self.count and 2 * sum(self.positions.values()) <= places

    def json(self) -> dict[str, Any]:
        """For a report; positions are counted from 0."""
        told = {
            "largest": self.largest,
            "median": self.typical,
            "entries": self.entries,
            "rows": f"{self.rows} of {self.of}",
            "channels": [channel for channel, _ in self.channels.most_common(_NAMED)],
            "positions": [position for position, _ in self.positions.most_common(_NAMED)],
        }
        return told | ({"tokens": [token for token, _ in self.tokens.most_common(_NAMED)]} if self.tokens else {})
