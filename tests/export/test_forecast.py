"""What exporters tell of a file before it is written, against the file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from calibrate.grid import Grid
from calibrate.signature import Signature, TensorSpec
from compress.layers import QuantConv2d, QuantEmbedding, QuantLinear
from compress.layers.quantized import _Quantized
from compress.sources import load_model
from export.graph import Traceable, weight_only
from export.memory import resident_bytes

pytest.importorskip("onnxruntime", reason="needs the extra onnx")

from export.onnx_file import write, written_bytes
from export.to_onnx import OnnxExporter, lower

SIGNATURE = Signature((TensorSpec("x", torch.float32, ("batch", 3, 8, 8)),))


def filled(layer: _Quantized, seed: int) -> _Quantized:
    """The layer with codes and scales of its own."""
    weight = layer.quantized_weight
    bound = 2 ** (weight.grid.bits - 1) - 1
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-bound, bound + 1, weight.shape, dtype=torch.int8, generator=generator)
    weight.store(codes, torch.rand(weight.scale.shape, generator=generator) / 100 + 0.01, None)
    if layer.activation is not None:
        layer.activation.scale.fill_(0.05 + seed / 100)
    return layer


class Convolutions(nn.Module):
    """Three convolutions with something between them; the last one has no grid for its input."""

    def __init__(self, between: nn.Module) -> None:
        super().__init__()
        grid, static = Grid(8, True, "channel"), {"kind": "static"}
        self.first = filled(QuantConv2d((8, 3, 3, 3), grid, static, True), 1)
        self.second = filled(QuantConv2d((8, 8, 3, 3), grid, static, True), 2)
        self.third = filled(QuantConv2d((4, 8, 3, 3), grid, None, True), 3)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        return self.third(self.second(self.between(self.first(x)))).flatten(1)


class Encoder(nn.Module):
    """A table and products of it, stored in the given way, and one in floating point."""

    def __init__(self, grid: Grid, static: bool, vocabulary: int = 300, width: int = 128) -> None:
        super().__init__()
        activation = {"kind": "static"} if static else None
        self.table = filled(QuantEmbedding((vocabulary, width), Grid(8, True, "channel")), 1)
        self.up = filled(QuantLinear((4 * width, width), grid, activation, True), 2)
        self.down = filled(QuantLinear((width, 4 * width), grid, activation, True), 3)
        self.head = nn.Linear(width, 7)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        return self.head((x + self.down(nn.functional.gelu(self.up(x)))).mean(1))


def encoder(grid: Grid, static: bool) -> Traceable:
    signature = Signature((TensorSpec("ids", torch.int64, ("batch", 16)),))
    return Traceable(Encoder(grid, static).eval(), signature, {"ids": torch.arange(64).reshape(4, 16)}, "encoder")


W8A8, W4 = (Grid(8, True, "channel"), True), (Grid(4, True, "group", 32), False)
W3 = (Grid(3, True, "group", 32), False)
each_kind = pytest.mark.parametrize("kind", [W8A8, W4, W3], ids=["w8a8", "w4", "w3"])


@each_kind
@pytest.mark.parametrize("options", [{}, {"dialect": "portable"}, {"dynamic": (), "batch": 3}], ids=str)
def test_an_onnx_file_has_the_bytes_foretold(kind: tuple[Grid, bool], options: dict[str, object], tmp_path: Path) -> None:
    exporter, source = OnnxExporter(openvino=False, **options), encoder(*kind)
    told = exporter.forecast(source)
    assert told.size_bytes == exporter.write(source, tmp_path / "model.onnx").size_bytes


def test_so_has_one_with_its_weights_in_a_second_file(tmp_path: Path) -> None:
    model = lower(encoder(*W8A8))
    limit = 10_000
    told = written_bytes(model, "model.onnx", limit)
    files = write(model, tmp_path / "model.onnx", limit)
    assert len(files) == 2
    assert told == sum(file.stat().st_size for file in files)
    assert told > written_bytes(model, "model.onnx")


@pytest.mark.parametrize("between", [nn.ReLU(), nn.GELU(), nn.Identity()], ids=["relu", "gelu", "nothing"])
def test_layers_that_onnx_runtime_computes_in_float_are_foretold(between: nn.Module, tmp_path: Path) -> None:
    exporter = OnnxExporter(openvino=False)
    source = Traceable(Convolutions(between).eval(), SIGNATURE, {"x": torch.randn(4, 3, 8, 8)}, "convolutions")
    told = exporter.forecast(source)
    exporter.write(source, tmp_path / "model.onnx")
    assert sorted(told.float_sites) == exporter.kept_float(tmp_path / "model.onnx")
    assert "third" in told.float_sites
    assert ("first" in told.float_sites) is not isinstance(between, nn.Identity)


@each_kind
def test_matrix_products_run_on_integers_as_foretold(kind: tuple[Grid, bool], tmp_path: Path) -> None:
    exporter, source = OnnxExporter(openvino=False), encoder(*kind)
    exporter.write(source, tmp_path / "model.onnx")
    assert list(exporter.forecast(source).float_sites) == exporter.kept_float(tmp_path / "model.onnx") == []


def test_weight_only_layers_are_those_that_multiply() -> None:
    assert weight_only(encoder(*W4).model) == ["up", "down"]
    assert weight_only(encoder(*W8A8).model) == []


@each_kind
def test_a_core_ml_package_is_foretold_within_3_percent(kind: tuple[Grid, bool], tmp_path: Path) -> None:
    pytest.importorskip("coremltools", reason="needs the extra coreml")
    from export.coreml_forecast import weight_bytes
    from export.coreml_ops import decomposed
    from export.to_coreml import CoreMLExporter

    exporter, source = CoreMLExporter(), encoder(*kind)
    told = exporter.forecast(source)
    made = exporter.write(source, tmp_path / "model.mlpackage")
    assert told.size_bytes == pytest.approx(made.size_bytes, rel=0.03)
    weights = tmp_path / "model.mlpackage" / "Data" / "com.apple.CoreML" / "weights" / "weight.bin"
    assert weight_bytes(decomposed(source.program()), half=True) == pytest.approx(weights.stat().st_size, rel=0.002)
    assert list(told.float_sites) == ([] if kind is W8A8 else ["up", "down"])


def test_an_engine_is_foretold_within_10_percent(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="needs the extra tensorrt-rtx")
    from compress.anatomy import find
    from compress.passes import PASSES
    from compress.surgery import Surgery
    from export.to_tensorrt import TensorRTExporter

    digits = load_model("embedded:digits-vit", base=Path())
    example = digits.example()
    quantize = next(step for step in PASSES if step.name == "quantize")()
    quantize.rehearse(digits.model, find(digits.model, digits.signature, example), Surgery())
    exporter, source = TensorRTExporter(), Traceable(digits.model, digits.signature, example, "digits")
    told = exporter.forecast(source)
    made = exporter.write(source, tmp_path / "model.engine")
    assert told.size_bytes == pytest.approx(made.size_bytes, rel=0.1)
    assert told.beside_bytes == (tmp_path / "model.qdq.onnx").stat().st_size
    assert resident_bytes() + told.peak_bytes == pytest.approx(made.details["peak_memory_bytes"], rel=0.15)
