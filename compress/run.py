"""The run: one readable function that turns a recipe into a folder of judged files."""

from __future__ import annotations

import gc
import os
import resource
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from calibrate.errors import UserError
from calibrate.inventory import difference, inventory
from calibrate.signature import Batch
from compress import manifest, report
from compress.anatomy import Anatomy, find
from compress.datasets import Data, load_data
from compress.judgement import Judge, Promise, unjudged, verdict, with_float_times
from compress.passes.contract import Context, Pass, evaluating
from compress.preparation import model_of, require_runtimes
from compress.progress import Progress
from compress.report import Report, Row, StepRecord
from compress.saved import save, signature_json
from compress.sources import Source
from compress.surgery import Surgery
from compress.validation import keep_rows
from export.contract import Artifact
from export.graph import Traceable

if TYPE_CHECKING:
    from compress.recipe import Recipe
    from compress.yaml_positions import Step

__all__ = ["Clock", "apply", "check", "prepare"]


def apply(
    recipe: Recipe,
    out: Path,
    *,
    trust: bool = False,
    evaluate: bool = True,
    progress: Progress | None = None,
) -> Report:
    """Carries out a recipe and returns its report, which also lies in the folder.

    Args:
        recipe: what ``compress.recipe.read`` made of a file.
        out: the run folder; made if it does not exist. A folder that is not a run folder and not empty is refused.
        trust: whether Python files that the recipe names may be run.
        evaluate: False writes the files and audits their contents, and runs nothing on the evaluation rows.
        progress: where to tell how far the run is.

    Raises:
        UserError: what the user can change (exit code 2); ``MissingRuntime`` where a library is absent (exit code 3).
    """
    progress, clock = progress or Progress(), Clock()
    require_runtimes(recipe)
    torch.manual_seed(recipe.seed)
    torch.set_num_threads(recipe.threads)

    with clock("load"), progress.step("load model and data"):
        source = model_of(recipe, trust)
        data = load_data(recipe, source, evaluation=evaluate)
        model, example = source.model, data.example
    with clock("anatomy"), progress.step("find the parts of the model"):
        anatomy = _anatomy(recipe, source, model, example)
        check(recipe, model, anatomy)
        for number, exporter in enumerate(recipe.export):
            with _placed(recipe, "export", number, exporter.format):
                exporter.check(Traceable(model, source.signature, example, source.name))
    prepare(out, recipe)

    judge = _judge(recipe, source, data, out, progress)
    rows: list[Row] = []
    compressed: Row | None = None
    float_bytes = sum(entry.bytes for entry in inventory(model).values())
    if judge is not None:
        with clock("float reference"), progress.step("float model: reference outputs and files"), evaluating(model):
            rows.append(judge.float_row(lambda batch: source.signature.call(model, batch), float_bytes))
        with clock("float files"), progress.step("float files, to compare with"):
            traceable = Traceable(model, source.signature, example, source.name)
            for number, exporter in enumerate(recipe.export):
                with _placed(recipe, "export", number, exporter.format):
                    judge.floats[exporter.format] = exporter.write(traceable, _made(out / "baseline" / exporter.filename))
            del traceable
            gc.collect()

    surgery, steps = Surgery(), []
    for number, step in enumerate(recipe.passes):
        with clock(f"pass {step.name}"), progress.step(f"pass {number + 1} of {len(recipe.passes)}: {step.name}"):
            if number:
                anatomy = _anatomy(recipe, source, model, example)
            context = Context(
                signature=source.signature,
                anatomy=anatomy,
                calibration=data.calibration_batches,
                surgery=surgery,
                seed=recipe.seed,
                progress=progress.update,
            )
            before, started = inventory(model), time.perf_counter()
            with _placed(recipe, "passes", number, step.name):
                model = step.run(model, context)
            after = inventory(model)
            steps.append(_record(step, before, after, context.report, time.perf_counter() - started))
            gc.collect()

    with clock("save"), progress.step("save the compressed model"):
        save(model, surgery.edits, source.rebuild, source.signature, out)
        source.save_files(out / "source")
    if judge is not None:
        with clock("compressed model"), progress.step("compressed model: outputs"), evaluating(model):
            size = manifest.size_bytes(out / "model.safetensors")
            compressed = judge.compressed(lambda batch: source.signature.call(model, batch), size)
            keep_rows(judge, out)

    traceable, artifacts = Traceable(model, source.signature, example, source.name), {}
    promise: Promise | None = None
    for number, exporter in enumerate(recipe.export):
        with clock(f"write {exporter.format}"), progress.step(f"{exporter.format}: write"):
            with _placed(recipe, "export", number, exporter.format):
                artifact = exporter.write(traceable, _made(out / exporter.filename))
            artifacts[exporter.format] = artifact
            promise = promise or Promise.of(traceable)
        with clock(f"judge {exporter.format}"), progress.step(f"{exporter.format}: open, run, judge"):
            rows += judge.file(exporter, artifact, promise) if judge else [unjudged(exporter, artifact, promise, out)]

    rows, limits = with_float_times(rows), verdict(rows, recipe.accept) if judge else []
    met = all(limit.met for limit in limits)
    made = Report(
        name=recipe.name,
        met=met,
        exit_code=0 if met else 1,
        limits=limits,
        rows=rows,
        compressed=compressed,
        steps=steps,
        model=_about(source, float_bytes),
        data=data.describe(),
        machine=manifest.machine(recipe.threads),
        seconds=clock.seconds,
        peak_memory_bytes=_peak(),
        folder=str(out),
    )
    _write_manifest(recipe, source, data, artifacts, out)
    report.write(made, out)
    return made


def check(recipe: Recipe, model: nn.Module, anatomy: Anatomy) -> None:
    """Refuses, before anything runs, a pass whose targets do not exist or that a requested runtime cannot carry.

    The first pass is checked against the model as it is; later ones are checked again when their turn comes, because the
    model may have changed by then.

    Raises:
        UserError: names the pass, the place and the runtime.
    """
    for number, step in enumerate(recipe.passes):
        try:
            with _placed(recipe, "passes", number, step.name):
                step.targets(model, anatomy)
        except UserError:
            if number == 0:
                raise
            continue
        preview = _tree(step.preview(model, anatomy))
        for exporter in recipe.export:
            if refused := exporter.refuses(preview):
                path, reason = refused[0]
                more = f" (and {len(refused) - 1} more places)" if len(refused) > 1 else ""
                raise UserError(
                    f"{recipe.place('passes', number, step.name)}: {step.name}",
                    f"{exporter.format} cannot carry {path}: {reason}{more}",
                    f"Change the pass, or take {exporter.format} out of export.",
                )


@contextmanager
def _placed(recipe: Recipe, *path: Step) -> Iterator[None]:
    """Puts the place of a pass or an exporter in the recipe before what it says of a mistake."""
    try:
        yield
    except UserError as error:
        place = recipe.place(*path)
        error.where = f"{place}: {error.where}" if error.where else place
        raise


def prepare(out: Path, recipe: Recipe) -> None:
    """Makes the run folder and puts the recipe into it; files of an earlier run in it are removed.

    Raises:
        UserError: the folder holds something that is not a run, or cannot be written.
    """
    marker = out / "recipe.yaml"
    if out.is_file() or (out.is_dir() and any(out.iterdir()) and not marker.is_file()):
        raise UserError(str(out), "exists and is not a run folder", "Name another folder with --out, or remove it.")
    try:
        out.mkdir(parents=True, exist_ok=True)
        for stale in ("report.json", "validation.json", "manifest.json", "kept.safetensors", "model.safetensors"):
            (out / stale).unlink(missing_ok=True)
        for stale in ("onnx", "coreml", "tensorrt", "baseline", "source"):
            shutil.rmtree(out / stale, ignore_errors=True)
        unfinished = out / ".recipe.yaml.part"
        unfinished.write_text(recipe.text)
        os.replace(unfinished, marker)
    except OSError as error:
        raise UserError(str(out), f"cannot be written: {error.strerror}", "Name another folder with --out.") from None


@dataclass
class Clock:
    """Wall time of each named part of a run, in seconds."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started


def _judge(recipe: Recipe, source: Source, data: Data, out: Path, progress: Progress) -> Judge | None:
    if data.evaluation is None:
        return None
    return Judge(
        rows=data.evaluation,
        metric=data.metric,
        metric_name=data.metric_name,
        batch_size=data.batch_size,
        measure=recipe.measure,
        threads=recipe.threads,
        folder=out,
        classes=source.task not in ("sentence-embedding", "features"),
        say=progress.update,
    )


def _anatomy(recipe: Recipe, source: Source, model: nn.Module, example: Batch) -> Anatomy:
    return find(model, source.signature, example, {str(role): paths for role, paths in recipe.model.roles.items()})


def _tree(layers: dict[str, nn.Module]) -> nn.Module:
    """A module with the given modules at the given paths, and nothing else."""
    root = nn.Module()
    for path, layer in layers.items():
        holder = root
        *parents, name = path.split(".")
        for parent in parents:
            if parent not in holder._modules:
                holder.add_module(parent, nn.Module())
            holder = holder.get_submodule(parent)
        holder.add_module(name, layer)
    return root


def _record(step: Pass, before: Any, after: Any, says: dict[str, Any], seconds: float) -> StepRecord:
    changed = difference(before, after)
    return StepRecord(
        name=step.name,
        options=step.model_dump(mode="json"),
        seconds=seconds,
        bytes_before=sum(entry.bytes for entry in before.values()),
        bytes_after=sum(entry.bytes for entry in after.values()),
        changed=len(changed.removed) + len(changed.added) + len(changed.changed),
        report=says,
    )


def _about(source: Source, float_bytes: int) -> dict[str, Any]:
    return {
        "name": source.name,
        "task": source.task,
        "fingerprint": source.fingerprint,
        "float_bytes": float_bytes,
        "signature": signature_json(source.signature),
        "notes": list(source.notes),
    }


def _write_manifest(recipe: Recipe, source: Source, data: Data, artifacts: dict[str, Artifact], out: Path) -> None:
    files = {"recipe.yaml": out / "recipe.yaml", "model.safetensors": out / "model.safetensors"}
    files |= {artifact.path.relative_to(out).as_posix(): artifact.path for artifact in artifacts.values()}
    content = {
        "version": 1,
        "recipe": recipe.name,
        "base": os.path.relpath(recipe.base, out),
        "seed": recipe.seed,
        "model": {"source": recipe.model.source, "fingerprint": source.fingerprint},
        "data": data.describe(),
        "files": {name: {"sha256": manifest.digest(path), "bytes": manifest.size_bytes(path)} for name, path in files.items()},
        "versions": manifest.versions(),
        "machine": manifest.machine(recipe.threads),
    }
    manifest.write_json(out / "manifest.json", content)


def _made(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _peak() -> int:
    """Largest resident size of this process, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
