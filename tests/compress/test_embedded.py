"""The embedded model: its size, its split, its accuracy, and that the training script makes such a model."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from calibrate.errors import UserError
from calibrate.metrics import Accuracy
from calibrate.signature import TensorSpec
from compress.embedded import SPLITS, DigitsViT, digits_model, digits_rows
from compress.embedded.digits import DIGITS_FILE, WEIGHTS_FILE
from compress.embedded.train_digits import augment, make_digits, train


def accuracy(model: torch.nn.Module, split: str) -> float:
    rows, statistics, done = digits_rows(split), [], 0
    assert rows.labels is not None
    for batch in rows.batches(100):
        outputs = model(batch["pixels"])
        statistics.append(Accuracy().rows(outputs, batch, rows.labels[done : done + len(outputs)]))
        done += len(outputs)
    return Accuracy().estimate(torch.cat(statistics)).value


def test_the_model_is_small_and_reads_digits_it_has_not_seen() -> None:
    model = digits_model()
    assert 150_000 < sum(parameter.numel() for parameter in model.parameters()) < 250_000
    assert WEIGHTS_FILE.stat().st_size < 1_000_000
    assert accuracy(model, "test") >= 0.98


def test_random_weights_are_at_chance() -> None:
    torch.manual_seed(0)
    assert accuracy(digits_model(weights=False), "test") < 0.3


def test_the_splits_do_not_meet() -> None:
    train_rows, calibration, validation, test = (set(digits_rows(split).indices) for split in SPLITS)
    assert (len(train_rows), len(calibration), len(test)) == (1197, 256, 600)
    assert calibration < train_rows
    assert validation == train_rows - calibration
    assert not train_rows & test
    assert train_rows | test == set(range(1797))
    labels = digits_rows("test").labels
    assert labels is not None
    assert torch.bincount(labels).tolist() == [60] * 10


def test_rows_are_in_the_range_of_the_model() -> None:
    rows = digits_rows("calibration", 20, seed=3)
    assert len(rows) == 20
    batch = next(rows.batches(20))
    assert batch["pixels"].shape == (20, 1, 8, 8)
    assert batch["pixels"].amin() == -1
    assert batch["pixels"].amax() == 1
    assert rows.describe()["split"] == "calibration"
    assert digits_rows("test", (0, 5)).fingerprint != digits_rows("test", (5, 10)).fingerprint


def test_wrong_requests_are_refused() -> None:
    with pytest.raises(UserError, match="no split 'dev'\n  There is: train, calibration, validation, test"):
        digits_rows("dev")
    with pytest.raises(UserError, match="700 rows asked for, there are 600"):
        digits_rows("test", 700)


def test_the_shipped_images_are_those_of_sklearn() -> None:
    made = make_digits()
    with np.load(DIGITS_FILE, allow_pickle=False) as shipped:
        assert set(shipped) == set(made)
        assert all(np.array_equal(shipped[name], made[name]) for name in made)
    assert DIGITS_FILE.stat().st_size < 100_000


def test_the_training_script_learns() -> None:
    batch = next(digits_rows("train").batches(128))
    labels = digits_rows("train").labels
    assert labels is not None
    model = train(batch["pixels"], labels[:128], epochs=20)
    torch.manual_seed(0)
    losses = [torch.nn.functional.cross_entropy(made(batch["pixels"]), labels[:128]) for made in (model, DigitsViT())]
    assert losses[0] < losses[1] - 0.1
    again = train(batch["pixels"][:64], labels[:64], seed=1, epochs=1)
    twice = train(batch["pixels"][:64], labels[:64], seed=1, epochs=1)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), twice.parameters(), strict=True))


def test_augmentation_keeps_the_ground_and_the_range() -> None:
    generator = torch.Generator().manual_seed(0)
    blank = torch.full((3, 1, 8, 8), -1.0)
    assert torch.equal(augment(blank, generator), blank)
    pixels = next(digits_rows("train").batches(16))["pixels"]
    moved = augment(pixels, generator)
    assert moved.amin() >= -1
    assert moved.amax() <= 1 + 1e-6
    assert not torch.equal(moved, pixels)


def test_one_graph_serves_every_batch_size() -> None:
    spec = TensorSpec("pixels", torch.float32, ("batch", 1, 8, 8))
    batch = torch.export.Dim("batch")
    pixels = torch.rand(2, *spec.shape[1:])  # type: ignore[arg-type]
    program = torch.export.export(digits_model(), (pixels,), dynamic_shapes={"pixels": {0: batch}})
    wide = torch.rand(5, 1, 8, 8)
    assert torch.allclose(program.module()(wide), digits_model()(wide), atol=1e-6)
