"""Rows in a random order: none is lost, and tables that are sorted by class give batches that are not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from calibrate.data import Rows, from_tensors


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
