"""Planes of bits in every file: the bits, the bytes, the numbers, the kernels."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sweeps import swept
from test_onnx_carried import made
from torch import Tensor, nn

from calibrate.bits import unpack_signs
from calibrate.fidelity import sqnr_db
from calibrate.signature import Batch, Signature, TensorSpec
from compress.algorithms.binarizing import binarized
from compress.layers import BinaryConv2d, BinaryLinear
from export.graph import Traceable

pytest.importorskip("onnxruntime")

from export.onnx_file import read
from export.onnx_runner import OnnxRunner, executed_ops
from export.to_onnx import OnnxExporter, open_openvino

FORMS: dict[str, dict[str, Any]] = {
    "one": {},
    "one with its mean": {"shift": True},
    "one in groups": {"group_size": 8},
    "two": {"bases": 2},
    "three": {"bases": 3},
    "two in groups with the mean": {"bases": 2, "group_size": 8, "shift": True},
}
each_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
each_kind = pytest.mark.parametrize(
    ("kind", "form"),
    swept(
        [(kind, form) for kind in ("text", "pixels") for form in FORMS.values()],
        [*(("text", FORMS[name]) for name in FORMS), ("pixels", FORMS["one in groups"]), ("pixels", FORMS["two"])],
    ),
)


def layer_of(module: nn.Linear | nn.Conv2d, form: dict[str, Any], activation: dict[str, Any] | None = None) -> Any:
    weight = module.weight.detach()
    size = form.get("group_size")
    whole = size and (module.weight.dim() == 2 or weight[0, 0].numel() in (1, size // 2))  # a group is a box of a kernel
    own = {**form, "group_size": size if whole else None}
    config = {"shape": list(weight.shape), "bases": 1, "shift": False} | own
    layer: Any
    if isinstance(module, nn.Conv2d):
        geometry = {name: getattr(module, name) for name in ("stride", "padding", "dilation", "groups")}
        layer = BinaryConv2d(config, activation, module.bias is not None, geometry)
    else:
        layer = BinaryLinear(config, activation, module.bias is not None)
    bits = binarized(weight.flatten(1), **own)
    layer.quantized_weight.store(bits.planes.reshape(-1, *weight.shape), bits.multiples, bits.shift, bits.scale)
    if module.bias is not None:
        layer.bias.data = module.bias.detach()
    if activation is not None:
        layer.activation.scale.fill_(0.05 if activation["kind"] == "static" else 0.7)
    return layer.eval()


def binary(kind: str, form: dict[str, Any], activation: str | None = "static") -> tuple[nn.Module, Signature, Batch]:
    """A small encoder, or convolutions, with every projection in bits."""
    model, signature, batch = made(kind)
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear | nn.Conv2d):
            given: dict[str, Any] | None = None if activation is None else {"kind": "static", "bits": 8, "symmetric": True}
            if activation == "binary" and isinstance(module, nn.Linear):
                given = {"kind": "binary", "channels": module.in_features, "nonnegative": path == "down"}
            setattr(model, path, layer_of(module, form, given))
    return model.eval(), signature, batch


def wanted_codes(model: nn.Module) -> dict[str, np.ndarray[Any, Any]]:
    held = {path: module for path, module in model.named_modules() if isinstance(module, BinaryLinear | BinaryConv2d)}
    return {path: module.quantized_weight.integers().numpy() for path, module in held.items()}


def same_codes(found: Any, model: nn.Module) -> None:
    wanted = wanted_codes(model)
    assert set(found) == set(wanted)
    for path, codes in wanted.items():
        assert np.array_equal(found[path], codes), path


def outputs(model: nn.Module, signature: Signature, batch: Batch) -> Tensor:
    with torch.no_grad():
        return signature.call(model, batch)


@each_kind
def test_onnx_holds_the_bits_and_both_runtimes_give_the_same(kind: str, form: dict[str, Any], tmp_path: Path) -> None:
    model, signature, batch = binary(kind, form)
    exporter = OnnxExporter()
    path = exporter.write(Traceable(model, signature, batch), tmp_path / "model.onnx").path
    same_codes(exporter.contents(path).codes, model)
    wanted = outputs(model, signature, batch)
    runner = OnnxRunner(path, 1)
    assert sqnr_db(wanted, runner(batch)) > 60
    pytest.importorskip("openvino")
    assert sqnr_db(wanted, open_openvino(path, 1)(batch)) > 60


def test_the_bytes_in_the_file_are_those_of_the_model(tmp_path: Path) -> None:
    model, signature, batch = binary("text", {"bases": 2})
    path = OnnxExporter().write(Traceable(model, signature, batch), tmp_path / "model.onnx").path
    held = {name: value.const_value for name, value in read(path).graph.initializers.items()}
    codes = held["query.codes"].numpy()
    assert codes.dtype == np.uint8
    assert codes.reshape(-1).tolist() == model.query.quantized_weight.codes.tolist()  # type: ignore[union-attr]
    planes = unpack_signs(torch.from_numpy(codes.copy()).reshape(-1), (32, 32))
    assert planes.shape == (2, 32, 32)


def test_another_bit_in_the_file_is_seen(tmp_path: Path) -> None:
    """A control: the comparison of codes can fail."""
    model, signature, batch = binary("text", {})
    exporter = OnnxExporter()
    path = exporter.write(Traceable(model, signature, batch), tmp_path / "model.onnx").path
    codes = model.query.quantized_weight.codes  # type: ignore[union-attr]
    content = path.read_bytes()
    place = content.index(codes.numpy().tobytes())
    path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    found = exporter.contents(path).codes["query"]
    assert (found != wanted_codes(model)["query"]).sum() == 1


@each_form
def test_integer_kernels_run_and_unpacking_is_folded_at_load(form: dict[str, Any], tmp_path: Path) -> None:
    model, signature, batch = binary("text", form)
    path = OnnxExporter().write(Traceable(model, signature, batch), tmp_path / "model.onnx").path
    ran = executed_ops(path)
    assert ran.get("com.microsoft::MatMulIntegerToFloat", 0) == 6
    assert not {"Div", "Mod", "Slice", "ReduceSum"} & set(ran)


def test_float_inputs_are_exact_in_float(tmp_path: Path) -> None:
    model, signature, batch = binary("text", {"bases": 2}, activation=None)
    artifact = OnnxExporter().write(Traceable(model, signature, batch), tmp_path / "model.onnx")
    assert any("One-bit weights with float inputs" in note for note in artifact.details["notes"])
    ran = executed_ops(artifact.path)
    assert "com.microsoft::MatMulNBits" not in ran
    assert sqnr_db(outputs(model, signature, batch), OnnxRunner(artifact.path, 1)(batch)) > 100


def test_inputs_of_one_bit_run_on_integer_kernels(tmp_path: Path) -> None:
    model, signature, batch = binary("text", {}, activation="binary")
    path = OnnxExporter().write(Traceable(model, signature, batch), tmp_path / "model.onnx").path
    assert executed_ops(path).get("com.microsoft::MatMulIntegerToFloat", 0) == 6
    assert sqnr_db(outputs(model, signature, batch), OnnxRunner(path, 1)(batch)) > 60


def test_a_linear_layer_of_1024_takes_an_eighth_of_a_byte_a_weight(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layer = layer_of(nn.Linear(1024, 1024), {}, {"kind": "static", "bits": 8, "symmetric": True})
    signature = Signature((TensorSpec("x", torch.float32, ("batch", 1024)),))
    source = Traceable(layer, signature, {"x": torch.randn(4, 1024)})
    artifact = OnnxExporter().write(source, tmp_path / "model.onnx")
    assert artifact.size_bytes <= 140_000
    forecast = OnnxExporter().forecast(source)
    assert abs(forecast.size_bytes - artifact.size_bytes) <= 64


@pytest.mark.parametrize(
    ("form", "precision"),
    swept(
        itertools.product(FORMS.values(), ["float32", "float16"]),
        [(FORMS["one"], "float32"), (FORMS["two in groups with the mean"], "float32"), (FORMS["three"], "float16")],
    ),
    ids=str,
)
def test_core_ml_holds_the_bits(form: dict[str, Any], precision: Any, tmp_path: Path) -> None:
    pytest.importorskip("coremltools")
    from export.to_coreml import CoreMLExporter

    model, signature, batch = binary("pixels", form)
    exporter = CoreMLExporter(precision=precision)
    source = Traceable(model, signature, {name: tensor[:1] for name, tensor in batch.items()})
    artifact = exporter.write(source, tmp_path / "m.mlpackage")
    contents = exporter.contents(artifact.path)
    same_codes(contents.codes, model)
    assert f"uint{form.get('bases', 1)}" in contents.bytes_by_dtype
    row = {name: tensor[:1] for name, tensor in batch.items()}
    level = sqnr_db(outputs(model, signature, row), exporter.open(artifact.path, 1)(row))
    assert level > (100 if precision == "float32" else 50), "float16 has eleven bits: 66 dB"


def test_core_ml_before_ios18_refuses_bits_by_name() -> None:
    pytest.importorskip("coremltools")
    from export.to_coreml import CoreMLExporter

    model, _, _ = binary("pixels", {})
    refused = CoreMLExporter(target="iOS17").refuses(model)
    assert {path for path, _ in refused} >= {"head", "conv"}
    assert all("iOS18" in reason for _, reason in refused)


@each_form
def test_the_file_for_tensorrt_has_four_bits_or_eight(form: dict[str, Any]) -> None:
    from export.onnx_file import contents, write
    from export.tensorrt_lowering import explicit
    from export.to_onnx import lower

    model, signature, batch = binary("text", form)
    source = Traceable(model, signature, batch)
    with explicit():
        graph = lower(source, "tensorrt", (), 1, 21)
    kinds = {value.const_value.dtype.name for name, value in graph.graph.initializers.items() if name.endswith(".codes")}
    wide = "group_size" in form or "shift" in form
    assert ("INT8" if wide else "INT4") in kinds
    assert not wide or "INT4" not in kinds
    del graph
    import tempfile

    with explicit(), tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.qdq.onnx"
        write(lower(source, "tensorrt", (), 1, 21), path)
        same_codes({site: codes for site, codes in contents(path).codes.items() if site in wanted_codes(model)}, model)


def test_one_bit_products_of_attention_are_carried_exactly(tmp_path: Path) -> None:
    from compress.layers import BinaryProducts

    model, signature, batch = made("text")
    layer = BinaryProducts(4, 8, 8)
    generator = torch.Generator().manual_seed(2)
    for parameter in layer.parameters():
        parameter.data.copy_(0.3 * torch.rand(parameter.shape, generator=generator))

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
            given: Tensor = self.inner(ids, mask)
            return given

    whole = Wrapped().eval()
    layer.attach(whole, "inner")
    wanted = outputs(whole, signature, batch)
    assert sqnr_db(outputs(made("text")[0], signature, batch), wanted) < 30, "a control: they change the outputs"
    path = OnnxExporter().write(Traceable(whole, signature, batch), tmp_path / "model.onnx").path
    assert sqnr_db(wanted, OnnxRunner(path, 1)(batch)) > 60
    pytest.importorskip("coremltools")
    from export.to_coreml import CoreMLExporter

    exporter = CoreMLExporter(precision="float32")
    row = {name: tensor[:1] for name, tensor in batch.items()}
    package = exporter.write(Traceable(whole, signature, row), tmp_path / "m.mlpackage").path
    assert sqnr_db(outputs(whole, signature, row), exporter.open(package, 1)(row)) > 60
