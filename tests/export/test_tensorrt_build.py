"""The builder process: deterministic engines that hold the codes; failures that say what to do and leave nothing."""

from __future__ import annotations

import ast
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from calibrate.errors import MissingRuntime, UserError
from export import tensorrt_job
from export.engine_listing import builder_of, holds, read_listing
from export.tensorrt_job import build_engine, hint_for

pytest.importorskip("tensorrt_rtx", reason="needs the extra tensorrt-rtx")
pytest.importorskip("onnx", reason="needs the extra onnx")

from qdq_graphs import merged, perceptron

_PROFILE = {"x": [[1, 5, 64], [2, 5, 64], [16, 5, 64]]}


def _build(onnx: Path, name: str = "model.engine", profile: Any = None, **options: Any) -> bytes:
    engine = onnx.with_name(name)
    built = build_engine("tensorrt-rtx", onnx, engine, profile=_PROFILE if profile is None else profile, **options)
    assert built.seconds > 0
    return engine.read_bytes()


@pytest.mark.parametrize(
    ("options", "kind", "bits"),
    [
        ({}, "int8", 8),
        ({"float16": False}, "int8", 8),
        ({"activations": False}, "int8", 8),
        ({"activations": False, "bits": 4, "group": 16}, "int4", 4),
        ({"bits": 4}, "int4", 4),
    ],
)
def test_the_engine_holds_every_code(tmp_path: Path, options: dict[str, Any], kind: str, bits: int) -> None:
    codes = perceptron(tmp_path / "m.onnx", **options)
    engine = _build(tmp_path / "m.onnx")
    listing = read_listing(engine)
    assert listing is not None
    assert listing.constant_bytes[kind] == sum(array.size for array in codes.values()) * bits // 8
    assert listing.fully_connected == 2
    assert {"layers.0.matmul", "layers.1.matmul"} <= {name for names in listing.fused for name in names}
    assert builder_of(engine)[0] == "tensorrt-rtx"
    for array in codes.values():
        assert holds(engine, array, bits)
        assert holds(engine, array.T, bits)
        other = array.copy()
        other[3, 4] ^= 1
        assert not holds(engine, other, bits)


def test_merged_products_are_found_row_by_row(tmp_path: Path) -> None:
    codes = merged(tmp_path / "m.onnx")
    engine = _build(tmp_path / "m.onnx", profile={})
    listing = read_listing(engine)
    assert listing is not None
    assert listing.fully_connected == 1, "the three products of one input became one kernel"
    for array in codes.values():
        assert array.tobytes() not in engine
        assert holds(engine, array, 8)
        assert not holds(engine, array[::-1], 8)


def test_two_builds_are_byte_identical(tmp_path: Path) -> None:
    perceptron(tmp_path / "m.onnx")
    assert _build(tmp_path / "m.onnx", "a.engine") == _build(tmp_path / "m.onnx", "b.engine")


def test_a_failed_build_names_the_node_leaves_nothing_and_harms_no_later_build(tmp_path: Path) -> None:
    perceptron(tmp_path / "good.onnx")
    before = _build(tmp_path / "good.onnx", "before.engine")
    bad = tmp_path / "bad"
    bad.mkdir()
    perceptron(bad / "bad.onnx", activation_zero=3)
    with pytest.raises(UserError, match=r"layers\.0\.quantize \(QuantizeLinear\): .*Non-zero zero point") as caught:
        _build(bad / "bad.onnx")
    assert "symmetric: true" in caught.value.hint
    assert len(caught.value.what.splitlines()) == 1
    assert [file.name for file in bad.iterdir()] == ["bad.onnx"]
    assert _build(tmp_path / "good.onnx", "after.engine") == before


def test_failures_inside_the_compiler_have_a_way_out(tmp_path: Path) -> None:
    perceptron(tmp_path / "turing.onnx", float16=False)
    with pytest.raises(UserError, match=r"layers\.0\.matmul.*FP32 GEMM is not supported") as caught:
        _build(tmp_path / "turing.onnx", compute_capabilities=["7.5"])
    assert "precision: float16" in caught.value.hint
    perceptron(tmp_path / "groups.onnx", bits=4, group=16)
    with pytest.raises(UserError, match="cannot build this model") as caught:
        _build(tmp_path / "groups.onnx")
    assert "Group scales under quantized activations" in caught.value.hint
    assert "/_src/" not in caught.value.what
    assert not list(tmp_path.glob("*.engine*"))


def test_compute_capabilities_and_level_reach_the_builder(tmp_path: Path) -> None:
    perceptron(tmp_path / "m.onnx")
    listing = read_listing(_build(tmp_path / "m.onnx", compute_capabilities=["8.6", "12.0"], optimization_level=2))
    assert listing is not None
    assert listing.targets == ("sm86", "sm120")


def test_a_fixed_shape_needs_no_profile(tmp_path: Path) -> None:
    perceptron(tmp_path / "m.onnx", rows=4)
    assert read_listing(_build(tmp_path / "m.onnx", profile={})) is not None


def test_a_library_that_cannot_be_loaded_names_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    perceptron(tmp_path / "m.onnx")
    monkeypatch.setitem(tensorrt_job.LIBRARIES, "tensorrt-rtx", "no_such_library")
    with pytest.raises(MissingRuntime, match=r"no_such_library") as caught:
        _build(tmp_path / "m.onnx")
    assert "transformer-compress[tensorrt-rtx]" in caught.value.hint


def test_a_process_that_dies_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    perceptron(tmp_path / "m.onnx")
    (tmp_path / "dies_at_once.py").write_text("import os; os.abort()")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setitem(tensorrt_job.LIBRARIES, "tensorrt-rtx", "dies_at_once")
    with pytest.raises(UserError, match="ended with signal SIGABRT"):
        _build(tmp_path / "m.onnx")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["dies_at_once.py", "m.onnx"]


@pytest.mark.parametrize(
    ("message", "word"),
    [
        ("Cannot compile for target(s) sm80, because the model contains HW-specific datatypes: fp8_e4m3", "8.9"),
        ("Myelin: CHECK(composite_op->is_decomposable()) failed. Attention operation was not supported by", "opset"),
        ("cosCache has batch size 1 but must have the same batch size as input which is -1", "opset"),
        ("graph_jit.cpp:278: CHECK(status == CUDA_SUCCESS) failed", "driver"),
        ("DequantizeLinear: ... Found unsupported input type of UINT8", "symmetric"),
        ("Sub-byte quantization with odd tensor volume is not supported", "8 bits"),
    ],
)
def test_known_errors_have_hints(message: str, word: str) -> None:
    assert word in hint_for(message)


def test_the_builder_process_loads_nothing_but_the_standard_library_and_its_own() -> None:
    source = Path(tensorrt_job.__file__).with_name("tensorrt_builder.py").read_text()
    found = [node for node in ast.walk(ast.parse(source)) if isinstance(node, (ast.Import, ast.ImportFrom))]
    names = {alias.name for node in found if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module or "" for node in found if isinstance(node, ast.ImportFrom)}
    assert names <= sys.stdlib_module_names


def test_the_first_line_with_a_known_cause_decides_the_hint() -> None:
    errors = ["Invalid Node - a\nX: a: Operation PROD must have same input types. But they are Float and Half.", "cudaError 35"]
    refused = tensorrt_job._refused("tensorrt-rtx", {"stage": "parse", "node": "a (Mul)", "errors": errors})
    assert refused.where == "a (Mul)"
    assert "same input types" in refused.what
    assert "precision: float32" in refused.hint


def test_unknown_errors_have_none() -> None:
    assert hint_for("something new") == ""


def test_the_proxy_runs_the_arithmetic_of_the_file(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="needs the extra onnx")
    import torch
    from onnx import load
    from onnx.reference import ReferenceEvaluator

    from export.tensorrt_runners import ProxyRunner

    x = torch.from_numpy(np.random.default_rng(1).standard_normal((3, 5, 64)).astype(np.float32))
    # float32: the same sums in another order. float16: each node may round its result to 2**-11, some four in a row.
    for name, options, floor in (
        ("static", {"float16": False}, 100.0),
        ("weights", {"float16": False, "activations": False}, 100.0),
        ("half", {"activations": False}, 60.0),
        ("half_int4", {"activations": False, "bits": 4, "group": 16}, 60.0),
        ("fixed", {"float16": False, "rows": 3}, 100.0),
    ):
        file = tmp_path / f"{name}.onnx"
        perceptron(file, **options)  # type: ignore[arg-type]
        runner = ProxyRunner(file, "TensorRT-RTX 1", threads=1)
        assert (runner.how, runner.measurable, runner.rows) == ("proxy", False, 3 if name == "fixed" else None)
        assert runner.runtime.endswith("CPU (proxy for TensorRT-RTX 1)")
        expected = torch.from_numpy(ReferenceEvaluator(load(file)).run(None, {"x": x.numpy()})[0]).double()
        got = runner({"x": x, "other": x})
        assert got.dtype == torch.float32
        error = (expected - got).square().sum().clamp(min=1e-300)
        assert 10 * torch.log10(expected.square().sum() / error) > floor, name
        runner.close()
