"""Tokens under a budget of measured time, with a clock that is known: what every block that takes tokens out costs is learnt."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
from torch import nn
from trial import digits, tried

from calibrate.fidelity import Estimate
from calibrate.latency import Timing
from compress.layers import TokenReducer
from compress.layers.attached import attached_to
from compress.passes.merge_tokens import MergeTokens


class Clock:
    """Takes, for a digits model, one for each token that a block gets, and a fixed time for each block that takes some out."""

    conditions: dict[str, Any] = {"runtime": "a clock of the test", "batch": 1, "threads": 1, "processor": "none"}

    def __init__(self, entry: float) -> None:
        self.entry = entry
        self.calls = 0

    def time(self, model: nn.Module) -> float:
        total, now = 0.0, 17
        for number in range(4):
            total += now
            reducer = attached_to(model.get_submodule(f"blocks.{number}"), TokenReducer)
            if reducer is not None and reducer.keep is not None and reducer.keep < now:
                now = reducer.keep
                total += self.entry
        return total

    def __call__(self, models: Iterable[nn.Module]) -> list[Timing]:
        self.calls += 1
        times = [self.time(model) for model in models]
        ratios: list[Estimate | None] = [None]
        ratios += [Estimate(time / times[0], time / times[0], time / times[0], 9, "known") for time in times[1:]]
        return [Timing(time, time, time, 9, 1, ratio) for time, ratio in zip(times, ratios, strict=True)]


@pytest.mark.parametrize(("entry", "ratio"), [(0.0, 0.8), (3.0, 0.8)])
def test_the_budget_is_met_though_every_block_that_merges_costs_time(entry: float, ratio: float) -> None:
    clock = Clock(entry)
    done = tried(MergeTokens(latency_ratio=ratio, rows=32), *digits(), clock)
    told = done.context.report["latency"]
    took = clock.time(done.after) / clock.time(done.before)
    assert told["met"]
    assert took == pytest.approx(told["measured"], abs=1e-3)
    assert took <= ratio
    assert clock.calls == len(told["tried"]) <= 5
    by_flops = tried(MergeTokens(flops=ratio, rows=32), *digits())
    if entry:
        assert clock.time(by_flops.after) / clock.time(by_flops.before) > ratio, "FLOPs alone promise too much"


def test_a_budget_that_no_schedule_meets_is_said() -> None:
    done = tried(MergeTokens(latency_ratio=0.5, rows=32), *digits(), Clock(20.0))
    told = done.context.report["latency"]
    assert not told["met"]
    assert any("was not reached" in one for one in done.context.report["warnings"])
