"""Parquet files: plain columns, or the layout of ``datasets`` with image bytes in a struct; read by row groups."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from calibrate.data import Item, Table
from calibrate.errors import UserError
from calibrate.text import Column, missing_column

__all__ = ["Parquet"]

_PIECE = 64
"""Rows decoded at a time: image bytes of a whole row group would not be constant memory."""


class Parquet(Table):
    """Chosen columns of a parquet file; a cell that is a struct {bytes, path} becomes its bytes.

    Attributes:
        names: the columns of the file.
        class_names: names of the classes, where the file's ``datasets`` metadata lists them.
    """

    format = "parquet"

    def __init__(self, path: Path, name: str, cells: Sequence[Column], label: Column | None = None) -> None:
        """Reads the footer and the label column.

        Raises:
            UserError: not parquet, no such column, no rows; pyarrow is not installed.
        """
        self.path, self.name = path, name
        self._file = _open(path, name)
        self.names: list[str] = self._file.schema_arrow.names
        known = self.names
        self._cells = [_column(name, cell, known) for cell in cells]
        self._label = None if label is None else _column(name, label, known)
        self._rows: int = self._file.metadata.num_rows
        if not self._rows:
            raise UserError(name, "has no rows", "Give a file with rows, or take the split out of the recipe.")
        self.class_names = _class_names(self._file.schema_arrow.metadata, self._label)
        self._labels: list[Any] | None = None
        if self._label is not None:
            self._labels = []
            for piece in self._pieces(batch_size=65536, columns=[self._label]):
                self._labels += piece.column(0).to_pylist()

    def __len__(self) -> int:
        return self._rows

    def items(self, indices: Sequence[int]) -> Iterator[Item]:
        wanted = iter(indices)
        index = next(wanted, None)
        start = 0
        for group in range(self._file.num_row_groups):
            stop = start + self._file.metadata.row_group(group).num_rows
            if index is not None and index < stop:
                for piece in self._pieces(batch_size=_PIECE, row_groups=[group], columns=self._cells):
                    while index is not None and index < start + piece.num_rows:
                        yield self._item(piece, index - start, index)
                        index = next(wanted, None)
                    start += piece.num_rows
                    if index is None or index >= stop:
                        break
            if index is None:
                return
            start = stop

    def _pieces(self, **which: Any) -> Iterator[Any]:
        from pyarrow import ArrowException

        try:
            yield from self._file.iter_batches(**which)
        except (ArrowException, OSError) as error:
            raise UserError(self.name, f"is damaged ({_line(error)})", "Copy or download it again.") from None

    def _item(self, piece: Any, offset: int, index: int) -> Item:
        cells = []
        for name in self._cells:
            cell = piece.column(name)[offset].as_py()
            if isinstance(cell, dict) and "bytes" in cell:
                cell = cell["bytes"]
            if cell is None:
                hint = "Take the row out; the bytes of an image must be in the file itself."
                raise UserError(self.place(index), f"column {name!r} is empty", hint)
            cells.append(cell)
        return tuple(cells)

    def label_values(self) -> Sequence[Any] | None:
        return self._labels

    def describe(self) -> dict[str, Any]:
        return {"columns": {"inputs": self._cells, "label": self._label}, "classes": self.class_names}


def _open(path: Path, name: str) -> Any:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise UserError("data", "pyarrow is not installed", "pip install 'transformer-compress[hf]'") from None
    try:
        return parquet.ParquetFile(path)
    except (ArrowException, OSError) as error:
        what = f"is not a parquet file that can be read ({_line(error)})"
        raise UserError(name, what, "Copy or download it again.") from None


def _line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def _column(where: str, column: Column, known: Sequence[str]) -> str:
    if isinstance(column, int):
        if column >= len(known):
            raise UserError(where, f"has {len(known)} columns, there is no column {column}", "Positions are counted from 0.")
        return known[column]
    if column not in known:
        raise missing_column(where, column, known)
    return column


def _class_names(metadata: dict[bytes, bytes] | None, label: str | None) -> list[str] | None:
    """The names of a ClassLabel feature, where ``datasets`` wrote them."""
    try:
        described = json.loads((metadata or {})[b"huggingface"])
        names = described["info"]["features"][label]["names"]
    except (KeyError, ValueError, TypeError):
        return None
    return [str(name) for name in names]
