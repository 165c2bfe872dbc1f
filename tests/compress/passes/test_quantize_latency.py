"""Bits under a budget of measured time, with a clock that is known: what is met, told, corrected and refused."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from torch import nn
from trial import Trial, digits, tried

from calibrate.errors import UserError
from calibrate.fidelity import Estimate
from calibrate.latency import Timing
from compress.layers import is_quantized
from compress.passes.quantize import Quantize

OPTIONS: dict[str, Any] = {"smooth": False, "range": "minmax", "bias_correction": False, "group_size": 16}


class Clock:
    """Takes, for a digits model, a fixed time and a time for each layer by its bits.

    Attributes:
        power: of the sum; below 1 what layers save together is less than what each promises alone.
    """

    conditions: dict[str, Any] = {"runtime": "a clock of the test", "batch": 1, "threads": 1, "processor": "none"}

    def __init__(self, fixed: float = 4.0, each: dict[int, float] | None = None, power: float = 1.0) -> None:
        self.fixed, self.each, self.power = fixed, each or {32: 1.0, 8: 0.4, 4: 0.2}, power

    def time(self, model: nn.Module) -> float:
        total = self.fixed
        for module in model.modules():
            if isinstance(module, nn.Linear):
                total += self.each[32]
            elif is_quantized(module):
                total += self.each[module.quantized_weight.grid.bits]  # type: ignore[union-attr,index]
        return float(total**self.power)

    def __call__(self, models: Iterable[nn.Module]) -> list[Timing]:
        times = [self.time(model) for model in models]
        ratios: list[Estimate | None] = [None]
        ratios += [Estimate(time / times[0], time / times[0], time / times[0], 9, "known") for time in times[1:]]
        return [Timing(time, time, time, 9, 1, ratio) for time, ratio in zip(times, ratios, strict=True)]


def timed(ratio: float, clock: Clock | None, candidates: tuple[Any, ...] = (8, 4, "float")) -> Trial:
    step = Quantize(mixed={"candidates": candidates, "latency_ratio": ratio}, **OPTIONS)
    return tried(step, *digits(), clock)


def took(clock: Clock, trial: Trial) -> float:
    return clock.time(trial.after) / clock.time(trial.before)


def test_the_budget_is_met_and_less_time_never_loses_less() -> None:
    clock, losses = Clock(), []
    for ratio in (0.5, 0.6, 0.8):
        trial = timed(ratio, clock)
        says = trial.context.report["mixed"]
        assert took(clock, trial) <= ratio + 1e-6
        assert ratio - took(clock, trial) < 0.03, "less than the step that one layer makes is left over"
        assert says["latency"]["measured"] == pytest.approx(took(clock, trial), rel=1e-3)
        assert says["latency"]["predicted"] == pytest.approx(took(clock, trial), rel=1e-2)
        assert says["latency"]["met"]
        losses.append(says["predicted_db"])
    assert losses == sorted(losses)
    assert losses[0] < losses[-1] - 3


def test_what_is_told_can_be_written_as_overrides_and_says_that_times_vary() -> None:
    trial = timed(0.6, Clock())
    says = trial.context.report["mixed"]
    again = tried(Quantize.model_validate(OPTIONS | {"overrides": says["overrides"]}), *digits())
    assert trial.outputs(trial.after).equal(again.outputs(again.after))
    assert any("the overrides below" in line for line in trial.context.report["warnings"])
    kinds = {(row["role"], row["setting"]): row for row in says["latency"]["table"]}
    assert {setting for _, setting in kinds} == {"8", "4"}
    assert all(row["groups"] == 4 for row in kinds.values()), "the four blocks are timed together"
    assert all(row["low"] <= row["measured"] <= row["high"] < 1 for row in kinds.values())


def test_bits_that_save_no_time_are_not_chosen() -> None:
    """Where 4 bits take longer than float, as weights in groups may, a budget of time is met with 8."""
    clock = Clock(each={32: 1.0, 8: 0.4, 4: 1.3})
    trial = timed(0.6, clock)
    assert took(clock, trial) <= 0.6
    assert 4 not in trial.context.report["mixed"]["overrides"].values()
    fast = timed(0.6, Clock(each={32: 1.0, 8: 0.9, 4: 0.2}))
    assert 4 in fast.context.report["mixed"]["overrides"].values()


def test_candidates_without_float_are_timed_beside_the_float_model() -> None:
    clock = Clock()
    trial = timed(0.5, clock, (8, 4))
    assert took(clock, trial) <= 0.5
    assert set(trial.context.report["mixed"]["overrides"].values()) == {8, 4}


def test_a_prediction_that_is_wrong_is_corrected_by_what_was_measured() -> None:
    clock = Clock(power=0.8)
    trial = timed(0.6, clock)
    latency = trial.context.report["mixed"]["latency"]
    assert took(clock, trial) == pytest.approx(latency["measured"], rel=1e-3)
    assert latency["met"] == (latency["measured"] <= 0.6)
    assert latency["met"]


def test_what_cannot_be_reached_is_tried_a_few_times_and_said() -> None:
    class Stubborn(Clock):
        def time(self, model: nn.Module) -> float:
            rounded = sum(is_quantized(module) for module in model.modules())
            return super().time(model) if rounded <= 4 else 0.9 * super().time(digits()[0])

    trial = timed(0.5, Stubborn())
    latency = trial.context.report["mixed"]["latency"]
    assert not latency["met"]
    assert 1 <= len(latency["tried"]) <= 4
    assert any("latency_ratio: 0.5 was not reached: 0.9" in line for line in trial.context.report["warnings"])


def test_a_budget_that_nothing_meets_is_refused_with_the_best_there_is() -> None:
    with pytest.raises(
        UserError, match=r"latency_ratio 0\.1, and the least that is expected of these candidates is about 0\."
    ) as caught:
        timed(0.1, Clock())
    enough = float(caught.value.hint.split()[2])
    clock = Clock()
    assert took(clock, timed(enough, clock)) <= enough


def test_candidates_that_are_slower_than_float_are_said_to_be() -> None:
    with pytest.raises(UserError, match="about 1") as caught:
        timed(0.9, Clock(each={32: 1.0, 8: 1.4, 4: 1.6}), (8, 4))
    assert caught.value.hint.startswith("None of them is faster than float here: add float")


def test_a_budget_that_only_float_meets_is_refused_as_one_that_rounds_nothing() -> None:
    with pytest.raises(UserError, match="latency_ratio 1, which leaves every site float"):
        timed(1.0, Clock(each={32: 1.0, 8: 1.4}), (8, "float"))


def test_without_a_clock_the_way_out_is_named() -> None:
    with pytest.raises(UserError, match="no file can be timed here") as caught:
        timed(0.5, None)
    assert "size_ratio" in caught.value.hint


def test_time_and_size_are_two_budgets() -> None:
    with pytest.raises(ValidationError, match="size_ratio and latency_ratio are two budgets"):
        Quantize.model_validate({"mixed": {"size_ratio": 0.3, "latency_ratio": 0.5}})


RECIPE = """
name: fast
model: embedded:digits-vit
data:
  format: embedded
  calibration: {{rows: 32}}
passes:
  - quantize: {{mixed: {{candidates: [8, float], latency_ratio: {ratio}, rows: 16}}}}
export: [{formats}]
measure: {{repeats: 3, warmup: 1}}
"""


def test_a_recipe_whose_files_cannot_be_timed_is_refused_and_a_plan_says_what_it_assumes(tmp_path: Path) -> None:
    import compress
    from compress import planning
    from compress.recipe import parse_recipe

    with pytest.raises(UserError, match="mixed: latency_ratio is measured, and the recipe exports no file to time") as caught:
        compress.apply(parse_recipe(RECIPE.format(ratio=0.7, formats="")), out=tmp_path / "run")
    assert "size_ratio or loss_db" in caught.value.hint
    pytest.importorskip("onnxruntime")
    plan = planning.make(parse_recipe(RECIPE.format(ratio=0.6, formats="onnx")))
    assert any("bits are chosen by latency_ratio when the pass runs" in says for says in plan.warnings)


@pytest.mark.slow
def test_a_run_measures_files_and_says_that_it_did(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    import compress
    from compress.recipe import parse_recipe

    report = compress.apply(parse_recipe(RECIPE.format(ratio=0.99, formats="onnx")), out=tmp_path / "run")
    told = report.steps[0].report["mixed"]["latency"]
    assert told["runtime"].startswith("onnxruntime")
    assert not list((tmp_path / "run").rglob("timed-*"))
