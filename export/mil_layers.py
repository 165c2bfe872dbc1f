"""MIL operations with weights, windows or a grid, in torch: products, convolutions, pools, norms, resizing, rounding."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from export.mil_args import Args
from export.mil_moves import torch_pad

__all__ = ["LAYERS"]


def _linear(args: Args) -> Tensor:
    return F.linear(args.tensor("x"), args.tensor("weight"), args.optional("bias"))


def _matmul(args: Args) -> Tensor:
    x, y = args.tensor("x"), args.tensor("y")
    x = x.transpose(-1, -2) if args.flag("transpose_x") and x.dim() > 1 else x
    y = y.transpose(-1, -2) if args.flag("transpose_y") and y.dim() > 1 else y
    return x @ y


def _attention(args: Args) -> Tensor:
    query, key, value = args.tensor("query"), args.tensor("key"), args.tensor("value")
    scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
    mask = args.optional("attn_mask")
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    return scores.softmax(-1) @ value


def _einsum(args: Args) -> Tensor:
    return torch.einsum(args.text("equation"), *args.tensors("values"))


def _layer_norm(args: Args) -> Tensor:
    x = args.tensor("x")
    axes = args.ints("axes") if args.has("axes") else list(range(2, x.dim()))
    mean = x.mean(axes, keepdim=True)
    variance = (x - mean).square().mean(axes, keepdim=True)
    result: Tensor = (x - mean) * torch.rsqrt(variance + args.number("epsilon", 1e-5))
    shape = [x.shape[axis] if axis in {a % x.dim() for a in axes} else 1 for axis in range(x.dim())]
    if args.has("gamma"):
        result = result * args.tensor("gamma").reshape(shape)
    return result if args.optional("beta") is None else result + args.tensor("beta").reshape(shape)


def _batch_norm(args: Args) -> Tensor:
    return F.batch_norm(
        args.tensor("x"),
        args.tensor("mean"),
        args.tensor("variance"),
        args.optional("gamma"),
        args.optional("beta"),
        False,
        0.0,
        args.number("epsilon", 1e-5),
    )


def _instance_norm(args: Args) -> Tensor:
    return F.instance_norm(
        args.tensor("x"), weight=args.optional("gamma"), bias=args.optional("beta"), eps=args.number("epsilon", 1e-5)
    )


def _l2_norm(args: Args) -> Tensor:
    x = args.tensor("x")
    squares = x.square().sum(list(range(-3, 0)), keepdim=True)
    return x * torch.rsqrt(squares + args.number("epsilon", 1e-6))


def _padding(args: Args, sizes: Sequence[int], kernel: Sequence[int], strides: list[int], dilations: list[int]) -> list[int]:
    """Amounts before and after each spatial dimension, first dimension first."""
    kind = args.text("pad_type", "valid")
    if kind == "valid":
        return [0] * (2 * len(kernel))
    if kind == "custom":
        return args.ints("pad")
    amounts: list[int] = []
    for size, width, stride, dilation in zip(sizes, kernel, strides, dilations, strict=True):
        total = max(0, (-(-size // stride) - 1) * stride + (width - 1) * dilation + 1 - size)
        amounts += [total - total // 2, total // 2] if kind == "same_lower" else [total // 2, total - total // 2]
    return amounts


def _conv(args: Args) -> Tensor:
    x, weight = args.tensor("x"), args.tensor("weight")
    spatial = x.dim() - 2
    strides = args.ints("strides") if args.has("strides") else [1] * spatial
    dilations = args.ints("dilations") if args.has("dilations") else [1] * spatial
    amounts = _padding(args, x.shape[2:], weight.shape[2:], strides, dilations)
    if any(amounts):
        x = F.pad(x, torch_pad(amounts))
    function = (F.conv1d, F.conv2d, F.conv3d)[spatial - 1]
    return function(x, weight, args.optional("bias"), strides, 0, dilations, args.whole("groups", 1))


def _conv_transpose(args: Args) -> Tensor:
    x, weight = args.tensor("x"), args.tensor("weight")
    spatial = x.dim() - 2
    strides = args.ints("strides") if args.has("strides") else [1] * spatial
    dilations = args.ints("dilations") if args.has("dilations") else [1] * spatial
    amounts = _padding(args, x.shape[2:], weight.shape[2:], strides, dilations)
    function = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[spatial - 1]
    full = function(x, weight, args.optional("bias"), strides, 0, 0, args.whole("groups", 1), dilations)
    wanted = args.ints("output_shape")[2:] if args.has("output_shape") else None
    for axis in range(spatial):
        before, after = amounts[2 * axis : 2 * axis + 2]
        length = wanted[axis] if wanted else full.shape[axis + 2] - before - after
        full = full.narrow(axis + 2, before, min(length, full.shape[axis + 2] - before))
        if length > full.shape[axis + 2]:
            full = F.pad(full, [0, 0] * (spatial - 1 - axis) + [0, length - full.shape[axis + 2]])
    return full


def _pool(average: bool) -> Callable[[Args], Tensor]:
    def run(args: Args) -> Tensor:
        x, kernel = args.tensor("x"), args.ints("kernel_sizes")
        strides = args.ints("strides") if args.has("strides") else [1] * len(kernel)
        amounts = torch_pad(_padding(args, x.shape[2:], kernel, strides, [1] * len(kernel)))
        ceil = args.flag("ceil_mode")
        if not average:
            padded = F.pad(x, amounts, value=-math.inf) if any(amounts) else x
            return (F.max_pool1d, F.max_pool2d, F.max_pool3d)[len(kernel) - 1](padded, kernel, strides, ceil_mode=ceil)
        pool = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[len(kernel) - 1]
        padded = F.pad(x, amounts) if any(amounts) else x
        mean = pool(padded, kernel, strides, ceil_mode=ceil)
        if any(amounts) and args.flag("exclude_padding_from_average"):
            mean = mean / pool(F.pad(torch.ones_like(x), amounts), kernel, strides, ceil_mode=ceil)
        return mean

    return run


def _upsample_bilinear(args: Args) -> Tensor:
    x = args.tensor("x")
    height = round(x.shape[-2] * args.number("scale_factor_height", 1.0))
    width = round(x.shape[-1] * args.number("scale_factor_width", 1.0))
    align = args.flag("align_corners", True)
    return F.interpolate(x, (height, width), mode="bilinear", align_corners=align)


def _upsample_nearest(args: Args) -> Tensor:
    x = args.tensor("x")
    height = round(x.shape[-2] * args.number("scale_factor_height", 1.0))
    width = round(x.shape[-1] * args.number("scale_factor_width", 1.0))
    return F.interpolate(x, (height, width), mode="nearest")


def _resize_bilinear(args: Args) -> Tensor:
    mode = args.text("sampling_mode", "DEFAULT")
    if mode not in ("STRICT_ALIGN_CORNERS", "ALIGN_CORNERS", "UNALIGN_CORNERS"):
        raise NotImplementedError(f"resize_bilinear with sampling_mode {mode}")
    size = (args.whole("target_size_height"), args.whole("target_size_width"))
    return F.interpolate(args.tensor("x"), size, mode="bilinear", align_corners=mode != "UNALIGN_CORNERS")


def _resize_nearest(args: Args) -> Tensor:
    return F.interpolate(args.tensor("x"), (args.whole("target_size_height"), args.whole("target_size_width")), mode="nearest")


def _axis_scale(args: Args, x: Tensor, name: str) -> Tensor | None:
    value: Tensor | None = args.get(name)
    if value is None or value.dim() == 0 or args.optional("axis") is None:
        return value
    shape = [1] * x.dim()
    shape[args.whole("axis")] = -1
    return value.reshape(shape)


def _quantize(args: Args) -> Tensor:
    x = args.tensor("input")
    scale, shift = _axis_scale(args, x, "scale"), _axis_scale(args, x, "zero_point")
    assert scale is not None
    low, high, dtype = (-128, 127, torch.int8) if args.text("output_dtype") == "int8" else (0, 255, torch.uint8)
    codes = (x / scale).round() + (0 if shift is None else shift.float())
    return codes.clamp(low, high).to(dtype)


def _dequantize(args: Args) -> Tensor:
    x = args.tensor("input")
    scale, shift = _axis_scale(args, x, "scale"), _axis_scale(args, x, "zero_point")
    assert scale is not None
    return (x.float() - (0 if shift is None else shift.float())) * scale


LAYERS: dict[str, Callable[[Args], Any]] = {
    "linear": _linear,
    "matmul": _matmul,
    "einsum": _einsum,
    "scaled_dot_product_attention": _attention,
    "conv": _conv,
    "conv_transpose": _conv_transpose,
    "avg_pool": _pool(True),
    "max_pool": _pool(False),
    "layer_norm": _layer_norm,
    "batch_norm": _batch_norm,
    "instance_norm": _instance_norm,
    "l2_norm": _l2_norm,
    "upsample_bilinear": _upsample_bilinear,
    "upsample_nearest_neighbor": _upsample_nearest,
    "resize_bilinear": _resize_bilinear,
    "resize_nearest_neighbor": _resize_nearest,
    "quantize": _quantize,
    "dequantize": _dequantize,
}
"""Operation -> what computes it."""
