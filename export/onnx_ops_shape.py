"""Lowerings that move, cut, join and pick values without computing on them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from export.onnx_lowering import Lowering, lowers
from export.onnx_ops import broadcast, traced_shape, whole_input
from export.onnx_values import Dim, Held, axis_of, dim

__all__: list[str] = []

_END = 2**62


@lowers("view", "reshape", "_unsafe_view", "unflatten.int", "flatten.using_ints", "view_as", "reshape_as", "_reshape_alias")
def _view(b: Lowering, x: Held, *_: Any) -> Held:
    return b.reshape(whole_input(b, x), b.shape)


@lowers("unsqueeze")
def _unsqueeze(b: Lowering, x: Held, axis: int) -> Held:
    axis = axis_of(axis, x.rank + 1)
    return _aligned(b, x, (*x.shape[:axis], 1, *x.shape[axis:]), lambda at: at if at < axis else at + 1)


@lowers("squeeze", "squeeze.dim", "squeeze.dims")
def _squeeze(b: Lowering, x: Held, axes: Any = None) -> Held:
    assert b.node is not None
    traced = traced_shape(b.node.args[0])
    axes = range(x.rank) if axes is None else [axes] if isinstance(axes, int) else axes
    gone = [at for at in (axis_of(axis, x.rank) for axis in axes) if traced[at] == 1]
    kept = [at for at in range(x.rank) if at not in gone]
    return _aligned(b, x, tuple(x.shape[at] for at in kept), lambda at: kept.index(at))


def _aligned(b: Lowering, x: Held, shape: Sequence[Dim], moved: Any) -> Held:
    """A reshape that only adds or removes axes of size 1; a counting range stays one."""
    if x.iota is not None and x.value is None:
        return Held(tuple(shape), x.dtype, iota=moved(x.iota))
    return b.reshape(x, shape)


@lowers("transpose.int", "swapaxes", "swapdims")
def _transpose(b: Lowering, x: Held, one: int, two: int) -> Held:
    order = list(range(x.rank))
    one, two = axis_of(one, x.rank), axis_of(two, x.rank)
    order[one], order[two] = two, one
    return b.transpose(x, order)


@lowers("permute")
def _permute(b: Lowering, x: Held, order: Sequence[int]) -> Held:
    return b.transpose(x, order)


@lowers("t", "numpy_T", "mT", "adjoint")
def _t(b: Lowering, x: Held) -> Held:
    assert b.node is not None
    order = list(range(x.rank))[::-1] if x.rank == 2 or "numpy_T" in str(b.node.target) else [*range(x.rank - 2), -1, -2]
    return b.transpose(x, order)


@lowers("movedim.int", "movedim.intlist")
def _movedim(b: Lowering, x: Held, source: Any, target: Any) -> Held:
    sources = [axis_of(axis, x.rank) for axis in ([source] if isinstance(source, int) else source)]
    targets = [axis_of(axis, x.rank) for axis in ([target] if isinstance(target, int) else target)]
    rest = iter(axis for axis in range(x.rank) if axis not in sources)
    placed = dict(zip(targets, sources, strict=True))
    return b.transpose(x, [placed[at] if at in placed else next(rest) for at in range(x.rank)])


@lowers("expand", "expand_as", "broadcast_to")
def _expand(b: Lowering, x: Held, *_: Any, **__: Any) -> Held:
    missing = len(b.shape) - x.rank
    return _aligned(b, x, (*[1] * missing, *x.shape), lambda at: at + missing) if missing else x


@lowers(
    "contiguous", "clone", "alias", "detach", "detach_", "lift_fresh_copy", "dropout", "feature_dropout", "native_dropout",
    "positive", "view.dtype", "_assert_async", "dropout_", "alpha_dropout",
)  # fmt: skip
def _same(b: Lowering, x: Held, *_: Any, **__: Any) -> Held:
    return x


@lowers("to.dtype", "to.device", "to.dtype_layout", "to.other", "_to_copy", "type_as", "to.prim_Device")
def _to(b: Lowering, x: Held, *_: Any, **__: Any) -> Held:
    if b.compute == torch.float16 and not b.typed and x.dtype.is_floating_point and b.dtype.is_floating_point:
        return x
    return b.cast(x, b.dtype)


def _starts_at(b: Lowering, value: Any, size: Dim) -> Any:
    """A slice bound as torch means it: negative ones count from the end."""
    if isinstance(value, int) and value < 0 and isinstance(size, int):
        return max(value + size, 0)
    return value


@lowers("slice.Tensor")
def _slice(b: Lowering, x: Held, axis: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Held:
    assert b.node is not None
    axis = axis_of(axis, x.rank)
    traced, made = traced_shape(b.node.args[0]), b.shape
    if traced[axis] == made[axis] and step == 1:
        return x
    if x.shape[axis] == 1 and traced[axis] != 1:
        return x
    start = _starts_at(b, 0 if start is None else start, traced[axis])
    end = _starts_at(b, _END if end is None else end, traced[axis])
    shape = tuple(made[axis] if at == axis else size for at, size in enumerate(x.shape))
    end = _END if isinstance(end, int) and isinstance(traced[axis], int) and end >= traced[axis] else end
    return b.op("Slice", x, _bound(b, start), _bound(b, end), b.ints(axis), b.ints(step), shape=shape, dtype=x.dtype)


def _bound(b: Lowering, value: Any) -> Held:
    return b.ints(min(value, _END)) if isinstance(value, int) else b.size(value)


@lowers("narrow")
def _narrow(b: Lowering, x: Held, axis: int, start: Any, length: Any) -> Held:
    return _slice(b, x, axis, start, start + length)


@lowers("select.int")
def _select(b: Lowering, x: Held, axis: int, index: Any) -> Held:
    assert b.node is not None
    axis = axis_of(axis, x.rank)
    shape = (*x.shape[:axis], *x.shape[axis + 1 :])
    if x.shape[axis] == 1:
        return b.reshape(x, shape)
    chosen = b.constant(index, torch.int64) if isinstance(index, int) else b.squeeze(b.size(index))
    return b.op("Gather", x, chosen, shape=shape, dtype=x.dtype, axis=axis)


def _pieces(b: Lowering, x: Held, axis: int) -> list[Held]:
    """Cuts ``x`` into the traced pieces along ``axis``."""
    assert b.node is not None
    axis, x = axis_of(axis, x.rank), whole_input(b, x)
    shapes = [tuple(dim(size) for size in item.shape) for item in b.node.meta["val"]]
    if len(shapes) == 1:
        return [x]
    lengths = b.sizes([shape[axis] for shape in shapes])
    return b.ops("Split", x, lengths, outputs=[(shape, x.dtype) for shape in shapes], axis=axis)


@lowers(
    "split.Tensor",
    "split_with_sizes",
    "split.sizes",
    "chunk",
    "split_with_sizes_copy",
    "split_copy.Tensor",
    "tensor_split.sections",
)
def _split(b: Lowering, x: Held, sizes: Any, axis: int = 0) -> list[Held]:
    return _pieces(b, x, axis)


@lowers("unbind.int")
def _unbind(b: Lowering, x: Held, axis: int = 0) -> list[Held]:
    axis, x = axis_of(axis, x.rank), whole_input(b, x)
    if not isinstance(x.shape[axis], int):
        raise b.refuse("unbind along a dynamic dimension", "Make the dimension fixed.")
    shape = (*x.shape[:axis], *x.shape[axis + 1 :])
    return [
        b.op("Gather", x, b.constant(index, torch.int64), shape=shape, dtype=x.dtype, axis=axis) for index in range(x.shape[axis])
    ]


@lowers("cat", "concat", "concatenate")
def _cat(b: Lowering, items: Sequence[Held], axis: int = 0) -> Held:
    assert b.node is not None
    nodes = b.node.args[0]
    wide = b.compute == torch.float16 and all(item.dtype == torch.float32 for item in items if item.const is None)
    dtype = torch.float32 if wide and b.dtype == torch.float16 else b.dtype
    whole = [
        b.full(b.cast(item, dtype), traced_shape(node))
        for item, node in zip(items, nodes, strict=True)  # type: ignore[arg-type]
        if traced_shape(node) != (0,)
    ]
    if len(whole) == 1:
        return whole[0]
    return b.op("Concat", *whole, axis=axis_of(axis, whole[0].rank), dtype=dtype)


@lowers("stack")
def _stack(b: Lowering, items: Sequence[Held], axis: int = 0) -> Held:
    assert b.node is not None
    axis = axis_of(axis, len(b.shape))
    made = []
    for item, node in zip(items, b.node.args[0], strict=True):  # type: ignore[arg-type]
        whole = b.full(b.cast(item, b.dtype), traced_shape(node))
        made.append(b.reshape(whole, (*whole.shape[:axis], 1, *whole.shape[axis:])))
    return b.op("Concat", *made, axis=axis)


@lowers("repeat", "tile")
def _repeat(b: Lowering, x: Held, times: Sequence[Any]) -> Held:
    x = whole_input(b, x)
    times = [*[1] * (x.rank - len(times)), *times]
    x = b.reshape(x, (*[1] * (len(times) - x.rank), *x.shape))
    if all(count == 1 or size == 1 for count, size in zip(times, x.shape, strict=True)):
        return x
    return b.op("Tile", x, b.sizes(times), dtype=x.dtype)


@lowers("repeat_interleave.self_int")
def _repeat_interleave(b: Lowering, x: Held, times: int, axis: int | None = None, output_size: Any = None) -> Held:
    x = whole_input(b, x)
    if axis is None:
        x, axis = b.reshape(x, (math.prod(x.shape),)), 0
    axis = axis_of(axis, x.rank)
    spread = (*x.shape[: axis + 1], times, *x.shape[axis + 1 :])
    return b.reshape(b.full(b.reshape(x, (*x.shape[: axis + 1], 1, *x.shape[axis + 1 :])), spread), b.shape)


@lowers("roll")
def _roll(b: Lowering, x: Held, shifts: Any, axes: Any = ()) -> Held:
    x = whole_input(b, x)
    shape = x.shape
    if not axes:
        x, axes = b.reshape(x, (math.prod(shape),)), [0]
    shifts, axes = [[item] if isinstance(item, int) else item for item in (shifts, axes)]
    for shift, axis in zip(shifts, axes, strict=True):
        axis = axis_of(axis, x.rank)
        shift = shift % x.shape[axis]
        if shift:
            tail = _cut(b, x, axis, x.shape[axis] - shift, _END, shift)
            head = _cut(b, x, axis, 0, x.shape[axis] - shift, x.shape[axis] - shift)
            x = b.op("Concat", tail, head, shape=x.shape, dtype=x.dtype, axis=axis)
    return b.reshape(x, shape)


def _cut(b: Lowering, x: Held, axis: int, start: Any, end: Any, length: Dim) -> Held:
    shape = tuple(length if at == axis else size for at, size in enumerate(x.shape))
    return b.op("Slice", x, _bound(b, start), _bound(b, end), b.ints(axis), shape=shape, dtype=x.dtype)


@lowers("slice_scatter")
def _slice_scatter(b: Lowering, x: Held, source: Held, axis: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Held:
    """``x`` with a slice replaced: what is before it, the source, what is after it."""
    assert b.node is not None
    x, source = whole_input(b, x), whole_input(b, b.cast(source, x.dtype), 1)
    axis, length = axis_of(axis, x.rank), x.shape[axis_of(axis, x.rank)]
    if source.shape[axis] == length:
        return source
    start = _starts_at(b, 0 if start is None else start, length)
    if step != 1 or not isinstance(start, int):
        raise b.refuse("aten.slice_scatter with a step or a dynamic start has no ONNX form here", "Use torch.cat.")
    end = start + source.shape[axis]
    parts = [_cut(b, x, axis, 0, start, start)] if start else []
    parts += [source] if end == length else [source, _cut(b, x, axis, end, _END, length - end)]
    return b.op("Concat", *parts, shape=x.shape, dtype=x.dtype, axis=axis)


@lowers("select_scatter")
def _select_scatter(b: Lowering, x: Held, source: Held, axis: int, index: int) -> Held:
    source = whole_input(b, b.cast(source, x.dtype), 1)
    axis = axis_of(axis, x.rank)
    wide = b.reshape(source, (*source.shape[:axis], 1, *source.shape[axis:]))
    x = whole_input(b, x)
    index = index + x.shape[axis] if index < 0 else index
    parts = [_cut(b, x, axis, 0, index, index)] if index else []
    parts += [wide] if index + 1 == x.shape[axis] else [wide, _cut(b, x, axis, index + 1, _END, x.shape[axis] - index - 1)]
    return b.op("Concat", *parts, shape=x.shape, dtype=x.dtype, axis=axis) if len(parts) > 1 else parts[0]


@lowers("copy")
def _copy(b: Lowering, x: Held, source: Held, *_: Any) -> Held:
    return b.full(b.reshape(b.cast(source, b.dtype), (*[1] * (x.rank - source.rank), *source.shape)))


@lowers("flip")
def _flip(b: Lowering, x: Held, axes: Sequence[int]) -> Held:
    x = whole_input(b, x)
    count = len(axes)
    at = b.ints(*(axis_of(axis, x.rank) for axis in axes))
    return b.op("Slice", x, b.ints(*[-1] * count), b.ints(*[-_END] * count), at, b.ints(*[-1] * count), dtype=x.dtype)


@lowers("tril", "triu")
def _tri(b: Lowering, x: Held, diagonal: int = 0) -> Held:
    assert b.node is not None
    x, upper = whole_input(b, x), int("triu" in str(b.node.target))
    made = b.cast(x, torch.int64) if x.dtype == torch.bool else x
    made = b.op("Trilu", made, b.constant(diagonal, torch.int64), shape=x.shape, dtype=made.dtype, upper=upper)
    return b.cast(made, x.dtype)


@lowers("diff")
def _diff(b: Lowering, x: Held, order: int = 1, axis: int = -1, prepend: Held | None = None, append: Held | None = None) -> Held:
    x = whole_input(b, x)
    axis = axis_of(axis, x.rank)
    for extra, first in ((prepend, True), (append, False)):
        if extra is not None:
            key = "prepend" if first else "append"
            assert b.node is not None
            node = b.node.kwargs.get(key) or b.node.args[3 if first else 4]
            extra = b.full(b.cast(extra, x.dtype), traced_shape(node))
            parts = (extra, x) if first else (x, extra)
            shape = tuple(size + extra.shape[at] if at == axis else size for at, size in enumerate(x.shape))
            x = b.op("Concat", *parts, shape=shape, dtype=x.dtype, axis=axis)
    for _ in range(order):
        length = x.shape[axis] - 1
        later, earlier = _cut(b, x, axis, 1, _END, length), _cut(b, x, axis, 0, -1, length)
        x = b.op("Xor" if x.dtype == torch.bool else "Sub", later, earlier, shape=later.shape, dtype=x.dtype)
    return x


# -- picking by index -----------------------------------------------------------------------------------------------


def _counts(index: Held, size: Dim) -> int | None:
    """The axis along which ``index`` counts 0 .. size-1, all other axes being 1; None if it does not."""
    if index.iota is not None:
        return index.iota if index.shape[index.iota] == size else None
    if index.const is None or index.const.dtype not in (torch.int64, torch.int32) or index.const.numel() != size:
        return None
    wide = [axis for axis, length in enumerate(index.shape) if length != 1]
    if len(wide) > 1 or not bool((index.const.reshape(-1) == torch.arange(int(size))).all()):
        return None
    return wide[0] if wide else 0


@lowers("index.Tensor", "_unsafe_index.Tensor")
def _index(b: Lowering, x: Held, indices: Sequence[Held | None]) -> Held:
    x = whole_input(b, x)
    given = [(axis, item) for axis, item in enumerate(indices) if item is not None]
    if len(given) > 1 and len(given) == x.rank and (reshaped := _outer(b, x, given)) is not None:
        return reshaped
    given = [(axis, _positions(b, item)) for axis, item in given]
    if len(given) == 1:
        axis, index = given[0]
        index = b.full(index, _index_shape(b, index, axis))
        shape = (*x.shape[:axis], *index.shape, *x.shape[axis + 1 :])
        return b.op("Gather", x, index, shape=shape, dtype=x.dtype, axis=axis)
    return _gather_nd(b, x, given)


def _index_shape(b: Lowering, index: Held, axis: int) -> tuple[Dim, ...]:
    assert b.node is not None
    node = b.node.args[1][axis]  # type: ignore[index]
    return index.shape if index.const is not None else traced_shape(node)


def _positions(b: Lowering, index: Held) -> Held:
    """An index as integers; a known mask becomes the places where it is true."""
    if index.dtype == torch.bool:
        if index.const is None or index.rank != 1:
            raise b.refuse("indexing by a mask gives a shape that depends on data", "Use torch.where or a fixed index.")
        return b.constant(index.const.nonzero().reshape(-1))
    return index


def _outer(b: Lowering, x: Held, given: Sequence[tuple[int, Held]]) -> Held | None:
    """``x[i, j]`` with counting i and j on axes of their own: a reshape (the mask code of transformers writes this)."""
    axes = [_counts(index, x.shape[axis]) for axis, index in given]
    ranks = {index.rank for _, index in given}
    known = [axis for axis in axes if axis is not None]
    if len(known) != len(axes) or len(ranks) != 1 or known != sorted(set(known)):
        return None
    shape: list[Dim] = [1] * ranks.pop()
    for size, axis in zip(x.shape, known, strict=True):
        shape[axis] = size
    return b.reshape(x, shape)


def _gather_nd(b: Lowering, x: Held, given: Sequence[tuple[int, Held]]) -> Held:
    """Several index tensors: the indexed axes are brought to the front, GatherND picks, the rest follows."""
    axes = [axis for axis, _ in given]
    rest = [axis for axis in range(x.rank) if axis not in axes]
    shape = broadcast(*(index.shape for _, index in given))
    parts = []
    for _, index in given:
        whole = b.full(b.reshape(b.cast(index, torch.int64), (*[1] * (len(shape) - index.rank), *index.shape)), shape)
        parts.append(b.reshape(whole, (*shape, 1)))
    stacked = b.op("Concat", *parts, shape=(*shape, len(axes)), dtype=torch.int64, axis=len(shape))
    front = b.transpose(x, [*axes, *rest])
    picked = b.op("GatherND", front, stacked, shape=(*shape, *(x.shape[axis] for axis in rest)), dtype=x.dtype)
    if axes != list(range(axes[0], axes[0] + len(axes))) or axes[0] == 0:
        return picked
    count, before = len(shape), axes[0]
    order = [*range(count, count + before), *range(count), *range(count + before, picked.rank)]
    return b.transpose(picked, order)


@lowers("index_select")
def _index_select(b: Lowering, x: Held, axis: int, index: Held) -> Held:
    return b.op("Gather", whole_input(b, x), index, axis=axis_of(axis, x.rank), dtype=x.dtype)


@lowers("gather", "take_along_dim")
def _gather(b: Lowering, x: Held, axis: int, index: Held, **_: Any) -> Held:
    assert b.node is not None
    if isinstance(axis, Held):
        axis, index = index, axis  # type: ignore[assignment]
        return b.op("GatherElements", whole_input(b, x), whole_input(b, index, 1), axis=axis_of(axis, x.rank), dtype=x.dtype)
    return b.op("GatherElements", whole_input(b, x), whole_input(b, index, 2), axis=axis_of(axis, x.rank), dtype=x.dtype)


@lowers("index_put")
def _index_put(b: Lowering, x: Held, indices: Sequence[Held | None], values: Held, accumulate: bool = False) -> Held:
    if accumulate or any(item is None or item.dtype == torch.bool for item in indices):
        raise b.refuse("aten.index_put with a mask, a gap or accumulation has no ONNX form here", "Use torch.where.")
    x = whole_input(b, x)
    given = [b.cast(item, torch.int64) for item in indices if item is not None]
    shape = broadcast(*(item.shape for item in given))
    parts = [
        b.reshape(b.full(b.reshape(item, (*[1] * (len(shape) - item.rank), *item.shape)), shape), (*shape, 1)) for item in given
    ]
    stacked = b.op("Concat", *parts, shape=(*shape, len(given)), dtype=torch.int64, axis=len(shape))
    values = b.full(b.cast(values, x.dtype), (*shape, *x.shape[len(given) :]))
    return b.op("ScatterND", x, stacked, values, dtype=x.dtype)


@lowers("scatter.src", "scatter.value")
def _scatter(b: Lowering, x: Held, axis: int, index: Held, source: Any) -> Held:
    x, index = whole_input(b, x), whole_input(b, index, 2)
    source = b.cast(source, x.dtype) if isinstance(source, Held) else b.constant(source, x.dtype)
    return b.op("ScatterElements", x, index, b.full(source, index.shape), axis=axis_of(axis, x.rank), dtype=x.dtype)


@lowers("topk")
def _topk(b: Lowering, x: Held, count: Any, axis: int = -1, largest: bool = True, sorted: bool = True) -> list[Held]:
    assert b.node is not None
    x = whole_input(b, x)
    outputs = [(_dims(item), item.dtype if item.dtype == torch.int64 else x.dtype) for item in b.node.meta["val"]]
    return b.ops("TopK", x, b.size(count), outputs=outputs, axis=axis_of(axis, x.rank), largest=int(largest), sorted=1)


@lowers("sort", "sort.stable")
def _sort(b: Lowering, x: Held, axis: int = -1, descending: bool = False, **_: Any) -> list[Held]:
    x = whole_input(b, x)
    axis = axis_of(axis, x.rank)
    outputs = [(x.shape, x.dtype), (x.shape, torch.int64)]
    return b.ops("TopK", x, b.size(x.shape[axis]), outputs=outputs, axis=axis, largest=int(descending), sorted=1)


@lowers("argsort", "argsort.stable")
def _argsort(b: Lowering, x: Held, axis: int = -1, descending: bool = False, **_: Any) -> Held:
    return _sort(b, x, axis, descending)[1]


def _dims(tensor: Any) -> tuple[Dim, ...]:
    return tuple(dim(size) for size in tensor.shape)


# -- padding and pixels ---------------------------------------------------------------------------------------------


@lowers("constant_pad_nd", "pad")
def _pad(b: Lowering, x: Held, pads: Sequence[Any], mode: Any = "constant", value: Any = None) -> Held:
    x = whole_input(b, x)
    if not isinstance(mode, str):
        mode, value = "constant", mode
    names = {"constant": "constant", "reflect": "reflect", "replicate": "edge"}
    if mode not in names:
        raise b.refuse(f"padding mode {mode!r} has no ONNX form here", f"Use one of {', '.join(names)}.")
    if not any(pads):
        return x
    before, after = [0] * x.rank, [0] * x.rank
    for index in range(len(pads) // 2):
        before[x.rank - 1 - index], after[x.rank - 1 - index] = pads[2 * index], pads[2 * index + 1]
    fill = b.constant(value or 0, x.dtype) if mode == "constant" else None
    inputs = [x, b.sizes([*before, *after]), *([fill] if fill is not None else [])]
    return b.op("Pad", *inputs, dtype=x.dtype, mode=names[mode])


@lowers("pixel_shuffle")
def _pixel_shuffle(b: Lowering, x: Held, factor: int) -> Held:
    return b.op("DepthToSpace", whole_input(b, x), dtype=x.dtype, blocksize=factor, mode="CRD")


@lowers("pixel_unshuffle")
def _pixel_unshuffle(b: Lowering, x: Held, factor: int) -> Held:
    x = whole_input(b, x)
    batch, channels, height, width = x.shape
    split = b.reshape(x, (batch, channels, height // factor, factor, width // factor, factor))
    return b.reshape(b.transpose(split, [0, 1, 3, 5, 2, 4]), b.shape)
