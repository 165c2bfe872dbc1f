"""Labelled rows by which a pass may judge the model it is changing. They are not those that files are judged by."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from calibrate.data import Rows
from calibrate.errors import UserError
from calibrate.fidelity import Estimate
from calibrate.losses import Loss, loss_for
from calibrate.metrics import Metric
from calibrate.modes import evaluating
from calibrate.signature import Batch

__all__ = ["Judged", "Validation"]

Labelled = tuple[Batch, Tensor | None]


@dataclass(frozen=True)
class Judged:
    """A model on the validation rows: the mean task loss, and the metric with its interval (None where there is none)."""

    loss: float
    metric: Estimate | None = None

    def json(self) -> dict[str, Any]:
        """The figures as JSON has them; a loss that is not finite is None."""
        told: dict[str, Any] = {"loss": self.loss if self.loss < float("inf") else None}
        if self.metric is not None:
            told |= {"metric": self.metric.value, "low": self.metric.low, "high": self.metric.high}
        return told


class Validation:
    """A judge that costs one run over the validation rows.

    Attributes:
        rows: how many.
        metric_name: of the task; "" where there is none.
        loss_name: what the loss is, in words.
    """

    def __init__(
        self,
        rows: int,
        call: Callable[[nn.Module, Batch], Tensor],
        batches: Callable[[], Iterable[Labelled]],
        loss: Loss,
        metric: Metric | None,
        described: dict[str, Any] | None = None,
    ) -> None:
        self.rows, self.loss_name = rows, loss.name
        self.metric_name = metric.name if metric else ""
        self._call, self._batches, self._loss, self._metric = call, batches, loss, metric
        self._described = described or {}

    def judge(self, model: nn.Module) -> Judged:
        """Loss and metric of the model as it is now."""
        losses: list[Tensor] = []
        statistics: list[Tensor] = []
        with evaluating(model):
            for batch, labels in self._batches():
                outputs = self._call(model, batch)
                losses.append(self._loss.rows(outputs, batch, labels))
                if self._metric is not None:
                    statistics.append(self._metric.rows(outputs, batch, labels))
        metric = self._metric.estimate(torch.cat(statistics)) if self._metric is not None else None
        return Judged(self._loss.mean(torch.cat(losses)), metric)

    def loss(self, model: nn.Module) -> float:
        """Mean task loss: cross-entropy, negative log-likelihood of a token, or squared error."""
        return self.judge(model).loss

    def metric(self, model: nn.Module) -> float | None:
        """The task's metric; None where there is none."""
        estimate = self.judge(model).metric
        return None if estimate is None else estimate.value

    def describe(self) -> dict[str, Any]:
        """Which rows they are and by what they judge, as JSON."""
        return {**self._described, "rows": self.rows, "loss": self.loss_name, "metric": self.metric_name}

    @classmethod
    def of(
        cls,
        rows: Rows,
        task: str,
        metric: Metric | None,
        call: Callable[[nn.Module, Batch], Tensor],
        batches: Callable[[], Iterator[Batch]],
        where: str = "data.validation",
    ) -> Validation:
        """The judge by rows of data.

        Args:
            batches: the rows in any order; ``calibration_row`` says which is which, where a row is one input.

        Raises:
            UserError: the rows have no labels, and the task needs them.
        """
        loss = loss_for(task, rows.labels, rows.group)
        if loss is None:
            hint = "Name the label column under data.columns, or take other rows."
            raise UserError(where, f"validation rows need labels, and {rows.table.name} has none", hint)
        told = rows.describe()
        described = {key: told[key] for key in ("path", "format", "of", "chosen", "fingerprint")}
        return cls(len(rows), call, lambda: _labelled(rows, batches()), loss, metric, described)


def _labelled(rows: Rows, batches: Iterator[Batch]) -> Iterator[Labelled]:
    start = 0
    for batch in batches:
        count = next(iter(batch.values())).shape[0] // rows.group
        numbers = batch.get("calibration_row", torch.arange(start, start + count))
        start += count
        yield batch, None if rows.labels is None else rows.labels[numbers]
