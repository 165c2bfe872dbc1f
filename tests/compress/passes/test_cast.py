"""What ``cast`` puts into 16 bits, what it keeps in float32, and what the files make of that."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from test_quantize import shared
from torch import Tensor, nn
from trial import Trial, digits, rebuilt, tried

from calibrate.errors import UserError
from calibrate.fidelity import sqnr_db
from calibrate.signature import Batch, Signature, TensorSpec
from compress.anatomy import find
from compress.layers import CastEmbedding, CastLinear
from compress.passes.cast import Cast
from compress.passes.quantize import Quantize
from compress.surgery import Surgery
from export.contract import Exporter
from export.graph import Traceable
from export.to_coreml import CoreMLExporter
from export.to_onnx import OnnxExporter, lower
from export.to_tensorrt import TensorRTExporter

EXAMPLE = Cast()


class Massive(nn.Module):
    """Two layers with an activation of 1e5 between them, and two without."""

    def __init__(self, height: float = 1e5) -> None:
        super().__init__()
        self.first, self.up, self.down, self.last = (nn.Linear(32, 32) for _ in range(4))
        with torch.no_grad():
            self.up.bias[3] = height
            self.down.weight[:, 3] *= 1e-5

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(torch.relu(self.down(torch.relu(self.up(torch.relu(self.first(x)))))))
        return y


def massive(**options: Any) -> tuple[nn.Module, Signature, list[Batch]]:
    torch.manual_seed(0)
    return Massive(**options).eval(), Signature((TensorSpec("x", torch.float32, ("batch", 32)),)), [{"x": torch.randn(16, 32)}]


def on_massive(**options: Any) -> Trial:
    return tried(Cast(sites=["first", "up", "down", "last"], **options), *massive())


def test_a_massive_activation_makes_islands_of_the_layers_that_it_passes() -> None:
    trial = on_massive()
    assert set(trial.context.report["islands"]) == {"up", "down"}
    assert "its output is up to 1e+05" in trial.context.report["islands"]["up"]
    assert "its input" in trial.context.report["islands"]["down"]
    assert isinstance(trial.after.first, CastLinear)
    assert isinstance(trial.after.up, nn.Linear)
    assert trial.sqnr_db >= 60


def test_without_islands_it_overflows() -> None:
    trial = on_massive(islands="none")
    assert not trial.outputs(trial.after).isfinite().all()


def test_the_margin_decides() -> None:
    near = tried(Cast(sites=["up"], margin=4), *massive(height=2e4)).context.report
    assert list(near["islands"]) == ["up"]
    assert not tried(Cast(sites=["up"], margin=3), *massive(height=2e4)).context.report["islands"]


def test_bfloat16_holds_what_float16_cannot() -> None:
    trial = on_massive(to="bfloat16", least_db=40)
    assert not trial.context.report["islands"]
    assert 35 < trial.sqnr_db < 60


def test_numbers_below_float16s_normal_range_stay_float32() -> None:
    model, signature, rows = massive(height=0.0)
    with torch.no_grad():
        model.get_parameter("first.weight").mul_(1e-6)
    trial = tried(Cast(sites=["first", "last"]), model, signature, rows)
    assert "dB of its weight" in trial.context.report["islands"]["first"]
    assert set(trial.context.report["islands"]) == {"first"}


@pytest.mark.parametrize(("to", "least", "most"), [("float16", 60, 90), ("bfloat16", 45, 60)])
def test_a_trained_transformer_stays_close(to: str, least: float, most: float) -> None:
    trial = tried(Cast(to=to), *digits())  # type: ignore[arg-type]
    assert not trial.context.report["islands"]
    assert least < trial.sqnr_db < most
    halves = sum(p.nbytes for p in trial.after.parameters()) / sum(p.nbytes for p in trial.before.parameters())
    assert halves < 0.55


def test_a_tied_head_shares_the_table_and_it_can_be_replayed() -> None:
    trial = tried(Cast(), *shared())
    table, head = trial.after.get_submodule("embed"), trial.after.get_submodule("head")
    assert isinstance(table, CastEmbedding)
    assert head.get_submodule("stored") is table.get_submodule("stored")
    fresh = rebuilt(trial)
    assert torch.equal(trial.outputs(fresh), trial.outputs(trial.after))
    assert fresh.get_submodule("head").get_submodule("stored") is fresh.get_submodule("embed").get_submodule("stored")


def test_quantized_layers_are_left_and_told() -> None:
    model, signature, rows = digits()
    model = tried(Quantize(activations="none", sites=["mlp.*"]), model, signature, rows).after
    trial = tried(Cast(sites=["attention.*", "blocks.0.mlp.fc1"]), model, signature, rows)
    assert trial.context.report["skipped"] == {"blocks.0.mlp.fc1": "it is quantized"}


def test_a_second_cast_is_refused() -> None:
    trial = on_massive()
    with pytest.raises(UserError, match="first is cast already"):
        tried(Cast(sites=["first"]), trial.after, trial.signature, trial.rows)


def test_a_second_cast_leaves_out_what_its_error_names() -> None:
    once = tried(Cast(sites=["first"]), *massive())
    twice = tried(Cast(sites=["first", "last"], skip=["first"]), once.after, *massive()[1:])
    assert {path for path, module in twice.after.named_modules() if hasattr(module, "cast_to")} == {"first", "last"}


def test_roles_are_found_again_after_it() -> None:
    trial = tried(Cast(), *digits())
    again = find(trial.after, trial.signature, {"pixels": trial.rows[0]["pixels"][:2]})
    before, after = (
        {site.path: (site.roles, site.kind, site.shape, site.block, site.parameters) for site in anatomy.sites}
        for anatomy in (trial.anatomy, again)
    )
    assert after == before


def test_options_are_checked() -> None:
    for options in ({"to": "float8"}, {"margin": 0.5}):
        with pytest.raises(ValidationError):
            Cast(**options)  # type: ignore[arg-type]


def traced(trial: Trial) -> Traceable:
    return Traceable(trial.after, trial.signature, {name: tensor[:2] for name, tensor in trial.rows[0].items()}, "cast")


def run(exporter: Exporter, trial: Trial, path: Path, rows: int = 8) -> Tensor:
    exporter.write(traced(trial), path)
    runner = exporter.open(path, 1)
    batch, step = trial.rows[0], runner.rows or rows
    parts = [runner({name: tensor[i : i + step] for name, tensor in batch.items()}) for i in range(0, rows, step)]
    runner.close()
    return torch.cat(parts)


def test_onnx_has_casts_at_the_islands_and_float32_outside(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="needs the extra onnx")
    trial = on_massive()
    graph = lower(traced(trial))
    kinds = {node.name: node.inputs[1].dtype.name for node in graph.graph if node.op_type == "MatMul"}
    by_site = {name.partition("/")[0]: kind for name, kind in kinds.items()}
    assert by_site == {"first": "FLOAT16", "up": "FLOAT", "down": "FLOAT", "last": "FLOAT16"}
    assert any("widens" in note for note in graph.meta["notes"])
    assert {value.dtype.name for value in (*graph.graph.inputs, *graph.graph.outputs)} == {"FLOAT"}
    output = run(OnnxExporter(), trial, tmp_path / "model.onnx")
    assert sqnr_db(trial.outputs(trial.before)[:8], output) >= 60
    contents = OnnxExporter().contents(tmp_path / "model.onnx").bytes_by_dtype
    assert contents["float16"] == 2 * (2 * 32 * 32 + 2 * 32)


def test_the_forecast_is_the_file(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="needs the extra onnx")
    model, signature, rows = digits()
    anatomy = find(model, signature, {"pixels": rows[0]["pixels"][:2]})
    trial = tried(Cast(), model, signature, rows)
    Cast().rehearse(model, anatomy, Surgery())
    example = {"pixels": rows[0]["pixels"][:2]}
    told = OnnxExporter().forecast(Traceable(model, signature, example, "cast"))
    written = OnnxExporter().write(traced(trial), tmp_path / "model.onnx")
    assert told.size_bytes == pytest.approx(written.size_bytes, rel=0.01)


def test_core_ml_keeps_islands_though_its_programs_are_float16_by_default(tmp_path: Path) -> None:
    pytest.importorskip("coremltools", reason="needs the extra coreml")
    trial = on_massive()
    output = run(CoreMLExporter(), trial, tmp_path / "model.mlpackage", rows=2)
    assert sqnr_db(trial.outputs(trial.before)[:2], output) >= 55
    plain = tried(Cast(sites=["first"], islands="none"), *massive())
    plain.after = plain.before
    whole = run(CoreMLExporter(), plain, tmp_path / "plain.mlpackage", rows=2)
    assert not whole.isfinite().all() or sqnr_db(plain.outputs(plain.before)[:2], whole) < 40, "what the islands are for"


@pytest.mark.parametrize("to", ["float16", "bfloat16"])
def test_tensorrt_builds_a_strongly_typed_engine(to: str, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="needs the extra tensorrt-rtx")
    trial = on_massive(to=to)
    exporter = TensorRTExporter()
    assert not exporter.refuses(trial.after)
    graph = exporter._lower(traced(trial))
    kinds = {node.name.partition("/")[0]: node.inputs[1].dtype.name for node in graph.graph if node.op_type == "MatMul"}
    assert kinds["first"] == to.upper()
    exporter.write(traced(trial), tmp_path / "model.engine")
    assert (tmp_path / "model.engine").stat().st_size > 1000


def test_bfloat16_is_refused_where_a_runtime_has_none() -> None:
    after = on_massive(to="bfloat16", least_db=40).after
    for exporter in (OnnxExporter(), CoreMLExporter()):
        refused = exporter.refuses(after)
        assert {path for path, _ in refused} == {"first", "up", "down", "last"}
        assert all("bfloat16" in reason for _, reason in refused)
