"""Lowerings of layers: products, convolutions, norms, attention, pooling, resizing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from export import onnx_carried
from export.onnx_lowering import Lowering, lowers
from export.onnx_ops import add, biased, binary, broadcast, where, whole_input
from export.onnx_ops_reduce import reduce
from export.onnx_values import Held, axis_of, dim

__all__ = ["product"]


def product(b: Lowering, x: Held, y: Held) -> Held:
    """Matrix product of two values, constants or carried weights ([.., M, K] x [.., K, N])."""
    if x.rank == 1 or y.rank == 1:
        return _vector_product(b, x, y)
    if y.carried is not None and y.flipped:
        return onnx_carried.product(b, x, y.carried)
    x, y = _narrow(b, x), _narrow(b, y)
    shape = (*broadcast(x.shape[:-2], y.shape[:-2]), x.shape[-2], y.shape[-1])
    return b.op("MatMul", x, y, shape=shape, dtype=b.dtype)


def _narrow(b: Lowering, x: Held) -> Held:
    return b.cast(x, b.dtype) if b.compute == torch.float16 else x


def _vector_product(b: Lowering, x: Held, y: Held) -> Held:
    one = b.reshape(x, (1, *x.shape)) if x.rank == 1 else x
    two = b.reshape(y, (*y.shape, 1)) if y.rank == 1 else y
    return b.reshape(product(b, one, two), b.shape)


@lowers("linear")
def _linear(b: Lowering, x: Held, weight: Held, bias: Held | None = None) -> Held:
    x = whole_input(b, x)
    if weight.carried is not None and not weight.flipped:
        return onnx_carried.product(b, x, weight.carried, bias)
    made = product(b, x, b.transpose(weight, [1, 0]))
    return made if bias is None else biased(b, made, bias)


@lowers("matmul", "mm", "bmm", "__matmul__")
def _matmul(b: Lowering, x: Held, y: Held) -> Held:
    return product(b, whole_input(b, x), whole_input(b, y, 1) if y.carried is None else y)


@lowers("addmm", "baddbmm")
def _addmm(b: Lowering, bias: Held, x: Held, y: Held, beta: float = 1, alpha: float = 1) -> Held:
    made = product(b, x, y)
    made = made if alpha == 1 else binary(b, "Mul", made, alpha)
    if beta == 0:
        return made
    return add(b, made, bias if beta == 1 else binary(b, "Mul", bias, beta))


@lowers("einsum")
def _einsum(b: Lowering, equation: str, items: Sequence[Held], **_: Any) -> Held:
    assert b.node is not None
    nodes: Any = b.node.args[1]
    whole = [b.full(item, tuple(dim(size) for size in node.meta["val"].shape)) for item, node in zip(items, nodes, strict=True)]
    return b.op("Einsum", *whole, equation=equation.replace(" ", ""))


# -- convolution ----------------------------------------------------------------------------------------------------


def _tuple(value: Any, count: int) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return values * count if len(values) == 1 else values


def _convolve(
    b: Lowering, x: Held, weight: Held, bias: Held | None, stride: Any, padding: Any, dilation: Any, groups: int
) -> Held:
    x = whole_input(b, x)
    spatial = x.rank - 2
    traced_weight = tuple(weight.shape if weight.carried is None else weight.carried.shape)
    kernel = list(traced_weight[2:])
    attributes: dict[str, Any] = {"strides": _tuple(stride, spatial), "dilations": _tuple(dilation, spatial), "group": groups}
    if padding == "same":
        totals = [step * (size - 1) for step, size in zip(attributes["dilations"], kernel, strict=True)]
        attributes["pads"] = [total // 2 for total in totals] + [total - total // 2 for total in totals]
    else:
        attributes["pads"] = ([0] * spatial if padding == "valid" else _tuple(padding, spatial)) * 2
    if weight.carried is not None and (made := onnx_carried.patches(b, x, weight.carried, bias, attributes)) is not None:
        return made
    if weight.carried is not None:
        weight = onnx_carried.dense(b, weight.carried, folded=x.quantized is None and b.dialect != "tensorrt")
    return b.op("Conv", x, weight, bias, dtype=b.dtype, kernel_shape=kernel, **attributes)


@lowers("conv1d", "conv2d", "conv3d", "conv1d.padding", "conv2d.padding", "conv3d.padding")
def _conv(
    b: Lowering, x: Held, weight: Held, bias: Held | None = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1,
    groups: int = 1,
) -> Held:  # fmt: skip
    return _convolve(b, x, weight, bias, stride, padding, dilation, groups)


@lowers("convolution")
def _convolution(
    b: Lowering, x: Held, weight: Held, bias: Held | None, stride: Any, padding: Any, dilation: Any, transposed: bool,
    output_padding: Any, groups: int,
) -> Held:  # fmt: skip
    if transposed:
        return _conv_transpose(b, x, weight, bias, stride, padding, output_padding, groups, dilation)
    return _convolve(b, x, weight, bias, stride, padding, dilation, groups)


@lowers("conv_transpose1d", "conv_transpose2d.input", "conv_transpose3d.input")
def _conv_transpose(
    b: Lowering, x: Held, weight: Held, bias: Held | None = None, stride: Any = 1, padding: Any = 0, output_padding: Any = 0,
    groups: int = 1, dilation: Any = 1,
) -> Held:  # fmt: skip
    x, count = whole_input(b, x), x.rank - 2
    weight = onnx_carried.dense(b, weight.carried) if weight.carried is not None else weight
    return b.op("ConvTranspose", x, weight, bias, dtype=b.dtype, strides=_tuple(stride, count), group=groups,
                pads=_tuple(padding, count) * 2, dilations=_tuple(dilation, count),
                output_padding=_tuple(output_padding, count), kernel_shape=list(weight.shape[2:]))  # fmt: skip


# -- norms ----------------------------------------------------------------------------------------------------------


def _parameter(b: Lowering, held: Held | None, count: int, value: float, like: Held) -> Held:
    return b.constant(torch.full((count,), value), like.dtype) if held is None else held


@lowers("batch_norm", "_native_batch_norm_legit_no_training", "native_batch_norm", "_batch_norm_no_update", "cudnn_batch_norm")
def _batch_norm(b: Lowering, x: Held, weight: Held | None, bias: Held | None, mean: Held, var: Held, *rest: Any) -> Any:
    assert b.node is not None
    x = whole_input(b, x)
    name = str(b.node.target)
    epsilon = rest[2] if name == "aten.batch_norm.default" else rest[-1]
    if rest and rest[0] is True and "no_training" not in name and "no_update" not in name:
        raise b.refuse("a batch norm in training mode", "Call model.eval() first.")
    channels = x.shape[1]
    made = b.op(
        "BatchNormalization", x, _parameter(b, weight, channels, 1.0, x), _parameter(b, bias, channels, 0.0, x), mean, var,
        shape=x.shape, dtype=x.dtype, epsilon=float(epsilon),
    )  # fmt: skip
    return made if name == "aten.batch_norm.default" else [made, made, made]


@lowers("layer_norm", "native_layer_norm")
def _layer_norm(
    b: Lowering, x: Held, size: Sequence[int], weight: Held | None = None, bias: Held | None = None, epsilon: float = 1e-5,
    *_: Any,
) -> Any:  # fmt: skip
    assert b.node is not None
    x = whole_input(b, x)
    scale = b.constant(torch.ones(list(size)), x.dtype) if weight is None else weight
    made = b.op("LayerNormalization", x, scale, bias, shape=x.shape, dtype=x.dtype, axis=-len(size), epsilon=float(epsilon))
    return [made, made, made] if "native" in str(b.node.target) else made


@lowers("rms_norm")
def _rms_norm(b: Lowering, x: Held, size: Sequence[int], weight: Held | None = None, epsilon: float | None = None) -> Held:
    x = whole_input(b, x)
    given = x.dtype
    wide = b.cast(x, torch.float32)
    squares = b.op("Mul", wide, wide, shape=x.shape, dtype=wide.dtype)
    mean = reduce(b, "ReduceMean", squares, list(range(-len(size), 0)), True)
    shifted = b.op("Add", mean, b.constant(epsilon if epsilon is not None else torch.finfo(torch.float32).eps, torch.float32),
                   shape=mean.shape, dtype=mean.dtype)  # fmt: skip
    root = b.op("Reciprocal", b.op("Sqrt", shifted, shape=mean.shape, dtype=mean.dtype), shape=mean.shape, dtype=mean.dtype)
    made = b.cast(b.op("Mul", wide, root, shape=x.shape, dtype=wide.dtype), given)
    return made if weight is None else b.op("Mul", made, weight, shape=x.shape, dtype=given)


@lowers("group_norm", "native_group_norm")
def _group_norm(b: Lowering, x: Held, *arguments: Any) -> Any:
    assert b.node is not None
    x = whole_input(b, x)
    native = "native" in str(b.node.target)
    if native:
        weight, bias, _, _, _, groups, epsilon = arguments
    else:
        groups, weight, bias, epsilon = [*arguments, *[None, None, None, 1e-5][len(arguments) :]][:4]
    channels = x.shape[1]
    flat = b.reshape(x, (x.shape[0], groups, _product(x.shape[1:]) // groups))
    if isinstance(flat.shape[2], int):
        ones_ = b.constant(torch.ones(flat.shape[2]), x.dtype)
        made = b.op("LayerNormalization", flat, ones_, shape=flat.shape, dtype=x.dtype, axis=-1, epsilon=float(epsilon))
    else:
        made = _normalized(b, flat, float(epsilon))
    made = b.reshape(made, x.shape)
    ones = [1] * (x.rank - 2)
    if weight is not None:
        made = b.op("Mul", made, b.reshape(weight, (channels, *ones)), shape=x.shape, dtype=x.dtype)
    if bias is not None:
        made = b.op("Add", made, b.reshape(bias, (channels, *ones)), shape=x.shape, dtype=x.dtype)
    return [made, made, made] if native else made


def _normalized(b: Lowering, x: Held, epsilon: float) -> Held:
    centered = binary(b, "Sub", x, reduce(b, "ReduceMean", x, -1, True))
    variance = reduce(b, "ReduceMean", binary(b, "Mul", centered, centered), -1, True)
    root = b.op("Sqrt", binary(b, "Add", variance, epsilon), shape=variance.shape, dtype=x.dtype)
    return binary(b, "Div", centered, root)


def _product(sizes: Sequence[Any]) -> Any:
    total: Any = 1
    for size in sizes:
        total = total * size
    return total


@lowers("instance_norm")
def _instance_norm(
    b: Lowering, x: Held, weight: Held | None, bias: Held | None, mean: Any, var: Any, use_input_stats: bool, momentum: float,
    epsilon: float, *_: Any,
) -> Held:  # fmt: skip
    x = whole_input(b, x)
    if not use_input_stats:
        return _batch_norm(b, x, weight, bias, mean, var, False, momentum, epsilon)  # type: ignore[no-any-return]
    channels = x.shape[1]
    return b.op("InstanceNormalization", x, _parameter(b, weight, channels, 1.0, x), _parameter(b, bias, channels, 0.0, x),
                shape=x.shape, dtype=x.dtype, epsilon=float(epsilon))  # fmt: skip


# -- softmax and attention ------------------------------------------------------------------------------------------


@lowers("softmax.int", "_softmax", "_safe_softmax")
def _softmax(b: Lowering, x: Held, axis: int, *_: Any, **__: Any) -> Held:
    x = b.cast(whole_input(b, x), b.dtype)
    return b.op("Softmax", x, shape=x.shape, dtype=x.dtype, axis=axis_of(axis, x.rank))


@lowers("log_softmax.int", "_log_softmax")
def _log_softmax(b: Lowering, x: Held, axis: int, *_: Any, **__: Any) -> Held:
    x = b.cast(whole_input(b, x), b.dtype)
    return b.op("LogSoftmax", x, shape=x.shape, dtype=x.dtype, axis=axis_of(axis, x.rank))


def _lowest(b: Lowering) -> float:
    """What a masked score gets: finite, so that a row with nothing to attend to gives no NaN."""
    return -30000.0 if b.compute == torch.float16 else float(torch.finfo(torch.float32).min)


def _additive(b: Lowering, mask: Held, dtype: torch.dtype) -> Held:
    """A mask as finite numbers to add (true: attend); computed once, since equal nodes are made once."""
    if mask.dtype == torch.bool and mask.const is not None:
        return Held(mask.shape, dtype, const=torch.where(mask.const, 0.0, _lowest(b)), name=mask.name)
    if mask.dtype == torch.bool:
        return where(b, mask, b.constant(0.0, dtype), b.constant(_lowest(b), dtype), dtype)
    if mask.const is not None:
        return Held(mask.shape, dtype, const=mask.const.clamp(min=_lowest(b)), name=mask.name)
    return b.op("Max", b.cast(mask, dtype), b.constant(_lowest(b), dtype), shape=mask.shape, dtype=dtype)


def _attends(b: Lowering, mask: Held, dtype: torch.dtype) -> Held | None:
    """1 for each query that attends to something, 0 for the others, whose result torch defines as zero; None where every
    query does: a mask over keys alone leaves out a query only where its whole row is padding."""

    if mask.shape[-2] == 1 and mask.const is None:
        return None
    if mask.const is not None:
        seen = (mask.const if mask.dtype == torch.bool else mask.const > -math.inf).any(-1, keepdim=True)
        return None if bool(seen.all()) else b.constant(seen.float(), dtype)
    if mask.dtype == torch.bool:
        return reduce(b, "ReduceMax", b.cast(mask, dtype), -1, True)
    highest = reduce(b, "ReduceMax", mask, -1, True)
    lowest = b.constant(-math.inf, mask.dtype)
    return b.cast(b.op("Greater", highest, lowest, shape=highest.shape, dtype=torch.bool), dtype)


def _causal(b: Lowering, q: Held, k: Held, dtype: torch.dtype) -> Held:
    rows, columns = q.shape[-2], k.shape[-2]
    if isinstance(rows, int) and isinstance(columns, int):
        mask = torch.ones(rows, columns, dtype=torch.bool).tril()
        return b.constant(torch.where(mask, 0.0, _lowest(b)), dtype)
    one = Held((rows, 1), torch.int64, iota=0)
    two = Held((1, columns), torch.int64, iota=1)
    return _additive(b, b.op("GreaterOrEqual", one, two, shape=(rows, columns), dtype=torch.bool), dtype)


@lowers("scaled_dot_product_attention")
def _attention(
    b: Lowering, q: Held, k: Held, v: Held, mask: Held | None = None, dropout_p: float = 0.0, is_causal: bool = False,
    scale: float | None = None, enable_gqa: bool = False,
) -> Held:  # fmt: skip
    q, k, v = (_narrow(b, whole_input(b, item, index)) for index, item in enumerate((q, k, v)))
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
    if enable_gqa and k.shape[-3] != q.shape[-3]:
        k, v = (_repeated_heads(b, item, q.shape[-3]) for item in (k, v))
    order = [*range(k.rank - 2), k.rank - 1, k.rank - 2]
    shape = (*broadcast(q.shape[:-2], k.shape[:-2]), q.shape[-2], k.shape[-2])
    if b.compute == torch.float16:
        root = math.sqrt(abs(scale))
        q, k = binary(b, "Mul", q, math.copysign(root, scale)), binary(b, "Mul", k, root)
        scores = b.op("MatMul", q, b.transpose(k, order), shape=shape, dtype=q.dtype)
    else:
        scores = b.op("MatMul", q, b.transpose(k, order), shape=shape, dtype=q.dtype)
        scores = scores if scale == 1 else b.op("Mul", scores, b.constant(scale, q.dtype), shape=shape, dtype=q.dtype)
    for term in (_causal(b, q, k, q.dtype) if is_causal else None, None if mask is None else _additive(b, mask, q.dtype)):
        if term is not None and not _is_nothing(term, scores):
            scores = b.op("Add", scores, term, shape=broadcast(scores.shape, term.shape), dtype=q.dtype)
    weights = b.op("Softmax", scores, shape=scores.shape, dtype=q.dtype, axis=scores.rank - 1)
    shape = (*broadcast(scores.shape[:-2], v.shape[:-2]), q.shape[-2], v.shape[-1])
    made = b.op("MatMul", weights, v, shape=shape, dtype=q.dtype)
    seen = None if mask is None else _attends(b, mask, q.dtype)
    return made if seen is None else b.op("Mul", made, seen, shape=shape, dtype=q.dtype)


def _is_nothing(term: Held, scores: Held) -> bool:
    """Whether adding it changes nothing: a constant mask that hides no key."""
    plain = term.const is not None and broadcast(scores.shape, term.shape) == scores.shape
    return plain and term.const is not None and not bool(term.const.any())


def _repeated_heads(b: Lowering, x: Held, heads: int) -> Held:
    times = heads // x.shape[-3]
    lead, rest = x.shape[:-2], x.shape[-2:]
    wide = b.full(b.reshape(x, (*lead, 1, *rest)), (*lead, times, *rest))
    return b.reshape(wide, (*x.shape[:-3], heads, *rest))


# -- embedding ------------------------------------------------------------------------------------------------------


@lowers("embedding")
def _embedding(b: Lowering, weight: Held, ids: Held, *_: Any, **__: Any) -> Held:
    if weight.carried is not None:
        return onnx_carried.rows(b, whole_input(b, ids, 1), weight.carried)
    ids = whole_input(b, ids, 1)
    return b.op("Gather", weight, ids, shape=(*ids.shape, weight.shape[1]), dtype=b.narrow(weight.dtype), axis=0)


@lowers("one_hot")
def _one_hot(b: Lowering, ids: Held, classes: int = -1) -> Held:
    ids = whole_input(b, ids)
    depth = b.constant(classes, torch.int64)
    return b.op("OneHot", ids, depth, b.constant([0, 1], torch.int64), axis=-1)


# -- pooling and resizing -------------------------------------------------------------------------------------------


def _pool(b: Lowering, kind: str, x: Held, kernel: Any, stride: Any, padding: Any, ceil: bool, **more: Any) -> Held:
    x = whole_input(b, x)
    squeezed = x
    count = 1 if "1d" in str(b.node.target) else 3 if "3d" in str(b.node.target) else 2  # type: ignore[union-attr]
    if x.rank == count + 1:
        squeezed = b.reshape(x, (1, *x.shape))
    kernel = _tuple(kernel, count)
    shape = b.shape if x.rank == count + 2 else (1, *b.shape)
    made = b.op(
        kind, squeezed, shape=shape, dtype=x.dtype, kernel_shape=kernel, strides=_tuple(stride, count) if stride else kernel,
        pads=_tuple(padding, count) * 2, ceil_mode=int(ceil), **more,
    )  # fmt: skip
    return b.reshape(made, b.shape)


@lowers("max_pool1d", "max_pool2d", "max_pool3d")
def _max_pool(
    b: Lowering, x: Held, kernel: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1, ceil_mode: bool = False
) -> Held:
    dilations = _tuple(dilation, x.rank - 2)
    return _pool(b, "MaxPool", x, kernel, stride, padding, ceil_mode, dilations=dilations)


@lowers("max_pool2d_with_indices")
def _max_pool_indices(
    b: Lowering, x: Held, kernel: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1, ceil_mode: bool = False
) -> list[Held]:
    return [_max_pool(b, x, kernel, stride, padding, dilation, ceil_mode)]


@lowers("avg_pool1d", "avg_pool2d", "avg_pool3d")
def _avg_pool(
    b: Lowering, x: Held, kernel: Any, stride: Any = None, padding: Any = 0, ceil_mode: bool = False,
    count_include_pad: bool = True, divisor_override: int | None = None,
) -> Held:  # fmt: skip
    made = _pool(b, "AveragePool", x, kernel, stride, padding, ceil_mode, count_include_pad=int(count_include_pad))
    if divisor_override:
        count = math.prod(_tuple(kernel, x.rank - 2))
        made = binary(b, "Mul", made, count / divisor_override)
    return made


@lowers("adaptive_avg_pool1d", "adaptive_avg_pool2d", "_adaptive_avg_pool2d")
def _adaptive(b: Lowering, x: Held, size: Any) -> Held:
    x = whole_input(b, x)
    count = len(size) if isinstance(size, (list, tuple)) else 1
    sizes = _tuple(size, count)
    spatial = list(x.shape[-count:])
    if all(target == 1 for target in sizes):
        return reduce(b, "ReduceMean", x, list(range(x.rank - count, x.rank)), True)
    if not all(isinstance(length, int) for length in spatial):
        raise b.refuse("adaptive pooling over a dynamic dimension", "Make the height and the width fixed.")
    if all(length % target == 0 for length, target in zip(spatial, sizes, strict=True)):
        kernel = [length // target for length, target in zip(spatial, sizes, strict=True)]
        return b.op("AveragePool", x, dtype=x.dtype, kernel_shape=kernel, strides=kernel)
    for at, (length, target) in enumerate(zip(spatial, sizes, strict=True), x.rank - count):
        x = _averaged(b, x, at, length, target)
    return x


def _averaged(b: Lowering, x: Held, axis: int, length: int, target: int) -> Held:
    """Adaptive average pooling along one axis as a product with a fixed matrix of weights."""
    weights = torch.zeros(length, target)
    for index in range(target):
        start, end = index * length // target, -(-(index + 1) * length // target)
        weights[start:end, index] = 1.0 / (end - start)
    order = [at for at in range(x.rank) if at != axis] + [axis]
    last = b.transpose(x, order)
    made = b.op("MatMul", last, b.constant(weights, x.dtype), shape=(*last.shape[:-1], target), dtype=x.dtype)
    return b.transpose(made, [order.index(at) for at in range(x.rank)])


@lowers("upsample_nearest1d", "upsample_nearest2d", "upsample_nearest1d.vec", "upsample_nearest2d.vec", "upsample_bilinear2d",
        "upsample_bilinear2d.vec", "upsample_linear1d", "upsample_bicubic2d", "upsample_bicubic2d.vec",
        "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa", "_upsample_nearest_exact2d", "_upsample_nearest_exact2d.vec",
        "_upsample_bilinear2d_aa.vec", "_upsample_bicubic2d_aa.vec")  # fmt: skip
def _upsample(b: Lowering, x: Held, size: Any, *rest: Any) -> Held:
    assert b.node is not None
    x, name = whole_input(b, x), str(b.node.target)
    mode = "nearest" if "nearest" in name else "cubic" if "cubic" in name else "linear"
    attributes: dict[str, Any] = {"mode": mode}
    if mode == "nearest":
        exact = "exact" in name
        attributes["coordinate_transformation_mode"] = "half_pixel" if exact else "asymmetric"
        attributes["nearest_mode"] = "round_prefer_ceil" if exact else "floor"
    else:
        aligned = bool(rest and rest[0] is True)
        attributes["coordinate_transformation_mode"] = "align_corners" if aligned else "half_pixel"
        attributes["cubic_coeff_a"] = -0.5 if "_aa" in name else -0.75
    if "_aa" in name and b.opset >= 18:
        attributes["antialias"] = 1
    elif "_aa" in name:
        raise b.refuse("resizing with antialias needs opset 18", "Set opset: 18 or more.")
    factors = [item for item in rest if isinstance(item, list)]
    scales: list[float] = factors[-1] if factors else [item for item in rest if isinstance(item, float)]
    lead = x.rank - 2
    if len(scales) == lead and _floors(x, scales, b):
        whole = b.constant([1.0, 1.0, *scales], torch.float32)
        return b.op("Resize", x, None, _exact(whole), dtype=x.dtype, **attributes)
    return b.op("Resize", x, None, None, b.sizes(b.shape), dtype=x.dtype, **attributes)


def _floors(x: Held, scales: Sequence[float], b: Lowering) -> bool:
    """Whether the scale factors matter: they are used for the coordinates where they are not size ratios."""
    known = [isinstance(size, int) for size in (*x.shape[2:], *b.shape[2:])]
    return all(known) and any(
        abs(size * scale - made) > 1e-6 for size, scale, made in zip(x.shape[2:], scales, b.shape[2:], strict=True)
    )


def _exact(held: Held) -> Held:
    held.exact = True
    return held


@lowers("im2col")
def _im2col(b: Lowering, x: Held, kernel: Any, dilation: Any, padding: Any, stride: Any) -> Held:
    """Unfold: each window's values as a column, by a convolution with unit kernels per channel."""
    x = whole_input(b, x)
    kernel = _tuple(kernel, 2)
    count, channels = kernel[0] * kernel[1], x.shape[1]
    if not isinstance(channels, int):
        raise b.refuse("unfold with a dynamic number of channels", "Make the dimension fixed.")
    eye = torch.eye(count).reshape(count, 1, *kernel).repeat(channels, 1, 1, 1)
    height, width = (
        (size + 2 * pad - step * (length - 1) - 1) // move + 1
        for size, pad, step, length, move in zip(
            x.shape[2:], _tuple(padding, 2), _tuple(dilation, 2), kernel, _tuple(stride, 2), strict=True
        )
    )
    made = b.op("Conv", x, b.constant(eye, x.dtype), shape=(x.shape[0], channels * count, height, width), dtype=x.dtype,
                kernel_shape=kernel, strides=_tuple(stride, 2), pads=_tuple(padding, 2) * 2,
                dilations=_tuple(dilation, 2), group=channels)  # fmt: skip
    return b.reshape(made, b.shape)


@lowers("col2im")
def _col2im(b: Lowering, x: Held, size: Sequence[Any], kernel: Any, dilation: Any, padding: Any, stride: Any) -> Held:
    """Fold: the sum of windows at their places; windows that do not overlap are only moved."""
    x = whole_input(b, x)
    kernel, stride, padding = _tuple(kernel, 2), _tuple(stride, 2), _tuple(padding, 2)
    if kernel == stride and not any(padding) and _tuple(dilation, 2) == [1, 1]:
        channels = x.shape[1] // math.prod(kernel)
        high, wide = (length // step for length, step in zip(size, kernel, strict=True))
        split = b.reshape(x, (x.shape[0], channels, *kernel, high, wide))
        return b.reshape(b.transpose(split, [0, 1, 4, 2, 5, 3]), b.shape)
    if b.opset < 18:
        raise b.refuse("fold of overlapping windows needs opset 18", "Set opset: 18 or more.")
    return b.op("Col2Im", x, b.sizes(size), b.ints(*kernel), dtype=x.dtype, strides=stride, pads=padding * 2,
                dilations=_tuple(dilation, 2))  # fmt: skip
