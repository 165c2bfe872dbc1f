"""What ``fuse_layers`` takes out, what the neighbours learn, and what it refuses."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from trial import Trial, digits, tried

from calibrate.errors import UserError
from compress.anatomy import find
from compress.passes.drop_layers import DropLayers
from compress.passes.fuse_layers import FuseLayers
from compress.passes.quantize import Quantize

QUICK: dict[str, Any] = {"epochs": 3, "rank": 8, "rate": 1e-3}
EXAMPLE = FuseLayers(blocks=[1], **QUICK)


def on_digits(**options: Any) -> Trial:
    return tried(FuseLayers(**{**QUICK, **options}), *digits())


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def rounds(trial: Trial) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = trial.context.report["rounds"]
    return found


def test_the_digits_model_is_nearer_to_itself_than_by_dropping() -> None:
    trial = on_digits(blocks=[1], epochs=30, rate=3e-3)
    dropped = tried(DropLayers(blocks=[1]), *digits())
    assert trial.sqnr_db > dropped.sqnr_db + 3
    assert count(trial.after) == count(dropped.after)
    assert [type(module) for module in trial.after.modules()] == [type(module) for module in dropped.after.modules()]


@pytest.mark.parametrize(
    ("options", "left"), [({"ratio": 0.25}, 3), ({}, 3), ({"ratio": 0.3}, 2), ({"count": 3}, 1), ({"ratio": 0.0}, 4)]
)
def test_so_many_blocks_are_left(options: dict[str, Any], left: int) -> None:
    trial = on_digits(epochs=0, **options)
    assert len(trial.after.get_submodule("blocks")) == left  # type: ignore[arg-type]
    assert left == 4 - (options.get("count") or math.ceil(4 * options.get("ratio", 0.25)))
    assert len(set(trial.context.report["blocks"])) == 4 - left


def test_a_block_that_adds_nothing_goes_first_and_is_not_missed() -> None:
    model, signature, rows = digits()
    with torch.no_grad():
        for name in ("attn.proj", "mlp.fc2"):
            for parameter in model.get_submodule(f"blocks.2.{name}").parameters():
                parameter.zero_()
    trial = tried(FuseLayers(count=2, **QUICK), model, signature, rows)
    first = rounds(trial)[0]
    assert trial.context.report["blocks"][0] == "blocks.2"
    assert first["similarity_without"]["blocks.2"] == 1.0
    assert max(value for path, value in first["similarity_without"].items() if path != "blocks.2") < 1.0
    assert (first["kept"], first["because"]) == (False, "dropping changes nothing")
    assert first["training"]["best_step"] == 0
    one = tried(FuseLayers(count=1, **QUICK), model, signature, rows)
    assert torch.equal(one.outputs(one.after), one.outputs(model))


def test_influences_are_measured_anew_for_each() -> None:
    trial = on_digits(count=2, epochs=0)
    first, second = (told["similarity_without"] for told in rounds(trial))
    gone = rounds(trial)[0]["path"]
    assert first.keys() - second.keys() == {gone}
    assert gone == max(first, key=first.__getitem__)
    assert rounds(trial)[1]["path"] == max(second, key=second.__getitem__)
    assert all(first[path] != second[path] for path in second)


def test_a_wild_rate_ends_as_plain_dropping() -> None:
    trial = on_digits(blocks=[1], rate=50.0, coefficient_rate=50.0)
    dropped = tried(DropLayers(blocks=[1]), *digits())
    assert torch.equal(trial.outputs(trial.after), dropped.outputs(dropped.after))
    assert rounds(trial)[0]["because"] == "no step was better than dropping"


def test_the_loss_never_rises_and_what_is_kept_is_nearer() -> None:
    trial = on_digits(count=3, rate=3e-3, epochs=8)
    for told in rounds(trial):
        assert told["training"]["loss_after"] <= told["training"]["loss_before"]
        if told["kept"]:
            assert told["output_sqnr_db_fused"] > told["output_sqnr_db_dropped"]
    assert any(told["kept"] for told in rounds(trial))


def test_only_the_group_learns() -> None:
    trial = on_digits(blocks=[0], group=2)
    assert rounds(trial)[0]["group"] == ["blocks.0", "blocks.1"]
    assert rounds(trial)[0]["kept"]
    after = dict(trial.after.named_parameters())
    for name, parameter in trial.before.named_parameters():
        if not name.startswith("blocks."):
            assert torch.equal(after[name], parameter)
        elif (number := int(name.split(".")[1])) > 0:
            same = torch.equal(after[name.replace(f"blocks.{number}", f"blocks.{number - 1}", 1)], parameter)
            assert same == (number > 1 or "norm" in name)


def test_layers_of_another_shape_are_left_and_named() -> None:
    model, signature, rows = digits()
    narrow: Any = model.get_submodule("blocks.2.mlp")
    hidden = narrow.fc1.out_features - 4
    for name, axis in (("fc1", 0), ("fc2", 1)):
        layer = getattr(narrow, name)
        layer.weight = nn.Parameter(layer.weight.detach().narrow(axis, 0, hidden).clone())
    narrow.fc1.bias = nn.Parameter(narrow.fc1.bias.detach()[:hidden].clone())
    narrow.fc1.out_features = narrow.fc2.in_features = hidden
    trial = tried(FuseLayers(blocks=[1], **QUICK), model, signature, rows)
    (told,) = rounds(trial)
    assert sorted(told["not_injected"]) == ["blocks.2.mlp.fc1", "blocks.2.mlp.fc2"]
    assert "that of the block that goes" in told["not_injected"]["blocks.2.mlp.fc1"]
    assert told["kept"]
    assert torch.equal(trial.after.get_parameter("blocks.1.mlp.fc1.weight"), model.get_parameter("blocks.2.mlp.fc1.weight"))


def test_quantized_layers_are_left_and_named() -> None:
    model, signature, rows = digits()
    quantized = tried(Quantize(weights=8, activations="none"), model, signature, rows)
    trial = tried(FuseLayers(blocks=[1], **QUICK), quantized.after, signature, rows)
    (told,) = rounds(trial)
    assert told["injected"] == 0
    assert set(told["not_injected"].values()) == {"its weight is quantized, or gone"}
    assert (told["kept"], told["because"]) == (False, "no layer of its group has one of the same shape in the block that went")


def test_candidates_are_tried_and_the_nearest_result_stays() -> None:
    trial = on_digits(count=1, candidates=3, epochs=1)
    (told,) = rounds(trial)
    levels = {one["path"]: one["output_sqnr_db"] for one in told["tried"]}
    assert len(levels) == 3
    assert trial.context.report["blocks"] == [max(levels, key=levels.__getitem__)]
    assert trial.context.report["output_sqnr_db"] == pytest.approx(max(levels.values()), abs=1e-3)


def test_a_random_choice_is_seeded_and_reads_no_influence() -> None:
    found = [on_digits(count=2, epochs=0, score="random").context.report for _ in range(2)]
    assert found[0] == found[1]
    assert "similarity_without" not in found[0]["rounds"][0]


def test_progress_counts_every_step() -> None:
    model, signature, rows = digits()
    after, said = copy.deepcopy(model), []
    from compress.passes.contract import Context
    from compress.surgery import Surgery

    anatomy = find(after, signature, {name: tensor[:2] for name, tensor in rows[0].items()})
    context = Context(signature, anatomy, lambda: iter(rows), Surgery(), progress=lambda *told: said.append(told))
    FuseLayers(count=1, epochs=2).run(after, context)
    assert said[0] == (1, 2, "block 1 of 1: influence of each block")
    assert said[-1][0] == said[-1][1]
    assert said[-1][2] == "block 1 of 1: distillation"


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"count": 4}, "count: 4 blocks are to go, and 3 can be taken out"),
        ({"blocks": [0, 1, 2, 3]}, "count: 4 blocks are to go, and 3 can be taken out"),
        ({"blocks": [4]}, "blocks: there is no block 4"),
        ({"blocks": [-1, 3]}, "blocks names one block twice"),
    ],
)
def test_more_than_there_is_is_refused_before_anything_is_read(options: dict[str, Any], what: str) -> None:
    model, signature, rows = digits()
    anatomy = find(model, signature, {name: tensor[:2] for name, tensor in rows[0].items()})
    with pytest.raises(UserError) as caught:
        FuseLayers(**options).targets(model, anatomy)
    assert caught.value.what == what
    assert caught.value.hint


def test_too_few_rows_are_refused() -> None:
    model, signature, rows = digits()
    with pytest.raises(UserError, match="7 calibration rows are too few to learn from some and judge on others"):
        tried(EXAMPLE, model, signature, [{name: tensor[:7] for name, tensor in rows[0].items()}])


class Flat(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(64, 10)

    def forward(self, pixels: Tensor) -> Tensor:
        found: Tensor = self.head(pixels.flatten(1))
        return found


def test_a_model_without_blocks_is_refused() -> None:
    _, signature, rows = digits()
    with pytest.raises(UserError, match="this model has no blocks"):
        tried(FuseLayers(count=1), Flat(), signature, rows)


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"count": 1, "ratio": 0.5}, "count and ratio each say what goes"),
        ({"blocks": [1], "count": 1}, "blocks and count each say what goes"),
        ({"blocks": [1, 1]}, "blocks names 1 twice"),
        ({"group": 1}, "greater than or equal to 2"),
        ({"score": "random", "candidates": 2}, "candidates goes with score: influence"),
        ({"ratio": 1.0}, "less than 1"),
    ],
)
def test_contradictions_are_refused(options: dict[str, Any], what: str) -> None:
    with pytest.raises(ValidationError, match=what):
        FuseLayers(**options)
