"""Lowerings of reductions."""

from __future__ import annotations

import math
from typing import Any

import torch

from export.onnx_lowering import Lowering, lowers
from export.onnx_ops import binary, elementwise, whole_input
from export.onnx_values import Held, axis_of

__all__ = ["reduce"]


def reduce(b: Lowering, kind: str, x: Held, axes: Any, keep: bool, dtype: torch.dtype | None = None) -> Held:
    """Reduces ``x`` (already whole) over ``axes`` (None or empty: all)."""
    axes = [axes] if isinstance(axes, int) else axes
    axes = sorted(axis_of(axis, x.rank) for axis in axes) if axes else list(range(x.rank))
    if not axes:
        return x
    shape = [1 if at in axes else size for at, size in enumerate(x.shape)]
    shape = shape if keep else [size for at, size in enumerate(shape) if at not in axes]
    if b.opset >= 18 or kind == "ReduceSum":
        return b.op(kind, x, b.ints(*axes), shape=shape, dtype=dtype or x.dtype, keepdims=int(keep))
    return b.op(kind, x, shape=shape, dtype=dtype or x.dtype, axes=axes, keepdims=int(keep))


@lowers("sum.dim_IntList", "sum")
def _sum(b: Lowering, x: Held, axes: Any = None, keepdim: bool = False, dtype: Any = None) -> Held:
    wide = b.compute == torch.float16 and b.dtype == torch.float16
    return reduce(b, "ReduceSum", b.cast(whole_input(b, x), torch.float32 if wide else b.dtype), axes, keepdim)


@lowers("mean.dim", "mean")
def _mean(b: Lowering, x: Held, axes: Any = None, keepdim: bool = False, dtype: Any = None) -> Held:
    return reduce(b, "ReduceMean", b.cast(whole_input(b, x), x.dtype if x.dtype.is_floating_point else b.dtype), axes, keepdim)


@lowers("amax")
def _amax(b: Lowering, x: Held, axes: Any = None, keepdim: bool = False) -> Held:
    return reduce(b, "ReduceMax", whole_input(b, x), axes, keepdim)


@lowers("amin")
def _amin(b: Lowering, x: Held, axes: Any = None, keepdim: bool = False) -> Held:
    return reduce(b, "ReduceMin", whole_input(b, x), axes, keepdim)


@lowers("max")
def _max(b: Lowering, x: Held) -> Held:
    return reduce(b, "ReduceMax", whole_input(b, x), None, False)


@lowers("min")
def _min(b: Lowering, x: Held) -> Held:
    return reduce(b, "ReduceMin", whole_input(b, x), None, False)


@lowers("prod.dim_int", "prod")
def _prod(b: Lowering, x: Held, axis: Any = None, keepdim: bool = False, dtype: Any = None) -> Held:
    return reduce(b, "ReduceProd", b.cast(whole_input(b, x), b.dtype), axis, keepdim)


def _extreme(kind: str, arg: str) -> Any:
    def lowering(b: Lowering, x: Held, axis: int, keepdim: bool = False) -> list[Held]:
        x = whole_input(b, x)
        value = reduce(b, kind, x, axis, keepdim)
        index = b.op(arg, x, shape=value.shape, dtype=torch.int64, axis=axis_of(axis, x.rank), keepdims=int(keepdim))
        return [value, index]

    return lowering


lowers("max.dim")(_extreme("ReduceMax", "ArgMax"))
lowers("min.dim")(_extreme("ReduceMin", "ArgMin"))


def _arg(kind: str) -> Any:
    def lowering(b: Lowering, x: Held, axis: int | None = None, keepdim: bool = False) -> Held:
        x = whole_input(b, x)
        if x.dtype == torch.bool:
            x = b.cast(x, torch.int32)
        if axis is None:
            x, axis = b.reshape(x, (math.prod(x.shape),)), 0
        return b.op(kind, x, axis=axis_of(axis, x.rank), keepdims=int(keepdim))

    return lowering


lowers("argmax")(_arg("ArgMax"))
lowers("argmin")(_arg("ArgMin"))


def _quantifier(kind: str) -> Any:
    def lowering(b: Lowering, x: Held, axes: Any = None, keepdim: bool = False) -> Held:
        found = b.cast(b.cast(whole_input(b, x), torch.bool), torch.int32)
        return b.cast(reduce(b, kind, found, axes, keepdim), torch.bool)

    return lowering


lowers("any", "any.dim", "any.dims")(_quantifier("ReduceMax"))
lowers("all", "all.dim", "all.dims")(_quantifier("ReduceMin"))


@lowers("var.correction", "var.dim", "var", "std.correction", "std.dim", "std")
def _var(b: Lowering, x: Held, axes: Any = None, unbiased: Any = None, keepdim: bool = False, correction: Any = None) -> Held:
    assert b.node is not None
    if isinstance(axes, bool):
        axes, unbiased = None, axes
    if "correction" in str(b.node.target):
        correction, keepdim = 1 if correction is None else correction, bool(b.node.kwargs.get("keepdim", keepdim))
    else:
        correction = int(unbiased is None or unbiased)
    x = whole_input(b, x)
    every = [axes] if isinstance(axes, int) else axes or list(range(x.rank))
    every = [axis_of(axis, x.rank) for axis in every]
    centered = binary(b, "Sub", x, reduce(b, "ReduceMean", x, every, True))
    mean = reduce(b, "ReduceMean", binary(b, "Mul", centered, centered), every, keepdim)
    count = math.prod(x.shape[axis] for axis in every)
    if correction:
        mean = binary(b, "Mul", mean, count / (count - correction))
    return elementwise(b, "Sqrt", mean) if "std" in str(b.node.target) else mean


@lowers("norm.ScalarOpt_dim", "linalg_vector_norm", "norm.Scalar")
def _norm(b: Lowering, x: Held, order: Any = 2, axes: Any = None, keepdim: bool = False, dtype: Any = None) -> Held:
    kind = {1: "ReduceL1", 2: "ReduceL2", None: "ReduceL2"}.get(order)
    if kind is None:
        raise b.refuse(f"a norm of order {order} has no ONNX form here", "Use order 1 or 2.")
    return reduce(b, kind, whole_input(b, x), axes, keepdim)


@lowers("logsumexp")
def _logsumexp(b: Lowering, x: Held, axes: Any, keepdim: bool = False) -> Held:
    return reduce(b, "ReduceLogSumExp", whole_input(b, x), axes, keepdim)


@lowers("cumsum")
def _cumsum(b: Lowering, x: Held, axis: int, dtype: Any = None) -> Held:
    x = b.cast(whole_input(b, x), b.dtype)
    return b.op("CumSum", x, b.constant(axis_of(axis, x.rank), torch.int64), shape=x.shape)
