"""Lowerings of tensors made from nothing."""

from __future__ import annotations

from typing import Any

import torch

from export.onnx_lowering import Lowering, lowers
from export.onnx_ops import value_of
from export.onnx_values import Held


def _filled(b: Lowering, value: Any) -> Held:
    """One value in the traced shape, left to broadcasting."""
    if isinstance(value, Held):
        return b.cast(b.squeeze(value), b.dtype)
    value = value_of(b, value, b.dtype)
    if isinstance(value, Held):
        return value
    return Held((1,) * len(b.shape), b.dtype, const=torch.full((1,) * len(b.shape), value, dtype=b._traced().dtype))


@lowers("full", "full_like", "new_full", "fill.Scalar", "fill.Tensor")
def _full(b: Lowering, x: Any, value: Any = None, fill: Any = None, **_: Any) -> Held:
    assert b.node is not None
    return _filled(b, fill if "new_full" in str(b.node.target) else value)


@lowers("zeros", "zeros_like", "new_zeros", "empty.memory_format", "empty_like", "new_empty", "zero")
def _zeros(b: Lowering, *_: Any, **__: Any) -> Held:
    return _filled(b, 0)


@lowers("ones", "ones_like", "new_ones")
def _ones(b: Lowering, *_: Any, **__: Any) -> Held:
    return _filled(b, 1)


@lowers("scalar_tensor")
def _scalar_tensor(b: Lowering, value: Any, **_: Any) -> Held:
    return _filled(b, value)


@lowers("arange", "arange.start", "arange.start_step")
def _arange(b: Lowering, start: Any, end: Any = None, step: Any = 1, **_: Any) -> Held:
    if end is None:
        start, end = 0, start
    if start == 0 and step == 1 and b.dtype in (torch.int64, torch.int32):
        return Held(b.shape, b.dtype, iota=0)
    bounds = [value_of(b, item, b.dtype) for item in (start, end, step)]
    return b.op("Range", *(item if isinstance(item, Held) else b.constant(item, b.dtype) for item in bounds))
