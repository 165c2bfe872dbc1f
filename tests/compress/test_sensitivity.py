"""What single sites lose: the same as when a run quantizes that site alone; told as a table, as JSON and as a page."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from calibrate.fidelity import sqnr_db
from calibrate.signature import Batch, Signature, TensorSpec
from compress import cli, measured_pass
from compress.anatomy import find
from compress.embedded import digits_model, digits_rows
from compress.passes.contract import Context, Pass
from compress.passes.drop_layers import DropLayers
from compress.passes.merge_tokens import MergeTokens
from compress.passes.quantize import Quantize
from compress.quantization.bit_groups import bit_groups
from compress.quantization.sensitivity import Sensitivity, decibels, measure
from compress.quantization.site_options import SiteOptions
from compress.rehearsal import stand_in
from compress.surgery import Surgery

DIGITS = Signature((TensorSpec("pixels", torch.float32, ("batch", 1, 8, 8)),))
CANDIDATES = (8, SiteOptions(weights=8, activations="none"), 4, "float")


def subject() -> tuple[nn.Module, Context, list[Batch]]:
    model, rows = digits_model().eval(), list(digits_rows("calibration", 80).batches(16))
    anatomy = find(model, DIGITS, {name: tensor[:2] for name, tensor in rows[0].items()})
    return model, Context(DIGITS, anatomy, lambda: iter(rows), Surgery(), seed=3), rows


def measured(step: Quantize, rows: int = 1000) -> tuple[nn.Module, Context, list[Batch], Sensitivity]:
    model, context, batches = subject()
    groups, _ = bit_groups(step, model, context.anatomy, CANDIDATES)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = measure(step, model, context, groups, rows)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not context.edits
    return model, context, batches, found


@pytest.mark.parametrize("options", [{}, {"rounding": "gptq"}], ids=str)
def test_it_is_what_a_run_loses_that_quantizes_the_site_alone(options: dict[str, Any]) -> None:
    step = Quantize(sites=["*"], smooth=False, overrides={"*": 8}, **options)
    free = step.model_copy(update={"overrides": {}, "mixed": None})
    model, context, rows, found = measured(free)
    for path in ("patch_embed", "blocks.1.mlp.fc2"):
        losses = next(loss for group, loss in zip(found.groups, found.losses, strict=True) if group.name == path)
        for name, choice in (("8", 8), ("8 weights only", CANDIDATES[1]), ("4", 4)):
            alone = step.model_copy(update={"sites": [path], "overrides": {path: choice}})
            trial = stand_in(model)
            alone.run(trial, Context(DIGITS, context.anatomy, lambda: iter(rows), Surgery(), seed=3))
            with torch.inference_mode():
                outputs = [torch.cat([DIGITS.call(one, batch) for batch in rows]) for one in (model, trial)]
            db = decibels(losses[name].noise)
            assert db == pytest.approx(sqnr_db(*outputs), abs=0.05)
            kl = (outputs[0].softmax(-1) * (outputs[0].log_softmax(-1) - outputs[1].log_softmax(-1))).sum(-1).mean()
            assert losses[name].kl == pytest.approx(float(kl), rel=0.05, abs=1e-6)
        assert losses["float"].noise == 0


def test_factors_that_are_folded_leave_the_reference_as_it_is() -> None:
    model, _, _, found = measured(Quantize(smooth=True))
    with torch.inference_mode():
        for batch, output in zip(found.reference.batches, found.reference.outputs, strict=True):
            assert sqnr_db(DIGITS.call(model, batch), output) > 100


def test_few_rows_are_spread_over_all_and_tell_nearly_the_same() -> None:
    step = Quantize(smooth=False)
    few, whole = measured(step, 20)[3], measured(step)[3]
    assert few.reference.rows == 20
    assert whole.reference.rows == 80
    for some, every in zip(few.losses, whole.losses, strict=True):
        assert decibels(some["4"].noise) == pytest.approx(decibels(every["4"].noise), abs=3)


def ran(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["compress", "sensitivity", *arguments])
    try:
        cli.main()
    except SystemExit as left:
        return int(left.code or 0)
    return 0


RECIPE = """
model: embedded:digits-vit
data: {format: embedded, calibration: {rows: 32}, evaluation: {}}
passes:
  - drop_layers: {blocks: [1]}
  - quantize: {sites: ["mlp.*"], mixed: {candidates: [8, 4, float], size_ratio: 0.5, rows: 16}}
export: [onnx]
"""


def test_the_command_prints_sorts_and_writes_a_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, page = tmp_path / "mixed.yaml", tmp_path / "mixed.html"
    recipe.write_text(RECIPE)
    assert ran(monkeypatch, str(recipe), "--json", "--quiet", "--html", str(page)) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["before"] == ["drop_layers"]
    assert found["settings"] == ["8", "4"]
    assert found["rows"] == 16
    assert [one["sites"][0] for one in found["sites"]][:2] == ["blocks.0.mlp.fc1", "blocks.0.mlp.fc2"]
    assert len(found["sites"]) == 6
    text = page.read_text("utf-8")
    assert "blocks.2.mlp.fc2" in text
    assert "http" not in text.split("<script", 1)[0].replace("http-equiv", "")
    assert ran(monkeypatch, str(recipe), "--by", "4", "--quiet") == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("blocks.")]
    at_4 = {one["sites"][0]: one["settings"]["4"]["db"] for one in found["sites"]}
    assert [line.split()[0] for line in lines] == sorted(at_4, key=at_4.__getitem__)


def test_bits_that_no_site_can_take_are_named_and_the_others_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "plain.yaml"
    plain = '{sites: ["blocks.0.mlp.*"], group_size: 48, overrides: {blocks.0.mlp.fc2: 8}}'  # 48 of 64 inputs
    mixed = '{sites: ["mlp.*"], mixed: {candidates: [8, 4, float], size_ratio: 0.5, rows: 16}}'
    assert mixed in RECIPE
    recipe.write_text(RECIPE.replace(mixed, plain))
    assert ran(monkeypatch, str(recipe), "--json", "--quiet", "--rows", "16") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["settings"] == ["8", "8 weights only", "4", "3", "2"]
    site, other = found["sites"]
    assert set(other["settings"]) == {"8"}
    assert set(site["settings"]) == {"8", "8 weights only"}
    assert set(site["refused"]) == {"4", "3", "2"}
    assert all("group_size 48 does not divide the 64 inputs" in reason for reason in site["refused"].values())
    assert found["uniform"]["4"] == {"bytes": found["bytes_before"], "predicted_db": None}
    assert ran(monkeypatch, str(recipe), "--quiet", "--rows", "16") == 0
    assert "blocks.0.mlp.fc1 cannot take 4: group_size 48" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "arguments", "says"),
    [
        (("  - quantize: {sites", "  # - quantize: {sites"), (), "no quantize pass"),
        (("[8, 4, float]", "[8, 4, 5]"), (), "candidates[2] is 5"),
        (('"mlp.*"', '"mlq.*"'), (), "mlq.*"),
        (('"mlp.*"]', '"mlp.*"], group_size: 48'), (), "Name a group_size that fits"),
        (("", ""), ("--by", "3"), "'3' is not a setting"),
        (("", ""), ("--html", "no/such/folder/page.html"), "cannot be written"),
    ],
    ids=str,
)
def test_mistakes_end_with_2_and_say_what(
    change: tuple[str, str],
    arguments: tuple[str, ...],
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    recipe = tmp_path / "mixed.yaml"
    recipe.write_text(RECIPE.replace(*change))
    assert ran(monkeypatch, str(recipe), "--quiet", *arguments) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("quantize", "arguments", "says"),
    [
        ("{}", ("--by", "5"), "There is: 8, 8 weights only, 4, 3, 2."),
        ("{engine: nncf}", (), "quantize: sites are measured as the own engine rounds them, and the recipe has engine: nncf"),
    ],
    ids=["by", "nncf"],
)
def test_what_cannot_be_told_is_refused_before_anything_is_loaded(
    quantize: str,
    arguments: tuple[str, ...],
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def loads(*_: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(measured_pass, "model_of", loads)
    recipe = tmp_path / "refused.yaml"
    recipe.write_text(RECIPE.split("  - drop_layers")[0] + f"  - quantize: {quantize}\nexport: [onnx]\n")
    assert ran(monkeypatch, str(recipe), "--quiet", *arguments) == 2
    assert says in capsys.readouterr().err


TOKENS = """
model: embedded:digits-vit
data: {format: embedded, calibration: {rows: 32}, evaluation: {}}
passes:
  - drop_layers: {blocks: [1]}
  - merge_tokens: {flops: 0.8}
  - quantize: {weights: 8, activations: none}
export: [onnx]
"""


def test_of_tokens_it_is_what_a_run_loses_whose_tokens_leave_at_that_block_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, page = tmp_path / "tokens.yaml", tmp_path / "tokens.html"
    recipe.write_text(TOKENS)
    assert ran(monkeypatch, str(recipe), "--pass", "merge_tokens", "--json", "--quiet", "--rows", "32", "--html", str(page)) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["before"], found["tokens"], found["rows"]) == (["drop_layers"], 17, 32)
    assert found["settings"] == ["90 %", "75 %", "50 %"]
    assert [one["block"] for one in found["blocks"]] == [0, 1, 2]
    assert all("at most 8 can go at once" in one["refused"]["25 %"] for one in found["blocks"])
    for one in found["blocks"]:
        flops = [one["settings"][name]["flops"] for name in found["settings"]]
        assert flops == sorted(flops, reverse=True)

    whole = subject()[0]
    before = copied(whole, DropLayers(blocks=[1]))
    after = copied(whole, DropLayers(blocks=[1]), MergeTokens(keep={1: 9}))
    rows = next(iter(digits_rows("calibration", 32).batches(32)))
    with torch.inference_mode():
        wanted = sqnr_db(DIGITS.call(before, rows), DIGITS.call(after, rows))
    told = next(one for one in found["blocks"] if one["block"] == 1)["settings"]["50 %"]
    assert told["kept"] == 9
    assert told["db"] == pytest.approx(wanted, abs=0.05)

    text = page.read_text("utf-8")
    assert "What each block loses alone" in text
    assert "no block can hand on 25 %" in text
    assert ran(monkeypatch, str(recipe), "--pass", "drop_layers", "--quiet") == 2
    assert "There is: merge_tokens, quantize." in capsys.readouterr().err
    assert ran(monkeypatch, str(recipe), "--pass", "merge_tokens", "--by", "8", "--quiet") == 2
    assert "There is: 90 %, 75 %, 50 %, 25 %." in capsys.readouterr().err


def copied(model: nn.Module, *steps: Pass) -> nn.Module:
    """A model after passes."""
    rows = list(digits_rows("calibration", 32).batches(16))
    model = stand_in(model)
    for step in steps:
        model = step.run(model, Context(DIGITS, find(model, DIGITS, rows[0]), lambda: iter(rows), Surgery(), seed=0))
    return model
