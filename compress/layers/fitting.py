"""What a quantized layer is given: codes for its weight, a grid for its input, a corrected bias.

Shapes: O outputs, I inputs, C channels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from calibrate.capture import Captured
from calibrate.grid import Grid
from calibrate.ranges import Channels, RangeObserver, storable
from compress.algorithms.pair_sums import PairLimit
from compress.algorithms.reparameterization import Reparameterization
from compress.algorithms.rounding import rounding_loss
from compress.algorithms.smoothing import Smoothing
from compress.layers.conversion import QuantizedLayer, weight_of
from compress.layers.quantized import QuantConv2d, QuantLinear

__all__ = ["Searched", "Seen", "column_energy", "finite", "fit_input", "pair_limit", "shift_bias", "shorten_bias", "store_weight"]


@dataclass(frozen=True)
class Searched:
    """Ranges that were searched by what they do to the model's outputs: of the input, and scales of the weight that meets it.

    Attributes:
        gain_db: how much less the weighted error of the layers' outputs is than with the extremes.
        symmetric: whether the input has no zero point.
        scheme_gain_db: how much more the other of the two schemes costs; None where the recipe says which.
    """

    low: float
    high: float
    scale: Tensor
    zero_point: Tensor | None
    gain_db: float
    symmetric: bool = True
    scheme_gain_db: float | None = None


@dataclass(frozen=True)
class Seen:
    """What calibration saw at one site, and the factors its channels are multiplied by.

    Attributes:
        leader: the site that received the same tensor before it.
        smoothed: None where the input is rounded as it is.
        folded: the module that makes the input and has the factors inside; None: the layer multiplies.
        searched: ranges that hold in the place of those seen.
        moved: what became of the scale and zero point of each channel; ``folded`` is the norm that took them.
        ordinary_mean, ordinary_mean_square: of what the layer receives [C] without massive positions; None: there are none.
        kept: a range of what is rounded that holds in the place of all others: that of the positions without massive activations.
    """

    ranged: RangeObserver
    channels: Channels
    leader: str | None
    smoothed: Smoothing | None = None
    folded: str | None = None
    searched: Searched | None = None
    moved: Reparameterization | None = None
    kept: tuple[float, float] | None = None
    ordinary_mean: Tensor | None = None
    ordinary_mean_square: Tensor | None = None

    @classmethod
    def of(cls, captured: Captured, path: str) -> Seen:
        ranged, channels = captured.observers[path]
        assert isinstance(ranged, RangeObserver)
        assert isinstance(channels, Channels)
        return cls(ranged, channels, captured.shared.get(path))

    @property
    def factor(self) -> Tensor | None:
        """The factors [C] that the layer itself multiplies by."""
        return self.smoothed.factor if self.smoothed is not None and self.folded is None else None

    @property
    def mean(self) -> Tensor:
        """Mean of what the layer receives [C], a folded factor in it."""
        if self.ordinary_mean is not None:
            return self.ordinary_mean
        if self.moved is not None:
            return (self.channels.mean * self.moved.factor + self.moved.shift).float()
        folded = self.smoothed is not None and self.folded is not None
        return self.channels.mean * self.smoothed.factor if folded and self.smoothed else self.channels.mean

    @property
    def energy(self) -> Tensor:
        """Mean square of what is rounded [C], factors in it."""
        if self.ordinary_mean_square is not None:
            return self.ordinary_mean_square if self.factor is None else self.ordinary_mean_square * self.factor.square()
        if self.moved is not None:
            factor, shift = self.moved.factor, self.moved.shift
            crossed = 2 * factor * shift * self.channels.mean
            return (self.channels.mean_square * factor.square() + crossed + shift.square()).clamp(min=0).float()
        if self.smoothed is None:
            return self.channels.mean_square
        return self.channels.mean_square * self.smoothed.factor.square()

    def range(self, grid: Grid) -> tuple[float, float]:
        """The range that was seen of what is rounded, as its observer gives it; with factors the extremes."""
        if self.moved is not None:
            first, last = (end - self.moved.zero_point for end in (grid.low, grid.high))
            return first * self.moved.scale, last * self.moved.scale
        if self.smoothed is None:
            return self.ranged.range(grid)
        factor = self.smoothed.factor
        return float((self.channels.low * factor).amin()), float((self.channels.high * factor).amax())

    def before_folding(self, x: Tensor) -> Tensor:
        """What the layer would receive [..., C] if nothing had been folded into the layer before."""
        if self.moved is not None:
            return ((x - self.moved.shift.to(x.device)) / self.moved.factor.to(x.device)).to(x)
        return x if self.smoothed is None or self.folded is None else x / self.smoothed.factor.to(x)

    @property
    def nothing(self) -> bool:
        """Whether every value was 0."""
        return self.channels.count == 0 or self.ranged.low == self.ranged.high == 0


def fit_input(layer: QuantizedLayer, seen: Seen, grid: Grid, method: str) -> dict[str, Any]:
    """Gives the layer's input its grid, and says which."""
    activation, smoothed = layer.activation, seen.smoothed
    assert activation is not None
    says: dict[str, Any] = {"seen": [seen.ranged.low, seen.ranged.high]}
    low, high = seen.range(grid)
    if method == "hessian" and seen.searched is None:
        method = "minmax"
    if seen.moved is not None:
        zeros = seen.moved.zero_points
        says |= {"method": "minmax", "clipped_percent": 0.0, "folded_into": seen.folded}
        says["channel_zero_points"] = [int(zeros.min()), int(zeros.max())]
    elif smoothed is None:
        says |= {"method": method, "clipped_percent": finite(100 * seen.ranged.clipped(low, high))}
    else:
        if seen.factor is not None:
            assert activation.factor is not None
            activation.factor.copy_(seen.factor)
        says |= {"method": "minmax", "clipped_percent": 0.0, "smoothed": smoothed.strength, "gain_db": smoothed.gain_db}
        if seen.folded is not None:
            says["folded_into"] = seen.folded
    if seen.searched is not None:
        low, high = seen.searched.low, seen.searched.high
        says |= {"method": method, "clipped_percent": None, "search_gain_db": finite(seen.searched.gain_db)}
        if seen.searched.scheme_gain_db is not None:
            scheme = "symmetric" if grid.symmetric else "asymmetric"
            says |= {"scheme": scheme, "scheme_gain_db": finite(seen.searched.scheme_gain_db)}
    if seen.kept is not None:
        low, high = seen.kept
        says |= {"method": "without massive activations", "clipped_percent": None}
    scale, zero_point = storable(grid, torch.tensor(low), torch.tensor(high))
    if seen.moved is not None and seen.kept is None:
        scale, zero_point = torch.tensor(seen.moved.scale), torch.tensor(seen.moved.zero_point, dtype=torch.int8)
    activation.scale.copy_(scale)
    if zero_point is not None:
        activation.zero_point.copy_(zero_point)
    if seen.leader:
        says["same_tensor_as"] = seen.leader
    return says | {"range": [low, high], "scale": float(scale), "zero_point": int(activation.zero_point)}


def pair_limit(layer: QuantizedLayer, energy: Tensor | None) -> PairLimit | None:
    """What neighbouring codes of a linear layer with 8-bit inputs may be together; None where its grid keeps to that anyway.

    Args:
        energy: [I], mean squares of the layer's input, factors in it; None: not known.
    """
    grid = layer.quantized_weight.grid
    if (
        not isinstance(layer, QuantLinear)
        or layer.activation is None
        or grid.reduced
        or grid.bits < 8
        or grid.e4m3
        or not grid.symmetric
    ):
        return None
    known = torch.ones(layer.in_features) if energy is None else energy
    return PairLimit(known.to(layer.quantized_weight.scale).clamp(min=1e-6 * float(known.mean()) + 1e-30))


def store_weight(
    layer: QuantizedLayer, weight: Tensor, codes: Tensor, scale: Tensor, zero_point: Tensor | None
) -> dict[str, Any]:
    """Stores the weight's codes in the layer and says what the rounding cost."""
    grid = layer.quantized_weight.grid
    layer.quantized_weight.store(codes, scale, zero_point)
    return {
        "bits": grid.bits,
        **({"format": "fp8 e4m3"} if grid.e4m3 else {}),
        "granularity": grid.granularity,
        "group_size": grid.group_size,
        "scale": [float(scale.min()), float(scale.max())],
        "weight_sqnr_db": finite(rounding_loss(weight, codes, grid, scale, zero_point)),
    }


def column_energy(module: nn.Module, kind: str) -> Tensor:
    """The squared norms of the weight's columns, one for each input channel [C]."""
    weight = weight_of(module, kind).float()
    if kind != "conv2d":
        return weight.square().sum(0)
    groups = int(getattr(module, "groups", 1))
    return weight.square().sum((2, 3)).reshape(groups, -1, weight.shape[1]).sum(1).reshape(-1)


def shift_bias(layer: QuantizedLayer, weight: Tensor, mean: Tensor) -> float:
    """Adds ``(W - W_quantized) mean`` to the bias [O]; returns the largest change.

    A convolution's error is summed over its window, as if the mean were the same at every place of it. Only this layer's
    error is corrected: the mean of what earlier layers lose hangs on few large activations, and does not belong to all rows.

    Args:
        weight: the float weight for the layer's input.
        mean: [C], of the layer's input.
    """
    assert layer.bias is not None
    shift = _mean_output(layer, weight.float() - layer.weight, mean)
    layer.bias += shift
    return float(shift.abs().max())


def shorten_bias(layer: QuantizedLayer) -> None:
    """Rounds the bias to float16 numbers, which files hold in half the bytes: 2**-11 of itself, far less than its input's
    rounding costs. One beyond their range stays as it is."""
    if layer.bias is not None and float(layer.bias.abs().max()) < 65504:
        layer.bias.copy_(layer.bias.half().float())


def _mean_output(layer: QuantizedLayer, weight: Tensor, mean: Tensor) -> Tensor:
    mean = mean.to(weight)
    if not isinstance(layer, QuantConv2d):
        return weight @ mean
    summed = weight.sum((2, 3))
    means = mean.reshape(layer.groups, 1, -1).expand(-1, summed.shape[0] // layer.groups, -1)
    return (summed * means.reshape(summed.shape)).sum(1)


def finite(value: float) -> float | None:
    """None where JSON has no number."""
    return value if math.isfinite(value) else None
