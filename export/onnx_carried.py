"""Lowerings of the ops that carry compressed values: every code goes into the file as it is, and integer kernels can run.

Shapes: O outputs, I inputs (``K`` and ``N`` of a matrix product are I and O), G groups, V rows of a table, C channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from calibrate.grid import offset, pack, unit, unpack
from export.onnx_lowering import Lowering, lowers
from export.onnx_ops import biased, broadcast
from export.onnx_values import Carried, Held

__all__ = ["dense", "patches", "product", "rows"]

_BLOCKS = (128, 64, 32, 16)
_FEW = 64
"""Fewer numbers than these are not worth a node."""


# -- reading the traced ops -----------------------------------------------------------------------------------------


def _carried(codes: Held, scale: Held, zero_point: Held | None, bits: int, shape: Sequence[int]) -> Carried:
    assert codes.const is not None
    assert scale.const is not None
    path = codes.name.removesuffix(".codes").removesuffix(".quantized_weight")
    shift = None if zero_point is None else zero_point.const
    return Carried(path, codes.const, scale.const, shift, bits, tuple(shape))


@lowers("compress::dequantize")
def _dequantize(b: Lowering, codes: Held, scale: Held, zero_point: Held | None, bits: int, shape: Sequence[int]) -> Held:
    carried = _carried(codes, scale, zero_point, bits, shape)
    return Held(carried.shape, b.compute, carried=carried)


@lowers("compress::binary")
def _binary(b: Lowering, codes: Held, multiples: Held | None, shift: Held | None, scale: Held, shape: Sequence[int]) -> Held:
    plain = _carried(codes, scale, None, 1 if multiples is None else multiples.shape[2], shape)
    whole = [None if held is None else held.const for held in (multiples, shift)]
    carried = replace(plain, binary=True, multiples=whole[0], shift=whole[1])
    return Held(carried.shape, b.compute, carried=carried)


@lowers("compress::embedding")
def _embedding(
    b: Lowering, ids: Held, codes: Held, scale: Held, zero_point: Held | None, bits: int, shape: Sequence[int]
) -> Held:
    from export.onnx_ops import whole_input

    return rows(b, whole_input(b, ids), _carried(codes, scale, zero_point, bits, shape))


@lowers("compress::quantize_dequantize")
def _quantize_dequantize(b: Lowering, x: Held, scale: Held, zero_point: Held, bits: int) -> Held:
    """Q/DQ. CPU runtimes have kernels for uint8 activations only (int8 ones are converted, and half of them lost), so the
    signed code c is stored as c + 128; TensorRT takes int8 with zero point 0."""
    assert scale.const is not None
    assert zero_point.const is not None
    shift, unit = int(zero_point.const), float(scale.const)
    if b.dialect == "tensorrt":
        if shift:
            raise b.refuse("TensorRT takes no zero point for activations", "Use symmetric: true for the activations.")
        zero = b.constant(0, torch.int8)
    else:
        zero = b.constant(shift + 128, torch.uint8)
    if bits < 8:
        low, high = (-(2 ** (bits - 1)) - shift) * unit, (2 ** (bits - 1) - 1 - shift) * unit
        x = b.op("Clip", x, b.constant(low, x.dtype), b.constant(high, x.dtype), shape=x.shape, dtype=x.dtype)
    step = b.constant(scale.const.reshape(()).float(), name=scale.name)
    codes = b.op("QuantizeLinear", x, step, zero, shape=x.shape, dtype=zero.dtype)
    return _restored(b, codes, step, zero)


def _restored(b: Lowering, codes: Held, step: Held, zero: Held) -> Held:
    made = b.op("DequantizeLinear", codes, step, zero, shape=codes.shape, dtype=b.compute)
    made.quantized = (codes, step, zero)
    return made


@lowers("compress::quantize_dequantize_dynamic")
def _dynamic(b: Lowering, x: Held, bits: int) -> Held:
    if b.dialect == "tensorrt":
        raise b.refuse("TensorRT quantizes activations with static ranges only", "Use activations: static.")
    if bits != 8:
        raise b.refuse(f"dynamic activations of {bits} bits have no ONNX form", "Use 8 bits.")
    outputs = [(x.shape, torch.uint8), ((), torch.float32), ((), torch.uint8)]
    codes, step, zero = b.ops("DynamicQuantizeLinear", x, outputs=outputs)
    return Held(x.shape, torch.float32, dynamic=(codes, step, zero))


# -- codes as initializers ------------------------------------------------------------------------------------------


def _record(b: Lowering, carried: Carried, held: Held, **layout: Any) -> Held:
    """Notes where the codes of a site lie, so that they can be read back from the file."""
    entry = {"initializer": b.of(held).name, "bits": carried.bits, "shape": list(carried.shape), **layout}
    b.codes.setdefault(carried.path, entry)
    return held


def _integers(carried: Carried) -> Tensor:
    """Signed codes [O, I], int8."""
    return unpack(carried.codes, carried.bits, list(carried.matrix))


def _stored(b: Lowering, carried: Carried, flipped: bool) -> Held:
    """The codes as an initializer in their own width: int8, INT4, or bits in bytes; [O, I], or [I, O] if ``flipped``.

    Codes of a convolution keep its shape. A table that is also read by rows stays [V, C] in the file and is turned by a
    Transpose, which runtimes fold.
    """
    if flipped and carried.codes.data_ptr() in b.tables and carried.bits == 8:
        return b.transpose(_stored(b, carried, False), [1, 0])
    shape = carried.matrix[::-1] if flipped else carried.shape
    order = "IO" if flipped else "OI"
    name = f"{carried.path}.codes"
    if carried.bits == 8:
        codes = carried.codes.reshape(carried.matrix).t() if flipped else carried.codes.reshape(carried.shape)
        held = b.pinned(b.constant(codes, name=name))
        return _record(b, carried, held, order=order, storage="int8")
    if b.codes_storage(carried) == "native":
        bits = 4 if b.dialect == "tensorrt" else carried.bits

        def packed() -> np.ndarray[Any, Any]:
            codes = _integers(carried)
            return pack((codes.t() if flipped else codes).contiguous(), bits).numpy()

        held = _once(b, carried, order, lambda: b.packed(packed, f"INT{bits}", shape, name))
        return _record(b, carried, held, order=order, storage=f"int{bits}")
    return _record(b, carried, _once(b, carried, order, lambda: _bytes(b, carried, flipped, name)), order=order, storage="bits")


def _once(b: Lowering, carried: Carried, order: str, make: Callable[[], Held]) -> Held:
    """Tied codes are stored once."""
    key = (carried.codes.data_ptr(), carried.bits, order)
    if key not in b.shared:
        b.shared[key] = make()
    return b.shared[key]


def _bytes(b: Lowering, carried: Carried, flipped: bool, name: str) -> Held:
    """Codes plus 2**(bits-1), packed into bytes, the first in the lowest bits; [bytes]."""

    def packed() -> np.ndarray[Any, Any]:
        codes = _integers(carried)
        return offset(pack((codes.t() if flipped else codes).contiguous(), carried.bits), carried.bits).numpy()

    count = -(-math.prod(carried.matrix) * carried.bits // 8)
    return b.packed(packed, "UINT8", (count,), name)


def _thirds(b: Lowering, carried: Carried) -> Held:
    """Codes of 3 bits as uint8 [rows, bytes], whole units of eight codes in three bytes: [O, ...] where they end with the rows,
    else [1, ...]. A product and a table that hold the same codes read one initializer."""
    many, size = unit(carried.bits)
    outputs, inputs = carried.matrix
    count = -(-math.prod(carried.matrix) // many) * size
    shape = (outputs, inputs // many * size) if inputs % many == 0 else (1, count)

    def packed() -> np.ndarray[Any, Any]:
        whole = torch.nn.functional.pad(carried.codes, (0, count - carried.codes.numel()))
        return offset(whole, carried.bits).reshape(shape).numpy()

    b.note("Weights of 3 bits lie in the file as such and are unpacked when it is opened: to 8 bits for integer kernels, to 4 "
           "where inputs are float; tables are unpacked row by row.")  # fmt: skip
    held = _once(b, carried, "OI", lambda: b.packed(packed, "UINT8", shape, f"{carried.path}.codes"))
    return _record(b, carried, held, order="OI", storage="bits")


def _int8(b: Lowering, carried: Carried, flipped: bool) -> Held:
    """The codes as an int8 value; narrower ones are widened by nodes of constants, which runtimes fold at load."""
    if carried.binary:
        return _from_planes(b, carried, flipped)
    if carried.bits == 3:
        whole = _signed(b, carried, _thirds(b, carried), carried.matrix if flipped else carried.shape)
        return b.transpose(whole, [1, 0]) if flipped else whole
    stored = _stored(b, carried, flipped)
    shape = carried.matrix[::-1] if flipped else carried.shape
    if carried.bits == 8:
        return stored
    if b.codes[carried.path]["storage"] != "bits":
        return b.op("Cast", stored, shape=shape, dtype=torch.int8, to=int(b.ir.DataType.INT8))
    return _signed(b, carried, stored, shape)


def _signed(b: Lowering, carried: Carried, stored: Held, shape: Sequence[int]) -> Held:
    """Codes (int8) of the given shape from their bytes."""
    fields = _fields(b, stored, carried.bits, stored.shape)
    flat = b.reshape(fields, (math.prod(fields.shape),))
    count = math.prod(shape)
    if flat.shape[0] != count:
        flat = b.op("Slice", flat, b.ints(0), b.ints(count), shape=(count,), dtype=flat.dtype)
    wide = b.op("Sub", flat, b.constant(2 ** (carried.bits - 1), torch.int32), shape=(count,), dtype=torch.int32)
    return b.reshape(b.cast(wide, torch.int8), shape)


def _from_planes(b: Lowering, carried: Carried, flipped: bool) -> Held:
    """Planes of bits as the int8 values that they stand for. The bytes lie in the file as in the model; only constants are
    computed with, so that runtimes fold the nodes at load and keep int8 for their kernels."""
    (outputs, inputs), planes, count = carried.matrix, carried.bits, math.prod(carried.shape)
    named = b.constant(carried.codes.reshape(planes, -1), name=f"{carried.path}.codes")
    stored = _once(b, carried, "planes", lambda: b.pinned(named))
    places = {"initializer": b.of(stored).name, "bits": planes, "shape": list(carried.shape), "order": "OI", "storage": "planes"}
    bits = b.reshape(_fields(b, stored, 1, stored.shape), (planes, stored.shape[1] * 8))
    if bits.shape[1] != count:
        bits = b.op("Slice", bits, b.ints(0), b.ints(count), b.ints(1), shape=(planes, count), dtype=bits.dtype)
    twice = b.op("Mul", bits, b.constant(2, torch.int32), shape=bits.shape, dtype=torch.int32)
    whole = b.op("Sub", twice, b.constant(1, torch.int32), shape=bits.shape, dtype=torch.int32)
    if carried.multiples is not None:
        groups = carried.multiples.shape[1]
        shape: tuple[int, ...] = (planes, outputs, groups, inputs // groups)
        times, places["multiples"] = _whole_numbers(b, carried, "multiples", carried.multiples.permute(2, 0, 1))
        whole = b.op("Mul", b.reshape(whole, shape), times, shape=shape, dtype=torch.int32)
        if planes > 1:
            whole = b.op("ReduceSum", whole, b.ints(0), shape=shape[1:], dtype=torch.int32, keepdims=0)
        whole, shape = b.reshape(whole, shape[1:]), shape[1:]
        if carried.shift is not None:
            more, places["shift"] = _whole_numbers(b, carried, "shift", carried.shift)
            whole = b.op("Add", whole, more, shape=shape, dtype=torch.int32)
    b.codes.setdefault(carried.path, places)
    narrow = b.reshape(b.cast(whole, torch.int8), carried.matrix if flipped else carried.shape)
    return b.transpose(narrow, [1, 0]) if flipped else narrow


def _whole_numbers(b: Lowering, carried: Carried, name: str, values: Tensor) -> tuple[Held, str]:
    """int8 [...] as int32 [..., 1], and the name of their initializer."""
    held = b.pinned(b.constant(values.unsqueeze(-1).contiguous(), name=f"{carried.path}.{name}"))
    return b.cast(held, torch.int32), str(b.of(held).name)


def _fields(b: Lowering, packed: Held, bits: int, shape: Sequence[Any]) -> Held:
    """Bytes [...] as their fields, int32: [..., 8 / bits], those of 3 bits [... / 3, 8].

    By Div and Mod: OpenVINO reads BitShift of bytes wrongly. What does it costs nothing when the file runs: it hangs on
    initializers alone, so that ONNX Runtime computes it once, when it opens the file, and runs INT8 kernels on the result.
    """
    many, size = unit(bits)
    if size == 1:
        whole = b.cast(b.op("Unsqueeze", packed, b.ints(len(shape)), shape=(*shape, 1), dtype=torch.uint8), torch.int32)
    else:
        shape = (*shape[:-1], shape[-1] // size)
        parts = b.cast(b.reshape(packed, (*shape, size)), torch.int32)
        places = b.constant([256**position for position in range(size)], torch.int32)
        parts = b.op("Mul", parts, places, shape=parts.shape, dtype=torch.int32)
        whole = b.op("ReduceSum", parts, b.ints(-1), shape=(*shape, 1), dtype=torch.int32, keepdims=1)
    steps = b.constant([2 ** (position * bits) for position in range(many)], torch.int32)
    made = b.op("Div", whole, steps, shape=(*shape, many), dtype=torch.int32)
    return b.op("Mod", made, b.constant(2**bits, torch.int32), shape=made.shape, dtype=torch.int32)


# -- dense weights --------------------------------------------------------------------------------------------------


def dense(b: Lowering, carried: Carried, flipped: bool = False, folded: bool = False) -> Held:
    """The weight in floating point, from its codes: [O, I] (the weight's own shape for convolutions) or [I, O].

    Written as DequantizeLinear, or as Cast and Mul where a runtime should fold it into a float weight (``folded``), or
    where DequantizeLinear cannot say it.
    """
    blocked = carried.groups > 1
    if folded or (blocked and (b.opset < 21 or len(carried.shape) > 2)):
        return _multiplied(b, carried, flipped)
    if carried.bits == 3 and len(carried.shape) == 2 and b.opset >= 21:
        return _as_four_bits(b, carried, flipped)
    unpacked = carried.binary or (carried.bits != 8 and b.codes_storage(carried) == "bits")
    codes = _int8(b, carried, flipped) if unpacked else _stored(b, carried, flipped)
    return _scaled(b, carried, codes, codes.shape, flipped)


def _as_four_bits(b: Lowering, carried: Carried, flipped: bool) -> Held:
    """DequantizeLinear of 3-bit codes [O, I] that a Cast makes INT4: runtimes fold it when they open the file, and ONNX Runtime
    then makes MatMulNBits of that and the product, as of 4-bit codes. Scales of whole rows are repeated for blocks of at most 128
    inputs, which its kernels run faster than the 32 that it would choose."""
    codes = _int8(b, carried, flipped)
    codes = b.op("Cast", codes, shape=codes.shape, dtype=torch.int8, to=int(b.ir.DataType.INT4))
    block = _block(carried)
    if carried.groups > 1 or carried.zero_point is not None or block is None or carried.matrix[1] == block:
        return _scaled(b, carried, codes, codes.shape, flipped, "INT4")
    (outputs, inputs), axis = carried.matrix, 0 if flipped else 1
    counts = (inputs // block, outputs) if flipped else (outputs, inputs // block)
    scale = _halved(b, carried.scale.reshape((1, -1) if flipped else (-1, 1)), f"{carried.path}.scale")
    scale = b.op("Expand", b.pinned(scale) if scale.value is None else scale, b.ints(*counts), shape=counts, dtype=torch.float32)
    return b.op("DequantizeLinear", codes, scale, shape=codes.shape, dtype=b.compute, axis=axis, block_size=block)


def _scaled(b: Lowering, carried: Carried, codes: Held, shape: Sequence[int], flipped: bool, kind: str | None = None) -> Held:
    """DequantizeLinear of codes in the given layout; ``kind``: their type, where their value does not say it."""
    if kind is None:
        kind = b.of(codes).type.dtype.name if b.of(codes).type is not None else "INT8"
    scale, zero, attributes = _parameters(b, carried, flipped, kind)
    if b.compute == torch.float16 and _coarse(carried.scale):
        scale.exact = True
        made = b.op("DequantizeLinear", codes, scale, zero, shape=shape, dtype=torch.float32, **attributes)
        return b.cast(made, torch.float16)
    return b.op("DequantizeLinear", codes, scale, zero, shape=shape, dtype=b.compute, **attributes)


def _coarse(scale: Tensor) -> bool:
    """Whether float16 would change a scale by more than its usual rounding (2**-11): it does below its normal range."""
    return bool(((scale.half().float() - scale).abs() > scale * 2.0**-10).any())


def _parameters(b: Lowering, carried: Carried, flipped: bool, kind: str = "INT8") -> tuple[Held, Held | None, dict[str, Any]]:
    """Scale, zero point and the attributes of DequantizeLinear."""

    def laid_out(tensor: Tensor) -> Tensor:
        if carried.per_tensor:
            return tensor.reshape(())
        if carried.groups == 1:
            return tensor.reshape(-1)
        return tensor.t().contiguous() if flipped else tensor

    attributes: dict[str, Any] = {}
    if carried.groups > 1:
        attributes = {"axis": 0 if flipped else 1, "block_size": carried.matrix[1] // carried.groups}
    elif not carried.per_tensor:
        attributes = {"axis": 1 if flipped else 0}
    scale = _halved(b, laid_out(carried.scale), f"{carried.path}.scale")
    if carried.zero_point is None:
        return scale, None, attributes
    shift, name = laid_out(carried.zero_point), f"{carried.path}.zero_point"
    if kind in ("INT4", "INT2"):
        data = pack(shift.contiguous(), int(kind[3:])).numpy()
        return scale, b.packed(lambda: data, kind, tuple(shift.shape), name), attributes
    return scale, b.constant(shift, name=name), attributes


def _halved(b: Lowering, numbers: Tensor, name: str) -> Held:
    """Numbers that are float16 numbers, stored as such and widened by a Cast, which runtimes fold at load."""
    held = b.constant(numbers, name=name)
    if b.dialect == "tensorrt" or numbers.numel() < _FEW or not torch.equal(numbers.half().float(), numbers.float()):
        return held
    half = b.constant(numbers.half(), name=name)
    half.exact = True
    return b.cast(b.pinned(half), torch.float32)


def _multiplied(b: Lowering, carried: Carried, flipped: bool) -> Held:
    """Cast, Sub, Mul and Reshape: what DequantizeLinear would do, in nodes that every runtime folds."""
    outputs, inputs = carried.matrix
    shape = (outputs, carried.groups, inputs // carried.groups)
    values = b.cast(b.reshape(_int8(b, carried, False), shape), b.compute)
    scale_shape = (1, 1, 1) if carried.per_tensor else (outputs, carried.groups, 1)
    if carried.zero_point is not None:
        shift = b.pinned(b.constant(carried.zero_point.reshape(scale_shape), name=f"{carried.path}.zero_point"))
        values = b.op("Sub", values, b.cast(shift, b.compute), shape=shape, dtype=b.compute)
    scale = _halved(b, carried.scale.reshape(scale_shape), f"{carried.path}.scale")
    values = b.op("Mul", values, scale, shape=shape, dtype=b.compute)
    whole = b.reshape(values, carried.shape)
    return b.transpose(whole, [1, 0]) if flipped else whole


# -- products -------------------------------------------------------------------------------------------------------


def product(b: Lowering, x: Held, carried: Carried, bias: Held | None = None) -> Held:
    """``x @ W.T + bias`` for a carried weight W [O, I].

    Which kernels run is decided here: integer ones need 8-bit activations and scales per channel or per tensor; float
    activations with narrow weights use MatMulNBits in ONNX Runtime, or, ``unpacked``, a float product of what is folded at
    load; everything else is DequantizeLinear and MatMul.
    """
    outputs = carried.matrix[0]
    shape = (*x.shape[:-1], outputs)
    if x.dynamic is not None and carried.groups == 1:
        return _dynamic_product(b, x, carried, bias, shape)
    stepped = b.dialect != "tensorrt" and _multiples(carried) is not None
    integer = x.quantized is not None and (carried.groups == 1 or stepped)
    if integer and b.dialect == "onnxruntime":
        return _integer_product(b, x, carried, bias, shape)
    if not integer and carried.binary:
        b.note("One-bit weights with float inputs are made float when the file is loaded, and multiplied so.")
    elif not integer and b.unpacked:
        b.note("Weights with float inputs are made float when the file is opened, and multiplied so.")
    elif not integer and b.dialect != "tensorrt":
        b.note("Weights with float activations, or with scales per group, run in ONNX Runtime as MatMulNBits, which rounds "
               "activations to 8 bits per block (accuracy level 4).")  # fmt: skip
    narrow = carried.bits in (2, 4) and not carried.binary and not b.unpacked
    if b.dialect == "onnxruntime" and not integer and narrow and (block := _block(carried)):
        made = _n_bits(b, x, carried, block, shape)
    else:
        made = _dense_product(b, x, carried, shape, integer)
    return made if bias is None else biased(b, made, bias)


def _dense_product(b: Lowering, x: Held, carried: Carried, shape: Sequence[Any], integer: bool) -> Held:
    if integer and carried.groups > 1:
        wide, scale = _eight_bits(b, carried)
        weight = b.op("DequantizeLinear", wide, scale, shape=wide.shape, dtype=b.compute, axis=1)
    elif integer and carried.bits < 8 and b.dialect != "tensorrt":
        weight = _scaled(b, carried, _int8(b, carried, True), carried.matrix[::-1], True)
    else:
        weight = dense(b, carried, flipped=True, folded=carried.binary or (b.unpacked and not integer))
    return b.op("MatMul", x, weight, shape=shape, dtype=b.compute)


def _integer_product(b: Lowering, x: Held, carried: Carried, bias: Held | None, shape: Sequence[Any]) -> Held:
    """MatMulIntegerToFloat on the codes, with the bias inside: the kernel that ONNX Runtime would make of Q/DQ, MatMul and
    Add, less the Add (4 % of a small encoder's time). OpenVINO reads it as the Q/DQ that it is, at the same speed."""
    assert x.quantized is not None
    codes, step, zero = x.quantized
    if bias is not None:
        bias = b.halved(bias) or bias
    inside = bias if bias is not None and bias.rank == 1 else None
    if carried.groups > 1:
        (weight, scale), shift = _eight_bits(b, carried), None
    else:
        scale, shift, _ = _parameters(b, carried, True)
        weight = _int8(b, carried, True)
    made = b.op("MatMulIntegerToFloat", codes, weight, step, scale, zero, shift, inside, shape=shape, dtype=torch.float32,
                domain="com.microsoft")  # fmt: skip
    return made if bias is inside else biased(b, made, bias)  # type: ignore[arg-type]


def _multiples(carried: Carried) -> tuple[Tensor, Tensor] | None:
    """Steps [O, 1] and whole numbers [O, G] (int8) whose products are the scales, where there are such that code times
    (less its zero point) times number is an int8; else None."""
    if carried.groups == 1 or carried.bits == 8:
        return None
    highest = 128 >> (carried.bits - 1) if carried.zero_point is None else 127 // (2**carried.bits - 1)
    scale = carried.scale.float()
    step, found = torch.zeros(len(scale), 1), torch.zeros(len(scale), dtype=torch.bool)
    for most in range(1, highest + 1):
        tried = scale.amax(1, keepdim=True) / most
        fits = ((scale / tried).round() * tried == scale).all(1) & ~found
        step[fits], found = tried[fits], found | fits
    return (step, (scale / step).round().to(torch.int8)) if bool(found.all()) else None


def _eight_bits(b: Lowering, carried: Carried) -> tuple[Held, Held]:
    """The weight of few bits in groups as int8 [I, O] with one scale for each output: nodes of constants, folded at load."""
    known = _multiples(carried)
    assert known is not None
    outputs, inputs = carried.matrix
    shape = (outputs, carried.groups, inputs // carried.groups)
    times = b.pinned(b.constant(known[1].unsqueeze(-1), name=f"{carried.path}.multiples"))
    codes = b.cast(b.reshape(_int8(b, carried, False), shape), torch.int32)
    if carried.zero_point is not None:
        shift = b.pinned(b.constant(carried.zero_point.unsqueeze(-1), name=f"{carried.path}.zero_point"))
        codes = b.op("Sub", codes, b.cast(shift, torch.int32), shape=shape, dtype=torch.int32)
    wide = b.op("Mul", codes, b.cast(times, torch.int32), shape=shape, dtype=torch.int32)
    whole = b.transpose(b.reshape(b.cast(wide, torch.int8), (outputs, inputs)), [1, 0])
    return whole, _halved(b, known[0].reshape(-1), f"{carried.path}.scale")


def _dynamic_product(b: Lowering, x: Held, carried: Carried, bias: Held | None, shape: Sequence[Any]) -> Held:
    """MatMulInteger on the codes: ONNX Runtime makes one kernel of it and of the DynamicQuantizeLinear before it. The bias
    is an Add here, which that kernel takes in."""
    assert x.dynamic is not None
    codes, step, zero = x.dynamic
    scale, shift, _ = _parameters(b, carried, True)
    whole = b.op("MatMulInteger", codes, _int8(b, carried, True), zero, shift, shape=shape, dtype=torch.int32)
    factor = b.op("Mul", step, scale, shape=scale.shape, dtype=torch.float32)
    made = b.op("Mul", b.cast(whole, torch.float32), factor, shape=shape, dtype=torch.float32)
    return made if bias is None else b.op("Add", made, bias, shape=shape, dtype=torch.float32)


def _block(carried: Carried) -> int | None:
    """The block size with which MatMulNBits can hold the scales, or None."""
    size = carried.matrix[1] // carried.groups
    return next((block for block in (256, *_BLOCKS) if size % block == 0 and (block <= 128 or carried.groups > 1)), None)


def _n_bits(b: Lowering, x: Held, carried: Carried, block: int, shape: Sequence[Any]) -> Held:
    outputs, inputs = carried.matrix
    count = inputs // block

    def packed() -> np.ndarray[Any, Any]:
        return offset(pack(_integers(carried), carried.bits), carried.bits).reshape(outputs, count, -1).numpy()

    stored = (outputs, count, block * carried.bits // 8)
    codes = _once(b, carried, "NBits", lambda: b.packed(packed, "UINT8", stored, f"{carried.path}.codes"))
    _record(b, carried, codes, order="OI", storage="bits")
    scale = _halved(b, _spread(carried.scale, outputs, count).contiguous(), f"{carried.path}.scale")
    zero = None
    if carried.zero_point is not None:
        zero = b.constant(_packed_zero_points(carried, count), name=f"{carried.path}.zero_point")
    return b.op("MatMulNBits", x, codes, scale, zero, shape=shape, dtype=x.dtype, domain="com.microsoft", K=inputs, N=outputs,
                bits=carried.bits, block_size=block, accuracy_level=4)  # fmt: skip


def _spread(parameter: Tensor, outputs: int, count: int) -> Tensor:
    """[O, G] or [1, 1] as [O, blocks]."""
    whole = parameter.expand(outputs, parameter.shape[1])
    return whole.repeat_interleave(count // whole.shape[1], 1)


def _packed_zero_points(carried: Carried, count: int) -> Tensor:
    assert carried.zero_point is not None
    shifts = _spread(carried.zero_point, carried.matrix[0], count)
    missing = -count % (8 // carried.bits)
    return torch.stack([offset(pack(torch.nn.functional.pad(row, (0, missing)), carried.bits), carried.bits) for row in shifts])


def patches(b: Lowering, x: Held, carried: Carried, bias: Held | None, attributes: dict[str, Any]) -> Held | None:
    """A convolution of patches that do not overlap, with quantized inputs, as a matrix product: its integer kernels are
    several times faster than those of convolutions. None where the convolution is of another kind."""
    kernel, spatial = list(carried.shape[2:]), x.shape[2:]
    known = all(isinstance(size, int) for size in spatial)
    plain = attributes["group"] == 1 and not any(attributes["pads"]) and attributes["strides"] == kernel
    if b.dialect == "tensorrt" or len(kernel) != 2 or not (known and plain) or (x.quantized is None and x.dynamic is None):
        return None
    if any(size % length for size, length in zip(spatial, kernel, strict=True)):
        return None
    (batch, channels, height, width), (tall, wide) = x.shape, kernel
    rows_, columns = height // tall, width // wide

    def moved(held: Held) -> Held:
        split = b.reshape(held, (batch, channels, rows_, tall, columns, wide))
        return b.reshape(b.transpose(split, [0, 2, 4, 1, 3, 5]), (batch, rows_ * columns, channels * tall * wide))

    if x.quantized is not None:
        codes, step, zero = x.quantized
        flat = _restored(b, moved(codes), step, zero)
    else:
        assert x.dynamic is not None
        codes, step, zero = x.dynamic
        codes = moved(codes)
        flat = Held(codes.shape, torch.float32, dynamic=(codes, step, zero))
    made = b.transpose(product(b, flat, carried, bias), [0, 2, 1])
    return b.reshape(made, (batch, carried.shape[0], rows_, columns))


# -- tables ---------------------------------------------------------------------------------------------------------


def rows(b: Lowering, ids: Held, carried: Carried) -> Held:
    """Rows of a table [V, C]: codes are gathered first and only those are dequantized."""
    table, channels = carried.matrix
    name = f"{carried.path}.codes"
    if carried.bits == 8:
        stored = _stored(b, carried, False)
        picked = b.op("Gather", stored, ids, shape=(*ids.shape, channels), dtype=torch.int8, axis=0)
        values = b.cast(picked, torch.float32)
    else:
        width = channels * carried.bits // 8

        def packed() -> np.ndarray[Any, Any]:
            return offset(carried.codes, carried.bits).reshape(table, -1).numpy()

        if carried.bits == 3:
            stored = _thirds(b, carried)
        else:
            held = _once(b, carried, "rows", lambda: b.packed(packed, "UINT8", (table, width), name))
            stored = _record(b, carried, held, order="OI", storage="bits")
        picked = b.op("Gather", stored, ids, shape=(*ids.shape, width), dtype=torch.uint8, axis=0)
        fields = b.reshape(_fields(b, picked, carried.bits, picked.shape), (*ids.shape, channels))
        half = b.constant(2 ** (carried.bits - 1), torch.int32)
        values = b.cast(b.op("Sub", fields, half, shape=fields.shape, dtype=torch.int32), torch.float32)
    return b.cast(_row_scales(b, ids, carried, values), b.compute)


def _row_scales(b: Lowering, ids: Held, carried: Carried, values: Held) -> Held:
    """(values - zero_point) * scale with the parameters of each gathered row."""
    groups = carried.groups
    blocks = b.reshape(values, (*ids.shape, groups, carried.matrix[1] // groups)) if groups > 1 else values

    def picked(parameter: Tensor, name: str) -> Held:
        small = parameter if parameter.dtype == torch.int8 else parameter.half()
        stored = small if torch.equal(small.float(), parameter.float()) else parameter.float()
        if carried.per_tensor:
            stored = parameter.float().reshape(())
        held = b.constant(stored, name=f"{carried.path}.{name}")
        held.exact = True
        if carried.per_tensor:
            return held
        rows_ = b.op("Gather", b.pinned(held), ids, shape=(*ids.shape, groups), dtype=stored.dtype, axis=0)
        rows_ = b.cast(rows_, torch.float32)
        return b.reshape(rows_, (*ids.shape, groups, 1)) if groups > 1 else rows_

    if carried.zero_point is not None:
        blocks = b.op("Sub", blocks, picked(carried.zero_point, "zero_point"), shape=blocks.shape, dtype=torch.float32)
    scale = picked(carried.scale, "scale")
    made = b.op("Mul", blocks, scale, shape=broadcast(blocks.shape, scale.shape), dtype=torch.float32)
    return b.reshape(made, values.shape)
