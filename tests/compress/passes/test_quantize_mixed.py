"""Bits chosen site by site: budgets hold, what matters keeps its bits, and what is predicted is what is measured."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import nn
from trial import Trial, digits, tried

from calibrate.errors import UserError
from calibrate.inventory import inventory
from calibrate.signature import Batch, Signature, TensorSpec
from compress.anatomy import find
from compress.layers import QuantEmbedding, QuantLinear, is_quantized
from compress.passes.contract import Context
from compress.passes.quantize import Quantize
from compress.surgery import Surgery

EVERYWHERE: dict[str, Any] = {"sites": ["*"], "group_size": 16}


def on_digits(mixed: dict[str, Any], **options: Any) -> Trial:
    return tried(Quantize(**(EVERYWHERE | options), mixed=mixed), *digits())


@functools.cache
def at(ratio: float) -> Trial:
    """Of 8, 4 and 2 bits, so large a share of the model."""
    return on_digits({"candidates": [8, 4, 2], "size_ratio": ratio})


def stored(model: nn.Module) -> int:
    return sum(entry.bytes for entry in inventory(model).values())


def test_a_larger_budget_never_loses_more_and_every_budget_holds() -> None:
    losses = []
    for ratio in (0.18, 0.2, 0.25):
        trial = at(ratio)
        says = trial.context.report["mixed"]
        assert stored(trial.after) == says["bytes_after"] <= says["bytes_predicted"] <= ratio * stored(trial.before)
        assert says["exact"]
        losses.append(says["predicted_db"])
    assert losses == sorted(losses)
    assert losses[0] < losses[-1]


def test_the_losses_of_single_sites_add_up_to_the_loss_of_the_whole() -> None:
    """As noise that is independent from site to site, which it is not quite: of 48 rows at 8 bits nearly everywhere, 2 dB."""
    for ratio, within in ((0.18, 3.0), (0.2, 1.5), (0.25, 2.0)):
        says = at(ratio).context.report["mixed"]
        assert says["measured"]["db"] == pytest.approx(says["predicted_db"], abs=within)


def test_chosen_bits_beat_bits_dealt_out_at_random() -> None:
    chosen = at(0.2).context.report["mixed"]
    model, signature, rows = digits()
    anatomy = find(model, signature, {name: tensor[:2] for name, tensor in rows[0].items()})
    for seed in range(2):
        made = Context(signature, anatomy, lambda: iter(rows), Surgery(), seed=seed)
        mixed = {"candidates": [8, 4, 2], "size_ratio": 0.2, "score": "random"}
        Quantize(**EVERYWHERE, mixed=mixed).run(copy.deepcopy(model), made)
        says = made.report["mixed"]
        assert says["bytes_after"] == pytest.approx(chosen["bytes_after"], rel=0.01)
        assert says["measured"]["db"] < chosen["measured"]["db"] - 1


ROUGH: dict[str, Any] = {"group_size": 64, "activations": "none", "weight_range": "minmax", "smooth": False}


@pytest.mark.parametrize("how", [{"mixed": {"loss_db": 12}}, {"mixed": {}, "max_drop": 0.03}], ids=str)
def test_bits_dealt_out_at_random_are_a_control_without_a_budget_of_size_too(how: dict[str, Any]) -> None:
    model, signature, rows = digits()
    anatomy = find(model, signature, {name: tensor[:2] for name, tensor in rows[0].items()})
    sizes, choices = [], []
    for score in ("sensitivity", "random"):
        made = Context(signature, anatomy, lambda: iter(rows), Surgery(), seed=0)
        mixed = {"candidates": [8, 2], "score": score, "rows": 32} | how["mixed"]
        after = Quantize.model_validate(ROUGH | how | {"mixed": mixed}).run(copy.deepcopy(model), made)
        sizes.append(stored(after))
        choices.append(made.report["max_drop" if "max_drop" in how else "mixed"]["overrides"])
    assert choices[0] != choices[1]
    assert sizes[0] < sizes[1]


def test_three_bits_are_taken_where_they_pay() -> None:
    """Between the bytes of 2 and 4 bits everywhere a third choice can only help: the knapsack is exact."""
    options = {"size_ratio": 0.16, "rows": 32}
    with_three = on_digits({"candidates": [4, 3, 2], **options}).context.report["mixed"]
    without = on_digits({"candidates": [4, 2], **options}).context.report["mixed"]
    chosen = [entry["chosen"] for entry in with_three["sites"]]
    assert "3" in chosen
    assert with_three["predicted_db"] > without["predicted_db"]
    roomy = on_digits({"candidates": [8, 3], "size_ratio": 0.9, "rows": 32}).context.report["mixed"]
    assert {entry["chosen"] for entry in roomy["sites"]} == {"8"}


def test_what_is_told_can_be_written_as_overrides() -> None:
    trial = on_digits({"candidates": [8, 4, {"weights": 8, "activations": "none"}], "size_ratio": 0.25})
    overrides = trial.context.report["mixed"]["overrides"]
    again = tried(Quantize.model_validate(EVERYWHERE | {"overrides": overrides}), *digits())
    assert torch.equal(trial.outputs(trial.after), again.outputs(again.after))
    assert [edit.json() for edit in again.context.edits] == [edit.json() for edit in trial.context.edits]


def test_a_site_that_hurts_gets_the_high_bits() -> None:
    model, signature, rows = digits()
    hurt = model.get_submodule("blocks.2.mlp.fc1")
    with torch.no_grad():  # a wild column whose input is worth nothing: no range suits both
        hurt.weight[:, ::16] *= 40.0
        model.get_submodule("blocks.2.norm2").weight[::16] /= 40.0
        model.get_submodule("blocks.2.norm2").bias[::16] /= 40.0
    options = {"smooth": False, "activations": "none", "granularity": "channel"}
    trial = tried(
        Quantize(sites=["blocks.*"], mixed={"candidates": [8, 4], "size_ratio": 0.19}, **options), model, signature, rows
    )
    says = trial.context.report["mixed"]
    assert says["overrides"]["blocks.2.mlp.fc1"] == 8
    at_4 = {entry["sites"][0]: entry["settings"]["4"]["db"] for entry in says["sites"]}
    assert min(at_4, key=at_4.__getitem__) == "blocks.2.mlp.fc1"
    assert 4 in says["overrides"].values()


def test_a_loss_that_is_asked_for_is_kept_by_the_smallest_model_that_is_found() -> None:
    sizes = []
    for asked in (20, 36):
        trial = on_digits({"candidates": [8, 4, 2, "float"], "loss_db": asked})
        says = trial.context.report["mixed"]
        assert says["measured"]["db"] >= asked
        assert trial.sqnr_db >= asked
        assert says["tried"][-1]["measured_db"] == pytest.approx(says["measured"]["db"], abs=1e-6)
        sizes.append(says["bytes_after"])
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[-1]


@pytest.mark.parametrize(
    ("mixed", "says"),
    [
        ({"candidates": [8, 4], "size_ratio": 0.1}, "size_ratio 0.1, and the least that these candidates give is 0.2"),
        ({"candidates": [8, 4], "size_mb": 0.05}, "size_mb 0.05, and the least that these candidates give is 0.17"),
        ({"candidates": [8, 4], "loss_db": 70}, "loss_db 70, and the best that these candidates give is 4"),
        ({"size_ratio": 1.0}, "leaves every site float"),
    ],
    ids=str,
)
def test_a_budget_that_nothing_meets_is_refused_with_the_best_there_is(mixed: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError) as caught:
        on_digits(mixed)
    assert says in str(caught.value)


def test_the_best_that_is_told_can_be_met() -> None:
    with pytest.raises(UserError) as caught:
        on_digits({"candidates": [8, 4], "size_ratio": 0.01})
    best = float(caught.value.hint.split()[2])
    assert best < 0.25
    trial = on_digits({"candidates": [8, 4], "size_ratio": best})
    assert stored(trial.after) <= best * stored(trial.before)


@pytest.mark.parametrize(
    "mixed",
    [
        {},
        {"candidates": [8, 4]},
        {"size_ratio": 0.2, "loss_db": 20},
        {"candidates": [8, 8], "size_ratio": 0.2},
        {"candidates": [5], "size_ratio": 0.2},
        {"candidates": [], "size_ratio": 0.2},
        {"candidates": ["float"], "size_ratio": 0.9},
        {"size_ratio": 1.5},
    ],
    ids=str,
)
def test_options_that_do_not_go_together_are_refused(mixed: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Quantize.model_validate({"mixed": mixed})


@pytest.mark.parametrize("options", [{"weights": 4}, {"embeddings": 2}], ids=str)
def test_bits_beside_mixed_are_refused_and_candidates_are_named(options: dict[str, Any]) -> None:
    mixed = {"candidates": [2, {"activations": "none"}, "float"], "size_ratio": 0.5}
    ((option, bits),) = options.items()
    with pytest.raises(ValidationError, match=rf"{option}: {bits} would say nothing of them\nName {bits} among its candidates"):
        Quantize.model_validate({"mixed": mixed} | options)
    assert Quantize.model_validate({"mixed": mixed, option: 8}).mixed


def test_a_candidate_without_bits_of_its_own_is_done_as_it_was_measured() -> None:
    trial = on_digits({"candidates": [{"activations": "none"}], "size_ratio": 0.5})
    assert {m.quantized_weight.grid.bits for m in trial.after.modules() if isinstance(m, QuantLinear)} == {8}
    says = trial.context.report["mixed"]
    assert says["measured"]["db"] == pytest.approx(says["predicted_db"], abs=1.5)


def test_a_site_that_cannot_take_a_setting_has_another_and_says_why() -> None:
    model, signature, rows = digits()
    step = Quantize(sites=["*"], group_size=128, mixed={"candidates": [8, 4], "size_ratio": 0.26})
    trial = tried(step, model, signature, rows)
    says = trial.context.report["mixed"]
    refused = {entry["sites"][0]: entry["refused"] for entry in says["sites"] if entry["refused"]}
    assert set(refused) == {"head", *(f"blocks.{n}.{name}" for n in range(4) for name in ("attn.qkv", "attn.proj", "mlp.fc1"))}
    for path, reasons in refused.items():
        assert "does not divide" in reasons["4"]
        assert says["overrides"][path] == 8
    assert any(value == 4 for value in says["overrides"].values())
    with pytest.raises(UserError, match="no site can take 4"):
        tried(Quantize(group_size=7, mixed={"candidates": [8, 4], "size_ratio": 0.23}), model, signature, rows)


class Uneven(nn.Module):
    """Two layers; groups of 32 divide the inputs of the second alone."""

    def __init__(self) -> None:
        super().__init__()
        self.narrow = nn.Linear(24, 64)
        self.wide = nn.Linear(64, 24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.wide(torch.relu(self.narrow(x)))


def uneven() -> tuple[nn.Module, Signature, list[Batch]]:
    torch.manual_seed(0)
    signature = Signature((TensorSpec("x", torch.float32, ("batch", 24)),))
    return Uneven().eval(), signature, [{"x": torch.randn(32, 24)} for _ in range(2)]


@pytest.mark.parametrize(
    "budget", [{"mixed": {"size_ratio": 0.8}}, {"mixed": {"loss_db": 5}}, {"mixed": {}, "max_drop": 1.0}], ids=str
)
def test_a_site_that_takes_no_candidate_stays_float_as_is_told(budget: dict[str, Any]) -> None:
    options = budget | {"sites": ["*"], "mixed": {"candidates": [4, 2]} | budget["mixed"]}
    model, signature, rows = uneven()
    before = stored(model)
    step = Quantize.model_validate(options)
    rehearsed = copy.deepcopy(model)
    step.rehearse(rehearsed, find(model, signature, rows[0]), Surgery())
    trial = tried(step, model, signature, rows)
    says = trial.context.report["max_drop" if "max_drop" in budget else "mixed"]
    assert "does not divide" in says["kept"]["narrow"]
    for after in (rehearsed, trial.after):
        assert {path for path, module in after.named_modules() if is_quantized(module)} == {"wide"}
    if "max_drop" not in budget:
        assert stored(trial.after) == says["bytes_after"] <= says["bytes_predicted"] < before
    again = tried(Quantize.model_validate({"sites": ["*"], "overrides": says["overrides"]}), *uneven())
    assert torch.equal(trial.outputs(trial.after), again.outputs(again.after))


class Tied(nn.Module):
    """Word vectors that are read and predicted with, and a layer between."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(96, 64)
        self.between = nn.Linear(64, 64)
        self.head = nn.Linear(64, 96, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        return self.head(x + torch.tanh(self.between(x)))


@pytest.mark.parametrize("ratio", [0.4, 0.25])
def test_tied_weights_share_their_bits(ratio: float) -> None:
    torch.manual_seed(0)
    signature = Signature((TensorSpec("ids", torch.int64, ("batch", "tokens")),))
    rows = [{"ids": torch.randint(0, 96, (16, 12))} for _ in range(2)]
    step = Quantize(sites=["between"], embeddings=8, mixed={"candidates": [8, 4, "float"], "size_ratio": ratio})
    trial = tried(step, Tied().eval(), signature, rows)
    says = trial.context.report["mixed"]
    entry = next(entry for entry in says["sites"] if "embed" in entry["sites"])
    assert entry["sites"] == ["embed", "head"]
    assert "head" not in says["overrides"]
    embed, head = trial.after.get_submodule("embed"), trial.after.get_submodule("head")
    assert isinstance(embed, QuantEmbedding)
    assert isinstance(head, QuantLinear)
    assert embed.quantized_weight is head.quantized_weight
    assert stored(trial.after) <= ratio * stored(trial.before)


def test_a_rehearsal_needs_no_data_and_keeps_to_the_budget() -> None:
    model, signature, rows = digits()
    step = Quantize(**EVERYWHERE, mixed={"candidates": [8, 4, 2], "size_ratio": 0.2})
    anatomy = find(model, signature, {name: tensor[:2] for name, tensor in rows[0].items()})
    before = stored(model)
    assert {target.path for target in step.targets(model, anatomy)} >= {"head", "blocks.0.attn.qkv"}
    rehearsed = copy.deepcopy(model)
    step.rehearse(rehearsed, anatomy, Surgery())
    assert 0.15 * before < stored(rehearsed) <= 0.2 * before
    bits = {m.quantized_weight.grid.bits for m in rehearsed.modules() if is_quantized(m)}  # type: ignore[union-attr]
    assert bits == {8, 4, 2}
    refused = Quantize(**EVERYWHERE, mixed={"candidates": [8, 4, 2], "size_ratio": 0.05})
    with pytest.raises(UserError, match=r"size_ratio 0\.05"):
        refused.rehearse(copy.deepcopy(model), anatomy, Surgery())


def test_sites_with_overrides_keep_them() -> None:
    trial = on_digits({"candidates": [8, 4], "size_ratio": 0.25}, overrides={"mlp.down": 2, "head": "float"})
    bits = {p: m.quantized_weight.grid.bits for p, m in trial.after.named_modules() if isinstance(m, QuantLinear)}
    assert {bits[f"blocks.{number}.mlp.fc2"] for number in range(4)} == {2}
    assert "head" not in bits
