"""Task metrics with 95 % confidence intervals, and the paired difference of two models on the same rows.

A metric turns a batch of outputs into a few numbers per row of data (whether it was right, a score and its label, a
sum of log-likelihoods), so that outputs need not be kept; figures and intervals are made from those. Shapes: B rows
of a batch, C classes, T tokens, V vocabulary, N rows in all, K numbers kept per row.
"""

from __future__ import annotations

import difflib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from calibrate.errors import UserError
from calibrate.fidelity import Estimate, wilson
from calibrate.signature import Batch

__all__ = ["F1", "METRICS", "Accuracy", "Correlation", "Estimate", "Metric", "Perplexity", "metric", "paired_drop"]

_RESAMPLES = 1000
_Z = 1.959963984540054


class Metric(ABC):
    """One task metric.

    Attributes:
        name: its key in a recipe.
        higher_is_better: False for perplexity.
        needs_labels: whether rows need a label of their own (a language model's labels are its inputs).
    """

    name: str
    higher_is_better: ClassVar[bool] = True
    needs_labels: ClassVar[bool] = True

    @abstractmethod
    def rows(self, outputs: Tensor, batch: Batch, labels: Tensor | None) -> Tensor:
        """Statistics of each row of data, float64 [rows, K].

        Args:
            outputs: [B, ...], as the model gave them; B is a multiple of the rows where a row is several model inputs.
            batch: the inputs that they came from.
            labels: [rows]; None where there are none.

        Raises:
            UserError: labels are needed and absent, or the outputs are not of the kind that the metric is for.
        """

    @abstractmethod
    def estimate(self, statistics: Tensor) -> Estimate:
        """The metric over all rows, from the statistics [N, K]."""

    @abstractmethod
    def drop(self, reference: Tensor, other: Tensor) -> Estimate:
        """How much worse the other model is on the same rows; positive is worse. In the metric's own unit, for
        perplexity relative (0.1 is ten percent higher)."""


class Accuracy(Metric):
    """Share of rows whose label is among the ``top`` largest scores.

    Interval: Wilson's; of the difference: adjusted Wald for paired proportions (Bonett and Price 2012, J. Educ.
        Behav. Stat. 37, p. 479, eq. 5), from the rows that only one of the two has right.
    """

    def __init__(self, top: int = 1) -> None:
        self.top, self.name = top, "accuracy" if top == 1 else f"top{top}"

    def rows(self, outputs: Tensor, batch: Batch, labels: Tensor | None) -> Tensor:
        labels = _classes(self.name, outputs, labels)
        if outputs.shape[-1] <= self.top > 1:
            what = f"{self.name} of {outputs.shape[-1]} classes is always 1"
            raise UserError("data.metric", what, "Give metric: accuracy.")
        chosen = outputs.topk(self.top, dim=-1).indices
        right = (chosen == labels.unsqueeze(1)).any(1) & torch.isfinite(outputs).all(1)
        return right.double().unsqueeze(1)

    def estimate(self, statistics: Tensor) -> Estimate:
        hits, rows = int(statistics.sum()), statistics.shape[0]
        low, high = wilson(hits, rows)
        return Estimate(hits / rows, low, high, rows, "wilson")

    def drop(self, reference: Tensor, other: Tensor) -> Estimate:
        rows = _same_rows(reference, other)
        lost = int(((reference == 1) & (other == 0)).sum())
        won = int(((reference == 0) & (other == 1)).sum())
        first, second = (lost + 1) / (rows + 2), (won + 1) / (rows + 2)
        half = _Z * math.sqrt((first + second - (first - second) ** 2) / (rows + 2))
        middle = first - second
        return Estimate((lost - won) / rows, max(middle - half, -1.0), min(middle + half, 1.0), rows, "paired adjusted wald")


class F1(Metric):
    """F1: of class 1 where there are two classes, else (or with ``macro``) the mean over the classes that occur.

    Interval: bootstrap over rows, percentile, 1000 resamples. A resample of rows is a draw of the counts of their
        distinct (prediction, label) pairs, which is what is drawn.
    """

    def __init__(self, macro: bool = False) -> None:
        self.macro, self.name = macro, "f1_macro" if macro else "f1"

    def rows(self, outputs: Tensor, batch: Batch, labels: Tensor | None) -> Tensor:
        labels = _classes(self.name, outputs, labels)
        classes = outputs.new_full(labels.shape, outputs.shape[-1])
        # An output that is not finite predicts no class at all.
        predicted = torch.where(torch.isfinite(outputs).all(1), outputs.argmax(-1), -1)
        return torch.stack((predicted.double(), labels.double(), classes.double()), 1)

    def estimate(self, statistics: Tensor) -> Estimate:
        cells, counts = torch.unique(statistics, dim=0, return_counts=True)
        draws = _draw_counts(counts)
        value = self._score(cells[:, 0], cells[:, 1], cells, counts.double().unsqueeze(0))
        return _bootstrapped(value, self._score(cells[:, 0], cells[:, 1], cells, draws), len(statistics))

    def drop(self, reference: Tensor, other: Tensor) -> Estimate:
        rows = _same_rows(reference, other)
        cells, counts = torch.unique(torch.cat((reference, other[:, :1]), 1), dim=0, return_counts=True)

        def lost(weights: Tensor) -> Tensor:
            first = self._score(cells[:, 0], cells[:, 1], cells, weights)
            return first - self._score(cells[:, 3], cells[:, 1], cells, weights)

        return _bootstrapped(lost(counts.double().unsqueeze(0)), lost(_draw_counts(counts)), rows, "paired bootstrap")

    def _score(self, predicted: Tensor, labels: Tensor, cells: Tensor, weights: Tensor) -> Tensor:
        """F1 [R] for weights [R, cells]; predictions and labels are those of the cells."""
        binary = int(cells[0, 2]) == 2 and not self.macro
        classes = [1.0] if binary else sorted(set(predicted.tolist()) | set(labels.tolist()) - {-1.0})
        scores, present = [], []
        for number in classes:
            if number < 0:
                continue
            hits = weights @ ((predicted == number) & (labels == number)).double()
            either = weights @ ((predicted == number).double() + (labels == number).double())
            scores.append(torch.where(either > 0, 2 * hits / either.clamp(min=1), torch.zeros_like(hits)))
            present.append((either > 0).double())
        total = torch.stack(present).sum(0).clamp(min=1)
        return torch.stack(scores).sum(0) / (1 if binary else total)


class Correlation(Metric):
    """Pearson's or Spearman's correlation of the model's scores with the labels.

    The score of a row is the output itself (a regression head: [B] or [B, 1]), or the cosine of the two embeddings of
    a pair (outputs [2 * rows, C] in the order a0, b0, a1, b1 ...). Interval: bootstrap over rows, percentile, 1000
    resamples.
    """

    def __init__(self, ranks: bool) -> None:
        self.ranks, self.name = ranks, "spearman" if ranks else "pearson"

    def rows(self, outputs: Tensor, batch: Batch, labels: Tensor | None) -> Tensor:
        if labels is None:
            raise _unlabelled(self.name)
        scores = outputs.double()
        if scores.shape[0] == 2 * len(labels) and scores.dim() == 2:
            scores = F.cosine_similarity(scores[0::2], scores[1::2], dim=-1)
        elif scores.shape[0] == len(labels) == scores.numel():
            scores = scores.reshape(-1)
        else:
            what = f"{self.name} needs one score a row or two embeddings, the output is {list(outputs.shape)}"
            raise UserError("data.metric", what, "Give metric: accuracy for classes.")
        return torch.stack((scores, labels.double()), 1)

    def estimate(self, statistics: Tensor) -> Estimate:
        scores, labels = _finite_scores(statistics[:, 0]), statistics[:, 1]
        value = self._correlate(scores.unsqueeze(0), labels.unsqueeze(0))
        resampled = _resampled(lambda rows: self._correlate(scores[rows], labels[rows]), len(statistics))
        return _bootstrapped(value, resampled, len(statistics))

    def drop(self, reference: Tensor, other: Tensor) -> Estimate:
        rows = _same_rows(reference, other)
        first, second, labels = _finite_scores(reference[:, 0]), _finite_scores(other[:, 0]), reference[:, 1]

        def lost(chosen: Tensor) -> Tensor:
            expected = self._ranked(labels[chosen])
            return _pearson(self._ranked(first[chosen]), expected) - _pearson(self._ranked(second[chosen]), expected)

        value = lost(torch.arange(rows).unsqueeze(0))
        return _bootstrapped(value, _resampled(lost, rows), rows, "paired bootstrap")

    def _correlate(self, scores: Tensor, labels: Tensor) -> Tensor:
        return _pearson(self._ranked(scores), self._ranked(labels))

    def _ranked(self, values: Tensor) -> Tensor:
        return _average_ranks(values) if self.ranks else values


class Perplexity(Metric):
    """``exp`` of the mean negative log-likelihood of each token given those before it; padded tokens do not count.

    Outputs are logits [B, T, V]; the labels are the input ids, shifted by one. Interval: bootstrap over rows (tokens
    of a row depend on each other), percentile, 1000 resamples.
    """

    name = "perplexity"
    higher_is_better = False
    needs_labels = False

    def rows(self, outputs: Tensor, batch: Batch, labels: Tensor | None) -> Tensor:
        ids = batch.get("input_ids")
        if ids is None or outputs.dim() != 3 or outputs.shape[:2] != ids.shape:
            what = f"perplexity needs logits [B, T, V] for input_ids [B, T], the output is {list(outputs.shape)}"
            raise UserError("data.metric", what, "It is for causal language models.")
        mask = batch.get("attention_mask", torch.ones_like(ids)).bool()
        counted = mask[:, 1:] & mask[:, :-1]
        sums = []
        for logits, row, keep in zip(outputs, ids, counted, strict=True):  # one row at a time: logits are large
            sums.append(F.cross_entropy(logits[:-1][keep].float(), row[1:][keep], reduction="sum").double())
        losses = torch.stack(sums)
        losses = torch.where(torch.isfinite(losses), losses, torch.full_like(losses, math.inf))
        return torch.stack((losses, counted.sum(1).double()), 1)

    def estimate(self, statistics: Tensor) -> Estimate:
        value = _mean_loss(statistics, torch.ones(1, len(statistics), dtype=torch.float64)).exp()
        draws = _draw_counts(torch.ones(len(statistics), dtype=torch.int64))
        return _bootstrapped(value, _mean_loss(statistics, draws).exp(), len(statistics))

    def drop(self, reference: Tensor, other: Tensor) -> Estimate:
        rows = _same_rows(reference, other)

        def worse(weights: Tensor) -> Tensor:
            return (_mean_loss(other, weights) - _mean_loss(reference, weights)).expm1()

        value = worse(torch.ones(1, rows, dtype=torch.float64))
        draws = _draw_counts(torch.ones(rows, dtype=torch.int64))
        return _bootstrapped(value, worse(draws), rows, "paired bootstrap, relative")


METRICS: dict[str, Callable[[], Metric]] = {
    "accuracy": Accuracy,
    "top5": lambda: Accuracy(top=5),
    "f1": F1,
    "f1_macro": lambda: F1(macro=True),
    "spearman": lambda: Correlation(ranks=True),
    "pearson": lambda: Correlation(ranks=False),
    "perplexity": Perplexity,
}
"""Every metric by its key in a recipe."""


def metric(name: str) -> Metric:
    """The metric of that name.

    Raises:
        UserError: there is none; names the nearest.
    """
    if name not in METRICS:
        near = difflib.get_close_matches(name, METRICS, n=2, cutoff=0.4)
        hint = f"Nearest: {', '.join(near)}." if near else f"There is: {', '.join(METRICS)}."
        raise UserError("data.metric", f"unknown metric {name!r}", hint)
    return METRICS[name]()


def paired_drop(metric: Metric, labels: Tensor | None, reference: Tensor, other: Tensor, batch: Batch | None = None) -> Estimate:
    """``Metric.drop`` from the outputs themselves: both models' on the same rows, [B, ...]."""
    batch = batch or {}
    return metric.drop(metric.rows(reference, batch, labels), metric.rows(other, batch, labels))


def _classes(name: str, outputs: Tensor, labels: Tensor | None) -> Tensor:
    if labels is None:
        raise _unlabelled(name)
    if outputs.dim() != 2 or len(outputs) != len(labels) or labels.is_floating_point():
        what = f"{name} needs one row of class scores for each class label, the output is {list(outputs.shape)}"
        raise UserError("data.metric", what, "Give metric: spearman or pearson for scores, perplexity for language models.")
    if int(labels.max()) >= outputs.shape[1] or int(labels.min()) < 0:
        what = f"label {int(labels.max())} and the model has {outputs.shape[1]} classes"
        raise UserError("data", what, "Labels are numbered from 0 in the order of the model's classes.")
    return labels


def _unlabelled(name: str) -> UserError:
    return UserError("data", f"metric {name} needs labels, the rows have none", "Name the label column under data.columns.")


def _same_rows(reference: Tensor, other: Tensor) -> int:
    if reference.shape != other.shape:
        raise ValueError(f"statistics of {reference.shape[0]} rows against {other.shape[0]}")
    return reference.shape[0]


def _finite_scores(scores: Tensor) -> Tensor:
    """A score that is not finite says nothing: it becomes the mean of the others."""
    finite = torch.isfinite(scores)
    mean = scores[finite].mean() if finite.any() else scores.new_zeros(())
    return torch.where(finite, scores, mean)


def _pearson(a: Tensor, b: Tensor) -> Tensor:
    """Pearson's r along the last dimension; 0 where one side is constant."""
    a, b = a - a.mean(-1, keepdim=True), b - b.mean(-1, keepdim=True)
    product = (a.square().sum(-1) * b.square().sum(-1)).sqrt()
    return torch.where(product > 0, (a * b).sum(-1) / product.clamp(min=1e-300), torch.zeros_like(product))


def _average_ranks(values: Tensor) -> Tensor:
    """Ranks from 1 along the last dimension, ties get the mean of theirs."""
    ordered = values.sort(-1).values
    values = values.contiguous()
    below = torch.searchsorted(ordered, values)
    upto = torch.searchsorted(ordered, values, right=True)
    return (below + upto + 1).double() / 2


def _mean_loss(statistics: Tensor, weights: Tensor) -> Tensor:
    """Mean loss of a token [R] for row weights [R, N]."""
    return (weights @ statistics[:, 0]) / (weights @ statistics[:, 1]).clamp(min=1)


def _resampled(score: Callable[[Tensor], Tensor], rows: int) -> Tensor:
    """``score`` of row numbers [R, N] drawn with replacement, in pieces of bounded size."""
    generator = torch.Generator().manual_seed(0)
    step = max(1, min(_RESAMPLES, 400_000 // max(rows, 1)))
    pieces = []
    for start in range(0, _RESAMPLES, step):
        pieces.append(score(torch.randint(rows, (min(step, _RESAMPLES - start), rows), generator=generator)))
    return torch.cat(pieces)


def _draw_counts(counts: Tensor) -> Tensor:
    """How often each of the cells is drawn when as many rows as there are are drawn with replacement, [resamples,
    cells]."""
    import numpy as np

    total = int(counts.sum())
    drawn = np.random.default_rng(0).multinomial(total, (counts.double() / total).numpy(), size=_RESAMPLES)
    return torch.from_numpy(drawn).double()


def _bootstrapped(value: Tensor, resampled: Tensor, rows: int, method: str = "bootstrap") -> Estimate:
    low, high = torch.quantile(resampled.double(), torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Estimate(float(value), low, high, rows, method)
