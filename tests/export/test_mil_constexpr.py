"""Operations that make dense weights: the interpreter against coremltools' own decompressor, and the readers of bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from coreml_models import saved
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("coremltools", reason="Core ML needs coremltools")

import coremltools as ct
from coremltools.converters.mil.frontend.milproto.load import load as load_milproto
from coremltools.converters.mil.mil import Builder as mb
from coremltools.converters.mil.mil import types

from export.mil import Program
from export.mil_args import Args
from export.mil_constexpr import CONSTEXPR
from export.mil_package import WEIGHTS, Package, Stored, quiet, unpack_bits

DRAW = np.random.default_rng(0)


def codes(bits: int, shape: tuple[int, ...], signed: bool) -> Any:
    name = f"{'int' if signed else 'uint'}{bits}"
    low = -(2 ** (bits - 1)) if signed else 0
    drawn = DRAW.integers(low, low + 2**bits, shape)
    return drawn.astype(types.nptype_from_builtin(types.string_to_builtin(name)))


def floats(*shape: int) -> Any:
    return DRAW.standard_normal(shape).astype(np.float32)


def mask(*shape: int) -> Any:
    return DRAW.integers(0, 2, shape).astype(types.nptype_from_builtin(types.uint1))


MASK = mask(8, 12)
WEIGHTS_BY_FORM: dict[str, Any] = {
    "int8 per channel": lambda: mb.constexpr_blockwise_shift_scale(data=codes(8, (8, 12), True), scale=floats(8, 1)),
    "int4 per group, with zero point": lambda: mb.constexpr_blockwise_shift_scale(
        data=codes(4, (8, 12), True), scale=floats(8, 3), offset=codes(4, (8, 3), True)
    ),
    "uint4 of a convolution": lambda: mb.constexpr_blockwise_shift_scale(
        data=codes(4, (8, 6, 3, 3), False), scale=floats(4, 2, 1, 1), offset=codes(4, (4, 2, 1, 1), False)
    ),
    "uint8 per tensor": lambda: mb.constexpr_blockwise_shift_scale(data=codes(8, (8, 12), False), scale=floats(1, 1)),
    **{
        f"table of {bits} bits": lambda bits=bits: mb.constexpr_lut_to_dense(
            indices=codes(bits, (8, 12), False), lut=floats(8, 1, 2**bits, 1)
        )
        for bits in (1, 2, 3, 4, 6, 8)
    },
    "table per block": lambda: mb.constexpr_lut_to_dense(indices=codes(2, (8, 12), False), lut=floats(2, 3, 4, 1)),
    "table of vectors": lambda: mb.constexpr_lut_to_dense(
        indices=codes(4, (8, 6), False), lut=floats(2, 1, 16, 2), vector_axis=1
    ),
    "table of int8, scaled": lambda: mb.constexpr_lut_to_dense(
        indices=codes(2, (8, 12), False),
        lut=mb.constexpr_blockwise_shift_scale(data=codes(8, (8, 3, 4, 1), True), scale=floats(8, 3, 1, 1)),
    ),
    "sparse": lambda: mb.constexpr_sparse_to_dense(nonzero_data=floats(int(MASK.sum())), mask=MASK),
}


def built(path: Path, make: Any) -> Path:
    return saved(path, {"x": ((1, 1), "float32")}, lambda x: mb.add(x=make(), y=mb.reduce_sum(x=x), name="dense"))


@pytest.mark.parametrize("form", WEIGHTS_BY_FORM)
def test_a_dense_weight_equals_apples_own(form: str, tmp_path: Path) -> None:
    """Oracle: ``materialized_val_inference`` of the operation as coremltools reads it from the saved file."""
    path = built(tmp_path / "w.mlpackage", WEIGHTS_BY_FORM[form])
    ours = Program(path)({"x": torch.zeros(1, 1)})["dense"]
    with quiet():
        spec = ct.models.MLModel(str(path), skip_model_load=True).get_spec()
        program = load_milproto(spec, spec.specificationVersion, str(path / "Data/com.apple.CoreML/weights"))
    made = [op for op in program.functions["main"].operations if op.op_type.startswith("constexpr_")]
    theirs = made[-1]
    if "lut" in theirs.inputs and theirs.lut.val is None:  # it cannot follow a table that is itself compressed
        expected = theirs.decompress(theirs.indices.val, made[0].materialized_val_inference(), None)
    else:
        expected = theirs.materialized_val_inference()
    assert np.array_equal(np.asarray(expected), ours.numpy())


def test_the_readers_agree_on_every_constant(tmp_path: Path) -> None:
    """Oracle: coremltools' own reader of the program and of the weight file."""
    path = built(tmp_path / "w.mlpackage", WEIGHTS_BY_FORM["int4 per group, with zero point"])
    with quiet():
        spec = ct.models.MLModel(str(path), skip_model_load=True).get_spec()
        program = load_milproto(spec, spec.specificationVersion, str(path / "Data/com.apple.CoreML/weights"))
    theirs = next(op for op in program.functions["main"].operations if op.op_type == "constexpr_blockwise_shift_scale")
    ours = next(op for op in Package(path).ops if op.kind == "constexpr_blockwise_shift_scale")
    for name in ("data", "scale", "offset"):
        stored = ours.inputs[name][0]
        assert isinstance(stored, Stored)
        assert np.array_equal(stored.value, theirs.inputs[name].val)


@given(st.sampled_from([1, 2, 3, 4, 6]), st.integers(1, 50), st.integers(0, 2**32 - 1))
def test_unpacked_bits_are_those_that_were_packed(bits: int, count: int, seed: int) -> None:
    values = np.random.default_rng(seed).integers(0, 2**bits, count).astype(np.uint8)
    stream = np.unpackbits(values[:, None], axis=1, count=bits, bitorder="little").reshape(-1)
    packed = np.packbits(stream, bitorder="little")
    assert np.array_equal(unpack_bits(packed, bits, count), values)
    signed = unpack_bits(packed, bits, count, signed=True).astype(int)
    assert np.array_equal(signed % 2**bits, values)
    assert signed.min() >= -(2 ** (bits - 1))
    assert signed.max() < 2 ** (bits - 1) or bits == 1


@pytest.mark.parametrize("shape", [(), (8,)])
def test_the_older_affine_form(shape: tuple[int, ...]) -> None:
    """Oracle: the decompressor of coremltools for iOS 16."""
    from coremltools.converters.mil.mil.ops.defs.iOS16.constexpr_ops import constexpr_affine_dequantize as theirs

    data, scale = codes(8, (8, 5), True), np.abs(floats(*shape)) if shape else np.float32(0.3)
    zero = codes(8, shape, True) if shape else np.int8(3)
    expected = theirs.decompress(data, zero, scale, 0)
    args = {"quantized_data": data, "zero_point": np.asarray(zero), "scale": np.asarray(scale)}
    given_tensors = {name: torch.from_numpy(np.array(value)) for name, value in args.items()}
    actual = CONSTEXPR["constexpr_affine_dequantize"](Args({**given_tensors, "axis": torch.tensor(0)}))
    assert np.array_equal(actual.numpy(), expected)


def test_sparse_codes_keep_their_zeros() -> None:
    keep = torch.from_numpy(MASK.astype(np.uint8))
    data = torch.randint(-8, 8, (int(keep.sum()),), dtype=torch.int8)
    scale = torch.rand(8, 3)
    args = Args(data_mask=keep, nonzero_data=data, scale=scale)
    out_mask, values = CONSTEXPR["constexpr_sparse_blockwise_shift_scale"](args)
    dense = CONSTEXPR["constexpr_sparse_to_dense"](Args(mask=out_mask, nonzero_data=values))
    expected = torch.zeros(8, 12)
    expected[keep.bool()] = data.float()
    assert torch.equal(dense, expected * scale.repeat_interleave(4, 1))


def test_a_flipped_byte_changes_the_weight(tmp_path: Path) -> None:
    """Control: the weights come from the file, not from anywhere else."""
    path = built(tmp_path / "w.mlpackage", WEIGHTS_BY_FORM["int8 per channel"])
    before = Program(path)({"x": torch.zeros(1, 1)})["dense"].clone()
    package = Package(path)
    op = next(op for op in package.ops if op.kind == "constexpr_blockwise_shift_scale")
    stored = op.inputs["data"][0]
    assert isinstance(stored, Stored)
    assert stored.offset is not None
    content = bytearray((path / WEIGHTS).read_bytes())
    start = int(np.frombuffer(bytes(content[stored.offset + 16 : stored.offset + 24]), np.uint64)[0])
    content[start] ^= 0x40
    (path / WEIGHTS).write_bytes(bytes(content))
    after = Program(path)({"x": torch.zeros(1, 1)})["dense"]
    assert (before != after).sum() == 1
