"""Judges written files, the same way for every runtime.

Two questions, two numbers: did export keep the compressed model (file against compressed torch), did compression keep the
float model (file against float). And three checks that need no labels: the integers in the file are the model's, a row alone
equals the same row in a batch, identical rows give identical outputs.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from calibrate.errors import LostInExport
from calibrate.fidelity import Fidelity, sqnr_db
from calibrate.signature import Batch
from export.contract import Contents, Runner

__all__ = ["Audited", "Checked", "Evaluated", "Metric", "Outputs", "Rows", "audit", "evaluate", "metamorphic", "run_rows"]

Call = Callable[[Batch], Tensor]


class Rows(Protocol):
    """The evaluation rows (``calibrate.data.Rows``); a data row may be several model rows (``group``: sentence pairs)."""

    labels: Tensor | None
    group: int

    def __len__(self) -> int: ...
    def batches(self, size: int) -> Iterator[Batch]: ...


class Metric(Protocol):
    """A task metric as small statistics per data row (``calibrate.metrics``)."""

    def rows(self, outputs: Tensor, batch: Batch, labels: Tensor | None) -> Tensor: ...


class Outputs:
    """Model outputs for all rows, in order, in a file that is mapped and never read whole.

    ``append`` adds a batch [B, ...], ``take`` gives rows back. With ``path`` the file stays (``.npy``, float32) once ``keep``
    was called, and can be opened again; without, it has no name and lies in ``folder``, or where temporary files lie.
    """

    def __init__(self, path: Path | None = None, folder: Path | None = None) -> None:
        self._path, self._folder = path, folder
        self._file: IO[bytes] | None = None
        self._rows = self._start = 0
        self._tail: tuple[int, ...] = ()

    @classmethod
    def reopened(cls, path: Path) -> Outputs:
        """The outputs that ``keep`` left at ``path``."""
        mapped = np.load(path, mmap_mode="r", allow_pickle=False)
        made = cls(path)
        made._file = path.open("rb")
        made._rows, made._start, made._tail = mapped.shape[0], mapped.offset, mapped.shape[1:]
        return made

    def __len__(self) -> int:
        return self._rows

    def append(self, batch: Tensor) -> None:
        values = batch.detach().to("cpu", torch.float32).contiguous()
        if self._file is None:
            self._tail = tuple(values.shape[1:])
            self._file = self._opened()
            self._header()
            self._start = self._file.tell()
        self._rows += values.shape[0]
        self._file.write(values.numpy().data)

    def take(self, start: int, count: int) -> Tensor:
        """Rows ``start .. start + count`` [count, ...]."""
        assert self._file is not None, "there are no outputs"
        if self._file.writable():
            self._file.flush()
        width = int(np.prod(self._tail, dtype=np.int64))
        mapped = np.memmap(self._file, np.float32, "r", offset=self._start + 4 * width * start, shape=(count, *self._tail))
        return torch.from_numpy(np.array(mapped))

    def keep(self) -> None:
        """All rows are there: the file gets its name."""
        assert self._file is not None, "there are no outputs"
        if self._path is not None:
            self._file.seek(0)
            self._header()
            self._file.flush()
            os.replace(self._unfinished, self._path)

    def _opened(self) -> IO[bytes]:
        return self._unfinished.open("w+b") if self._path is not None else tempfile.TemporaryFile(dir=self._folder)

    def _header(self) -> None:
        # numpy pads the header so that more rows do not make it longer.
        described = {"descr": "<f4", "fortran_order": False, "shape": (self._rows, *self._tail)}
        np.lib.format.write_array_header_1_0(self._file, described)  # type: ignore[arg-type]

    @property
    def _unfinished(self) -> Path:
        assert self._path is not None
        return self._path.with_name(f".{self._path.name}.part")


@dataclass
class Evaluated:
    """What one pass over the evaluation rows gave.

    Attributes:
        statistics: the metric's small statistics, [rows, k]; None without a metric.
        fidelity: against each reference by name.
        outputs: the outputs, when they were asked for.
        rows: data rows evaluated.
    """

    statistics: Tensor | None
    fidelity: dict[str, Fidelity]
    outputs: Outputs | None
    rows: int


@dataclass(frozen=True)
class Audited:
    """Promised codes against those in the file: ``equal`` of ``layers`` agree, over ``codes`` integers."""

    layers: int
    equal: int
    codes: int
    bytes_by_dtype: dict[str, int]
    float_layers: list[str]


@dataclass(frozen=True)
class Checked:
    """A check by name; ``passed`` is None where it does not apply."""

    name: str
    passed: bool | None
    detail: str = ""


def run_rows(runner: Runner) -> Call:
    """The runner as a function of batches of any size: a file with a fixed batch gets pieces, the last one filled up."""

    def call(batch: Batch) -> Tensor:
        if runner.rows is None:
            return runner(batch)
        total, pieces = next(iter(batch.values())).shape[0], []
        for start in range(0, total, runner.rows):
            index = torch.arange(start, start + runner.rows).clamp(max=total - 1)
            pieces.append(runner({name: value[index] for name, value in batch.items()})[: total - start])
        return torch.cat(pieces)

    return call


def evaluate(
    call: Call,
    rows: Rows,
    metric: Metric | None,
    *,
    references: Mapping[str, Outputs] | None = None,
    keep: Outputs | None = None,
    classes: bool = True,
    batch_size: int = 16,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Evaluated:
    """Runs ``call`` over all rows once.

    Args:
        call: batch of named inputs -> outputs [B, ...].
        references: outputs of other models on the same rows, to compare with.
        keep: where to keep the outputs.
        classes: whether the last dimension of the outputs holds scores of classes, so that agreement means something.
        batch_size: data rows a batch.
        progress: told (rows done, rows in all).
    """
    fidelity = {name: Fidelity(None if classes else False) for name in references or {}}
    statistics: list[Tensor] = []
    done = seen = 0
    for batch in rows.batches(batch_size):
        outputs = call(batch).detach().to("cpu", torch.float32)
        count = outputs.shape[0] // rows.group
        if metric is not None:
            labels = None if rows.labels is None else rows.labels[done : done + count]
            statistics.append(metric.rows(outputs, batch, labels))
        for name, reference in (references or {}).items():
            _compare(fidelity[name], reference.take(seen, outputs.shape[0]), outputs, batch)
        if keep is not None:
            keep.append(outputs)
        done, seen = done + count, seen + outputs.shape[0]
        progress(done, len(rows))
    return Evaluated(torch.cat(statistics) if statistics else None, fidelity, keep, done)


def _compare(fidelity: Fidelity, reference: Tensor, outputs: Tensor, batch: Batch) -> None:
    """Adds a batch; where there is one output per token, padded positions do not count."""
    mask = batch.get("attention_mask")
    if mask is not None and outputs.dim() > 2 and outputs.shape[:2] == mask.shape:
        keep = mask.bool()
        reference, outputs = reference[keep], outputs[keep]
    fidelity.update(reference, outputs)


def audit(promised: Mapping[str, np.ndarray[Any, Any]], contents: Contents, artifact: str) -> Audited:
    """Compares the integers read back from a file with those of the compressed model.

    Args:
        promised: signed codes (int8) of each quantized layer by module path.
        contents: what the file holds.
        artifact: its name, for the message.

    Raises:
        LostInExport: a layer's codes are missing from the file, or differ.
    """
    wrong = []
    for path, codes in promised.items():
        held = contents.codes.get(path)
        if held is None:
            wrong.append(f"{path}: not in the file")
        elif held.shape != codes.shape or not np.array_equal(held, codes):
            wrong.append(f"{path}: other codes in the file")
    if wrong:
        more = f" (and {len(wrong) - 3} more)" if len(wrong) > 3 else ""
        raise LostInExport(f"{artifact} does not hold the model's integers: {'; '.join(wrong[:3])}{more}")
    total = sum(codes.size for codes in promised.values())
    return Audited(len(promised), len(promised), total, dict(contents.bytes_by_dtype), list(contents.float_layers))


def metamorphic(runner: Runner, batch: Batch, *, dynamic_activations: bool, floor_db: float = 40.0) -> list[Checked]:
    """Checks that need no labels, on one batch of at least three real rows.

    A row alone must give what it gives in a batch, and identical rows must give identical outputs. Kernels may add in another
    order for another batch size, which can move a value over a rounding edge: the outputs are compared in dB and must reach
    ``floor_db``. Activation grids that are made from the whole batch make a row depend on its neighbours by definition: then
    the figure is stated and the check does not apply.
    """
    if runner.rows is not None:
        why = f"the file takes exactly {runner.rows} row{'s' if runner.rows > 1 else ''}"
        return [Checked("row alone equals row in a batch", None, why), *_identical(runner, batch)]
    together = runner(batch)
    alone = torch.cat([runner({name: value[i : i + 1] for name, value in batch.items()}) for i in range(len(together))])
    level = sqnr_db(alone, together)
    detail = f"{level:.1f} dB over {len(together)} rows"
    if dynamic_activations:
        first = Checked("row alone equals row in a batch", None, f"{detail}; activation grids are made from the whole batch")
    else:
        first = Checked("row alone equals row in a batch", level >= floor_db, detail)
    return [first, *_identical(runner, batch)]


def _identical(runner: Runner, batch: Batch) -> list[Checked]:
    rows = runner.rows or 3
    same = {name: value[:1].expand(rows, *value.shape[1:]).contiguous() for name, value in batch.items()}
    outputs = runner(same)
    if rows == 1:
        level = sqnr_db(outputs, runner(same))
        return [Checked("the same row twice gives the same output", level == float("inf"), f"{level:.1f} dB")]
    level = sqnr_db(outputs[:1].expand_as(outputs[1:]), outputs[1:])
    return [Checked("identical rows give identical outputs", level >= 100.0, f"{level:.1f} dB")]
