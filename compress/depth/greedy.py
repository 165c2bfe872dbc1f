"""Tries changes of a model one after the other and keeps those that labelled rows allow (AxFormer, arXiv 2010.03688)."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from calibrate.errors import UserError
from compress.labelled import Judged, Validation

__all__ = ["CHOSE", "Change", "Greedy", "Trial"]

CHOSE = "The validation rows chose, so figures on them flatter the result; the evaluation rows judge."
_ROUNDING = 1e-6
"""Share of the starting loss that float32 sums in another order may add."""


class Change(ABC):
    """One change that can be made and taken back.

    Attributes:
        told: what it is, as JSON, for the report.
        what: the same in a few words, for the display of progress.
    """

    told: dict[str, Any]
    what: str

    @abstractmethod
    def do(self) -> None: ...

    @abstractmethod
    def undo(self) -> None: ...


@dataclass(frozen=True)
class Trial:
    """A change with the model's figures under it; ``taken``: whether it stayed."""

    change: Change
    judged: Judged
    taken: bool

    def json(self) -> dict[str, Any]:
        told = self.judged.json()
        return {**self.change.told, **{key: told[key] for key in ("loss", "metric") if key in told}, "taken": self.taken}


@dataclass
class Greedy:
    """Makes changes one by one. One stays where the loss on the validation rows is at most ``tolerance`` (a share of the starting
    loss) above the lowest that was seen: the model that is left is never worse than the one at the start by more than that.

    Attributes:
        most: runs over the validation rows that may be made, the first one and the last one among them.
        trials: every change that was tried, in order; ``untried``: those for which no run was left.
    """

    model: nn.Module
    validation: Validation
    tolerance: float
    most: int
    progress: Callable[[int, int, str], None] = lambda done, total, what: None
    trials: list[Trial] = field(default_factory=list)
    untried: list[Change] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.start = self.now = self.validation.judge(self.model)
        self.lowest, self.runs = self.start.loss, 1
        if not math.isfinite(self.start.loss):
            hint = "Mend the model, or take the rows out on which it gives NaN or infinity."
            raise UserError("data.validation", "the model's loss on the validation rows is not finite before any change", hint)

    def allows(self, loss: float) -> bool:
        """Whether a loss is low enough to stay with."""
        return loss <= self.lowest + (self.tolerance + _ROUNDING) * abs(self.start.loss)

    def run(self, changes: Iterable[Change], reserved: int = 1) -> list[Trial]:
        """Tries the changes in their order.

        Args:
            reserved: runs that are kept for later.
        """
        every = list(changes)
        made: list[Trial] = []
        total = min(len(self.trials) + len(every), self.most - reserved)
        for number, change in enumerate(every):
            if self.runs >= self.most - reserved:
                self.untried += every[number:]
                break
            self.progress(len(self.trials), total, f"without {change.what}")
            made.append(self._tried(change))
            self.trials.append(made[-1])
        return made

    def _tried(self, change: Change) -> Trial:
        change.do()
        try:
            judged = self.validation.judge(self.model)
        except BaseException:
            change.undo()
            raise
        self.runs += 1
        if not self.allows(judged.loss):
            change.undo()
            return Trial(change, judged, taken=False)
        self.now, self.lowest = judged, min(self.lowest, judged.loss)
        return Trial(change, judged, taken=True)

    def finish(self) -> Judged:
        """The figures of the model as it is now."""
        self.now = self.validation.judge(self.model)
        self.runs += 1
        return self.now

    def json(self) -> dict[str, Any]:
        """Which rows chose, every change that was tried, and the figures at the beginning and the end."""
        return {
            "validation": self.validation.describe(),
            "start": self.start.json(),
            "end": self.now.json(),
            "tolerance": self.tolerance,
            "evaluations": {"used": self.runs, "allowed": self.most},
            "tried": [trial.json() for trial in self.trials],
            "untried": [change.told for change in self.untried],
            "says": CHOSE,
        }
