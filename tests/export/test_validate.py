"""Laws and controls of validation: a wrong file must fail, a right one pass."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from calibrate.errors import LostInExport
from calibrate.signature import Batch
from export.contract import Contents, Runner
from export.validate import Outputs, audit, evaluate, metamorphic, run_rows


class FakeRows:
    """``count`` rows of 3 numbers, with the row's number as label."""

    group = 1

    def __init__(self, count: int) -> None:
        self.x = torch.randn(count, 3, generator=torch.Generator().manual_seed(0))
        self.labels: Tensor | None = torch.arange(count)

    def __len__(self) -> int:
        return len(self.x)

    def batches(self, size: int) -> Iterator[Batch]:
        for start in range(0, len(self), size):
            yield {"x": self.x[start : start + size]}


class FakeRunner(Runner):
    def __init__(self, function: object, rows: int | None = None) -> None:
        self.function, self.rows, self.seen = function, rows, []

    def __call__(self, batch: Batch) -> Tensor:
        self.seen.append(batch["x"].shape[0])
        return self.function(batch["x"])  # type: ignore[operator, no-any-return]


class Labels:
    """A metric whose statistics are the labels: shows which rows met which labels."""

    def rows(self, outputs: Tensor, batch: Batch, labels: Tensor | None) -> Tensor:
        assert labels is not None
        return torch.stack([labels.float(), outputs[:, 0]], dim=1)


@pytest.mark.parametrize("size", [1, 4, 7, 100])
def test_evaluation_does_not_depend_on_the_batch_size(size: int) -> None:
    rows, kept = FakeRows(10), Outputs()
    found = evaluate(lambda batch: batch["x"] * 2, rows, Labels(), keep=kept, batch_size=size)
    assert found.rows == 10
    assert torch.equal(kept.take(0, 10), rows.x * 2)
    assert found.statistics is not None
    assert torch.equal(found.statistics[:, 0], torch.arange(10).float())
    assert torch.equal(found.statistics[:, 1], rows.x[:, 0] * 2)


def test_outputs_come_back_and_are_kept(tmp_path: Path) -> None:
    batches = [torch.randn(count, 2, 5) for count in (3, 1, 4)]
    kept, nameless = Outputs(tmp_path / "kept.npy"), Outputs(folder=tmp_path)
    for batch in batches:
        kept.append(batch)
        nameless.append(batch)
        assert torch.equal(nameless.take(0, 3), batches[0]), "while there is more to come"
    assert not (tmp_path / "kept.npy").exists()
    kept.keep()
    nameless.keep()
    assert [entry.name for entry in tmp_path.iterdir()] == ["kept.npy"]
    whole = torch.cat(batches)
    for outputs in (kept, nameless, Outputs.reopened(tmp_path / "kept.npy")):
        assert len(outputs) == 8
        for start, count in ((0, 8), (2, 3), (7, 1)):
            assert torch.equal(outputs.take(start, count), whole[start : start + count])


def test_fixed_batches_are_filled_up_and_cut_again() -> None:
    runner = FakeRunner(lambda x: x + 1, rows=4)
    x = torch.randn(10, 3)
    assert torch.equal(run_rows(runner)({"x": x}), x + 1)
    assert runner.seen == [4, 4, 4]


def test_noise_of_a_known_level_gives_that_level() -> None:
    rows, reference = FakeRows(2000), Outputs()
    evaluate(lambda batch: batch["x"], rows, None, keep=reference)
    noise = torch.randn(2000, 3, generator=torch.Generator().manual_seed(1)) * 0.1
    position = iter(noise.split(16))
    found = evaluate(lambda batch: batch["x"] + next(position), rows, None, references={"float": reference}, batch_size=16)
    assert found.fidelity["float"].sqnr_db == pytest.approx(20.0, abs=0.5)


def test_padded_positions_do_not_count() -> None:
    class Text(FakeRows):
        def batches(self, size: int) -> Iterator[Batch]:
            for batch in super().batches(size):
                mask = torch.ones(len(batch["x"]), 4, dtype=torch.int64)
                mask[:, 2:] = 0
                yield batch | {"attention_mask": mask}

    def outputs(scale: float) -> object:
        def call(batch: Batch) -> Tensor:
            made = batch["x"][:, None, :].repeat(1, 4, 1).clone()
            made[:, 2:] *= scale
            return made

        return call

    reference = Outputs()
    evaluate(outputs(1.0), Text(6), None, keep=reference)  # type: ignore[arg-type]
    found = evaluate(outputs(99.0), Text(6), None, references={"float": reference})  # type: ignore[arg-type]
    assert found.fidelity["float"].sqnr_db == float("inf")


def codes() -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    return {f"layer{i}": generator.integers(-128, 128, (4, 6), dtype=np.int8) for i in range(3)}


def test_audit_passes_equal_codes() -> None:
    found = audit(codes(), Contents({"int8": 72}, codes()), "model.onnx")
    assert (found.layers, found.equal, found.codes) == (3, 3, 72)


@pytest.mark.parametrize("fault", ["missing", "flipped", "transposed"])
def test_audit_stops_on_other_codes(fault: str) -> None:
    held = codes()
    if fault == "missing":
        del held["layer1"]
    elif fault == "flipped":
        held["layer1"][2, 3] ^= 1
    else:
        held["layer1"] = held["layer1"].T
    with pytest.raises(LostInExport, match="layer1"):
        audit(codes(), Contents({}, held), "model.onnx")


def test_metamorphic_checks_pass_a_rowwise_function() -> None:
    checks = metamorphic(FakeRunner(lambda x: x * 3), {"x": torch.randn(4, 3)}, dynamic_activations=False)
    assert [check.passed for check in checks] == [True, True]


def test_metamorphic_checks_fail_a_function_of_the_whole_batch() -> None:
    runner = FakeRunner(lambda x: x - x.mean(0, keepdim=True) + 1e-3)
    checks = metamorphic(runner, {"x": torch.randn(4, 3)}, dynamic_activations=False)
    assert checks[0].passed is False


def test_metamorphic_checks_fail_outputs_that_depend_on_the_position() -> None:
    runner = FakeRunner(lambda x: x + torch.arange(len(x))[:, None])
    assert metamorphic(runner, {"x": torch.randn(4, 3)}, dynamic_activations=False)[1].passed is False


def test_dynamic_grids_are_said_not_failed() -> None:
    runner = FakeRunner(lambda x: x / x.abs().max())
    first = metamorphic(runner, {"x": torch.randn(4, 3)}, dynamic_activations=True)[0]
    assert first.passed is None
    assert "whole batch" in first.detail
