"""MIL operations that move, choose or place elements, in torch."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from export.mil_args import Args

__all__ = ["MOVES", "torch_pad"]


def torch_pad(amounts: list[int]) -> list[int]:
    """MIL counts dimensions from the first, torch from the last."""
    pairs = [amounts[index : index + 2] for index in range(0, len(amounts), 2)]
    return [value for pair in reversed(pairs) for value in pair]


def _reshape(args: Args) -> Tensor:
    x = args.tensor("x")
    return x.reshape([x.shape[i] if size == 0 and x.numel() else size for i, size in enumerate(args.ints("shape"))])


def _expand_dims(args: Args) -> Tensor:
    x, axes = args.tensor("x"), args.ints("axes")
    rank = x.dim() + len(axes)
    for axis in sorted(axis % rank for axis in axes):
        x = x.unsqueeze(axis)
    return x


def _squeeze(args: Args) -> Tensor:
    x = args.tensor("x")
    axes = args.ints("axes") if args.has("axes") else [i for i, size in enumerate(x.shape) if size == 1]
    return x.squeeze(tuple(axes))


def _slice_by_index(args: Args) -> Tensor:
    x = args.tensor("x")
    rank = x.dim()
    begin, end = args.ints("begin"), args.ints("end")
    stride = args.ints("stride") if args.has("stride") else [1] * rank
    masks = [
        [bool(flag) for flag in args.ints(name)] if args.has(name) else [False] * rank
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
    x = args.tensor("x")
    for axis, (begin, size) in enumerate(zip(args.ints("begin"), args.ints("size"), strict=True)):
        begin %= max(x.shape[axis], 1)
        x = x.narrow(axis, begin, x.shape[axis] - begin if size == -1 else size)
    return x


def _slice_update(args: Args) -> Tensor:
    result = args.tensor("x").clone()
    _slice_by_index(Args({**args, "x": result})).copy_(args.tensor("update"))
    return result


def _split(args: Args) -> tuple[Tensor, ...]:
    axis = args.whole("axis")
    if args.has("split_sizes"):
        return torch.split(args.tensor("x"), args.ints("split_sizes"), axis)
    return torch.chunk(args.tensor("x"), args.whole("num_splits"), axis)


def _concat(args: Args) -> Tensor:
    values, axis = args.tensors("values"), args.whole("axis")
    if not args.flag("interleave"):
        return torch.cat([value.reshape(1) if value.dim() == 0 else value for value in values], axis)
    stacked = torch.stack(values, axis % values[0].dim() + 1)
    return stacked.flatten(axis % values[0].dim(), axis % values[0].dim() + 1)


def _wrapped(indices: Tensor, size: int) -> Tensor:
    whole = indices.long()
    return torch.where(whole < 0, whole + size, whole)


def _gather(args: Args) -> Tensor:
    x, axis, batch = args.tensor("x"), args.whole("axis"), args.whole("batch_dims")
    axis %= x.dim()
    indices = _wrapped(args.tensor("indices"), x.shape[axis])
    if not batch:
        picked = x.index_select(axis, indices.reshape(-1))
        return picked.reshape([*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :]])
    lead = x.shape[:batch]
    rows = [
        _gather(Args(x=part, axis=axis - batch, indices=index))
        for part, index in zip(x.flatten(0, batch - 1), indices.flatten(0, batch - 1), strict=True)
    ]
    result = torch.stack(rows)
    return result.reshape([*lead, *result.shape[1:]])


def _gather_nd(args: Args) -> Tensor:
    x, indices, batch = args.tensor("x"), args.tensor("indices").long(), args.whole("batch_dims")
    if batch:
        rows = [
            _gather_nd(Args(x=part, indices=index))
            for part, index in zip(x.flatten(0, batch - 1), indices.flatten(0, batch - 1), strict=True)
        ]
        result = torch.stack(rows)
        return result.reshape(*x.shape[:batch], *result.shape[1:])
    return x[tuple(_wrapped(indices[..., axis], x.shape[axis]) for axis in range(indices.shape[-1]))]


def _gather_along_axis(args: Args) -> Tensor:
    axis = args.whole("axis")
    return args.tensor("x").gather(axis, _wrapped(args.tensor("indices"), args.tensor("x").shape[axis]))


_SCATTER: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "update": lambda old, new: new,
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "min": torch.minimum,
    "max": torch.maximum,
}


def _scatter_nd(args: Args) -> Tensor:
    data, indices, mode = args.tensor("data").clone(), args.tensor("indices").long(), args.text("mode", "add")
    place = tuple(_wrapped(indices[..., axis], data.shape[axis]) for axis in range(indices.shape[-1]))
    if mode == "add":
        return data.index_put(place, args.tensor("updates"), accumulate=True)
    data[place] = _SCATTER[mode](data[place], args.tensor("updates"))
    return data


def _scatter_along_axis(args: Args) -> Tensor:
    data, axis, mode = args.tensor("data"), args.whole("axis"), args.text("mode", "add")
    indices = _wrapped(args.tensor("indices"), data.shape[axis])
    if mode == "add":
        return data.scatter_add(axis, indices, args.tensor("updates"))
    return data.scatter(axis, indices, _SCATTER[mode](data.gather(axis, indices), args.tensor("updates")))


def _scatter(args: Args) -> Tensor:
    data, axis, mode = args.tensor("data").clone(), args.whole("axis"), args.text("mode", "add")
    indices = _wrapped(args.tensor("indices"), data.shape[axis])
    place = (slice(None),) * (axis % data.dim()) + (indices,)
    data[place] = _SCATTER[mode](data[place], args.tensor("updates"))
    return data


def _pad(args: Args) -> Tensor:
    x, amounts, mode = args.tensor("x"), args.ints("pad"), args.text("mode", "constant")
    amounts = torch_pad(amounts)
    if mode == "constant":
        return F.pad(x, amounts, value=args.number("constant_val", 0.0))
    while len(amounts) > 2 and amounts[-2:] == [0, 0]:
        amounts = amounts[:-2]
    lead = x.dim() - len(amounts) // 2
    flat = x.reshape(1, -1, *x.shape[lead:])
    padded = F.pad(flat, amounts, mode="reflect" if mode == "reflect" else "replicate")
    return padded.reshape(*x.shape[:lead], *padded.shape[2:])


def _cumsum(args: Args) -> Tensor:
    x, axis = args.tensor("x"), args.whole("axis")
    x = x.flip(axis) if args.flag("reverse") else x
    total = x.cumsum(axis) - x if args.flag("exclusive") else x.cumsum(axis)
    return total.flip(axis) if args.flag("reverse") else total


def _argsort(args: Args) -> Tensor:
    return torch.argsort(args.tensor("x"), dim=args.whole("axis", -1), descending=not args.flag("ascending"), stable=True)


def _topk(args: Args) -> tuple[Tensor, ...]:
    values, indices = args.tensor("x").topk(args.whole("k", 1), args.whole("axis", -1), not args.flag("ascending"))
    return (values, indices) if args.flag("return_indices", True) else (values,)


def _band_part(args: Args) -> Tensor:
    x, lower, upper = args.tensor("x"), args.whole("lower", -1), args.whole("upper", -1)
    rows = torch.arange(x.shape[-2])[:, None]
    columns = torch.arange(x.shape[-1])
    keep = (lower < 0) | (rows - columns <= lower)
    keep = keep & ((upper < 0) | (columns - rows <= upper))
    return torch.where(keep, x, torch.zeros_like(x))


def _one_hot(args: Args) -> Tensor:
    size = args.whole("one_hot_vector_size")
    hot = F.one_hot(args.tensor("indices").long(), size).movedim(-1, args.whole("axis", -1))
    on: Tensor = args.get("on_value", torch.tensor(1))
    off: Tensor = args.get("off_value", torch.tensor(0))
    return torch.where(hot.bool(), on, off)


def _fill(args: Args) -> Tensor:
    value = args.tensor("value") if args.has("value") else torch.tensor(0.0)
    return value.reshape(()).expand(args.ints("shape")).clone()


def _range(args: Args) -> Tensor:
    start, end, step = args.tensor("start"), args.tensor("end"), args.tensor("step")
    if start.is_floating_point():
        return torch.arange(float(start), float(end), float(step))
    return torch.arange(int(start), int(end), int(step))


def _pixel_unshuffle(args: Args) -> Tensor:
    return F.pixel_unshuffle(args.tensor("x"), args.whole("downscale_factor"))


MOVES: dict[str, Callable[[Args], Any]] = {
    "reshape": _reshape,
    "reshape_like": lambda a: a.tensor("x").reshape(a.tensors("ref_tensors")[0].shape),
    "expand_dims": _expand_dims,
    "squeeze": _squeeze,
    "transpose": lambda a: a.tensor("x").permute(a.ints("perm")),
    "tile": lambda a: a.tensor("x").repeat(a.ints("reps")),
    "reverse": lambda a: a.tensor("x").flip(a.ints("axes") if a.has("axes") else list(range(a.tensor("x").dim()))),
    "concat": _concat,
    "stack": lambda a: torch.stack(a.tensors("values"), a.whole("axis")),
    "split": _split,
    "slice_by_index": _slice_by_index,
    "slice_by_size": _slice_by_size,
    "slice_update": _slice_update,
    "gather": _gather,
    "gather_nd": _gather_nd,
    "gather_along_axis": _gather_along_axis,
    "scatter": _scatter,
    "scatter_nd": _scatter_nd,
    "scatter_along_axis": _scatter_along_axis,
    "select": lambda a: torch.where(a.tensor("cond").bool(), a.tensor("a"), a.tensor("b")),
    "shape": lambda a: torch.tensor(a.tensor("x").shape),
    "fill": _fill,
    "fill_like": lambda a: torch.full(a.tensor("ref_tensor").shape, a.tensor("value").item()).to(a.tensor("value").dtype),
    "range_1d": _range,
    "cumsum": _cumsum,
    "pad": _pad,
    "topk": _topk,
    "band_part": _band_part,
    "one_hot": _one_hot,
    "argsort": _argsort,
    "non_zero": lambda a: a.tensor("x").nonzero(),
    "flatten2d": lambda a: a.tensor("x").reshape(math.prod(a.tensor("x").shape[: a.whole("axis", 1)]), -1),
    "pixel_shuffle": lambda a: F.pixel_shuffle(a.tensor("x"), a.whole("upscale_factor")),
    "pixel_unshuffle": _pixel_unshuffle,
}
"""Operation -> what computes it."""
