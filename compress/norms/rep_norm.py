"""Re-parameterised batch normalisation, and its way there from the normalisation that it takes the place of.

Guo et al. 2024 (SLAB, arXiv 2405.11582), sec. 3.1: RepBN (eq. 5) and progressive re-parameterisation (eq. 3).
Shapes: C channels, the last axis; N all positions of a batch.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["Moments", "RepNorm"]

_EPS = 1e-5
_MOMENTUM = 0.05
"""Of the running statistics, which later ones replace (``settle``)."""
_LEAST = 1e-4
"""Share of the mean variance that a channel's variance is taken for at least."""


class RepNorm(nn.Module):
    """``share * norm(x) + (1 - share) * (BN(x) + alpha x)``: at ``share`` 1 the norm, at 0 an affine function of each channel.

    It begins as near to the norm as an affine function of each channel can be, in squares, on the positions that ``fit`` has
    seen; the paper begins with factors of 1. Half of each slope is alpha's, the same for all channels, the rest BN's.

    Attributes:
        share: of the norm; set from outside.
        learning: as in training; otherwise the norm has no share and statistics are the running ones, as in a file.
        fixed: statistics are the running ones in training too, so that RepBN is an affine function from the beginning.
    """

    mean: Tensor
    variance: Tensor
    share: float
    learning: bool

    def __init__(self, norm: nn.Module, channels: int, fixed: bool = False) -> None:
        super().__init__()
        self.norm, self.channels, self.fixed = norm, channels, fixed
        self.gamma = nn.Parameter(torch.ones(channels))
        self.beta = nn.Parameter(torch.zeros(channels))
        self.alpha = nn.Parameter(torch.zeros(()))
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("variance", torch.ones(channels))
        self.share, self.learning = 1.0, False
        self._sums: list[Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        share = self.share if self.learning else 0.0
        if share == 1:
            given: Tensor = self.norm(x)
            return given
        if self.fixed or not self.learning:
            factor, constant = self.affine()
            batch = x * factor + constant
        else:
            batch = self._batch(x)
        if not share:
            return batch
        normed: Tensor = self.norm(x)
        return share * normed + (1 - share) * batch

    def _batch(self, x: Tensor) -> Tensor:
        """RepBN with the statistics of this batch, which are noted."""
        flat = x.reshape(-1, self.channels)
        mean, variance = flat.mean(0), flat.var(0, unbiased=False)
        with torch.no_grad():
            if self._sums is not None:
                self._sums = [
                    *map(torch.add, self._sums, (mean.double(), (variance + mean.square()).double(), mean.new_ones(())))
                ]
            else:
                self.mean.lerp_(mean, _MOMENTUM)
                self.variance.lerp_(variance, _MOMENTUM)
        return (x - mean) * (variance + _EPS).rsqrt() * self.gamma + self.beta + self.alpha * x

    @torch.no_grad()
    def fit(self, seen: Moments) -> None:
        """The affine function nearest to the norm on what was seen, and its statistics."""
        mean, variance = seen.mean, seen.variance
        variance = variance.clamp(min=_LEAST * float(variance.mean()) + 1e-30)
        slope = seen.covariance / variance
        self.mean.copy_(mean)
        self.variance.copy_(variance)
        self.alpha.copy_(slope.mean() / 2)
        self.gamma.copy_((slope - self.alpha) * (variance + _EPS).sqrt())
        self.beta.copy_(seen.given - self.alpha * mean)

    def affine(self) -> tuple[Tensor, Tensor]:
        """The factor and the constant of each channel [C], as files hold them (sec. 3.1, merged)."""
        scale = (self.variance + _EPS).rsqrt() * self.gamma
        return scale + self.alpha, self.beta - self.mean * scale

    def collect(self) -> None:
        """From now on statistics are added up, until ``settle`` takes them for the running ones."""
        self._sums = [torch.zeros(self.channels, dtype=torch.float64) for _ in range(2)] + [torch.zeros(())]

    def settle(self) -> None:
        if self._sums is not None and float(self._sums[2]):
            mean, square = (total / float(self._sums[2]) for total in self._sums[:2])
            self.mean.copy_(mean)
            self.variance.copy_((square - mean.square()).clamp(min=0))
        self._sums = None


class Moments:
    """Of what goes into a norm and what it gives, channel by channel: sums over positions, in float64."""

    def __init__(self, channels: int) -> None:
        self.count = 0
        self.sums = torch.zeros(4, channels, dtype=torch.float64)

    def add(self, x: Tensor, y: Tensor) -> None:
        """``x`` what goes in, ``y`` what comes out, both [..., C]."""
        x, y = (one.detach().reshape(-1, one.shape[-1]).double() for one in (x, y))
        self.count += len(x)
        self.sums += torch.stack([x.sum(0), y.sum(0), x.square().sum(0), (x * y).sum(0)])

    @property
    def mean(self) -> Tensor:
        return self.sums[0] / self.count

    @property
    def given(self) -> Tensor:
        """Mean of what comes out."""
        return self.sums[1] / self.count

    @property
    def variance(self) -> Tensor:
        return (self.sums[2] / self.count - self.mean.square()).clamp(min=0)

    @property
    def covariance(self) -> Tensor:
        return self.sums[3] / self.count - self.mean * self.given
