"""The weights of a layer that is taken out, grafted onto one that stays.

FuseGPT (arXiv 2411.14507), sec. 3.3: W' = W + B A + (C1 C2) * W_out, where * is element by element, and b' = b + c * b_out. B, C1
and c are zero at first, so that W' is W until they are trained.

Shapes: O outputs, I inputs, R rank.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["grafted", "started"]


def grafted(weight: Tensor, base: tuple[Tensor, Tensor], coefficients: tuple[Tensor, Tensor], other: Tensor) -> Tensor:
    """W + B A + (C1 C2) * W_out.

    Args:
        weight, other: [O, I].
        base: B [O, R] and A [R, I]; coefficients: C1 and C2, as these.
    """
    return weight + base[0] @ base[1] + (coefficients[0] @ coefficients[1]) * other


def started(outputs: int, inputs: int, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Two factors whose product is zero: zeros [O, R], and numbers [R, I] drawn evenly within 1 / sqrt(I) of zero."""
    drawn = torch.rand(rank, inputs, generator=generator)
    return torch.zeros(outputs, rank), (2 * drawn - 1) / math.sqrt(inputs)
