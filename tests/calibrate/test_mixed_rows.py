"""Rows in a random order: none is lost, shapes stay together, and files that are sorted by class give batches that are not."""

from __future__ import annotations

import torch

from calibrate.capture import mixed
from calibrate.signature import Batch
from compress.depth.repair import parted


def sorted_rows() -> list[Batch]:
    """Ten classes of 16 rows, one after the other, in batches of 16 and a last one of 7."""
    classes = torch.arange(10).repeat_interleave(16)
    rows = [{"x": part[:, None].float(), "row": torch.arange(len(part)) + 16 * n} for n, part in enumerate(classes.split(16))]
    return [*rows, {"x": torch.full((7, 1), 9.0), "row": torch.arange(160, 167)}]


def test_every_row_stays_whole_and_batches_keep_their_sizes() -> None:
    before, after = sorted_rows(), mixed(sorted_rows())
    assert [len(batch["x"]) for batch in after] == [len(batch["x"]) for batch in before]
    rows = torch.cat([batch["row"] for batch in after])
    classes = torch.cat([batch["x"] for batch in after])[:, 0]
    assert torch.equal(rows.sort().values, torch.arange(167))
    assert torch.equal(classes, (rows // 16).clamp(max=9).float())
    assert torch.equal(rows, torch.cat([batch["row"] for batch in mixed(sorted_rows())])), "the same each time"
    assert not torch.equal(rows, torch.cat([batch["row"] for batch in mixed(sorted_rows(), seed=1)]))


def test_no_batch_and_no_part_of_sorted_rows_is_of_one_class() -> None:
    assert all(len(batch["x"].unique()) == 1 for batch in sorted_rows()), "the control"
    fit, held = parted(sorted_rows())
    assert all(len(batch["x"].unique()) > 3 for batch in fit[:-1])
    assert len(torch.cat([batch["x"] for batch in held]).unique()) > 5


def test_rows_change_places_only_with_rows_of_their_shape() -> None:
    batches = [{"x": torch.full((4, length), float(length))} for length in (3, 5, 3, 7)]
    after = mixed(batches)
    assert [batch["x"].shape for batch in after] == [batch["x"].shape for batch in batches]
    assert all(torch.equal(batch["x"], other["x"]) for batch, other in zip(after, batches, strict=True))
