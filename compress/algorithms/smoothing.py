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

__all__ = ["Smoothing", "rounding_noise", "smoothing"]

_STRENGTHS = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


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
