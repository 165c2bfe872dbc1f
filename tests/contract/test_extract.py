"""``compress extract``: from one run with sorted units smaller models, judged as any run, and what it refuses."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import compress
from calibrate.errors import UserError
from compress import cli
from compress.recipe import parse_recipe, read
from compress.run import apply
from compress.width import nested

pytest.importorskip("onnxruntime", reason="needs the extra onnx")

RECIPE = """\
# sorted, then INT8
name: digits
model: embedded:digits-vit
data: {format: embedded, calibration: {rows: 32}, evaluation: {rows: 0-49}}
passes:
  - drop_layers: {mlp: [1]}
  - nest_widths: {rows: 16}
  - quantize: {weights: 8, activations: static}
export:
  - onnx: {openvino: false}
accept: {metric_drop: 0.5, size_ratio: 0.9}
measure: {repeats: 3, warmup: 0}
"""

Told = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a recipe and its finished run."""
    folder = tmp_path_factory.mktemp("extract")
    (folder / "r.yaml").write_text(RECIPE)
    apply(read(folder / "r.yaml"), folder / "runs/digits")
    return folder


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Told:
    """Runs a command; its exit code, output and errors."""

    def run(*words: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["compress", *map(str, words)])
        with pytest.raises(SystemExit) as left:
            cli.main()
        said = capsys.readouterr()
        return int(left.value.code or 0), said.out, said.err

    return run


def test_the_run_keeps_its_sorted_float_model(home: Path) -> None:
    run = home / "runs/digits"
    found = nested.read(run, whole=True)
    assert [(one.block, one.kind) for one in found.units if one.kind == "neuron"] == [(0, "neuron"), (2, "neuron"), (3, "neuron")]
    files = json.loads((run / "manifest.json").read_text())["files"]
    assert {"nested/model.safetensors", "nested/widths.json", "model.safetensors"} <= set(files)
    assert files["nested/model.safetensors"]["bytes"] > 2 * files["model.safetensors"]["bytes"], (
        "the one is float, the other INT8"
    )
    assert found.model_sha256 == files["nested/model.safetensors"]["sha256"]


@pytest.mark.slow
def test_it_is_a_run_like_any_other(home: Path, told: Told) -> None:
    run = home / "runs/digits"
    code, out, _ = told("extract", run, "--width", "0.5", "--quiet")
    assert code == 0, out
    made = home / "runs/digits-w0.5"
    assert out.strip().endswith(str(made))
    report = json.loads((made / "report.json").read_text())
    assert [step["name"] for step in report["steps"]] == ["extract_width", "quantize"]
    assert {entry["stay"] for entry in report["steps"][0]["report"]["gone"] if entry["kind"] == "neuron"} == {128}
    whole = json.loads((run / "report.json").read_text())
    assert [row["label"] for row in report["rows"]] == [row["label"] for row in whole["rows"]]
    assert report["rows"][0]["metric"] == whole["rows"][0]["metric"], "judged against the same float model on the same rows"
    sizes = [next(row["size_ratio"] for row in one["rows"] if row["label"] == "onnx") for one in (report, whole)]
    assert sizes[0] < 0.8 * sizes[1]
    assert (made / "report.html").is_file()
    assert (made / "onnx/README.md").is_file()
    assert "made from another" not in out
    code, out, _ = told("validate", made, "--quiet")
    assert code == 0, out
    assert "all 50 evaluation rows" in out


@pytest.mark.slow
def test_the_saved_model_needs_the_sorted_one_no_more(home: Path, tmp_path: Path) -> None:
    made = tmp_path / "made"
    report = compress.extract(home / "runs/digits", made, macs=0.6, repair=True)
    assert report.met
    assert report.steps[0].report["kept_share"] <= 0.6
    assert "sqnr_after_db" in report.steps[0].report["repair"]
    loaded = compress.load(shutil.copytree(made, tmp_path / "elsewhere"))
    assert loaded(torch.zeros(2, 1, 8, 8)).isfinite().all()


def test_all_of_it_gives_the_files_of_the_run(home: Path, tmp_path: Path) -> None:
    compress.extract(home / "runs/digits", tmp_path / "made", width=1, evaluate=False)
    assert (tmp_path / "made/onnx/model.onnx").read_bytes() == (home / "runs/digits/onnx/model.onnx").read_bytes()


def test_the_recipe_can_be_planned_and_run_by_itself(home: Path, tmp_path: Path, told: Told) -> None:
    text = "\n".join(line for line in RECIPE.splitlines() if "drop_layers" not in line).replace(
        "nest_widths: {rows: 16}", "extract_width: {run_folder: runs/digits, widths: [1, 0.5, 0.25]}"
    )
    (home / "small.yaml").write_text(text.replace("name: digits", "name: small"))
    code, out, _ = told("plan", home / "small.yaml", "--quiet", "--json")
    assert code == 0
    planned = json.loads(out)
    assert planned["passes"][0]["bytes_after"] < planned["passes"][0]["bytes_before"]
    code, _, errors = told("apply", home / "small.yaml", "--out", tmp_path / "small", "--quiet")
    assert code == 0, errors
    report = json.loads((tmp_path / "small/report.json").read_text())
    assert report["steps"][0]["bytes_after"] == planned["passes"][0]["bytes_after"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--width 0.5 --out {run}", "is the run that is cut from"),
        ("--width wide", r"--width: 'wide' is not a number"),
        ("--width 0.5,0.25", r"--width: takes one number, not 2\n  .*--widths"),
        ("--width 0", "--width: 0.0: "),
        ("--width nan", "--width: nan: "),
        ("--heads 1.5", "--heads: 1.5: "),
        ("--widths 1,0,1", "--widths: 0.0: "),
        ("--widths 1,0.5", "widths has 2 numbers, and 3 blocks have sorted neurons"),
        ("--width 0.01", "less than 16 neurons of the 256 in block 0\n  Ask for 0.0625 or more"),
        ("--macs 0.01", "less than what stays in any case"),
        ("--width 0.5 --macs 0.5", "name one of"),
        ("--round-to 0 --width 0.5", "--round-to"),
        ("", "nothing says how wide"),
    ],
)
def test_wrong_widths_end_in_one_line_and_write_nothing(home: Path, told: Told, words: str, says: str) -> None:
    before = set((home / "runs").rglob("*"))
    code, out, errors = told("extract", home / "runs/digits", *words.format(run=home / "runs/digits").split(), "--quiet")
    assert code == 2
    assert re.fullmatch(r"\S[^\n]*: \S[^\n]*\n  \S[^\n]*\n", errors), errors
    assert re.search(says, errors), errors
    assert out == ""
    assert set((home / "runs").rglob("*")) == before


def test_runs_that_cannot_be_cut_are_refused(home: Path, told: Told, tmp_path: Path) -> None:
    def refused(folder: Path, says: str) -> None:
        code, _, errors = told("extract", folder, "--width", "0.5", "--quiet")
        assert code == 2
        assert re.search(says, errors), errors
        assert len(errors.splitlines()) == 2

    plain = "\n".join(line for line in RECIPE.splitlines() if "nest_widths" not in line)
    apply(parse_recipe(plain, base=tmp_path), tmp_path / "plain", evaluate=False)
    refused(tmp_path / "plain", "holds no sorted model\n  Put `- nest_widths` into the passes")
    refused(tmp_path, "is not the folder of a finished run")
    copy = Path(shutil.copytree(home / "runs/digits", tmp_path / "runs/digits"))
    (copy / "nested/widths.json").write_text("{")
    refused(copy, "is damaged: it is not JSON\n  Run the recipe again")
    shutil.copy(home / "runs/digits/nested/widths.json", copy / "nested/widths.json")
    content = (copy / "nested/model.safetensors").read_bytes()
    (copy / "nested/model.safetensors").unlink()
    (copy / "nested/model.safetensors").write_bytes(content[:-4])
    refused(copy, "its hash differs")


def test_what_the_run_was_made_of_must_be_there(home: Path, tmp_path: Path, told: Told) -> None:
    (tmp_path / "mine.py").write_text(
        "from compress.embedded import digits_model\nimport torch\n\n"
        "def make():\n    return digits_model(), {'pixels': torch.rand(2, 1, 8, 8)}\n"
    )
    text = RECIPE.replace("embedded:digits-vit", "mine.py:make").replace("  - drop_layers: {mlp: [1]}\n", "")
    (tmp_path / "mine.yaml").write_text(text.replace("name: digits", "name: mine"))
    apply(read(tmp_path / "mine.yaml"), tmp_path / "runs/mine", trust=True, evaluate=False)
    code, _, errors = told("extract", tmp_path / "runs/mine", "--width", "0.5", "--quiet")
    assert code == 2
    assert "--trust" in errors
    (tmp_path / "mine.py").rename(tmp_path / "theirs.py")
    code, _, errors = told("extract", tmp_path / "runs/mine", "--width", "0.5", "--quiet", "--trust")
    assert code == 2
    assert errors.startswith(f"the recipe of {tmp_path / 'runs/mine'}: ")
    assert "mine.py" in errors
    changed = (tmp_path / "theirs.py").read_text().replace("return digits_model()", "torch.manual_seed(0)\n    return other()")
    changed = changed.replace(
        "def make", "def other():\n    m = digits_model()\n    m.head.bias.data += 1\n    return m\n\ndef make"
    )
    (tmp_path / "mine.py").write_text(changed)
    with pytest.raises(UserError, match="made from another model"):
        compress.extract(tmp_path / "runs/mine", width=0.5, trust=True, evaluate=False)


def test_recipes_that_lose_a_sorted_model_are_refused() -> None:
    twice = RECIPE.replace("  - quantize", "  - nest_widths\n  - quantize")
    with pytest.raises(UserError, match="nest_widths is listed twice"):
        parse_recipe(twice)
    late = RECIPE.replace("nest_widths: {rows: 16}", "extract_width: {run_folder: runs/digits, width: 0.5}")
    with pytest.raises(UserError, match="extract_width begins with a saved model"):
        parse_recipe(late)
