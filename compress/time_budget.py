"""What meets a budget of measured time: a choice is predicted, made and timed, and the budget corrected by what was found."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from calibrate.fidelity import Estimate
from calibrate.latency import Timing

__all__ = ["Fit", "Trial", "fit", "short"]

Choice = TypeVar("Choice")

_TRIES = 4
_LOOSE = 0.02
"""Share of the time that a choice may stay below the budget, before a larger one is looked for."""
_FURTHEST = 0.5
"""Least share of what was asked that a corrected budget may be: predictions that are off by more are told, not followed."""
_BUSY = 0.1
"""Width of an interval of ratios beyond which the machine is taken to have been busy."""


@dataclass(frozen=True)
class Trial(Generic[Choice]):
    """A choice that was timed: the budget that it was searched for, what was predicted, what was measured.

    Attributes:
        whole: the model as it was, timed beside it; the ratio of ``timing`` is to that.
    """

    choice: Choice
    budget: float
    predicted: float
    whole: Timing
    timing: Timing

    @property
    def ratio(self) -> float:
        return self._estimate.value

    @property
    def low(self) -> float:
        return self._estimate.low

    @property
    def high(self) -> float:
        return self._estimate.high

    @property
    def _estimate(self) -> Estimate:
        assert self.timing.ratio is not None
        return self.timing.ratio


@dataclass(frozen=True)
class Fit(Generic[Choice]):
    """What was chosen among those timed; ``met``: whether it takes no longer than asked, as far as can be told."""

    asked: float
    chosen: Trial[Choice]
    tried: tuple[Trial[Choice], ...]
    met: bool

    def json(self) -> dict[str, Any]:
        """What a report tells of it."""
        chosen = self.chosen
        return {
            "asked": self.asked,
            "predicted": short(chosen.predicted),
            "measured": short(chosen.ratio),
            "low": short(chosen.low),
            "high": short(chosen.high),
            "met": self.met,
            "ms_before": short(chosen.whole.median_ms),
            "ms_after": short(chosen.timing.median_ms),
            "tried": [
                {"budget": short(trial.budget), "predicted": short(trial.predicted), "measured": short(trial.ratio)}
                for trial in self.tried
            ],
        }

    @property
    def cautions(self) -> list[str]:
        """Why the choice may not be what was asked for, in sentences."""
        said = []
        if self.chosen.high - self.chosen.low > _BUSY:
            spread = f"the ratio of times is {self.chosen.low:.4g} to {self.chosen.high:.4g}: other work ran on this machine"
            said.append(f"{spread}; the choice may be far from what an idle one would give")
        if not self.met:
            said.append(f"latency_ratio: {self.asked:g} was not reached: {self.chosen.ratio:.4g} was measured")
        return said


def short(value: float) -> float:
    """With the four digits that a report shows."""
    return float(f"{value:.4g}")


def fit(
    propose: Callable[[float, bool], tuple[Choice, float]], ratio: float, measure: Callable[[Choice], Sequence[Timing]]
) -> Fit[Choice]:
    """Proposes, times what was proposed, and corrects the budget until the time is as asked or nothing else is proposed.

    Of the choices that take no longer than asked (the lower end of the interval counts), the one that was searched with the
    largest budget is chosen; of none, the fastest.

    Args:
        propose: the best choice for a budget, as a share of the whole model's time, and the share that is predicted for it; told
            whether it is the first time: then it raises where nothing is predicted to be so fast, later it gives the fastest.
        measure: timings of the model as it is and with a choice, side by side.
    """
    tried: list[Trial[Choice]] = []
    budget = ratio
    for _ in range(_TRIES):
        choice, predicted = propose(budget, not tried)
        if any(choice == trial.choice for trial in tried):
            break
        whole, timing = measure(choice)
        last = Trial(choice, budget, predicted, whole, timing)
        tried.append(last)
        if last.low <= ratio <= last.high + _LOOSE:
            break
        saved, wanted = max(1.0 - last.ratio, 1e-3), 1.0 - ratio
        budget = max(_FURTHEST * ratio, min(1.0, 1.0 - wanted * (1.0 - last.predicted) / saved))
    meeting = [trial for trial in tried if trial.low <= ratio]
    chosen = max(meeting, key=lambda trial: trial.budget) if meeting else min(tried, key=lambda trial: trial.ratio)
    return Fit(ratio, chosen, tuple(tried), bool(meeting))
