"""``compress validate``: judges the files of a finished run again, later or on another machine.

Where the recipe's model and data can still be reached, on all evaluation rows; otherwise on the rows that the run kept in
``kept.safetensors`` with the float and the compressed model's outputs on them. The report says which.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from calibrate.errors import MissingRuntime, UserError
from calibrate.modes import evaluating
from calibrate.signature import Batch
from compress import manifest, report
from compress.journal import FOLDER
from compress.judgement import Judge
from compress.preparation import judge_of, model_of, require_runtimes
from compress.progress import Progress
from compress.promise import Promise
from compress.report import Limit, Report, Row
from compress.run_folder import locked, writable
from compress.saved import load
from compress.saved import read as read_saved
from compress.verdict import verdict, with_float_times
from export.contract import Artifact, Exporter
from export.disk import renamed
from export.graph import Traceable

if TYPE_CHECKING:
    from compress.recipe import Recipe

__all__ = ["KeptRows", "keep_rows", "validate"]

_FILE = "kept.safetensors"
_BYTES = 8_000_000


class KeptRows:
    """The evaluation rows that a run folder keeps, as ``Rows``."""

    def __init__(self, inputs: Batch, labels: Tensor | None, group: int) -> None:
        self.inputs, self.labels, self.group = inputs, labels, group

    def __len__(self) -> int:
        return int(next(iter(self.inputs.values())).shape[0]) // self.group

    def batches(self, size: int) -> Iterator[Batch]:
        width = size * self.group
        for start in range(0, len(self) * self.group, width):
            yield {name: value[start : start + width] for name, value in self.inputs.items()}


def keep_rows(judge: Judge, folder: Path) -> Path:
    """Writes the first evaluation rows (4 to 64, about 8 MB) with both models' outputs to ``kept.safetensors``."""
    from safetensors.torch import save_file

    rows, float_outputs, compressed_outputs = judge.rows, judge.float_outputs, judge.compressed_outputs
    assert float_outputs is not None
    assert compressed_outputs is not None
    one = next(iter(rows.batches(1)))
    width = sum(value.nbytes for value in one.values()) + 2 * float_outputs.take(0, rows.group).nbytes
    count = min(len(rows), max(4, min(64, _BYTES // max(1, width))))
    batch = next(iter(rows.batches(count)))
    tensors = {f"inputs.{name}": value.contiguous() for name, value in batch.items()}
    tensors["float"] = float_outputs.take(0, count * rows.group).contiguous()
    tensors["compressed"] = compressed_outputs.take(0, count * rows.group).contiguous()
    if rows.labels is not None:
        tensors["labels"] = rows.labels[:count].contiguous()
    path = folder / _FILE
    with renamed(path) as unfinished:
        save_file(tensors, unfinished, metadata={"group": str(rows.group)})
    return path


def validate(folder: Path, *, trust: bool = False, progress: Progress | None = None) -> Report:
    """Opens every file of a run folder again, runs it and judges it; writes ``validation.json`` next to ``report.json``.

    Raises:
        UserError: the folder is not that of a finished run, or one of its files is gone.
        MissingRuntime: a runtime that the recipe exports to is not installed here.
    """
    from compress.recipe import read

    progress = progress or Progress()
    if not all(os.path.isfile(folder / file) for file in ("report.json", "manifest.json")):
        begun = os.path.isdir(folder / FOLDER)
        hint = (
            "The run was interrupted, or is at work: give its command again." if begun else "Name one, such as runs/quickstart."
        )
        raise UserError(str(folder), "is not the folder of a finished run", hint)
    told = manifest.read(folder)
    recipe = read(folder / "recipe.yaml", base=(folder / told["base"]).resolve())
    before = report.read(folder)
    if "task" not in before.model or not before.rows:
        raise UserError(str(folder / "report.json"), "does not say what was judged", "Run the recipe again.")
    require_runtimes(recipe)
    with writable(folder), locked(folder):
        return _validated(recipe, folder, told, before, trust, progress)


def _validated(recipe: Recipe, folder: Path, told: dict[str, Any], before: Report, trust: bool, progress: Progress) -> Report:
    changed = _unchanged(folder, told)
    try:
        return _judged(recipe, folder, changed, before, trust, progress)
    except UserError:
        raise
    except Exception as error:
        if not changed:
            raise  # the files are those that the run wrote: it is our defect
        line = str(error).strip().partition("\n")[0]
        what = f"is not the file that the run wrote, and cannot be used ({line or type(error).__name__})"
        raise UserError(str(folder / changed[0].artifact), what, "Run the recipe again.") from error


def _judged(recipe: Recipe, folder: Path, limits: list[Limit], before: Report, trust: bool, progress: Progress) -> Report:
    torch.set_num_threads(recipe.threads)
    with progress.step("load the compressed model"):
        model = load(folder, trust=trust)
    judge, float_row, compressed, note = _judge(recipe, folder, model, trust, progress)
    rows = [float_row]
    promise = Promise.of(Traceable(model, read_saved(folder).signature, next(iter(judge.rows.batches(4)))))
    for exporter in recipe.export:
        baseline = folder / "baseline" / exporter.filename
        if baseline.exists():
            judge.floats[exporter.format] = _artifact(exporter, baseline)
        with progress.step(f"{exporter.format}: open, run, judge"):
            rows += judge.file(exporter, _artifact(exporter, folder / exporter.filename), promise)
    rows, limits = with_float_times(rows), limits + verdict(rows, recipe.accept)
    met = all(limit.met for limit in limits)
    made = before.model_copy(
        update={
            "met": met,
            "exit_code": 0 if met else 1,
            "limits": limits,
            "rows": rows,
            "compressed": compressed,
            "data": {**before.data, "validated_on": note},
            "machine": manifest.machine(recipe.threads),
            "folder": str(folder),
        }
    )
    manifest.write_json(folder / "validation.json", made.model_dump(mode="json"))
    return made


def _judge(recipe: Any, folder: Path, model: nn.Module, trust: bool, progress: Progress) -> tuple[Judge, Row, Row, str]:
    """A judge with its references, on all evaluation rows where they can be reached, else on the kept ones."""
    from compress.datasets import load_data

    task = report.read(folder).model["task"]

    def made(rows: Any, metric: Any, metric_name: str, batch_size: int) -> Judge:
        return judge_of(recipe, task, rows, metric, metric_name, batch_size, folder, progress)

    size = manifest.size_bytes(folder / "model.safetensors")
    try:
        with progress.step("load the float model and the data"):
            source = model_of(recipe, trust)
            data = load_data(recipe, source, evaluation=True)
    except MissingRuntime:
        raise
    except UserError as error:
        judge, float_row, compressed = _kept(folder, made)
        return judge, float_row, compressed, f"{len(judge.rows)} kept rows, because: {error.what}"
    judge = made(data.evaluation, data.metric, data.metric_name, data.batch_size)
    with progress.step("float model: reference outputs"), evaluating(source.model):
        float_row = judge.float_row(lambda batch: source.signature.call(source.model, batch), _bytes(source.model))
    with progress.step("compressed model: outputs"), evaluating(model):
        compressed = judge.compressed(lambda batch: source.signature.call(model, batch), size)
    return judge, float_row, compressed, f"all {len(judge.rows)} evaluation rows"


def _kept(folder: Path, made: Any) -> tuple[Judge, Row, Row]:
    from safetensors import SafetensorError, safe_open

    from calibrate.metrics import metric as metric_named

    path = folder / _FILE
    if not path.is_file():
        raise UserError(str(path), "the recipe's data cannot be reached and the run kept no rows", "Run where the data is.")
    try:
        with safe_open(path, framework="pt") as file:
            group = int(file.metadata()["group"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        inputs = {key.removeprefix("inputs."): value for key, value in tensors.items() if key.startswith("inputs.")}
        if not inputs or not {"float", "compressed"} <= set(tensors):
            raise ValueError("rows or outputs are missing")
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise UserError(str(path), f"is damaged: {error}", "Run where the data is, or run the recipe again.") from None
    before = report.read(folder)
    name = before.rows[0].metric.name if before.rows[0].metric else ""
    judge = made(KeptRows(inputs, tensors.get("labels"), group), metric_named(name) if name else None, name, 16)
    float_row = judge.float_row(_Replay(tensors["float"]), before.rows[0].size_bytes or 0)
    size = manifest.size_bytes(folder / "model.safetensors")
    return judge, float_row, judge.compressed(_Replay(tensors["compressed"]), size)


class _Replay:
    """Gives kept outputs [B, ...] back, batch after batch, in order."""

    def __init__(self, kept: Tensor) -> None:
        self.kept, self.start = kept, 0

    def __call__(self, batch: Batch) -> Tensor:
        count = next(iter(batch.values())).shape[0]
        self.start += count
        return self.kept[self.start - count : self.start]


def _unchanged(folder: Path, told: dict[str, Any]) -> list[Limit]:
    """Whether the files still are the bytes that the run wrote."""
    limits = []
    for name, entry in told["files"].items():
        path = folder / name
        if not path.exists():
            raise UserError(str(path), "is gone", "Run the recipe again.")
        if manifest.digest(path) != entry["sha256"]:
            says = f"{name} is not the file that the run wrote (its hash differs)"
            limits.append(Limit(line="manifest", artifact=name, limit="unchanged", value="changed", met=False, says=says))
    return limits


def _artifact(exporter: Exporter, path: Path) -> Artifact:
    return Artifact(exporter.format, path, manifest.size_bytes(path))


def _bytes(model: nn.Module) -> int:
    from calibrate.inventory import inventory

    return sum(entry.bytes for entry in inventory(model).values())
