"""Rounding each weight up or down so that its layer's output changes least, by descent. Tensors in, tensors out.

Shapes: O outputs, I inputs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from calibrate.grid import Grid
from compress.algorithms.gptq import output_error

__all__ = ["adaround"]

_ZETA, _GAMMA = 1.1, -0.1
_STRENGTH, _SHARP, _BLUNT = 0.3, 2.0, 20.0
_WARM = 0.2
_RATE = 0.2


def adaround(
    weight: Tensor, hessian: Tensor, grid: Grid, scale: Tensor, zero_point: Tensor | None, start: Tensor, steps: int = 200
) -> Tensor:
    """Codes (int8 [O, I]) by AdaRound (Nagel et al. 2020, arXiv 2004.10568, eq. 21 to 24).

    Each weight becomes the code below it plus ``h(v)``, a stretched sigmoid that a regularizer drives to 0 or 1 while Adam
    lowers the squared error of the layer's output. That error is ``e H e^T`` in the second moments H of the inputs, so that no
    activation has to be kept; the layer's activation function is not looked through. The paper takes 10,000 steps; here they
    are few, at a higher rate. No row is worse than ``start`` on the given moments: where the descent loses, its codes are kept.

    Args:
        hessian: [I, I]; any positive factor gives the same codes.
        scale, zero_point: of ``Grid``.
        start: codes [O, I] to compare with.
    """
    weight, moments = weight.float(), hessian.float()
    blocks = grid.blocks(weight)
    places = (blocks / scale.unsqueeze(-1)).reshape(weight.shape)
    shift = 0.0 if zero_point is None else _spread(zero_point.float(), grid, weight)
    below, sizes = places.floor(), _spread(scale, grid, weight)
    part = ((places - below - _GAMMA) / (_ZETA - _GAMMA)).clamp(1e-3, 1 - 1e-3)
    v = (part / (1 - part)).log()
    first, second = torch.zeros_like(v), torch.zeros_like(v)
    moments = moments / moments.diagonal().mean().clamp(min=1e-30)
    unit = float(sizes.square().mean())
    for step in range(1, steps + 1):
        sigmoid = v.sigmoid()
        stretched = sigmoid * (_ZETA - _GAMMA) + _GAMMA
        soft = stretched.clamp(0, 1)
        slope = sigmoid * (1 - sigmoid) * (_ZETA - _GAMMA) * ((stretched > 0) & (stretched < 1))
        codes = (below + soft + shift).clamp(grid.low, grid.high)
        inside = (below + soft + shift >= grid.low) & (below + soft + shift <= grid.high)
        error = (codes - shift) * sizes - weight
        gradient = 2 * (error @ moments) * sizes / unit * inside
        progress = step / steps
        if progress > _WARM:
            blunt = _SHARP + (_BLUNT - _SHARP) * 0.5 * (1 + math.cos(math.pi * (progress - _WARM) / (1 - _WARM)))
            away = 2 * soft - 1
            gradient -= _STRENGTH * 2 * blunt * away.sign() * away.abs().pow(blunt - 1)
        gradient *= slope
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * gradient.square()
        v = v - _RATE * (first / (1 - 0.9**step)) / ((second / (1 - 0.999**step)).sqrt() + 1e-12)
    made = (below + (v >= 0) + shift).clamp(grid.low, grid.high).to(torch.int8)
    errors = [output_error(weight, grid.dequantize(codes, scale, zero_point), hessian) for codes in (made, start)]
    return torch.where((errors[0] <= errors[1]).unsqueeze(1), made, start)


def _spread(parameter: Tensor, grid: Grid, weight: Tensor) -> Tensor:
    """A parameter [O, G] or [1, 1] for each weight [O, I]."""
    return parameter.unsqueeze(-1).expand(grid.blocks(weight).shape).reshape(weight.shape)
