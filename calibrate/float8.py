"""Floating point of 8 bits, E4M3: a sign, four bits of exponent, three of mantissa (Micikevicius et al. 2022, arXiv 2209.05433,
sec. 3).

The largest number is 448; there is no infinity, and what is larger is given as 448, as ONNX's QuantizeLinear (``saturate``) and
TensorRT do. Normal numbers, from 2**-6, are met within 2**-4 of themselves; below there are multiples of 2**-9.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["LARGEST", "codes", "rounded", "values"]

LARGEST = 448.0


def codes(given: Tensor) -> Tensor:
    """The nearest numbers (of two equally near the one with an even mantissa) as their bits, int8 in the shape of ``given``."""
    return given.float().clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn).view(torch.int8)


def values(bits: Tensor) -> Tensor:
    """The numbers (float32) that bits (int8) stand for."""
    return bits.view(torch.float8_e4m3fn).float()


def rounded(given: Tensor) -> Tensor:
    """The nearest numbers, in the dtype of ``given``."""
    return values(codes(given)).to(given.dtype)
