"""The run: one readable pipeline that turns a recipe into a folder of judged files, and goes on where it was interrupted."""

from __future__ import annotations

import functools
import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from calibrate.inventory import inventory
from calibrate.modes import evaluating
from calibrate.signature import Batch
from compress import manifest, report
from compress.anatomy import Anatomy, find
from compress.blocks import compare, keep_outputs
from compress.checkpoints import Checkpoints, Subject
from compress.checks import check_exporters, placed
from compress.datasets import Data, load_data
from compress.each_pass import EachPass, linked, with_final_paths
from compress.identity import identity
from compress.journal import Journal
from compress.judgement import Judge
from compress.preparation import judge_of, model_of, require_runtimes
from compress.progress import Progress
from compress.promise import Promise, unjudged
from compress.rehearsal import rehearse
from compress.report import BlockFidelity, Report, Row, StepRecord
from compress.role_bytes import Roles
from compress.run_folder import locked, outdated, own, prepare, writable
from compress.saved import save
from compress.sources import Source
from compress.steps import passes, stands
from compress.summary import summary
from compress.validation import keep_rows
from export.contract import Artifact, Exporter
from export.graph import Traceable

if TYPE_CHECKING:
    from compress.recipe import Recipe

__all__ = ["Clock", "Run", "apply", "files", "float_side", "saved"]


@dataclass
class Run:
    """What stays the same from the beginning of a run to its end.

    Attributes:
        described: what reports and the manifest say of the data.
        judge: None where nothing is evaluated.
        journal: what is finished already, and what the parts keep for one another.
        checkpoints: the model after each pass.
        each_pass: the files after each pass; None where they are written at the end only.
        anatomy: the parts of the float model.
        roles: which of its layers holds what.
    """

    recipe: Recipe
    out: Path
    source: Source
    data: Data
    described: dict[str, Any]
    judge: Judge | None
    journal: Journal
    checkpoints: Checkpoints
    progress: Progress
    clock: Clock
    float_bytes: int
    each_pass: EachPass | None
    anatomy: Anatomy
    roles: Roles

    def traceable(self, model: nn.Module) -> Traceable:
        """The model, ready to be written."""
        return Traceable(model, self.source.signature, self.data.example, self.source.name)

    def call(self, model: nn.Module) -> Callable[[Batch], Tensor]:
        """The model as a function of a batch."""
        return lambda batch: self.source.signature.call(model, batch)

    def parts(self, model: nn.Module) -> Anatomy:
        """The parts of the model as it is now."""
        return _anatomy(self.recipe, self.source, model, self.data)

    def fidelity(self, subject: Subject) -> list[BlockFidelity]:
        """How much of each block's output is kept as the model is now."""
        edits, rows = subject.surgery.edits, self.data.calibration.batches(self.data.batch_size)
        return compare(subject.model, self.source.signature.call, edits, rows, self.float_blocks)

    @property
    def float_blocks(self) -> Path:
        """Where the outputs of the float model's blocks are kept."""
        return self.journal.folder / "blocks.safetensors"


def apply(
    recipe: Recipe,
    out: Path,
    *,
    trust: bool = False,
    evaluate: bool = True,
    fresh: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Carries out a recipe and returns its report, which also lies in the folder.

    A run that was interrupted, in whatever way, goes on where it stopped when recipe, weights, data and program are the same;
    its files are those that it would have written undisturbed.

    Args:
        recipe: what ``compress.recipe.read`` made of a file.
        out: the run folder; made if it does not exist. A folder that is not a run folder and not empty is refused.
        trust: whether Python files that the recipe names may be run.
        evaluate: False writes the files and audits their contents, and runs nothing on the evaluation rows.
        fresh: begins again, and removes what a run left in the folder, also one of another recipe.
        progress: where to tell how far the run is.

    Raises:
        UserError: what the user can change (exit code 2); ``MissingRuntime`` where a library is absent (exit code 3).
    """
    require_runtimes(recipe)
    own(out, recipe.name, fresh=fresh)
    with writable(out), locked(out):
        run = _begun(recipe, out, trust, evaluate, fresh, progress or Progress())
        rows = float_side(run)
        subject, steps = passes(run)
        compressed = saved(run, subject, stands(steps))
        artifacts, made = files(run, subject.model, steps)
        with run.progress.step("report, manifest, cards and page"):
            told = summary(run, [*rows, *made], compressed, steps, subject, artifacts)
            report.write(told, out)
            manifest.write(out, recipe, run.source, run.described, artifacts)
            _companions(run, told)
        run.journal.close()
    return told


def _begun(recipe: Recipe, out: Path, trust: bool, evaluate: bool, fresh: bool, progress: Progress) -> Run:
    """Loads model and data, refuses what cannot work, and looks for an interrupted run to go on from."""
    clock = Clock()
    torch.manual_seed(recipe.seed)
    torch.set_num_threads(recipe.threads)
    with clock("load"), progress.step("load model and data"):
        source = model_of(recipe, trust)
        data = load_data(recipe, source, evaluation=evaluate)
    with clock("anatomy"), progress.step("find the parts of the model"):
        anatomy = _anatomy(recipe, source, source.model, data)
        rehearse(recipe, source, anatomy, data.example)
        check_exporters(recipe, Traceable(source.model, source.signature, data.example, source.name))
    journal = Journal(out, recipe.seed, progress)
    if not journal.begin(recipe.name, identity(recipe, source, data, out, evaluate=evaluate), fresh=fresh):
        if outdated(out, recipe):
            progress.note(f"replaces the finished run of another version of {recipe.name}")
        prepare(out, recipe)
        journal.start()
    loaded = [source.model]
    judge = None if data.evaluation is None else _judge(recipe, source, data, out, journal, progress)
    return Run(
        recipe=recipe,
        out=out,
        source=source,
        data=data,
        described=journal.part("rows", dict[str, Any], functools.partial(_described, data), says="look at the rows"),
        judge=judge,
        journal=journal,
        checkpoints=Checkpoints(journal.folder, source, lambda: loaded.pop() if loaded else model_of(recipe, trust).model),
        progress=progress,
        clock=clock,
        float_bytes=sum(entry.bytes for entry in inventory(source.model).values()),
        each_pass=EachPass(recipe, judge, journal.folder) if judge and recipe.measure.when == "each_pass" else None,
        anatomy=anatomy,
        roles=Roles.of(source.model, anatomy),
    )


def _described(data: Data) -> dict[str, Any]:
    """What reports say of the data, with what is only noted while text is encoded: the parts that do it may be taken over."""
    for rows in (data.calibration, data.validation, data.evaluation):
        if rows is not None and rows.encoder.ragged:
            for _ in rows.batches(data.batch_size):
                pass
    return data.describe()


def float_side(run: Run) -> list[Row]:
    """Runs the float model on the evaluation rows and writes the float files, to compare with; without a judge it only keeps
    what the blocks give."""
    judge, model = run.judge, run.source.model

    def keep() -> None:
        rows = run.data.calibration.batches(run.data.batch_size)
        keep_outputs(model, run.source.signature.call, [block.path for block in run.anatomy.blocks], rows, run.float_blocks)

    run.journal.part("float blocks", type(None), keep, makes=[run.float_blocks], says="float model: outputs of its blocks")
    if judge is None:
        return []
    with evaluating(model):
        row = run.journal.part(
            "float reference",
            Row,
            lambda: judge.float_row(run.call(model), run.float_bytes),
            makes=judge.files("float"),
            says="float model: reference outputs",
        )
    judge.reopen()
    traceable = run.traceable(model)
    for number, exporter in enumerate(run.recipe.export):
        path = run.out / "baseline" / exporter.filename
        judge.floats[exporter.format] = _written(run, number, exporter, traceable, path, f"float file {exporter.format}")
    del traceable
    gc.collect()
    return [row]


def saved(run: Run, subject: Subject, number: int) -> Row | None:
    """Puts the compressed model, as it is after pass ``number``, into the folder, and runs it on the evaluation rows."""
    path = run.out / "model.safetensors"
    last = run.checkpoints.path(number) / path.name
    with run.clock("save"), run.progress.step("save the compressed model"):
        if last.is_file():
            linked(last, path)
        else:
            save(subject.model, subject.surgery.edits, run.source.rebuild, run.source.signature, run.out)
        run.source.save_files(run.out / "source")
    judge = run.judge
    if judge is None:
        return None

    def row() -> Row:
        known = run.each_pass.compressed.get(number) if run.each_pass else None
        made = known or judge.compressed(run.call(subject.model), manifest.size_bytes(path))
        keep_rows(judge, run.out)
        return made

    with evaluating(subject.model):
        makes, reads = [run.out / "kept.safetensors"], [*judge.files("compressed"), path]
        found = run.journal.part("compressed model", Row, row, makes=makes, reads=reads, says="compressed model: outputs")
    judge.reopen()
    return found


def files(run: Run, model: nn.Module, steps: list[StepRecord]) -> tuple[dict[str, Artifact], list[Row]]:
    """Writes the compressed model in every format of the recipe, and judges each file; where that was done after the last pass
    that stands, those are the files and the rows."""
    number = stands(steps)
    if run.each_pass is not None and number:
        return _placed_files(run, run.each_pass.path(number)), with_final_paths(steps, number, run.recipe)[number - 1].rows
    traceable, artifacts, rows = run.traceable(model), {}, []
    promise = functools.cache(lambda: Promise.of(traceable))
    for number, exporter in enumerate(run.recipe.export):
        path = run.out / exporter.filename
        artifact = _written(run, number, exporter, traceable, path, f"write {exporter.format}", run.out / "model.safetensors")
        artifacts[exporter.format] = artifact
        rows += run.journal.part(
            f"judge {exporter.format}",
            list[Row],
            functools.partial(_judged, run, exporter, artifact, promise),
            reads=[path.parent],
            says=f"{exporter.format}: open, run, judge",
        )
    return artifacts, rows


def _placed_files(run: Run, folder: Path) -> dict[str, Artifact]:
    """The files of a pass, put where the files of the run belong."""
    artifacts = {}
    for exporter in run.recipe.export:
        path = run.out / exporter.filename
        place = functools.partial(linked, (folder / exporter.filename).parent, path.parent)
        run.journal.part(f"write {exporter.format}", type(None), place, makes=[path.parent])
        artifacts[exporter.format] = Artifact(exporter.format, path, manifest.size_bytes(path))
    return artifacts


def _judged(run: Run, exporter: Exporter, artifact: Artifact, promise: Callable[[], Promise]) -> list[Row]:
    if run.judge is None:
        return [unjudged(exporter, artifact, promise(), run.out)]
    return run.judge.file(exporter, artifact, promise())


def _written(run: Run, number: int, exporter: Exporter, source: Traceable, path: Path, part: str, *reads: Path) -> Artifact:
    """One file, written or taken over. A format owns the folder that its file lies in."""

    def write() -> dict[str, Any]:
        path.parent.mkdir(parents=True, exist_ok=True)
        with placed(run.recipe, "export", number, exporter.format):
            artifact = exporter.write(source, path)
        return {"size_bytes": artifact.size_bytes, "details": dict(artifact.details)}

    says = f"{exporter.format}: write" if part.startswith("write") else f"{exporter.format}: float file, to compare with"
    told = run.journal.part(part, dict[str, Any], write, makes=[path.parent], reads=reads, says=says)
    return Artifact(exporter.format, path, told["size_bytes"], told["details"])


def _companions(run: Run, told: Report) -> None:
    """What stands beside the files for people: model cards, programs that run them, the page."""
    from compress import cards, page

    cards.write(run.out, told, run.recipe, run.source)
    page.write(run.out)


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


def _judge(recipe: Recipe, source: Source, data: Data, out: Path, journal: Journal, progress: Progress) -> Judge:
    rows = data.evaluation
    assert rows is not None
    return judge_of(recipe, source.task, rows, data.metric, data.metric_name, data.batch_size, out, progress, kept=journal.folder)


def _anatomy(recipe: Recipe, source: Source, model: nn.Module, data: Data) -> Anatomy:
    return find(model, source.signature, data.example, {str(role): paths for role, paths in recipe.model.roles.items()})
