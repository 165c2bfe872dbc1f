"""Rows in a random order: none is lost, and tables that are sorted by class give batches that are not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from calibrate.arrays import ArrayEncoder, Npz
from calibrate.capture import capture
from calibrate.data import Rows, from_tensors
from calibrate.errors import UserError
from calibrate.ranges import MinMax


def sorted_rows() -> Rows:
    """Ten classes of 16 rows, one after the other."""
    classes = torch.arange(10.0).repeat_interleave(16)
    return from_tensors({"x": classes[:, None], "row": torch.arange(160)})


def test_every_row_stays_whole_and_batches_keep_their_sizes() -> None:
    rows = sorted_rows()
    plain, mixed = list(rows.batches(24)), list(rows.mixed(24))
    assert [len(batch["x"]) for batch in mixed] == [len(batch["x"]) for batch in plain] == [24] * 6 + [16]
    numbers = torch.cat([batch["row"] for batch in mixed])
    classes = torch.cat([batch["x"] for batch in mixed])[:, 0]
    assert torch.equal(numbers.sort().values, torch.arange(160))
    assert torch.equal(classes, (numbers // 16).float())
    assert torch.equal(numbers, torch.cat([batch["row"] for batch in rows.mixed(24)])), "the same each time"
    assert torch.equal(numbers, torch.cat([batch["row"] for batch in rows.mixed(5)])), "in batches of any size"
    assert not torch.equal(numbers, torch.cat([batch["row"] for batch in rows.mixed(24, seed=1)]))


def test_no_batch_of_sorted_rows_is_of_one_class() -> None:
    assert all(len(batch["x"].unique()) == 1 for batch in sorted_rows().batches(16)), "the control"
    assert all(len(batch["x"].unique()) > 4 for batch in sorted_rows().mixed(16))


@pytest.mark.parametrize("chosen", [None, range(3, 40, 4)], ids=["all", "some"])
def test_a_table_that_is_read_from_front_to_back_gives_the_same_order(
    tmp_path: Path, chosen: range | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = sorted_rows()
    indices = list(chosen) if chosen else rows.indices
    assert rows.table.scattered
    free = Rows(rows.table, rows.encoder, indices)
    wanted = torch.cat([batch["row"] for batch in free.mixed(7)])
    monkeypatch.setattr(type(rows.table), "scattered", False)
    asked: list[list[int]] = []
    items = rows.table.items
    monkeypatch.setattr(rows.table, "items", lambda numbers: (asked.append(list(numbers)), items(numbers))[1])
    given = torch.cat([batch["row"] for batch in free.mixed(7)])
    assert torch.equal(given, wanted)
    assert asked == [sorted(indices)]
    assert sorted(given.tolist()) == sorted(indices)


def test_batches_say_which_row_is_which_also_in_pairs() -> None:
    rows = from_tensors({"x": torch.arange(40.0)[:, None]}, group=2)
    assert len(rows) == 20
    for batch in rows.mixed(6):
        assert torch.equal(batch["x"][:, 0].long(), batch["calibration_row"])
        assert torch.equal(batch["calibration_row"][::2] + 1, batch["calibration_row"][1::2]), "pairs stay together"


@pytest.mark.parametrize("compressed", [False, True])
def test_arrays_of_a_file_are_read_in_any_order_where_they_lie_as_they_are(tmp_path: Path, compressed: bool) -> None:
    path = tmp_path / "rows.npz"
    pixels = np.arange(50 * 6, dtype=np.float32).reshape(50, 2, 3)
    (np.savez_compressed if compressed else np.savez)(path, pixels=pixels, more=np.arange(50))
    table = Npz(path, "rows.npz", ["pixels", "more"])
    assert table.scattered is not compressed
    rows = Rows(table, ArrayEncoder({"pixels": torch.float32, "more": torch.int64}), range(3, 50, 2))
    given = list(rows.mixed(5))
    order = torch.cat([batch["more"] for batch in given])
    assert sorted(order.tolist()) == list(range(3, 50, 2))
    assert order.tolist() != sorted(order.tolist())
    assert torch.equal(torch.cat([batch["pixels"] for batch in given]), torch.from_numpy(pixels)[order])
    assert torch.equal(torch.cat([batch["calibration_row"] for batch in given]), (order - 3) // 2)


def test_a_broken_row_is_named_as_it_is_counted_in_the_table() -> None:
    x = torch.ones(64, 4)
    x[37] = torch.nan
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(UserError, match="row 37 of the calibration rows"):
        capture(model, lambda model, batch: model(batch["x"]), from_tensors({"x": x}).mixed(7), {"0": [MinMax()]})
