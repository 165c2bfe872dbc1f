"""``measure: each_pass`` and ``undo: unpaid``, as a user meets them: what is weighed, kept, taken back, and taken over."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import EntryPoint
from math import prod
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from pydantic import Field
from sweeps import swept
from torch import nn

from calibrate.fidelity import agreement, sqnr_db
from compress import each_pass
from compress.anatomy import Anatomy
from compress.datasets import load_data
from compress.journal import Journal
from compress.passes import Context, Pass, Target
from compress.recipe import read
from compress.report import Report
from compress.report import read as read_report
from compress.run import apply
from compress.sources import load_model
from export.validate import run_rows

pytest.importorskip("onnxruntime", reason="needs the extra onnx")

DATA = """\
model: embedded:digits-vit
data: {format: embedded, calibration: {rows: 32}, evaluation: {rows: 0-149}}
export:
  - onnx: {openvino: false, dynamic: [], batch: 10}
"""
EACH = "measure: {when: each_pass, batch_sizes: [10], repeats: 3, warmup: 1}\n"
NOISE = "  - add_noise: {strength: 1.0}\n"
JITTER = "  - add_noise: {strength: 0.001, seeded: false}\n"
QUANTIZE = "  - quantize: {weights: 8, activations: static}\n"
DROP = "  - drop_layers: {blocks: [1]}\n"


class AddNoise(Pass):
    """Adds noise to all weights, which saves nothing: strong noise costs accuracy."""

    name: ClassVar[str] = "add_noise"
    source: ClassVar[str] = "a control"
    strength: float = Field(0.5, description="Standard deviation, in that of the weight.")
    seeded: bool = Field(True, description="Whether it draws by the run's seed, or from torch's own generator.")

    def targets(self, model: nn.Module, anatomy: Anatomy) -> list[Target]:
        return [Target(site.path, ", ".join(site.roles), "gets noise") for site in anatomy.sites]

    def run(self, model: nn.Module, context: Context) -> nn.Module:
        generator = torch.Generator().manual_seed(context.seed) if self.seeded else None
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    noise = torch.randn(parameter.shape, generator=generator)
                    parameter.copy_(parameter + self.strength * parameter.std() * noise)
        return model


@pytest.fixture(autouse=True)
def _add_noise_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    _install(monkeypatch)


def _install(monkeypatch: pytest.MonkeyPatch) -> None:
    class Point(EntryPoint):
        def load(self) -> Any:
            return AddNoise

    point = Point("add_noise", "theirs:AddNoise", "compress.passes")
    monkeypatch.setattr("importlib.metadata.entry_points", lambda **_: (point,))
    monkeypatch.setattr("compress.identity._program", lambda recipe: [])  # a file that is edited meanwhile is not the matter
    monkeypatch.setattr("compress.run._companions", lambda run, told: None)  # cards and page have tests of their own


def ran(folder: Path, passes: str, rest: str = "", **options: Any) -> Report:
    folder.mkdir(exist_ok=True)
    path = folder / "digits.yaml"
    path.write_text(f"{DATA}passes:{' []' if not passes else ''}\n{passes}{rest}")
    return apply(read(path), folder / "out", **options)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Slightly moved by torch's own generator, then quantized; files written at the end."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        _install(monkeypatch)
        folder = tmp_path_factory.mktemp("plain")
        ran(folder, JITTER + QUANTIZE)
    return folder / "out"


@pytest.fixture(scope="module")
def taken_back(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, with strong noise before and after, which is taken back."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        _install(monkeypatch)
        folder = tmp_path_factory.mktemp("undone")
        ran(folder, NOISE + JITTER + QUANTIZE + NOISE, EACH + "undo: unpaid\n")
    return folder / "out"


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Quantized alone, and judged."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        _install(monkeypatch)
        folder = tmp_path_factory.mktemp("quantized")
        ran(folder, QUANTIZE, EACH)
    return folder / "out"


def same(first: Path, second: Path) -> bool:
    names = ("onnx/model.onnx", "model.safetensors", "kept.safetensors")
    return all((first / name).read_bytes() == (second / name).read_bytes() for name in names)


def test_a_pass_that_destroys_and_saves_nothing_is_taken_back(taken_back: Path) -> None:
    made = read_report(taken_back)
    first, moved, quantized, last = made.steps
    assert [(step.paid, step.undone) for step in made.steps] == [(False, True), (True, False), (True, False), (False, True)]
    for step in (first, last):
        assert step.says.endswith("It makes accuracy worse and brings neither size nor speed: taken back.")
        assert step.worth[0].drop is not None
        assert step.worth[0].drop.value > 0.05
    assert moved.says.endswith("It brings neither size nor speed, and costs nothing.")
    assert "brings size" in quantized.says
    assert made.rows[1].drop is not None
    assert made.rows[1].drop.value < 0.02


def test_what_was_taken_back_leaves_no_trace_in_the_files(taken_back: Path, plain: Path) -> None:
    assert same(taken_back, plain)
    assert not (taken_back / ".unfinished").exists()


def test_not_taken_back_it_does_not_pay_and_is_in_the_files(tmp_path: Path) -> None:
    made, out = ran(tmp_path, NOISE, EACH), tmp_path / "out"
    assert [(step.paid, step.undone) for step in made.steps] == [(False, False)]
    assert "it does not pay" in made.steps[0].says
    assert (out / "onnx/model.onnx").read_bytes() != (out / "baseline/onnx/model.onnx").read_bytes()
    assert made.blocks == made.steps[0].blocks
    assert all(block.sqnr_db is not None and block.sqnr_db < 15 for block in made.blocks)


def test_a_pass_that_shrinks_the_file_is_kept_though_it_costs(tmp_path: Path) -> None:
    made = ran(tmp_path, DROP + QUANTIZE, EACH + "undo: unpaid\n")
    dropped, quantized = made.steps
    assert (dropped.paid, dropped.undone) == (True, False)
    assert dropped.worth[0].drop is not None
    assert dropped.worth[0].drop.value > 0.05
    assert dropped.worth[0].size_ratio is not None
    assert dropped.worth[0].size_ratio < 0.8
    assert [block.gone for block in made.blocks] == [False, True, False, False]
    row = made.rows[1]
    assert prod(step.worth[0].size_ratio or 0.0 for step in made.steps) == pytest.approx(row.size_ratio)
    assert row.path == quantized.rows[0].path == "onnx/model.onnx"
    assert dropped.rows[0].path == "", "its file is gone"
    assert row.size_bytes == (tmp_path / "out" / row.path).stat().st_size
    assert dropped.worth[0].latency_ratio == max(latency.ratio or 0.0 for latency in dropped.rows[0].latency)
    assert quantized.worth[0].latency_low is not None, "timed against the file before it"
    assert sum(one.after for one in made.roles) == quantized.bytes_after
    assert sum(one.before for one in made.roles) == dropped.bytes_before


def test_with_every_pass_taken_back_the_files_are_the_float_ones(tmp_path: Path) -> None:
    made = ran(tmp_path, NOISE, EACH + "undo: unpaid\n")
    out = tmp_path / "out"
    assert made.steps[0].undone
    assert (out / "onnx/model.onnx").read_bytes() == (out / "baseline/onnx/model.onnx").read_bytes()
    assert [(block.sqnr_db, block.gone) for block in made.blocks] == [(None, False)] * 4
    assert [one.before for one in made.roles] == [one.after for one in made.roles]
    assert any(block.sqnr_db is not None for block in made.steps[0].blocks), "what the pass did is still told"


def test_the_worth_is_what_running_both_files_gives(quantized: Path) -> None:
    worth = read_report(quantized).steps[0].worth[0]
    recipe, out = read(quantized / "recipe.yaml"), quantized
    rows = load_data(recipe, load_model("embedded:digits-vit", base=out)).evaluation
    assert rows is not None
    batch = next(rows.batches(150))
    before = run_rows(recipe.export[0].open(out / "baseline/onnx/model.onnx", 1))(batch)
    after = run_rows(recipe.export[0].open(out / "onnx/model.onnx", 1))(batch)
    assert worth.sqnr_db == pytest.approx(sqnr_db(before, after), abs=0.01)
    assert worth.agreement is not None
    assert worth.agreement.value == agreement(before, after)
    assert rows.labels is not None
    right = [(outputs.argmax(1) == rows.labels).float().mean() for outputs in (before, after)]
    assert worth.drop is not None
    assert worth.drop.value == pytest.approx(float(right[0] - right[1]), abs=1e-6)


def test_measured_at_the_end_a_step_tells_what_it_changed(plain: Path) -> None:
    made = read_report(plain)
    step = made.steps[1]
    assert (step.worth, step.rows, step.paid, step.undone) == ([], [], None, False)
    assert (step.sites, len(made.blocks)) == (16, 4)  # four projections (of which one is fused) in each of four blocks
    assert step.says.endswith(f"{step.changed} tensors of 16 layers changed.")
    assert made.blocks == step.blocks
    assert all(block.sqnr_db is not None and 20 < block.sqnr_db < 70 for block in made.blocks)


def test_without_evaluation_it_is_said_that_nothing_was_measured(tmp_path: Path) -> None:
    made = ran(tmp_path, NOISE, EACH + "undo: unpaid\n", evaluate=False)
    assert made.warnings == ["measure: each_pass measured nothing, because evaluation was switched off"]
    assert (made.steps[0].paid, made.steps[0].undone, made.steps[0].worth) == (None, False, [])


class Interrupted(Exception):
    """Stands for whatever ends a run."""


@pytest.mark.parametrize(
    "where", swept(["pass 2 quantize", "worth of pass 2 quantize", "write onnx"], ["worth of pass 2 quantize"])
)
def test_a_decision_that_was_made_is_not_made_again(
    where: str, quantized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    part: Callable[..., Any] = Journal.part
    weighed: list[int] = []

    def counted(*given: Any) -> Any:
        weighed.append(len(weighed))
        return measured(*given)

    def interrupted(journal: Journal, name: str, kind: type[Any], make: Callable[[], Any], **options: Any) -> Any:
        def made() -> Any:
            found = make()
            if name == where:
                raise Interrupted  # the files of the part are there, its record is not
            return found

        return part(journal, name, kind, made, **options)

    measured = each_pass.measured
    monkeypatch.setattr(each_pass, "measured", counted)
    passes, rest = NOISE + QUANTIZE, EACH + "undo: unpaid\n"
    monkeypatch.setattr(Journal, "part", interrupted)
    with pytest.raises(Interrupted):
        ran(tmp_path, passes, rest)
    monkeypatch.setattr(Journal, "part", part)
    first = len(weighed)
    made = ran(tmp_path, passes, rest)
    assert len(weighed) == 2 + where.startswith("worth"), "what was weighed is not weighed again"
    assert sum(name.startswith("worth") for name in made.resumed) == first - where.startswith("worth")
    assert [step.undone for step in made.steps] == [True, False]
    assert same(tmp_path / "out", quantized)
