"""Trying changes one by one: what stays, what it may cost, how often the rows are run."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from calibrate.errors import UserError
from calibrate.losses import Loss
from compress.depth.greedy import Change, Greedy
from compress.labelled import Judged, Validation


class Sum(nn.Module):
    """Its loss is a number that changes add to."""

    def __init__(self, loss: float) -> None:
        super().__init__()
        self.loss = loss


class Told(Loss):
    name = "a number"

    def rows(self, outputs: Tensor, batch: dict[str, Tensor], labels: Tensor | None) -> Tensor:
        return outputs

    def mean(self, statistics: Tensor) -> float:
        return float(statistics)


class Add(Change):
    def __init__(self, model: Sum, more: float) -> None:
        self.model, self.more, self.told, self.what = model, more, {"more": more}, f"{more}"

    def do(self) -> None:
        self.model.loss += self.more

    def undo(self) -> None:
        self.model.loss -= self.more


def judge() -> Validation:
    def call(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        assert isinstance(model, Sum)
        return torch.tensor([model.loss], dtype=torch.float64)

    return Validation(1, call, lambda: [({}, None)], Told(), None)


def greedy(model: Sum, tolerance: float = 0.0, most: int = 100) -> Greedy:
    return Greedy(model, judge(), tolerance, most)


def test_without_tolerance_the_loss_never_rises() -> None:
    model = Sum(1.0)
    search = greedy(model)
    trials = search.run([Add(model, more) for more in (0.5, -0.2, 0.1, 0.0, -0.3, 1e-3, 0.5)])
    assert [trial.taken for trial in trials] == [False, True, False, True, True, False, False]
    assert model.loss == pytest.approx(0.5)
    assert search.now.loss == pytest.approx(0.5)
    assert search.runs == 8


def test_tolerance_is_counted_from_the_lowest_and_does_not_add_up() -> None:
    model = Sum(2.0)
    search = greedy(model, tolerance=0.1)
    trials = search.run([Add(model, 0.09) for _ in range(5)])
    assert [trial.taken for trial in trials] == [True, True, False, False, False]
    assert model.loss == pytest.approx(2.18)
    assert [trial.taken for trial in search.run([Add(model, -1.0), Add(model, 0.25)])] == [True, False]
    assert search.lowest == pytest.approx(1.18)


def test_the_number_of_runs_is_bounded_and_what_they_do_not_reach_is_told() -> None:
    model = Sum(1.0)
    search = greedy(model, most=5)
    assert len(search.run([Add(model, -0.01) for _ in range(9)])) == 3
    assert search.run([Add(model, 1.0)]) == []
    search.finish()
    assert search.runs == 5
    assert len(search.untried) == 7
    told = search.json()
    assert told["evaluations"] == {"used": 5, "allowed": 5}
    assert [one["taken"] for one in told["tried"]] == [True] * 3
    assert told["end"]["loss"] == pytest.approx(0.97)


def test_nothing_to_try_changes_nothing() -> None:
    model = Sum(1.0)
    search = greedy(model)
    assert search.run([]) == []
    assert (model.loss, search.runs, search.start, search.now) == (1.0, 1, Judged(1.0), Judged(1.0))


def test_losses_that_are_not_finite_are_refused_at_the_start_and_never_taken_later() -> None:
    with pytest.raises(UserError, match="not finite before any change"):
        greedy(Sum(math.inf))
    model = Sum(1.0)
    search = greedy(model, tolerance=5.0)
    assert [trial.taken for trial in search.run([Add(model, 1e300), Add(model, math.inf)])] == [False, False]
    model = Sum(1.0)
    search = greedy(model, tolerance=5.0)
    assert [trial.json()["loss"] for trial in search.run([Add(model, math.inf)])] == [None]


def test_a_change_is_taken_back_when_the_judge_fails() -> None:
    model = Sum(1.0)
    search = greedy(model)

    class Stopped(Exception):
        pass

    def stop() -> None:
        raise Stopped

    search.validation._batches = stop  # type: ignore[assignment]
    with pytest.raises(Stopped):
        search.run([Add(model, -0.5)])
    assert model.loss == 1.0
