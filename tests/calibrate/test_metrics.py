"""Metrics against scipy and scikit-learn, coverage of their intervals by simulation, and controls."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from scipy import stats
from sklearn.metrics import accuracy_score, f1_score
from torch import Tensor

from calibrate.errors import UserError
from calibrate.metrics import METRICS, Accuracy, Correlation, Metric, Perplexity, metric, paired_drop


def scores_for(labels: Tensor, classes: int, skill: float = 1.0) -> Tensor:
    """Class scores that are right more often the larger ``skill`` is."""
    scores = torch.randn(len(labels), classes)
    scores[torch.arange(len(labels)), labels] += skill
    return scores


def statistics(name: str, outputs: Tensor, labels: Tensor | None) -> Tensor:
    return metric(name).rows(outputs, {}, labels)


def test_accuracy_is_that_of_sklearn() -> None:
    labels = torch.randint(0, 4, (300,))
    outputs = scores_for(labels, 4)
    found = Accuracy().estimate(statistics("accuracy", outputs, labels))
    assert found.value == pytest.approx(accuracy_score(labels, outputs.argmax(1)))
    assert found.low < found.value < found.high
    assert (found.rows, found.method) == (300, "wilson")


def test_top5_counts_the_five_largest_scores() -> None:
    outputs = torch.arange(10.0).repeat(10, 1)
    found = metric("top5").estimate(statistics("top5", outputs, torch.arange(10)))
    assert found.value == 0.5
    with pytest.raises(UserError, match="always 1"):
        statistics("top5", torch.randn(3, 5), torch.tensor([0, 1, 2]))


@pytest.mark.parametrize(("name", "classes", "average"), [("f1", 2, "binary"), ("f1", 5, "macro"), ("f1_macro", 2, "macro")])
def test_f1_is_that_of_sklearn(name: str, classes: int, average: str) -> None:
    labels = torch.randint(0, classes, (200,))
    outputs = scores_for(labels, classes)
    found = metric(name).estimate(statistics(name, outputs, labels))
    assert found.value == pytest.approx(f1_score(labels, outputs.argmax(1), average=average))
    assert found.low < found.value < found.high


def test_macro_f1_leaves_out_classes_that_do_not_occur() -> None:
    labels = torch.tensor([0, 0, 2, 2, 2])
    outputs = torch.nn.functional.one_hot(torch.tensor([0, 2, 2, 2, 0]), 6).float()
    found = metric("f1").estimate(statistics("f1", outputs, labels))
    assert found.value == pytest.approx(f1_score(labels, outputs.argmax(1), average="macro"))


@pytest.mark.parametrize(("name", "oracle"), [("spearman", stats.spearmanr), ("pearson", stats.pearsonr)])
@pytest.mark.parametrize("ties", [False, True])
def test_correlations_are_those_of_scipy(name: str, oracle: Callable[..., tuple[float, float]], ties: bool) -> None:
    labels = torch.randn(150)
    outputs = labels + torch.randn(150)
    if ties:
        labels, outputs = labels.round(), (2 * outputs).round() / 2
    found = metric(name).estimate(statistics(name, outputs.unsqueeze(1), labels))
    assert found.value == pytest.approx(oracle(outputs, labels)[0], abs=1e-6)
    assert found.low < found.value < found.high


def test_pairs_are_scored_by_the_cosine_of_neighbouring_rows() -> None:
    a, b = torch.randn(40, 8), torch.randn(40, 8)
    interleaved = torch.stack((a, 3 * b), 1).reshape(80, 8)
    labels = torch.randn(40)
    expected = stats.spearmanr(torch.cosine_similarity(a, b), labels)[0]
    found = metric("spearman").estimate(statistics("spearman", interleaved, labels))
    assert found.value == pytest.approx(expected, abs=1e-6)
    blocked = torch.cat((a, b))  # control: the other order is wrong
    wrong = metric("spearman").estimate(statistics("spearman", blocked, labels))
    assert abs(wrong.value - expected) > 0.01


def test_perplexity_is_the_mean_over_tokens_and_leaves_out_padding() -> None:
    logits, ids = torch.randn(3, 6, 11), torch.randint(0, 11, (3, 6))
    mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2, [1] * 2 + [0] * 4])
    losses = []
    for row, keep in enumerate((6, 4, 2)):
        for t in range(1, keep):
            losses.append(-logits[row, t - 1].log_softmax(-1)[ids[row, t]])
    found = Perplexity().rows(logits, {"input_ids": ids, "attention_mask": mask}, None)
    assert found[:, 1].tolist() == [5, 3, 1]
    assert Perplexity().estimate(found).value == pytest.approx(float(torch.stack(losses).mean().exp()), rel=1e-6)
    padded = logits.clone()
    padded[1, 4:] = 1e6
    again = Perplexity().rows(padded, {"input_ids": ids, "attention_mask": mask}, None)
    assert torch.equal(again, found)


def test_perplexity_of_uniform_logits_is_the_vocabulary() -> None:
    batch = {"input_ids": torch.randint(0, 32, (8, 10))}
    rows = Perplexity().rows(torch.zeros(8, 10, 32), batch, None)
    assert Perplexity().estimate(rows).value == pytest.approx(32, rel=1e-6)


def test_left_padding_does_not_count_either() -> None:
    logits, ids = torch.randn(1, 4, 9), torch.randint(0, 9, (1, 4))
    whole = Perplexity().rows(logits, {"input_ids": ids}, None)
    left = torch.cat((torch.randn(1, 2, 9), logits), 1), torch.cat((torch.zeros(1, 2, dtype=torch.long), ids), 1)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1]])
    found = Perplexity().rows(left[0], {"input_ids": left[1], "attention_mask": mask}, None)
    assert torch.equal(found, whole)


@pytest.mark.parametrize("name", ["accuracy", "f1", "spearman", "pearson", "perplexity"])
def test_the_same_outputs_lose_nothing(name: str) -> None:
    stat = _example(metric(name), 0.0)
    found = metric(name).drop(stat, stat)
    assert found.value == 0
    assert found.low <= 0 <= found.high


@pytest.mark.parametrize("name", ["accuracy", "f1", "spearman", "pearson", "perplexity"])
def test_noise_is_a_loss_and_its_absence_a_gain(name: str) -> None:
    clean, noisy = _example(metric(name), 0.0), _example(metric(name), 3.0)
    lost, won = metric(name).drop(clean, noisy), metric(name).drop(noisy, clean)
    assert lost.value > 0
    assert lost.low > 0
    assert won.value < 0
    assert won.high < 0


@pytest.mark.parametrize("name", ["accuracy", "f1", "f1_macro"])
def test_shuffled_labels_are_at_chance(name: str) -> None:
    labels = torch.randint(0, 2, (1000,))
    outputs = scores_for(labels, 2, skill=3.0)
    assert metric(name).estimate(statistics(name, outputs, labels)).value > 0.9
    shuffled = labels[torch.randperm(1000)]
    found = metric(name).estimate(statistics(name, outputs, shuffled))
    assert found.low < 0.5 < found.high + 0.03


def test_drop_equals_the_difference_of_the_estimates() -> None:
    labels = torch.randint(0, 5, (400,))
    good = scores_for(labels, 5, 2.0)
    bad = good + torch.randn_like(good)
    for name in ("accuracy", "f1"):
        a, b = statistics(name, good, labels), statistics(name, bad, labels)
        expected = metric(name).estimate(a).value - metric(name).estimate(b).value
        assert metric(name).drop(a, b).value == pytest.approx(expected)
        assert paired_drop(metric(name), labels, good, bad).value == pytest.approx(expected)


def test_a_paired_interval_is_narrower_than_the_two_alone() -> None:
    labels = torch.randint(0, 2, (800,))
    good = scores_for(labels, 2, 1.0)
    bad = good + 0.1 * torch.randn_like(good)
    a, b = statistics("accuracy", good, labels), statistics("accuracy", bad, labels)
    alone = Accuracy().estimate(a)
    paired = Accuracy().drop(a, b)
    assert paired.high - paired.low < 0.6 * (alone.high - alone.low)


def test_outputs_that_are_not_finite_are_wrong_not_lucky() -> None:
    labels = torch.zeros(20, dtype=torch.long)
    nan = torch.full((20, 3), math.nan)
    assert Accuracy().estimate(statistics("accuracy", nan, labels)).value == 0
    assert metric("f1").estimate(statistics("f1", nan, labels)).value == 0
    assert metric("pearson").estimate(statistics("pearson", torch.full((20,), math.nan), torch.randn(20))).value == 0
    batch = {"input_ids": torch.zeros(2, 5, dtype=torch.long)}
    assert Perplexity().estimate(Perplexity().rows(torch.full((2, 5, 4), math.nan), batch, None)).value == math.inf


def test_accuracy_intervals_cover_nineteen_times_of_twenty() -> None:
    draws = torch.distributions.Binomial(200, torch.tensor(0.9)).sample(torch.Size((400,)))
    inside = 0
    for hits in draws.int().tolist():
        found = Accuracy().estimate((torch.arange(200) < hits).double().unsqueeze(1))
        inside += found.low <= 0.9 <= found.high
    assert 0.92 <= inside / 400 <= 0.98


def test_paired_intervals_cover_the_true_difference() -> None:
    """The reference is right on 0.9 of the rows, the other loses 0.06 of them and wins 0.02: the true drop is 0.04."""
    inside = 0
    for _ in range(300):
        kind = torch.multinomial(torch.tensor([0.84, 0.06, 0.02, 0.08]), 300, replacement=True)
        first, second = ((kind == 0) | (kind == 1)).double(), ((kind == 0) | (kind == 2)).double()
        found = Accuracy().drop(first.unsqueeze(1), second.unsqueeze(1))
        inside += found.low <= 0.04 <= found.high
    assert 0.92 <= inside / 300 <= 0.985


def test_bootstrap_intervals_of_pearson_cover_the_true_correlation() -> None:
    inside = 0
    for _ in range(120):
        labels = torch.randn(120)
        outputs = 0.8 * labels + 0.6 * torch.randn(120)
        found = Correlation(ranks=False).estimate(statistics("pearson", outputs, labels))
        inside += found.low <= 0.8 <= found.high
    assert 0.88 <= inside / 120 <= 0.99


def test_bootstrap_intervals_of_f1_cover_the_true_value() -> None:
    """Labels are 1 with probability 0.3, predictions err with probability 0.1: F1 = 2 * 0.27 / (0.3 + 0.34)."""
    inside = 0
    for _ in range(150):
        labels = (torch.rand(300) < 0.3).long()
        predicted = labels ^ (torch.rand(300) < 0.1).long()
        outputs = torch.nn.functional.one_hot(predicted, 2).float()
        found = metric("f1").estimate(statistics("f1", outputs, labels))
        inside += found.low <= 0.54 / 0.64 <= found.high
    assert 0.89 <= inside / 150 <= 0.99


def test_intervals_do_not_change_from_run_to_run() -> None:
    stat = _example(metric("spearman"), 0.5)
    assert metric("spearman").estimate(stat) == metric("spearman").estimate(stat)


def test_errors_name_the_way_out() -> None:
    with pytest.raises(UserError, match=r"unknown metric 'acuracy'.*\n.*accuracy"):
        metric("acuracy")
    with pytest.raises(UserError, match="needs labels"):
        statistics("accuracy", torch.randn(3, 2), None)
    with pytest.raises(UserError, match="needs labels"):
        statistics("spearman", torch.randn(3), None)
    with pytest.raises(UserError, match="label 5 and the model has 3 classes"):
        statistics("accuracy", torch.randn(2, 3), torch.tensor([1, 5]))
    with pytest.raises(UserError, match="class scores"):
        statistics("accuracy", torch.randn(2, 3), torch.tensor([1.0, 2.5]))
    with pytest.raises(UserError, match="one score a row"):
        statistics("pearson", torch.randn(2, 3), torch.tensor([1.0, 2.5]))
    with pytest.raises(UserError, match="causal"):
        Perplexity().rows(torch.randn(2, 3), {"input_ids": torch.zeros(2, 3, dtype=torch.long)}, None)
    with pytest.raises(ValueError, match="rows against"):
        Accuracy().drop(torch.ones(3, 1), torch.ones(4, 1))


def test_every_metric_is_named_by_its_key() -> None:
    assert all(make().name == key for key, make in METRICS.items())


def _example(chosen: Metric, noise: float) -> Tensor:
    """Statistics of a good model whose outputs got ``noise``; the same rows for every noise."""
    generator = torch.Generator().manual_seed(3)
    error = torch.randn(400, 4, generator=generator)
    labels = torch.randint(0, 4, (400,), generator=generator)
    if chosen.name == "perplexity":
        ids = torch.randint(0, 9, (50, 8), generator=generator)
        logits = 3 * torch.nn.functional.one_hot(ids.roll(-1, 1), 9).float()
        return chosen.rows(logits + noise * torch.randn(50, 8, 9, generator=generator), {"input_ids": ids}, None)
    if chosen.name in ("spearman", "pearson"):
        scores = torch.randn(400, generator=generator)
        return chosen.rows(scores + 0.3 * error[:, 0] + noise * error[:, 1], {}, scores)
    outputs = 2 * torch.nn.functional.one_hot(labels, 4).float()
    return chosen.rows(outputs + noise * error, {}, labels)
