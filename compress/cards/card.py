"""The model card of one file: what it is, how it was made, its figures, how it was validated, its limits, how to run it.

Sections after Mitchell et al. 2019, "Model Cards for Model Reporting" (arXiv 1810.03993), with the YAML front matter that
the Hugging Face hub reads. What nothing states is said to be not known.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

import yaml

from compress import manifest
from compress.cards import prose, wording
from compress.cards.program import Program
from compress.report import Latency, Row, StepRecord

if TYPE_CHECKING:
    from jinja2 import Template

    from compress.recipe import Recipe
    from compress.report import Report
    from export.contract import Exporter

__all__ = ["Card"]

_NAMES = {"onnx": "ONNX", "coreml": "Core ML", "tensorrt": "TensorRT"}
_PIPELINES = {"sentence-embedding": "sentence-similarity", "causal-lm": "text-generation", "features": "feature-extraction"}
_MEANING = {
    "classes": "Scores of the classes (logits); the softmax of a row gives probabilities, which were not calibrated.",
    "score": "One score a row.",
    "embedding": "One embedding a row; rows are compared by the cosine of their embeddings.",
    "token": "Scores of the next token at every position (logits).",
    "features": "The states of the model, without a head.",
}


@dataclass
class Card:
    """Everything that the template of a card asks for; ``rows`` are the file's lines of the report, one for each runtime."""

    exporter: Exporter
    program: Program
    of: list[Row]
    report: Report
    recipe: Recipe
    folder: Path

    def text(self, template: Template) -> str:
        """The card; absolute paths are cut to their last part."""
        front = yaml.safe_dump(self.front, sort_keys=False, allow_unicode=True, width=10_000)
        return wording.without_paths(template.render(card=self, program=self.program, front=front))

    @property
    def first(self) -> Row:
        return self.of[0]

    @property
    def float_row(self) -> Row | None:
        return next((row for row in self.report.rows if row.validated == "reference"), None)

    @property
    def kind(self) -> str:
        return _NAMES[self.exporter.format]

    @property
    def title(self) -> str:
        return f"{' '.join(self.program.model.split())}, {self.kind}"

    @property
    def front(self) -> dict[str, Any]:
        """The front matter. It names no licence and no language: neither is known."""
        tags = [self.exporter.format, "transformer-compress", *dict.fromkeys(step.name for step in self._kept_steps())]
        made: dict[str, Any] = {
            "library_name": self.exporter.format,
            "pipeline_tag": _PIPELINES.get(self.program.task, self.program.task),
            "tags": tags,
        }
        results = [self._result(row) for row in self.of if row.metric is not None]
        if results:
            made["model-index"] = [{"name": self.program.model, "results": results}]
        return made

    def _result(self, row: Row) -> dict[str, Any]:
        assert row.metric is not None
        data = self.report.data["evaluation"]
        measured = {"type": row.metric.name, "name": f"{row.metric.name} ({row.validated}: {row.runtime})"}
        return {
            "task": {"type": _PIPELINES.get(self.program.task, self.program.task)},
            "dataset": {"type": data["format"], "name": _last(data["path"])},
            "metrics": [{**measured, "value": row.metric.value}],
        }

    @property
    def what(self) -> str:
        name = self.exporter.filename.rpartition("/")[2]
        steps = ", ".join(step.name for step in self._kept_steps()) or "no pass"
        article = "an" if self.kind == "ONNX" else "a"
        model = f"the model **{' '.join(self.program.model.split())}** ({self.program.task})"
        return f"`{name}` is {model} as {article} {self.kind} file, after {steps}, made by transformer-compress."

    @property
    def verdict(self) -> str:
        told = [limit for limit in self.report.limits if limit.artifact in {row.label for row in self.of}]
        missed = [limit.says for limit in told if not limit.met]
        if missed:
            return f"**The contract of the recipe was missed**: {'; '.join(missed)}."
        if told:
            return f"The contract of the recipe was met for this file ({'; '.join(limit.says for limit in told)})."
        return "The recipe names no contract for this file."

    @property
    def facts(self) -> list[tuple[str, str]]:
        """What the file is, as the exporter says it."""
        details = self.first.details
        keys = ("opset", "dialect", "target", "precision", "builder", "targets")
        made = [("file", f"`{self.exporter.filename}`"), ("size", wording.size(self.first)), ("task", self.program.task)]
        made += [(key, wording.option(details[key])) for key in keys if details.get(key)]
        for name, (low, best, high) in details.get("profile", {}).items():
            made.append((f"profile, {name}", f"{low} to {high}, tuned for {best}"))
        if self.first.audit is not None:
            audit = self.first.audit
            stored = ", ".join(f"{kind} {count:,}" for kind, count in audit.bytes_by_dtype.items())
            made.append(("weight bytes", stored))
            made.append(
                ("integers", f"{audit.equal} of {audit.layers} quantized layers read back from the file hold the model's codes")
            )
        labels = self.program.labels
        if labels:
            made.append(("classes", f"{len(labels)}: {wording.listed(labels)} (`labels.txt`)"))
        elif self.program.answer == "classes":
            made.append(("classes", f"{self.program.output.shape[-1]}, without names"))
        return [(name, str(value).replace("|", "\\|")) for name, value in made]

    @property
    def rows(self) -> str:
        """How many rows the file takes, and how a row is made."""
        interface = self.program.interface
        if interface.fixed:
            taken = f"The file takes exactly {_rows(interface.least)} at a time"
        elif interface.most:
            taken = f"The file takes {interface.least} to {interface.most} rows at a time"
        else:
            taken = "The file takes any number of rows at a time"
        return f"{taken}. {prose.making_of_rows(self.program)}".rstrip()

    @property
    def meaning(self) -> str:
        return _MEANING[self.program.answer]

    @property
    def licence(self) -> str:
        """Known of the embedded model alone."""
        if self.recipe.model.source.startswith("embedded:"):
            return (
                "The digits that the model was trained on are under CC BY 4.0 (E. Alpaydin and C. Kaynak, Optical Recognition of "
                "Handwritten Digits, UCI, 1998); the weights are under the licence of transformer-compress, Apache-2.0."
            )
        return "The licence of the weights and of their training data is not known either; ask where the float model came from."

    @property
    def making(self) -> str:
        notes = "".join(f" Note: {note}." for note in self.report.model.get("notes", []))
        float_bytes = wording.bytes_of(int(self.report.model["float_bytes"]))
        return (
            f"Float model: `{self._source}`, {float_bytes} of parameters and buffers in memory, fingerprint "
            f"`{self.report.model['fingerprint']}`.{notes} Seed {self.recipe.seed}, {self.recipe.threads} "
            f"thread{'s' if self.recipe.threads > 1 else ''}. Passes, in order:" + ("" if self.report.steps else " none.")
        )

    @property
    def _source(self) -> str:
        kind, colon, rest = self.recipe.model.source.partition(":")
        return f"{kind}{colon}{_last(rest)}" if colon and not kind.endswith(".py") else f"{_last(kind)}{colon}{rest}"

    @property
    def steps(self) -> list[dict[str, Any]]:
        """Each pass with its options that are set, and what it says."""
        made = []
        for step in self.report.steps:
            said = step.says or (
                f"{step.changed} tensors added, removed or changed; parameters and buffers in memory "
                f"{step.bytes_before:,} bytes before, {step.bytes_after:,} after."
            )
            given = {key: value for key, value in step.options.items() if value is not None and value not in ([], {}, "")}
            options = [(key, wording.option(value)) for key, value in given.items()]
            made.append({"name": step.name, "undone": step.undone, "says": said, "options": options})
        return made

    def _kept_steps(self) -> list[StepRecord]:
        return [step for step in self.report.steps if not step.undone]

    @property
    def data(self) -> list[tuple[str, ...]]:
        made: list[tuple[str, ...]] = []
        for split in ("calibration", "validation", "evaluation"):
            told = self.report.data.get(split)
            if told is None and split == "validation":
                continue
            if told is None:
                made.append((split, "none", "", ""))
                continue
            cut = told.get("truncated", {})
            short = f"; {cut['rows']} cut to length" if cut.get("rows") else ""
            came = f"{told['path']} ({told['format']}; {told['chosen']} of {told['of']}{short})"
            made.append((split, str(told["rows"]), came.replace("|", "\\|"), f"`{told['fingerprint']}`"))
        return made

    @property
    def _manifest(self) -> dict[str, Any]:
        path = self.folder / "manifest.json"
        return json.loads(path.read_text()) if path.is_file() else {}

    @property
    def hashes(self) -> list[tuple[str, str]]:
        known = self._manifest.get("files", {})
        wanted = (self.exporter.filename, "model.safetensors", "recipe.yaml")
        present = [name for name in wanted if (self.folder / name).exists()]
        return [(name, known[name]["sha256"] if name in known else manifest.digest(self.folder / name)) for name in present]

    @property
    def versions(self) -> str:
        found = self._manifest.get("versions") or manifest.versions()
        return ", ".join(f"{name} {version}" for name, version in found.items())

    @property
    def columns(self) -> list[str]:
        return ["float model", *(row.runtime or row.label for row in self.of)]

    @property
    def basis(self) -> str:
        data = self.report.data.get("evaluation")
        if data is None or self.float_row is None:
            return f"Nothing was measured: {self.first.note or 'the recipe names no evaluation rows'}."
        machine = self.report.machine
        return (
            f"{data['rows']} rows of {data['path']} ({data['chosen']}), the same for all columns. Brackets hold 95 % intervals; "
            f"after a time, the 10th and 90th percentile. Times: {machine['processor']}, {machine['threads']} "
            f"thread{'s' if machine['threads'] > 1 else ''}, medians of interleaved runs of this file and the float file in the "
            "same runtime."
        )

    @property
    def figures(self) -> list[tuple[str, list[str]]]:
        """Lines of the table: a name, the float model's figure, and one for each runtime of the file."""
        if self.float_row is None:
            return [("size", ["", *(wording.size(row) for row in self.of)])]
        name, float_row = self.report.data.get("metric", "metric"), self.float_row
        lost = "perplexity gained, as a share" if name == "perplexity" else f"{name} lost"
        made = [
            (name, [wording.metric(row.metric) for row in (float_row, *self.of)]),
            (f"{lost} (paired; positive is worse)", ["", *(wording.drop(row.drop) for row in self.of)]),
            ("same answer as float", ["", *(wording.share(row.agreement) for row in self.of)]),
            ("SQNR against float", ["", *(wording.decibels(row.sqnr_db, row) for row in self.of)]),
            (
                "SQNR against the compressed torch model",
                ["", *(wording.decibels(row.sqnr_to_compressed_db, row) for row in self.of)],
            ),
        ]
        if name == "agreement":
            made = made[2:]
        for batch in self.recipe.measure.batch_sizes:
            made.append((f"time, batch {batch}", ["", *(wording.time_of(_timed(row, batch)) for row in self.of)]))
        size = wording.bytes_of(float_row.size_bytes) + " in memory" if float_row.size_bytes else wording.NOT_MEASURED
        made.append(("size", [size, *(wording.size(row) for row in self.of)]))
        return made

    @property
    def missing(self) -> list[str]:
        """Why a figure of the table is not there."""
        if self.float_row is None:
            return []
        made = []
        for row in self.of:
            name = row.runtime or row.label
            if row.validated == "none":
                made.append(f"{name}: not run ({row.note or 'no reason is recorded'}), so nothing but its size is known.")
                continue
            if row.metric is None:
                made.append(f"{name}: the rows have no labels, so there is no task metric; the float model is the reference.")
            if row.agreement is None:
                made.append(f"{name}: the output holds no classes, so no answers can be compared.")
            if not row.latency:
                made.append(f"{name}: time not measured: {prose.no_time(row)}.")
            for batch in self.recipe.measure.batch_sizes:
                if row.latency and _timed(row, batch) is None:
                    made.append(f"{name}: batch {batch} not timed: the file takes another number of rows.")
        return made

    @property
    def validated(self) -> list[str]:
        made = [prose.how(row, self.kind) for row in self.of]
        for row in self.of:
            for check in row.checks:
                word = {True: "passed", False: "**failed**", None: "does not apply"}[check.passed]
                made.append(f"{row.label}: {check.name}: {word}{f' ({check.detail})' if check.detail else ''}")
        if self.first.audit is not None:
            made.append(f"{self.first.audit.codes:,} integer codes were read back from the file and compared with the model's.")
        return made

    @property
    def limits(self) -> list[str]:
        return list(prose.limits(self))

    @property
    def running(self) -> str:
        return prose.running(self)

    @property
    def again(self) -> str:
        threads = f"{self.recipe.threads} thread{'s' if self.recipe.threads > 1 else ''}"
        return (
            "`compress apply` on the recipe that `../recipe.yaml` is a copy of (paths in it are relative to where that one lay), "
            f"with the versions above, seed {self.recipe.seed} and {threads}. `compress validate ..` measures this file again, "
            "here or on another machine."
        )


def _timed(row: Row, batch: int) -> Latency | None:
    return next((latency for latency in row.latency if latency.batch == batch), None)


def _rows(count: int) -> str:
    return f"{count} row{'s' if count > 1 else ''}"


def _last(path: str) -> str:
    """The last part of a path; what is no path stays."""
    return PurePath(path).name or path
