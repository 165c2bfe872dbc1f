"""One-bit weights in a model: what is taken, what the repair brings, what is refused."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import nn
from torch.nn import functional as F
from trial import DIGITS, Trial, digits, judge, rebuilt, tried

from calibrate.errors import UserError
from calibrate.signature import Batch
from compress.anatomy import find
from compress.binarization.costs import PICOJOULES
from compress.binarization.latent import LatentActivation
from compress.binarization.products import find_products
from compress.layers import BinaryActivation, BinaryLinear, BinaryProducts, QuantLinear, is_quantized
from compress.passes.binarize import Binarize
from compress.passes.contract import Context
from compress.passes.hash_attention import HashAttention
from compress.passes.topk_attention import TopkAttention
from compress.surgery import Surgery

EXAMPLE = Binarize(sites=["mlp.*"], repair=6, repair_rows=12)


@functools.cache
def _trial(**options: Any) -> Trial:
    return tried(Binarize(**options), *digits())


def _report(trial: Trial) -> dict[str, Any]:
    found: dict[str, Any] = trial.context.report
    return found


@pytest.mark.parametrize(("bases", "level"), [(1, 1), (2, 7), (3, 7)])
def test_every_projection_in_the_blocks_becomes_bits_and_the_rest_stays(bases: int, level: int) -> None:
    trial = _trial(bases=bases, repair=0)
    inside = {site.path for block in trial.anatomy.blocks for site in block.sites if site.kind == "linear"}
    found = {path: module for path, module in trial.after.named_modules() if isinstance(module, BinaryLinear)}
    assert set(found) == inside == set(_report(trial)["sites"])
    assert not any(is_quantized(module) for path, module in trial.after.named_modules() if path not in inside)
    for module in found.values():
        assert int(module.quantized_weight.integers().abs().max()) <= level


def test_a_factor_a_row_is_nearer_than_one_a_tensor_and_more_bases_are_nearer_yet() -> None:
    levels = [_weight_sqnr(granularity="tensor"), *(_weight_sqnr(bases=bases) for bases in (1, 2, 3))]
    assert levels == sorted(levels)
    assert levels[2] > levels[1] + 3
    assert levels[3] > levels[2] + 3


def _weight_sqnr(**options: Any) -> float:
    trial = tried(Binarize(repair=0, activations="none", sites=["mlp.up"], bias_correction=False, **options), *digits())
    found = [site["weight_sqnr_db"] for site in _report(trial)["sites"].values()]
    return sum(found) / len(found)


def test_the_repair_brings_back_most_and_the_report_says_how_much() -> None:
    before, after = _trial(repair=0), _trial(repair=60, repair_rows=16)
    assert after.sqnr_db > before.sqnr_db + 5
    told = _report(after)["repair"]
    assert told["sqnr_db_after"] > told["sqnr_db_before"] + 3
    assert told["whole"]["loss_after"] < 0.6 * told["whole"]["loss_before"]
    assert told["whole"]["held_rows"] == told["held_rows"] == 12
    changed = [site["signs_changed"] for site in _report(after)["sites"].values()]
    assert all(0 < share < 0.5 for share in changed)
    assert all(site["signs_changed"] == 0 for site in _report(before)["sites"].values())


def test_blocks_by_themselves_first() -> None:
    trial = _trial(repair=0, block_repair=10, repair_rows=16)
    told = _report(trial)["repair"]
    assert list(told["blocks"]) == [block.path for block in trial.anatomy.blocks]
    assert all(block["loss_after"] <= block["loss_before"] for block in told["blocks"].values())
    assert "whole" not in told


def test_a_rate_that_destroys_is_stopped_the_best_is_kept_and_said() -> None:
    trial = _trial(repair=40, rate=1.0, repair_rows=16, patience=2)
    told = _report(trial)["repair"]
    assert told["whole"]["stopped"]
    assert told["whole"]["loss_after"] <= told["whole"]["loss_before"]
    assert told["whole"]["best_step"] == 0
    assert trial.sqnr_db == pytest.approx(_trial(repair=0).sqnr_db, abs=0.5)
    (said,) = _report(trial)["warnings"]
    assert said.startswith(f"the repair was stopped after {told['whole']['steps']} of 40 steps")
    assert "the state before it is kept" in said
    assert "lower rate than 1" in said
    assert "warnings" not in _report(_trial(repair=60, repair_rows=16)), "a control: one that helps warns of nothing"


def test_a_loss_that_is_not_finite_stops_it_and_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    from compress.distillation import training

    def broken(self: Any, *given: Any) -> dict[str, Any]:
        found = original(self, *given)
        if torch.is_grad_enabled():
            return {key: (loss * torch.nan, error, count) for key, (loss, error, count) in found.items()}
        return found

    original = training.Lesson.losses
    monkeypatch.setattr(training.Lesson, "losses", broken)
    trial = tried(Binarize(repair=5, repair_rows=16, sites=["mlp.*"]), *digits())
    assert "not finite" in _report(trial)["repair"]["whole"]["stopped"]
    assert any("repair was stopped" in text for text in _report(trial)["warnings"])
    assert all(site["signs_changed"] == 0 for site in _report(trial)["sites"].values())


def test_a_time_that_is_over_stops_it() -> None:
    trial = tried(Binarize(repair=500, minutes=1e-4, repair_rows=16), *digits())
    told = _report(trial)["repair"]["whole"]
    assert told["steps"] < told["planned"]
    assert "seconds were over" in told["stopped"]


def test_validation_rows_judge_before_and_after() -> None:
    model, signature, rows = digits()
    trial = tried(Binarize(repair=40, repair_rows=16), model, signature, rows, validation=judge(64))
    told = _report(trial)["repair"]
    assert told["validation_after"]["metric"] > told["validation_before"]["metric"]


def test_inputs_of_one_bit_are_trained_and_rebuilt() -> None:
    trial = _trial(activations="binary", repair=40, repair_rows=16)
    plain = _trial(activations="binary", repair=0)
    assert trial.sqnr_db > plain.sqnr_db
    inputs = [module for module in trial.after.modules() if isinstance(module, BinaryActivation)]
    assert len(inputs) == 16
    for module in inputs:
        x = torch.randn(5, module.threshold.numel())
        given = module(x)
        assert given.abs().unique().numel() == 1
        assert torch.equal(given > 0, x >= module.threshold)
    again = rebuilt(trial)
    with torch.inference_mode():
        assert torch.equal(again(trial.rows[0]["pixels"]), trial.after(trial.rows[0]["pixels"]))


def test_the_gradient_of_a_sign_passes_where_the_input_is_within_a_scale() -> None:
    latent = LatentActivation(torch.zeros(3), torch.tensor(0.5), nonnegative=False)
    x = torch.tensor([[0.2, -0.4, 2.0]], requires_grad=True)
    latent(x).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [[1.0, 1.0, 0.0]]
    assert latent.threshold.grad is not None
    assert latent.threshold.grad.tolist() == [-1.0, -1.0, 0.0]
    low = LatentActivation(torch.full((3,), 0.3), torch.tensor(0.5), nonnegative=True)
    assert low(torch.tensor([[0.2, 0.3, 2.0]])).tolist() == [[0.0, 0.5, 0.5]]


def test_products_of_attention_in_one_bit_are_learnt_carried_and_rebuilt() -> None:
    trial = _trial(products="binary", repair=30, repair_rows=16)
    assert trial.sqnr_db > _trial(products="binary", repair=0).sqnr_db
    layers = [module for module in trial.after.modules() if isinstance(module, BinaryProducts)]
    assert len(layers) == len(trial.anatomy.blocks)
    assert all(float(layer.value_plus.abs().sum()) > 0 and not layer.learning for layer in layers)
    again = rebuilt(trial)
    with torch.inference_mode():
        assert torch.equal(again(trial.rows[0]["pixels"]), trial.after(trial.rows[0]["pixels"]))


def test_one_bit_products_are_what_the_polynomial_says() -> None:
    """Against the sums written out, number by number; without its vectors nothing is added."""
    layer = BinaryProducts(2, 4, 4)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 3, 4, generator=generator) for _ in range(3))
    for parameter in layer.parameters():
        parameter.data.copy_(torch.rand(parameter.shape, generator=generator))
    mask = torch.tensor([True, True, False])
    found = layer.redirect(F.scaled_dot_product_attention, (q, k, v, mask.expand(3, 3)), {})
    names = layer.state_dict()

    def bits(x: torch.Tensor, name: str) -> torch.Tensor:
        above = x >= names[f"{name}_threshold"][:, 0]
        return torch.where(above, names[f"{name}_scale"], -names[f"{name}_scale"])

    for head in range(2):
        for query in range(3):
            row = q[0, :, query]
            q_plus, q_minus = ((row[head] * names[f"query_{kind}"][head, :, 0]).sum() for kind in ("plus", "minus"))
            scores = []
            for key in range(2):
                other = k[0, :, key]
                k_plus, k_minus = ((other[head] * names[f"key_{kind}"][head, :, 0]).sum() for kind in ("plus", "minus"))
                signs = (bits(row, "query")[head] * bits(other, "key")[head]).sum()
                scores.append((signs + q_minus * k_plus + q_plus * k_minus + q_plus * k_plus) / 2)
            chance = torch.stack(scores).softmax(0)
            few = torch.where(chance >= layer.probability_scale / 2, layer.probability_scale, 0.0)
            wanted = sum(
                few[key] * (bits(v[0, :, key], "value")[head] + (v[0, head, key] * names["value_plus"][head, :, 0]).sum())
                for key in range(2)
            )
            assert torch.allclose(found[0, head, query], wanted, atol=1e-5)  # sums of a dozen numbers of size 1 in float32


def test_attention_that_is_not_one_call_is_left_and_said() -> None:
    model, signature, rows = digits()
    anatomy = find(model, signature, {"pixels": rows[0]["pixels"][:2]})
    step = Binarize(products="binary", repair=0, sites=["blocks.0.attn.*", "blocks.1.attn.*"])
    touched = {target.path for target in step.targets(model, anatomy) if target.role == "attention"}
    assert touched == {"blocks.0", "blocks.1"}
    once = tried(step, model, signature, rows).after
    with pytest.raises(UserError, match="finds no attention") as caught:
        find_products("binarize", once, anatomy, anatomy.blocks[:1])
    assert "another already" in caught.value.hint


def test_count_takes_those_that_lose_least_and_the_rest_is_int8() -> None:
    trial = _trial(count=5, repair=0, sensitivity_rows=16)
    alone = _report(trial)["repair"]["alone"]
    order = sorted(alone, key=lambda path: alone[path]["noise"])
    assert set(_report(trial)["sites"]) == set(order[:5])
    for path in order:
        layer = trial.after.get_submodule(path)
        assert isinstance(layer, BinaryLinear) == (path in order[:5])
        assert isinstance(layer, QuantLinear)
    assert set(_report(trial)["rest"]) == set(order[5:])
    assert trial.sqnr_db > _trial(repair=0).sqnr_db
    left = tried(Binarize(count=5, rest="float", repair=0, sensitivity_rows=16), *digits())
    assert sum(isinstance(module, nn.Linear) for module in left.after.modules()) >= 11


def test_inputs_of_the_rest_are_measured_on_the_first_rows_too() -> None:
    model, signature, rows = digits()
    step = Binarize(count=5, repair=0, sensitivity_rows=16, input_rows=16)
    wild = [*rows[:-1], {"pixels": 100 * rows[-1]["pixels"]}]
    found = [_report(tried(step, model, signature, given))["rest"] for given in (rows, wild)]
    assert found[0] == found[1]


@pytest.mark.parametrize("products", ["float", "binary"])
def test_what_comes_after_finds_the_roles_that_were_there_before(products: str) -> None:
    trial = _trial(products=products, repair=0)
    found = find(trial.after, trial.signature, {"pixels": trial.rows[0]["pixels"][:2]})
    was, now = (
        {site.path: (site.roles, site.kind, site.block, site.flops) for site in of.sites} for of in (trial.anatomy, found)
    )
    assert {path: now[path] for path in was} == was
    assert not any(now[path][0] for path in now if path not in was)
    assert [(block.path, block.heads) for block in found.blocks] == [(block.path, block.heads) for block in trial.anatomy.blocks]


@pytest.mark.parametrize("step", [HashAttention(anchors=4), TopkAttention(k=3)])
def test_products_of_one_bit_are_not_replaced_unseen(step: HashAttention | TopkAttention) -> None:
    trial = _trial(products="binary", repair=0)
    with pytest.raises(UserError, match="no block has an attention") as caught:
        step.targets(trial.after, find(trial.after, trial.signature, {"pixels": trial.rows[0]["pixels"][:2]}))
    assert "of one bit" in caught.value.hint


def test_operations_and_energy_are_counted() -> None:
    told = _report(_trial(repair=0))["costs"]
    assert "Horowitz" in told["source"]
    site = next(iter(_report(_trial(repair=0))["sites"].values()))
    assert site["arithmetic"] == "sign_int8"
    assert site["runs_as"] == "int8"
    assert site["macs"] == 17 * 64 * 192
    assert site["microjoules_float"] == pytest.approx(site["macs"] * PICOJOULES["float"] / 1e6)
    assert site["microjoules_bits"] < site["microjoules_int8"] < site["microjoules_float"]
    one = _report(_trial(activations="binary", repair=0))["costs"]["totals"]
    assert one["microjoules_bits"] < told["totals"]["microjoules_bits"]


@pytest.mark.parametrize("fill", [0.0, 0.25])
def test_weights_that_are_all_alike_are_kept(fill: float) -> None:
    model, signature, rows = digits()
    layer = model.get_submodule("blocks.1.mlp.fc1")
    layer.weight.data.fill_(fill)  # type: ignore[union-attr, operator]
    trial = tried(Binarize(repair=2, repair_rows=16, activations="none", sites=["blocks.1.mlp.fc1"]), model, signature, rows)
    assert trial.outputs(trial.after).isfinite().all()
    assert trial.sqnr_db > 40


def test_rows_that_eight_does_not_divide_work() -> None:
    torch.manual_seed(0)
    model = digits()[0]
    assert isinstance(model.get_submodule("blocks.0.mlp"), nn.Module)
    block = model.get_submodule("blocks.0.mlp")
    block.fc1, block.fc2 = nn.Linear(64, 37), nn.Linear(37, 64)  # type: ignore[assignment]
    _, signature, rows = digits()
    trial = tried(Binarize(repair=0, sites=["blocks.0.mlp.*"]), model.eval().requires_grad_(False), signature, rows)
    layer = trial.after.get_submodule("blocks.0.mlp.fc2")
    assert isinstance(layer, BinaryLinear)
    assert layer.quantized_weight.codes.numel() == 64 * 37 // 8
    assert torch.equal(layer.quantized_weight.integers() > 0, model.get_submodule("blocks.0.mlp.fc2").weight >= 0)  # type: ignore[operator]


def _refused(step: Binarize, rows: list[Batch] | None = None) -> UserError:
    model, signature, own = digits()
    anatomy = find(model, signature, {"pixels": own[0]["pixels"][:2]})
    context = Context(signature, anatomy, lambda: iter(own if rows is None else rows), Surgery())
    with pytest.raises(UserError) as caught:
        step.run(copy.deepcopy(model), context)
    return caught.value


def test_a_norm_has_no_bits() -> None:
    error = _refused(Binarize(sites=["norm"]))
    assert "is a norm" in str(error)
    assert error.hint


def test_inputs_of_one_bit_need_calibration_rows() -> None:
    step = Binarize(activations="binary", repair=0, bias_correction=False)
    assert step.calibrates
    assert "no calibration rows" in str(_refused(step, []))


def test_groups_that_do_not_divide_are_refused_with_divisors() -> None:
    error = _refused(Binarize(granularity="group", group_size=48, sites=["mlp.up"]))
    assert "48 does not divide the 64 inputs" in str(error)
    assert "32, 64" in error.hint


def test_more_sites_than_there_are_are_refused() -> None:
    assert "more than the 16 sites" in str(_refused(Binarize(count=17)))


def test_what_is_quantized_already_is_refused() -> None:
    model, signature, rows = digits()
    once = tried(Binarize(repair=0, sites=["mlp.up"]), model, signature, rows).after
    anatomy = find(once, signature, {"pixels": rows[0]["pixels"][:2]})
    with pytest.raises(UserError, match="quantized already"):
        Binarize(repair=0).targets(once, anatomy)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"granularity": "group"}, "group_size"),
        ({"group_size": 32}, "granularity"),
        ({"granularity": "tensor", "bases": 2}, "one base"),
        ({"rest": "float"}, "goes with count"),
        ({"repair": 0, "rate": 0.1}, "goes with repair"),
        ({"activations": "none", "range": "minmax"}, "goes with activations"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options: dict[str, Any], told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        Binarize(**options)
    assert DIGITS.inputs


def test_sites_outside_blocks_are_trained_too() -> None:
    trial = tried(Binarize(sites=["head"], repair=20, repair_rows=16), *digits())
    assert list(_report(trial)["sites"]) == ["head"]
    assert _report(trial)["repair"]["whole"]["parameters"] > 0
    assert trial.sqnr_db > tried(Binarize(sites=["head"], repair=0), *digits()).sqnr_db
