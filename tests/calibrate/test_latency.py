"""Latency: laws on a clock that the test owns; nothing here depends on how fast the machine is."""

from __future__ import annotations

import gc
import random
from collections.abc import Callable

import pytest
import torch

from calibrate.latency import interleave, processor_name


class Clock:
    """Seconds that pass only when a workload says so."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[str] = []

    def __call__(self) -> float:
        return self.now

    def work(self, name: str, seconds: Callable[[], float]) -> Callable[[], None]:
        def run() -> None:
            self.calls.append(name)
            self.now += seconds()

        return run


def test_a_workload_twice_as_slow_has_ratio_two_exactly() -> None:
    clock = Clock()
    work = {"a": clock.work("a", lambda: 0.25), "b": clock.work("b", lambda: 0.5)}
    timings = interleave(work, repeats=9, clock=clock)
    ratio = timings["b"].ratio
    assert ratio is not None
    assert (ratio.value, ratio.low, ratio.high, ratio.rows) == (2.0, 2.0, 2.0, 9)
    assert timings["a"].ratio is None
    first = timings["a"]
    assert (first.median_ms, first.low_ms, first.high_ms, first.runs) == (250.0, 250.0, 250.0, 9)


@pytest.mark.slow
def test_the_interval_of_identical_workloads_covers_one_nineteen_times_in_twenty() -> None:
    covered = 0
    for seed in range(60):
        clock, noise = Clock(), random.Random(seed)
        work = {name: clock.work(name, lambda noise=noise: noise.lognormvariate(0.0, 0.3)) for name in "ab"}
        ratio = interleave(work, repeats=30, clock=clock, budget_s=1e9)["b"].ratio
        assert ratio is not None
        covered += ratio.low <= 1.0 <= ratio.high
    # Binomial(60, 0.95): fewer than 50 has probability 2e-4.
    assert covered >= 50


def test_control_the_interval_of_a_slower_workload_excludes_one() -> None:
    clock, noise = Clock(), random.Random(1)
    work = {
        "a": clock.work("a", lambda: noise.lognormvariate(0.0, 0.1)),
        "b": clock.work("b", lambda: 1.5 * noise.lognormvariate(0.0, 0.1)),
    }
    ratio = interleave(work, repeats=40, clock=clock, budget_s=1e9)["b"].ratio
    assert ratio is not None
    assert 1.0 < ratio.low < 1.5 < ratio.high


def test_drift_that_meets_both_workloads_leaves_the_ratio_alone() -> None:
    clock = Clock()
    # The machine slows down tenfold over the run; one after the other would give 3 or more in place of 1.5.
    work = {
        "a": clock.work("a", lambda: 1.0 + clock.now / 20),
        "b": clock.work("b", lambda: 1.5 * (1.0 + clock.now / 20)),
    }
    ratio = interleave(work, repeats=21, warmup=0, clock=clock, budget_s=1e9)["b"].ratio
    assert ratio is not None
    assert 1.4 < ratio.value < 1.6


def test_rounds_alternate_their_order_and_warm_up_does_not_count() -> None:
    clock = Clock()
    cost = iter([9.0, 9.0, *[1.0] * 8])
    work = {name: clock.work(name, lambda: next(cost)) for name in "ab"}
    timings = interleave(work, repeats=4, warmup=1, clock=clock, budget_s=1e9)
    assert "".join(clock.calls) == "abbaabbaab"
    assert timings["a"].high_ms == 1000.0
    assert timings["b"].runs == 4


def test_the_budget_ends_the_run_but_never_below_the_minimum() -> None:
    clock = Clock()
    work = {"a": clock.work("a", lambda: 1.0)}
    assert interleave(work, repeats=100, warmup=2, budget_s=12.0, clock=clock)["a"].runs == 10
    assert interleave(work, repeats=100, warmup=2, budget_s=0.0, minimum=5, clock=clock)["a"].runs == 5
    assert interleave(work, repeats=3, warmup=2, budget_s=0.0, minimum=5, clock=clock)["a"].runs == 3


def test_percentiles_are_those_of_the_measured_calls() -> None:
    clock = Clock()
    cost = iter(float(value) for value in range(11))
    work = {"a": clock.work("a", lambda: next(cost))}
    timing = interleave(work, repeats=11, warmup=0, clock=clock, budget_s=1e9)["a"]
    assert (timing.low_ms, timing.median_ms, timing.high_ms) == (1000.0, 5000.0, 9000.0)


def test_the_collector_is_put_back_and_threads_are_stated() -> None:
    def fail() -> None:
        assert not gc.isenabled()
        raise RuntimeError("stop")

    assert gc.isenabled()
    with pytest.raises(RuntimeError, match="stop"):
        interleave({"a": fail})
    assert gc.isenabled()
    assert interleave({"a": lambda: None}, repeats=1)["a"].threads == torch.get_num_threads()


def test_nothing_to_measure_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        interleave({})
    with pytest.raises(ValueError, match="at least one"):
        interleave({"a": lambda: None}, repeats=0)


def test_the_processor_has_a_name() -> None:
    assert processor_name().strip()
