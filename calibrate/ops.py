"""The torch ops that carry compressed values exactly from passes to exporters.

Compressed layers compute through these ops: integer codes, scales and zero points go in as tensors, so that a traced graph
still holds the integers. In eager mode they are the reference arithmetic; an exporter lowers each to its runtime's own
storage. Shapes: O outputs, I inputs, G groups, V vocabulary, C channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from calibrate import float8
from calibrate.bits import integers
from calibrate.grid import unpack

__all__ = [
    "binary",
    "dequantize",
    "dequantize_e4m3",
    "embedding",
    "quantize_dequantize",
    "quantize_dequantize_dynamic",
    "quantize_dequantize_e4m3",
]


def _dense(codes: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
    """Codes [R, I] and scale [R, G] or [1, 1] to float [R, I]."""
    blocks = codes.reshape(1, 1, -1) if scale.numel() == 1 else codes.reshape(codes.shape[0], scale.shape[1], -1)
    values = blocks.to(scale.dtype)
    if zero_point is not None:
        values = values - zero_point.unsqueeze(-1).to(scale.dtype)
    return (values * scale.unsqueeze(-1)).reshape(codes.shape)


@torch.library.custom_op("compress::dequantize", mutates_args=())
def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int, shape: list[int]) -> Tensor:
    """Weights of the given ``shape``, seen as [O, I], from their codes.

    Args:
        codes: int8 (8 bits) or packed uint8 (``calibrate.grid.pack``), one-dimensional.
        scale: [O, G] or [1, 1], floating point; its dtype is that of the result.
        zero_point: int8, the shape of ``scale``, or None for a symmetric grid.
    """
    matrix = unpack(codes, bits, [shape[0], -1] if bits == 8 else _matrix(shape))
    return _dense(matrix, scale, zero_point).reshape(shape)


@dequantize.register_fake
def _(codes: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int, shape: list[int]) -> Tensor:
    return scale.new_empty(shape)


@torch.library.custom_op("compress::dequantize_e4m3", mutates_args=())
def dequantize_e4m3(codes: Tensor, scale: Tensor, shape: list[int]) -> Tensor:
    """Weights of the given ``shape``, seen as [O, I], from numbers of 8-bit floating point (``calibrate.float8``).

    Args:
        codes: int8, the bits of the numbers, one-dimensional.
        scale: [O, 1] or [1, 1], floating point; its dtype is that of the result.
    """
    numbers = float8.values(codes).to(scale.dtype)
    return (numbers.reshape(scale.shape[0], -1) * scale).reshape(shape)


@dequantize_e4m3.register_fake
def _(codes: Tensor, scale: Tensor, shape: list[int]) -> Tensor:
    return scale.new_empty(shape)


@torch.library.custom_op("compress::binary", mutates_args=())
def binary(codes: Tensor, multiples: Tensor | None, shift: Tensor | None, scale: Tensor, shape: list[int]) -> Tensor:
    """Weights of the given ``shape`` from planes of bits (``calibrate.bits``): ``(shift + sum_k multiples_k b_k) * scale``.

    Args:
        codes: uint8, K planes.
        multiples: int8 [O, G, K], or None for one plane as it is; shift: int8 [O, G] or None.
        scale: [O, 1], floating point; its dtype is that of the result.
    """
    whole = integers(codes, multiples, shift, shape).reshape(shape[0], -1).to(scale.dtype)
    return (whole * scale).reshape(shape)


@binary.register_fake
def _(codes: Tensor, multiples: Tensor | None, shift: Tensor | None, scale: Tensor, shape: list[int]) -> Tensor:
    return scale.new_empty(shape)


@torch.library.custom_op("compress::embedding", mutates_args=())
def embedding(ids: Tensor, codes: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int, shape: list[int]) -> Tensor:
    """Rows of a quantized table [V, C]: codes are gathered first, only the gathered ones are dequantized.

    Args:
        ids: integers of any shape [...]; the result is [..., C].
        codes, scale, zero_point, bits: as in ``dequantize``; ``scale`` is [V, G] or [1, 1].
        shape: [V, C].
    """
    if bits == 8:
        rows = codes.reshape(shape)[ids.reshape(-1)]
    else:
        rows = unpack(codes.reshape(shape[0], -1)[ids.reshape(-1)], bits, [ids.numel(), shape[1]])
    picked = scale if scale.numel() == 1 else scale[ids.reshape(-1)]
    shift = zero_point if zero_point is None or zero_point.numel() == 1 else zero_point[ids.reshape(-1)]
    return _dense(rows, picked, shift).reshape(*ids.shape, shape[1])


@embedding.register_fake
def _(ids: Tensor, codes: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int, shape: list[int]) -> Tensor:
    return scale.new_empty((*ids.shape, shape[1]))


@torch.library.custom_op("compress::quantize_dequantize", mutates_args=())
def quantize_dequantize(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """Activations rounded to a static per-tensor grid and back: ``(clamp(round(x / scale) + zp) - zp) * scale``.

    Args:
        x: floating point, any shape.
        scale: float32, zero-dimensional.
        zero_point: int8, zero-dimensional; 0 for a symmetric grid.
        bits: codes lie in ``[-2**(bits-1), 2**(bits-1) - 1]``.
    """
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    shift = zero_point.to(x.dtype)
    codes = ((x / scale.to(x.dtype)).round() + shift).clamp(low, high)
    return (codes - shift) * scale.to(x.dtype)


@quantize_dequantize.register_fake
def _(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("compress::quantize_dequantize_e4m3", mutates_args=())
def quantize_dequantize_e4m3(x: Tensor, scale: Tensor) -> Tensor:
    """Activations rounded to 8-bit floating point with a static per-tensor scale (float32, zero-dimensional), and back; beyond
    ``448 * scale`` they are cut off."""
    unit = scale.to(x.dtype)
    return float8.rounded(x / unit) * unit


@quantize_dequantize_e4m3.register_fake
def _(x: Tensor, scale: Tensor) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("compress::quantize_dequantize_dynamic", mutates_args=())
def quantize_dequantize_dynamic(x: Tensor, bits: int) -> Tensor:
    """Activations rounded to an asymmetric per-tensor grid that is made from the tensor itself, as ONNX defines
    DynamicQuantizeLinear: the range is widened to hold zero, codes are unsigned, the zero point is an integer.

    The range is that of the whole tensor, batch and padding included: a row's result depends on its neighbours.
    """
    levels = 2**bits - 1
    low, high = x.amin().clamp(max=0.0), x.amax().clamp(min=0.0)
    scale = (high - low) / levels
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    zero_point = (-low / scale).round().clamp(0, levels)
    codes = ((x / scale).round() + zero_point).clamp(0, levels)
    return (codes - zero_point) * scale


@quantize_dequantize_dynamic.register_fake
def _(x: Tensor, bits: int) -> Tensor:
    return torch.empty_like(x)


def _matrix(shape: list[int]) -> list[int]:
    columns = 1
    for size in shape[1:]:
        columns *= size
    return [shape[0], columns]
