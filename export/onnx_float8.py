"""Lowerings of 8-bit floating point: Q/DQ of E4M3 numbers, the form that TensorRT makes FP8 products of.

ONNX Runtime computes the same Q/DQ on a CPU, number for number what ``calibrate.float8`` gives, and multiplies in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from export.onnx_lowering import Lowering, lowers
from export.onnx_values import Held
from export.tensorrt_lowering import scaled

__all__: list[str] = []

_TYPE = "FLOAT8E4M3FN"


def _numbers(bits: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Bits (int8) as the type by which onnx-ir knows the numbers."""
    import ml_dtypes

    return bits.view(ml_dtypes.float8_e4m3fn)


@lowers("compress::dequantize_e4m3")
def _dequantize(b: Lowering, codes: Held, scale: Held, shape: Sequence[int]) -> Held:
    """DequantizeLinear of the numbers in the weight's own shape."""
    numbers = codes.const
    assert numbers is not None
    path = codes.name.removesuffix(".codes").removesuffix(".quantized_weight")
    key = (numbers.data_ptr(), "e4m3")
    if key not in b.shared:
        b.shared[key] = b.packed(lambda: _numbers(numbers.reshape(tuple(shape)).numpy()), _TYPE, tuple(shape), f"{path}.codes")
    entry = {"initializer": b.of(b.shared[key]).name, "bits": 8, "shape": list(shape), "order": "OI", "storage": "e4m3"}
    b.codes.setdefault(path, entry)
    return scaled(b, path, b.shared[key], scale, shape)


@lowers("compress::quantize_dequantize_e4m3")
def _quantize_dequantize(b: Lowering, x: Held, scale: Held) -> Held:
    """Q/DQ; the zero point only says the type. What is beyond the largest number becomes it (``saturate`` of ONNX)."""
    assert scale.const is not None
    step = b.constant(scale.const.reshape(()).float(), name=scale.name)
    if "e4m3 zero" not in b.shared:
        b.shared["e4m3 zero"] = b.packed(lambda: _numbers(np.zeros((), np.int8)), _TYPE, (), "e4m3/zero")
    codes = b.op("QuantizeLinear", x, step, b.shared["e4m3 zero"], shape=x.shape, dtype=torch.float8_e4m3fn)
    return b.op("DequantizeLinear", codes, step, shape=x.shape, dtype=b.compute)
