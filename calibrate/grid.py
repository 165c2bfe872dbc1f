"""The quantization grid: which real numbers b-bit codes stand for, and how codes are stored."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from calibrate import float8

__all__ = ["Bits", "Granularity", "Grid", "offset", "pack", "unit", "unpack"]

Bits = Literal[2, 3, 4, 8]
Granularity = Literal["tensor", "channel", "group"]


@dataclass(frozen=True)
class Grid:
    """Uniform grid of ``2**bits`` signed codes: ``value = (code - zero_point) * scale``.

    Codes lie in ``[-2**(bits-1), 2**(bits-1) - 1]``; in a ``reduced`` grid of 8 bits in ``[-64, 63]``, so that the sum of two
    products with unsigned bytes fits 16 bits (x86 processors without VNNI add pairs so, and saturate). A symmetric grid has
    no zero point (it is 0). Weights of any rank are seen as a matrix [O, I]; ``scale`` and ``zero_point`` are [O, G]
    (``channel``: G = 1; ``group``: G = I / group_size) or [1, 1] (``tensor``).

    With ``power_of_two`` every scale is one, ``2**shift``, so that blocks of a tensor differ by shifts alone (Dong et al. 2023,
    BCT, arXiv 2304.01483; there is no code, the rule is a reconstruction): a symmetric grid has
    ``shift = ceil(log2(absmax)) - (bits - 1)``, one with zero points the least power that covers the range.

    With ``e4m3`` codes are the bits of 8-bit floating point numbers (``calibrate.float8``), ``value = number * scale``, and a
    scale is the largest value over 448.

    Bound: a value inside the range that the scale was made for is returned with an error of at most ``scale / 2``; with an
    integer zero point in range, zero is returned exactly (Jacob et al. 2018, arXiv 1712.05877, sec. 2.1). A symmetric grid with
    powers of two may cut its largest positive values off by up to ``scale``: its bound is ``absmax * 2**-(bits - 1)``.
    """

    bits: int = 8
    symmetric: bool = True
    granularity: Granularity = "channel"
    group_size: int | None = None
    reduced: bool = False
    e4m3: bool = False
    power_of_two: bool = False

    @property
    def low(self) -> int:
        return -self.high - (not self.e4m3)

    @property
    def high(self) -> int:
        if self.e4m3:
            return int(float8.LARGEST)
        return (1 << (self.bits - 1 - (self.reduced and self.bits == 8))) - 1

    def blocks(self, values: Tensor) -> Tensor:
        """Weights of any rank as [O, G, I/G], one scale for each of the first two dimensions ([1, 1, all] for ``tensor``).

        Raises:
            ValueError: the group size does not divide the inputs.
        """
        if self.granularity == "tensor":
            return values.reshape(1, 1, -1)
        matrix = values.reshape(values.shape[0], -1)
        size = matrix.shape[1] if self.granularity == "channel" else self.group_size
        if not size or matrix.shape[1] % size:
            raise ValueError(f"group_size {size} does not divide the {matrix.shape[1]} inputs")
        return matrix.reshape(matrix.shape[0], -1, size)

    def parameters(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor | None]:
        """Scale (float32) and zero point (int8, None when symmetric) that cover ``[low, high]``; any shape, elementwise.

        A symmetric grid uses codes ``-high..high``, so that the scale is ``max(|low|, |high|) / high``. A range that is only
        zero gets scale 1, which returns it exactly.
        """
        low, high = low.float().clamp(max=0.0), high.float().clamp(min=0.0)
        if self.symmetric:
            reach = torch.maximum(-low, high)
            scale = _power(reach) / (self.high + 1) if self.power_of_two else reach / self.high
            return torch.where(scale > 0, scale, torch.ones_like(scale)).clamp(min=2.0**-126), None
        scale = (high - low) / (self.high - self.low)
        scale = _power(scale) if self.power_of_two else scale
        scale = torch.where(scale > 0, scale, torch.ones_like(scale)).clamp(min=2.0**-126)
        zero_point = (self.low - low / scale).round().clamp(self.low, self.high)
        return scale, zero_point.to(torch.int8)

    def quantize(self, values: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
        """Codes (int8, same shape as ``values``), rounded half to even and clamped; ``scale`` as the class says."""
        blocks = self.blocks(values.float())
        codes = blocks / scale.unsqueeze(-1)
        if self.e4m3:
            return float8.codes(codes).reshape(values.shape)
        codes = codes.round() if zero_point is None else codes.round() + zero_point.unsqueeze(-1)
        return codes.clamp(self.low, self.high).to(torch.int8).reshape(values.shape)

    def dequantize(self, codes: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
        """Values (float32, same shape as ``codes``)."""
        blocks = float8.values(self.blocks(codes)) if self.e4m3 else self.blocks(codes).float()
        if zero_point is not None:
            blocks = blocks - zero_point.unsqueeze(-1).float()
        return (blocks * scale.unsqueeze(-1)).reshape(codes.shape)


def _power(values: Tensor) -> Tensor:
    """The least power of two that is not below each value (float32, not negative); 0 for 0. Exact: no logarithm is taken."""
    fraction = torch.frexp(values).mantissa
    return torch.where((values == 0) | (fraction == 0.5), values, values / fraction)


def unit(bits: int) -> tuple[int, int]:
    """The least number of codes that fill whole bytes, and those bytes: (2, 1) for 4 bits, (8, 3) for 3, (4, 1) for 2."""
    size = bits // math.gcd(bits, 8)
    return 8 * size // bits, size


def pack(codes: Tensor, bits: int) -> Tensor:
    """Signed codes (int8, any shape) as bytes: int8 flat for 8 bits, else uint8, one code after the other without gaps, the first
    in the lowest bits; a code of 3 bits may begin in one byte and end in the next.

    Codes are stored as two's complement, so 4-bit bytes equal those of ONNX INT4. The last byte is filled with zeros.
    """
    flat = codes.reshape(-1)
    if bits == 8:
        return flat.to(torch.int8)
    many, size = unit(bits)
    fields = torch.nn.functional.pad(flat, (0, -flat.numel() % many)).to(torch.uint8) & (2**bits - 1)
    fields = fields.reshape(-1, many)
    packed = torch.zeros(fields.shape[0], size, dtype=torch.uint8, device=codes.device)
    for position in range(many):
        byte, place = divmod(position * bits, 8)
        packed[:, byte] |= fields[:, position] << place
        if place + bits > 8:
            packed[:, byte + 1] |= fields[:, position] >> (8 - place)
    return packed.reshape(-1)[: -(-flat.numel() * bits // 8)]


def unpack(packed: Tensor, bits: int, shape: tuple[int, ...] | list[int]) -> Tensor:
    """The inverse of ``pack``: signed codes (int8) of the given shape."""
    if bits == 8:
        return packed.reshape(shape)
    many, size = unit(bits)
    flat = packed.reshape(-1)
    whole = torch.nn.functional.pad(flat, (0, -flat.numel() % size)).reshape(-1, size)
    fields = torch.empty(len(whole), many, dtype=torch.uint8, device=packed.device)
    for position in range(many):
        byte, place = divmod(position * bits, 8)
        fields[:, position] = whole[:, byte] >> place
        if place + bits > 8:
            fields[:, position] |= whole[:, byte + 1] << (8 - place)
    sign = 2 ** (bits - 1)
    signed: Tensor = ((fields & (2**bits - 1)).to(torch.int8) ^ sign) - sign
    return signed.reshape(-1)[: math.prod(shape)].reshape(shape)


def offset(packed: Tensor, bits: int) -> Tensor:
    """Bytes of ``pack`` (any shape, whole units of codes) with every code c as ``c + 2**(bits-1)``, or back again: the sign bit
    of each is turned over."""
    many, size = unit(bits)
    signs = pack(torch.full((many,), -(2 ** (bits - 1)), dtype=torch.int8, device=packed.device), bits)
    return packed ^ signs.repeat(-(-packed.numel() // size))[: packed.numel()].reshape(packed.shape)
