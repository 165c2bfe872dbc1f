"""How Core ML stores integer codes: which of its compressed forms holds a weight exactly, and the operations of it.

| codes | iOS 18 | iOS 16, 17 |
|---|---|---|
| 8 bits | int8, ``constexpr_blockwise_shift_scale`` | int8, ``constexpr_affine_dequantize``: per tensor, per channel |
| 4 bits | int4, ``constexpr_blockwise_shift_scale`` | packed indices, ``constexpr_lut_to_dense``: per tensor |
| 3 bits | uint3 indices, as 2 bits; in groups of 64 and fewer int4, as 4 bits | as 4 bits |
| 2 bits | uint2 indices, ``constexpr_lut_to_dense`` (per group its table is int8 and scaled) | as 4 bits |
| 1 to 3 bases | uint1, uint2, uint3 indices, ``constexpr_lut_to_dense`` (but for +-1 its table is int8 and scaled) | none |

A table of a group has a byte for each value: eight bytes for 64 weights or fewer make up for the bit that 3 bits save on 4.
An index of a table is ``code + 2**(bits-1)``; of planes of bits, bit k of it is that of plane k.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

__all__ = ["BinaryWeight", "Target", "Weight", "binary_refusal", "block_counts", "refusal", "stored_bits"]

Target = Literal["iOS16", "iOS17", "iOS18"]
Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Weight:
    """Signed codes (int8) in the weight's own shape; scale (float32) and zero point (int8 or None) [O, G] or [1, 1]."""

    codes: Array
    scale: Array
    zero_point: Array | None
    bits: int

    def key(self) -> str:
        """Equal for equal weights only."""
        content = hashlib.sha256(repr((self.bits, self.codes.shape, self.scale.shape, self.zero_point is None)).encode())
        for part in (self.codes, self.scale, self.zero_point):
            content.update(b"" if part is None else np.ascontiguousarray(part).data)
        return content.hexdigest()

    def emit(self, target: Target, name: str) -> Any:
        """The MIL variable of the dense weight; its operation is called ``name``.

        Raises:
            ValueError: the target has no form for these codes (``refusal`` tells before).
        """
        reason = refusal(target, self.bits, self.codes.shape, self.scale.shape)
        if reason:
            raise ValueError(reason)
        bits = stored_bits(target, self.bits, self.codes.size // self.scale.size)
        if bits != self.bits:
            return replace(self, bits=bits).emit(target, name)
        if target != "iOS18":
            return self._affine(name) if self.bits == 8 else self._packed_table(name)
        if self.bits < 4:
            return self._table(name) if self.scale.shape[1] == 1 else self._table_of_codes(name)
        return self._shift_scale(name)

    def _shift_scale(self, name: str) -> Any:
        from coremltools.converters.mil.mil import Builder as mb

        counts = block_counts(self.codes.shape, self.scale.shape)
        assert counts is not None
        return mb.constexpr_blockwise_shift_scale(
            data=_narrow(self.codes, self.bits),
            scale=self.scale.reshape(counts),
            offset=None if self.zero_point is None else _narrow(self.zero_point.reshape(counts), self.bits),
            name=name,
        )

    def _table(self, name: str) -> Any:
        from coremltools.converters.mil.mil import Builder as mb

        lut = self._levels().reshape(self.scale.shape[0], *[1] * (self.codes.ndim - 1), 2**self.bits, 1)
        return mb.constexpr_lut_to_dense(indices=self._indices(), lut=lut, name=name)

    def _table_of_codes(self, name: str) -> Any:
        """One table of all codes a group, scaled by a ``shift_scale``: the order that systems before iOS 26 need."""
        from coremltools.converters.mil.mil import Builder as mb

        counts = block_counts(self.codes.shape, self.scale.shape)
        assert counts is not None
        half = 2 ** (self.bits - 1)
        levels = np.broadcast_to(np.arange(-half, half, dtype=np.int8)[:, None], (*counts, 2 * half, 1))
        offset = None if self.zero_point is None else self.zero_point.reshape(*counts, 1, 1)
        lut = mb.constexpr_blockwise_shift_scale(
            data=np.array(levels), scale=self.scale.reshape(*counts, 1, 1), offset=offset, name=f"{name}_table"
        )
        return mb.constexpr_lut_to_dense(indices=self._indices(), lut=lut, name=name)

    def _affine(self, name: str) -> Any:
        from coremltools.converters.mil.mil import Builder as mb

        shift = np.zeros_like(self.scale, np.int8) if self.zero_point is None else self.zero_point
        scale, shift = self.scale.reshape(-1), shift.reshape(-1)
        if scale.size == 1 or not shift.any():
            shift = shift[0]
        return mb.constexpr_affine_dequantize(
            quantized_data=self.codes, zero_point=shift, scale=scale[0] if scale.size == 1 else scale, axis=0, name=name
        )

    def _packed_table(self, name: str) -> Any:
        from coremltools.converters.mil.mil import Builder as mb

        indices = (self.codes.reshape(-1).astype(np.int16) + 2 ** (self.bits - 1)).astype(np.uint8)
        stream = np.unpackbits(indices[:, None], axis=1, count=self.bits, bitorder="little")
        return mb.constexpr_lut_to_dense(
            indices=np.packbits(stream.reshape(-1), bitorder="little"),
            lut=self._levels().reshape(-1),
            shape=np.array(self.codes.shape, np.uint32),
            name=name,
        )

    def _levels(self) -> Array:
        """The values that codes stand for, one row of ``2**bits`` a scale, float32."""
        codes = np.arange(-(2 ** (self.bits - 1)), 2 ** (self.bits - 1), dtype=np.float32)
        shift = 0.0 if self.zero_point is None else self.zero_point.reshape(-1, 1).astype(np.float32)
        return np.asarray((codes - shift) * self.scale.reshape(-1, 1), np.float32)

    def _indices(self) -> Array:
        from coremltools.converters.mil.mil import types

        width = {2: types.uint2, 3: types.uint3}[self.bits]
        return (self.codes + np.int8(2 ** (self.bits - 1))).astype(types.nptype_from_builtin(width))


@dataclass(frozen=True)
class BinaryWeight:
    """Planes of signs (int8) [K, ...] in the weight's shape; whole numbers (int8) [O, G, K] and [O, G], or None; scale [O, 1]."""

    planes: Array
    multiples: Array | None
    shift: Array | None
    scale: Array

    def key(self) -> str:
        """Equal for equal weights only."""
        parts = (self.planes, self.multiples, self.shift, self.scale)
        content = hashlib.sha256(repr([None if part is None else part.shape for part in parts]).encode())
        for part in parts:
            content.update(b"" if part is None else np.ascontiguousarray(part).data)
        return content.hexdigest()

    def emit(self, target: Target, name: str) -> Any:
        """The MIL variable of the dense weight; its operation is called ``name``.

        Raises:
            ValueError: the target has no form for it (``binary_refusal`` tells before).
        """
        from coremltools.converters.mil.mil import Builder as mb
        from coremltools.converters.mil.mil import types

        bases, shape = len(self.planes), self.planes.shape[1:]
        reason = binary_refusal(target, shape, 1 if self.multiples is None else self.multiples.shape[1])
        if reason:
            raise ValueError(reason)
        bits = ((self.planes > 0) << np.arange(bases).reshape(-1, *[1] * len(shape))).sum(0).astype(np.uint8)
        indices = bits.astype(types.nptype_from_builtin((types.uint1, types.uint2, types.uint3)[bases - 1]))
        if self.multiples is None:
            levels = np.stack([-self.scale, self.scale], -1).astype(np.float32)
            lut: Any = levels.reshape(len(self.scale), *[1] * (len(shape) - 1), 2, 1)
        else:
            lut = self._table(shape, f"{name}_table")
        return mb.constexpr_lut_to_dense(indices=indices, lut=lut, name=name)

    def _table(self, shape: tuple[int, ...], name: str) -> Any:
        """What each index stands for, in whole numbers, and the scales of the rows."""
        from coremltools.converters.mil.mil import Builder as mb

        assert self.multiples is not None
        counts = block_counts(shape, self.multiples.shape[:2])
        assert counts is not None
        bases = self.multiples.shape[2]
        signs = 2 * ((np.arange(2**bases)[:, None] >> np.arange(bases)) & 1) - 1
        levels = self.multiples.astype(np.int16) @ signs.T.astype(np.int16)
        if self.shift is not None:
            levels = levels + self.shift[..., None].astype(np.int16)
        return mb.constexpr_blockwise_shift_scale(
            data=levels.astype(np.int8).reshape(*counts, 2**bases, 1),
            scale=self.scale.astype(np.float32).reshape(-1, *[1] * (len(counts) + 1)),
            name=name,
        )


def _narrow(codes: Array, bits: int) -> Array:
    """int8, or int8 marked as int4 in the way coremltools knows it."""
    if bits == 8:
        return codes.astype(np.int8)
    from coremltools.converters.mil.mil import types

    return codes.astype(types.nptype_from_builtin(types.int4))


def stored_bits(target: Target, bits: int, size: int) -> int:
    """Bits in which codes lie in a package; ``size``: weights that share a scale. Codes of 3 bits lie in 4 where there is no
    table of eight values, or where the tables of groups would cost more than a bit a weight."""
    return 4 if bits == 3 and (target != "iOS18" or size <= 64) else bits


def block_counts(shape: tuple[int, ...], scales: tuple[int, ...]) -> tuple[int, ...] | None:
    """How many scales a weight has along each dimension: [O, G] scales over the flattened inputs, as its blocks.

    None where a group of inputs is no box of the weight (a convolution whose group cuts a kernel unevenly).
    """
    if scales[1] == 1:
        return (scales[0], *[1] * (len(shape) - 1))
    left = int(np.prod(shape[1:])) // scales[1]
    counts: list[int] = []
    for size in reversed(shape[1:]):
        if left % size == 0:
            counts.append(1)
            left //= size
        elif size % left == 0:
            counts.append(size // left)
            left = 1
        else:
            return None
    return (scales[0], *reversed(counts)) if left == 1 else None


def refusal(target: Target, bits: int, shape: tuple[int, ...], scales: tuple[int, ...]) -> str | None:
    """Why the target cannot store codes of these bits, weight shape and scale shape; None where it can."""
    if target == "iOS18":
        if block_counts(shape, scales) is None:
            return "a group of inputs cuts the convolution kernel unevenly; choose a group size that is a multiple of it"
        return None
    if scales[1] > 1:
        return f"{target} has no scale per group of inputs; use target iOS18 or granularity channel"
    if bits != 8 and scales[0] > 1:
        return f"{target} stores {bits}-bit codes only with one scale per tensor; use target iOS18 or granularity tensor"
    return None


def binary_refusal(target: Target, shape: tuple[int, ...], groups: int) -> str | None:
    """Why the target cannot store planes of bits of this shape with a table for each of so many groups; None where it can."""
    if target != "iOS18":
        return f"{target} has one table of values for a whole weight, and one-bit weights have one a row; use target iOS18"
    return refusal(target, 1, shape, (shape[0], groups))
