"""Calibration, validation and evaluation rows: read lazily, chosen by seed or by number, fingerprinted, in batches of named
tensors."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from calibrate.errors import UserError
from calibrate.signature import Batch

__all__ = ["Encoder", "Item", "Rows", "Selection", "Table", "from_tensors", "overlap", "select", "twins"]

Item = tuple[Any, ...]
"""The raw cells of one row, as the file has them: strings, bytes of an image file, arrays."""

Selection = str | int | tuple[int, int] | None
"""Which rows: ``"all"`` (or None), a count (drawn by seed), or ``(start, stop)``, ``stop`` not included."""


class Table(ABC):
    """Rows of raw cells in a file or folder, read in order and never all at once.

    Attributes:
        path: the file or folder; None for tensors in memory.
        name: how the user wrote it, for reports and messages.
        format: ``text``, ``images``, ``parquet``, ``arrays``, ``embedded`` or ``tensors``.
    """

    path: Path | None
    name: str
    format: str
    scattered: bool = False
    """Whether ``items`` takes numbers in any order."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def items(self, indices: Sequence[int]) -> Iterator[Item]:
        """The rows of the given numbers, ascending unless ``scattered``."""

    def label_values(self) -> Sequence[Any] | None:
        """The labels of all rows as the file has them, or None."""
        return None

    def place(self, index: int) -> str:
        """Where a row lies, for messages: ``dev.tsv:12``."""
        return f"{self.name}: row {index}"

    def describe(self) -> dict[str, Any]:
        """What reports say of the table beside its name, format and length; JSON."""
        return {}


class Encoder(ABC):
    """Raw cells to named model inputs.

    ``group``: how many rows of the batch one row of data becomes (2 for sentence pairs: a0, b0, a1, b1 ...).
    ``ragged``: whether rows differ in how much of them is padding.
    """

    group: int = 1
    ragged: bool = False

    @abstractmethod
    def encode(self, items: Sequence[Item], places: Sequence[str]) -> Batch:
        """Tensors whose first dimension is ``group * len(items)``; ``places`` name the rows in messages."""

    def check(self, item: Item, place: str) -> None:
        """Refuses a row that ``encode`` would refuse, so that a run finds it before it begins.

        Raises:
            UserError: the row cannot become an input; names it.
        """
        return

    def describe(self) -> dict[str, Any]:
        """What was done to the cells, as JSON; part of the fingerprint."""
        return {}

    def noted(self) -> dict[str, Any]:
        """What was noticed while encoding (such as truncated texts), as JSON; not part of the fingerprint."""
        return {}


class Rows:
    """Chosen rows of a table as batches of model inputs. Nothing is kept but labels and row numbers.

    Attributes:
        labels: [rows], int64 classes or float32 scores; None without labels.
        group: batch rows for each data row (2 for sentence pairs).
        indices: row numbers in the table, ascending.
    """

    def __init__(
        self,
        table: Table,
        encoder: Encoder,
        indices: Sequence[int],
        labels: Tensor | None = None,
        chosen: str = "all",
    ) -> None:
        self.table, self.encoder, self.chosen = table, encoder, chosen
        self.indices = list(indices)
        self.labels = labels
        self.group = encoder.group
        self._digests: list[str] | None = None

    def __len__(self) -> int:
        return len(self.indices)

    def batches(self, size: int) -> Iterator[Batch]:
        """Batches of ``size`` data rows (the last one may be smaller), so of ``group * size`` rows of each input
        tensor."""
        return self._encoded(self.table.items(self.indices), self.indices, size)

    def mixed(self, size: int, seed: int = 0) -> Iterator[Batch]:
        """The same rows in a random order, the same each time; ``calibration_row`` says which is which, counted as ``batches``
        gives them. Files are often sorted by class: then neither a batch nor the first rows are a sample of them.

        A table that can only be read from front to back (``Table.scattered``) is first read into memory: texts and images as
        they lie in the file, arrays of a compressed npz file whole.
        """
        order = np.random.default_rng([seed, len(self)]).permutation(len(self)).tolist()
        indices = [self.indices[place] for place in order]
        reader = self.table.items(indices) if self.table.scattered else self._held(order)
        rows = torch.tensor(order).repeat_interleave(self.group) * self.group + torch.arange(self.group).repeat(len(order))
        numbers = rows.split(size * self.group)  # type: ignore[no-untyped-call]
        for batch, number in zip(self._encoded(reader, indices, size), numbers, strict=True):
            yield {**batch, "calibration_row": number}

    def _held(self, order: Sequence[int]) -> Iterator[Item]:
        held: dict[int, Item] = dict(enumerate(self.table.items(self.indices)))
        for place in order:
            yield held.pop(place)

    def _encoded(self, reader: Iterator[Item], indices: Sequence[int], size: int) -> Iterator[Batch]:
        for start in range(0, len(self), size):
            part = indices[start : start + size]
            yield self.encoder.encode(list(islice(reader, len(part))), [self.table.place(index) for index in part])

    def check(self) -> None:
        """Reads every row once and refuses the first one that cannot become an input.

        Raises:
            UserError: names the row.
        """
        digests = []
        for index, item in zip(self.indices, self.table.items(self.indices), strict=True):
            self.encoder.check(item, self.table.place(index))
            digests.append(_digest(item))
        self._digests = digests

    def identities(self) -> set[str]:
        """Digests of the raw inputs of each row, without its label."""
        return set(self._row_digests())

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the raw inputs, the labels and the preprocessing."""
        whole = hashlib.sha256(repr(sorted(self.encoder.describe().items())).encode())
        for digest in self._row_digests():
            whole.update(digest.encode())
        if self.labels is not None:
            whole.update(self.labels.contiguous().numpy().tobytes())
        return whole.hexdigest()

    def _row_digests(self) -> list[str]:
        if self._digests is None:
            self._digests = [_digest(item) for item in self.table.items(self.indices)]
        return self._digests

    def describe(self) -> dict[str, Any]:
        """What the manifest says of these rows, as JSON."""
        return {
            "path": self.table.name,
            "format": self.table.format,
            "rows": len(self),
            "of": len(self.table),
            "chosen": self.chosen,
            "fingerprint": self.fingerprint,
            **self.table.describe(),
            "preprocessing": self.encoder.describe(),
            **self.encoder.noted(),
        }


def select(
    total: int, selection: Selection, *, seed: int = 0, where: str = "", from_end: bool = False, behind: int = 0
) -> list[int]:
    """Row numbers, ascending.

    Args:
        total: rows in the table.
        selection: which of them.
        seed: of the shuffled order that a count is taken from.
        where: names the data in messages.
        from_end: take a count from the end of the shuffled order, so that two counts out of one table share no row as
            long
            as both fit.
        behind: take a count behind so many rows at the beginning of that order, as long as it fits there.

    Raises:
        UserError: more rows than there are, an empty or reversed range.
    """
    if selection is None or selection == "all":
        return list(range(total))
    if isinstance(selection, tuple):
        start, stop = selection
        if not 0 <= start < stop <= total:
            hint = f"A range start:stop takes rows start to stop - 1, with 0 <= start < stop <= {total}."
            raise UserError(where, f"rows {start}:{stop} of {total} rows", hint)
        return list(range(start, stop))
    if not isinstance(selection, int) or isinstance(selection, bool):
        raise UserError(where, f"rows: {selection!r} is not a choice of rows", "Give all, a count, or a range start:stop.")
    if not 0 < selection <= total:
        raise UserError(where, f"{selection} rows asked for, there are {total}", f"Give a count from 1 to {total}, or all.")
    order = np.random.default_rng(seed).permutation(total)
    start = total - selection if from_end else min(behind, total - selection)
    return sorted(int(index) for index in order[start : start + selection])


def overlap(a: Rows, b: Rows) -> int:
    """How many rows of ``b`` have the same raw inputs as a row of ``a``, wherever they lie."""
    return len(twins(a, b))


def twins(a: Rows, b: Rows) -> list[int]:
    """Numbers (in ``b.table``) of the rows of ``b`` with the same raw inputs as a row of ``a``: the same row of one file, or
    the same content elsewhere."""
    known = a.identities()
    return [index for index, digest in zip(b.indices, b._row_digests(), strict=True) if digest in known]


def from_tensors(batch: Mapping[str, Tensor], labels: Tensor | None = None, name: str = "tensors", group: int = 1) -> Rows:
    """Rows of tensors in memory: inputs by name, each [rows * group, ...]."""
    table = _Tensors(dict(batch), name, group)
    return Rows(table, _Stack(list(batch), group), range(len(table)), labels)


class _Tensors(Table):
    format = "tensors"
    scattered = True
    path = None

    def __init__(self, batch: Batch, name: str, group: int) -> None:
        self.name, self._batch, self._group = name, batch, group

    def __len__(self) -> int:
        return int(next(iter(self._batch.values())).shape[0]) // self._group

    def items(self, indices: Sequence[int]) -> Iterator[Item]:
        for index in indices:
            rows = slice(index * self._group, (index + 1) * self._group)
            yield tuple(values[rows].numpy() for values in self._batch.values())


class _Stack(Encoder):
    """Puts arrays [group, ...] on top of each other under the given names."""

    def __init__(self, names: list[str], group: int) -> None:
        self.names, self.group = names, group

    def encode(self, items: Sequence[Item], places: Sequence[str]) -> Batch:
        return {name: torch.from_numpy(np.concatenate([item[i] for item in items])) for i, name in enumerate(self.names)}

    def describe(self) -> dict[str, Any]:
        return {"inputs": self.names}


def _digest(item: Item) -> str:
    whole = hashlib.sha256()
    for cell in item:
        if isinstance(cell, np.ndarray):
            raw = f"{cell.dtype}{cell.shape}".encode() + np.ascontiguousarray(cell).tobytes()
        else:
            raw = cell if isinstance(cell, bytes) else str(cell).encode()
        whole.update(len(raw).to_bytes(8, "little") + raw)
    return whole.hexdigest()[:32]
