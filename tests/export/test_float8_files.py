"""8-bit floating point in files for TensorRT: the numbers in the file, the engine, and the same Q/DQ in ONNX Runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from calibrate import float8, ops
from calibrate.grid import Grid
from calibrate.signature import Signature, TensorSpec
from compress.algorithms.rounding import codes_of, scales_of
from compress.layers.quantized import QuantConv2d, QuantLinear
from export.contract import Exporter
from export.graph import Traceable
from export.to_coreml import CoreMLExporter
from export.to_onnx import OnnxExporter, lower
from export.to_tensorrt import TensorRTExporter

pytest.importorskip("onnxruntime", reason="needs the extra onnx")

import onnxruntime

from export.onnx_file import contents, write

SIGNATURE = Signature((TensorSpec("x", torch.float32, ("batch", 4, 8, 8)),))
STATIC: dict[str, Any] = {"kind": "static", "e4m3": True}


class Mixed(nn.Module):
    """A convolution and two layers, with a norm between them."""

    def __init__(self, granularity: str = "channel") -> None:
        super().__init__()
        torch.manual_seed(0)
        grid = Grid(8, True, granularity, e4m3=True)  # type: ignore[arg-type]
        self.conv = QuantConv2d((16, 4, 2, 2), grid, STATIC, True, (2, 2))
        self.up, self.down = QuantLinear((64, 16), grid, STATIC, True), QuantLinear((16, 64), grid, STATIC, True)
        self.norm = nn.LayerNorm(16)
        for layer, largest in ((self.conv, 4.0), (self.up, 4.0), (self.down, 3.0)):
            held = layer.quantized_weight
            weight = torch.randn(held.shape) / held.shape[1] ** 0.5
            scale, _ = scales_of(weight, grid, "minmax")
            held.store(codes_of(weight, grid, scale, None), scale, None)
            layer.activation.scale.fill_(largest / 448)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x).flatten(2).transpose(1, 2))
        return (y + self.down(torch.relu(self.up(y)))).mean(1)


def traced(granularity: str = "channel") -> Traceable:
    generator = torch.Generator().manual_seed(1)
    return Traceable(Mixed(granularity).eval(), SIGNATURE, {"x": torch.randn(3, 4, 8, 8, generator=generator)}, "mixed")


def sqnr(reference: Tensor, other: Tensor) -> float:
    noise = float((reference.double() - other.double()).square().sum())
    return float(10 * torch.log10(reference.double().square().sum() / max(noise, 1e-200)))


def test_onnx_runtime_rounds_and_cuts_off_as_torch_does(tmp_path: Path) -> None:
    """Every number and its neighbours halfway, what is beyond the largest, and all sizes between: bit for bit."""

    class Rounds(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            made: Tensor = ops.quantize_dequantize_e4m3(x, torch.tensor(0.25))
            return made

    numbers = float8.values(torch.arange(127, dtype=torch.int8))
    halves = (numbers[1:] + numbers[:-1]) / 2
    given = torch.cat([numbers, halves, halves * (1 + 2**-20), torch.tensor([464.0, 465.0, 1e9]), 30 * torch.randn(4000)])
    x = {"x": torch.cat([given, -given]).reshape(1, -1) / 4}
    signature = Signature((TensorSpec("x", torch.float32, ("batch", x["x"].shape[1])),))
    path = tmp_path / "rounds.onnx"
    write(lower(Traceable(Rounds(), signature, x, "rounds"), "onnxruntime"), path)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    assert np.array_equal(session.run(None, {"x": x["x"].numpy()})[0], Rounds()(x["x"]).numpy())


@pytest.mark.parametrize("granularity", ["channel", "tensor"])
def test_the_same_numbers_are_in_the_file_and_the_engine_and_the_proxy_agrees(granularity: str, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="needs the extra tensorrt-rtx")
    source, exporter = traced(granularity), TensorRTExporter(compute_capabilities=("8.9", "12.0"), precision="float32")
    assert exporter.refuses(source.model) == []
    path = tmp_path / exporter.filename
    told, artifact = exporter.forecast(source), exporter.write(source, path)
    found = exporter.contents(path)
    numbers = 0
    for site in ("conv", "up", "down"):
        codes = source.model.get_submodule(site).quantized_weight.integers().numpy()
        assert np.array_equal(found.codes[site], codes)
        numbers += codes.size
    assert found.float_layers == ()
    assert found.bytes_by_dtype["float8_e4m3"] >= numbers
    assert artifact.details["codes_in_engine"]["not_found"] == []
    assert abs(told.size_bytes - artifact.size_bytes) < 0.6 * artifact.size_bytes
    stored = contents(path.with_name("model.qdq.onnx")).bytes_by_dtype["float8_e4m3"]
    assert numbers <= stored <= numbers + 8
    with torch.no_grad():
        wanted = SIGNATURE.call(source.model, source.example)
    # sums in another order move a value over the edge between two numbers now and then: one step is 2**-4 of it
    assert sqnr(wanted, exporter.open(path, 1)(source.example)) > 45


def test_control_another_number_in_the_file_is_seen(tmp_path: Path) -> None:
    source = traced()
    write(lower(source, "tensorrt", float16=False), tmp_path / "m.onnx")
    codes = contents(tmp_path / "m.onnx").codes["up"]
    held = source.model.up.quantized_weight  # type: ignore[union-attr]
    assert np.array_equal(codes, held.integers().numpy())  # type: ignore[operator]
    held.codes[5] ^= 1  # type: ignore[index, operator]
    assert not np.array_equal(codes, held.integers().numpy())  # type: ignore[operator]


@pytest.mark.parametrize(
    ("exporter", "says"),
    [
        (OnnxExporter(openvino=False), "weights: 8 is as small and faster"),
        (CoreMLExporter(), "Core ML has no FP8"),
        (TensorRTExporter(compute_capabilities=("8.6", "8.9")), "8.6 have no FP8"),
    ],
    ids=["onnx", "coreml", "older GPUs"],
)
def test_who_has_no_products_of_them_refuses(exporter: Exporter, says: str) -> None:
    refused = dict(exporter.refuses(Mixed()))
    assert refused.keys() == {"conv", "up", "down"}
    assert all(says in reason for reason in refused.values())
