"""Turns one file into one row of the report."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from calibrate.latency import Timing, interleave, processor_name
from calibrate.signature import Batch
from compress.figures import agreement, decibels, figure
from compress.promise import Promise, described
from compress.report import Check, Figure, Latency, Row
from export.contract import Artifact, Exporter, Runner
from export.validate import Checked, Evaluated, Outputs, Rows, evaluate, metamorphic, run_rows

if TYPE_CHECKING:
    from calibrate.metrics import Metric
    from compress.recipe import Measure

__all__ = ["Judge"]

_STATISTICS = "float-statistics.npy"
_TIMES = ("median_ms", "low_ms", "high_ms")


@dataclass
class Judge:
    """What files are judged against: the evaluation rows, the float outputs, the compressed model's outputs.

    ``floats`` are the float files by exporter format, for size and time; ``say`` is told (done, total, what). The outputs of
    the float and of the compressed model are kept in the folder ``kept``, from which ``reopen`` takes them.
    """

    rows: Rows
    metric: Metric | None
    metric_name: str
    batch_size: int
    measure: Measure
    threads: int
    folder: Path
    classes: bool = True
    kept: Path | None = None
    floats: dict[str, Artifact] = field(default_factory=dict)
    float_outputs: Outputs | None = None
    float_statistics: Tensor | None = None
    compressed_outputs: Outputs | None = None
    say: Callable[[int, int, str], None] = lambda done, total, what: None

    def float_row(self, model_call: Callable[[Batch], Tensor], size: int) -> Row:
        """Runs the float model once; its outputs are the reference for everything after."""
        self.float_outputs = self._outputs("float")
        found = self._evaluate(model_call, {}, self.float_outputs, "float model")
        self.float_outputs.keep()
        self.float_statistics = found.statistics
        if self.kept is not None and found.statistics is not None:
            _keep(found.statistics, self.kept / _STATISTICS)
        return Row(
            label="float",
            format="torch",
            runtime=f"torch {torch.__version__} CPU",
            validated="reference",
            metric=self._metric(found),
            size_bytes=size,
        )

    def compressed(self, model_call: Callable[[Batch], Tensor], size: int) -> Row:
        """Runs the compressed torch model; files are compared with its outputs."""
        self.compressed_outputs = self._outputs("compressed")
        found = self._evaluate(model_call, {"float": self.float_outputs}, self.compressed_outputs, "compressed model")
        self.compressed_outputs.keep()
        return self._figures(
            found,
            label="compressed",
            format="torch",
            path="model.safetensors",
            runtime=f"torch {torch.__version__} CPU",
            validated="runtime",
            size_bytes=size,
        )

    def files(self, name: str) -> list[Path]:
        """What is kept of the model ``name`` (``float`` or ``compressed``), for ``reopen``."""
        assert self.kept is not None
        statistics = [self.kept / _STATISTICS] if name == "float" and self.metric is not None else []
        return [self.kept / f"{name}.npy", *statistics]

    def reopen(self) -> None:
        """Takes the outputs and statistics that are kept."""
        assert self.kept is not None
        if (self.kept / "float.npy").is_file():
            self.float_outputs = Outputs.reopened(self.kept / "float.npy")
        if (self.kept / _STATISTICS).is_file():
            self.float_statistics = torch.from_numpy(np.load(self.kept / _STATISTICS, allow_pickle=False))
        if (self.kept / "compressed.npy").is_file():
            self.compressed_outputs = Outputs.reopened(self.kept / "compressed.npy")

    def _outputs(self, name: str) -> Outputs:
        return Outputs(folder=self.folder) if self.kept is None else Outputs(self.kept / f"{name}.npy")

    def file(
        self,
        exporter: Exporter,
        artifact: Artifact,
        promise: Promise,
        before: Mapping[str, Evaluated] | None = None,
        kept: dict[str, Evaluated] | None = None,
    ) -> list[Row]:
        """The rows of one written file: one for its runtime, one for each other runtime that takes the same file.

        Args:
            before: what another file gave, by label; the fidelity to it is found too, under ``before``.
            kept: takes what this file gave, by label, with its outputs.
        """
        known = described(exporter, artifact, promise, self.folder, self.floats.get(exporter.format))
        known["details"]["run_in_float"] = exporter.kept_float(artifact.path)

        def opened(label: str, runner: Runner) -> Row:
            other = (before or {}).get(label)
            return self._opened(label, runner, exporter, known, promise, other.outputs if other else None, kept)

        rows = [opened(exporter.format, exporter.open(artifact.path, self.threads))]
        for label, runner in exporter.also(artifact.path, self.threads):
            try:
                rows.append(opened(label, runner))
            except RuntimeError as error:
                why = f"{runner.runtime} cannot run the file: {str(error).strip().splitlines()[0]}"
                rows.append(Row(label=label, **known, validated="none", runtime=runner.runtime, note=why))
        return rows

    def gives(self, exporter: Exporter, artifact: Artifact) -> dict[str, Evaluated]:
        """What a file gives on the evaluation rows, by label, with its outputs; runtimes that cannot run it are absent."""
        found = {}
        opened = [(exporter.format, exporter.open(artifact.path, self.threads))]
        for label, runner in itertools.chain(opened, exporter.also(artifact.path, self.threads)):
            try:
                if runner.how != "none":
                    what = f"{label}: the file to compare with"
                    found[label] = self._evaluate(run_rows(runner), {}, Outputs(folder=self.folder), what)
            except RuntimeError:
                if label == exporter.format:
                    raise
            finally:
                runner.close()
        return found

    def against(self, label: str, exporter: Exporter, artifact: Artifact, other: Artifact) -> list[Latency]:
        """Times of a file with their ratios to another file in the same runtime, interleaved, at each batch size; none where
        this runtime's time means nothing here."""
        runner = self._runner(label, exporter, artifact)
        if runner is None:
            return []
        try:
            return self._latency(label, runner, exporter, other) if runner.measurable else []
        finally:
            runner.close()

    def _opened(
        self,
        label: str,
        runner: Runner,
        exporter: Exporter,
        known: dict[str, Any],
        promise: Promise,
        before: Outputs | None,
        kept: dict[str, Evaluated] | None,
    ) -> Row:
        told = {"label": label, **known}
        try:
            if runner.how == "none":
                return Row(**told, validated="none", runtime=runner.runtime, note=runner.runtime)
            references = {"float": self.float_outputs, "compressed": self.compressed_outputs, "before": before}
            found = self._evaluate(run_rows(runner), references, None if kept is None else Outputs(folder=self.folder), label)
            if kept is not None:
                kept[label] = found
            batch = self._batch(4)
            checked = [_finite_outputs(found), *metamorphic(runner, batch, dynamic_activations=promise.dynamic_activations)]
            latency = self._latency(label, runner, exporter, self.floats.get(exporter.format)) if runner.measurable else []
            return self._figures(
                found,
                **told,
                validated=runner.how,
                runtime=runner.runtime,
                checks=[Check(**vars(check)) for check in checked],
                latency=latency,
            )
        finally:
            runner.close()

    def _evaluate(
        self, call: Callable[[Batch], Tensor], references: Mapping[str, Outputs | None], keep: Outputs | None, what: str
    ) -> Evaluated:
        present = {name: outputs for name, outputs in references.items() if outputs is not None}
        return evaluate(
            call,
            self.rows,
            self.metric,
            references=present,
            keep=keep,
            classes=self.classes,
            batch_size=self.batch_size,
            progress=lambda done, total: self.say(done, total, f"{what}: evaluation rows"),
        )

    def _figures(self, found: Evaluated, **known: Any) -> Row:
        against_float, against_compressed = found.fidelity.get("float"), found.fidelity.get("compressed")
        drop = None
        if self.metric is not None and found.statistics is not None and self.float_statistics is not None:
            drop = figure(f"{self.metric_name} lost", self.metric.drop(self.float_statistics, found.statistics))
        return Row(
            **known,
            metric=self._metric(found),
            drop=drop,
            agreement=agreement(against_float),
            sqnr_db=decibels(against_float),
            sqnr_to_compressed_db=decibels(against_compressed),
            agreement_to_compressed=agreement(against_compressed),
        )

    def _metric(self, found: Evaluated) -> Figure | None:
        if self.metric is None or found.statistics is None:
            return None
        return figure(self.metric_name, self.metric.estimate(found.statistics))

    def _batch(self, rows: int) -> Batch:
        batch = next(iter(self.rows.batches(rows)))
        index = torch.arange(rows) % next(iter(batch.values())).shape[0]
        return {name: value[index] for name, value in batch.items()}

    def _latency(self, label: str, runner: Runner, exporter: Exporter, other: Artifact | None) -> list[Latency]:
        """Times the file and another one in the same runtime, interleaved, for each batch size that the file takes."""
        baseline = None if other is None else self._runner(label, exporter, other)
        try:
            timed = []
            for size in self.measure.batch_sizes:
                if runner.rows not in (None, size):
                    continue
                batch = self._batch(size)
                timed.append(self._time(label, size, batch, runner, baseline))
            return timed
        finally:
            if baseline is not None:
                baseline.close()

    def _time(self, label: str, size: int, batch: Batch, runner: Runner, baseline: Runner | None) -> Latency:
        runs: dict[str, Callable[[], object]] = {} if baseline is None else {"float": lambda: baseline(batch)}
        timings: dict[str, Timing] = interleave(
            {**runs, "file": lambda: runner(batch)},
            repeats=self.measure.repeats,
            warmup=self.measure.warmup,
            progress=lambda done, total: self.say(done, total, f"{label}: times at batch {size}"),
        )
        made = timings["file"]
        ratio = made.ratio if baseline is not None else None
        return Latency(
            batch=size,
            median_ms=made.median_ms,
            low_ms=made.low_ms,
            high_ms=made.high_ms,
            runs=made.runs,
            threads=self.threads,
            processor=processor_name(),
            runtime=runner.runtime,
            **{f"float_{key}": getattr(timings["float"], key) for key in _TIMES if baseline is not None},
            ratio=ratio.value if ratio else None,
            ratio_low=ratio.low if ratio else None,
            ratio_high=ratio.high if ratio else None,
        )

    def _runner(self, label: str, exporter: Exporter, artifact: Artifact) -> Runner | None:
        if label == exporter.format:
            return exporter.open(artifact.path, self.threads)
        return dict(exporter.also(artifact.path, self.threads)).get(label)


def _keep(values: Tensor, path: Path) -> None:
    unfinished = path.with_name(f".{path.name}.part")
    with unfinished.open("wb") as file:
        np.save(file, values.numpy(), allow_pickle=False)
    unfinished.replace(path)


def _finite_outputs(found: Evaluated) -> Checked:
    """Fails a file that gave NaN or infinity on any row; its SQNR has no number then."""
    finite = all(fidelity.sqnr_db != -math.inf for fidelity in found.fidelity.values())
    return Checked("outputs are finite", finite, "" if finite else "NaN or infinity in the outputs")
