"""Carried codes: the same integers in the file as in the model, in storage of the promised width, and the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from coreml_models import mixed, quantized, sqnr, trace
from sweeps import swept
from torch import nn

pytest.importorskip("coremltools", reason="Core ML needs coremltools")

from calibrate.errors import UserError
from calibrate.grid import Grid
from calibrate.signature import Signature, TensorSpec
from export.coreml_forecast import weight_bytes
from export.coreml_weights import block_counts, refusal
from export.graph import Traceable
from export.mil import Program
from export.mil_package import WEIGHTS, Package, Stored
from export.to_coreml import CoreMLExporter

ALL = (nn.Linear, nn.Conv2d, nn.Embedding)
GRIDS = {
    "8 per channel": Grid(8),
    "8 per channel, asymmetric": Grid(8, symmetric=False),
    "8 per tensor": Grid(8, granularity="tensor"),
    "4 per group": Grid(4, granularity="group", group_size=4),
    "4 per group, asymmetric": Grid(4, symmetric=False, granularity="group", group_size=4),
    "4 per channel, asymmetric": Grid(4, symmetric=False),
    "3 per tensor": Grid(3, granularity="tensor"),
    "2 per channel": Grid(2),
    "2 per group, asymmetric": Grid(2, symmetric=False, granularity="group", group_size=4),
    "2 per tensor": Grid(2, granularity="tensor"),
}
ON_IOS16 = {
    "8 per channel": Grid(8),
    "8 per tensor, asymmetric": Grid(8, symmetric=False, granularity="tensor"),
    "8 per channel, asymmetric": Grid(8, symmetric=False),
    "4 per tensor": Grid(4, symmetric=False, granularity="tensor"),
    "2 per tensor": Grid(2, granularity="tensor"),
}
CASES = [("iOS18", name, grid) for name, grid in GRIDS.items()] + [("iOS16", name, grid) for name, grid in ON_IOS16.items()]
OFTEN = {
    ("iOS18", "8 per channel, asymmetric"), ("iOS18", "8 per tensor"), ("iOS18", "4 per group"),
    ("iOS18", "3 per tensor"), ("iOS18", "2 per group, asymmetric"), ("iOS16", "8 per channel"), ("iOS16", "4 per tensor"),
}  # fmt: skip
STORED = {8: "int8", 4: "int4", 3: "uint3", 2: "uint2"}


def sites(model: nn.Module) -> dict[str, Any]:
    return {path: module for path, module in model.named_modules() if hasattr(module, "quantized_weight")}


@pytest.mark.parametrize(
    ("target", "name", "grid"),
    swept(CASES, [case for case in CASES if case[:2] in OFTEN]),
    ids=[f"{target} {name}" for target, name, _ in CASES],
)
def test_codes_and_weights_are_those_of_the_model(target: Any, name: str, grid: Grid, tmp_path: Path) -> None:
    model, signature, example = mixed()
    quantized(model, grid, kinds=ALL)
    exporter = CoreMLExporter(target=target, precision="float32")
    path = exporter.write(trace(model, signature, example), tmp_path / "m.mlpackage").path
    contents = exporter.contents(path)
    layers = sites(model)
    assert set(contents.codes) == set(layers)
    for site, layer in layers.items():
        assert contents.codes[site].dtype == np.int8
        assert np.array_equal(contents.codes[site], layer.quantized_weight.integers().numpy()), site
    assert contents.float_layers == ()
    count = sum(layer.quantized_weight.integers().numel() for layer in layers.values())
    width = STORED[grid.bits] if target == "iOS18" else ("int8" if grid.bits == 8 else "uint8")
    held = contents.bytes_by_dtype[width]
    assert held >= count * grid.bits // 8
    assert held <= count * grid.bits // 8 * 1.3 + 64 * len(layers)  # zero points, and what fills the last byte
    assert sqnr(*_outputs(model, signature, example, exporter, path)) >= 110
    assert _dense_are_equal(path, layers)


def _outputs(model: nn.Module, signature: Any, example: Any, exporter: CoreMLExporter, path: Path) -> Any:
    row = {key: value[:1] for key, value in example.items()}
    with torch.no_grad():
        return signature.call(model, row), exporter.open(path, 1)(row)


def _dense_are_equal(path: Path, layers: dict[str, Any]) -> bool:
    """Each dense weight that the operations of the package make, against the layer's own, bit for bit (float32)."""
    made = []
    program = Program(path)
    for step in program._steps:
        for name in ("weight", "x"):
            value = step.constants.get(name)
            if value is not None and value.dim() >= 2:
                made.append(value)
    wanted = [layer.weight for layer in layers.values()]
    return all(any(torch.equal(weight, other) for other in made if other.shape == weight.shape) for weight in wanted)


@pytest.mark.parametrize("symmetric", [True, False])
def test_static_activations_are_quantized_in_the_program(symmetric: bool, tmp_path: Path) -> None:
    """float32: a value lands on the other side of a rounding edge only by its last bits, so almost none does (60 dB)."""
    model, signature, example = mixed()
    quantized(model, Grid(8), {"kind": "static", "bits": 8, "symmetric": symmetric}, (nn.Linear, nn.Conv2d))
    for target in ("iOS17", "iOS18"):
        exporter = CoreMLExporter(target=target, precision="float32")
        path = exporter.write(trace(model, signature, example), tmp_path / f"{target}.mlpackage").path
        kinds = Program(path).kinds
        assert kinds["quantize"] >= 3
        assert kinds["dequantize"] >= 3
        assert sqnr(*_outputs(model, signature, example, exporter, path)) >= 60


def test_float16_rounds_scales_but_no_code(tmp_path: Path) -> None:
    model, signature, example = mixed()
    quantized(model, Grid(4, symmetric=False, granularity="group", group_size=4), kinds=ALL)
    exporter = CoreMLExporter()
    path = exporter.write(trace(model, signature, example), tmp_path / "m.mlpackage").path
    for site, layer in sites(model).items():
        assert np.array_equal(exporter.contents(path).codes[site], layer.quantized_weight.integers().numpy())
    assert set(exporter.contents(path).bytes_by_dtype) <= {"int4", "float16", "int32"}
    assert sqnr(*_outputs(model, signature, example, exporter, path)) >= 50


def test_tied_layers_are_stored_once_and_found_twice(tmp_path: Path) -> None:
    model, signature, example = mixed(tied=True)
    quantized(model, Grid(8))
    model.twin = model.up
    exporter = CoreMLExporter(precision="float32")
    contents = exporter.contents(exporter.write(trace(model, signature, example), tmp_path / "m.mlpackage").path)
    assert {"up", "twin", "head"} == set(contents.codes)
    assert np.array_equal(contents.codes["up"], contents.codes["twin"])
    assert contents.bytes_by_dtype["int8"] == 64 * 32 + 32 * 8


def test_a_float_layer_is_named(tmp_path: Path) -> None:
    model, signature, example = mixed()
    quantized(model, Grid(8))
    exporter = CoreMLExporter()
    contents = exporter.contents(exporter.write(trace(model, signature, example), tmp_path / "m.mlpackage").path)
    assert set(contents.float_layers) == {"table", "conv"}


def _tamper(path: Path, argument: str, change: Any) -> None:
    """Changes the first bytes of an argument of the first weight operation, in the file."""
    op = next(op for op in Package(path).ops if op.kind == "constexpr_blockwise_shift_scale")
    stored = op.inputs[argument][0]
    assert isinstance(stored, Stored)
    assert stored.offset is not None
    content = np.fromfile(path / WEIGHTS, np.uint8)
    start = int(content[stored.offset + 16 : stored.offset + 24].view(np.uint64)[0])
    change(content[start : start + 64])
    content.tofile(path / WEIGHTS)


def test_controls_a_flipped_code_and_a_wrong_scale_are_seen(tmp_path: Path) -> None:
    model, signature, example = mixed()
    quantized(model, Grid(8), kinds=ALL)
    exporter = CoreMLExporter(precision="float32")
    path = exporter.write(trace(model, signature, example), tmp_path / "m.mlpackage").path
    clean = exporter.contents(path)

    def flip(data: Any) -> None:
        data[0] ^= 1

    def double(data: Any) -> None:
        data[:64].view(np.float32)[:] *= 2

    _tamper(path, "data", flip)
    flipped = exporter.contents(path)
    changed = {site: int((flipped.codes[site] != clean.codes[site]).sum()) for site in clean.codes}
    assert sum(changed.values()) == 1
    _tamper(path, "data", flip)
    assert all(np.array_equal(exporter.contents(path).codes[site], clean.codes[site]) for site in clean.codes)
    assert _dense_are_equal(path, sites(model))
    _tamper(path, "scale", double)
    assert not _dense_are_equal(path, sites(model))


def test_what_core_ml_cannot_hold_is_refused_with_the_place(tmp_path: Path) -> None:
    model, signature, example = mixed()
    quantized(model, Grid(8), {"kind": "dynamic", "bits": 8, "symmetric": False})
    refused = CoreMLExporter().refuses(model)
    assert {path for path, _ in refused} == {"up", "twin", "head"}
    assert all("dynamic" in reason for _, reason in refused)
    with pytest.raises(UserError, match="dynamic activation quantization"):
        CoreMLExporter().write(trace(model, signature, example), tmp_path / "m.mlpackage")
    assert not (tmp_path / "m.mlpackage").exists()


def test_older_targets_refuse_what_they_lack() -> None:
    model, _, _ = mixed()
    assert CoreMLExporter(target="iOS16").refuses(model) == []
    quantized(model, Grid(4, granularity="group", group_size=32))
    assert [path for path, _ in CoreMLExporter(target="iOS17").refuses(model)] == ["up", "head", "twin"]
    assert CoreMLExporter(target="iOS18").refuses(model) == []
    other = quantized(mixed()[0], Grid(8), {"kind": "static", "bits": 8, "symmetric": True})
    assert "cannot quantize activations" in CoreMLExporter(target="iOS16").refuses(other)[0][1]
    assert CoreMLExporter(target="iOS17").refuses(other) == []


@pytest.mark.parametrize(
    ("shape", "groups", "counts"),
    [
        ((8, 12), 3, (8, 3)),
        ((8, 4, 3, 3), 2, (8, 2, 1, 1)),
        ((8, 4, 3, 3), 12, (8, 4, 3, 1)),
        ((8, 4, 3, 4), 24, (8, 4, 3, 2)),
        ((8, 4, 3, 3), 6, None),
    ],
)
def test_groups_of_inputs_as_blocks_of_the_weight(shape: Any, groups: int, counts: Any) -> None:
    """Oracle: the flattened weight with one scale a group."""
    assert block_counts(shape, (8, groups)) == counts
    if counts is None:
        assert "kernel" in str(refusal("iOS18", 8, shape, (8, groups)))
        return
    scale = np.arange(8 * groups, dtype=np.float32).reshape(8, groups)
    flat = np.repeat(scale, int(np.prod(shape[1:])) // groups, 1).reshape(shape)
    blocks = scale.reshape(counts)
    for axis, size in enumerate(shape):
        blocks = np.repeat(blocks, size // blocks.shape[axis], axis)
    assert np.array_equal(flat, blocks)


@pytest.mark.parametrize(
    ("group", "symmetric", "kind"), [(32, False, "int4"), (128, True, "uint3"), (128, False, "uint3"), (None, False, "uint3")]
)
def test_three_bits_lie_in_the_smaller_of_two_forms(group: int | None, symmetric: bool, kind: str, tmp_path: Path) -> None:
    """A table of eight values a group, against a bit more a weight; the plan counts the bytes of either."""
    torch.manual_seed(0)
    model = quantized(nn.Sequential(nn.Linear(256, 64)).eval(), Grid(3, symmetric, "group" if group else "channel", group))
    example = {"input": torch.randn(2, 256)}
    signature = Signature((TensorSpec("input", torch.float32, ("batch", 256)),))
    exporter, source = CoreMLExporter(precision="float32"), Traceable(model, signature, example, "one layer")
    told, path = weight_bytes(exporter._program(source), half=False), exporter.write(source, tmp_path / "m.mlpackage").path
    contents = exporter.contents(path)
    assert np.array_equal(contents.codes["0"], model[0].quantized_weight.integers().numpy())
    assert sqnr(*_outputs(model, signature, example, exporter, path)) >= 110
    scales = 64 * 256 // (group or 256)
    zeros, tables = 0 if symmetric else scales, 8 * scales if group else 0
    forms = {"int4": 64 * 256 // 2 + zeros // 2, "uint3": 64 * 256 * 3 // 8 + tables + (zeros if group else 0)}
    assert min(forms, key=forms.__getitem__) == kind
    held = sum(size for name, size in contents.bytes_by_dtype.items() if "int" in name)
    assert forms[kind] <= held <= forms[kind] + 3 * 64
    assert abs(told - (path / WEIGHTS).stat().st_size) <= 3 * 128
