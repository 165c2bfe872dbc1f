"""A whole run whose passes choose by validation rows: what its reports say of them, and what makes it another run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import compress
from calibrate.errors import UserError
from calibrate.fidelity import sqnr_db
from compress import planning
from compress.datasets import load_data
from compress.embedded import digits_rows
from compress.identity import identity
from compress.preparation import model_of
from compress.recipe import parse_recipe, read
from compress.run import apply

pytest.importorskip("onnxruntime", reason="needs the extra onnx")

RECIPE = """\
model: embedded:digits-vit
data: {format: embedded, calibration: {rows: 32}, validation: {rows: 96}, evaluation: {rows: 0-49}}
passes:
  - drop_layers: {accuracy_driven: true, tolerance: 0.1, evaluations: 12, heads: false}
  - topk_attention: {k: 8, accuracy_driven: true}
export:
  - onnx: {openvino: false}
measure: {repeats: 3, warmup: 1}
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("validated")
    (folder / "digits.yaml").write_text(RECIPE)
    apply(read(folder / "digits.yaml"), folder / "out")
    return folder / "out"


def told(run: Path, name: str) -> Any:
    return json.loads((run / name).read_text())


def test_report_and_manifest_name_the_rows(run: Path) -> None:
    rows = digits_rows("validation", 96)
    for name in ("report.json", "manifest.json"):
        data = told(run, name)["data"]
        assert data["validation"]["fingerprint"] == rows.fingerprint
        assert (data["validation"]["path"], data["validation"]["rows"]) == ("embedded:digits", 96)
        assert data["rows_in_validation_and_evaluation_by_content"] == 0
    for step in told(run, "report.json")["steps"]:
        chosen_by = step["report"]["accuracy_driven"]
        assert chosen_by["validation"]["fingerprint"] == rows.fingerprint
        assert chosen_by["end"]["loss"] <= chosen_by["start"]["loss"] * 1.1
    first, second = (step["report"]["accuracy_driven"] for step in told(run, "report.json")["steps"])
    assert second["start"]["loss"] == pytest.approx(first["end"]["loss"], rel=1e-5), "the second begins where the first ended"


def test_cards_and_page_say_that_labels_chose(run: Path) -> None:
    card = (run / "onnx" / "README.md").read_text()
    assert "96 validation rows of embedded:digits" in card
    assert told(run, "report.json")["data"]["validation"]["fingerprint"] in card
    assert "loss on the 96 validation rows that chose" in (run / "report.html").read_text()


def test_the_compressed_model_is_loaded_with_its_hard_attention(run: Path) -> None:
    model = compress.load(run)
    assert told(run, "report.json")["steps"][1]["report"]["hard"], "there is something to load"
    from safetensors.torch import load_file

    kept = load_file(run / "kept.safetensors")
    with torch.inference_mode():
        assert sqnr_db(kept["compressed"], model(kept["inputs.pixels"])) > 100


def test_other_validation_rows_make_another_run(tmp_path: Path) -> None:
    def of(text: str) -> dict[str, str]:
        recipe = parse_recipe(text, base=tmp_path)
        source = model_of(recipe, trust=False)
        return identity(recipe, source, load_data(recipe, source), tmp_path / "out", evaluate=True)

    one, same, other = (of(RECIPE.replace("96", rows)) for rows in ("96", "96", "97"))
    assert one == same
    assert {name for name in one if one[name] != other[name]} == {"the recipe", "the validation rows"}


def test_the_plan_shows_them(tmp_path: Path) -> None:
    plan = planning.make(parse_recipe(RECIPE, base=tmp_path))
    assert plan.validation == {"path": "embedded:digits", "rows": 96, "chosen": "96"}
    assert [step.validation_rows for step in plan.passes] == [96, 96]
    assert plan.passes[0].bytes_after == plan.passes[0].bytes_before, "nothing may go"


@pytest.mark.parametrize("name", ["drop_layers", "topk_attention"])
def test_a_recipe_without_validation_rows_is_refused_with_the_line_to_write(name: str) -> None:
    options = {"drop_layers": "{accuracy_driven: true}", "topk_attention": "{k: 2, accuracy_driven: true}"}[name]
    text = f"""\
model: hf:bert
data:
  format: text
  columns: {{text: s, label: l}}
  tokens: 12
  calibration: {{path: a.tsv, rows: all}}
passes: [{name}: {options}]
export: [onnx]
"""
    hint = r"Add to data: `validation: \{path: a.tsv, rows: 512\}`: labelled rows that are not evaluated"
    with pytest.raises(UserError, match=rf"^recipe.yaml:7:\d+: {name} chooses by validation rows, and data names none\n  {hint}"):
        parse_recipe(text)
