"""Text: csv, tsv and jsonl files row by row, running text cut in windows, and the tokenizer's batches."""

from __future__ import annotations

import csv
import difflib
import json
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from calibrate.data import Encoder, Item, Table
from calibrate.errors import UserError
from calibrate.signature import Batch

__all__ = ["Column", "Delimited", "JsonLines", "TextEncoder", "Tokenize", "WindowEncoder", "Windows", "missing_column"]

Column = str | int
"""A column by its name, or by its position from 0."""


class Tokenize(Protocol):
    """A tokenizer: named int64 tensors [B, tokens], and for each row whether it was cut."""

    def __call__(self, texts: Sequence[str], pairs: Sequence[str] | None = None, *, tokens: int) -> tuple[Batch, list[bool]]: ...


class _Lines(Table):
    """What csv and jsonl files share: one scan counts the rows and keeps labels and line numbers, nothing else."""

    format = "text"

    def __init__(self, path: Path, name: str, cells: Sequence[Column], label: Column | None) -> None:
        self.path, self.name = path, name
        self._cells, self._label = list(cells), label
        self._line_numbers = array("L")
        self._labels: list[Any] = []
        for line, _, value in self._rows():
            self._line_numbers.append(line)
            if label is not None:
                self._labels.append(value)
        if not self._line_numbers:
            raise UserError(name, "has no rows", "The file is empty, or holds only a header.")

    def _rows(self) -> Iterator[tuple[int, tuple[str, ...], Any]]:
        """Line number, chosen cells and label of each row."""
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self._line_numbers)

    def items(self, indices: Sequence[int]) -> Iterator[Item]:
        wanted = iter(indices)
        index = next(wanted, None)
        for row, (_, cells, _) in enumerate(self._rows()):
            if row == index:
                yield cells
                index = next(wanted, None)
                if index is None:
                    return

    def label_values(self) -> Sequence[Any] | None:
        return self._labels if self._label is not None else None

    def place(self, index: int) -> str:
        return f"{self.name}:{self._line_numbers[index]}"

    def describe(self) -> dict[str, Any]:
        return {"columns": {"text": self._cells, "label": self._label}}


class Delimited(_Lines):
    """A csv file (commas, quotes) or a tsv file (tabs, quotes are ordinary characters)."""

    def __init__(self, path: Path, name: str, cells: Sequence[Column], label: Column | None = None, header: bool = True) -> None:
        """``cells``: the columns with the text (one, or two for pairs); ``label``: the column with the label, or None.

        Raises:
            UserError: no such column, no rows, a row with another number of cells than the first.
        """
        self._header = header
        super().__init__(path, name, cells, label)

    def _rows(self) -> Iterator[tuple[int, tuple[str, ...], Any]]:
        columns: list[Column] = [*self._cells, *([] if self._label is None else [self._label])]
        positions: list[int] | None = None
        width = 0
        for line, row in self._lines():
            if positions is None:
                width = len(row)
                positions = self._positions(columns, row, line)
                if self._header:
                    continue
            if len(row) != width:
                hint = "Quote cells that hold the delimiter; see that no line was cut."
                raise UserError(f"{self.name}:{line}", f"has {len(row)} cells, the first line has {width}", hint)
            cells = [row[position] for position in positions]
            yield line, tuple(cells[: len(self._cells)]), cells[-1] if self._label is not None else None

    def _lines(self) -> Iterator[tuple[int, list[str]]]:
        assert self.path is not None
        tabs = self.path.suffix.lower() == ".tsv"
        with _opened(self.path, self.name) as file:
            csv.field_size_limit(2**31 - 1)
            lines = _decoded(file, self.name)
            reader = csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE) if tabs else csv.reader(lines, strict=True)
            try:
                for row in reader:
                    if row:
                        yield reader.line_num, row
            except csv.Error as error:
                hint = "Quotes in a csv cell are doubled, and a cell that holds them is quoted."
                raise UserError(f"{self.name}:{reader.line_num}", f"is not valid csv ({error})", hint) from None

    def _positions(self, columns: Sequence[Column], first: list[str], line: int) -> list[int]:
        names = [cell.strip() for cell in first] if self._header else []
        positions = []
        for column in columns:
            if isinstance(column, int):
                if column >= len(first):
                    what = f"has {len(first)} columns, there is no column {column}"
                    raise UserError(f"{self.name}:{line}", what, "Positions are counted from 0.")
                positions.append(column)
            elif not self._header:
                hint = "Give positions from 0, or header: true."
                raise UserError(self.name, f"column {column!r} is named, but the file is read without header", hint)
            elif column not in names:
                if any(_is_number(name) for name in names):
                    hint = f"The first line looks like a row ({', '.join(names[:4])}): give header: false and positions from 0."
                    raise UserError(f"{self.name}:{line}", f"there is no column {column!r}", hint)
                raise missing_column(f"{self.name}:{line}", column, names)
            else:
                positions.append(names.index(column))
        if self._header and isinstance(self._label, int) and _is_number(first[self._label]):
            hint = "Give header: false if it is one."
            raise UserError(f"{self.name}:{line}", f"the first line looks like a row (its label is {first[self._label]})", hint)
        return positions


class JsonLines(_Lines):
    """A jsonl file: one JSON object a line; columns are its keys."""

    def _rows(self) -> Iterator[tuple[int, tuple[str, ...], Any]]:
        assert self.path is not None
        with _opened(self.path, self.name) as file:
            for number, text in enumerate(_decoded(file, self.name), 1):
                if text.strip():
                    yield number, *self._row(f"{self.name}:{number}", text)

    def _row(self, where: str, text: str) -> tuple[tuple[str, ...], Any]:
        try:
            row = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UserError(where, f"is not JSON ({error})", "Every line holds one JSON object.") from None
        if not isinstance(row, dict):
            raise UserError(where, "is not a JSON object", 'A line looks like {"text": "...", "label": 1}.')
        for column in (*self._cells, self._label):
            if column is not None and column not in row:
                raise missing_column(where, column, list(row))
        cells = tuple(row[column] for column in self._cells)
        for column, cell in zip(self._cells, cells, strict=True):
            if not isinstance(cell, str):
                raise UserError(
                    where, f"{column} is {type(cell).__name__}, not text", "Put the text in quotes, or name another column."
                )
        return cells, None if self._label is None else row[self._label]


class Windows(Table):
    """Running text as windows of ``tokens`` token ids, one after the other; what is left at the end is dropped.

    The text is tokenized once, in pieces that end with a line; only the ids are kept (4 bytes each).
    """

    format = "text"
    scattered = True

    def __init__(self, path: Path, name: str, ids: Callable[[str], list[int]], tokens: int) -> None:
        self.path, self.name, self._tokens = path, name, tokens
        pieces = []
        with _opened(path, name) as file:
            for text in _pieces(_decoded(file, name)):
                pieces.append(np.asarray(ids(text), dtype=np.int32))
        whole = np.concatenate(pieces) if pieces else np.zeros(0, np.int32)
        count = len(whole) // tokens
        if not count:
            raise UserError(name, f"has {len(whole)} tokens, a row needs {tokens}", "Give a longer text, or a smaller tokens.")
        self._left = len(whole) - count * tokens
        self._windows = whole[: count * tokens].reshape(count, tokens)

    def __len__(self) -> int:
        return len(self._windows)

    def items(self, indices: Sequence[int]) -> Iterator[Item]:
        return ((self._windows[index],) for index in indices)

    def describe(self) -> dict[str, Any]:
        return {"windows": {"tokens": self._tokens, "tokens_dropped_at_the_end": self._left}}


class TextEncoder(Encoder):
    """Texts to the tokenizer's tensors, padded or cut to ``tokens``.

    ``pairing`` of rows with two texts: ``joint`` is one input with both, ``separate`` is two inputs (a0, b0, a1, b1
    ...).
    """

    ragged = True

    def __init__(
        self,
        tokenize: Tokenize,
        names: Sequence[str],
        tokens: int,
        pairing: Literal["none", "joint", "separate"] = "none",
        fingerprint: str = "",
    ) -> None:
        self._tokenize, self._names, self._tokens, self._pairing = tokenize, list(names), tokens, pairing
        self._fingerprint = fingerprint
        self.group = 2 if pairing == "separate" else 1
        self._seen: dict[str, bool] = {}

    def encode(self, items: Sequence[Item], places: Sequence[str]) -> Batch:
        if self._pairing == "joint":
            batch, cut = self._tokenize([item[0] for item in items], [item[1] for item in items], tokens=self._tokens)
        else:
            batch, cut = self._tokenize([cell for item in items for cell in item], tokens=self._tokens)
        for number, place in enumerate(places):
            self._seen[place] = any(cut[number * self.group : (number + 1) * self.group])
        return {name: batch[name] for name in self._names}

    def check(self, item: Item, place: str) -> None:
        for cell in item:
            if not isinstance(cell, str):
                raise UserError(place, f"holds {type(cell).__name__}, not text", "Name the column with the text.")

    def describe(self) -> dict[str, Any]:
        return {"tokens": self._tokens, "pairing": self._pairing, "inputs": self._names, "tokenizer": self._fingerprint}

    def noted(self) -> dict[str, Any]:
        return {"truncated": {"rows": sum(self._seen.values()), "of": len(self._seen)}}


class WindowEncoder(Encoder):
    """Windows of token ids to ``input_ids`` [B, T] and an ``attention_mask`` of ones."""

    def __init__(self, names: Sequence[str], fingerprint: str = "") -> None:
        self._names, self._fingerprint = list(names), fingerprint

    def encode(self, items: Sequence[Item], places: Sequence[str]) -> Batch:
        ids: Tensor = torch.from_numpy(np.stack([item[0] for item in items])).long()
        made = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
        return {name: made[name] for name in self._names}

    def describe(self) -> dict[str, Any]:
        return {"inputs": self._names, "tokenizer": self._fingerprint}


def missing_column(where: str, column: Column, known: Sequence[str]) -> UserError:
    """The error for a column that does not exist; names the nearest."""
    near = difflib.get_close_matches(str(column), known, n=3, cutoff=0.4)
    hint = f"Nearest: {', '.join(near)}." if near else f"There is: {', '.join(known[:12])}."
    return UserError(where, f"there is no column {column!r}", hint)


def _opened(path: Path, name: str) -> Any:
    try:
        return path.open("rb")
    except OSError as error:
        raise UserError(name, f"cannot be read: {error.strerror}", "Name a file that you may read.") from None


def _decoded(file: Iterable[bytes], name: str) -> Iterator[str]:
    for number, line in enumerate(file, 1):
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{name}:{number}", f"is not UTF-8 (byte {error.start})", "Save the file as UTF-8.") from None


def _pieces(lines: Iterable[str], size: int = 1 << 20) -> Iterator[str]:
    held: list[str] = []
    length = 0
    for line in lines:
        held.append(line)
        length += len(line)
        if length >= size:
            yield "".join(held)
            held, length = [], 0
    if held:
        yield "".join(held)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
