"""Schedules under a budget of FLOPs or of measured time, chosen by what they change at the outputs: no labels.

A schedule takes a share of the tokens out at each block of a window of blocks; the share is what the budget asks for. Windows are
compared on calibration rows, and the best one is then changed block by block while that helps.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from torch import nn

from calibrate.errors import UserError
from calibrate.latency import Timing
from calibrate.modes import evaluating
from compress.anatomy import Anatomy
from compress.depth.output_scores import first_rows
from compress.layers.token_reducer import Place
from compress.quantization.sensitivity import Loss, Reference
from compress.rehearsal import stand_in
from compress.surgery import Surgery
from compress.tokens.attaching import attach
from compress.tokens.layout import Layout
from compress.tokens.schedule import How, Schedule, shares

if TYPE_CHECKING:
    from compress.passes.contract import Context

__all__ = ["Found", "Problem", "by_flops", "by_time", "even", "reference"]

Weights = Mapping[int, float]
"""By number of the block: its part of the tokens that go."""

_WINDOWS = 15
_CHANGES = 18
_TRIES = 5
_TOLD = 8
"""Most schedules that a report names."""
_STEP = 0.5
"""By how much of its weight a block is changed in a trial."""
_LOOSE = 0.02
"""Share of the time that the chosen schedule may stay below what was asked."""


@dataclass(frozen=True)
class Problem:
    """What is searched: a model, where its tokens can leave, and how they are chosen."""

    where: str
    model: nn.Module
    anatomy: Anatomy
    layout: Layout
    how: How
    place: Place
    numbers: Sequence[int]
    enter: int | None = None
    each: float = 0.0
    """What every block that takes tokens out costs beyond its FLOPs, as a share of the model's time."""

    @property
    def least(self) -> int:
        return max(self.how.prefix + 1, 2)

    def schedule(self, weights: Weights, strength: float) -> Schedule:
        """So many tokens go at each block as its weight asks for, as far as they can."""
        now, keep = min(self.enter or self.layout.tokens, self.layout.tokens), {}
        wanted = float(now)
        for number in self.layout.numbers:
            if not weights.get(number):
                continue
            wanted -= strength * weights[number] * self.layout.tokens
            most = (now - self.how.prefix) // 2 if self.how.merges else now
            then = max(round(wanted), now - most, self.least)
            if then < now:
                now = keep[number] = then
        return Schedule(keep, self.enter)

    def solved(self, weights: Weights, ratio: float) -> Schedule | None:
        """The most tokens that fit a share of the FLOPs (of the time); None: not even the fewest do."""
        low, high = 0.0, 1.0 / max(min(weight for weight in weights.values() if weight), 1e-3)
        if self.cost(self.schedule(weights, high)) > ratio:
            return None
        for _ in range(30):
            middle = (low + high) / 2
            if self.cost(self.schedule(weights, middle)) > ratio:
                low = middle
            else:
                high = middle
        return self.schedule(weights, high)

    def cost(self, schedule: Schedule) -> float:
        """What counts against the budget."""
        return self.share(schedule) + self.each * self.stages(schedule)

    def stages(self, schedule: Schedule) -> int:
        """Blocks that take tokens out."""
        return sum(then < given for given, then in schedule.after(self.layout))

    def share(self, schedule: Schedule) -> float:
        return shares(self.layout, self.anatomy, schedule, self.how, self.place)

    def made(self, schedule: Schedule) -> nn.Module:
        """The model with a schedule; its tensors are shared."""
        trial = stand_in(self.model)
        attach(trial, Surgery(), self.layout, schedule, self.how, self.place)
        return trial


@dataclass
class Found:
    """A schedule, and how it was found."""

    schedule: Schedule
    weights: Weights
    loss: Loss
    asked: float
    tried: list[dict[str, Any]] = field(default_factory=list)
    latency: dict[str, Any] = field(default_factory=dict)

    def json(self) -> dict[str, Any]:
        told = {"search": {"asked": self.asked, "loss": self.loss.json(), "tried": self.tried}}
        return told | ({"latency": self.latency} if self.latency else {})


def even(problem: Problem, ratio: float) -> Schedule:
    """A schedule of the budget that takes as much out at each block: what a search starts from.

    Raises:
        UserError: not even the fewest tokens fit.
    """
    numbers = problem.numbers
    weights = _evenly(numbers)
    found = problem.solved(weights, ratio)
    if found is None:
        early = {number: (1.0 if place_ == 0 else 1e-3) for place_, number in enumerate(numbers)}
        found = problem.solved(early, ratio)
    if found is None:
        least = problem.share(problem.schedule(weights, 1e3))
        what = f"flops: {ratio:g} is less than what stays in any case, about {least:.3f}"
        raise UserError(problem.where, what, "Ask for more, or let more blocks take tokens out.")
    return found


def _evenly(numbers: Sequence[int]) -> dict[int, float]:
    return {number: 1.0 / len(numbers) for number in numbers}


def reference(model: nn.Module, context: Context, rows: int) -> Reference:
    """Calibration rows and what the model gives for them."""
    batches = first_rows(list(context.calibration()), rows)
    with evaluating(model):
        return Reference(context.call, batches, [context.call(model, batch).detach() for batch in batches])


def by_flops(problem: Problem, context: Context, ratio: float, rows: int) -> Found:
    """The schedule of a share of FLOPs that changes the outputs least, among those that were tried."""
    return _searched(problem, context, ratio, reference(problem.model, context, rows))


def _searched(problem: Problem, context: Context, ratio: float, judge: Reference) -> Found:
    known: dict[str, Found] = {}
    windows = _windows(problem.numbers)
    total = len(windows) + _CHANGES

    def tried(weights: Weights) -> Found | None:
        schedule = problem.solved(weights, ratio)
        if schedule is None:
            return None
        key = str(schedule.json())
        if key not in known:
            context.progress(len(known), total, "schedules compared")
            known[key] = Found(schedule, weights, judge.loss(problem.made(schedule)), ratio)
        return known[key]

    found = [one for window in windows if (one := tried(_evenly(window))) is not None]
    if not found:
        schedule = even(problem, ratio)
        found = [Found(schedule, _evenly(problem.numbers), judge.loss(problem.made(schedule)), ratio)]
    chosen = min(found, key=_lost)
    spent, improved = 0, True
    while improved and spent < _CHANGES:
        improved = False
        for weights in _neighbours(chosen.weights, problem.numbers):
            if spent >= _CHANGES:
                break
            before = len(known)
            one = tried(weights)
            spent += len(known) - before
            if one is not None and _lost(one) < _lost(chosen):
                chosen, improved = one, True
    tries = [{"keep": one.schedule.json(), **one.loss.json()} for one in sorted(known.values(), key=_lost)]
    return replace(chosen, tried=tries[:_TOLD])


def _lost(found: Found) -> float:
    return found.loss.noise if found.loss.kl is None else found.loss.kl


def _windows(numbers: Sequence[int]) -> list[list[int]]:
    """Runs of blocks with some starts and ends, the whole first."""
    ends = range(len(numbers) + 1)
    found = [list(numbers[start:end]) for start, end in itertools.combinations(ends, 2)]
    found.sort(key=len, reverse=True)
    if len(found) <= _WINDOWS:
        return found
    step = len(found) / _WINDOWS
    return [found[int(number * step)] for number in range(_WINDOWS)]


def _neighbours(weights: Weights, numbers: Sequence[int]) -> list[dict[int, float]]:
    """The same with more or less at one block."""
    mean = sum(weights.values()) / max(len(weights), 1)
    found = []
    for number in numbers:
        for change in (_STEP, -_STEP):
            changed = {other: weights.get(other, 0.0) for other in numbers}
            changed[number] = max(changed[number] + change * mean, 0.0)
            if changed[number] != weights.get(number, 0.0) and any(changed.values()):
                found.append(changed)
    return found


def by_time(problem: Problem, context: Context, ratio: float, rows: int) -> Found:
    """The schedule whose file takes no longer than asked, as far as can be told, with the most tokens among those that were
    timed.

    Time is first taken to fall as FLOPs do. What was measured beyond that is then put down to the blocks that take tokens out,
    each alike, and schedules are compared anew under a budget that counts them.
    """
    assert context.latency is not None
    judge = reference(problem.model, context, rows)
    tries: list[tuple[Found, Timing]] = []
    for _ in range(_TRIES):
        try:
            found = _searched(problem, context, ratio, judge)
        except UserError:
            if not tries:
                raise
            break
        if any(found.schedule == other.schedule for other, _ in tries):
            break
        context.progress(len(tries), _TRIES, "time of the chosen tokens")
        timing = context.latency([problem.model, problem.made(found.schedule)])[1]
        tries.append((found, timing))
        assert timing.ratio is not None
        if timing.ratio.low <= ratio <= timing.ratio.high + _LOOSE:
            break
        beyond = timing.ratio.value - problem.share(found.schedule)
        problem = replace(problem, each=max(beyond, 0.0) / max(problem.stages(found.schedule), 1))
    return _in_time(problem, context, ratio, tries)


def _in_time(problem: Problem, context: Context, ratio: float, tries: Sequence[tuple[Found, Timing]]) -> Found:
    def taken(one: tuple[Found, Timing]) -> Any:
        return one[1].ratio

    def share(one: tuple[Found, Timing]) -> float:
        return problem.share(one[0].schedule)

    meeting = [one for one in tries if taken(one).low <= ratio]
    chosen = max(meeting, key=share) if meeting else min(tries, key=lambda one: taken(one).value)
    assert context.latency is not None
    told = {
        "asked": ratio,
        "measured": round(taken(chosen).value, 4),
        "low": round(taken(chosen).low, 4),
        "high": round(taken(chosen).high, 4),
        "met": bool(meeting),
        "ms_after": round(chosen[1].median_ms, 4),
        "tried": [
            {"keep": one[0].schedule.json(), "flops": round(share(one), 4), "measured": round(taken(one).value, 4)}
            for one in tries
        ],
        **context.latency.conditions,
    }
    written = ", ".join(f"{number}: {kept}" for number, kept in sorted(chosen[0].schedule.keep.items()))
    again = f"chosen by measured times, which vary between runs; the same tokens leave again with keep: {{{written}}}"
    context.report["warnings"] = [again]
    if not meeting:
        context.report["warnings"].append(f"latency_ratio: {ratio:g} was not reached: {told['measured']:g} was measured")
    return replace(chosen[0], asked=ratio, latency=told)
