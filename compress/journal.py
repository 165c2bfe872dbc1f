"""The memory of a run, in its folder: which parts are finished, so that the same run goes on where it was interrupted."""

from __future__ import annotations

import json
import random
import re
import resource
import shutil
import sys
import time
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from pydantic import TypeAdapter

from compress import manifest
from compress.identity import differences
from compress.progress import Progress

__all__ = ["FOLDER", "Journal"]

FOLDER = ".unfinished"
"""Sub-folder of the run folder; gone when the run is finished."""

Value = TypeVar("Value")


class Journal:
    """One small JSON record for each finished part of a run, written after the part's files are in place.

    A record is believed only while the files that it names still have the recorded hashes. A part that has to be made again
    and then gives other files takes the records of all later parts with it.

    Attributes:
        folder: where the records lie, and room for what parts keep for one another.
        resumed: names of the parts that were taken over.
        seconds: what each part took, in whichever process it was made.
        peak_memory_bytes: largest resident size of the processes that made the parts.
        warnings: what a report must say, such as why nothing was taken over.
    """

    def __init__(self, out: Path, seed: int = 0, progress: Progress | None = None) -> None:
        self.out, self.folder = out, out / FOLDER
        self.resumed: list[str] = []
        self.seconds: dict[str, float] = {}
        self.warnings: list[str] = []
        self._peak = self._number = 0
        self._run: dict[str, Any] = {}
        self._seed, self._progress = seed, progress or Progress()

    def begin(self, name: str, identity: dict[str, str], *, fresh: bool = False) -> bool:
        """Whether the run goes on from an interrupted one; otherwise what that left in the journal is gone.

        Args:
            name: of the recipe.
            identity: ``compress.identity.identity`` of this run.
            fresh: nothing is taken over, whatever is there.
        """
        self._run = {"name": name, "identity": identity}
        before = None if fresh else manifest.read_json(self.folder / "run.json")
        if before is not None:
            differ = differences(before.get("identity", {}), identity)
            if not differ:
                return True
            self.warnings.append(f"started again: {_listed(differ)} changed since the interrupted run")
            self._progress.note(self.warnings[-1])
        if self.folder.exists():
            shutil.rmtree(self.folder)
        return False

    def start(self) -> None:
        """Notes whose run this is: from here on it can be resumed."""
        self.folder.mkdir()
        manifest.write_json(self.folder / "run.json", self._run)

    def part(
        self,
        name: str,
        kind: type[Value],
        make: Callable[[], Value],
        *,
        makes: Iterable[Path] = (),
        reads: Iterable[Path] = (),
        says: str = "",
        draws_as: str = "",
    ) -> Value:
        """The value of a part: the recorded one if the part is finished, else what ``make`` returns, which is recorded.

        The random generators are seeded by the recipe's seed and the part's name, so that a part gives the same whatever ran
        before it in this process.

        Args:
            name: of the part, the same in every run of a recipe.
            kind: its type, which pydantic can write as JSON and read back.
            makes: files and folders that it makes; what lies there is removed before.
            reads: other files that its value follows from.
            says: what progress calls it (default: its name).
            draws_as: the name that seeds it, where that is another than its own.
        """
        makes, reads = list(makes), list(reads)
        if self.finished(name):
            self._progress.note(f"{says or name}: taken over")
            return self.taken_over(name, kind)
        for path in makes:
            _remove(path)
        started = time.perf_counter()
        with self._progress.step(says or name):
            self._settle(draws_as or name)
            value = TypeAdapter(kind).dump_python(make(), mode="json")
        self._write(name, value, time.perf_counter() - started, [*makes, *reads])
        return self._value(name, kind)

    def taken_over(self, name: str, kind: type[Value]) -> Value:
        """The recorded value of a part, whatever became of its files."""
        self.resumed.append(name)
        return self._value(name, kind)

    def _value(self, name: str, kind: type[Value]) -> Value:
        record = self._record(name)
        assert record is not None, name
        self._number = record["number"]
        self.seconds[name] = record["seconds"]
        self._peak = max(self._peak, record["peak_memory_bytes"])
        made: Value = TypeAdapter(kind).validate_json(json.dumps(record["value"]))
        return made

    def recalled(self, name: str, kind: type[Value]) -> Value | None:
        """The recorded value of a part, without taking it over; None where there is none."""
        record = self._record(name)
        return None if record is None else TypeAdapter(kind).validate_json(json.dumps(record["value"]))

    def recorded(self, name: str) -> bool:
        """Whether there is a record of the part, whatever became of its files."""
        return self._record(name) is not None

    def finished(self, name: str) -> bool:
        """Whether there is a record of the part and its files are those that it names."""
        record = self._record(name)
        return record is not None and all(
            (self.out / file).is_file() and manifest.digest(self.out / file) == digest for file, digest in record["files"].items()
        )

    @property
    def peak_memory_bytes(self) -> int:
        return max(self._peak, _peak())

    def close(self) -> None:
        """The run is finished: nothing of the journal is needed any more."""
        (self.folder / "run.json").unlink()  # without it nothing is taken over, should this be cut off
        shutil.rmtree(self.folder)

    def _settle(self, name: str) -> None:
        seed = zlib.crc32(name.encode(), self._seed)
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)

    def _write(self, name: str, value: Any, seconds: float, paths: list[Path]) -> None:
        before = self._record(name)
        record = {
            "part": name,
            "number": self._number + 1,
            "value": value,
            "files": {file.relative_to(self.out).as_posix(): manifest.digest(file) for path in paths for file in _files(path)},
            "seconds": seconds,
            "peak_memory_bytes": _peak(),
        }
        if before is not None and before["files"] != record["files"]:
            for path, later in self._records():
                if later["number"] > record["number"]:
                    path.unlink()
        manifest.write_json(self._path(name), record)

    def _records(self) -> list[tuple[Path, dict[str, Any]]]:
        found = [(path, manifest.read_json(path)) for path in self.folder.glob("*.part.json")]
        return [(path, record) for path, record in found if record is not None]

    def _record(self, name: str) -> dict[str, Any] | None:
        return manifest.read_json(self._path(name))

    def _path(self, name: str) -> Path:
        return self.folder / f"{re.sub(r'[^a-z0-9]+', '-', name.lower())}.part.json"


def _files(path: Path) -> list[Path]:
    return sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _listed(names: list[str]) -> str:
    return f"{', '.join(names[:-1])} and {names[-1]}" if len(names) > 1 else names[0]


def _peak() -> int:
    """Largest resident size of this process, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
