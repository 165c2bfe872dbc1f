"""The carried ops as TensorRT takes them, and the types that its integer kernels want.

TensorRT accepts integer weights only directly before DequantizeLinear: no Transpose, Reshape or Gather may stand between
(tried: "Quantized constant is only allowed before DQ"). So codes are stored in the weight's own shape, and what the graph
does to the weight is done to the dequantized values; the builder moves it back onto the integers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from calibrate.bits import integers
from calibrate.grid import pack, unpack
from export.graph import Traceable
from export.onnx_lowering import LOWERINGS, Lowering
from export.onnx_values import Held

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["explicit", "float32_scales", "scaled"]

_PRODUCTS = ("MatMul", "Gemm", "Conv")
_VIEWS = ("Transpose", "Cast")


@contextmanager
def explicit() -> Iterator[None]:
    """While it lasts, carried weights are lowered to codes, DequantizeLinear and whatever follows, and nothing else."""
    from export import onnx_carried  # noqa: F401 - its entries are the ones that are put back

    own: dict[str, Callable[..., Any]] = {
        "compress.dequantize.default": _dequantize,
        "compress.binary.default": _binary,
        "compress.embedding.default": _embedding,
    }
    kept = {name: LOWERINGS[name] for name in own}
    LOWERINGS.update(own)
    try:
        yield
    finally:
        LOWERINGS.update(kept)


def _dequantize(b: Lowering, codes: Held, scale: Held, zero_point: Held | None, bits: int, shape: Sequence[int]) -> Held:
    """DequantizeLinear of codes in the weight's own shape; narrower codes are stored as INT4."""
    assert codes.const is not None
    assert scale.const is not None
    path = codes.name.removesuffix(".codes").removesuffix(".quantized_weight")
    if zero_point is not None:
        raise b.refuse("TensorRT takes symmetric weights only", "Use symmetric: true for the weights.")
    stored = _stored(b, path, codes.const, bits, tuple(shape))
    return scaled(b, path, stored, scale, shape)


def _binary(b: Lowering, codes: Held, multiples: Held | None, shift: Held | None, scale: Held, shape: Sequence[int]) -> Held:
    """What the bits stand for, as INT4, which is the narrowest that there is; as INT8 where they reach beyond it."""
    assert codes.const is not None
    path = codes.name.removesuffix(".codes").removesuffix(".quantized_weight")
    planes, times, more = (None if held is None else held.const for held in (codes, multiples, shift))
    narrow = more is None and (times is None or times.shape[1] == 1) and math.prod(shape) % 2 == 0

    def made() -> np.ndarray[Any, Any]:
        assert planes is not None
        whole = integers(planes, times, more, shape)
        return (pack(whole, 4) if narrow else whole).numpy()

    kind, key = "INT4" if narrow else "INT8", (codes.const.data_ptr(), "binary")
    if key not in b.shared:
        b.shared[key] = b.packed(made, kind, tuple(shape), f"{path}.codes")
    entry = {"initializer": b.of(b.shared[key]).name, "bits": 4 if narrow else 8, "shape": list(shape), "order": "OI"}
    b.codes.setdefault(path, entry | {"storage": kind.lower()})
    return scaled(b, path, b.shared[key], scale, shape)


def scaled(b: Lowering, path: str, stored: Held, scale: Held, shape: Sequence[int]) -> Held:
    """DequantizeLinear of codes in the weight's own shape."""
    assert scale.const is not None
    groups = 1 if scale.const.numel() == 1 else scale.const.shape[1]
    layout: dict[str, Any] = {} if scale.const.numel() == 1 else {"axis": 0}
    values = scale.const.reshape(() if scale.const.numel() == 1 else (-1,))
    if groups > 1:
        layout, values = {"axis": 1, "block_size": shape[1] // groups}, scale.const
    coarse = b.compute == torch.float16 and _coarse(values)
    step = b.constant(values, name=f"{path}.scale")
    step.exact = coarse
    dtype = torch.float32 if coarse else b.compute
    made = b.op("DequantizeLinear", stored, step, shape=tuple(shape), dtype=dtype, name=f"{path}/DequantizeLinear", **layout)
    return b.cast(made, b.compute)


def _embedding(
    b: Lowering, ids: Held, codes: Held, scale: Held, zero_point: Held | None, bits: int, shape: Sequence[int]
) -> Held:
    """Gather from the dequantized table: the builder gathers codes and dequantizes those alone."""
    table = _dequantize(b, codes, scale, zero_point, bits, shape)
    return b.op("Gather", table, ids, shape=(*ids.shape, shape[1]), dtype=b.compute, axis=0)


def _stored(b: Lowering, path: str, codes: Tensor, bits: int, shape: tuple[int, ...]) -> Held:
    name, storage = f"{path}.codes", "int8" if bits == 8 else "int4"
    key = (codes.data_ptr(), bits, "explicit")
    if key not in b.shared:
        if bits == 8:
            b.shared[key] = b.constant(codes.reshape(shape), name=name)
        else:

            def packed() -> np.ndarray[Any, Any]:
                return pack(unpack(codes, bits, list(shape)), 4).numpy()

            b.shared[key] = b.packed(packed, "INT4", shape, name)
    held = b.shared[key]
    entry = {"initializer": b.of(held).name, "bits": bits, "shape": list(shape), "order": "OI", "storage": storage}
    b.codes.setdefault(path, entry)
    return held


def _coarse(scale: Tensor) -> bool:
    """Whether float16 would change a scale by more than its usual rounding (2**-11): it does below its normal range."""
    return bool(((scale.half().float() - scale).abs() > scale * 2.0**-10).any())


def float32_scales(model: ir.Model, source: Traceable) -> int:
    """Gives products of quantized inputs and weights their scales in float32; returns how many there are.

    In a float16 graph a product's two scales must have one type, and float16 does not hold small ones. Such products are
    typed float32 (they run on integers all the same, and the builder makes the same kernels) with a Cast after them.
    Scales are the model's own float32 values where their initializer bears the name of a buffer.
    """
    exact = _scales(source)
    wide: set[ir.Node] = set()
    for node in list(model.graph):
        if node.op_type in _PRODUCTS and (sides := _sides(node)) is not None:
            _widen(model, node, sides, exact, wide)
    for node in wide:
        _narrow_readers(model, node, wide)
    return sum(node.op_type in _PRODUCTS for node in wide)


def _scales(source: Traceable) -> dict[str, Tensor]:
    """float32 scales by the names that the lowering gives to initializers."""
    named = dict(source.model.named_buffers(remove_duplicate=False))
    return {name.replace(".quantized_weight.scale", ".scale"): value for name, value in named.items()}


def _sides(product: ir.Node) -> tuple[list[ir.Node], list[ir.Node]] | None:
    """(QuantizeLinear, DequantizeLinear) of the input and [DequantizeLinear, views of it ...] of the weight, or None."""
    inputs, weight = product.inputs[0], product.inputs[1]
    left = inputs.producer() if inputs is not None else None
    if left is None or left.op_type != "DequantizeLinear" or left.inputs[0] is None:
        return None
    quantize = left.inputs[0].producer()
    chain: list[ir.Node] = []
    node = weight.producer() if weight is not None else None
    while node is not None and node.op_type in _VIEWS and node.inputs[0] is not None:
        chain.insert(0, node)
        node = node.inputs[0].producer()
    if quantize is None or quantize.op_type != "QuantizeLinear" or node is None or node.op_type != "DequantizeLinear":
        return None
    return [quantize, left], [node, *chain]


def _widen(
    model: ir.Model,
    product: ir.Node,
    sides: tuple[list[ir.Node], list[ir.Node]],
    exact: Mapping[str, Tensor],
    wide: set[ir.Node],
) -> None:
    """Types one product, its quantizers and its weight float32; each node once."""
    import onnx_ir as ir

    (quantize, restore), (weight, *views) = sides
    if quantize not in wide:
        _cast_input(model, quantize, 0, ir.DataType.FLOAT)
    for node in (quantize, restore, weight):
        if node not in wide:
            node.replace_input_with(1, _float32(model, node.inputs[1], exact))
    for view in views:
        if view.op_type == "Cast" and view not in wide:
            ir.convenience.replace_all_uses_with(view.outputs[0], view.inputs[0])
    for index in range(2, len(product.inputs)):
        if product.inputs[index] is not None:
            _cast_input(model, product, index, ir.DataType.FLOAT)
    wide.update((quantize, restore, weight, product, *views))


def _narrow_readers(model: ir.Model, node: ir.Node, wide: set[ir.Node]) -> None:
    """Readers of a float32 value that stayed float16 get a Cast."""
    import onnx_ir as ir

    if node.op_type in ("QuantizeLinear", "Cast"):
        return
    output = node.outputs[0]
    readers = [(reader, index) for reader, index in output.uses() if reader not in wide]
    if not readers:
        return
    cast = ir.node("Cast", [output], {"to": int(ir.DataType.FLOAT16)}, name=f"{node.name}/float16")
    cast.outputs[0].name = cast.name
    model.graph.insert_after(node, cast)
    for reader, index in readers:
        reader.replace_input_with(index, cast.outputs[0])


def _cast_input(model: ir.Model, node: ir.Node, index: int, kind: ir.DataType) -> None:
    import onnx_ir as ir

    cast = ir.node("Cast", [node.inputs[index]], {"to": int(kind)}, name=f"{node.name}/input{index}")
    cast.outputs[0].name = cast.name
    model.graph.insert_before(node, cast)
    node.replace_input_with(index, cast.outputs[0])


def _float32(model: ir.Model, value: ir.Value | None, exact: Mapping[str, Tensor]) -> ir.Value:
    """The float32 initializer of a scale."""
    import onnx_ir as ir

    assert value is not None
    assert value.const_value is not None
    if value.const_value.dtype == ir.DataType.FLOAT:
        return value
    name = f"{value.name}.float32"
    if name not in model.graph.initializers:
        array = value.const_value.numpy().astype(np.float32)
        own = exact.get(value.name or "")
        if own is not None and own.numel() == array.size:
            array = own.detach().float().numpy().reshape(array.shape)
        made = ir.Value(name=name, const_value=ir.tensor(np.ascontiguousarray(array), name=name))
        made.type, made.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(array.shape)
        model.graph.register_initializer(made)
    return model.graph.initializers[name]
