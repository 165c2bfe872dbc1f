"""MIL operations that make a dense weight out of compressed constants, in torch.

Source: the op definitions of coremltools (iOS 16: ``constexpr_ops.py``, iOS 18: ``compression.py``). Compressed data come
as int8 or uint8 tensors, one element for each code.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from export.mil_args import Args

__all__ = ["CONSTEXPR"]


def _spread(value: Tensor, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """Repeats one value a block until the tensor has the given shape; every size divides."""
    for axis, size in enumerate(shape):
        if value.shape[axis] not in (1, size):
            value = value.repeat_interleave(size // value.shape[axis], axis)
    return value


def _blockwise_shift_scale(args: Args) -> Tensor:
    data, scale, offset = args.tensor("data").float(), args.tensor("scale"), args.optional("offset")
    if offset is not None:
        data = data - _spread(offset.float(), data.shape)
    return data * _spread(scale, data.shape)


def _affine_dequantize(args: Args) -> Tensor:
    data, scale, offset = args.tensor("quantized_data").float(), args.tensor("scale"), args.tensor("zero_point").float()
    shape = [1] * data.dim()
    shape[int(args.tensor("axis"))] = -1
    if offset.dim():
        offset = offset.reshape(shape)
    return (data - offset) * (scale.reshape(shape) if scale.dim() else scale)


def _lut_to_dense(args: Args) -> Tensor:
    if args.has("shape"):
        return _lut_to_dense_packed(args)
    indices, lut = args.tensor("indices").long(), args.tensor("lut")
    width = lut.shape[-1]
    tables = lut.reshape(*lut.shape[:-2], -1)
    block = [size // groups for size, groups in zip(indices.shape, lut.shape[:-2], strict=True)]
    place: list[Tensor] = []
    for axis, (size, step) in enumerate(zip(indices.shape, block, strict=True)):
        shape = [1] * indices.dim()
        shape[axis] = -1
        place.append((torch.arange(size) // step).reshape(shape))
    picked = [tables[(*place, indices * width + offset)] for offset in range(width)]
    if width == 1:
        return picked[0]
    axis = int(args.tensor("vector_axis")) % indices.dim()
    return torch.stack(picked, axis + 1).flatten(axis, axis + 1)


def _lut_to_dense_packed(args: Args) -> Tensor:
    """iOS 16: one table, indices packed into bytes, the first in the lowest bits."""
    shape = [int(size) for size in args.tensor("shape").tolist()]
    bits = int(np.log2(args.tensor("lut").numel()))
    stream = np.unpackbits(args.tensor("indices").numpy().astype(np.uint8), bitorder="little")
    count = int(np.prod(shape))
    indices = (stream[: count * bits].reshape(count, bits) << np.arange(bits, dtype=np.uint8)).sum(1)
    table: Tensor = args.tensor("lut").reshape(-1)
    return table[torch.from_numpy(indices.astype(np.int64))].reshape(shape)


def _placed(mask: Tensor, values: Tensor) -> Tensor:
    dense = torch.zeros(mask.shape, dtype=values.dtype)
    dense[mask.bool()] = values
    return dense


def _sparse_to_dense(args: Args) -> Tensor:
    if not args.has("shape"):
        return _placed(args.tensor("mask"), args.tensor("nonzero_data"))
    shape = [int(size) for size in args.tensor("shape").tolist()]
    stream = np.unpackbits(args.tensor("mask").numpy().astype(np.uint8), bitorder="little")
    mask = torch.from_numpy(stream[: int(np.prod(shape))].reshape(shape).astype(np.uint8))
    return _placed(mask, args.tensor("nonzero_data"))


def _sparse_blockwise_shift_scale(args: Args) -> tuple[Tensor, Tensor]:
    mask = args.tensor("data_mask")
    offset = args.optional("offset")
    data = args.tensor("nonzero_data").float()
    if offset is not None:
        data = data - _spread(offset.float(), mask.shape).expand(mask.shape)[mask.bool()]
    return mask, data * _spread(args.tensor("scale"), mask.shape).expand(mask.shape)[mask.bool()]


def _lut_to_sparse(args: Args) -> tuple[Tensor, Tensor]:
    """The dense result keeps the zeros of the mask; with one table the vector entries follow one another."""
    mask, lut = args.tensor("indices_mask"), args.tensor("lut")
    if lut.shape[-1] != 1:
        raise NotImplementedError("constexpr_lut_to_sparse with vectors in the table")
    dense = _placed(mask, args.tensor("indices_nonzero_data"))
    values = _lut_to_dense(Args(indices=dense, lut=lut))
    return mask, values[mask.bool()]


CONSTEXPR: dict[str, Callable[[Args], Any]] = {
    "constexpr_blockwise_shift_scale": _blockwise_shift_scale,
    "constexpr_affine_dequantize": _affine_dequantize,
    "constexpr_lut_to_dense": _lut_to_dense,
    "constexpr_sparse_to_dense": _sparse_to_dense,
    "constexpr_sparse_blockwise_shift_scale": _sparse_blockwise_shift_scale,
    "constexpr_lut_to_sparse": _lut_to_sparse,
    "constexpr_cast": lambda args: args.tensor("source_val").float(),
}
"""Operation -> what computes it."""
