"""The loss of every site for people: a table for the terminal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from compress.inspection import size

if TYPE_CHECKING:
    from rich.table import Table

    from compress.quantization.sensitivity_report import SensitivityReport, SiteLoss

__all__ = ["render"]


def render(found: SensitivityReport, by: str) -> Iterator[str | Table]:
    """Lines and the table, the site that loses most at the setting ``by`` first."""
    first = f" after {', '.join(found.before)}" if found.before else ""
    yield f"{found.name}: {found.model}{first}, {size(found.bytes_before)} in memory"
    yield (
        f"SQNR of the model's outputs in dB when that site alone is rounded, on {found.rows} of {found.calibration} calibration "
        f"rows; worst at {by} first"
    )
    yield _table(found, by)
    for site in found.sites:
        for name, reason in site.refused.items():
            yield f"{site.sites[0]} cannot take {name}: {reason}"
    yield from (f"{path} stays float: {reason}" for path, reason in found.kept.items())


def _table(found: SensitivityReport, by: str) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("site")
    table.add_column("role")
    for name in found.settings:
        table.add_column(f"{name}\ndB", justify="right")
    for name in found.settings:
        table.add_column(f"{name}\nbytes", justify="right")
    for site in found.worst_first(by):
        figures = [*(_db(site, name) for name in found.settings), *(_bytes(site, name) for name in found.settings)]
        table.add_row(*map(Text, (", ".join(site.sites), site.role, *figures)))
    losses = ["-" if (one := found.uniform[name].predicted_db) is None else f"{one:.1f}" for name in found.settings]
    sizes = [size(found.uniform[name].bytes) for name in found.settings]
    table.add_row(*map(Text, ("all, predicted; the whole model", "", *losses, *sizes)))
    return table


def _db(site: SiteLoss, name: str) -> str:
    if name not in site.settings:
        return "-"
    db = site.settings[name].db
    return "no loss" if db is None else f"{db:.1f}"


def _bytes(site: SiteLoss, name: str) -> str:
    return size(site.settings[name].bytes) if name in site.settings else "-"
