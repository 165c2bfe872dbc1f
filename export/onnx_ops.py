"""Lowerings of elementwise arithmetic, comparisons and logic."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from export.onnx_lowering import WIDE, Lowering, lowers
from export.onnx_values import Dim, Held

__all__ = ["add", "biased", "binary", "broadcast", "clamp", "elementwise", "traced_shape", "value_of", "where", "whole_input"]

_UNARY = {
    "abs": "Abs", "neg": "Neg", "exp": "Exp", "log": "Log", "sqrt": "Sqrt", "sin": "Sin", "cos": "Cos", "tan": "Tan",
    "tanh": "Tanh", "erf": "Erf", "sigmoid": "Sigmoid", "relu": "Relu", "floor": "Floor", "ceil": "Ceil", "round": "Round",
    "sign": "Sign", "reciprocal": "Reciprocal", "hardswish": "HardSwish", "atan": "Atan", "asin": "Asin", "acos": "Acos",
    "sinh": "Sinh", "cosh": "Cosh",
}  # fmt: skip
_KEPT_WIDE = {"Exp", "Log", "Sqrt", "Sin", "Cos", "Reciprocal", "Neg"}
_BINARY = {"mul": "Mul", "sub": "Sub", "maximum": "Max", "minimum": "Min"}
_COMPARE = {"eq": "Equal", "gt": "Greater", "lt": "Less", "ge": "GreaterOrEqual", "le": "LessOrEqual"}
_LOGICAL = {"logical_and": "And", "logical_or": "Or", "logical_xor": "Xor"}
_BITWISE = {"and": "And", "or": "Or", "xor": "Xor"}


def broadcast(*shapes: Sequence[Dim]) -> tuple[Dim, ...]:
    """The shape that these broadcast to; a symbolic size wins over 1."""
    rank = max(len(shape) for shape in shapes)
    result: list[Dim] = [1] * rank
    for shape in shapes:
        for axis, size in enumerate(shape, rank - len(shape)):
            if size != 1:
                result[axis] = size
    return tuple(result)


def _operands(b: Lowering, dtype: torch.dtype, *items: Any) -> list[Held]:
    """Numbers become constants, all get the dtype; in a float16 graph wide values stay wide only among themselves."""
    held = [item for item in items if isinstance(item, Held)]
    if b.compute == torch.float16 and dtype == torch.float16:
        values = [item.dtype for item in held if item.const is None and item.dtype.is_floating_point]
        dtype = torch.float32 if values and all(kind == torch.float32 for kind in values) else dtype
    made = [b.cast(item, dtype) if isinstance(item, Held) else b.constant(_number(b, item), dtype) for item in items]
    if b.compute == torch.float16 and dtype == torch.float32:
        # A float16 graph narrows its constants when they are written; beside wide values they have to stay wide.
        made = [item if item.const is None else replace(item, exact=True, value=None) for item in made]
    return made


def _number(b: Lowering, item: Any) -> Any:
    if isinstance(item, (int, float, bool)):
        return item
    raise b.refuse(f"a number computed from sizes ({item}) is used as a value", "Make the dimension fixed.")


def value_of(b: Lowering, item: Any, dtype: torch.dtype) -> Any:
    """A size that depends on a dynamic dimension, as a tensor; anything else unchanged."""
    import sympy  # type: ignore[import-untyped]

    if isinstance(item, sympy.Basic):
        return b.cast(b.squeeze(b.size(item)), dtype)
    return item


def binary(b: Lowering, kind: str, x: Any, y: Any, dtype: torch.dtype | None = None) -> Held:
    """``kind(x, y)`` in the traced dtype, or the given one; operands may be numbers."""
    dtype = dtype or b.dtype
    x, y = _operands(b, dtype, value_of(b, x, dtype), value_of(b, y, dtype))
    return b.op(kind, x, y, shape=broadcast(x.shape, y.shape), dtype=x.dtype)


def add(b: Lowering, x: Any, y: Any) -> Held:
    """x + y. Floats are written as Sum for CPU runtimes: ONNX Runtime turns an Add of a bias into a Gemm that loses its
    integer kernel, and an Add before a LayerNormalization into SkipLayerNormalization, which is slower."""
    if not b.dtype.is_floating_point or b.dialect == "tensorrt":
        return binary(b, "Add", x, y)
    for one, other in ((x, y), (y, x)):
        if isinstance(one, Held) and one.const is None and isinstance(other, (int, float)):
            return binary(b, "Add", one, other)
    x, y = _operands(b, b.dtype, value_of(b, x, b.dtype), value_of(b, y, b.dtype))
    return b.op("Sum", x, y, shape=broadcast(x.shape, y.shape), dtype=x.dtype)


def biased(b: Lowering, x: Held, bias: Held) -> Held:
    """A product plus its bias [O]. With the bias written as [1, 1, O], ONNX Runtime leaves the Add as it is (see ``add``), and
    its Add is a third faster than its Sum."""
    if b.dialect == "tensorrt" or x.rank < 3 or bias.rank != 1:
        return add(b, x, bias)
    return b.op("Add", x, b.reshape(bias, (*[1] * (x.rank - 1), *bias.shape)), shape=x.shape, dtype=x.dtype)


@lowers("add.Tensor", "add.Scalar", "__add__.Tensor")
def _add(b: Lowering, x: Held, y: Any, alpha: Any = 1) -> Held:
    if b.dtype == torch.bool:
        return b.op("Or", *_operands(b, torch.bool, x, y), shape=broadcast(x.shape, getattr(y, "shape", ())))
    if isinstance(y, (int, float)) and y == 0 and x.dtype == b.dtype:
        return x
    if alpha != 1:
        y = y * alpha if not isinstance(y, Held) else binary(b, "Mul", y, alpha)
    return add(b, x, y)


@lowers("sub.Tensor", "sub.Scalar")
def _sub(b: Lowering, x: Held, y: Any, alpha: Any = 1) -> Held:
    if alpha != 1:
        y = y * alpha if not isinstance(y, Held) else binary(b, "Mul", y, alpha)
    return binary(b, "Sub", x, y)


@lowers("rsub.Scalar", "rsub.Tensor")
def _rsub(b: Lowering, x: Held, y: Any, alpha: Any = 1) -> Held:
    return binary(b, "Sub", y, x if alpha == 1 else binary(b, "Mul", x, alpha))


@lowers("mul.Tensor", "mul.Scalar", "multiply.Tensor")
def _mul(b: Lowering, x: Held, y: Any) -> Held:
    if b.dtype == torch.bool:
        return b.op("And", *_operands(b, torch.bool, x, y), shape=broadcast(x.shape, getattr(y, "shape", ())))
    if isinstance(y, (int, float)) and y == 1 and x.dtype == b.dtype:
        return x
    return binary(b, "Mul", x, y)


@lowers("maximum", "max.other")
def _maximum(b: Lowering, x: Held, y: Held) -> Held:
    return binary(b, "Max", x, y)


@lowers("minimum", "min.other")
def _minimum(b: Lowering, x: Held, y: Held) -> Held:
    return binary(b, "Min", x, y)


@lowers("div.Tensor", "div.Scalar", "true_divide.Tensor")
def _div(b: Lowering, x: Any, y: Any) -> Held:
    if isinstance(y, (int, float)) and b.dtype.is_floating_point and math.frexp(y)[0] in (0.5, -0.5):
        return binary(b, "Mul", x, 1.0 / y)
    return binary(b, "Div", x, y)


@lowers("div.Tensor_mode", "div.Scalar_mode")
def _div_mode(b: Lowering, x: Any, y: Any, rounding_mode: str | None = None) -> Held:
    if rounding_mode is None:
        return _div(b, x, y)
    if b.dtype.is_floating_point:
        quotient = binary(b, "Div", x, y)
        return _truncate(b, quotient) if rounding_mode == "trunc" else elementwise(b, "Floor", quotient)
    if rounding_mode == "trunc":
        return binary(b, "Div", x, y)
    remainder = binary(b, "Mod", x, y)
    return binary(b, "Div", binary(b, "Sub", x, remainder), y)


@lowers("floor_divide", "floor_divide.Scalar", "__floordiv__.Scalar")
def _floor_divide(b: Lowering, x: Any, y: Any) -> Held:
    return _div_mode(b, x, y, "floor")


@lowers("remainder.Scalar", "remainder.Tensor")
def _remainder(b: Lowering, x: Any, y: Any) -> Held:
    if not b.dtype.is_floating_point:
        return binary(b, "Mod", x, y)
    return binary(b, "Sub", x, binary(b, "Mul", elementwise(b, "Floor", binary(b, "Div", x, y)), y))


@lowers("fmod.Scalar", "fmod.Tensor")
def _fmod(b: Lowering, x: Any, y: Any) -> Held:
    x, y = _operands(b, b.dtype, x, y)
    return b.op("Mod", x, y, shape=broadcast(x.shape, y.shape), dtype=x.dtype, fmod=1)


@lowers("pow.Tensor_Scalar", "pow.Tensor_Tensor", "pow.Scalar", "square")
def _pow(b: Lowering, x: Any, exponent: Any = 2) -> Held:
    if isinstance(exponent, Held):
        return binary(b, "Pow", x, exponent)
    x = b.cast(x, torch.float32 if b.compute == torch.float16 and b.dtype == torch.float16 else b.dtype)
    if exponent in (2, 3):
        squared = b.op("Mul", x, x, shape=x.shape, dtype=x.dtype)
        return squared if exponent == 2 else b.op("Mul", squared, x, shape=x.shape, dtype=x.dtype)
    if exponent == 0.5:
        return elementwise(b, "Sqrt", x)
    if exponent == -0.5:
        return elementwise(b, "Reciprocal", elementwise(b, "Sqrt", x))
    return b.op("Pow", x, b.constant(exponent, x.dtype), shape=x.shape, dtype=x.dtype)


def elementwise(b: Lowering, kind: str, x: Held, **attributes: Any) -> Held:
    return b.op(kind, x, shape=x.shape, dtype=x.dtype, **attributes)


def _unary(kind: str) -> Any:
    def lowering(b: Lowering, x: Held, *_: Any, **__: Any) -> Held:
        if not x.dtype.is_floating_point and b.dtype.is_floating_point:
            x = b.cast(x, b.dtype)
        if kind in ("Floor", "Ceil", "Round") and not x.dtype.is_floating_point:
            return x
        return elementwise(b, kind, x)

    return lowering


for _name, _kind in _UNARY.items():
    lowers(_name)(_unary(_kind))
    if _kind in _KEPT_WIDE:
        WIDE.add(f"aten.{_name}.default")
lowers("negative")(_unary("Neg"))
WIDE |= {
    "aten.add.Tensor", "aten.add.Scalar", "aten.mul.Tensor", "aten.mul.Scalar", "aten.sub.Tensor", "aten.div.Tensor",
    "aten.pow.Tensor_Scalar", "aten.rsqrt.default", "aten.mean.dim", "aten.sum.dim_IntList", "aten.to.dtype",
    "aten.clamp.default", "aten.clamp_min.default", "aten.unsqueeze.default", "aten.expand.default", "aten.cat.default",
    "aten.view.default", "aten.reshape.default", "aten.transpose.int", "aten.matmul.default", "aten._to_copy.default",
    "aten.contiguous.default", "aten.clone.default",
}  # fmt: skip


@lowers("rsqrt")
def _rsqrt(b: Lowering, x: Held) -> Held:
    return elementwise(b, "Reciprocal", elementwise(b, "Sqrt", x))


@lowers("expm1")
def _expm1(b: Lowering, x: Held) -> Held:
    return binary(b, "Sub", elementwise(b, "Exp", x), 1.0)


@lowers("log1p")
def _log1p(b: Lowering, x: Held) -> Held:
    return elementwise(b, "Log", binary(b, "Add", x, 1.0))


@lowers("log2")
def _log2(b: Lowering, x: Held) -> Held:
    x = b.cast(x, b.dtype)
    return binary(b, "Mul", elementwise(b, "Log", x), 1.0 / math.log(2.0))


@lowers("exp2")
def _exp2(b: Lowering, x: Held) -> Held:
    return b.op("Pow", b.constant(2.0, x.dtype), x, shape=x.shape, dtype=x.dtype)


def _truncate(b: Lowering, x: Held) -> Held:
    return binary(b, "Mul", elementwise(b, "Sign", x), elementwise(b, "Floor", elementwise(b, "Abs", x)))


@lowers("trunc", "fix")
def _trunc(b: Lowering, x: Held) -> Held:
    return _truncate(b, x) if x.dtype.is_floating_point else x


@lowers("clamp", "clip", "hardtanh", "clamp.Tensor")
def clamp(b: Lowering, x: Held, min: Any = None, max: Any = None) -> Held:
    if b.node is not None and "hardtanh" in str(b.node.target):
        min, max = -1.0 if min is None else min, 1.0 if max is None else max
    for kind, limit in (("Max", min), ("Min", max)):
        if limit is not None:
            x = binary(b, kind, x, limit)
    return x


@lowers("clamp_min", "clamp_min.Tensor")
def _clamp_min(b: Lowering, x: Held, limit: Any) -> Held:
    return binary(b, "Max", x, limit)


@lowers("clamp_max", "clamp_max.Tensor")
def _clamp_max(b: Lowering, x: Held, limit: Any) -> Held:
    return binary(b, "Min", x, limit)


def whole_input(b: Lowering, x: Held, index: int = 0) -> Held:
    """The operand with its traced shape written out."""
    assert b.node is not None
    node = b.node.args[index]
    return b.full(x, traced_shape(node))


def traced_shape(node: Any) -> tuple[Dim, ...]:
    from export.onnx_values import dim

    return tuple(dim(size) for size in node.meta["val"].shape)


# -- comparisons, logic ---------------------------------------------------------------------------------------------


def _common(b: Lowering, x: Any, y: Any) -> tuple[Held, Held]:
    """Both in the dtype that torch compares them in."""
    kinds = [torch.empty((1,) * bool(item.rank), dtype=item.dtype) if isinstance(item, Held) else item for item in (x, y)]
    dtype = torch.result_type(kinds[0], kinds[1]) if not any(_symbolic(item) for item in kinds) else torch.int64
    x, y = _operands(b, b.narrow(dtype), value_of(b, x, dtype), value_of(b, y, dtype))
    return x, y


def _symbolic(item: Any) -> bool:
    return not isinstance(item, (torch.Tensor, int, float, bool))


def _compare(kind: str) -> Any:
    def lowering(b: Lowering, x: Any, y: Any) -> Held:
        x, y = _common(b, x, y)
        if x.dtype == torch.bool and kind != "Equal":
            x, y = b.cast(x, torch.int32), b.cast(y, torch.int32)
        return b.op(kind, x, y, shape=broadcast(x.shape, y.shape), dtype=torch.bool)

    return lowering


for _name, _kind in _COMPARE.items():
    lowers(f"{_name}.Tensor", f"{_name}.Scalar")(_compare(_kind))


@lowers("ne.Tensor", "ne.Scalar")
def _ne(b: Lowering, x: Any, y: Any) -> Held:
    return _not(b, _compare("Equal")(b, x, y))


@lowers("logical_not")
def _not(b: Lowering, x: Held) -> Held:
    return b.op("Not", b.cast(x, torch.bool), shape=x.shape, dtype=torch.bool)


@lowers("bitwise_not")
def _bitwise_not(b: Lowering, x: Held) -> Held:
    return _not(b, x) if x.dtype == torch.bool else elementwise(b, "BitwiseNot", x)


def _logical(kind: str, bitwise: bool) -> Any:
    def lowering(b: Lowering, x: Any, y: Any) -> Held:
        if bitwise and b.dtype != torch.bool:
            return binary(b, f"Bitwise{kind}", x, y)
        operands = _operands(b, torch.bool, x, y)
        for one, other in (operands, operands[::-1]):
            if kind in ("And", "Or") and one.const is not None and bool((one.const == (kind == "And")).all()):
                return b.reshape(other, (*[1] * (len(b.shape) - other.rank), *other.shape))
        return b.op(kind, *operands, shape=broadcast(*(item.shape for item in operands)), dtype=torch.bool)

    return lowering


for _name, _kind in _LOGICAL.items():
    lowers(_name)(_logical(_kind, False))
for _name, _kind in _BITWISE.items():
    _overloads = [f"{stem}.{end}" for stem in (f"bitwise_{_name}", f"__{_name}__") for end in ("Tensor", "Scalar")]
    lowers(*_overloads)(_logical(_kind, True))


@lowers("isnan")
def _isnan(b: Lowering, x: Held) -> Held:
    return b.op("IsNaN", x, shape=x.shape, dtype=torch.bool)


@lowers("isinf")
def _isinf(b: Lowering, x: Held) -> Held:
    return b.op("IsInf", x, shape=x.shape, dtype=torch.bool)


def where(b: Lowering, condition: Held, x: Any, y: Any, dtype: torch.dtype | None = None) -> Held:
    x, y = _operands(b, dtype or b.dtype, value_of(b, x, b.dtype), value_of(b, y, b.dtype))
    if x.dtype != y.dtype:
        x, y = b.cast(x, b.compute), b.cast(y, b.compute)
    return b.op("Where", condition, x, y, shape=broadcast(condition.shape, x.shape, y.shape), dtype=x.dtype)


@lowers("where.self", "where.ScalarOther", "where.ScalarSelf", "where.Scalar")
def _where(b: Lowering, condition: Held, x: Any, y: Any) -> Held:
    return where(b, b.cast(condition, torch.bool), x, y)


@lowers("masked_fill.Scalar", "masked_fill.Tensor")
def _masked_fill(b: Lowering, x: Held, mask: Held, value: Any) -> Held:
    return where(b, b.cast(mask, torch.bool), value, x)
