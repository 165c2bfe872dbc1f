"""The report of a run: what its parts gave, put together and held against the contract."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from compress import manifest
from compress.each_pass import with_final_paths
from compress.report import Report, Row, StepRecord
from compress.saved import signature_json
from compress.steps import stands
from compress.verdict import verdict, with_float_times
from export.saturation import saturation_warning

if TYPE_CHECKING:
    from compress.checkpoints import Subject
    from compress.run import Run
    from compress.sources import Source
    from export.contract import Artifact

__all__ = ["summary"]


def summary(
    run: Run,
    rows: list[Row],
    compressed: Row | None,
    steps: list[StepRecord],
    subject: Subject,
    artifacts: Mapping[str, Artifact],
) -> Report:
    """The report of a run that is finished but for the report itself."""
    rows = with_float_times(rows)
    limits = verdict(rows, run.recipe.accept) if run.judge else []
    met = all(limit.met for limit in limits)
    number = stands(steps)
    saturated = saturation_warning(subject.model, [row.runtime for row in rows if row.validated == "runtime"])
    unmeasured = ["measure: each_pass measured nothing, because evaluation was switched off"]
    return Report(
        name=run.recipe.name,
        met=met,
        exit_code=0 if met else 1,
        limits=limits,
        rows=rows,
        compressed=compressed,
        steps=with_final_paths(steps, number, run.recipe),
        blocks=steps[number - 1].blocks if number else run.fidelity(subject),
        roles=run.roles.after(subject.model, subject.surgery.edits),
        warnings=[
            *run.data.warnings,
            *run.journal.warnings,
            *(f"{step.name}: {says}" for step in steps if not step.undone for says in step.report.get("warnings", ())),
            *([saturated] if saturated else ()),
            *(unmeasured if run.recipe.measure.when == "each_pass" and run.each_pass is None else ()),
        ],
        resumed=run.journal.resumed,
        model=_about(run.source, run.float_bytes),
        data=run.described,
        machine=manifest.machine(run.recipe.threads),
        seconds={**run.clock.seconds, **run.journal.seconds},
        peak_memory_bytes=_peak(run, artifacts),
        folder=str(run.out),
    )


def _peak(run: Run, artifacts: Mapping[str, Artifact]) -> int:
    """The most memory at one time, in bytes, together with processes that were started to write a file."""
    written = [*artifacts.values(), *(run.judge.floats.values() if run.judge else ())]
    together = [int(artifact.details.get("peak_memory_bytes", 0)) for artifact in written]
    return max(run.journal.peak_memory_bytes, *together, 0)


def _about(source: Source, float_bytes: int) -> dict[str, Any]:
    return {
        "name": source.name,
        "task": source.task,
        "fingerprint": source.fingerprint,
        "float_bytes": float_bytes,
        "signature": signature_json(source.signature),
        "notes": list(source.notes),
    }
