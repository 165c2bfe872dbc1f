"""Integer products on processors that add pairs of them in 16 bits: seen, told, and avoided by codes of 7 bits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from calibrate.grid import Grid
from calibrate.signature import Signature, TensorSpec
from compress.layers import QuantLinear
from export.graph import Traceable

pytest.importorskip("onnxruntime")

from export import saturation
from export.onnx_file import write
from export.onnx_runner import OnnxRunner
from export.saturation import at_risk, saturates, saturation_warning
from export.to_onnx import lower


def extreme(reduced: bool) -> QuantLinear:
    """Weights and inputs that all reach the ends of their grids, with one sign: the sums that a kernel can least hold."""
    grid = Grid(8, reduced=reduced)
    layer = QuantLinear((16, 64), grid, {"kind": "static", "bits": 8, "symmetric": True}, False)
    layer.quantized_weight.store(torch.full((16, 64), grid.high, dtype=torch.int8), torch.full((16, 1), 2.0**-7), None)
    layer.activation.scale = torch.tensor(2.0**-7)  # type: ignore[union-attr]
    return layer.eval()


def error(reduced: bool, folder: Path) -> float:
    """Largest error of the file in ONNX Runtime against eager arithmetic, relative to the output."""
    layer = extreme(reduced)
    x = torch.full((1, 4, 64), 127 * 2.0**-7)
    source = Traceable(layer, Signature((TensorSpec("x", torch.float32, ("batch", 4, 64)),)), {"x": x})
    write(lower(source), folder / "model.onnx")
    expected: Tensor = layer(x)
    return float(((OnnxRunner(folder / "model.onnx", 1)({"x": x}) - expected) / expected).abs().max())


def test_codes_of_seven_bits_are_exact_on_every_processor(tmp_path: Path) -> None:
    assert error(True, tmp_path) <= 2**-20


def test_the_probe_says_what_happens_to_a_file(tmp_path: Path) -> None:
    """Sums of 255 and 127 come out wrong exactly where the probe says that they saturate."""
    assert (error(False, tmp_path) > 1e-3) == saturates("onnxruntime")


def test_layers_at_risk_are_those_with_wide_codes_side_by_side() -> None:
    model = nn.ModuleDict({"wide": extreme(False), "narrow": extreme(True), "dense": nn.Linear(64, 4)})
    assert at_risk(model) == ["wide"]
    codes = torch.zeros(16, 64, dtype=torch.int8)
    codes[:, 0], codes[:, 1] = 127, -127  # of two signs: the sum is small
    model["wide"].quantized_weight.store(codes, torch.ones(16, 1), None)  # type: ignore[operator,union-attr]
    assert at_risk(model) == []
    codes[:, 1], codes[:, 2] = 1, 127  # 128 * 255 still fits 16 bits; 127 and 127 are not one pair
    model["wide"].quantized_weight.store(codes, torch.ones(16, 1), None)  # type: ignore[operator,union-attr]
    assert at_risk(model) == []


def test_a_report_warns_where_the_processor_saturates(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.ModuleDict({"wide": extreme(False)})
    monkeypatch.setattr(saturation, "saturates", lambda runtime: runtime == "openvino")
    assert saturation_warning(model, ["torch 2 CPU", "onnxruntime 1 CPU"]) is None
    said = saturation_warning(model, ["onnxruntime 1 CPU", "openvino 2026 CPU f32"])
    assert said is not None
    assert "in OpenVINO sums can saturate in 1 layer," in said
    assert saturation_warning(nn.ModuleDict({"narrow": extreme(True)}), ["openvino 2026 CPU f32"]) is None
