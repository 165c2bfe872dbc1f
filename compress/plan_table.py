"""A plan for people: tables and lines for the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from compress.inspection import size

if TYPE_CHECKING:
    from rich.table import Table

    from compress.planning import Plan, PlannedPass, SiteGroup

__all__ = ["render"]

_SMALL_SHARE = 0.02
"""Terms of a sum below this share are told together."""


def render(plan: Plan) -> Iterator[str | Table]:
    """Lines (rich markup is not used) and tables, in the order in which they are printed."""
    yield f"{plan.name}: {plan.model}, {plan.task}, {size(plan.bytes_before)} in memory"
    yield from plan.notes
    rows = plan.calibration
    yield f"calibration: {rows['rows']} rows of {rows['path']} ({rows['chosen']})"
    if plan.validation:
        rows = plan.validation
        yield f"validation: {rows['rows']} rows of {rows['path']} ({rows['chosen']}), by which passes choose"
    yield f"evaluation: {plan.evaluation} (not read)" if plan.evaluation else "evaluation: none, nothing will be judged"
    for number, step in enumerate(plan.passes):
        yield ""
        yield from _pass(number, len(plan.passes), step)
    yield ""
    yield _roles(plan)
    yield ""
    yield _files(plan)
    for file in plan.files:
        for reason in dict.fromkeys(group.action for group in file.run_in_float):
            places = [_name(group) for group in file.run_in_float if group.action == reason]
            yield f"{file.format} computes in float: {', '.join(places)}: {reason}"
    if plan.stays_float:
        yield "stays float: " + ", ".join(f"{part.role} {size(part.bytes)}" for part in plan.stays_float)
    yield ""
    yield f"peak memory: about {size(plan.memory.peak_bytes)}, in: {plan.memory.part}"
    at_peak = next(moment for moment in plan.memory.parts if moment.part == plan.memory.part)
    yield from _terms([(term.name, term.bytes) for term in at_peak.terms])
    while_running = f", and {size(plan.disk.running_bytes)} while it runs" if plan.disk.running_bytes else ""
    yield f"disk: about {size(plan.disk.bytes)} in the run folder{while_running}"
    yield from _terms([(term.name, term.bytes) for term in (*plan.disk.terms, *plan.disk.running)])
    yield from (f"  not counted: {unknown}" for unknown in plan.disk.unknown)
    yield from (f"note: {warning}" for warning in plan.warnings)


def _pass(number: int, total: int, step: PlannedPass) -> Iterator[str | Table]:
    from rich.table import Table

    reads = f", reads {step.calibration_rows} calibration rows" if step.calibration_rows else ""
    reads += f", chooses by {step.validation_rows} validation rows" if step.validation_rows else ""
    change = f"{size(step.bytes_before)} to {size(step.bytes_after)}"
    yield f"pass {number + 1} of {total}: {step.name} ({step.place}): {change}{reads}"
    table = Table("where", "role", "what", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for group in step.sites:
        table.add_row(_name(group), group.role, group.action)
    for group in step.skipped:
        table.add_row(_name(group), group.role, f"left as it is: {group.action}")
    yield table


def _name(group: SiteGroup) -> str:
    return group.pattern if len(group.paths) == 1 else f"{group.pattern} ({len(group.paths)})"


def _roles(plan: Plan) -> Table:
    from rich.table import Table

    table = Table("bytes by role", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for heading in ("before", "after", "ratio"):
        table.add_column(heading, justify="right")
    for entry in plan.roles:
        table.add_row(entry.role, size(entry.before), size(entry.after), _ratio(entry.after, entry.before))
    table.add_row("all", size(plan.bytes_before), size(plan.bytes_after), _ratio(plan.bytes_after, plan.bytes_before))
    return table


def _files(plan: Plan) -> Table:
    from rich.table import Table

    table = Table("files", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for heading in ("size, about", "float file", "ratio"):
        table.add_column(heading, justify="right")
    for file in plan.files:
        base = file.float_size_bytes
        about = size(file.size_bytes) + (f" +- {size(file.uncertain_bytes)}" if file.uncertain_bytes else "")
        table.add_row(file.path, about, size(base) if base else "-", _ratio(file.size_bytes, base or 0))
    return table


def _ratio(after: int, before: int) -> str:
    return f"{after / before:.2f}x" if before else "-"


def _terms(terms: Sequence[tuple[str, int]]) -> Iterator[str]:
    whole = sum(count for _, count in terms)
    small = [count for _, count in terms if count < _SMALL_SHARE * whole]
    for name, count in terms:
        if count >= _SMALL_SHARE * whole:
            yield f"  {size(count):>8}  {name}"
    if sum(small):
        yield f"  {size(sum(small)):>8}  everything else"
