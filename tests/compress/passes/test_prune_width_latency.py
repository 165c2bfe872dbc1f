"""``prune_width`` under a budget of measured time, with a clock that is known: what is found, told, corrected and refused."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from trial import Trial, digits, tried

from calibrate.errors import UserError
from calibrate.fidelity import Estimate
from calibrate.latency import Timing
from compress.passes.prune_width import PruneWidth

OPTIONS: dict[str, Any] = {"round_to": 4, "score": "magnitude", "repair": False}


def counts(model: nn.Module) -> list[tuple[int, int]]:
    """Heads and neurons of each block of a digits model."""
    found = []
    for block in range(4):
        ends = [model.get_submodule(f"blocks.{block}.{name}") for name in ("attn.proj", "mlp.fc2")]
        heads, neurons = (end.in_features if isinstance(end, nn.Linear) else 0 for end in ends)
        found.append((heads // 16, neurons))
    return found


class Clock:
    """Takes, for a digits model, a fixed time, one for each head and neuron, and one for each attention that is there at all.

    Attributes:
        power: of the sum; above 1 what heads and neurons save together is less than what a table of each alone promises.
    """

    conditions: dict[str, Any] = {"runtime": "a clock of the test", "batch": 1, "threads": 1, "processor": "none"}

    def __init__(self, *, fixed: float = 10, head: float = 2, neuron: float = 0.05, entry: float = 1, power: float = 1) -> None:
        self.fixed, self.head, self.neuron, self.entry, self.power = fixed, head, neuron, entry, power
        self.measured: list[float] = []

    def time(self, model: nn.Module) -> float:
        total = self.fixed
        for heads, neurons in counts(model):
            total += heads * self.head + neurons * self.neuron + self.entry * (heads > 0)
        return float(total**self.power)

    def __call__(self, models: Iterable[nn.Module]) -> list[Timing]:
        times = [self.time(model) for model in models]
        self.measured += times
        ratios: list[Estimate | None] = [None]
        ratios += [Estimate(time / times[0], time / times[0], time / times[0], 9, "known") for time in times[1:]]
        return [Timing(time, time, time, 9, 1, ratio) for time, ratio in zip(times, ratios, strict=True)]


def timed(step: PruneWidth, clock: Clock | None) -> Trial:
    """The pass with a clock in its context."""
    model, signature, rows = digits()
    return tried(step, model, signature, rows, clock)


@pytest.mark.parametrize("ratio", [0.9, 0.7, 0.5])
def test_the_budget_is_met_and_used_and_predicted(ratio: float) -> None:
    clock = Clock()
    trial = timed(PruneWidth(latency_ratio=ratio, **OPTIONS), clock)
    took = clock.time(trial.after) / clock.time(trial.before)
    told = trial.context.report["latency"]
    assert took <= ratio
    assert ratio - took < 0.03, "what is left over is less than a step and what is not looked for"
    assert told["measured"] == pytest.approx(took, rel=1e-3)
    assert told["predicted"] == pytest.approx(took, abs=0.02)
    assert told["met"]
    assert len(told["tried"]) == 1
    assert told["ms_after"] < told["ms_before"]
    assert {row["kind"]: row["blocks"] for row in told["table"]} == {"head": [0, 1, 2, 3], "neuron": [0, 1, 2, 3]}
    for row in told["table"]:
        assert row["taken_as"] == sorted(row["taken_as"])
        assert row["stay"][0] == 0
        assert row["measured"][-1] == 1


def test_a_busy_machine_is_said() -> None:
    class Busy(Clock):
        def __call__(self, models: Iterable[nn.Module]) -> list[Timing]:
            return [replace(one, ratio=one.ratio and replace(one.ratio, low=0.5, high=0.9)) for one in super().__call__(models)]

    busy = timed(PruneWidth(latency_ratio=0.7, **OPTIONS), Busy())
    calm = timed(PruneWidth(latency_ratio=0.7, **OPTIONS), Clock())
    told = [any("other work ran" in says for says in trial.context.report["warnings"]) for trial in (busy, calm)]
    assert told == [True, False]


def test_what_takes_no_time_stays() -> None:
    free = timed(PruneWidth(latency_ratio=0.8, **OPTIONS), Clock(head=0, entry=0))
    assert all(entry["stay"] == entry["of"] for entry in free.context.report["gone"] if entry["kind"] == "head")
    dear = timed(PruneWidth(latency_ratio=0.8, **OPTIONS), Clock(neuron=0))
    assert all(entry["stay"] == entry["of"] for entry in dear.context.report["gone"] if entry["kind"] == "neuron")


def test_a_prediction_that_is_wrong_is_corrected_by_what_was_measured() -> None:
    clock = Clock(power=1.5)
    trial = timed(PruneWidth(latency_ratio=0.2, **OPTIONS), clock)
    told = trial.context.report["latency"]
    assert len(told["tried"]) > 1
    first, last = told["tried"][0], told["tried"][-1]
    assert first["measured"] > 0.2
    assert last["budget"] < first["budget"]
    assert clock.time(trial.after) / clock.time(trial.before) == pytest.approx(told["measured"], rel=1e-3)
    assert told["met"] == (told["measured"] <= 0.2)
    assert told["met"]


def test_what_cannot_be_reached_is_tried_a_few_times_and_said() -> None:
    """A clock that tells another time once blocks differ, which no table shows."""

    class Stubborn(Clock):
        def time(self, model: nn.Module) -> float:
            return super().time(model) if len(set(counts(model))) == 1 else 90.0

    trial = timed(PruneWidth(latency_ratio=0.6, **OPTIONS), Stubborn())
    told = trial.context.report["latency"]
    assert not told["met"]
    assert 1 <= len(told["tried"]) <= 4
    assert any("was not reached" in says for says in trial.context.report["warnings"])


def test_the_options_that_are_told_give_the_same_bytes() -> None:
    options: dict[str, Any] = {"round_to": 4, "rows": 8, "skip": [2]}
    trial = timed(PruneWidth(latency_ratio=0.7, **options), Clock())
    (says,) = trial.context.report["warnings"]
    again = trial.context.report["same_again"]["prune_width"]
    assert again["stay"]["heads"][2] is None
    assert "stay: {heads: [" in says
    assert "null" in says
    model, signature, rows = digits()
    repeated = tried(PruneWidth(**again), model, signature, rows)
    assert "warnings" not in repeated.context.report
    first, second = trial.after.state_dict(), repeated.after.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    assert repeated.context.report["kept_share"] == trial.context.report["kept_share"]


def test_stay_counts_what_stays() -> None:
    model, signature, rows = digits()
    stay: dict[str, Any] = {"heads": [4, 3, 2, None], "neurons": [256, 100, 0, 17]}
    trial = tried(PruneWidth(stay=stay, **OPTIONS), model, signature, rows)
    for entry in trial.context.report["gone"]:
        wanted = stay[f"{entry['kind']}s"][entry["block"]]
        assert entry["stay"] == (entry["of"] if wanted is None else wanted)
    for wrong, says in (
        ({"heads": [4, 4]}, "2 numbers of heads for 4 blocks"),
        ({"heads": [4, 4, 4, 5]}, "block 3 has 4 heads, not 5"),
    ):
        with pytest.raises(UserError, match=says):
            tried(PruneWidth(stay=wrong, **OPTIONS), model, signature, rows)
    with pytest.raises(UserError, match="no neurons can go from block 1") as caught:
        tried(PruneWidth(stay={"neurons": [9, 9, 9, 9]}, skip=[1], **OPTIONS), model, signature, rows)
    assert "null" in caught.value.hint


def test_below_the_smallest_tells_it() -> None:
    with pytest.raises(UserError, match=r"latency_ratio: 0.05 is less than what stays in any case, about 0\.") as caught:
        timed(PruneWidth(latency_ratio=0.05, **OPTIONS), Clock())
    enough = float(caught.value.hint.split()[2])
    clock = Clock()
    trial = timed(PruneWidth(latency_ratio=enough, **OPTIONS), clock)
    assert clock.time(trial.after) / clock.time(trial.before) <= enough


def test_without_a_runtime_macs_is_named() -> None:
    with pytest.raises(UserError, match="no file can be timed here") as caught:
        timed(PruneWidth(latency_ratio=0.5, **OPTIONS), None)
    assert "macs: 0.5" in caught.value.hint


def test_all_of_the_time_measures_nothing() -> None:
    clock = Clock()
    trial = timed(PruneWidth(latency_ratio=1, **OPTIONS), clock)
    assert trial.context.edits == []
    assert clock.measured == []


RECIPE = """
name: narrow
model: embedded:digits-vit
data:
  format: embedded
  calibration: {{rows: 32}}
passes:
  - prune_width: {{latency_ratio: {ratio}, rows: 8}}
export: [{formats}]
measure: {{repeats: 3, warmup: 1}}
"""


def test_a_recipe_whose_files_cannot_be_timed_is_refused_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import compress
    from compress.recipe import parse_recipe
    from export.to_coreml import CoreMLExporter

    monkeypatch.setattr(CoreMLExporter, "missing", lambda self: None)
    monkeypatch.setattr(CoreMLExporter, "timed_here", lambda self: False)
    for formats, says in (("coreml", r"none of the files \(coreml\)"), ("", "exports no file")):
        recipe = parse_recipe(RECIPE.format(ratio=0.7, formats=formats))
        with pytest.raises(UserError, match=says) as caught:
            compress.apply(recipe, out=tmp_path / "run")
        assert "macs: 0.7" in caught.value.hint
        assert "recipe.yaml:8:" in caught.value.where
        assert not (tmp_path / "run" / "report.json").exists()


def test_a_plan_says_what_it_assumes() -> None:
    pytest.importorskip("onnxruntime")
    from compress import planning
    from compress.recipe import parse_recipe

    plan = planning.make(parse_recipe(RECIPE.format(ratio=0.6, formats="onnx")))
    assert any("planned as macs: 0.6" in says for says in plan.warnings)
    same = planning.make(parse_recipe(RECIPE.format(ratio=0.6, formats="onnx").replace("latency_ratio", "macs")))
    assert plan.bytes_after == same.bytes_after
    least = planning.make(parse_recipe(RECIPE.format(ratio=0.1, formats="onnx").replace("rows: 8", "rows: 8, heads: false")))
    assert least.bytes_after < plan.bytes_before


@pytest.mark.slow
def test_a_run_measures_files_and_says_that_it_did(tmp_path: Path) -> None:
    """The real runtime, whose times decide nothing here but that the run goes through and leaves nothing behind."""
    pytest.importorskip("onnxruntime")
    import compress
    from compress.recipe import parse_recipe

    report = compress.apply(parse_recipe(RECIPE.format(ratio=0.97, formats="onnx")), out=tmp_path / "run")
    told = report.steps[0].report["latency"]
    assert told["runtime"].startswith("onnxruntime")
    assert told["file"] == "onnx"
    assert told["batch"] == 1
    assert any("stay: {heads:" in says for says in report.warnings)
    assert not list((tmp_path / "run").rglob("timed-*"))
