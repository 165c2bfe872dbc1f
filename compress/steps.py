"""The passes of a run, one after the other: each is recorded, and with ``measure: each_pass`` judged by the files after it."""

from __future__ import annotations

import functools
import gc
import shutil
import time
from typing import TYPE_CHECKING, Any

from calibrate.inventory import difference, inventory
from calibrate.modes import evaluating
from compress import manifest
from compress.anatomy import Anatomy
from compress.checks import placed
from compress.each_pass import EachPass
from compress.file_latency import FileLatency
from compress.inspection import size
from compress.passes.contract import Context, Latency, Pass
from compress.report import BlockFidelity, Row, StepRecord
from compress.width import nested

if TYPE_CHECKING:
    from compress.checkpoints import Subject
    from compress.run import Run

__all__ = ["passes", "stands"]

_LEAST_TIMED = 20
"""Timed runs of each file while a pass chooses by time, however few the recipe asks for in the end."""


def passes(run: Run) -> tuple[Subject, list[StepRecord]]:
    """Carries out the passes in order, from the last checkpoint that an interrupted run left. With ``measure: each_pass`` the
    files after each one are judged, and with ``undo: unpaid`` a pass that did not pay is taken back."""
    steps: list[StepRecord] = []
    done, ready = _done(run)
    subject = run.checkpoints.restore(ready)
    for number, step in enumerate(run.recipe.passes, 1):
        if number <= done:
            steps.append(_taken_over(run, number, step))
            continue
        before = stands(steps)
        if number != ready:
            run.checkpoints.forget(but=before)
            if run.each_pass is not None:
                run.each_pass.forget(but=before)
        record = run.journal.part(
            _part(number, step),
            StepRecord,
            functools.partial(_carried_out, run, subject, number, step, before),
            makes=[run.checkpoints.path(number), *([run.out / nested.FOLDER] if step.nests else [])],
            says=f"pass {number} of {len(run.recipe.passes)}: {step.name}",
            # As in a recipe without those that were taken back.
            draws_as=_part(1 + sum(not step.undone for step in steps), step),
        )
        steps.append(record if run.each_pass is None else _weighed(run, run.each_pass, subject, record, number, before))
        if steps[-1].undone:
            if step.nests:
                shutil.rmtree(run.out / nested.FOLDER, ignore_errors=True)
            subject = run.checkpoints.restore(before)
        gc.collect()
    run.checkpoints.forget(but=stands(steps))
    return subject, steps


def stands(steps: list[StepRecord]) -> int:
    """Number of the last pass that was not taken back; 0: the model is the float model."""
    return max((number for number, step in enumerate(steps, 1) if not step.undone), default=0)


def _done(run: Run) -> tuple[int, int]:
    """How many passes need not be carried out again, up to the last one after which everything is whole; and the pass whose
    checkpoint is the model to go on from: the last that stands, or one that is only not judged yet."""
    numbered = list(enumerate(run.recipe.passes, 1))
    done = before = 0
    for count in range(len(numbered), 0, -1):
        records = [run.journal.recalled(_last_part(run, number, step), StepRecord) for number, step in numbered[:count]]
        whole = [record for record in records if record is not None]
        before = stands(whole)
        if len(whole) == count and (before == 0 or _whole(run, before)):
            done = count
            break
    else:
        before = 0
    following = run.recipe.passes[done : done + 1]
    return done, next((done + 1 for step in following if run.journal.finished(_part(done + 1, step))), before)


def _whole(run: Run, number: int) -> bool:
    """Whether the checkpoint of a pass, and the files that were judged after it, are those that were recorded."""
    step = run.recipe.passes[number - 1]
    return run.journal.finished(_part(number, step)) and run.journal.finished(_last_part(run, number, step))


def _taken_over(run: Run, number: int, step: Pass) -> StepRecord:
    for part in dict.fromkeys((_part(number, step), _last_part(run, number, step))):
        record = run.journal.taken_over(part, StepRecord)
    return record


def _weighed(run: Run, each_pass: EachPass, subject: Subject, record: StepRecord, number: int, before: int) -> StepRecord:
    """The record of a pass with what its files are worth; the files lie in a folder of their own until the run ends."""
    checkpoint, judge = run.checkpoints.path(number), each_pass.judge

    def weigh() -> StepRecord:
        def compressed() -> Row:
            with evaluating(subject.model):
                return judge.compressed(run.call(subject.model), manifest.size_bytes(checkpoint / "model.safetensors"))

        return each_pass.weighed(record, number, before, run.traceable(subject.model), compressed)

    return run.journal.part(
        _last_part(run, number, run.recipe.passes[number - 1]),
        StepRecord,
        weigh,
        makes=[each_pass.path(number)],
        reads=[checkpoint],
        says=f"pass {number} of {len(run.recipe.passes)}: {record.name}: what it is worth",
    )


def _part(number: int, step: Pass) -> str:
    return f"pass {number} {step.name}"


def _last_part(run: Run, number: int, step: Pass) -> str:
    """The part after which nothing more is to be found out about a pass."""
    return _part(number, step) if run.each_pass is None else f"worth of {_part(number, step)}"


def _carried_out(run: Run, subject: Subject, number: int, step: Pass, before: int) -> StepRecord:
    """Runs one pass and keeps the model as it is then; ``before``: the last pass that stands, 0: the model is the float model."""
    anatomy = run.parts(subject.model) if before else run.anatomy
    scratch = run.journal.folder / f"unfinished-{number}"
    context = Context(
        signature=run.source.signature,
        anatomy=anatomy,
        calibration=run.data.calibration_batches,
        surgery=subject.surgery,
        rows=len(run.data.calibration) * run.data.calibration.group,
        seed=run.recipe.seed,
        progress=run.progress.update,
        latency=_latency(run),
        validation=run.data.judge(run.source, run.recipe.data.metric) if step.validates or step.judges else None,
        fingerprint=run.source.fingerprint,
        scratch=scratch,
    )
    held, started = inventory(subject.model), time.perf_counter()
    with placed(run.recipe, "passes", number - 1, step.name):
        subject.model = step.run(subject.model, context)
    after, seconds = inventory(subject.model), time.perf_counter() - started
    run.checkpoints.keep(subject, number)
    shutil.rmtree(scratch, ignore_errors=True)
    if context.nested is not None:
        nested.keep(run.checkpoints.path(number), context.nested, run.out / nested.FOLDER)
    return _record(step, anatomy, held, after, context.report, seconds, run.fidelity(subject))


def _latency(run: Run) -> Latency | None:
    """Times models as files of the first exporter whose runtime is on this machine, at the first batch size of the recipe."""
    exporter = next((exporter for exporter in run.recipe.export if exporter.timed_here()), None)
    if exporter is None:
        return None
    measure, batches = run.recipe.measure, run.data.calibration.batches(run.recipe.measure.batch_sizes[0])
    return FileLatency(
        exporter,
        run.traceable,
        next(iter(batches)),
        run.journal.folder,
        batch=measure.batch_sizes[0],
        threads=run.recipe.threads,
        repeats=max(measure.repeats, _LEAST_TIMED),
        warmup=measure.warmup,
    )


def _record(
    step: Pass,
    anatomy: Anatomy,
    before: Any,
    after: Any,
    told: dict[str, Any],
    seconds: float,
    blocks: list[BlockFidelity],
) -> StepRecord:
    changed = difference(before, after)
    sites = _sites(anatomy, [*changed.removed, *changed.added, *changed.changed])
    bytes_before, bytes_after = changed.bytes_before, changed.bytes_after
    return StepRecord(
        name=step.name,
        options=step.model_dump(mode="json", by_alias=True),
        seconds=seconds,
        bytes_before=bytes_before,
        bytes_after=bytes_after,
        changed=len(changed),
        sites=sites,
        report=told,
        says=f"{size(bytes_before)} became {size(bytes_after)} in memory; {len(changed)} tensors of {sites} layers changed.",
        blocks=blocks,
    )


def _sites(anatomy: Anatomy, names: list[str]) -> int:
    """How many layers hold any of the tensors."""
    paths = {site.path for site in anatomy.sites}
    pieces = [name.split(".") for name in names]
    return len({path for piece in pieces for end in range(1, len(piece) + 1) if (path := ".".join(piece[:end])) in paths})
