"""Whether the integer kernels of a runtime saturate on this processor, and which layers could notice.

x86 processors without VNNI multiply unsigned by signed bytes with VPMADDUBSW, which adds two products in a 16-bit number that
saturates (Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2). 255 * 127 * 2 does not fit.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["at_risk", "saturates", "saturation_warning"]

_INPUTS = 64


@cache
def saturates(runtime: Literal["onnxruntime", "openvino"]) -> bool:
    """Whether this processor's kernels in the runtime give a wrong product of unsigned bytes of 255 and signed ones of 127.

    Asked of the runtime itself with a matrix product whose sum is known. False where the runtime is not installed.
    """
    from export.onnx_runner import OnnxRunner, OpenVinoRunner

    try:
        with TemporaryDirectory() as folder:
            path = Path(folder) / "product.onnx"
            path.write_bytes(_product())
            runner = OnnxRunner(path, 1) if runtime == "onnxruntime" else OpenVinoRunner(path, 1, "f32")
            found = runner({"x": torch.full((4, _INPUTS), 255.0)})
            runner.close()
    except ImportError:
        return False
    expected = 255.0 * 127.0 * _INPUTS
    return bool((found - expected).abs().max() > 1e-3 * expected)


def _product() -> bytes:
    """Q/DQ and MatMul, which both runtimes turn into an integer product; the scales are 1."""
    from onnx import TensorProto, helper, numpy_helper

    def constant(name: str, value: Any) -> Any:
        return numpy_helper.from_array(np.asarray(value), name)

    constants = [
        constant("one", np.float32(1)),
        constant("zero", np.uint8(0)),
        constant("codes", np.full((_INPUTS, 16), 127, np.int8)),
        constant("scales", np.ones(16, np.float32)),
        constant("shifts", np.zeros(16, np.int8)),
    ]
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "one", "zero"], ["rounded"]),
        helper.make_node("DequantizeLinear", ["rounded", "one", "zero"], ["input"]),
        helper.make_node("DequantizeLinear", ["codes", "scales", "shifts"], ["weight"], axis=1),
        helper.make_node("MatMul", ["input", "weight"], ["y"]),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [4, _INPUTS])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [4, 16])
    graph = helper.make_graph(nodes, "product", [x], [y], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return bytes(model.SerializeToString())


def at_risk(model: nn.Module) -> list[str]:
    """Paths of the layers with 8-bit inputs whose weights have two codes side by side that can saturate."""
    return [path for path, layer in model.named_modules() if _wide(layer)]


def _wide(layer: nn.Module) -> bool:
    held: Any = getattr(layer, "quantized_weight", None)
    if held is None or getattr(layer, "activation", None) is None or getattr(getattr(held, "grid", None), "e4m3", False):
        return False
    if held.scale.shape[1] > 1:  # groups: each code is multiplied by a whole number, up to what int8 holds
        return not held.grid.reduced
    return bool(_widest(held.integers()) > 128)


def _widest(codes: Tensor) -> Tensor:
    """The largest sum of two codes of one sign side by side."""
    rows = codes.reshape(codes.shape[0], -1).int()
    rows = torch.nn.functional.pad(rows, (0, rows.shape[1] % 2)).reshape(len(rows), -1, 2)
    return torch.maximum(rows.clamp(min=0).sum(-1).amax(), (-rows).clamp(min=0).sum(-1).amax())


def saturation_warning(model: nn.Module, runtimes: Iterable[str]) -> str | None:
    """What a report says of figures taken in these runtimes ("onnxruntime 1.31.1 CPU") on a processor that saturates."""
    known: tuple[Literal["onnxruntime"], Literal["openvino"]] = ("onnxruntime", "openvino")
    here = [name for name in known if any(one.startswith(name) for one in runtimes) and saturates(name)]
    layers = at_risk(model) if here else []
    if not layers:
        return None
    told = " and ".join({"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}[name] for name in here)
    places = "1 layer" if len(layers) == 1 else f"{len(layers)} layers"
    return (
        f"this processor has no exact 8-bit products (x86 without VNNI): in {told} sums can saturate in {places}, and the "
        "figures hold for such processors only. quantize: {reduce_range: pairs} makes files that every processor computes alike."
    )
