"""Batches without the columns that are padding in all of their rows."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

import torch

from calibrate.data import Rows
from calibrate.signature import Batch

__all__ = ["of_like_length", "trimmed", "without_padding"]


def without_padding(rows: Rows, size: int, *, sort: bool, mixed: bool = False) -> Iterator[Batch]:
    """The rows in batches, in a random order if ``mixed``; padded text is trimmed and, with ``sort``, of like length together."""
    batches = rows.mixed(size) if mixed else rows.batches(size)
    if not rows.encoder.ragged:
        return batches
    return map(trimmed, of_like_length(batches, size) if sort else batches)


def of_like_length(batches: Iterator[Batch], size: int, window: int = 8) -> Iterator[Batch]:
    """The same rows in batches of like length, sorted among ``window`` batches at a time, in an order that is not by length."""
    start = 0
    while held := list(islice(batches, window)):
        rows = {name: torch.cat([batch[name] for batch in held]) for name in held[0]}
        count = next(iter(rows.values())).shape[0]
        order = rows["attention_mask"].sum(1).argsort(stable=True) if "attention_mask" in rows else torch.arange(count)
        rows.setdefault("calibration_row", torch.arange(start, start + count))
        parts = torch.split(order, size)
        for number in torch.randperm(len(parts), generator=torch.Generator().manual_seed(start)).tolist():
            yield {name: value[parts[number]] for name, value in rows.items()}
        start += count


def trimmed(batch: Batch) -> Batch:
    """Tokenized text cut to its longest row: what is padding in every row counts for nothing and only costs time.

    Text padded at the left, and batches without ``attention_mask``, stay as they are.
    """
    mask = batch.get("attention_mask")
    if mask is None:
        return batch
    length = max(1, int(mask.amax(0).nonzero().max()) + 1) if bool(mask.any()) else mask.shape[1]
    return {name: value[:, :length] if value.shape[:2] == mask.shape else value for name, value in batch.items()}
