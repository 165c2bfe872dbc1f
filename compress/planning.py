"""What a recipe will do and cost, told in seconds and without reading evaluation data: ``compress plan``."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from compress.anatomy import find
from compress.checks import check_exporters, placed
from compress.costs import Disk, Memory, disk, memory
from compress.datasets import Data, load_data
from compress.facts import gathered
from compress.preparation import model_of, require_runtimes
from compress.progress import Progress
from compress.rehearsal import Rehearsal, Rehearsed, rehearse
from compress.report import RoleBytes
from compress.role_bytes import Roles, bytes_by_role
from export.contract import Exporter, Forecast
from export.graph import Traceable

if TYPE_CHECKING:
    from calibrate.data import Rows
    from compress.recipe import Recipe
    from compress.sources import Source

__all__ = ["FloatPart", "Plan", "PlannedFile", "PlannedPass", "SiteGroup", "make"]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class SiteGroup(_Record):
    """Places of one kind: their paths differ in numbers only, and the same happens to each."""

    pattern: str = Field(description="the path, numbers that differ as *")
    paths: list[str]
    role: str
    action: str = Field(description="what is done there, or why it is left as it is")


class PlannedPass(_Record):
    """One pass of the recipe, rehearsed on what the passes before it leave."""

    name: str
    place: str = Field(description="file:line:column in the recipe")
    options: dict[str, Any]
    sites: list[SiteGroup] = Field(description="what the pass will touch")
    skipped: list[SiteGroup] = Field(description="what it leaves as it is though it was named, and why")
    calibration_rows: int = Field(description="calibration rows that it reads; 0: none")
    validation_rows: int = Field(0, description="validation rows that it chooses by; 0: none")
    bytes_before: int = Field(description="parameters and buffers in memory, tied ones once")
    bytes_after: int = Field(
        description="the same after the pass; factors of input channels, which calibration decides on, are not in it"
    )


class FloatPart(_Record):
    """What stays in floating point, of one role."""

    role: str
    bytes: int


class PlannedFile(_Record):
    """One file as its exporter forecasts it."""

    format: str
    path: str
    size_bytes: int
    uncertain_bytes: int = Field(0, description="how far off the size may be, where it is an estimate; 0: counted")
    float_size_bytes: int | None = Field(description="of the float file it will be compared with; null without evaluation")
    run_in_float: list[SiteGroup] = Field(description="quantized layers that the runtime computes in floating point all the same")


class Plan(_Record):
    """Everything that can be told of a run before it. Fields are only ever added to within one version."""

    version: Literal[1] = 1
    name: str
    model: str
    task: str
    notes: list[str] = Field(description="what a report would say of the model")
    calibration: dict[str, Any]
    validation: dict[str, Any] | None = Field(None, description="rows that passes choose by")
    evaluation: str | None = Field(description="evaluation data as the recipe names it; it was not read. null: nothing is judged")
    passes: list[PlannedPass]
    roles: list[RoleBytes]
    stays_float: list[FloatPart] = Field(description="floating-point parameters that no pass touches, by role, the largest first")
    bytes_before: int
    bytes_after: int
    files: list[PlannedFile]
    memory: Memory
    disk: Disk
    warnings: list[str]


def make(recipe: Recipe, *, trust: bool = False, evaluate: bool = True, progress: Progress | None = None) -> Plan:
    """The plan of a recipe. Nothing is written, and no evaluation row is read.

    Every pass is rehearsed on what those before it leave, every exporter is asked for its file, and one calibration batch runs
    through the float model.

    Args:
        trust: whether Python files that the recipe names may be run.
        evaluate: False plans a run that judges nothing.
        progress: where to tell how far the plan is.

    Raises:
        UserError: what would stop the run, with its place; ``MissingRuntime`` where a library is absent.
    """
    progress = progress or Progress()
    require_runtimes(recipe)
    torch.manual_seed(recipe.seed)
    torch.set_num_threads(recipe.threads)
    with progress.step("load model and calibration data"):
        source = model_of(recipe, trust)
        data = load_data(recipe, source, evaluation=False)
    with progress.step("find the parts of the model"):
        anatomy = find(source.model, source.signature, data.example, {str(k): v for k, v in recipe.model.roles.items()})
        roles = Roles.of(source.model, anatomy)
    with progress.step("rehearse the passes"):
        rehearsal = rehearse(recipe, source, anatomy, data.example)
        check_exporters(recipe, _traceable(source, data, source.model))
    judges = evaluate and recipe.data.evaluation is not None
    files = _files(recipe, source, data, rehearsal, judges, progress)
    by_role = roles.after(rehearsal.model, rehearsal.edits)
    with progress.step("one calibration batch"):
        facts = gathered(recipe, source, data, anatomy, rehearsal, files)
    split = recipe.data.evaluation
    return Plan(
        name=recipe.name,
        model=source.name,
        task=source.task,
        notes=list(source.notes),
        calibration=_chosen(data.calibration),
        validation=None if data.validation is None else _chosen(data.validation),
        evaluation=None if not judges or split is None else str(split.path or f"{recipe.data.format} data"),
        passes=[_pass(recipe, number, step, data) for number, step in enumerate(rehearsal.steps)],
        roles=by_role,
        stays_float=_stays_float(rehearsal, roles),
        bytes_before=sum(entry.before for entry in by_role),
        bytes_after=sum(entry.after for entry in by_role),
        files=[_file(*told) for told in files],
        memory=memory(facts),
        disk=disk(facts),
        warnings=[
            *_assumed(recipe),
            *_computed_float(recipe),
            *_absent(recipe, judges),
            *_wasted(recipe, rehearsal),
            *_untold(recipe, files),
        ],
    )


def _chosen(rows: Rows) -> dict[str, Any]:
    return {"path": rows.table.name, "rows": len(rows), "chosen": rows.chosen}


def _traceable(source: Source, data: Data, model: nn.Module) -> Traceable:
    return Traceable(model, source.signature, data.example, source.name)


def _files(
    recipe: Recipe, source: Source, data: Data, rehearsal: Rehearsal, judges: bool, progress: Progress
) -> list[tuple[Exporter, Forecast, Forecast | None]]:
    """Each exporter with the forecast of its file and of the float file, where there will be one."""
    compressed, floats = _traceable(source, data, rehearsal.model), _traceable(source, data, source.model)
    found = []
    for number, exporter in enumerate(recipe.export):
        with progress.step(f"{exporter.format}: size of the file"), placed(recipe, "export", number, exporter.format):
            told = exporter.forecast(compressed)
            baseline = exporter.forecast(floats) if judges else None
        if told is not None:
            found.append((exporter, told, baseline))
    return found


def _pass(recipe: Recipe, number: int, done: Rehearsed, data: Data) -> PlannedPass:
    step = done.step
    roles = {site.path: ", ".join(site.roles) for site in done.anatomy.sites}
    return PlannedPass(
        name=step.name,
        place=recipe.place("passes", number, step.name),
        options=step.model_dump(mode="json"),
        sites=_grouped([(target.path, target.role, target.action) for target in done.targets]),
        skipped=_grouped([(path, roles.get(path, ""), reason) for path, reason in done.skips.items()]),
        calibration_rows=len(data.calibration) if step.calibrates else 0,
        validation_rows=len(data.validation) if (step.validates or step.judges) and data.validation is not None else 0,
        bytes_before=done.bytes_before,
        bytes_after=done.bytes_after,
    )


def _grouped(places: Sequence[tuple[str, str, str]]) -> list[SiteGroup]:
    """(path, role, what) by what they have in common, in the order of the first of each."""
    groups: dict[tuple[str, str, str], list[str]] = {}
    for path, role, what in places:
        groups.setdefault((re.sub(r"(?<![^.])\d+(?![^.])", "*", path), role, what), []).append(path)
    return [
        SiteGroup(pattern=pattern if len(paths) > 1 else paths[0], paths=paths, role=role, action=what)
        for (pattern, role, what), paths in groups.items()
    ]


def _file(exporter: Exporter, told: Forecast, baseline: Forecast | None) -> PlannedFile:
    return PlannedFile(
        format=exporter.format,
        path=exporter.filename,
        size_bytes=told.size_bytes,
        uncertain_bytes=told.uncertain_bytes,
        float_size_bytes=None if baseline is None else baseline.size_bytes,
        run_in_float=_grouped([(path, "", reason) for path, reason in told.float_sites.items()]),
    )


def _stays_float(rehearsal: Rehearsal, roles: Roles) -> list[FloatPart]:
    """Bytes by role of what holds no integer codes."""
    places = {roles.whereabouts.after(path, rehearsal.edits): role for path, role in roles.holders.items()}
    modules = dict(rehearsal.model.named_modules(remove_duplicate=False))
    coded = {path: "" for path, module in modules.items() if hasattr(module, "quantized_weight")}
    holders = coded | {place: role for place, role in places.items() if place is not None and place not in coded}
    found = bytes_by_role(rehearsal.model, holders)
    ordered = sorted(found.items(), key=lambda entry: -entry[1])
    return [FloatPart(role=role, bytes=size) for role, size in ordered if role and size]


def _assumed(recipe: Recipe) -> list[str]:
    """A sentence for each pass whose result only a run can tell."""
    numbered = [(number, step) for number, step in enumerate(recipe.passes) if step.assumes]
    return [f"{recipe.place('passes', number, step.name)}: {step.name}: {step.assumes}" for number, step in numbered]


def _computed_float(recipe: Recipe) -> list[str]:
    """A sentence for each file and pass whose method is more than the file can hold."""
    numbered = [(number, step) for number, step in enumerate(recipe.passes) if step.computed_float]
    return [
        f"{recipe.place('passes', number, step.name)}: {step.name}: {exporter.format}: {step.computed_float}"
        for number, step in numbered
        for exporter in recipe.export
    ]


def _absent(recipe: Recipe, judges: bool) -> list[str]:
    """A sentence where the evaluation data is not there; it is not opened."""
    split = recipe.data.evaluation
    if not judges or split is None or split.path is None or os.path.exists(recipe.path(Path(split.path))):
        return []
    return [f"{recipe.place('data', 'evaluation', 'path')}: there is no {split.path}: the run would stop there"]


def _untold(recipe: Recipe, files: Sequence[tuple[Exporter, Forecast, Forecast | None]]) -> list[str]:
    """A sentence for each exporter that makes no forecast."""
    told = [exporter for exporter, _, _ in files]
    return [f"{exporter.format} cannot tell its file before it is written" for exporter in recipe.export if exporter not in told]


def _wasted(recipe: Recipe, rehearsal: Rehearsal) -> list[str]:
    """A sentence for each pass that works on layers which a later pass takes out."""
    said = []
    for number, later, count in rehearsal.wasted:
        first, second = recipe.passes[number], recipe.passes[later]
        cost = " and calibrated" if first.calibrates else ""
        said.append(
            f"{recipe.place('passes', later, second.name)}: {second.name} takes out {count} layers that {first.name} before it "
            f"has changed{cost}: the other way round saves that work"
        )
    return said
