"""The whole way, as a user goes it: a recipe, a run folder, files that hold the model's integers, and what happens when
something is wrong on the way."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch

import compress
from calibrate.errors import UserError
from calibrate.fidelity import sqnr_db
from compress import report
from compress.datasets import load_data
from compress.promise import Promise
from compress.recipe import Accept, read
from compress.run import apply
from compress.saved import load
from compress.sources import load_model
from compress.validation import validate
from compress.verdict import verdict
from export.graph import Traceable

for library, extra in (("onnxruntime", "onnx"), ("coremltools", "coreml"), ("tensorrt_rtx", "tensorrt-rtx")):
    pytest.importorskip(library, reason=f"needs the extra {extra}")

RECIPE = """\
model: embedded:digits-vit
data: {format: embedded, calibration: {rows: 64}, evaluation: {rows: 0-149}}
passes:
  - quantize: {weights: 8, activations: static, reduce_range: pairs}
export:
  - onnx: {openvino: false}
  - coreml
  - tensorrt
accept: {metric_drop: 0.02, agreement: 0.95, sqnr_db: 20, size_ratio: 0.7, tensorrt: {size_ratio: 9}, unvalidated: [tensorrt]}
measure: {batch_sizes: [1, 4], repeats: 3, warmup: 1}
"""


def recipe_file(folder: Path, text: str = RECIPE) -> Path:
    path = folder / "digits.yaml"
    path.write_text(text)
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One run of the recipe; tests that change it copy it first."""
    folder = tmp_path_factory.mktemp("run")
    made = apply(read(recipe_file(folder)), folder / "out")
    assert made.exit_code == 0, [limit.says for limit in made.limits if not limit.met]
    return folder / "out"


def promised(run: Path) -> dict[str, Any]:
    saved = load_model("embedded:digits-vit", base=run)
    return Promise.of(Traceable(load(run), saved.signature, saved.example())).codes


def test_the_run_folder_has_its_fixed_names(run: Path) -> None:
    for name in (
        "recipe.yaml", "manifest.json", "model.safetensors", "onnx/model.onnx", "coreml/model.mlpackage",
        "tensorrt/model.engine", "report.json",
    ):  # fmt: skip
        assert (run / name).exists(), name
    assert not list(run.rglob("*.part"))


def test_the_report_follows_its_schema_and_has_a_row_for_each_file(run: Path) -> None:
    content = json.loads((run / "report.json").read_text())
    jsonschema.validate(content, report.schema())
    made = report.read(run)
    assert [row.label for row in made.rows] == ["float", "onnx", "coreml", "tensorrt"]
    for row in made.rows[1:]:
        assert row.metric is not None
        assert row.metric.rows == 150
        assert row.metric.low is not None
        assert row.metric.low <= row.metric.value <= (row.metric.high or 0)
        assert row.audit is not None
        assert row.audit.layers == row.audit.equal > 0
        assert row.sqnr_to_compressed_db is None or row.sqnr_to_compressed_db > (row.sqnr_db or 0)
    onnx, coreml, tensorrt = made.rows[1:]
    assert [latency.batch for latency in onnx.latency] == [1, 4]
    assert [row.validated for row in (onnx, coreml)] == ["runtime", "interpreter"]
    assert not coreml.latency, "an interpreter's time is no time"
    assert tensorrt.validated in ("proxy", "runtime")


def test_the_schema_in_the_package_is_the_one_of_the_report() -> None:
    stored = Path(report.__file__).with_name("report.schema.json")
    assert json.loads(stored.read_text()) == report.schema(), "python -m compress.report > compress/report.schema.json"


def test_every_file_holds_the_same_integers(run: Path) -> None:
    recipe = read(run / "recipe.yaml")
    model = promised(run)
    for exporter in recipe.export:
        codes = exporter.contents(run / exporter.filename).codes
        assert codes.keys() == model.keys()
        for path, expected in model.items():
            assert (codes[path] == expected).all(), (exporter.format, path)


def test_the_saved_model_gives_what_the_run_saw(run: Path, tmp_path: Path) -> None:
    recipe = read(run / "recipe.yaml")
    source = load_model("embedded:digits-vit", base=tmp_path)
    data = load_data(recipe, source)
    assert data.evaluation is not None
    batch = next(data.evaluation.batches(150))
    with torch.no_grad():
        reference, outputs = source.model(**batch), load(run)(**batch)
    made = report.read(run)
    assert made.compressed is not None
    assert sqnr_db(reference, outputs) == pytest.approx(made.compressed.sqnr_db, abs=0.5)
    assert sqnr_db(reference, outputs) < 80, "the saved model must be the compressed one"


def test_validating_again_gives_the_same_figures(run: Path) -> None:
    again, before = validate(run), report.read(run)
    assert again.exit_code == 0
    for old, new in zip(before.rows, again.rows, strict=True):
        assert (old.label, old.metric, old.sqnr_db, old.size_bytes) == (new.label, new.metric, new.sqnr_db, new.size_bytes)


def test_validating_without_the_data_uses_the_kept_rows(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "elsewhere"
    shutil.copytree(run, copy)
    arrays = "data: {format: arrays, calibration: {path: gone.npz}, evaluation: {path: gone2.npz}}"
    text = (copy / "recipe.yaml").read_text().splitlines()
    (copy / "recipe.yaml").write_text("\n".join([text[0], arrays, *text[2:]]))
    again = validate(copy)
    assert "kept rows" in again.data["validated_on"]
    assert [limit.line for limit in again.limits if not limit.met] == ["manifest"], "the recipe was changed, and it is said"
    assert again.rows[1].metric is not None
    assert 4 <= again.rows[1].metric.rows <= 64


def test_a_flipped_bit_in_a_file_is_found(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "flipped"
    shutil.copytree(run, copy)
    path = copy / "onnx" / "model.onnx"
    codes = next(iter(promised(run).values()))
    content = bytearray(path.read_bytes())
    where = max(content.find(codes.tobytes()), content.find(codes.T.tobytes()))
    assert where > 0
    content[where + 5] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"is not the file that the run wrote, and cannot be used .*does not hold the model's"):
        validate(copy)


def test_without_evaluation_nothing_is_claimed(tmp_path: Path) -> None:
    made = apply(read(recipe_file(tmp_path)), tmp_path / "out", evaluate=False)
    assert made.exit_code == 0
    assert [row.label for row in made.rows] == ["onnx", "coreml", "tensorrt"]
    assert all(row.validated == "none" and row.metric is None and row.sqnr_db is None for row in made.rows)
    assert all(row.audit is not None and row.audit.equal == row.audit.layers > 0 for row in made.rows)


def test_a_missed_contract_keeps_the_files_and_says_by_how_much(tmp_path: Path) -> None:
    text = (
        RECIPE.replace("sqnr_db: 20", "sqnr_db: 190")
        .replace("  - coreml\n  - tensorrt\n", "")
        .replace(", tensorrt: {size_ratio: 9}, unvalidated: [tensorrt]", "")
    )
    made = compress.apply(recipe_file(tmp_path, text), out=tmp_path / "out")
    missed = [limit for limit in made.limits if not limit.met]
    assert made.exit_code == 1
    assert [limit.line for limit in missed] == ["accept.sqnr_db"]
    assert "missed by" in missed[0].says
    assert (tmp_path / "out/onnx/model.onnx").exists()


@pytest.mark.parametrize(
    ("change", "place", "says"),
    [
        ("sites: [attention.qurey]", "quantize", "attention.query"),
        ("activations: dynamic", "quantize", "coreml"),
        ("activation_symmetric: false", "quantize", "tensorrt"),
        ("group_size: 48", "quantize", "48"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_runs(tmp_path: Path, change: str, place: str, says: str) -> None:
    text = RECIPE.replace("weights: 8, activations: static", f"weights: 8, {change}")
    with pytest.raises(UserError) as refused:
        apply(read(recipe_file(tmp_path, text)), tmp_path / "out")
    assert place in str(refused.value)
    assert says in str(refused.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "option", ["onnx: {dynamic: [batch, tokns]}", "coreml: {shapes: {tokns: [1, 8]}}", "tensorrt: {dynamic: [btch]}"]
)
def test_a_dimension_that_does_not_exist_is_refused_before_anything_runs(tmp_path: Path, option: str) -> None:
    head, _, tail = RECIPE.partition("  - onnx: {openvino: false}\n  - coreml\n  - tensorrt\n")
    tail = tail.replace(", tensorrt: {size_ratio: 9}", "")
    with pytest.raises(UserError, match=r"digits.yaml:6:\d+: .*no dimension"):
        apply(read(recipe_file(tmp_path, f"{head}  - {option}\n{tail}")), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_with_other_things_is_not_written_into(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="not a run folder"):
        apply(read(recipe_file(tmp_path)), tmp_path / "mine")


def row(**changed: Any) -> report.Row:
    drop = report.Figure(name="accuracy lost", value=0.01, rows=100)
    known: dict[str, Any] = {"label": "onnx", "format": "onnx", "validated": "runtime", "drop": drop, "sqnr_db": 25.0}
    return report.Row(**{**known, **changed})


def test_the_verdict_is_by_the_worst_batch_size_and_by_runtime() -> None:
    def latency(batch: int, ratio: float) -> report.Latency:
        return report.Latency(batch=batch, median_ms=1, low_ms=1, high_ms=1, runs=3, threads=1, processor="x", ratio=ratio)

    timed = row(latency=[latency(1, 0.3), latency(8, 0.6)])
    limits = verdict([timed], Accept(latency_ratio=0.5))
    assert [(limit.line, limit.met) for limit in limits] == [("accept.latency_ratio", False)]
    assert verdict([timed], Accept.model_validate({"latency_ratio": 0.5, "onnx": {"latency_ratio": 0.7}}))[0].met


def test_a_figure_that_a_limit_needs_and_that_is_missing_is_a_miss() -> None:
    assert not verdict([row(drop=None)], Accept(metric_drop=0.5))[0].met
    assert not verdict([row(validated="none", sqnr_db=None)], Accept(sqnr_db=5))[0].met


def test_a_file_that_was_not_run_misses_a_contract_that_does_not_permit_it() -> None:
    proxy = row(label="tensorrt", format="tensorrt", validated="proxy")
    assert [limit.line for limit in verdict([proxy], Accept(sqnr_db=5)) if not limit.met] == ["accept.unvalidated"]
    assert verdict([proxy], Accept(sqnr_db=5))[-1].says.endswith("accept.unvalidated can permit that")
    permitted = verdict([proxy], Accept(sqnr_db=5, unvalidated=("tensorrt",)))
    assert all(limit.met for limit in permitted)
    assert permitted[-1].says.endswith("accept.unvalidated permits that")
    assert verdict([proxy], Accept()) == [], "no contract"


def test_a_failed_check_is_a_miss() -> None:
    failed = report.Check(name="identical rows give identical outputs", passed=False, detail="3 dB")
    assert [limit.met for limit in verdict([row(checks=[failed])], Accept())] == [False]
    assert verdict([row(checks=[failed.model_copy(update={"passed": None})])], Accept()) == []
