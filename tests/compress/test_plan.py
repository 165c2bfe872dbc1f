"""What a plan tells, against the run it is about; and what stops both before anything is calibrated."""

from __future__ import annotations

import json
import sys
import tempfile
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import compress
from calibrate.errors import UserError
from calibrate.inventory import inventory
from compress import cli, plan_table, report, terminal
from compress.anatomy import find
from compress.passes import Context, known_passes
from compress.planning import Plan
from compress.rehearsal import stand_in
from compress.surgery import Surgery

pytest.importorskip("onnxruntime", reason="needs the extra onnx")

DATA = "{format: embedded, calibration: {rows: 32}, evaluation: {rows: 0-63}}"
DROP, QUANTIZE = "drop_layers: {blocks: [1]}", "quantize: {weights: 8, activations: static, smooth: false}"


def recipe(folder: Path, *passes: str, export: str = "[onnx: {openvino: false}]", data: str = DATA) -> Path:
    path = folder / "digits.yaml"
    lines = ["model: embedded:digits-vit", f"data: {data}", "passes:", *(f"  - {step}" for step in passes), f"export: {export}"]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Plan, report.Report, Path]:
    """A plan, and the report and the folder of the run that it is about."""
    folder = tmp_path_factory.mktemp("plan")
    path = recipe(folder, DROP, QUANTIZE)
    return compress.plan(path), compress.apply(path, folder / "out", evaluate=False), folder / "out"


def test_bytes_of_each_pass_are_those_of_the_run(planned: tuple[Plan, report.Report, Path]) -> None:
    plan, run, _ = planned
    assert [(step.bytes_before, step.bytes_after) for step in plan.passes] == [
        (step.bytes_before, step.bytes_after) for step in run.steps
    ]
    assert plan.passes[0].bytes_after < plan.passes[0].bytes_before
    assert plan.passes[1].bytes_after < plan.passes[1].bytes_before


def test_bytes_by_role_are_those_of_the_run_and_add_up(planned: tuple[Plan, report.Report, Path]) -> None:
    plan, run, _ = planned
    assert plan.roles == run.roles
    assert plan.bytes_before == sum(entry.before for entry in plan.roles) == plan.passes[0].bytes_before
    assert plan.bytes_after == sum(entry.after for entry in plan.roles) == plan.passes[-1].bytes_after


def test_the_files_size_is_foretold_within_1_percent(planned: tuple[Plan, report.Report, Path]) -> None:
    plan, run, _ = planned
    (file,), (row,) = plan.files, run.rows
    assert row.size_bytes is not None
    assert file.size_bytes == pytest.approx(row.size_bytes, rel=0.01)
    assert file.float_size_bytes is not None
    assert file.float_size_bytes > 2 * file.size_bytes


def test_the_places_are_those_that_the_run_touched(planned: tuple[Plan, report.Report, Path]) -> None:
    plan, run, _ = planned
    drop, quantize = plan.passes
    assert [path for group in drop.sites for path in group.paths] == run.steps[0].report["blocks"] == ["blocks.1"]
    touched = {path for group in quantize.sites for path in group.paths}
    assert touched == set(run.steps[1].report["sites"])
    assert {group.pattern: len(group.paths) for group in quantize.sites}["blocks.*.mlp.fc1"] == 3
    assert (drop.calibration_rows, quantize.calibration_rows) == (0, 32)


def test_sums_add_up(planned: tuple[Plan, report.Report, Path]) -> None:
    plan, _, _ = planned
    assert all(moment.bytes == sum(term.bytes for term in moment.terms) for moment in plan.memory.parts)
    assert plan.memory.peak_bytes == max(moment.bytes for moment in plan.memory.parts)
    assert plan.disk.bytes == sum(term.bytes for term in plan.disk.terms)
    assert plan.disk.running_bytes == sum(term.bytes for term in plan.disk.running)
    assert not plan.disk.unknown


def test_disk_is_that_of_the_folder(tmp_path: Path, planned: tuple[Plan, report.Report, Path]) -> None:
    _, _, folder = planned
    told = compress.plan(recipe(tmp_path, DROP, QUANTIZE), evaluate=False).disk
    assert not any("evaluation" in term.name for term in (*told.terms, *told.running))
    assert told.bytes == pytest.approx(sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()), rel=0.1)


def test_what_stays_float_is_what_no_pass_touched(planned: tuple[Plan, report.Report, Path]) -> None:
    plan, _, _ = planned
    left = {part.role: part.bytes for part in plan.stays_float}
    after = {entry.role: entry.after for entry in plan.roles}
    assert left == {role: after[role] for role in ("other", "norm", "head", "embedding")}


def test_a_plan_is_json(planned: tuple[Plan, report.Report, Path]) -> None:
    plan, _, _ = planned
    assert Plan.model_validate_json(plan.model_dump_json()) == plan


def test_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = recipe(tmp_path, QUANTIZE)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    before = sorted(tmp_path.rglob("*"))
    compress.plan(path)
    assert sorted(tmp_path.rglob("*")) == before


def arrays(folder: Path) -> str:
    generator = np.random.default_rng(0)
    np.savez(folder / "rows.npz", pixels=generator.random((16, 1, 8, 8), dtype=np.float32))
    return "{format: arrays, calibration: {path: rows.npz, rows: all}, evaluation: {path: held-out.npz}}"


def test_evaluation_data_may_be_absent_and_that_is_said(tmp_path: Path) -> None:
    path = recipe(tmp_path, QUANTIZE, data=arrays(tmp_path))
    plan = compress.plan(path)
    assert plan.evaluation == "held-out.npz"
    assert [warning.startswith(f"{path}:2:") and "held-out.npz" in warning for warning in plan.warnings] == [True]
    assert plan.disk.unknown


def test_evaluation_data_is_not_opened(tmp_path: Path) -> None:
    path = recipe(tmp_path, QUANTIZE, data=arrays(tmp_path))
    (tmp_path / "held-out.npz").write_bytes(b"not an npz file")
    assert compress.plan(path).warnings == []
    with pytest.raises(UserError, match=r"held-out\.npz|npz"):
        compress.apply(path, tmp_path / "out")


@pytest.mark.parametrize("carried_out", [False, True], ids=["plan", "apply"])
def test_a_name_that_the_first_pass_takes_away_is_found_before_anything_is_calibrated(
    carried_out: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("calibrated")

    monkeypatch.setattr("compress.quantization.calibrated_inputs.capture", never)
    path = recipe(tmp_path, DROP, "quantize: {sites: [blocks.3.mlp.fc1]}")
    with pytest.raises(UserError) as caught:
        compress.apply(path, tmp_path / "out") if carried_out else compress.plan(path)
    assert str(caught.value).startswith(f"{path}:5:")
    assert "'blocks.3.mlp.fc1' matches nothing" in str(caught.value)
    assert "blocks.2.mlp.fc1" in caught.value.hint
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_the_same_name_is_there_without_the_first_pass(tmp_path: Path) -> None:
    plan = compress.plan(recipe(tmp_path, "quantize: {sites: [blocks.3.mlp.fc1]}"), evaluate=False)
    assert plan.passes[0].sites[0].paths == ["blocks.3.mlp.fc1"]


def test_asymmetric_activations_are_refused_for_tensorrt_with_the_reason(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="needs the extra tensorrt-rtx")
    asymmetric = "quantize: {activation_symmetric: false}"
    path = recipe(tmp_path, DROP, asymmetric, export="[onnx: {openvino: false}, tensorrt]")
    with pytest.raises(UserError) as caught:
        compress.plan(path)
    assert str(caught.value).startswith(f"{path}:5:")
    assert "tensorrt cannot carry" in caught.value.what
    assert "activation codes are asymmetric, and TensorRT takes symmetric ones only" in caught.value.what
    assert compress.plan(recipe(tmp_path, DROP, asymmetric), evaluate=False).files[0].format == "onnx"


def test_work_on_layers_that_a_later_pass_takes_out_is_said(tmp_path: Path) -> None:
    plan = compress.plan(recipe(tmp_path, QUANTIZE, DROP), evaluate=False)
    assert len(plan.warnings) == 1
    assert "drop_layers takes out 4 layers that quantize before it has changed and calibrated" in plan.warnings[0]
    assert compress.plan(recipe(tmp_path, DROP, QUANTIZE), evaluate=False).warnings == []


def test_skipped_places_are_told_with_the_reason(tmp_path: Path) -> None:
    plan = compress.plan(recipe(tmp_path, "quantize: {skip: ['blocks.0.*']}"), evaluate=False)
    skipped = [(path, group.action) for group in plan.passes[0].skipped for path in group.paths]
    assert ("blocks.0.mlp.fc1", "named under skip") in skipped
    assert not {path for path, _ in skipped} & {path for group in plan.passes[0].sites for path in group.paths}


def test_the_command_fits_80_columns_and_gives_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], planned: tuple[Plan, report.Report, Path]
) -> None:
    path = recipe(tmp_path, QUANTIZE)
    monkeypatch.setattr(sys, "argv", ["compress", "plan", str(path), "--json", "--no-evaluation"])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert not left.value.code
    assert json.loads(capsys.readouterr().out)["passes"][0]["name"] == "quantize"
    from rich.console import Console

    console = Console(width=80, force_terminal=False, highlight=False)
    with console.capture() as captured:
        for part in plan_table.render(planned[0]):
            if not isinstance(part, str):
                terminal.print_table(console, part)
    lines = captured.get().splitlines()
    assert any("blocks.*.attn.qkv" in line for line in lines)
    assert not any("…" in line for line in lines)


class Lock(nn.Module):
    """Holds what cannot be copied."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 3)
        self.again = self.inner
        self.guard = threading.Lock()


def test_a_stand_in_shares_tensors_and_nothing_else() -> None:
    model = Lock()
    copy = stand_in(model)
    assert copy.inner is copy.again
    assert copy.inner is not model.inner
    assert copy.inner.weight is model.inner.weight
    assert copy.guard is model.guard
    copy.inner = nn.Identity()
    assert isinstance(model.inner, nn.Linear)


def tied() -> tuple[nn.Module, object, list[dict[str, torch.Tensor]]]:
    transformers = pytest.importorskip("transformers", reason="needs the extra hf")
    from calibrate.signature import Signature, TensorSpec

    config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=32, vocab_size=60, n_positions=16, use_cache=False)
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config).eval().requires_grad_(False)
    signature = Signature((TensorSpec("input_ids", torch.int64, ("batch", "tokens")),), output="logits")
    return model, signature, [{"input_ids": torch.randint(60, (4, 16))}]


def test_a_rehearsal_ties_what_a_run_ties() -> None:
    model, signature, rows = tied()
    step = known_passes()["quantize"](embeddings=8, smooth=False)
    anatomy = find(model, signature, rows[0])
    before = inventory(model)
    rehearsed, surgery = stand_in(model), Surgery()
    step.rehearse(rehearsed, anatomy, surgery)
    assert inventory(model) == before
    context = Context(signature, anatomy, lambda: iter(rows), Surgery())
    step.run(model, context)
    assert inventory(rehearsed) == inventory(model)
    assert rehearsed.lm_head.quantized_weight is rehearsed.transformer.wte.quantized_weight
    assert [edit.json() for edit in surgery.edits] == [edit.json() for edit in context.edits]
