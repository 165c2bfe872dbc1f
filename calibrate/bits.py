"""One-bit weights: how their bits are stored, what integers they stand for, and the arithmetic of a device that has bits.

A weight [O, I] of K bases is ``scale[o] * (shift[o, g] + sum_k multiples[o, g, k] * b_k[o, i])``, g the group of i, with signs
b_k of -1 and +1. The sum is an integer of 8 bits, so that runtimes whose smallest kernels are INT8 compute with it exactly.

The K planes lie one after the other. Within a plane weights follow one another in the order of the tensor (row by row) without
gaps, eight to a byte, the first in the lowest bit; a set bit is +1; the last byte of a plane is filled with zeros.

Shapes: O outputs, I inputs, G groups, K bases, W words.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["integers", "pack_signs", "plane_bytes", "popcount", "signs", "unpack_signs", "words", "xnor_product"]

_WORD = 64


def signs(values: Tensor) -> Tensor:
    """-1 or +1 (int8) for each value; the sign of 0 is +1, which ``torch.sign`` and ONNX's Sign do not say."""
    return torch.where(values >= 0, 1, -1).to(torch.int8)


def plane_bytes(shape: Sequence[int]) -> int:
    """Bytes of one plane of a weight of that shape."""
    return -(-math.prod(shape) // 8)


def pack_signs(planes: Tensor) -> Tensor:
    """Signs [K, ...] (what is positive is +1) as bytes, uint8 [K * bytes of a plane]."""
    bits = (planes.reshape(planes.shape[0], -1) > 0).to(torch.uint8)
    bits = torch.nn.functional.pad(bits, (0, -bits.shape[1] % 8)).reshape(planes.shape[0], -1, 8)
    packed = torch.zeros(bits.shape[:2], dtype=torch.uint8, device=bits.device)
    for place in range(8):
        packed |= bits[..., place] << place
    return packed.reshape(-1)


def unpack_signs(packed: Tensor, shape: Sequence[int]) -> Tensor:
    """The inverse of ``pack_signs``: signs (int8) [K, *shape]."""
    places = torch.arange(8, dtype=torch.uint8, device=packed.device)
    bits = (packed.reshape(-1, plane_bytes(shape), 1) >> places) & 1
    planes = bits.flatten(1)[:, : math.prod(shape)].reshape(-1, *shape).to(torch.int8)
    return planes * 2 - 1


def integers(packed: Tensor, multiples: Tensor | None, shift: Tensor | None, shape: Sequence[int]) -> Tensor:
    """``shift + sum_k multiples_k b_k`` (int8) in the weight's shape, seen as [O, G, I / G].

    Args:
        packed: uint8, K planes.
        multiples: int8 [O, G, K], or None for one plane as it is; shift: int8 [O, G] or None.
    """
    if multiples is None:
        return unpack_signs(packed, shape)[0]
    outputs, groups, bases = multiples.shape
    planes = unpack_signs(packed, (outputs, groups, math.prod(shape) // (outputs * groups)))
    total = torch.zeros(planes.shape[1:], dtype=torch.int8, device=packed.device)
    for number in range(bases):
        total += planes[number] * multiples[..., number].unsqueeze(-1)
    return (total if shift is None else total + shift.unsqueeze(-1)).reshape(tuple(shape))


# -- what a device with bit operations computes ---------------------------------------------------------------------


def words(values: Tensor) -> Tensor:
    """Signs of vectors [..., I] in words of 64 bits, int64 [..., W], each row by itself; the rest of the last word is zeros."""
    bits = torch.nn.functional.pad((values >= 0).to(torch.int64), (0, -values.shape[-1] % _WORD))
    bits = bits.reshape(*values.shape[:-1], -1, _WORD)
    return (bits << torch.arange(_WORD, device=values.device)).sum(-1)


def popcount(given: Tensor) -> Tensor:
    """Set bits of each 64-bit word (int64), by adding neighbours in a tree (Warren, Hacker's Delight, sec. 5-1)."""
    low = (1 << 62) - 1 | (1 << 62)

    def shifted(x: Tensor, places: int) -> Tensor:  # without the sign, which ``>>`` of int64 repeats
        return (x >> places) & (low >> (places - 1))

    count = given - (shifted(given, 1) & 0x5555555555555555)
    count = (count & 0x3333333333333333) + (shifted(count, 2) & 0x3333333333333333)
    count = (count + shifted(count, 4)) & 0x0F0F0F0F0F0F0F0F
    for places in (8, 16, 32):
        count = count + shifted(count, places)
    return count & 127


def xnor_product(left: Tensor, right: Tensor, inputs: int) -> Tensor:
    """Products of sign vectors, from their words: ``I - 2 popcount(left ^ right)`` (Rastegari et al. 2016, arXiv 1603.05279,
    sec. 3.2), which counts the places where both agree twice and takes all of them away once.

    Args:
        left: int64 [N, W] (``words``); right: int64 [O, W]; both padded alike, so that the padding agrees.
        inputs: I, places that count.

    Returns:
        int64 [N, O], equal to the float product of the signs.
    """
    return inputs - 2 * popcount(left.unsqueeze(1) ^ right.unsqueeze(0)).sum(-1)
