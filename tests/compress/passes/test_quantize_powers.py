"""``quantize: {scales: power_of_two}``: what it leaves in the model and in each file, and what it refuses."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from trial import Trial, digits, rebuilt, tried

import compress
from compress.layers import QuantLinear, is_quantized
from compress.passes.quantize import Quantize
from export.graph import Traceable

POWERS: dict[str, Any] = {"scales": "power_of_two"}
WAYS: dict[str, dict[str, Any]] = {
    "static": {"activation_symmetric": False, "smooth_below_db": 100},
    "blocks of 4 bits": {"weights": 4, "group_size": 16, "activations": "none", "symmetric": False},
    "blocks of 4 bits, GPTQ, static": {"weights": 4, "group_size": 16, "rounding": "gptq", "group_scales": "multiples"},
    "blocks of 2 bits, no inputs": {"weights": 2, "group_size": 16, "activations": "none"},
    "gradients": {"range": "hessian", "range_rows": 16, "overrides": {"mlp.up": 4}, "group_size": 16, "sites": ["blocks.0.*"]},
}


@functools.cache
def made(way: str, scales: str = "power_of_two") -> Trial:
    return tried(Quantize(**WAYS[way], scales=scales), *digits())  # type: ignore[arg-type]


def scales_in(trial: Trial) -> Iterator[Tensor]:
    for layer in trial.after.modules():
        if is_quantized(layer):
            yield layer.quantized_weight.scale  # type: ignore[union-attr, misc]
            if layer.activation is not None:
                yield layer.activation.scale  # type: ignore[union-attr, misc]


def powers(scale: Any) -> bool:
    return bool((np.frexp(np.asarray(scale, np.float32))[0] == 0.5).all())


@pytest.mark.parametrize("way", WAYS)
def test_every_scale_is_a_power_of_two_and_a_bit_is_what_it_costs(way: str) -> None:
    trial, free = made(way), made(way, "free")
    assert all(powers(scale) for scale in scales_in(trial))
    assert not any(powers(scale) for scale in scales_in(free))
    assert trial.sqnr_db > free.sqnr_db - 6.1
    assert torch.equal(trial.outputs(rebuilt(trial)), trial.outputs(trial.after))


def test_factors_fill_the_range_that_a_power_of_two_leaves_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    import compress.quantization.calibrated_inputs as module

    step = Quantize(**POWERS, **WAYS["static"], sites=["blocks.0.*"])
    filled = tried(step, *digits()).sqnr_db
    monkeypatch.setattr(module, "aligned", lambda found, *_: found)
    assert filled > tried(step, *digits()).sqnr_db + 0.5


def held(kind: str, trial: Trial, folder: Path) -> list[Any]:
    """The scales that a file holds, read back from disk."""
    source = Traceable(trial.after, trial.signature, {name: rows[:2] for name, rows in trial.rows[0].items()}, "digits")
    if kind == "coreml":
        pytest.importorskip("coremltools")
        from export.mil_package import Package, Stored
        from export.to_coreml import CoreMLExporter

        ops = Package(CoreMLExporter().write(source, folder / "model.mlpackage").path).ops
        constants = {op.name: op.inputs["val"][0] for op in ops if op.kind == "const"}
        given = [op.inputs["scale"][0] for op in ops if "scale" in op.inputs]
        stored = [constants[one] if isinstance(one, str) else one for one in given]
        return [one.value for one in stored if isinstance(one, Stored)]
    onnx = pytest.importorskip("onnx")
    if kind == "tensorrt":
        pytest.importorskip("tensorrt_rtx")
        from export.to_tensorrt import TensorRTExporter

        path = TensorRTExporter().write(source, folder / "model.engine").path.parent / "model.qdq.onnx"
    else:
        from export.to_onnx import OnnxExporter

        path = OnnxExporter().write(source, folder / "model.onnx").path
    return [onnx.numpy_helper.to_array(one) for one in onnx.load(path).graph.initializer if one.name.endswith(".scale")]


@pytest.mark.parametrize(
    ("kind", "way"),
    [
        ("onnx", "static"),
        ("onnx", "blocks of 4 bits"),
        ("coreml", "blocks of 4 bits, GPTQ, static"),
        ("tensorrt", "blocks of 2 bits, no inputs"),
    ],
)
def test_the_scales_of_a_file_are_powers_of_two(kind: str, way: str, tmp_path: Path) -> None:
    read = held(kind, made(way), tmp_path)
    assert len(read) >= sum(isinstance(layer, QuantLinear) for layer in made(way).after.modules())
    assert all(powers(scale) for scale in read)


def test_control_free_scales_are_not_and_are_seen_not_to_be(tmp_path: Path) -> None:
    read = held("onnx", made("static", "free"), tmp_path)
    assert not any(powers(scale) for scale in read)


def test_groups_that_differ_by_shifts_run_on_integer_kernels_in_onnx_runtime(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    read = held("onnx", made("blocks of 4 bits, GPTQ, static"), tmp_path)
    assert all(powers(scale) for scale in read)
    graph = onnx.load(tmp_path / "model.onnx").graph
    assert [node.op_type for node in graph.node].count("MatMulIntegerToFloat") == 16
    shifts = [onnx.numpy_helper.to_array(one) for one in graph.initializer if one.name.endswith(".multiples")]
    assert shifts
    assert all(powers(shift) for shift in shifts)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"activations": "dynamic"}, "a runtime makes the scales of dynamic inputs"),
        ({"smooth": "repq", "activation_symmetric": False}, "smooth: repq"),
        ({"scale_rounds": 1, "rounding": "gptq"}, "scale_rounds fits scales freely"),
        ({"weights": "fp8"}, "scales: power_of_two has no meaning with weights: fp8"),
        ({"engine": "nncf"}, "scales: NNCF has no such option"),
    ],
    ids=str,
)
def test_what_does_not_go_with_it_is_refused_with_the_way_out(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says) as caught:
        Quantize(**POWERS, **options)
    assert "\n" in str(caught.value)


RECIPE = """
model: embedded:digits-vit
data: {{format: embedded, calibration: {{rows: 32}}}}
passes:
  - quantize: {{scales: {scales}, activations: none}}
export: [onnx: {{openvino: false}}]
"""


def test_a_plan_says_for_each_file_what_stays_float_of_the_method(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(scales="power_of_two"))
    plan = compress.plan(recipe)
    assert "scales powers of two" in plan.passes[0].sites[0].action
    (says,) = [warning for warning in plan.warnings if "quantize: onnx: of BCT's parts stay float: " in warning]
    parts = ("softmax", "norms", "activation functions", "attention products", "inputs of layers")
    assert all(part in says for part in parts)
    assert "one scale a tensor" in Quantize(**POWERS).computed_float
    assert Quantize().computed_float == ""
