"""How close one model's outputs are to another's, without labels: SQNR in dB, largest error, cosine, agreement.

Never one number alone: a cosine passes a doubled output, a maximum ignores how often, agreement ignores how far.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Estimate", "Fidelity", "agreement", "cosine", "max_error", "ratio_db", "sqnr_db", "wilson"]


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95 % confidence interval ``[low, high]``, from ``rows`` rows, by the named method."""

    value: float
    low: float
    high: float
    rows: int
    method: str

    def __str__(self) -> str:
        return f"{self.value:.4f} [{self.low:.4f}, {self.high:.4f}]"


class Fidelity:
    """Compares outputs batch by batch; keeps sums only, so memory does not grow with the rows.

    Attributes:
        rows: comparisons made: rows [B, C], or tokens [B, T, C] (everything but the last dimension).
    """

    def __init__(self, classes: bool | None = None) -> None:
        """``classes``: whether the last dimension holds scores of classes, so that its largest one is an answer. By
        default it is taken to if it is longer than 1; say False for embeddings."""
        self._classes = classes
        self._signal = self._noise = self._other = self._dot = 0.0
        self._largest = 0.0
        self._agreeing = 0
        self.rows = 0

    def update(self, reference: Tensor, other: Tensor, mask: Tensor | None = None) -> None:
        """Adds a batch: two tensors of one shape [B, ...]; with ``mask`` [B, T] only positions where it is not 0 count.

        Raises:
            ValueError: the shapes differ.
        """
        if reference.shape != other.shape:
            raise ValueError(f"outputs of shape {tuple(other.shape)} against {tuple(reference.shape)}")
        if mask is not None and reference.dim() > 2 and mask.shape == reference.shape[:2]:
            reference, other = reference[mask.bool()], other[mask.bool()]
        if not reference.numel():
            return
        self._add_sums(reference.detach().double(), other.detach().double())
        rows = reference.shape[:-1].numel() if reference.dim() > 1 else reference.shape[0]
        self.rows += rows
        if self._classes is None:
            self._classes = reference.dim() > 1 and reference.shape[-1] > 1
        if self._classes:
            self._agreeing += int(_same_answer(reference, other).sum())

    def _add_sums(self, reference: Tensor, other: Tensor) -> None:
        error = reference - other
        self._signal += float(reference.square().sum())
        self._noise += float(error.square().sum())
        self._other += float(other.square().sum())
        self._dot += float((reference * other).sum())
        largest = float(error.abs().max())
        self._largest = largest if math.isnan(largest) else max(self._largest, largest)

    @property
    def sqnr_db(self) -> float:
        """``10 log10(sum reference**2 / sum (reference - other)**2)``: inf when equal, -inf when the other is not
        finite."""
        return ratio_db(self._signal, self._noise)

    @property
    def max_error(self) -> float:
        """Largest absolute difference, in the outputs' own unit."""
        return self._largest

    @property
    def cosine(self) -> float:
        """Cosine of the angle between all outputs of the one and all of the other, taken as two long vectors."""
        product = math.sqrt(self._signal) * math.sqrt(self._other)
        return self._dot / product if product else float(self._signal == self._other)

    @property
    def agreement(self) -> float | None:
        """Share of rows (of tokens) whose largest score is the same one; None where there are no classes."""
        return self._agreeing / self.rows if self._classes and self.rows else None

    @property
    def agreement_estimate(self) -> Estimate | None:
        """``agreement`` with its Wilson interval."""
        if self.agreement is None:
            return None
        low, high = wilson(self._agreeing, self.rows)
        return Estimate(self.agreement, low, high, self.rows, "wilson")


def sqnr_db(reference: Tensor, other: Tensor) -> float:
    """``10 log10(sum reference**2 / sum (reference - other)**2)``, any shape; inf when equal, -inf when ``other`` is
    not finite."""
    reference, other = reference.detach().double(), other.detach().double()
    return ratio_db(float(reference.square().sum()), float((reference - other).square().sum()))


def max_error(reference: Tensor, other: Tensor) -> float:
    """Largest absolute difference."""
    return float((reference.detach().double() - other.detach().double()).abs().max())


def cosine(reference: Tensor, other: Tensor) -> float:
    """Cosine of the angle between two tensors taken as vectors."""
    fidelity = Fidelity(classes=False)
    fidelity.update(reference, other)
    return fidelity.cosine


def agreement(reference: Tensor, other: Tensor) -> float | None:
    """Share of rows [..., C] whose largest score is the same class; None for single scores (C = 1, or no dimension
    for it)."""
    if reference.dim() < 2 or reference.shape[-1] < 2:
        return None
    return float(_same_answer(reference, other).double().mean())


def wilson(hits: int, rows: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927, J. Am. Stat. Assoc. 22, p. 209)."""
    if not rows:
        return 0.0, 1.0
    z = 1.959963984540054
    share, wide = hits / rows, z * z / rows
    centre = (share + wide / 2) / (1 + wide)
    half = z / (1 + wide) * math.sqrt(share * (1 - share) / rows + wide / (4 * rows))
    return (0.0 if hits == 0 else centre - half), (1.0 if hits == rows else centre + half)


def _same_answer(reference: Tensor, other: Tensor) -> Tensor:
    """Where the largest score is the same class; an answer that is not finite agrees with nothing."""
    return (reference.argmax(-1) == other.argmax(-1)) & torch.isfinite(other).all(-1)


def ratio_db(signal: float, noise: float) -> float:
    """``10 log10(signal / noise)`` of two sums of squares; inf without noise, -inf where it is not finite."""
    if not math.isfinite(noise):
        return -math.inf
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf
