"""Losses of single places at several settings, as people read them: what a table in the terminal and the page show."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["Cell", "Row", "View", "loss", "render"]


@dataclass(frozen=True)
class Cell:
    """What one place loses at one setting, and what it then costs.

    Attributes:
        db: SQNR of the model's outputs; None: nothing is lost, or (in the last row) nothing is known.
        cost: in the words of the view's ``cost``.
    """

    db: float | None
    cost: str


@dataclass(frozen=True)
class Row:
    """One place of the model; ``cells``: by setting, those that it cannot take are absent."""

    place: str
    role: str
    cells: Mapping[str, Cell]


@dataclass(frozen=True)
class View:
    """Everything that is shown.

    Attributes:
        name, model: of the recipe and its model.
        before: passes that were carried out first.
        facts: where the losses were measured.
        title, lede: what the figures are; a heading, and a sentence.
        place: what the places are called.
        settings: in the order in which they are shown.
        cost: what the cells' cost is.
        rows: in the model's order.
        total: everything at one setting, if that can be told.
        notes: sentences on what could not be measured.
    """

    name: str
    model: str
    before: Sequence[str]
    facts: str
    title: str
    lede: str
    place: str
    settings: Sequence[str]
    cost: str
    rows: Sequence[Row]
    total: Row | None
    notes: Sequence[str]

    @property
    def roles(self) -> bool:
        """Whether any place has a role."""
        return any(row.role for row in self.rows)

    def worst_first(self, setting: str) -> list[Row]:
        """The places by what they lose at a setting; those that cannot take it come last."""

        def order(row: Row) -> tuple[bool, float]:
            db = row.cells[setting].db if setting in row.cells else None
            return setting not in row.cells, float("inf") if db is None else db

        return sorted(self.rows, key=order)


def loss(row: Row, setting: str, digits: str = ".1f") -> str:
    """In dB, for people."""
    if setting not in row.cells:
        return "-"
    db = row.cells[setting].db
    return "no loss" if db is None else f"{db:{digits}}"


def render(view: View, by: str, size: str) -> Iterator[str | Table]:
    """Lines and the table, the place that loses most at the setting ``by`` first; ``size``: of the model, for people."""
    first = f" after {', '.join(view.before)}" if view.before else ""
    yield f"{view.name}: {view.model}{first}, {size} in memory"
    yield f"{view.title}, on {view.facts}; worst at {by} first"
    yield _table(view, by)
    yield from view.notes


def _table(view: View, by: str) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column(view.place)
    if view.roles:
        table.add_column("role")
    for name in view.settings:
        table.add_column(f"{name}\ndB", justify="right")
    for name in view.settings:
        table.add_column(f"{name}\n{view.cost}", justify="right")
    for row in view.worst_first(by):
        costs = [row.cells[name].cost if name in row.cells else "-" for name in view.settings]
        role = [row.role] if view.roles else []
        table.add_row(*map(Text, (row.place, *role, *(loss(row, name) for name in view.settings), *costs)))
    if view.total is not None:
        cells = [view.total.cells[name] for name in view.settings]
        known = ["-" if cell.db is None else f"{cell.db:.1f}" for cell in cells]
        table.add_row(*map(Text, (view.total.place, *([""] if view.roles else []), *known, *(cell.cost for cell in cells))))
    return table
