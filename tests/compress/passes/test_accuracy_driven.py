"""``drop_layers: {accuracy_driven: true}``: what harms goes, what does nothing goes, what is needed stays."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import nn
from trial import DIGITS, digits, judge, rebuilt, tried

from calibrate.errors import UserError
from calibrate.fidelity import sqnr_db
from calibrate.signature import Signature, TensorSpec
from compress.anatomy import find
from compress.layers import Absent
from compress.passes.drop_layers import DropLayers
from compress.surgery import Surgery

ROWS = 200
HEAD = slice(16, 32)
"""The inputs of an output projection that head 1 of 4 feeds."""


def driven(model: nn.Module, seed: int = 0, **options: Any) -> Any:
    _, signature, rows = digits()
    step = DropLayers(accuracy_driven=True, **options)
    return tried(step, model, signature, rows, validation=judge(ROWS, seed))


def loss(model: nn.Module, seed: int = 0) -> float:
    return judge(ROWS, seed).loss(model)


def taken(trial: Any, part: str) -> list[tuple[int, ...]]:
    told = trial.context.report["accuracy_driven"]["tried"]
    return sorted(
        (one["block"], *([one["head"]] if part == "head" else [])) for one in told if one["taken"] and one["part"] == part
    )


def with_head(block: int, scale: float) -> nn.Module:
    """The digits model with what head 1 of a block adds made ``scale`` times what it is, in another direction where it harms."""
    model, _, _ = digits()
    weight = model.get_parameter(f"blocks.{block}.attn.proj.weight")
    with torch.no_grad():
        noise = torch.randn(weight[:, HEAD].shape, generator=torch.Generator().manual_seed(0))
        weight[:, HEAD] = noise * weight[:, HEAD].std() * scale
    return model


def test_a_planted_head_that_harms_goes() -> None:
    model = with_head(2, 8.0)
    assert loss(model) > 3 * loss(digits()[0])
    trial = driven(model)
    assert (2, 1) in taken(trial, "head") or (2,) in taken(trial, "attention")
    assert loss(trial.after) < 0.5 * loss(model)


def test_a_planted_head_that_does_nothing_goes_for_good_and_the_function_stays() -> None:
    trial = driven(with_head(1, 0.0), evaluations=60)
    assert (1, 1) in taken(trial, "head")
    width = trial.after.get_parameter("blocks.1.attn.proj.weight").shape[1]
    assert width == 64 - 16 * len(trial.context.report["heads"]["blocks.1.attn.proj"])


def test_planted_sublayers_that_do_nothing_go_first() -> None:
    model, _, _ = digits()
    with torch.no_grad():
        for path in ("blocks.1.mlp.fc2", "blocks.3.attn.proj"):
            model.get_parameter(f"{path}.weight").zero_()
            model.get_parameter(f"{path}.bias").zero_()
    trial = driven(model, heads=False)
    assert (1,) in taken(trial, "mlp")
    assert (3,) in taken(trial, "attention")
    for path in ("blocks.1.mlp.fc2", "blocks.3.attn.proj"):
        assert isinstance(trial.after.get_submodule(path), Absent)


def test_what_is_needed_stays() -> None:
    trial = driven(digits()[0])
    told = trial.context.report["accuracy_driven"]
    costs = {(one["part"], one["block"]): one["loss"] for one in told["tried"] if one["part"] != "head"}
    needed = max(costs, key=lambda key: costs[key])
    assert costs[needed] > 5 * told["start"]["loss"]
    part, block = needed
    assert (block,) not in taken(trial, part)
    site = "attn.proj" if part == "attention" else "mlp.fc2"
    assert not isinstance(trial.after.get_submodule(f"blocks.{block}.{site}"), Absent)


@pytest.mark.parametrize("seed", [0, 1])
def test_the_result_is_never_worse_than_the_start_on_its_rows(seed: int) -> None:
    model, _, _ = digits()
    for tolerance in (0.0, 0.05):
        trial = driven(model, seed, tolerance=tolerance)
        told = trial.context.report["accuracy_driven"]
        start, end = loss(model, seed), loss(trial.after, seed)
        assert end <= start * (1 + tolerance + 1e-5)
        assert told["start"]["loss"] == pytest.approx(start, rel=1e-6)
        assert told["end"]["loss"] == pytest.approx(end, rel=1e-6)
        assert torch.equal(trial.outputs(rebuilt(trial)), trial.outputs(trial.after))
    more = driven(model, seed, tolerance=1.0).context.report["accuracy_driven"]["tried"]
    assert sum(one["taken"] for one in more) > sum(one["taken"] for one in told["tried"]), "control: more may cost more"


def test_runs_over_the_rows_are_bounded_and_the_last_sublayers_come_first() -> None:
    trial = driven(digits()[0], evaluations=6)
    told = trial.context.report["accuracy_driven"]
    assert told["evaluations"]["used"] <= 6
    assert [(one["part"], one["block"]) for one in told["tried"]] == [("mlp", 3), ("attention", 3), ("mlp", 2), ("attention", 2)]
    assert len(told["tried"]) + len(told["untried"]) == 8 + 4 * 2, "heads of attentions that were not looked at are none"
    everything = driven(digits()[0])
    told = everything.context.report["accuracy_driven"]
    stayed = sum(1 for one in told["tried"] if one["part"] == "attention" and not one["taken"])
    assert told["evaluations"]["used"] <= 2 + 8 + 4 * stayed
    assert told["untried"] == []


def test_where_nothing_may_go_nothing_changes() -> None:
    model, _, _ = digits()
    trial = driven(model, heads=False, evaluations=4, sublayers="attention")
    assert taken(trial, "attention") == []
    assert trial.context.edits == []
    assert torch.equal(trial.outputs(trial.after), trial.outputs(model))


def test_the_report_names_the_rows_and_says_that_they_cannot_judge() -> None:
    told = driven(digits()[0], evaluations=4).context.report["accuracy_driven"]
    rows = told["validation"]
    assert (rows["path"], rows["rows"], rows["loss"], rows["metric"]) == (
        "embedded:digits",
        ROWS,
        "mean cross-entropy",
        "accuracy",
    )
    assert len(rows["fingerprint"]) == 64
    assert "flatter" in told["says"]
    assert set(told["start"]) == {"loss", "metric", "low", "high"}
    assert all({"block", "part", "path", "loss", "metric", "taken"} <= set(one) for one in told["tried"])


def test_parts_can_be_left_out() -> None:
    for options, parts in (
        ({"sublayers": "mlp"}, {"mlp"}),
        ({"sublayers": "attention", "heads": False}, {"attention"}),
        ({"sublayers": "attention"}, {"attention", "head"}),
        ({"heads": False}, {"attention", "mlp"}),
    ):
        told = driven(digits()[0], evaluations=12, **options).context.report["accuracy_driven"]
        assert {one["part"] for one in told["tried"]} == parts


def test_a_repair_stays_only_where_the_validation_rows_agree() -> None:
    model = digits()[0]
    plain, repaired = driven(model, tolerance=1.0, heads=False), driven(model, tolerance=1.0, heads=False, repair=True)
    told = repaired.context.report["repair"]
    assert taken(plain, "mlp") == taken(repaired, "mlp")
    assert "loss_after" in told
    assert ("undone" in told) == (told["loss_after"] > told["loss_before"])
    assert loss(repaired.after) <= loss(plain.after) * (1 + 1e-6)
    if "undone" in told:
        assert sqnr_db(plain.outputs(plain.after), repaired.outputs(repaired.after)) > 100
    assert torch.equal(repaired.outputs(rebuilt(repaired)), repaired.outputs(repaired.after))


def test_rehearsing_promises_nothing_and_targets_name_every_candidate() -> None:
    model, signature, rows = digits()
    anatomy = find(model, signature, {"pixels": rows[0]["pixels"][:2]})
    step, surgery = DropLayers(accuracy_driven=True), Surgery()
    before = copy.deepcopy(model.state_dict())
    assert len(step.targets(model, anatomy)) == 8
    step.rehearse(model, anatomy, surgery)
    assert surgery.edits == []
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert step.validates
    assert not DropLayers(attention=[0]).validates


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"count": 1}, "accuracy_driven decides"),
        ({"ratio": 0.5}, "accuracy_driven decides"),
        ({"attention": [0]}, "accuracy_driven decides"),
        ({"sublayers": "block"}, "takes out sublayers and heads"),
        ({"method": "iterative"}, "method goes with count or ratio"),
        ({"score": "random"}, "score goes with count or ratio"),
        ({"tolerance": -0.1}, "greater than or equal"),
        ({"evaluations": 3}, "greater than or equal"),
    ],
    ids=str,
)
def test_options_that_do_not_go_together_are_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        DropLayers(accuracy_driven=True, **options)


@pytest.mark.parametrize("options", [{"tolerance": 0.1}, {"evaluations": 50}, {"heads": False}], ids=str)
def test_options_of_the_search_need_the_search(options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="goes with accuracy_driven"):
        DropLayers(count=1, **options)


def test_models_and_runs_that_cannot_are_refused() -> None:
    with pytest.raises(UserError, match="there are no validation rows to choose by"):
        tried(DropLayers(accuracy_driven=True), *digits())

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(8, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = self.head(x)
            return found

    signature = Signature((TensorSpec("x", torch.float32, ("batch", 8)),))
    with pytest.raises(UserError, match="this model has no sublayers"):
        tried(DropLayers(accuracy_driven=True), Plain(), signature, [{"x": torch.randn(4, 8)}], validation=judge(8))
    broken = digits()[0]
    with torch.no_grad():
        broken.get_parameter("head.weight").fill_(float("nan"))
    with pytest.raises(UserError, match="not finite before any change"):
        tried(DropLayers(accuracy_driven=True, heads=False), broken, DIGITS, digits()[2], validation=judge(8))
