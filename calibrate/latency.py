"""Time of several workloads, measured against each other: interleaved rounds after warm-up, medians, spread, ratios."""

from __future__ import annotations

import gc
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from calibrate.fidelity import Estimate

__all__ = ["Timing", "interleave", "processor_name"]

_RESAMPLES = 2000


@dataclass(frozen=True)
class Timing:
    """Time of one call in milliseconds: the median, and the 10th and 90th percentile of ``runs`` calls.

    ``threads``: torch's number of threads while it was measured (a runtime's own session may use another number).
    ``ratio``: this median over the median of the first workload, with a 95 % interval; None for the first itself.
    Below 1 is faster.
    """

    median_ms: float
    low_ms: float
    high_ms: float
    runs: int
    threads: int
    ratio: Estimate | None = None


def interleave(
    runs: Mapping[str, Callable[[], object]],
    *,
    repeats: int = 30,
    warmup: int = 3,
    budget_s: float = 60.0,
    minimum: int = 5,
    clock: Callable[[], float] = time.perf_counter,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Timing]:
    """Calls each workload once a round, in turn (A B C, C B A, A B C ...), so that drift of the machine meets all.

    The ratio's interval is a percentile bootstrap that draws whole rounds, so that what slows a round slows both
    sides of it (Efron & Tibshirani 1993, ch. 8 and 13); its seed is fixed.

    Args:
        runs: workloads by name; ratios are to the first.
        repeats: measured rounds.
        warmup: rounds before them that do not count.
        budget_s: seconds after which no further round starts, once there are ``minimum`` rounds.
        minimum: rounds that are measured whatever the budget.
        clock: seconds, monotonic.
        progress: told (rounds done, rounds in all) between two rounds.

    Raises:
        ValueError: no workload, or fewer than one measured round asked for.
    """
    if not runs or repeats < 1:
        raise ValueError("there must be at least one workload and one round")
    names, started = list(runs), clock()
    rounds: list[dict[str, float]] = []
    with _without_collector():
        for number in range(warmup + repeats):
            if len(rounds) >= min(minimum, repeats) and clock() - started >= budget_s:
                break
            measured = {}
            for name in names if number % 2 == 0 else reversed(names):
                before = clock()
                runs[name]()
                measured[name] = clock() - before
            if number >= warmup:
                rounds.append(measured)
            progress(number + 1, warmup + repeats)
    times = {name: 1000.0 * torch.tensor([row[name] for row in rounds], dtype=torch.float64) for name in names}
    first = times[names[0]]
    return {name: _timing(times[name], None if name == names[0] else first) for name in names}


def processor_name() -> str:
    """The processor's name as the system gives it, or its architecture where it gives none."""
    listing = Path("/proc/cpuinfo")
    if listing.is_file():
        for line in listing.read_text(errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() in ("model name", "Hardware", "cpu model") and value.strip():
                return " ".join(value.split())
    return platform.processor() or platform.machine() or "unknown"


def _timing(times: Tensor, first: Tensor | None) -> Timing:
    low, median, high = torch.quantile(times, torch.tensor([0.1, 0.5, 0.9], dtype=times.dtype)).tolist()
    ratio = None if first is None else _ratio(times, first)
    return Timing(median, low, high, len(times), torch.get_num_threads(), ratio)


def _ratio(times: Tensor, first: Tensor) -> Estimate:
    draws = torch.randint(len(times), (_RESAMPLES, len(times)), generator=torch.Generator().manual_seed(0))
    ratios = _median(times[draws]) / _median(first[draws])
    low, high = torch.quantile(ratios, torch.tensor([0.025, 0.975], dtype=ratios.dtype)).tolist()
    value = float(_median(times) / _median(first))
    return Estimate(value, low, high, len(times), "bootstrap over rounds of the ratio of medians")


def _median(times: Tensor) -> Tensor:
    return torch.quantile(times, 0.5, dim=-1)


@contextmanager
def _without_collector() -> Iterator[None]:
    """No garbage collection in the middle of a call."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
