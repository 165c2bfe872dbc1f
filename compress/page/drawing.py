"""What the plots share: plain data for plotly; colours are names of CSS variables, which the page replaces by their values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from compress.report import Figure

__all__ = ["MUTED", "Plot", "bar", "decimals", "layout", "line", "marker", "note", "span"]

SYMBOLS = ("circle", "diamond", "square", "triangle-up", "pentagon", "star")
"""One for each colour, in the order of ``--mark-1`` to ``--mark-6``: nothing is told by colour alone."""

MUTED = {"family": "var(--font)", "size": 12, "color": "var(--muted)"}


@dataclass(frozen=True)
class Plot:
    """A figure: its element's name, a heading, the same in words for who cannot see it, and plotly's data and layout."""

    name: str
    heading: str
    says: str
    data: list[dict[str, Any]]
    layout: dict[str, Any]


def layout(across: dict[str, Any], up: dict[str, Any]) -> dict[str, Any]:
    """A quiet frame around two axes; nothing in it can be dragged, so that a finger scrolls the page."""
    axis = {
        "fixedrange": True,
        "zeroline": False,
        "gridcolor": "var(--grid)",
        "linecolor": "var(--line)",
        "tickfont": MUTED,
        "automargin": True,
    }
    title = {"font": {**MUTED, "size": 13}}
    return {
        "autosize": True,
        "height": 340,
        "margin": {"l": 64, "r": 12, "t": 12, "b": 52},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": MUTED,
        "showlegend": False,
        "dragmode": False,
        "hovermode": "closest",
        "hoverlabel": {"bgcolor": "var(--raised)", "bordercolor": "var(--line)", "font": {**MUTED, "color": "var(--ink)"}},
        "xaxis": {**axis, **across, "title": {**title, **across.get("title", {})}},
        "yaxis": {**axis, **up, "title": {**title, **up.get("title", {})}},
    }


def note(text: str, x: float, y: float, xanchor: str, yanchor: str, **more: Any) -> dict[str, Any]:
    """Words in the plot, without an arrow."""
    return {"text": text, "x": x, "y": y, "xanchor": xanchor, "yanchor": yanchor, "showarrow": False, "font": MUTED, **more}


def line(x0: float, x1: float, y0: float, y1: float, xref: str, yref: str) -> dict[str, Any]:
    """A dotted line of reference, below the data."""
    drawn = {"color": "var(--reference)", "width": 1.5, "dash": "dot"}
    ends = {"x0": x0, "x1": x1, "y0": y0, "y1": y1, "xref": xref, "yref": yref}
    return {"type": "line", "layer": "below", "line": drawn, **ends}


def bar(number: int, figure: Figure | None = None) -> dict[str, Any]:
    """An error bar from the low to the high end of a figure's interval, thin, in the colour of its file."""
    drawn: dict[str, Any] = {"type": "data", "symmetric": False, "color": _colour(number), "thickness": 1.25, "width": 4}
    low = high = 0.0
    if figure is not None and figure.low is not None and figure.high is not None:
        low, high = figure.value - figure.low, figure.high - figure.value
    return {**drawn, "array": [max(0.0, high)], "arrayminus": [max(0.0, low)]}


def marker(number: int) -> dict[str, Any]:
    """The symbol of a file, as in the table; 0 is the float model."""
    symbol = SYMBOLS[(number - 1) % len(SYMBOLS)] if number else "circle-open"
    edge = {"color": "var(--paper)", "width": 1.5} if number else {"color": "var(--reference)", "width": 2}
    return {"color": _colour(number), "symbol": symbol, "size": 12, "line": edge}


def decimals(ends: Sequence[float]) -> str:
    """The format of an axis whose marks all have as many decimals as its range asks for."""
    return f".{max(0, math.ceil(-math.log10((ends[1] - ends[0]) / 5)))}f"


def _colour(number: int) -> str:
    return f"var(--mark-{(number - 1) % len(SYMBOLS) + 1})" if number else "var(--reference)"


def span(figures: Sequence[Figure]) -> list[float]:
    """A range that holds all intervals, with some air."""
    low = min(figure.value if figure.low is None else figure.low for figure in figures)
    high = max(figure.value if figure.high is None else figure.high for figure in figures)
    air = (high - low) * 0.18 or max(abs(high) * 0.02, 1e-3)
    return [low - air, high + air]
