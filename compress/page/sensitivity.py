"""The losses of single places as a page: a plot of every setting along the model, and the table."""

from __future__ import annotations

import os
from contextlib import suppress
from html import escape
from pathlib import Path
from typing import Any

from calibrate.errors import UserError
from compress.page.drawing import Plot, layout, marker
from compress.page.rendering import TEMPLATES, environment, plotly_program, policy
from compress.sensitivity_view import Row, View, loss

__all__ = ["plot", "render_sensitivity", "write_sensitivity"]


def write_sensitivity(found: View, by: str, path: Path) -> Path:
    """Writes the page (temporary name, then renamed).

    Raises:
        UserError: the file cannot be written.
    """
    unfinished = path.with_name(f".{path.name}.part")
    try:
        unfinished.write_text(render_sensitivity(found, by), "utf-8", newline="\n")
        os.replace(unfinished, path)
    except OSError as error:
        with suppress(OSError):
            unfinished.unlink()
        raise UserError(str(path), f"cannot be written: {error.strerror}", "Name a file in a folder that is there.") from None
    return path


def render_sensitivity(found: View, by: str) -> str:
    """The page as text: one file that asks for nothing from elsewhere."""
    from markupsafe import Markup

    drawn = plot(found)
    scripts = [plotly_program(), (TEMPLATES / "page.js").read_text("utf-8")]
    template = environment().get_template("sensitivity.html")
    return template.render(
        found=found,
        by=by,
        rows=found.worst_first(by),
        loss=loss,
        plot=drawn,
        drawn={drawn.name: {"data": drawn.data, "layout": drawn.layout}},
        style=Markup((TEMPLATES / "style.css").read_text("utf-8")),
        scripts=[Markup(script) for script in scripts],
        policy=policy(scripts),
    )


def plot(found: View) -> Plot:
    """One series for each setting, places from the first to the last."""
    data = [_series(found, name, number) for number, name in enumerate(found.settings, 1)]
    frame = layout(
        {
            "title": {"text": f"{found.place}, in the model's order", "standoff": 8},
            "range": [-0.6, len(found.rows) - 0.4],
        },
        {"title": {"text": "SQNR of the outputs, dB"}},
    )
    frame |= {"showlegend": True, "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"}, "height": 420}
    worst = found.worst_first(found.settings[0])[0]
    says = f"At {found.settings[0]} {worst.place} loses most: {_decibels(worst, found.settings[0])}."
    return Plot("plot-sensitivity", f"Each {found.place} alone", says, data, frame)


def _series(found: View, name: str, number: int) -> dict[str, Any]:
    return {
        "type": "scatter",
        "mode": "markers",
        "name": escape(name),
        "x": list(range(len(found.rows))),
        "y": [row.cells[name].db if name in row.cells else None for row in found.rows],
        "marker": {**marker(number), "size": 9},
        "hoverinfo": "text",
        "hovertext": [f"<b>{escape(row.place)}</b><br>{escape(name)}: {_decibels(row, name)}" for row in found.rows],
    }


def _decibels(row: Row, name: str) -> str:
    if name not in row.cells:
        return "not possible"
    told = loss(row, name)
    return told if told == "no loss" else f"{told} dB"
