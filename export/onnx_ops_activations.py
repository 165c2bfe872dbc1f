"""Lowerings of activation functions."""

from __future__ import annotations

import math

from export.onnx_lowering import Lowering, lowers
from export.onnx_ops import binary, clamp, elementwise
from export.onnx_values import Held, axis_of


@lowers("relu6")
def _relu6(b: Lowering, x: Held) -> Held:
    return clamp(b, x, 0.0, 6.0)


@lowers("silu")
def _silu(b: Lowering, x: Held) -> Held:
    return b.op("Mul", x, elementwise(b, "Sigmoid", x), shape=x.shape, dtype=x.dtype)


@lowers("gelu")
def _gelu(b: Lowering, x: Held, approximate: str = "none") -> Held:
    if b.opset >= 20:
        return elementwise(b, "Gelu", x, approximate=approximate)
    if approximate == "tanh":
        cube = binary(b, "Mul", binary(b, "Mul", x, x), x)
        inner = binary(b, "Mul", binary(b, "Add", x, binary(b, "Mul", cube, 0.044715)), math.sqrt(2.0 / math.pi))
        factor = elementwise(b, "Tanh", inner)
    else:
        factor = elementwise(b, "Erf", binary(b, "Div", x, math.sqrt(2.0)))
    return binary(b, "Mul", binary(b, "Mul", x, binary(b, "Add", factor, 1.0)), 0.5)


@lowers("hardsigmoid")
def _hardsigmoid(b: Lowering, x: Held) -> Held:
    return elementwise(b, "HardSigmoid", x, alpha=1.0 / 6.0, beta=0.5)


@lowers("leaky_relu")
def _leaky_relu(b: Lowering, x: Held, slope: float = 0.01) -> Held:
    return elementwise(b, "LeakyRelu", x, alpha=float(slope))


@lowers("elu")
def _elu(b: Lowering, x: Held, alpha: float = 1.0, scale: float = 1.0, input_scale: float = 1.0) -> Held:
    if scale != 1 or input_scale != 1:
        raise b.refuse("aten.elu with a scale has no ONNX form here", "Use elu with its default scales.")
    return elementwise(b, "Elu", x, alpha=float(alpha))


@lowers("selu")
def _selu(b: Lowering, x: Held) -> Held:
    return elementwise(b, "Selu", x)


@lowers("softplus")
def _softplus(b: Lowering, x: Held, beta: float = 1.0, threshold: float = 20.0) -> Held:
    if beta == 1:
        return elementwise(b, "Softplus", x)
    return binary(b, "Div", elementwise(b, "Softplus", binary(b, "Mul", x, beta)), beta)


@lowers("mish")
def _mish(b: Lowering, x: Held) -> Held:
    return b.op("Mul", x, elementwise(b, "Tanh", elementwise(b, "Softplus", x)), shape=x.shape, dtype=x.dtype)


@lowers("log_sigmoid")
def _log_sigmoid(b: Lowering, x: Held) -> Held:
    return elementwise(b, "Neg", elementwise(b, "Softplus", elementwise(b, "Neg", x)))


@lowers("prelu", "_prelu_kernel")
def _prelu(b: Lowering, x: Held, weight: Held) -> Held:
    if weight.rank == 1 and x.rank > 2:
        weight = b.reshape(weight, (weight.shape[0], *[1] * (x.rank - 2)))
    return b.op("PRelu", x, weight, shape=x.shape, dtype=x.dtype)


@lowers("glu")
def _glu(b: Lowering, x: Held, axis: int = -1) -> Held:
    axis = axis_of(axis, x.rank)
    half = x.shape[axis] // 2
    shape = [half if at == axis else size for at, size in enumerate(x.shape)]
    one, two = b.ops("Split", x, b.ints(half, half), outputs=[(shape, x.dtype)] * 2, axis=axis)
    return b.op("Mul", one, elementwise(b, "Sigmoid", two), shape=shape, dtype=x.dtype)
