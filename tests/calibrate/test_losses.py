"""Task losses against what they are by definition."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from calibrate.errors import UserError
from calibrate.losses import CrossEntropy, LineError, NegativeLogLikelihood, SquaredError, loss_for
from calibrate.metrics import Perplexity


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_cross_entropy_is_the_mean_surprise() -> None:
    outputs, labels = drawn(7, 3), torch.tensor([0, 1, 2, 0, 1, 2, 0])
    share = outputs.double().exp() / outputs.double().exp().sum(1, keepdim=True)
    wanted = -np.log([float(share[row, label]) for row, label in enumerate(labels.tolist())]).mean()
    loss = CrossEntropy()
    pieces = torch.cat([loss.rows(outputs[:4], {}, labels[:4]), loss.rows(outputs[4:], {}, labels[4:])])
    assert loss.mean(pieces) == pytest.approx(wanted, rel=1e-12)
    assert loss.mean(loss.rows(torch.zeros(7, 3), {}, labels)) == pytest.approx(math.log(3), rel=1e-12)
    assert loss.mean(loss.rows(torch.full((7, 3), math.nan), {}, labels)) == math.inf


def test_the_loss_of_a_language_model_is_the_logarithm_of_its_perplexity() -> None:
    batch = {
        "input_ids": torch.tensor([[1, 2, 3, 0], [2, 2, 1, 3]]),
        "attention_mask": torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]]),
    }
    logits = drawn(2, 4, 5)
    loss, metric = NegativeLogLikelihood(), Perplexity()
    perplexity = metric.estimate(metric.rows(logits, batch, None)).value
    assert loss.mean(loss.rows(logits, batch, None)) == pytest.approx(math.log(perplexity))


def test_scores_are_judged_by_their_squared_error() -> None:
    loss, labels = SquaredError(), torch.tensor([1.0, 2.0, 4.0])
    for outputs in (torch.tensor([1.0, 0.0, 1.0]), torch.tensor([[1.0], [0.0], [1.0]])):
        assert loss.mean(loss.rows(outputs, {}, labels)) == pytest.approx((0 + 4 + 9) / 3)


def test_pairs_are_judged_by_the_best_line() -> None:
    embeddings, labels = drawn(24, 6), drawn(12, seed=1) + 2
    loss = LineError()
    found = loss.rows(embeddings, {}, labels)
    cosines = found[:, 0].numpy()
    for sign in (1, -1):
        wanted = (sign * labels).double().numpy()
        line = np.polyfit(cosines, wanted, 1)
        error = float(((np.polyval(line, cosines) - wanted) ** 2).mean()) if line[0] > 0 else float(wanted.var())
        assert loss.mean(torch.stack((found[:, 0], torch.from_numpy(wanted)), 1)) == pytest.approx(error, rel=1e-9)
    perfect = torch.stack((found[:, 0], 3 + 5 * found[:, 0]), 1)
    assert loss.mean(perfect) == pytest.approx(0, abs=1e-12)
    level = torch.stack((torch.full((12,), 0.5, dtype=torch.float64), labels.double()), 1)
    assert loss.mean(level) == pytest.approx(float(labels.double().var(correction=0)))
    assert loss.mean(torch.full((4, 2), math.nan, dtype=torch.float64)) == math.inf


def test_the_loss_follows_from_task_and_labels() -> None:
    classes, scores = torch.tensor([0, 1]), torch.tensor([0.5, 1.0])
    assert isinstance(loss_for("image-classification", classes, 1), CrossEntropy)
    assert isinstance(loss_for("text-classification", scores, 1), SquaredError)
    assert isinstance(loss_for("sentence-embedding", scores, 2), LineError)
    assert isinstance(loss_for("causal-lm", None, 1), NegativeLogLikelihood)
    assert loss_for("features", None, 1) is None


@pytest.mark.parametrize(
    ("loss", "outputs", "labels", "says"),
    [
        (CrossEntropy(), drawn(2, 4, 5), torch.tensor([0, 1]), "one row of class scores each"),
        (CrossEntropy(), drawn(2, 2), torch.tensor([0, 2]), "label 2 and the model has 2 classes"),
        (SquaredError(), drawn(2, 3), torch.tensor([0.0, 1.0]), "one score a row"),
        (LineError(), drawn(3, 3), torch.tensor([0.0, 1.0]), "two embeddings a row"),
    ],
)
def test_outputs_of_another_kind_are_refused(loss: CrossEntropy, outputs: Tensor, labels: Tensor, says: str) -> None:
    with pytest.raises(UserError, match=says):
        loss.rows(outputs, {}, labels)
