"""A factor for each input channel that makes rounding a layer's input cost less. Tensors in, tensors out.

Shapes: O outputs, I inputs, G groups.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from calibrate.grid import Grid
from compress.algorithms.rounding import scales_of

__all__ = ["Smoothing", "aligned", "balanced", "rounding_noise", "smoothing"]

_STRENGTHS = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
_STEPS, _RATE = 240, 0.03
_PARTS = 8
"""Into so many parts an octave is divided where scales are powers of two."""


@dataclass(frozen=True)
class Smoothing:
    """``x * factor`` meets ``weight / factor``: the product is unchanged, the rounding of both is not.

    Attributes:
        factor: [I] float32, float16 numbers; 1 everywhere where nothing was gained.
        strength: how much of the spread between channels is taken from the input (0: none, 1: all).
        gain_db: how much less the expected noise of the layer's output is.
        before_db: the expected SQNR of the layer's output without factors, its input's channels taken as uncorrelated.
    """

    factor: Tensor
    strength: float
    gain_db: float
    before_db: float


def smoothing(weight: Tensor, low: Tensor, high: Tensor, mean_square: Tensor, weights: Grid, inputs: Grid) -> Smoothing:
    """The strength of SmoothQuant's factors with the least expected output noise.

    ``1 / factor = m**a / w**(1 - a)`` for input channels of magnitude m and weight columns of magnitude w (Xiao et al. 2023,
    arXiv 2211.10438, eq. 4). The strength a is searched for each layer, because no one value suits all; the noise of each
    choice follows from the channels' statistics alone, as in ``rounding_noise``. Channels smaller than the median one are
    treated like the median one: a channel that calibration rows hardly woke must not be clipped on other rows.

    Args:
        weight: [O, I].
        low, high, mean_square: [I], of the input's channels.
        weights, inputs: the grids that both will be rounded to.
    """
    magnitude = torch.maximum(-low, high).clamp(min=0.0)
    magnitude = magnitude.clamp(min=max(float(magnitude.median()), 1e-8))
    columns = weight.float().abs().amax(0)
    columns = columns.clamp(min=max(1e-3 * float(columns.max()), 1e-8))
    none = torch.ones_like(magnitude)
    start = least = rounding_noise(weight, none, low, high, mean_square, weights, inputs)
    before = _db(float((weight.double().square().sum(0) * mean_square).sum()), start)
    best = Smoothing(none, 0.0, 0.0, before)
    for strength in _STRENGTHS:
        factor = columns.pow(1 - strength) / magnitude.pow(strength)
        factor = (factor / factor.log().mean().exp()).clamp(2.0**-14, 2.0**14).half().float()
        noise = rounding_noise(weight, factor, low, high, mean_square, weights, inputs)
        if noise < least:
            least, best = noise, Smoothing(factor, strength, _db(start, noise), before)
    return best


def balanced(
    weight: Tensor,
    low: Tensor,
    high: Tensor,
    mean_square: Tensor,
    weights: Grid,
    inputs: Grid,
    *,
    weight_share: float = 1.0,
) -> Smoothing:
    """Each channel's factor by descent on the expected output noise itself, from the best of ``smoothing`` on.

    The noise of ``rounding_noise`` has a gradient in the logarithm of every factor; Adam with a fixed number of steps follows
    it and the least noise on the way is kept, so that the result is never worse than where it began.

    Args:
        weight_share: what of the weight's noise is left when it is rounded by its layer's output (1: to the nearest).
    """
    start = smoothing(weight, low, high, mean_square, weights, inputs)
    low, high = low.clamp(max=0.0), high.clamp(min=0.0)
    floor = max(float(torch.maximum(-low, high).median()), 1e-8)
    up = high >= -low
    low, high = torch.where(up, low, low.clamp(max=-floor)), torch.where(up, high.clamp(min=floor), high)
    noise = _Noise(weight.float(), low, high, mean_square, weights, inputs, weight_share)
    found = _descend(noise, start.factor)
    factor = (found / found.log().mean().exp()).clamp(2.0**-14, 2.0**14).half().float()
    none = torch.ones_like(factor)
    amounts = [noise.at(candidate)[0] for candidate in (none, start.factor, factor)]
    if amounts[2] >= amounts[1]:
        return start
    return Smoothing(factor, start.strength, _db(amounts[0], amounts[2]), start.before_db)


def aligned(
    given: Smoothing, weight: Tensor, low: Tensor, high: Tensor, mean_square: Tensor, weights: Grid, inputs: Grid
) -> Smoothing:
    """The same factors times one number for all channels, so that what is rounded fills a grid whose scale is a power of two.

    Of a range that such a grid has to cover up to half is empty, which costs a bit. The number, between 1 and 2, moves the
    input's largest value below the next power of two; what it does to the weight's scales is in the noise that is compared.
    Arguments and result are those of ``smoothing``; the result is never worse than ``given``.
    """
    tried = [(given.factor * 2 ** (part / _PARTS)).half().float() for part in range(_PARTS)]
    noise = [rounding_noise(weight, factor, low, high, mean_square, weights, inputs) for factor in tried]
    start = rounding_noise(weight, torch.ones_like(given.factor), low, high, mean_square, weights, inputs)
    best = min(range(_PARTS), key=noise.__getitem__)
    return Smoothing(tried[best], given.strength, _db(start, noise[best]), given.before_db)


@dataclass(frozen=True)
class _Noise:
    """``rounding_noise`` as a function of the factors, with its gradient in their logarithms."""

    weight: Tensor
    low: Tensor
    high: Tensor
    mean_square: Tensor
    weights: Grid
    inputs: Grid
    weight_share: float

    def at(self, factor: Tensor) -> tuple[float, Tensor]:
        step, step_slope = self._step(factor)
        energy = self.weight.square().sum(0) / factor.square()
        steps, places = self._weight_steps(factor)
        loud = self.mean_square * factor.square()
        blocks = loud.reshape(steps.shape[1], -1).sum(1)
        per_group = steps.square().sum(0) * (self.weight.shape[0] if steps.shape[0] == 1 else 1)
        of_input = step**2 * float(energy.sum())
        of_weight = self.weight_share * float((per_group * blocks).sum())
        slope = -2 * step**2 * energy + 2 * step * float(energy.sum()) * step_slope
        slope += self.weight_share * 2 * loud * per_group.repeat_interleave(len(loud) // len(per_group))
        taken = -2 * self.weight_share * steps.square() * blocks * (self.weight.shape[0] if steps.shape[0] == 1 else 1)
        slope.index_add_(0, places.reshape(-1), taken.reshape(-1).to(slope.dtype))
        return (of_input + of_weight) / 12, slope / (of_input + of_weight)

    def _step(self, factor: Tensor) -> tuple[float, Tensor]:
        """The input's step and its slope, [I]."""
        slope = torch.zeros_like(factor)
        highs, lows = self.high * factor, -self.low * factor
        levels = self.inputs.high - self.inputs.low
        if not self.inputs.symmetric:
            top, bottom = int(highs.argmax()), int(lows.argmax())
            slope[top] += highs[top] / levels
            slope[bottom] += lows[bottom] / levels
            return float(highs[top] + lows[bottom]) / levels, slope
        both = torch.maximum(highs, lows)
        top = int(both.argmax())
        slope[top] = both[top] / self.inputs.high
        return float(both[top]) / self.inputs.high, slope

    def _weight_steps(self, factor: Tensor) -> tuple[Tensor, Tensor]:
        """The weight's steps [O, G] or [1, 1], and which input's column each hangs on."""
        blocks = self.weights.blocks(self.weight.abs() / factor)
        largest, inside = blocks.max(-1)
        columns = self.weight.shape[1]
        if self.weights.granularity == "tensor":
            return largest / self.weights.high, inside % columns
        starts = torch.arange(blocks.shape[1], device=inside.device) * blocks.shape[2]
        return largest / self.weights.high, inside + starts


def _descend(noise: _Noise, factor: Tensor) -> Tensor:
    """Adam (Kingma and Ba 2015, arXiv 1412.6980) on the logarithms of the factors."""
    place = factor.log()
    first, second = torch.zeros_like(place), torch.zeros_like(place)
    best, least = factor, math.inf
    for step in range(1, _STEPS + 1):
        amount, slope = noise.at(place.exp())
        if amount < least:
            best, least = place.exp(), amount
        first = 0.9 * first + 0.1 * slope
        second = 0.999 * second + 0.001 * slope.square()
        place = place - _RATE * (first / (1 - 0.9**step)) / ((second / (1 - 0.999**step)).sqrt() + 1e-12)
    return best


def rounding_noise(
    weight: Tensor, factor: Tensor, low: Tensor, high: Tensor, mean_square: Tensor, weights: Grid, inputs: Grid
) -> float:
    """The expected squared error of the layer's output, summed over its channels, when nothing is clipped.

    A rounded value is off by step**2 / 12 on average: the input's error meets the squared norms of the weight's columns,
    the weight's error the mean squares of the input.
    """
    divided = weight.float() / factor
    spread = (high * factor).amax().clamp(min=0.0), (low * factor).amin().clamp(max=0.0)
    step, _ = inputs.parameters(spread[1], spread[0])
    of_input = float(step) ** 2 * float(divided.double().square().sum())
    scale, _ = scales_of(divided, weights, "minmax")
    energy = (mean_square * factor.square()).double().reshape(scale.shape[1], -1).sum(1)
    of_weight = float((scale.double().square() * energy).sum()) * (weight.shape[0] if scale.shape[0] == 1 else 1)
    return (of_input + of_weight) / 12


def _db(signal: float, noise: float) -> float:
    if noise <= 0 or signal <= 0:
        return math.inf
    return 10 * math.log10(signal / noise)
