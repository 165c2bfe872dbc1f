"""Task losses: how far a model's outputs are from the labels, as one number that gets smaller when the model gets better.

A metric such as accuracy moves in steps; a loss tells two models apart that get the same rows right. As with metrics, a batch
becomes a few numbers per row of data, and the loss is made from those. Shapes: B rows of a batch, C classes, N rows in all, K
numbers kept per row.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from calibrate.errors import UserError
from calibrate.metrics import Perplexity
from calibrate.signature import Batch

__all__ = ["CrossEntropy", "LineError", "Loss", "NegativeLogLikelihood", "SquaredError", "loss_for"]


class Loss(ABC):
    """One task loss; ``name`` says in words what it is."""

    name: ClassVar[str]

    @abstractmethod
    def rows(self, outputs: Tensor, batch: Batch, labels: Tensor | None) -> Tensor:
        """Statistics of each row of data, float64 [rows, K].

        Raises:
            UserError: the outputs are not of the kind that the loss is for.
        """

    @abstractmethod
    def mean(self, statistics: Tensor) -> float:
        """The loss over all rows, from the statistics [N, K]; infinity where an output was not finite."""


class CrossEntropy(Loss):
    """Mean of ``-log softmax(outputs)[label]``, in nats, for class scores [B, C]."""

    name = "mean cross-entropy"

    def rows(self, outputs: Tensor, batch: Batch, labels: Tensor | None) -> Tensor:
        assert labels is not None
        if outputs.dim() != 2 or len(outputs) != len(labels):
            raise _unfit(f"class labels need one row of class scores each, the output is {list(outputs.shape)}")
        if int(labels.max()) >= outputs.shape[1] or int(labels.min()) < 0:
            raise _unfit(f"label {int(labels.max())} and the model has {outputs.shape[1]} classes")
        return F.cross_entropy(outputs.double(), labels, reduction="none").unsqueeze(1)

    def mean(self, statistics: Tensor) -> float:
        return _finite(statistics[:, 0].mean())


class NegativeLogLikelihood(Loss):
    """Mean of ``-log p(token | tokens before it)`` over the tokens that are not padding, in nats; logits [B, T, V]."""

    name = "mean negative log-likelihood of a token"

    def rows(self, outputs: Tensor, batch: Batch, labels: Tensor | None) -> Tensor:
        return Perplexity().rows(outputs, batch, labels)

    def mean(self, statistics: Tensor) -> float:
        return _finite(statistics[:, 0].sum() / statistics[:, 1].sum().clamp(min=1))


class SquaredError(Loss):
    """Mean squared difference of one score a row ([B] or [B, 1]) and its label."""

    name = "mean squared error"

    def rows(self, outputs: Tensor, batch: Batch, labels: Tensor | None) -> Tensor:
        assert labels is not None
        if outputs.shape[0] != len(labels) or outputs.numel() != len(labels):
            raise _unfit(f"scores as labels need one score a row, the output is {list(outputs.shape)}")
        return (outputs.double().reshape(-1) - labels.double()).square().unsqueeze(1)

    def mean(self, statistics: Tensor) -> float:
        return _finite(statistics[:, 0].mean())


class LineError(Loss):
    """For two embeddings a row ([2 * rows, C], as a0, b0, a1, b1 ...): the mean squared error of the labels by the line, rising
    or level, that fits best over their cosines. Similarity is labelled in a scale of its own (0 to 5), which the line takes in.

    It is ``var(label) * (1 - max(r, 0)^2)``, r being Pearson's correlation.
    """

    name = "mean squared error of the labels by a line over the cosines"

    def rows(self, outputs: Tensor, batch: Batch, labels: Tensor | None) -> Tensor:
        assert labels is not None
        if outputs.dim() != 2 or len(outputs) != 2 * len(labels):
            raise _unfit(f"similarity needs two embeddings a row, the output is {list(outputs.shape)}")
        embeddings = outputs.double()
        return torch.stack((F.cosine_similarity(embeddings[0::2], embeddings[1::2], dim=-1), labels.double()), 1)

    def mean(self, statistics: Tensor) -> float:
        scores, labels = (statistics - statistics.mean(0)).T
        spread = float(labels.square().mean())
        power = float(scores.square().mean())
        both = float((scores * labels).mean())
        if not math.isfinite(both):
            return math.inf
        return spread - max(both, 0.0) ** 2 / power if power > 0 else spread


def loss_for(task: str, labels: Tensor | None, group: int) -> Loss | None:
    """The loss of a task.

    Args:
        task: ``causal-lm``, or anything else that has labels.
        labels: int64 classes or floating scores; None: there are none, and only a language model has a loss then.
        group: model inputs a row of data; 2 for pairs of sentences.
    """
    if task == "causal-lm":
        return NegativeLogLikelihood()
    if labels is None:
        return None
    if not labels.is_floating_point():
        return CrossEntropy()
    return LineError() if group == 2 else SquaredError()


def _finite(value: Tensor) -> float:
    found = float(value)
    return found if math.isfinite(found) else math.inf


def _unfit(what: str) -> UserError:
    return UserError("data.validation", what, "Give rows with labels that the model was trained for.")
