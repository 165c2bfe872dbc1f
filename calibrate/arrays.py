"""Arrays: npz files with one array for each model input, and ``labels``; rows are read from the archive one by one."""

from __future__ import annotations

import itertools
import math
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from calibrate.data import Encoder, Item, Table
from calibrate.errors import UserError
from calibrate.signature import Batch
from calibrate.text import missing_column

__all__ = ["ArrayEncoder", "Npz"]

_AGAIN = "The file is damaged; write it again with numpy.savez."
_LOCAL_HEADER, _LOCAL_NAMES = 30, 26
"""Bytes of a zip file's local header without its names, and where in it their lengths lie."""


class Npz(Table):
    """Arrays of an npz file by name, first dimension the rows. Nothing is unpickled, and only ``labels`` is kept."""

    format = "arrays"

    def __init__(self, path: Path, name: str, inputs: Sequence[str], label: str | None = "labels") -> None:
        """``label`` is the array with the labels; one that does not exist means no labels.

        Raises:
            UserError: not an npz file, an array missing, of objects, or of another length.
        """
        self.path, self.name, self._inputs = path, name, list(inputs)
        members = self._members()
        self.names = sorted(members)
        for wanted in self._inputs:
            if wanted not in members:
                raise missing_column(name, wanted, sorted(members)) from None
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, np.dtype[Any]] = {}
        labelled = label is not None and label in members
        for key in [*self._inputs, *([label] if labelled and label else [])]:
            with self._stream(key) as (_, shape, dtype):
                self.shapes[key], self.dtypes[key] = shape, dtype
        lengths = {key: shape[0] if shape else -1 for key, shape in self.shapes.items()}
        if len(set(lengths.values())) > 1 or -1 in lengths.values():
            told = ", ".join(f"{key} {length}" for key, length in lengths.items())
            raise UserError(name, f"arrays have different numbers of rows: {told}", "The first dimension is the rows.")
        self._rows = next(iter(lengths.values()))
        if not self._rows:
            raise UserError(name, "has no rows", "Give a file with rows, or take the split out of the recipe.")
        self._labels: list[Any] | None = (
            [row.item() for row in self._read(label, range(self._rows))] if labelled and label else None
        )

    def _members(self) -> set[str]:
        try:
            with zipfile.ZipFile(self._path) as archive:
                return {member.removesuffix(".npy") for member in archive.namelist() if member.endswith(".npy")}
        except (zipfile.BadZipFile, OSError) as error:
            raise UserError(self.name, f"is not an npz file that can be read ({error})", "Write it with numpy.savez.") from None

    @property
    def _path(self) -> Path:
        assert self.path is not None
        return self.path

    def __len__(self) -> int:
        return self._rows

    @property
    def scattered(self) -> bool:  # type: ignore[override]
        """Whether its arrays lie in it as they are, as ``numpy.savez`` writes them, and are not compressed."""
        with zipfile.ZipFile(self._path) as archive:
            return all(archive.getinfo(f"{key}.npy").compress_type == zipfile.ZIP_STORED for key in self._inputs)

    def items(self, indices: Sequence[int]) -> Iterator[Item]:
        ascending = all(one <= other for one, other in itertools.pairwise(indices))
        read = self._read if ascending else self._picked
        return zip(*(read(key, indices) for key in self._inputs), strict=True)

    def label_values(self) -> Sequence[Any] | None:
        return self._labels

    def describe(self) -> dict[str, Any]:
        return {"arrays": {key: [str(self.dtypes[key]), *shape] for key, shape in self.shapes.items()}}

    def _read(self, key: str, indices: Sequence[int]) -> Iterator[np.ndarray[Any, Any]]:
        with self._stream(key) as (stream, shape, dtype):
            size = math.prod(shape[1:]) * dtype.itemsize
            at = 0
            for index in indices:
                try:
                    stream.seek((index - at) * size, 1)  # reads over what lies between
                    raw = stream.read(size)
                except (zipfile.BadZipFile, zlib.error, OSError, EOFError) as error:
                    raise UserError(self.place(index), f"the array {key} is damaged ({error})", _AGAIN) from None
                if len(raw) != size:
                    raise UserError(self.place(index), f"the array {key} ends here", _AGAIN)
                at = index + 1
                yield np.frombuffer(raw, dtype).reshape(shape[1:])

    def _picked(self, key: str, indices: Sequence[int]) -> Iterator[np.ndarray[Any, Any]]:
        """Rows in any order, of an array that is not compressed; damage is found where rows are read in their order."""
        with zipfile.ZipFile(self._path) as archive, self._path.open("rb") as file:
            member = archive.getinfo(f"{key}.npy")
            file.seek(member.header_offset + _LOCAL_NAMES)
            name, extra = (int.from_bytes(file.read(2), "little") for _ in range(2))
            shape, dtype = self.shapes[key], self.dtypes[key]
            size = math.prod(shape[1:]) * dtype.itemsize
            first = member.header_offset + _LOCAL_HEADER + name + extra + member.file_size - size * shape[0]
            for index in indices:
                file.seek(first + index * size)
                raw = file.read(size)
                if len(raw) != size:
                    raise UserError(self.place(index), f"the array {key} ends here", _AGAIN)
                yield np.frombuffer(raw, dtype).reshape(shape[1:])

    def _stream(self, key: str) -> _Member:
        return _Member(self._path, self.name, key)


class _Member:
    """An open array of an npz file: (stream at the first row, shape, dtype)."""

    def __init__(self, path: Path, name: str, key: str) -> None:
        self._path, self._name, self._key = path, name, key

    def __enter__(self) -> tuple[IO[bytes], tuple[int, ...], np.dtype[Any]]:
        self._archive = zipfile.ZipFile(self._path)
        self._opened = self._archive.open(f"{self._key}.npy")
        try:
            shape, dtype = self._header()
        except BaseException:
            self.__exit__()
            raise
        return self._opened, shape, dtype

    def _header(self) -> tuple[tuple[int, ...], np.dtype[Any]]:
        array = f"the array {self._key}"
        try:
            version = np.lib.format.read_magic(self._opened)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, fortran, dtype = read(self._opened)
            stored = self._archive.getinfo(f"{self._key}.npy").file_size - self._opened.tell()
        except (ValueError, zipfile.BadZipFile, zlib.error, OSError, EOFError) as error:
            what = str(error).partition("\n")[0]
            raise UserError(self._name, f"{array} cannot be read ({what})", "Write it with numpy.savez.") from None
        if dtype.hasobject:
            raise UserError(self._name, f"{array} holds pickled objects, which are not read", "Give it a plain dtype.")
        if fortran:
            raise UserError(self._name, f"{array} is stored column by column", "Save numpy.ascontiguousarray(array).")
        if math.prod(shape) * dtype.itemsize != stored:
            raise UserError(self._name, f"{array} says {list(shape)} and holds {stored} bytes", _AGAIN)
        return shape, dtype

    def __exit__(self, *_: object) -> None:
        self._opened.close()
        self._archive.close()


class ArrayEncoder(Encoder):
    """Rows of arrays on top of each other, in the dtypes of the model's inputs."""

    def __init__(self, dtypes: Mapping[str, torch.dtype]) -> None:
        self._dtypes = dict(dtypes)

    def encode(self, items: Sequence[Item], places: Sequence[str]) -> Batch:
        batch = {}
        for number, (name, dtype) in enumerate(self._dtypes.items()):
            made = batch[name] = torch.from_numpy(np.stack([item[number] for item in items])).to(dtype)
            if dtype.is_floating_point and not (finite := made.flatten(1).isfinite().all(1)).all():
                raise _not_finite(name, places[int(finite.logical_not().nonzero()[0])])
        return batch

    def check(self, item: Item, place: str) -> None:
        for cell, (name, dtype) in zip(item, self._dtypes.items(), strict=True):
            if dtype.is_floating_point and not torch.from_numpy(cell.copy()).to(dtype).isfinite().all():
                raise _not_finite(name, place)

    def describe(self) -> dict[str, Any]:
        return {"inputs": {name: str(dtype).removeprefix("torch.") for name, dtype in self._dtypes.items()}}


def _not_finite(name: str, place: str) -> UserError:
    return UserError(place, f"the array {name} holds NaN or infinity", "Take the row out, or repair it.")
