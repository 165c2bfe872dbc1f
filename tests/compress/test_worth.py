"""What makes a pass paid: the rule on made-up figures, never on a timed run."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from calibrate.metrics import metric
from compress.figures import figure
from compress.report import Figure, Worth
from compress.worth import brings, costs, paid, says


def worth(label: str = "onnx", lost: float | None = 0.0, metric: str = "accuracy", **figures: Any) -> Worth:
    """A file that was run before and after, equal in size and without a time."""
    drop = None if lost is None else Figure(name=f"{metric} lost", value=lost, low=lost - 1e-4, high=lost + 1e-4, rows=100)
    return Worth(**{"label": label, "drop": drop, "compared": True, "size_ratio": 1.0, "size_bytes": 1000, **figures})


def time(ratio: float, low: float, high: float, runs: int = 30) -> dict[str, float]:
    return {"latency_ratio": ratio, "latency_low": low, "latency_high": high, "latency_runs": runs}


def share(value: float) -> Figure:
    return Figure(name="agreement", value=value, rows=100)


@pytest.mark.parametrize(
    ("figures", "brought", "verdict"),
    [
        ({"lost": 0.0}, [], True),  # costs nothing
        ({"lost": -0.01}, [], True),  # gains accuracy
        ({"lost": 0.001}, [], False),  # one row lost, nothing gained
        ({"lost": 0.3, "size_ratio": 0.5}, ["size"], True),  # half the size pays whatever it costs: that is for accept to judge
        ({"lost": 0.001, "size_ratio": 0.991}, [], False),  # less than one per cent
        ({"lost": 0.001, "size_ratio": 0.99}, ["size"], True),
        ({"lost": 0.001, "size_ratio": 1.7}, [], False),
        ({"lost": 0.001, **time(0.6, 0.58, 0.63)}, ["speed"], True),
        ({"lost": 0.001, **time(0.9, 0.7, 1.01)}, [], False),  # noise in time alone does not pay
        ({"lost": 0.001, **time(0.6, 0.5, 0.7, runs=9)}, [], False),  # three runs of three favour one file in every eighth trial
        ({"lost": 0.001, **time(0.6, 0.5, 0.7, runs=10)}, ["speed"], True),
        ({"lost": 0.001, **time(0.995, 0.992, 0.998)}, [], False),  # proved, and less than one per cent
        ({"lost": 0.001, **time(1.4, 1.3, 1.5)}, [], False),
        ({"lost": 0.0, **time(1.4, 1.3, 1.5)}, [], True),  # slower, but the metric is kept
        ({"lost": 0.01, "size_ratio": 0.4, **time(0.4, 0.3, 0.5)}, ["size", "speed"], True),
        ({"lost": 0.0, "sqnr_before_db": 40.9, "sqnr_after_db": 15.3}, [], False),  # as many rows right, and further from float
        ({"lost": 0.0, "sqnr_after_db": 15.3}, [], False),  # it was equal to float before
        ({"lost": 0.0, "sqnr_before_db": 15.3, "sqnr_after_db": 40.9}, [], True),
        ({"lost": 0.0, "sqnr_before_db": 120.0, "sqnr_after_db": 90.0}, [], True),  # rounding
        ({"lost": -0.01, "sqnr_before_db": 40.0, "sqnr_after_db": 20.0}, [], True),  # gained what the metric counts
        ({"lost": 0.0, "sqnr_before_db": 40.9, "sqnr_after_db": 15.3, "size_ratio": 0.5}, ["size"], True),
    ],
)
def test_the_rule(figures: dict[str, Any], brought: list[str], verdict: bool) -> None:
    one = worth(**figures)
    assert brings([one]) == brought
    assert paid([one]) is verdict


def test_without_a_metric_any_difference_costs() -> None:
    assert not costs([worth(lost=None, agreement=share(1.0))])
    assert costs([worth(lost=None, agreement=share(0.99))])
    assert costs([worth(lost=None, agreement=share(1.0), sqnr_db=90.0)]), "outputs that differ"
    assert paid([worth(lost=None, sqnr_db=30.0)]) is False
    assert paid([worth(lost=None)]) is True, "nothing changed"
    assert not costs([worth(lost=0.0, sqnr_db=30.0)]), "with a metric the metric decides"


def test_one_runtime_that_gains_is_enough_and_one_that_loses_costs() -> None:
    assert paid([worth(lost=0.01), worth("coreml", lost=0.01, size_ratio=0.5)]) is True
    assert paid([worth(lost=0.0), worth("coreml", lost=0.01)]) is False


def test_what_no_runtime_ran_is_not_judged_unless_it_shrank() -> None:
    unknown = worth(lost=None, compared=False)
    assert paid([unknown]) is None
    assert paid([]) is None
    assert paid([worth(lost=None, compared=False, size_ratio=0.5)]) is True
    assert paid([unknown, worth("coreml", lost=0.01)]) is False, "one runtime that can tell is enough"


@pytest.mark.parametrize(
    ("figures", "sentence"),
    [
        (
            {"lost": 0.003, "size_ratio": 0.38, **time(0.61, 0.6, 0.62)},
            "onnx: 0.38x the size, 0.61x the time, 0.3 points of accuracy lost. It brings size and speed.",
        ),
        (
            {"lost": 0.0, "size_ratio": 0.5, **time(1.01, 0.97, 1.04)},
            "onnx: 0.50x the size, 1.01x the time (within noise), accuracy kept. It brings size and costs nothing.",
        ),
        (
            {"lost": -0.0212},
            "onnx: the same size, 2.1 points of accuracy gained. It brings neither size nor speed, and costs nothing.",
        ),
        (
            {"lost": 0.0004},
            "onnx: the same size, 0.04 points of accuracy lost. "
            "It makes accuracy worse and brings neither size nor speed: taken back.",
        ),
        (
            {"lost": 0.12, "metric": "perplexity", "size_ratio": 0.2},
            "onnx: 0.20x the size, perplexity 12.0 % higher. It brings size.",
        ),
        (
            {"lost": 0.012, "metric": "spearman", "size_ratio": 0.2},
            "onnx: 0.20x the size, 0.01 of spearman lost. It brings size.",
        ),
        (
            {"lost": 0.0, "sqnr_before_db": 40.9, "sqnr_after_db": 15.34},
            "onnx: the same size, accuracy kept at 15.3 dB. "
            "It moves outputs away from float and brings neither size nor speed: taken back.",
        ),
        (
            {"lost": None, "agreement": share(0.987), "sqnr_db": 26.82},
            "onnx: the same size, 98.7% of the predictions kept, 26.8 dB. "
            "It changes outputs and brings neither size nor speed: taken back.",
        ),
        (
            {"lost": 0.0, **time(0.9, 0.8, 0.95, runs=3)},
            "onnx: the same size, 0.90x the time (too few runs to tell), accuracy kept. "
            "It brings neither size nor speed, and costs nothing.",
        ),
        ({"lost": None, "compared": False}, "onnx: the same size, not run. It cannot be judged: no runtime here ran the files."),
    ],
)
def test_what_it_says(figures: dict[str, Any], sentence: str) -> None:
    one = worth(**figures)
    verdict = paid([one])
    assert says([one], verdict, undone=verdict is False) == sentence


def test_a_figure_whose_interval_holds_zero_is_called_noise() -> None:
    wide = Figure(name="accuracy lost", value=-0.031, low=-0.089, high=0.029, rows=64)
    assert "3.1 points of accuracy gained (within noise)" in says([worth(drop=wide)], True, undone=False)


def test_what_is_not_taken_back_does_not_pay() -> None:
    both = [worth(lost=0.01), worth("coreml", lost=0.0)]
    assert says(both, paid(both), undone=False) == (
        "onnx: the same size, 1.0 points of accuracy lost; coreml: the same size, accuracy kept. "
        "It makes accuracy worse and brings neither size nor speed: it does not pay."
    )


def test_a_destroyed_language_model_has_figures_that_json_can_hold() -> None:
    perplexity, batch = metric("perplexity"), {"input_ids": torch.randint(0, 50, (8, 12))}
    good = torch.randn(8, 12, 50)
    kept, destroyed = (perplexity.rows(outputs, batch, None) for outputs in (good, good * float("nan")))
    first, again = (figure("perplexity lost", perplexity.drop(before, destroyed)) for before in (kept, destroyed))
    assert (first.value, first.low, first.high) == (1e9, None, None)
    assert again.value == 0, "no worse than before"
    assert costs([worth(drop=first, size_ratio=1.0)])
    assert not costs([worth(drop=again)])
    for made in (first, again, figure("perplexity", perplexity.estimate(destroyed))):
        json.dumps(made.model_dump(mode="json"), allow_nan=False)
