"""How long models take as files: each is written as the run would write it, opened in the file's runtime, and timed."""

from __future__ import annotations

import functools
import itertools
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from calibrate.latency import Timing, interleave, processor_name
from calibrate.signature import Batch
from export.contract import Exporter
from export.graph import Traceable

__all__ = ["FileLatency"]

_TOGETHER = 4
"""Files that are timed together with the first: more would take more memory and disk at a time."""


@dataclass
class FileLatency:
    """Times models in one runtime (``compress.passes.contract.Latency``); what it writes is gone afterwards.

    The first model is timed anew beside every few others, so that ratios to it hold though the machine's speed drifts.

    Attributes:
        traceable: makes a model ready to be written.
        example: real rows; as many of them as ``batch`` asks for are timed.
        folder: where files may lie for a while.
    """

    exporter: Exporter
    traceable: Callable[[nn.Module], Traceable]
    example: Batch
    folder: Path
    batch: int = 1
    threads: int = 1
    repeats: int = 30
    warmup: int = 5
    clock: Callable[[], float] = time.perf_counter
    _ran: dict[str, Any] = field(default_factory=dict, init=False)

    def __call__(self, models: Iterable[nn.Module]) -> list[Timing]:
        found: list[Timing] = []
        with tempfile.TemporaryDirectory(prefix="timed-", dir=self.folder) as folder:
            paths = (self._written(model, Path(folder) / str(number)) for number, model in enumerate(models))
            first = next(paths)
            while others := list(itertools.islice(paths, _TOGETHER)):
                found += self._timed([first, *others])[bool(found) :]
                for path in others:
                    shutil.rmtree(path.parent)
            return found or self._timed([first])

    @property
    def conditions(self) -> dict[str, Any]:
        return {"file": self.exporter.format, "threads": self.threads, "processor": processor_name(), **self._ran}

    def _written(self, model: nn.Module, folder: Path) -> Path:
        folder.mkdir()
        path = folder / Path(self.exporter.filename).name
        self.exporter.write(self.traceable(model), path)
        return path

    def _timed(self, paths: Sequence[Path]) -> list[Timing]:
        with ExitStack() as opened:
            runners = [self.exporter.open(path, self.threads) for path in paths]
            for runner in runners:
                opened.callback(runner.close)
            rows = runners[0].rows or self.batch
            self._ran = {"runtime": runners[0].runtime, "batch": rows}
            batch = _rows(self.example, rows)
            runs = {str(number): functools.partial(runner, batch) for number, runner in enumerate(runners)}
            timings = interleave(runs, repeats=self.repeats, warmup=self.warmup, clock=self.clock)
        return list(timings.values())


def _rows(batch: Batch, rows: int) -> Batch:
    """So many rows, repeated where there are fewer."""
    index = torch.arange(rows) % next(iter(batch.values())).shape[0]
    return {name: value[index] for name, value in batch.items()}
