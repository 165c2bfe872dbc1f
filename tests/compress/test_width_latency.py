"""Tables of time against widths: never descending, linear between what was timed, shared among blocks of one shape."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from calibrate.fidelity import Estimate
from calibrate.latency import Timing
from calibrate.signature import Batch, Signature, TensorSpec
from compress.file_latency import FileLatency
from compress.width.latency import Curve, fit, monotone, timed_groups
from compress.width.search import Group, TooSmall
from export.contract import Artifact, Contents, Exporter, Runner
from export.graph import Traceable


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(0, 10), min_size=1, max_size=7))
def test_monotone_is_the_nearest_that_never_descends(values: list[float]) -> None:
    found = monotone(values, [1.0] * len(values))
    assert found == sorted(found)
    assert sum(found) == pytest.approx(sum(values), abs=1e-9)
    if values == sorted(values):
        assert found == values
    error = sum((one - other) ** 2 for one, other in zip(found, values, strict=True))
    for level in values:
        flat = sum((level - other) ** 2 for other in values)
        assert error <= flat + 1e-9


def test_a_curve_is_linear_between_widths_and_never_above_the_whole() -> None:
    curve = Curve((0, 1), (0, 4, 8), (0.5, 1.1, 1.0), (0.5, 1.1, 1.0), (0.5, 1.1, 1.0))
    assert [curve.at(kept) for kept in (0, 2, 4, 8)] == pytest.approx([0.5, 0.75, 1.0, 1.0], abs=1e-6)
    assert Curve((0,), (3,), (1.0,), (1.0,), (1.0,)).at(3) == 1.0


def test_blocks_of_one_shape_share_what_was_saved() -> None:
    scores = torch.ones(8, dtype=torch.float64)
    groups, fixed = timed_groups([Group(scores, 1.0)] * 2, [Curve((0, 1), (0, 8), (0.4, 1.0), (0.4, 1.0), (0.4, 1.0))])
    assert fixed == pytest.approx(0.4)
    assert [group.costs(8) for group in groups] == pytest.approx([0.3, 0.3])
    assert groups[0].costs(4) == pytest.approx(0.15)


def known(ratio: float, noise: float = 0.0) -> list[Timing]:
    return [Timing(1, 1, 1, 9, 1, None), Timing(1, 1, 1, 9, 1, Estimate(ratio, ratio - noise, ratio + noise, 9, "known"))]


def linear() -> tuple[list[Group], float]:
    return [Group(torch.arange(100, dtype=torch.float64), 0.008)], 0.2


@pytest.mark.parametrize("truth", [lambda kept: 0.3 + 0.007 * kept, lambda kept: 0.1 + 0.009 * kept])
def test_the_budget_is_corrected_towards_what_was_measured(truth: Callable[[int], float]) -> None:
    groups, fixed = linear()
    done = fit(groups, fixed, 0.6, lambda gone: known(truth(100 - len(gone[0]))))
    kept = 100 - len(done.chosen.choice[0])
    assert done.met
    assert truth(kept) <= 0.6
    assert truth(kept) > 0.6 - 0.03
    assert 1 < len(done.tried) <= 4


def test_noise_is_no_reason_to_search_again() -> None:
    groups, fixed = linear()
    done = fit(groups, fixed, 0.6, lambda gone: known(0.61, 0.02))
    assert len(done.tried) == 1
    assert done.met
    missed = fit(groups, fixed, 0.6, lambda gone: known(0.63, 0.02))
    assert not missed.met
    assert len(missed.tried) > 1


def test_what_no_budget_reaches_is_refused_at_first_and_told_after() -> None:
    groups, fixed = linear()
    with pytest.raises(TooSmall) as caught:
        fit(groups, fixed, 0.1, lambda gone: known(0.1))
    assert caught.value.least == pytest.approx(0.2)
    done = fit(groups, fixed, 0.3, lambda gone: known(1.0 - 0.001 * len(gone[0])))
    assert not done.met
    assert len(done.chosen.choice[0]) == 100, "the fastest that there is"


class Beat:
    """A clock that moves when a model runs, and drifts: everything takes longer and longer."""

    def __init__(self) -> None:
        self.now, self.pace, self.open = 0.0, 1.0, 0

    def __call__(self) -> float:
        return self.now

    def runs(self, width: int) -> None:
        self.now += width * self.pace
        self.pace *= 1.001


class WidthRunner(Runner):
    runtime = "a clock of the test"

    def __init__(self, beat: Beat, width: int) -> None:
        self.beat, self.width = beat, width
        beat.open += 1

    def __call__(self, batch: Batch) -> Tensor:
        assert batch["x"].shape[0] == 5
        self.beat.runs(self.width)
        return batch["x"]

    def close(self) -> None:
        self.beat.open -= 1


class WidthExporter(Exporter):
    """Writes the width of a linear layer; its files take as long as that."""

    format: ClassVar[str] = "onnx"
    extra: ClassVar[str] = "onnx"
    filename: ClassVar[str] = "onnx/model.onnx"
    beat: Any = None

    def missing(self) -> str | None:
        return None

    def refuses(self, model: nn.Module) -> list[tuple[str, str]]:
        return []

    def write(self, source: Traceable, path: Path) -> Artifact:
        path.write_text(str(source.model.get_parameter("weight").shape[0]))
        return Artifact("onnx", path, 1)

    def open(self, path: Path, threads: int) -> Runner:
        return WidthRunner(self.beat, int(path.read_text()))

    def contents(self, path: Path) -> Contents:
        return Contents({}, {})


def test_files_are_timed_against_the_first_and_leave_nothing(tmp_path: Path) -> None:
    beat, made = Beat(), []
    signature = Signature((TensorSpec("x", torch.float32, ("batch", 4)),))

    def models() -> Any:
        for width in (20, 5, 10, 15, 20, 30, 2):
            made.append(len(list(tmp_path.rglob("model.onnx"))))
            yield nn.Linear(4, width)

    latency = FileLatency(
        WidthExporter(beat=beat), lambda model: Traceable(model, signature, {"x": torch.zeros(2, 4)}),
        {"x": torch.zeros(2, 4)}, tmp_path, batch=5, repeats=6, warmup=1, clock=beat,
    )  # fmt: skip
    timings = latency(models())
    assert timings[0].ratio is None
    ratios = [timing.ratio.value for timing in timings[1:] if timing.ratio is not None]
    assert ratios == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.5, 0.1], rel=0.02)
    assert beat.open == 0
    assert not list(tmp_path.iterdir())
    assert max(made) <= 5, "only a few files at a time"
    assert latency.conditions["batch"] == 5
    assert latency.conditions["runtime"] == "a clock of the test"
    (alone,) = latency([nn.Linear(4, 3)])
    assert alone.median_ms > 0
