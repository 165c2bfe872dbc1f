"""What each MIL operation computes, in torch: one small function an operation, by its name in the program.

A kernel gets the arguments by their MIL names (tensors, lists of tensors, strings) and returns one tensor or a tuple.
Floats are float32 tensors whatever the program says: the interpreter rounds results to float16 where the program is float16.
Source: the op definitions of coremltools (``converters/mil/mil/ops/defs``) and Apple's MIL reference.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from export.mil_args import Args
from export.mil_constexpr import CONSTEXPR
from export.mil_layers import LAYERS
from export.mil_moves import MOVES

__all__ = ["EXACT", "KERNELS"]

Kernel = Callable[[Args], Any]


def _binary(function: Callable[[Tensor, Tensor], Tensor]) -> Kernel:
    return lambda args: function(args.tensor("x"), args.tensor("y"))


def _unary(function: Callable[[Tensor], Tensor]) -> Kernel:
    return lambda args: function(args.tensor("x"))


def _real_div(x: Tensor, y: Tensor) -> Tensor:
    return x / y if x.is_floating_point() else torch.div(x, y, rounding_mode="trunc")


def _cast(args: Args) -> Any:
    x, to = args.tensor("x"), args.text("dtype")
    if to in ("fp16", "fp32"):
        return x.float()
    if to == "bool":
        return x.bool()
    whole: Tensor = x.long() if not x.is_floating_point() else x.trunc().long()
    narrow = {"int8": torch.int8, "uint8": torch.uint8, "int16": torch.int16, "int32": torch.int32}
    if to == "uint16":
        return whole & 0xFFFF
    result = whole.to(narrow[to])
    return result if to in ("int8", "uint8") else result.long()


def _gelu(args: Args) -> Tensor:
    x, mode = args.tensor("x"), args.text("mode", "EXACT")
    if mode == "SIGMOID_APPROXIMATION":
        return x * torch.sigmoid(1.702 * x)
    return F.gelu(x, approximate="none" if mode == "EXACT" else "tanh")


def _prelu(args: Args) -> Tensor:
    alpha = args.tensor("alpha").reshape(-1, *[1] * (args.tensor("x").dim() - 2))
    return torch.where(args.tensor("x") >= 0, args.tensor("x"), args.tensor("x") * alpha)


def _reduce(function: Callable[[Tensor, list[int], bool], Tensor]) -> Kernel:
    def run(args: Args) -> Tensor:
        axes = args.ints("axes") if args.has("axes") else list(range(args.tensor("x").dim()))
        return function(args.tensor("x"), axes, args.flag("keep_dims"))

    return run


def _product(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    for axis in sorted((axis % x.dim() for axis in axes), reverse=True):
        x = x.prod(axis, keepdim=keep)
    return x


def _argument(function: Callable[..., Tensor]) -> Kernel:
    return lambda args: function(args.tensor("x"), dim=args.whole("axis", -1), keepdim=args.flag("keep_dims"))


ELEMENTWISE: dict[str, Callable[[Args], Any]] = {
    "add": _binary(torch.add),
    "sub": _binary(torch.sub),
    "mul": _binary(torch.mul),
    "real_div": _binary(_real_div),
    "floor_div": _binary(lambda x, y: torch.div(x, y, rounding_mode="floor")),
    "mod": _binary(torch.remainder),
    "maximum": _binary(torch.maximum),
    "minimum": _binary(torch.minimum),
    "pow": _binary(torch.pow),
    "equal": _binary(torch.eq),
    "not_equal": _binary(torch.ne),
    "greater": _binary(torch.gt),
    "greater_equal": _binary(torch.ge),
    "less": _binary(torch.lt),
    "less_equal": _binary(torch.le),
    "logical_and": _binary(torch.logical_and),
    "logical_or": _binary(torch.logical_or),
    "logical_xor": _binary(torch.logical_xor),
    "logical_not": _unary(torch.logical_not),
    "abs": _unary(torch.abs),
    "exp": _unary(torch.exp),
    "exp2": _unary(torch.exp2),
    "sqrt": _unary(torch.sqrt),
    "square": _unary(torch.square),
    "sin": _unary(torch.sin),
    "cos": _unary(torch.cos),
    "tan": _unary(torch.tan),
    "asin": _unary(torch.asin),
    "acos": _unary(torch.acos),
    "atan": _unary(torch.atan),
    "sinh": _unary(torch.sinh),
    "cosh": _unary(torch.cosh),
    "tanh": _unary(torch.tanh),
    "atanh": _unary(torch.atanh),
    "erf": _unary(torch.erf),
    "sign": _unary(torch.sign),
    "ceil": _unary(torch.ceil),
    "floor": _unary(torch.floor),
    "round": _unary(torch.round),
    "relu": _unary(torch.relu),
    "relu6": _unary(F.relu6),
    "silu": _unary(F.silu),
    "sigmoid": _unary(torch.sigmoid),
    "softsign": _unary(F.softsign),
    "softplus": _unary(lambda x: F.softplus(x, threshold=1e9)),
    "identity": _unary(lambda x: x),
    "log": lambda a: torch.log(a.tensor("x") + a.number("epsilon", 1e-45)),
    "rsqrt": lambda a: torch.rsqrt(a.tensor("x") + a.number("epsilon", 1e-12)),
    "inverse": lambda a: torch.reciprocal(a.tensor("x") + a.number("epsilon", 1e-4)),
    "clip": lambda a: a.tensor("x").clamp(a.number("alpha", -math.inf), a.number("beta", math.inf)),
    "threshold": lambda a: a.tensor("x").clamp(min=a.number("alpha", 0.0)),
    "thresholded_relu": lambda a: torch.where(
        a.tensor("x") >= a.number("alpha", 1.0), a.tensor("x"), torch.zeros_like(a.tensor("x"))
    ),
    "leaky_relu": lambda a: F.leaky_relu(a.tensor("x"), a.number("alpha", 0.01)),
    "elu": lambda a: F.elu(a.tensor("x"), a.number("alpha", 1.0)),
    "linear_activation": lambda a: a.tensor("x") * a.number("alpha", 1.0) + a.number("beta", 0.0),
    "scaled_tanh": lambda a: torch.tanh(a.tensor("x") * a.number("beta", 1.0)) * a.number("alpha", 1.0),
    "sigmoid_hard": lambda a: (a.tensor("x") * a.number("alpha", 0.2) + a.number("beta", 0.5)).clamp(0.0, 1.0),
    "clamped_relu": lambda a: F.leaky_relu(a.tensor("x"), a.number("alpha", 0.0)).clamp(max=a.number("beta", math.inf)),
    "prelu": _prelu,
    "gelu": _gelu,
    "cast": _cast,
    "softmax": lambda a: a.tensor("x").softmax(a.whole("axis", -1)),
    "reduce_mean": _reduce(lambda x, axes, keep: x.mean(axes, keepdim=keep)),
    "reduce_sum": _reduce(lambda x, axes, keep: x.sum(axes, keepdim=keep)),
    "reduce_max": _reduce(lambda x, axes, keep: x.amax(axes, keepdim=keep)),
    "reduce_min": _reduce(lambda x, axes, keep: x.amin(axes, keepdim=keep)),
    "reduce_prod": _reduce(_product),
    "reduce_l1_norm": _reduce(lambda x, axes, keep: x.abs().sum(axes, keepdim=keep)),
    "reduce_l2_norm": _reduce(lambda x, axes, keep: x.square().sum(axes, keepdim=keep).sqrt()),
    "reduce_sum_square": _reduce(lambda x, axes, keep: x.square().sum(axes, keepdim=keep)),
    "reduce_log_sum": _reduce(lambda x, axes, keep: x.sum(axes, keepdim=keep).log()),
    "reduce_log_sum_exp": _reduce(lambda x, axes, keep: x.logsumexp(axes, keepdim=keep)),
    "reduce_argmax": _argument(torch.argmax),
    "reduce_argmin": _argument(torch.argmin),
}
"""Operation -> what computes it."""

KERNELS: dict[str, Kernel] = {**ELEMENTWISE, **LAYERS, **MOVES, **CONSTEXPR}
"""MIL operation -> what computes it."""

EXACT = frozenset(
    [
        "reshape",
        "reshape_like",
        "expand_dims",
        "squeeze",
        "transpose",
        "tile",
        "reverse",
        "concat",
        "stack",
        "split",
        "slice_by_index",
        "slice_by_size",
        "gather",
        "gather_nd",
        "gather_along_axis",
        "select",
        "relu",
        "maximum",
        "minimum",
        "shape",
        "identity",
        "pad",
        "pixel_shuffle",
        "max_pool",
        "reduce_max",
        "reduce_min",
        "abs",
        "sign",
        "band_part",
        "const",
        "constexpr_lut_to_dense",
        "constexpr_sparse_to_dense",
    ]
)
"""Operations whose result needs no rounding: they only move, choose or negate elements."""
