"""The reader of plans: codes are found in any of the orders, and never where they are not."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from export.engine_listing import builder_of, holds, read_listing

_LISTING = b"""junk\x00\x01header {
  version = 5
  accelerators={sm86 sm120 }
}
descriptors {
  tensor={ alignment=128 dims={ 2 } name="plain" offset=0 rank0=0 region="r" strides={ 1 } type=half }
  tensor={ alignment=128 const_payload_size=8192 dims={ 64 128 } name="w" offset=1 strides={ 128 1 } type=int8 }
  tensor={ alignment=128 const_payload_size=512 dims={ 16 64 } name="{F[a...b]}" offset=1 strides={ 64 1 } type=int4 }
  tensor={ alignment=128 const_payload_size=256 dims={ 128 } name="s" offset=2 strides={ 1 } type=half }
}
main {
 label bb1:
  shape_call={ name="s_0" stream=0  layers="" subg_id=0 }
  function={ name=__myl_MulRoun fqn=__myl_MulRoun_0x1 layers="[ONNX Layer: a]\x1e[ONNX Layer: b]" swap_ab=false }
  fully_connected={ name="m" output={"y"} layers="[ONNX Layer: m]" }
  runtime_fusion={ name=__myl_CastFc binary=0 layers="[ONNX Layer: w]\x1e[ONNX Layer: n]" backbone=gemm }
  corrltn={ name="c" output={"y"} layers="[ONNX Layer: c]" }
}
shape_main {
 label bb2:
  mul={ name="__mye1" output={"z"} layers="" }
}
\x00\x01header {
  accelerators={*}
  region = { name=runtime-fusion-consts size=132 }
}
main {
 label bb1:
  mul={ name="int4_block_dq" layers="" }
  fully_connected={ name="n" layers="[ONNX Layer: n]" }
}
\x00tail"""


def test_a_listing_is_counted() -> None:
    listing = read_listing(_LISTING)
    assert listing is not None
    assert listing.kernels == 4
    assert (listing.fully_connected, listing.convolutions) == (2, 1)
    assert listing.constant_bytes == {"int8": 8192, "int4": 512, "float16": 256}
    assert listing.fused == (("a", "b"), ("w", "n"))
    assert listing.targets == ("sm86", "sm120")


_EMPTY = [b"", bytes(100), b"header {\n", b"header {\n}\nmain {", b"main {\n  function={ name=a"]


@pytest.mark.parametrize("plan", _EMPTY)
def test_a_plan_without_a_listing_is_said_to_have_none(plan: bytes) -> None:
    assert read_listing(plan) is None


def test_the_builder_is_read_from_the_first_bytes() -> None:
    assert builder_of(b"vtrt" + bytes(20) + bytes([1, 7, 1, 116]) + b"more") == ("tensorrt-rtx", "1.7.1.116")
    assert builder_of(b"ftrt" + bytes(28)) == ("tensorrt", "")


_CODES = st.tuples(st.integers(2, 9), st.integers(6, 12), st.integers(0, 2**31)).map(
    lambda t: np.random.default_rng(t[2]).integers(-128, 128, t[:2]).astype(np.int8)
)


@settings(max_examples=60, deadline=None)
@given(_CODES, st.integers(0, 40), st.booleans(), st.binary(min_size=0, max_size=50))
def test_codes_are_found_as_they_are_transposed_and_row_by_row(
    codes: np.ndarray, gap: int, transposed: bool, before: bytes
) -> None:
    written = np.ascontiguousarray(codes.T if transposed else codes)
    filler = np.random.default_rng(1).integers(0, 255, (len(written), gap)).astype(np.uint8)
    plan = before + np.hstack([written.view(np.uint8), filler]).tobytes() + b"after"
    assert holds(plan, codes, 8)


@settings(max_examples=60, deadline=None)
@given(_CODES, st.integers(0, 40), st.data())
def test_control_one_other_code_is_not_found(codes: np.ndarray, gap: int, data: st.DataObject) -> None:
    filler = np.random.default_rng(1).integers(0, 255, (len(codes), gap)).astype(np.uint8)
    plan = np.hstack([codes.view(np.uint8), filler]).tobytes()
    row = data.draw(st.integers(0, codes.shape[0] - 1))
    column = data.draw(st.integers(0, codes.shape[1] - 1))
    other = codes.copy()
    other[row, column] ^= 1
    assert not holds(plan, other, 8)


@pytest.mark.parametrize("transposed", [False, True])
def test_four_bit_codes_lie_two_in_a_byte_the_first_one_low(transposed: bool) -> None:
    codes = np.random.default_rng(0).integers(-8, 8, (6, 8)).astype(np.int8)
    flat = (codes.T if transposed else codes).reshape(-1).view(np.uint8) & 15
    plan = b"x" + (flat[::2] | flat[1::2] << 4).tobytes()
    assert holds(plan, codes, 4)
    assert not holds(plan, codes, 8)
    assert not holds(b"x" + (flat[1::2] | flat[::2] << 4).tobytes(), codes, 4)


def test_four_bit_rows_of_odd_width_are_found_whole() -> None:
    codes = np.random.default_rng(0).integers(-8, 8, (4, 1, 3, 3)).astype(np.int8)
    flat = codes.reshape(-1).view(np.uint8) & 15
    assert holds(b"x" + (flat[::2] | flat[1::2] << 4).tobytes(), codes, 4)
    assert not holds(b"x" + (flat[::2] | flat[1::2] << 4)[:-1].tobytes(), codes, 4)


def test_convolution_weights_are_found_with_channels_last_and_padded() -> None:
    codes = np.random.default_rng(0).integers(-128, 128, (8, 3, 2, 2)).astype(np.int8)
    last = codes.transpose(0, 2, 3, 1)
    assert holds(b"x" + last.tobytes(), codes, 8)
    assert holds(np.pad(last, [(0, 0)] * 3 + [(0, 1)]).tobytes(), codes, 8)
    assert not holds(codes.transpose(3, 0, 1, 2).tobytes(), codes, 8)
