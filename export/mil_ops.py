"""What each MIL operation computes, in torch: one small function an operation, by its name in the program.

A kernel gets the arguments by their MIL names (tensors, lists of tensors, strings) and returns one tensor or a tuple.
Floats are float32 tensors whatever the program says: the interpreter rounds results to float16 where the program is float16.
Source: the op definitions of coremltools (``converters/mil/mil/ops/defs``) and Apple's MIL reference.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from export.mil_constexpr import CONSTEXPR

__all__ = ["EXACT", "KERNELS"]

Args = dict[str, Any]
Kernel = Callable[[Args], Any]


def _ints(value: Any) -> list[int]:
    return [int(item) for item in (value.reshape(-1).tolist() if isinstance(value, Tensor) else [value])]


def _int(value: Any, default: int = 0) -> int:
    return default if value is None else _ints(value)[0]


def _flag(args: Args, name: str, default: bool = False) -> bool:
    return bool(args[name]) if name in args else default


def _number(args: Args, name: str, default: float) -> float:
    return float(args[name]) if name in args else default


def _binary(function: Callable[[Tensor, Tensor], Tensor]) -> Kernel:
    return lambda args: function(args["x"], args["y"])


def _unary(function: Callable[[Tensor], Tensor]) -> Kernel:
    return lambda args: function(args["x"])


def _real_div(x: Tensor, y: Tensor) -> Tensor:
    return x / y if x.is_floating_point() else torch.div(x, y, rounding_mode="trunc")


def _cast(args: Args) -> Any:
    x, to = args["x"], args["dtype"]
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
    x, mode = args["x"], args.get("mode", "EXACT")
    if mode == "SIGMOID_APPROXIMATION":
        return x * torch.sigmoid(1.702 * x)
    return F.gelu(x, approximate="none" if mode == "EXACT" else "tanh")


def _prelu(args: Args) -> Tensor:
    alpha = args["alpha"].reshape(-1, *[1] * (args["x"].dim() - 2))
    return torch.where(args["x"] >= 0, args["x"], args["x"] * alpha)


def _reduce(function: Callable[[Tensor, list[int], bool], Tensor]) -> Kernel:
    def run(args: Args) -> Tensor:
        axes = _ints(args["axes"]) if args.get("axes") is not None else list(range(args["x"].dim()))
        return function(args["x"], axes, _flag(args, "keep_dims"))

    return run


def _product(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    for axis in sorted((axis % x.dim() for axis in axes), reverse=True):
        x = x.prod(axis, keepdim=keep)
    return x


def _argument(function: Callable[..., Tensor]) -> Kernel:
    return lambda args: function(args["x"], dim=_int(args.get("axis"), -1), keepdim=_flag(args, "keep_dims"))


def _linear(args: Args) -> Tensor:
    return F.linear(args["x"], args["weight"], args.get("bias"))


def _matmul(args: Args) -> Tensor:
    x, y = args["x"], args["y"]
    x = x.transpose(-1, -2) if _flag(args, "transpose_x") and x.dim() > 1 else x
    y = y.transpose(-1, -2) if _flag(args, "transpose_y") and y.dim() > 1 else y
    return x @ y


def _attention(args: Args) -> Tensor:
    query, key, value = args["query"], args["key"], args["value"]
    scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
    mask = args.get("attn_mask")
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    return scores.softmax(-1) @ value


def _einsum(args: Args) -> Tensor:
    return torch.einsum(args["equation"], *args["values"])


def _layer_norm(args: Args) -> Tensor:
    x = args["x"]
    axes = _ints(args["axes"]) if "axes" in args else list(range(2, x.dim()))
    mean = x.mean(axes, keepdim=True)
    variance = (x - mean).square().mean(axes, keepdim=True)
    result: Tensor = (x - mean) * torch.rsqrt(variance + _number(args, "epsilon", 1e-5))
    shape = [x.shape[axis] if axis in {a % x.dim() for a in axes} else 1 for axis in range(x.dim())]
    if args.get("gamma") is not None:
        result = result * args["gamma"].reshape(shape)
    return result if args.get("beta") is None else result + args["beta"].reshape(shape)


def _batch_norm(args: Args) -> Tensor:
    return F.batch_norm(
        args["x"],
        args["mean"],
        args["variance"],
        args.get("gamma"),
        args.get("beta"),
        False,
        0.0,
        _number(args, "epsilon", 1e-5),
    )


def _instance_norm(args: Args) -> Tensor:
    return F.instance_norm(args["x"], weight=args.get("gamma"), bias=args.get("beta"), eps=_number(args, "epsilon", 1e-5))


def _l2_norm(args: Args) -> Tensor:
    x = args["x"]
    squares = x.square().sum(list(range(-3, 0)), keepdim=True)
    return x * torch.rsqrt(squares + _number(args, "epsilon", 1e-6))


def _padding(args: Args, sizes: Sequence[int], kernel: Sequence[int], strides: list[int], dilations: list[int]) -> list[int]:
    """Amounts before and after each spatial dimension, first dimension first."""
    kind = args.get("pad_type", "valid")
    if kind == "valid":
        return [0] * (2 * len(kernel))
    if kind == "custom":
        return _ints(args["pad"])
    amounts: list[int] = []
    for size, width, stride, dilation in zip(sizes, kernel, strides, dilations, strict=True):
        total = max(0, (-(-size // stride) - 1) * stride + (width - 1) * dilation + 1 - size)
        amounts += [total - total // 2, total // 2] if kind == "same_lower" else [total // 2, total - total // 2]
    return amounts


def _torch_pad(amounts: list[int]) -> list[int]:
    """MIL counts dimensions from the first, torch from the last."""
    pairs = [amounts[index : index + 2] for index in range(0, len(amounts), 2)]
    return [value for pair in reversed(pairs) for value in pair]


def _conv(args: Args) -> Tensor:
    x, weight = args["x"], args["weight"]
    spatial = x.dim() - 2
    strides = _ints(args["strides"]) if "strides" in args else [1] * spatial
    dilations = _ints(args["dilations"]) if "dilations" in args else [1] * spatial
    amounts = _padding(args, x.shape[2:], weight.shape[2:], strides, dilations)
    if any(amounts):
        x = F.pad(x, _torch_pad(amounts))
    function = (F.conv1d, F.conv2d, F.conv3d)[spatial - 1]
    return function(x, weight, args.get("bias"), strides, 0, dilations, _int(args.get("groups"), 1))


def _conv_transpose(args: Args) -> Tensor:
    x, weight = args["x"], args["weight"]
    spatial = x.dim() - 2
    strides = _ints(args["strides"]) if "strides" in args else [1] * spatial
    dilations = _ints(args["dilations"]) if "dilations" in args else [1] * spatial
    amounts = _padding(args, x.shape[2:], weight.shape[2:], strides, dilations)
    function = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[spatial - 1]
    full = function(x, weight, args.get("bias"), strides, 0, 0, _int(args.get("groups"), 1), dilations)
    wanted = _ints(args["output_shape"])[2:] if args.get("output_shape") is not None else None
    for axis in range(spatial):
        before, after = amounts[2 * axis : 2 * axis + 2]
        length = wanted[axis] if wanted else full.shape[axis + 2] - before - after
        full = full.narrow(axis + 2, before, min(length, full.shape[axis + 2] - before))
        if length > full.shape[axis + 2]:
            full = F.pad(full, [0, 0] * (spatial - 1 - axis) + [0, length - full.shape[axis + 2]])
    return full


def _pool(average: bool) -> Kernel:
    def run(args: Args) -> Tensor:
        x, kernel = args["x"], _ints(args["kernel_sizes"])
        strides = _ints(args["strides"]) if "strides" in args else [1] * len(kernel)
        amounts = _torch_pad(_padding(args, x.shape[2:], kernel, strides, [1] * len(kernel)))
        ceil = _flag(args, "ceil_mode")
        if not average:
            padded = F.pad(x, amounts, value=-math.inf) if any(amounts) else x
            return (F.max_pool1d, F.max_pool2d, F.max_pool3d)[len(kernel) - 1](padded, kernel, strides, ceil_mode=ceil)
        pool = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[len(kernel) - 1]
        padded = F.pad(x, amounts) if any(amounts) else x
        mean = pool(padded, kernel, strides, ceil_mode=ceil)
        if any(amounts) and _flag(args, "exclude_padding_from_average"):
            mean = mean / pool(F.pad(torch.ones_like(x), amounts), kernel, strides, ceil_mode=ceil)
        return mean

    return run


def _upsample_bilinear(args: Args) -> Tensor:
    x = args["x"]
    height = round(x.shape[-2] * _number(args, "scale_factor_height", 1.0))
    width = round(x.shape[-1] * _number(args, "scale_factor_width", 1.0))
    align = _flag(args, "align_corners", True)
    return F.interpolate(x, (height, width), mode="bilinear", align_corners=align)


def _upsample_nearest(args: Args) -> Tensor:
    x = args["x"]
    height = round(x.shape[-2] * _number(args, "scale_factor_height", 1.0))
    width = round(x.shape[-1] * _number(args, "scale_factor_width", 1.0))
    return F.interpolate(x, (height, width), mode="nearest")


def _resize_bilinear(args: Args) -> Tensor:
    mode = args.get("sampling_mode", "DEFAULT")
    if mode not in ("STRICT_ALIGN_CORNERS", "ALIGN_CORNERS", "UNALIGN_CORNERS"):
        raise NotImplementedError(f"resize_bilinear with sampling_mode {mode}")
    size = (_int(args["target_size_height"]), _int(args["target_size_width"]))
    return F.interpolate(args["x"], size, mode="bilinear", align_corners=mode != "UNALIGN_CORNERS")


def _resize_nearest(args: Args) -> Tensor:
    return F.interpolate(args["x"], (_int(args["target_size_height"]), _int(args["target_size_width"])), mode="nearest")


def _reshape(args: Args) -> Tensor:
    x = args["x"]
    return x.reshape([x.shape[i] if size == 0 and x.numel() else size for i, size in enumerate(_ints(args["shape"]))])


def _expand_dims(args: Args) -> Tensor:
    x, axes = args["x"], _ints(args["axes"])
    rank = x.dim() + len(axes)
    for axis in sorted(axis % rank for axis in axes):
        x = x.unsqueeze(axis)
    return x


def _squeeze(args: Args) -> Tensor:
    x = args["x"]
    axes = _ints(args["axes"]) if args.get("axes") is not None else [i for i, size in enumerate(x.shape) if size == 1]
    return x.squeeze(tuple(axes))


def _slice_by_index(args: Args) -> Tensor:
    x = args["x"]
    rank = x.dim()
    begin, end = _ints(args["begin"]), _ints(args["end"])
    stride = _ints(args["stride"]) if args.get("stride") is not None else [1] * rank
    masks = [
        [bool(flag) for flag in args[name].reshape(-1).tolist()] if args.get(name) is not None else [False] * rank
        for name in ("begin_mask", "end_mask", "squeeze_mask")
    ]
    index: list[Any] = []
    for axis in range(rank):
        first = None if masks[0][axis] else begin[axis]
        last = None if masks[1][axis] else end[axis]
        if masks[2][axis]:
            index.append(begin[axis])
        elif stride[axis] > 0:
            index.append(slice(first, last, stride[axis]))
        else:
            index.append(torch.arange(x.shape[axis])[slice(None)].numpy()[first : last : stride[axis]].copy())
    return _indexed(x, index)


def _indexed(x: Tensor, index: list[Any]) -> Tensor:
    """Plain slices at once; reversed ones axis by axis, so that they do not become joint indices."""
    plain = [part if isinstance(part, slice | int) else slice(None) for part in index]
    for axis, part in enumerate(index):
        if not isinstance(part, slice | int):
            x = x.index_select(axis, torch.from_numpy(part))
    return x[tuple(plain)]


def _slice_by_size(args: Args) -> Tensor:
    x = args["x"]
    for axis, (begin, size) in enumerate(zip(_ints(args["begin"]), _ints(args["size"]), strict=True)):
        begin %= max(x.shape[axis], 1)
        x = x.narrow(axis, begin, x.shape[axis] - begin if size == -1 else size)
    return x


def _slice_update(args: Args) -> Tensor:
    result = args["x"].clone()
    _slice_by_index({**args, "x": result}).copy_(args["update"])
    return result


def _split(args: Args) -> tuple[Tensor, ...]:
    axis = _int(args["axis"])
    if args.get("split_sizes") is not None:
        return torch.split(args["x"], _ints(args["split_sizes"]), axis)
    return torch.chunk(args["x"], _int(args["num_splits"]), axis)


def _concat(args: Args) -> Tensor:
    values, axis = args["values"], _int(args["axis"])
    if not _flag(args, "interleave"):
        return torch.cat([value.reshape(1) if value.dim() == 0 else value for value in values], axis)
    stacked = torch.stack(values, axis % values[0].dim() + 1)
    return stacked.flatten(axis % values[0].dim(), axis % values[0].dim() + 1)


def _wrapped(indices: Tensor, size: int) -> Tensor:
    whole = indices.long()
    return torch.where(whole < 0, whole + size, whole)


def _gather(args: Args) -> Tensor:
    x, axis, batch = args["x"], _int(args.get("axis")), _int(args.get("batch_dims"))
    axis %= x.dim()
    indices = _wrapped(args["indices"], x.shape[axis])
    if not batch:
        picked = x.index_select(axis, indices.reshape(-1))
        return picked.reshape([*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :]])
    lead = x.shape[:batch]
    rows = [
        _gather({"x": part, "axis": axis - batch, "indices": index})
        for part, index in zip(x.flatten(0, batch - 1), indices.flatten(0, batch - 1), strict=True)
    ]
    result = torch.stack(rows)
    return result.reshape([*lead, *result.shape[1:]])


def _gather_nd(args: Args) -> Tensor:
    x, indices, batch = args["x"], args["indices"].long(), _int(args.get("batch_dims"))
    if batch:
        rows = [
            _gather_nd({"x": part, "indices": index})
            for part, index in zip(x.flatten(0, batch - 1), indices.flatten(0, batch - 1), strict=True)
        ]
        result = torch.stack(rows)
        return result.reshape(*x.shape[:batch], *result.shape[1:])
    return x[tuple(_wrapped(indices[..., axis], x.shape[axis]) for axis in range(indices.shape[-1]))]


def _gather_along_axis(args: Args) -> Tensor:
    axis = _int(args.get("axis"))
    return args["x"].gather(axis, _wrapped(args["indices"], args["x"].shape[axis]))


_SCATTER: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "update": lambda old, new: new,
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "min": torch.minimum,
    "max": torch.maximum,
}


def _scatter_nd(args: Args) -> Tensor:
    data, indices, mode = args["data"].clone(), args["indices"].long(), args.get("mode", "add")
    place = tuple(_wrapped(indices[..., axis], data.shape[axis]) for axis in range(indices.shape[-1]))
    if mode == "add":
        return data.index_put(place, args["updates"], accumulate=True)
    data[place] = _SCATTER[mode](data[place], args["updates"])
    return data


def _scatter_along_axis(args: Args) -> Tensor:
    data, axis, mode = args["data"], _int(args.get("axis")), args.get("mode", "add")
    indices = _wrapped(args["indices"], data.shape[axis])
    if mode == "add":
        return data.scatter_add(axis, indices, args["updates"])
    return data.scatter(axis, indices, _SCATTER[mode](data.gather(axis, indices), args["updates"]))


def _scatter(args: Args) -> Tensor:
    data, axis, mode = args["data"].clone(), _int(args.get("axis")), args.get("mode", "add")
    indices = _wrapped(args["indices"], data.shape[axis])
    place = (slice(None),) * (axis % data.dim()) + (indices,)
    data[place] = _SCATTER[mode](data[place], args["updates"])
    return data


def _pad(args: Args) -> Tensor:
    x, amounts, mode = args["x"], _ints(args["pad"]), args.get("mode", "constant")
    amounts = _torch_pad(amounts)
    if mode == "constant":
        return F.pad(x, amounts, value=_number(args, "constant_val", 0.0))
    while len(amounts) > 2 and amounts[-2:] == [0, 0]:
        amounts = amounts[:-2]
    lead = x.dim() - len(amounts) // 2
    flat = x.reshape(1, -1, *x.shape[lead:])
    padded = F.pad(flat, amounts, mode="reflect" if mode == "reflect" else "replicate")
    return padded.reshape(*x.shape[:lead], *padded.shape[2:])


def _cumsum(args: Args) -> Tensor:
    x, axis = args["x"], _int(args.get("axis"))
    x = x.flip(axis) if _flag(args, "reverse") else x
    total = x.cumsum(axis) - x if _flag(args, "exclusive") else x.cumsum(axis)
    return total.flip(axis) if _flag(args, "reverse") else total


def _argsort(args: Args) -> Tensor:
    return torch.argsort(args["x"], dim=_int(args.get("axis"), -1), descending=not _flag(args, "ascending"), stable=True)


def _topk(args: Args) -> tuple[Tensor, ...]:
    values, indices = args["x"].topk(_int(args["k"], 1), _int(args.get("axis"), -1), not _flag(args, "ascending"))
    return (values, indices) if _flag(args, "return_indices", True) else (values,)


def _band_part(args: Args) -> Tensor:
    x, lower, upper = args["x"], _int(args.get("lower"), -1), _int(args.get("upper"), -1)
    rows = torch.arange(x.shape[-2])[:, None]
    columns = torch.arange(x.shape[-1])
    keep = (lower < 0) | (rows - columns <= lower)
    keep = keep & ((upper < 0) | (columns - rows <= upper))
    return torch.where(keep, x, torch.zeros_like(x))


def _one_hot(args: Args) -> Tensor:
    size = _int(args["one_hot_vector_size"])
    hot = F.one_hot(args["indices"].long(), size).movedim(-1, _int(args.get("axis"), -1))
    on, off = args.get("on_value", torch.tensor(1)), args.get("off_value", torch.tensor(0))
    return torch.where(hot.bool(), on, off)


def _fill(args: Args) -> Tensor:
    value = args.get("value", torch.tensor(0.0))
    return value.reshape(()).expand(_ints(args["shape"])).clone()


def _range(args: Args) -> Tensor:
    start, end, step = args["start"], args["end"], args["step"]
    if start.is_floating_point():
        return torch.arange(float(start), float(end), float(step))
    return torch.arange(int(start), int(end), int(step))


def _axis_scale(args: Args, x: Tensor, name: str) -> Tensor | None:
    value: Tensor | None = args.get(name)
    if value is None or value.dim() == 0 or args.get("axis") is None:
        return value
    shape = [1] * x.dim()
    shape[_int(args["axis"])] = -1
    return value.reshape(shape)


def _quantize(args: Args) -> Tensor:
    x = args["input"]
    scale, shift = _axis_scale(args, x, "scale"), _axis_scale(args, x, "zero_point")
    assert scale is not None
    low, high, dtype = (-128, 127, torch.int8) if args["output_dtype"] == "int8" else (0, 255, torch.uint8)
    codes = (x / scale).round() + (0 if shift is None else shift.float())
    return codes.clamp(low, high).to(dtype)


def _dequantize(args: Args) -> Tensor:
    x = args["input"]
    scale, shift = _axis_scale(args, x, "scale"), _axis_scale(args, x, "zero_point")
    assert scale is not None
    return (x.float() - (0 if shift is None else shift.float())) * scale


def _pixel_unshuffle(args: Args) -> Tensor:
    return F.pixel_unshuffle(args["x"], _int(args["downscale_factor"]))


KERNELS: dict[str, Kernel] = {
    **CONSTEXPR,
    "add": _binary(torch.add), "sub": _binary(torch.sub), "mul": _binary(torch.mul), "real_div": _binary(_real_div),
    "floor_div": _binary(lambda x, y: torch.div(x, y, rounding_mode="floor")), "mod": _binary(torch.remainder),
    "maximum": _binary(torch.maximum), "minimum": _binary(torch.minimum), "pow": _binary(torch.pow),
    "equal": _binary(torch.eq), "not_equal": _binary(torch.ne), "greater": _binary(torch.gt),
    "greater_equal": _binary(torch.ge), "less": _binary(torch.lt), "less_equal": _binary(torch.le),
    "logical_and": _binary(torch.logical_and), "logical_or": _binary(torch.logical_or),
    "logical_xor": _binary(torch.logical_xor), "logical_not": _unary(torch.logical_not),
    "abs": _unary(torch.abs), "exp": _unary(torch.exp), "exp2": _unary(torch.exp2), "sqrt": _unary(torch.sqrt),
    "square": _unary(torch.square), "sin": _unary(torch.sin), "cos": _unary(torch.cos), "tan": _unary(torch.tan),
    "asin": _unary(torch.asin), "acos": _unary(torch.acos), "atan": _unary(torch.atan), "sinh": _unary(torch.sinh),
    "cosh": _unary(torch.cosh), "tanh": _unary(torch.tanh), "atanh": _unary(torch.atanh), "erf": _unary(torch.erf),
    "sign": _unary(torch.sign), "ceil": _unary(torch.ceil), "floor": _unary(torch.floor), "round": _unary(torch.round),
    "relu": _unary(torch.relu), "relu6": _unary(F.relu6), "silu": _unary(F.silu), "sigmoid": _unary(torch.sigmoid),
    "softsign": _unary(F.softsign), "softplus": _unary(lambda x: F.softplus(x, threshold=1e9)), "identity": _unary(lambda x: x),
    "log": lambda a: torch.log(a["x"] + _number(a, "epsilon", 1e-45)),
    "rsqrt": lambda a: torch.rsqrt(a["x"] + _number(a, "epsilon", 1e-12)),
    "inverse": lambda a: torch.reciprocal(a["x"] + _number(a, "epsilon", 1e-4)),
    "clip": lambda a: a["x"].clamp(_number(a, "alpha", -math.inf), _number(a, "beta", math.inf)),
    "threshold": lambda a: a["x"].clamp(min=_number(a, "alpha", 0.0)),
    "thresholded_relu": lambda a: torch.where(a["x"] >= _number(a, "alpha", 1.0), a["x"], torch.zeros_like(a["x"])),
    "leaky_relu": lambda a: F.leaky_relu(a["x"], _number(a, "alpha", 0.01)),
    "elu": lambda a: F.elu(a["x"], _number(a, "alpha", 1.0)),
    "linear_activation": lambda a: a["x"] * _number(a, "alpha", 1.0) + _number(a, "beta", 0.0),
    "scaled_tanh": lambda a: torch.tanh(a["x"] * _number(a, "beta", 1.0)) * _number(a, "alpha", 1.0),
    "sigmoid_hard": lambda a: (a["x"] * _number(a, "alpha", 0.2) + _number(a, "beta", 0.5)).clamp(0.0, 1.0),
    "clamped_relu": lambda a: F.leaky_relu(a["x"], _number(a, "alpha", 0.0)).clamp(max=_number(a, "beta", math.inf)),
    "prelu": _prelu, "gelu": _gelu, "cast": _cast,
    "softmax": lambda a: a["x"].softmax(_int(a.get("axis"), -1)),
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
    "reduce_argmax": _argument(torch.argmax), "reduce_argmin": _argument(torch.argmin),
    "linear": _linear, "matmul": _matmul, "einsum": _einsum, "scaled_dot_product_attention": _attention,
    "conv": _conv, "conv_transpose": _conv_transpose, "avg_pool": _pool(True), "max_pool": _pool(False),
    "layer_norm": _layer_norm, "batch_norm": _batch_norm, "instance_norm": _instance_norm, "l2_norm": _l2_norm,
    "upsample_bilinear": _upsample_bilinear, "upsample_nearest_neighbor": _upsample_nearest,
    "resize_bilinear": _resize_bilinear, "resize_nearest_neighbor": _resize_nearest,
    "reshape": _reshape, "reshape_like": lambda a: a["x"].reshape(a["ref_tensors"][0].shape),
    "expand_dims": _expand_dims, "squeeze": _squeeze, "transpose": lambda a: a["x"].permute(_ints(a["perm"])),
    "tile": lambda a: a["x"].repeat(_ints(a["reps"])), "reverse": lambda a: a["x"].flip(
        _ints(a["axes"]) if a.get("axes") is not None else list(range(a["x"].dim()))),
    "concat": _concat, "stack": lambda a: torch.stack(a["values"], _int(a["axis"])), "split": _split,
    "slice_by_index": _slice_by_index, "slice_by_size": _slice_by_size, "slice_update": _slice_update,
    "gather": _gather, "gather_nd": _gather_nd, "gather_along_axis": _gather_along_axis,
    "scatter": _scatter, "scatter_nd": _scatter_nd, "scatter_along_axis": _scatter_along_axis,
    "select": lambda a: torch.where(a["cond"].bool(), a["a"], a["b"]),
    "shape": lambda a: torch.tensor(a["x"].shape), "fill": _fill,
    "fill_like": lambda a: torch.full(a["ref_tensor"].shape, a["value"].item()).to(a["value"].dtype),
    "range_1d": _range, "cumsum": _cumsum, "pad": _pad, "topk": _topk, "band_part": _band_part, "one_hot": _one_hot,
    "argsort": _argsort,
    "non_zero": lambda a: a["x"].nonzero(), "flatten2d": lambda a: a["x"].reshape(
        math.prod(a["x"].shape[: _int(a.get("axis"), 1)]), -1),
    "pixel_shuffle": lambda a: F.pixel_shuffle(a["x"], _int(a["upscale_factor"])), "pixel_unshuffle": _pixel_unshuffle,
    "quantize": _quantize, "dequantize": _dequantize,
}  # fmt: skip
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
