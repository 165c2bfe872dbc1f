"""What a terminal shows: tables of which no figure is cut, the lines below a report's table, and the list of passes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from compress.passes.contract import Pass
    from compress.report import Report

__all__ = ["console", "lines", "print_table", "show_passes"]


def console(*, stderr: bool = False) -> Console:
    """Of the standard output, or of the error output; as wide as it takes where that is no terminal."""
    from rich.console import Console

    made = Console(stderr=stderr, highlight=False)
    # A table cut to 80 columns in a log or a pipe loses figures.
    return made if made.is_terminal else Console(stderr=stderr, highlight=False, width=400)


def print_table(on: Console, table: Table) -> None:
    """The table, or on a terminal that is too narrow for it the same figures one below the other: none is cut."""
    from rich.measure import Measurement
    from rich.text import Text

    wide = Measurement.get(on, on.options.update(max_width=1000), table).maximum
    if wide <= on.width:
        on.print(table)
        return
    names, *figures = table.columns
    headings = [str(column.header).replace("\n", " ") for column in figures]
    heading = max(map(len, headings))
    for number, name in enumerate(names.cells):
        on.print(Text(str(name), style="bold"))
        for title, column in zip(headings, figures, strict=True):
            if cell := str(list(column.cells)[number]).replace("\n", " "):
                on.print(Text(f"  {title:{heading}}  {cell}"), soft_wrap=True)


def lines(report: Report) -> Iterator[str]:
    """What was run on what, what passes left out, what was missed, and the verdict."""
    machine = report.machine  # a report of another program may lack what ours tell
    times = f"times on {machine.get('processor', 'a machine that is not told')}, threads: {machine.get('threads', '-')}"
    if told := report.data.get("validated_on"):
        yield f"validated on {told}; {times}"
    elif rows := report.data.get("evaluation"):
        yield f"{rows.get('rows', '-')} rows of {rows.get('path', '-')} ({rows.get('chosen', '-')}); {times}"
    for number, step in enumerate(report.steps, 1):
        if step.worth:
            yield f"pass {number}, {step.name}: {step.says}"
        for said in (*step.report.get("ties", []), *(f"{p}: {why}" for p, why in step.report.get("skipped", {}).items())):
            yield f"{step.name}: {said}"
    for warning in report.warnings:
        yield f"warning: {warning}"
    for limit in report.limits:
        if not limit.met:
            yield f"missed: {limit.line}: {limit.says}"
    yield f"{'met' if report.met else 'not met'}: the contract of the recipe" if report.limits else "no contract was checked"


def show_passes(on: Console, found: Mapping[str, type[Pass]]) -> None:
    """Each pass with its summary, its source and a table of its options."""
    from rich.table import Table
    from rich.text import Text

    from compress.shipped import options, summary

    for name, entry in found.items():
        on.print(Text(name, style="bold"))
        on.print(Text(summary(entry)), soft_wrap=False)
        on.print(Text(f"Source: {entry.source}", style="dim"))
        table = Table("option", "values", "default", "", box=None, pad_edge=False)
        for row in options(entry):
            table.add_row(*(Text(cell) for cell in row))
        on.print(table, "")
