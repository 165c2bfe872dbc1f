"""The strongest setting that a drop allows: what is given holds on the rows it was judged by, or nothing is rounded."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from trial import DIGITS, digits

from calibrate.errors import UserError
from calibrate.losses import loss_for
from calibrate.metrics import Accuracy
from calibrate.signature import Batch, Signature, TensorSpec
from compress.anatomy import find
from compress.embedded import digits_rows
from compress.labelled import Judged, Validation
from compress.layers import QuantEmbedding, QuantLinear, is_quantized
from compress.passes.contract import Context
from compress.passes.quantize import Quantize
from compress.rehearsal import stand_in
from compress.surgery import Surgery

ROUGH: dict[str, Any] = {"weights": 2, "group_size": 64, "activations": "none", "weight_range": "minmax", "smooth": False}


class Counted(Validation):
    """Notes what it was asked."""

    def judge(self, model: nn.Module) -> Judged:
        made = super().judge(model)
        self.asked = [*getattr(self, "asked", []), made]
        return made


def labelled(rows: int = 200) -> Counted:
    chosen = digits_rows("validation", rows)
    assert chosen.labels is not None
    labels: Tensor = chosen.labels
    batches = list(chosen.batches(50))
    pieces = [(batch, labels[50 * number : 50 * number + 50]) for number, batch in enumerate(batches)]
    loss = loss_for("image-classification", labels, 1)
    assert loss is not None
    return Counted(len(chosen), DIGITS.call, lambda: iter(pieces), loss, Accuracy())


def driven(
    step: Quantize, validation: Validation | None, subject: tuple[nn.Module, Signature, list[Batch]] | None = None
) -> tuple[nn.Module, nn.Module, Context]:
    model, signature, rows = subject or digits()
    after = copy.deepcopy(model)
    anatomy = find(after, signature, {name: tensor[:2] for name, tensor in rows[0].items()})
    context = Context(signature, anatomy, lambda: iter(rows), Surgery(), seed=3, validation=validation)
    return model, step.run(after, context), context


def rounded(model: nn.Module) -> set[str]:
    return {path for path, module in model.named_modules() if is_quantized(module)}


@pytest.mark.parametrize("allowed", [0.0, 0.03])
def test_what_is_given_holds_and_a_wider_drop_undoes_no_more(allowed: float) -> None:
    judge = labelled()
    before, after, context = driven(Quantize(**ROUGH, max_drop=allowed), judge)
    says = context.report["max_drop"]
    dropped = judge.metric(before), judge.metric(after)
    assert dropped[0] is not None
    assert dropped[1] is not None
    assert dropped[0] - dropped[1] == pytest.approx(says["drop"], abs=1e-9)
    assert says["drop"] <= allowed
    assert 0 < says["undone"] < says["of"] == 16
    assert len(rounded(after)) == 16 - says["undone"]
    assert len(says["evaluations"]) <= 2 + 1 + 5
    strongest = next(entry for entry in says["evaluations"] if entry["undone"] == 0)
    assert strongest["drop"] > allowed
    alone = {entry["sites"][0]: min(one["db"] for one in entry["settings"].values() if one["db"]) for entry in says["sites"]}
    worst = sorted(alone, key=alone.__getitem__)[: says["undone"]]
    assert set(says["overrides"]) == set(worst)
    assert set(says["overrides"].values()) == {"float"}


def test_the_strongest_setting_stays_where_it_holds() -> None:
    judge = labelled()
    _, after, context = driven(Quantize(max_drop=0.05), judge)
    assert context.report["max_drop"]["undone"] == 0
    assert len(rounded(after)) == 16
    assert len(judge.asked) == 3  # the float model, the one setting, and that verified
    plain = stand_in(digits()[0])
    Quantize().run(plain, Context(DIGITS, context.anatomy, lambda: iter(digits()[2]), Surgery(), seed=3))
    pixels = digits()[2][0]["pixels"]
    with torch.inference_mode():
        assert torch.equal(plain(pixels), after(pixels))


def test_evaluations_are_bounded_and_it_says_what_they_left_open() -> None:
    judge = labelled()
    _, after, context = driven(Quantize(**ROUGH, max_drop=0.0, evaluations=4), judge)
    assert len(judge.asked) <= 4
    says = context.report["max_drop"]
    assert says["drop"] <= 0
    if says["undone"] == says["of"]:
        assert rounded(after) == set()
    assert any("used up" in warning for warning in context.report["warnings"])


def test_where_nothing_holds_nothing_is_rounded_and_that_is_said() -> None:
    class Worse(Counted):
        def judge(self, model: nn.Module) -> Judged:
            made = super().judge(model)
            if rounded(model):
                assert made.metric is not None
                return Judged(made.loss, type(made.metric)(0.0, 0.0, 0.0, 1, ""))
            return made

    judge = labelled()
    judge.__class__ = Worse
    before, after, context = driven(Quantize(max_drop=0.01), judge)
    assert rounded(after) == set()
    assert context.edits == []
    assert context.report["max_drop"]["undone"] == context.report["max_drop"]["of"]
    assert any("no site is quantized" in warning for warning in context.report["warnings"])
    assert all(torch.equal(a, b) for a, b in zip(before.state_dict().values(), after.state_dict().values(), strict=True))


def test_without_labels_the_predictions_that_change_are_judged_and_it_is_called_a_proxy() -> None:
    model, _, rows = digits()
    before, after, context = driven(Quantize(**ROUGH, max_drop=0.03), None)
    says = context.report["max_drop"]
    assert says["judged_by"]["proxy"]
    with torch.inference_mode():
        kept = [(before(batch["pixels"]).argmax(-1) == after(batch["pixels"]).argmax(-1)) for batch in rows]
    changed = 1 - float(torch.cat(kept).double().mean())
    assert changed == pytest.approx(says["drop"])
    assert changed <= 0.03
    assert any("no labels were read" in warning for warning in context.report["warnings"])
    assert isinstance(model, nn.Module)


def test_candidates_without_a_budget_are_walked_from_the_smallest() -> None:
    judge = labelled()
    step = Quantize(group_size=64, activations="none", smooth=False, mixed={"candidates": [8, 4, 2]}, max_drop=0.02)
    _, after, context = driven(step, judge)
    says = context.report["max_drop"]
    assert says["drop"] <= 0.02
    assert len(says["overrides"]) == 16
    assert 0 <= says["undone"] < says["of"] <= 64
    again = driven(Quantize(group_size=64, activations="none", smooth=False, overrides=says["overrides"]), None)[1]
    pixels = digits()[2][0]["pixels"]
    with torch.inference_mode():
        assert torch.equal(again(pixels), after(pixels))


def test_sites_with_overrides_are_undone_too() -> None:
    judge = labelled()
    step = Quantize(overrides={"blocks.1.mlp.fc1": 2}, granularity="tensor", weight_range="minmax", smooth=False, max_drop=0.0)
    _, _, context = driven(step, judge)
    says = context.report["max_drop"]
    if says["undone"]:
        assert says["overrides"].get("blocks.1.mlp.fc1") == "float"
    entry = next(entry for entry in says["sites"] if entry["sites"] == ["blocks.1.mlp.fc1"])
    assert set(entry["settings"]) == {"2", "float"}


class Tied(nn.Module):
    """Word vectors that are read and predicted with, and a layer between."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(96, 64)
        self.between = nn.Linear(64, 64)
        self.head = nn.Linear(64, 96, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        return self.head(x + torch.tanh(self.between(x)))


@pytest.mark.parametrize("override", [4, {"weights": 4}, "float"], ids=str)
def test_a_head_follows_what_its_table_is_told(override: Any) -> None:
    torch.manual_seed(0)
    signature = Signature((TensorSpec("ids", torch.int64, ("batch", "tokens")),))
    rows = [{"ids": torch.randint(0, 96, (16, 12))} for _ in range(2)]
    step = Quantize.model_validate({"sites": ["between"], "embeddings": 8, "overrides": {"embed": override}, "max_drop": 1.0})
    _, after, context = driven(step, None, (Tied().eval(), signature, rows))
    says = context.report["max_drop"]
    assert says["undone"] == 0
    assert says["overrides"] == {}
    embed, head = after.get_submodule("embed"), after.get_submodule("head")
    if override == "float":
        assert rounded(after) == {"between"}
        return
    assert rounded(after) == {"embed", "between", "head"}
    assert isinstance(embed, QuantEmbedding)
    assert isinstance(head, QuantLinear)
    assert embed.quantized_weight is head.quantized_weight
    assert embed.quantized_weight.grid.bits == 4
    assert {"4", "float"} in [set(entry["settings"]) for entry in says["sites"] if entry["sites"] == ["embed", "head"]]


@pytest.mark.parametrize(
    "options", [{"max_drop": -0.1}, {"max_drop": 0.1, "mixed": {"size_ratio": 0.3}}, {"evaluations": 1}], ids=str
)
def test_options_that_do_not_go_together_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Quantize.model_validate(options)


def test_single_scores_without_labels_are_refused() -> None:
    signature = Signature((TensorSpec("input", torch.float32, ("batch", 8)),))
    torch.manual_seed(0)
    rows = [{"input": torch.randn(16, 8)}]
    with pytest.raises(UserError, match="nothing to judge by"):
        driven(
            Quantize(sites=["*"], max_drop=0.01, granularity="channel"),
            None,
            (nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 1)).eval(), signature, rows),
        )
