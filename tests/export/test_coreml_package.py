"""The package as a file: shapes, names, metadata, determinism, silence, and errors."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from coreml_models import family, mixed, quantized, sqnr, trace
from pydantic import ValidationError
from sweeps import swept
from torch import Tensor, nn

pytest.importorskip("coremltools", reason="Core ML needs coremltools")

from calibrate.errors import UserError
from calibrate.grid import Grid
from calibrate.signature import Signature, TensorSpec
from export.coreml_contents import infinite
from export.coreml_ops import finite
from export.mil_package import Package, package_files
from export.to_coreml import CoreMLExporter


def _digest(path: Path) -> dict[str, str]:
    return {str(f.relative_to(path)): hashlib.sha256(f.read_bytes()).hexdigest() for f in package_files(path)}


def test_the_boundary_is_that_of_the_signature(tmp_path: Path) -> None:
    model, signature, example = mixed()
    artifact = CoreMLExporter().write(trace(model, signature, example, "my model"), tmp_path / "a" / "m.mlpackage")
    description = Package(artifact.path).spec.description
    assert [(feature.name, list(feature.type.multiArrayType.shape)) for feature in description.input] == [("input_ids", [1, 6])]
    array = description.input[0].type.multiArrayType
    assert array.ArrayDataType.Name(array.dataType) == "INT32"
    assert [feature.name for feature in description.output] == ["scores"]
    assert description.output[0].type.multiArrayType.dataType == array.ArrayDataType.Value("FLOAT32")
    assert description.metadata.author == "transformer-compress"
    assert "my model" in description.metadata.shortDescription
    assert json.loads(description.metadata.userDefined["compress.options"])["target"] == "iOS18"
    assert artifact.size_bytes == sum(file.stat().st_size for file in artifact.path.rglob("*") if file.is_file())
    assert [child.name for child in artifact.path.parent.iterdir()] == ["m.mlpackage"]


def test_the_same_model_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        model, signature, example = mixed()
        quantized(model, Grid(4, granularity="group", group_size=4), kinds=(nn.Linear, nn.Embedding))
        CoreMLExporter().write(trace(model, signature, example), tmp_path / f"{name}.mlpackage")
    assert _digest(tmp_path / "a.mlpackage") == _digest(tmp_path / "b.mlpackage")
    assert len(_digest(tmp_path / "a.mlpackage")) == 3


def test_a_package_is_replaced_whole(tmp_path: Path) -> None:
    model, signature, example = mixed()
    path = tmp_path / "m.mlpackage"
    path.mkdir()
    (path / "left over").write_text("x")
    CoreMLExporter().write(trace(model, signature, example), path)
    assert not (path / "left over").exists()


def test_nothing_is_printed_and_nothing_stays_patched(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    from coremltools.converters.mil.frontend.torch import ops
    from coremltools.converters.mil.frontend.torch.torch_op_registry import _TORCH_OPS_REGISTRY as registry

    before, cast = dict(registry.name_to_func_mapping), ops._cast
    level = logging.getLogger("coremltools").level
    model, signature, example = mixed()
    source = trace(quantized(model, Grid(8)), signature, example)
    source.program(batch=1)
    recwarn.clear()
    exporter = CoreMLExporter()
    runner = exporter.open(exporter.write(source, tmp_path / "m.mlpackage").path, 1)
    runner({"input_ids": example["input_ids"][:1]})
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")
    assert [str(warning.message) for warning in recwarn] == []
    assert registry.name_to_func_mapping == before
    assert ops._cast is cast
    assert logging.getLogger("coremltools").level == level


def test_a_fresh_process_stays_silent(tmp_path: Path) -> None:
    """The import of coremltools is the noisiest part."""
    code = (
        "from calibrate.errors import UserError\nfrom export.to_coreml import CoreMLExporter\nfrom pathlib import Path\n"
        f"try: CoreMLExporter().contents(Path({str(tmp_path)!r}))\nexcept UserError as error: print(error.what)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert (done.stdout, done.stderr) == ("not a Core ML package\n", "")


def test_the_traced_program_is_left_as_it_was(tmp_path: Path) -> None:
    """Exporters share the traced graph: ours is a copy."""
    model, signature, example = family("bert_eager")
    source = trace(model, signature, example)
    before = str(source.program(batch=1).graph)
    weights = {name: value.clone() for name, value in source.program(batch=1).state_dict.items()}
    CoreMLExporter().write(source, tmp_path / "m.mlpackage")
    assert str(source.program(batch=1).graph) == before
    assert all(torch.equal(value, weights[name]) for name, value in source.program(batch=1).state_dict.items())


@pytest.mark.parametrize(
    ("name", "shapes"),
    swept(
        [("bert", {"tokens": [2, 16]}), ("llama", {"tokens": [2, 16]}), ("bert", [{"tokens": 16}, {"tokens": 9}])],
        [("bert", {"tokens": [2, 16]}), ("bert", [{"tokens": 16}, {"tokens": 9}])],
    ),
    ids=["bert range", "llama range", "bert list"],
)
def test_another_length_runs(name: str, shapes: Any, tmp_path: Path) -> None:
    model, signature, example = family(name)
    exporter = CoreMLExporter(precision="float32", shapes=shapes)
    runner = exporter.open(exporter.write(trace(model, signature, example), tmp_path / "m.mlpackage").path, 1)
    for tokens in (16, 9):
        row = {key: value[1:2, :tokens] for key, value in example.items()}
        with torch.no_grad():
            reference = signature.call(model, row)
        assert sqnr(reference, runner(row)) >= 90
    with pytest.raises(UserError, match="the program takes"):
        runner({key: torch.cat([value[:1]] * 2, 1) for key, value in example.items()})
    with pytest.raises(UserError, match="takes"):
        runner({key: value[:2] for key, value in example.items()})


def test_ranges_and_lists_are_in_the_description(tmp_path: Path) -> None:
    model, signature, example = mixed()
    for shapes in ({"batch": [1, 4], "tokens": [2, 12]}, [{"tokens": 6}, {"tokens": 12}]):
        path = CoreMLExporter(shapes=shapes).write(trace(model, signature, example), tmp_path / "m.mlpackage").path
        array = Package(path).spec.description.input[0].type.multiArrayType
        if isinstance(shapes, dict):
            assert [(r.lowerBound, r.upperBound) for r in array.shapeRange.sizeRanges] == [(1, 4), (2, 12)]
            assert CoreMLExporter().open(path, 1).rows is None
        else:
            assert [list(entry.shape) for entry in array.enumeratedShapes.shapes] == [[1, 6], [1, 12]]
        assert list(array.shape) == [1, 6]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shapes": {"length": [1, 4]}}, "there is no dimension 'length'"),
        ({"shapes": {"tokens": [9, 4]}}, "is empty"),
        ({"shapes": [{"tokens": 4}, {"batch": 4}]}, "same dimensions"),
        ({"shapes": {"tokens": [4, 99]}}, "the model takes at most 64, not 99"),
        ({"shapes": [{"tokens": 4}, {"tokens": 8}], "target": "iOS17"}, "one input"),
    ],
)
def test_shapes_that_do_not_fit(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    model, signature, example = family("bert")
    with pytest.raises(UserError, match=message):
        CoreMLExporter(**options).write(trace(model, signature, example), tmp_path / "m.mlpackage")
    assert list(tmp_path.iterdir()) == []


def test_options_are_strict() -> None:
    for options in ({"precision": "int8"}, {"target": "iOS15"}, {"batch": 0}, {"shapes": {"tokens": [1]}}, {"other": 1}):
        with pytest.raises(ValidationError):
            CoreMLExporter(**options)


class Masked(nn.Module):
    """Attention written by hand with minus infinity, and with the lowest float32."""

    def __init__(self, lowest: float) -> None:
        super().__init__()
        self.lowest, self.head = lowest, nn.Linear(8, 4)

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        scores = (x @ x.transpose(-1, -2)).masked_fill(keep[:, None, :] == 0, self.lowest)
        extra = (1.0 - keep[:, None, :].float()) * torch.finfo(torch.float32).min
        return self.head((scores + extra).softmax(-1) @ x)


@pytest.mark.parametrize(
    ("lowest", "precision"),
    swept(
        itertools.product([float("-inf"), -3.4e38, -1e9], ["float32", "float16"]),
        [(float("-inf"), "float16"), (float("-inf"), "float32"), (-3.4e38, "float16")],
    ),
)
def test_masks_stay_finite(precision: Any, lowest: float, tmp_path: Path) -> None:
    """No constant is infinite, no value becomes infinite or not a number, and what is masked has no weight."""
    x = torch.randn(2, 6, 8)
    keep = torch.tensor([[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 0]])
    specs = (
        TensorSpec("x", torch.float32, ("batch", "tokens", 8)),
        TensorSpec("keep", torch.int64, ("batch", "tokens")),
    )
    model, signature, example = Masked(lowest).eval(), Signature(specs), {"x": x, "keep": keep}
    exporter = CoreMLExporter(precision=precision, batch=2)
    path = exporter.write(trace(model, signature, example), tmp_path / "m.mlpackage").path
    assert infinite(Package(path)) == []
    with torch.no_grad():
        reference = signature.call(model, example)
    result = exporter.open(path, 1)(example)
    assert torch.isfinite(result).all()
    assert sqnr(reference, result) >= (90 if precision == "float32" else 40)
    other = torch.where(keep[:, :, None] == 0, x + 5, x)
    there = exporter.open(path, 1)({"x": other, "keep": keep})
    assert torch.equal(there[0, :3], result[0, :3])


def test_infinite_constants_are_found(tmp_path: Path) -> None:
    """Control: the audit sees an infinity that is written past our rewriting."""
    from coreml_models import saved
    from coremltools.converters.mil.mil import Builder as mb

    half = np.full((3, 4), -np.inf, np.float16)
    path = saved(tmp_path / "m.mlpackage", {"x": ((3, 4), "float16")}, lambda x: mb.add(x=x, y=half))
    assert len(infinite(Package(path))) == 1


def test_weights_are_not_touched_by_the_rewriting() -> None:
    program = torch.export.export(nn.Linear(4, 4), (torch.randn(2, 4),))
    weights = {name: value.clone() for name, value in program.state_dict.items()}
    changed = finite(program, half=True)
    assert all(torch.equal(value, weights[name]) for name, value in changed.state_dict.items())


def test_an_operation_that_core_ml_lacks_is_the_users_error(tmp_path: Path) -> None:
    class Spectrum(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.fft.fft(x).real

    signature = Signature((TensorSpec("x", torch.float32, ("batch", 8)),))
    with pytest.raises(UserError, match="Core ML cannot express this model"):
        CoreMLExporter().write(trace(Spectrum(), signature, {"x": torch.randn(2, 8)}), tmp_path / "m.mlpackage")
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_package_is_the_users_error(tmp_path: Path) -> None:
    (tmp_path / "Data/com.apple.CoreML").mkdir(parents=True)
    (tmp_path / "Data/com.apple.CoreML/model.mlmodel").write_bytes(b"not a model")
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(UserError, match=r"package|read"):
            CoreMLExporter().open(path, 1)
