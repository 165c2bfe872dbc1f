"""The reader of recipes: what it accepts, what it refuses, and where it says the fault is."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from calibrate.errors import UserError
from compress.recipe import Recipe, RecipeError, parse_recipe, read

GOOD = """\
model: embedded:digits-vit
data:
  format: embedded
  calibration: {rows: 64}
  evaluation: {rows: all}
passes:
  - quantize: {weights: 8, activations: static}
export:
  - onnx
  - coreml: {precision: float32}
accept:
  metric_drop: 0.01
  onnx: {latency_ratio: 0.5}
  unvalidated: [tensorrt]
"""
TEXT = """\
model: {source: "hf:model", task: text-classification}
data:
  format: text
  columns: {text: sentence, label: 1}
  tokens: 64
  calibration: {path: train.tsv, rows: 64}
  evaluation: {path: dev.tsv}
passes: []
export: [onnx]
"""


def faults(text: str) -> dict[str, tuple[str, str]]:
    """``line:column`` -> (what, hint) of everything the reader refuses in a text."""
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text)
    return {f"{fault.line}:{fault.column}": (fault.what, fault.hint) for fault in caught.value.faults}


def values(recipe: Recipe) -> dict[str, Any]:
    """Every key of a recipe, the options of passes and exporters too."""
    return recipe.model_dump(mode="json")


def test_values_and_defaults() -> None:
    recipe = parse_recipe(GOOD, stem="my recipe")
    assert recipe.name == "my-recipe"
    assert recipe.model.source == "embedded:digits-vit"
    assert recipe.data.calibration.selection == 64
    assert recipe.data.evaluation is not None
    assert recipe.data.evaluation.selection == "all"
    assert [step.name for step in recipe.passes] == ["quantize"]
    assert [exporter.format for exporter in recipe.export] == ["onnx", "coreml"]
    assert recipe.accept.limit("latency_ratio", "onnx") == 0.5
    assert recipe.accept.limit("latency_ratio", "coreml") is None
    assert recipe.accept.limit("metric_drop", "onnx") == 0.01
    assert (recipe.seed, recipe.threads, recipe.measure.batch_sizes) == (0, 1, (1,))
    assert recipe.text == GOOD


def test_places_are_known_afterwards() -> None:
    recipe = parse_recipe(GOOD, where="my.yaml")
    assert recipe.place("passes", 0, "quantize", "activations") == "my.yaml:7:41"
    assert recipe.place("passes", 0, "quantize", "activations", key=True) == "my.yaml:7:28"
    assert recipe.place("passes", 0, "quantize", "not_written") == "my.yaml:7:15"
    assert recipe.place() == "my.yaml:1:1"


def test_read_takes_name_and_base_from_the_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(TEXT)
    recipe = read(path)
    assert (recipe.name, recipe.base) == ("mine", tmp_path)
    assert recipe.data.calibration.path is not None
    assert recipe.path(recipe.data.calibration.path) == tmp_path / "train.tsv"
    assert read(path, base=tmp_path / "elsewhere").base == tmp_path / "elsewhere"
    assert values(Recipe.read(path)) == values(recipe)


@pytest.mark.parametrize(
    ("written", "selection", "span"),
    [
        ("all", "all", (0, None)),
        ("5", 5, (0, None)),
        ("5, shuffle: false", (0, 5), (0, 5)),
        ("0-127", (0, 128), (0, 128)),
        ("{start: 3, count: 4}", (3, 7), (3, 7)),
    ],
)
def test_rows(written: str, selection: object, span: object) -> None:
    split = parse_recipe(TEXT.replace("rows: 64", f"rows: {written}")).data.calibration
    assert (split.selection, split.span) == (selection, span)


def test_short_and_long_forms_are_the_same() -> None:
    long = GOOD.replace("model: embedded:digits-vit", 'model: {source: "embedded:digits-vit"}').replace("- onnx", "- onnx: {}")
    assert values(parse_recipe(long)) == values(parse_recipe(GOOD))
    assert values(parse_recipe(GOOD.replace("- onnx", "- onnx:"))) == values(parse_recipe(GOOD))


@pytest.mark.parametrize(
    ("old", "new", "place", "what", "hint"),
    [
        ("weights: 8", "weigths: 8", "7:16", "unknown key 'weigths'", "Did you mean weights?"),
        ("weights: 8", "weights: 5", "7:25", "weights is 5, must be 2, 3, 4, 8 or fp8", "Bits"),
        ("weights: 8", "weights: true", "7:25", "weights is true, must be 2, 3, 4, 8 or fp8", ""),
        ("weights: 8", "weights: '8'", "7:25", "weights is '8', must be 2, 3, 4, 8 or fp8", ""),
        ("weights: 8", "group_size: '8'", "7:28", "must be an integer above 0", "Take it out of the quotes"),
        ("weights: 8", "group_size: 1.5", "7:28", "group_size is 1.5, must be an integer above 0", ""),
        ("weights: 8", "symmetric: yes", "7:27", "symmetric is 'yes', must be true or false", "Write true."),
        ("static", "sttic", "7:41", "activations is 'sttic', must be static, dynamic or none", "Did you mean static?"),
        ("quantize:", "quantise:", "7:5", "'quantise' is not the name of a pass", "Did you mean quantize?"),
        ("- onnx", "- onyx", "9:5", "'onyx' is not the name of an exporter", "Did you mean onnx?"),
        ("float32", "float8", "10:25", "precision is 'float8', must be float16 or float32", "Did you mean"),
        ("{rows: 64}", "{rows: 0}", "4:23", "rows is 0, must be", ""),
        ("{rows: 64}", "{rows: 1e3}", "4:23", "rows is 1000.0, must be", ""),
        ("{rows: 64}", "{rows: 64, path: x}", "4:27", "embedded data has no path", ""),
        ("metric_drop: 0.01", "metric_drop: 1 %", "12:16", "metric_drop is '1 %', must be a number", "units"),
        ("metric_drop: 0.01", "metric_dorp: 0.01", "12:3", "unknown key 'metric_dorp'", "Did you mean metric_drop?"),
        ("{latency_ratio: 0.5}", "0.5", "13:9", "onnx is 0.5, must be a mapping with metric_drop", ""),
        ("[tensorrt]", "tensorrt", "14:16", "unvalidated is 'tensorrt', must be a list", ""),
        ("[tensorrt]", "[tensort]", "14:17", "unvalidated[0] is 'tensort'", "Did you mean tensorrt?"),
        ("format: embedded", "format:", "3:10", "format is empty", ""),
        ("  format: embedded\n", "", "2:1", "format is missing", "Add `format:`"),
        ("embedded:digits-vit", "bert", "1:8", "model is 'bert', must be text such as hf:path", ""),
        ("data:\n", "data: 5\nx:\n", "2:7", "data is 5, must be a mapping with format", ""),
        ("- coreml:", "- onnx\n  - coreml:", "10:5", "onnx is listed twice", "keep one"),
        ("  onnx: {l", "  tensorrt: {l", "13:3", "limits for tensorrt, which is not exported", ""),
        ("  evaluation: {rows: all}\n", "", "10:1", "accept has limits that need evaluation rows", ""),
    ],
)
def test_a_fault_has_its_place_and_a_way_out(old: str, new: str, place: str, what: str, hint: str) -> None:
    assert old in GOOD
    found = faults(GOOD.replace(old, new, 1))
    assert place in found, found
    assert what in found[place][0]
    assert hint in found[place][1]


@pytest.mark.parametrize(
    ("old", "new", "place", "what"),
    [
        ("hf:model", 'hf:model", checkpoint: "w.pt', "1:29", "checkpoint goes with a timm model only"),
        ("train.tsv", "~/train.tsv", "6:23", "begins with ~"),
        ("train.tsv", "''", "6:23", "a path is empty"),
        ("{path: train.tsv, rows: 64}", "{rows: 64}", "6:3", "calibration has no path"),
        ("  tokens: 64\n", "", "2:1", "tokens is missing"),
        ("text: sentence", "label: sentence", "4:30", "'label' appears twice"),
        ("text: sentence, ", "", "2:1", "columns does not say where the text is"),
        ("text: sentence", "texts: sentence", "4:13", "unknown key 'texts'"),
        ("label: 1", "label: 1.5", "4:36", "label is 1.5, must be text or an integer"),
        ("tokens: 64", "tokens: 64\n  image_size: 3", "6:3", "image_size does not go with format text"),
        ("rows: 64", "rows: 9-3", "6:34", "ends before it begins"),
        ("rows: 64", "rows: 0-3, shuffle: true", "6:45", "shuffle goes with a count"),
        ("dev.tsv}", "./train.tsv}\n  strict_splits: true", "7:3", "evaluation reads rows that calibration reads"),
    ],
)
def test_keys_that_do_not_go_together(old: str, new: str, place: str, what: str) -> None:
    assert old in TEXT
    found = faults(TEXT.replace(old, new, 1))
    assert place in found, found
    assert what in found[place][0]


@pytest.mark.parametrize(
    ("calibration", "evaluation", "apart"),
    [
        ("0-9", "10-19", True),
        ("0-9", "9-19", False),
        ("10-19", "0-9", True),
        ("0-9", "all", False),
        ("all", "0-9", False),
        ("64", "0-9", True),
        ("64", "all", False),
        ("64", "64", True),
        ("64, shuffle: false", "{start: 64, count: 5}", True),
        ("64, shuffle: false", "{start: 63, count: 5}", False),
    ],
)
def test_strict_splits_of_one_file_must_not_meet(calibration: str, evaluation: str, apart: bool) -> None:
    """Where the seed draws the rows it is known when they are read."""
    text = TEXT.replace("rows: 64", f"rows: {calibration}").replace("{path: dev.tsv}", f"{{path: train.tsv, rows: {evaluation}}}")
    strict = text.replace("  tokens: 64\n", "  tokens: 64\n  strict_splits: true\n")
    parse_recipe(text)
    if apart:
        parse_recipe(strict)
    else:
        assert "8:3" in faults(strict)


def test_all_faults_come_at_once_in_the_order_of_the_file() -> None:
    text = GOOD.replace("weights: 8", "weigths: 8").replace("rows: 64", "rows: -1").replace("- onnx", "- onyx")
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text + "sede: 1\nseed: x\n", where="r.yaml")
    places = [(fault.line, fault.column) for fault in caught.value.faults]
    assert places == [(4, 23), (7, 16), (9, 5), (15, 1), (16, 7)]
    lines = str(caught.value).split("\n")
    assert lines[0].startswith("r.yaml:4:23: rows is -1")
    assert lines[1].startswith("  ")


def test_a_fault_in_a_union_is_told_once_and_at_the_item() -> None:
    found = faults(GOOD + "measure: {batch_sizes: [1, 0, x]}\n")
    assert set(found) == {"15:28", "15:31"}
    found = faults(TEXT.replace("tokens: 64", "tokens: 64\n  mean: [0.5, '0.5']"))
    assert set(found) == {"6:15"}


def test_a_check_over_several_options_has_the_place_of_the_pass() -> None:
    found = faults(GOOD.replace("weights: 8", "granularity: tensor, group_size: 8"))
    assert list(found) == ["7:15"]


def test_files_that_are_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        read(tmp_path / "absent.yaml")
    with pytest.raises(UserError, match="is a folder"):
        read(tmp_path)
    (tmp_path / "large.yaml").write_text("# x\n" * 100_000)
    with pytest.raises(UserError, match=r"large\.yaml:1:1: 400000 bytes is too large"):
        read(tmp_path / "large.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"# a\nname: caf\xe9\n")
    with pytest.raises(UserError, match=r"latin\.yaml:2:10: byte 0xe9 is not UTF-8"):
        read(tmp_path / "latin.yaml")
    (tmp_path / "dangling.yaml").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no such file"):
        read(tmp_path / "dangling.yaml")
    os.mkfifo(tmp_path / "pipe.yaml")
    with pytest.raises(UserError, match="not a regular file"):
        read(tmp_path / "pipe.yaml")


def test_a_byte_order_mark_and_windows_line_ends_are_text(tmp_path: Path) -> None:
    (tmp_path / "windows.yaml").write_bytes(b"\xef\xbb\xbf" + GOOD.replace("\n", "\r\n").encode())
    assert values(read(tmp_path / "windows.yaml")) == values(parse_recipe(GOOD, stem="windows"))
