"""The figures that plotly draws: plain data; colours are names of CSS variables, which the page replaces by their values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from compress.page import wording
from compress.page.outcome import marks
from compress.report import BlockFidelity, Figure, Latency, Report, Row

__all__ = ["Plot", "blocks", "by_need", "quality", "trade_off", "untimed"]

SYMBOLS = ("circle", "diamond", "square", "triangle-up", "pentagon", "star")
COLOURS = 6
_TEXT = {"family": "var(--font)", "size": 13, "color": "var(--muted)"}


@dataclass(frozen=True)
class Plot:
    """A figure: its element's name, a heading, the same in words for who cannot see it, and plotly's data and layout."""

    name: str
    heading: str
    says: str
    data: list[dict[str, Any]]
    layout: dict[str, Any]


def trade_off(report: Report) -> list[Plot]:
    """Quality against time, one plot for each batch size: time is the ratio to the float file in the same runtime."""
    quality = _quality(report.rows)
    if quality is None:
        return []
    name, figures = quality
    batches = sorted({latency.batch for row in report.rows for latency in row.latency if latency.ratio is not None})
    points = {batch: _points(report.rows, figures, batch) for batch in batches}
    wide = max((high for found in points.values() for *_, (_, _, high) in found), default=1.0)
    across = {"range": [0, max(1.12, wide * 1.06)], "title": {"text": "time, ratio to float in the same runtime", "standoff": 8}}
    up = {"range": _span([figures[row.label] for row in report.rows if row.label in figures]), "title": {"text": escape(name)}}
    return [_trade_off(report.rows, name, figures, batch, found, across, up) for batch, found in points.items()]


def untimed(report: Report) -> list[tuple[str, str]]:
    """The files that no plot against time can show, each with the reason."""
    found = []
    for row in report.rows:
        if row.validated == "reference" or any(latency.ratio is not None for latency in row.latency):
            continue
        why = {
            "none": f"not run{': ' + row.note if row.note else ''}",
            "interpreter": "run by an interpreter of the saved program, whose time says nothing of the device",
            "proxy": "an equivalent file was run in another runtime, whose time says nothing of this one",
        }.get(row.validated, "timed, but without a float file to compare with" if row.latency else row.note or "not timed")
        found.append((row.label, why))
    return found


def quality(report: Report) -> Plot | None:
    """The metric of every row with its interval, where no time was measured."""
    found = _quality(report.rows)
    if found is None:
        return None
    name, figures = found
    numbers = marks(report.rows)
    rows = [row for row in report.rows if row.label in figures][::-1]
    data = [
        {
            "type": "scatter",
            "mode": "markers",
            "x": [figures[row.label].value],
            "y": [escape(row.label)],
            "error_x": _bar(figures[row.label]),
            "marker": _marker(numbers[row.label]),
            "hoverinfo": "text",
            "hovertext": [f"{escape(row.label)}<br>{escape(name)} {_told(figures[row.label])}"],
        }
        for row in rows
    ]
    layout = _layout({"range": _span(list(figures.values())), "title": {"text": escape(name)}}, {"type": "category"})
    layout["margin"]["l"] = 88
    layout["height"] = 110 + 44 * len(rows)
    says = "; ".join(f"{row.label} {_told(figures[row.label])}" for row in reversed(rows))
    return Plot("quality", name, f"{name} of each file with its 95 % interval: {says}.", data, layout)


def blocks(report: Report) -> Plot | None:
    """SQNR of each block, from the first to the last; one line for each pass that measured it, and one for the end."""
    lines = [(f"after {number}. {step.name}", step.blocks, step.undone) for number, step in enumerate(report.steps, 1)]
    lines = [line for line in lines if line[1]]
    end = report.blocks or next((found for _, found, undone in reversed(lines) if not undone), [])
    if not any(block.sqnr_db is not None or block.gone for block in end):
        return None
    earlier = [line for line in lines if line[1] != end]
    data = [_line(name, found, undone, number, len(earlier)) for number, (name, found, undone) in enumerate(earlier)]
    data.append(_final(end, bool(earlier)))
    shown = [block.sqnr_db for line in [*(line[1] for line in earlier), end] for block in line if block.sqnr_db is not None]
    top = max(shown, default=1.0)
    layout = _layout(
        {"title": {"text": "block", "standoff": 8}, "range": [-0.6, max(block.index for block in end) + 0.6], "dtick": _step(end)},
        {"title": {"text": "SQNR, dB"}, "range": [min(0.0, min(shown, default=0.0) * 1.1), top * 1.18]},
    )
    layout |= {"shapes": _gone(end), "annotations": _worst(end) + _equal(end), "height": 320}
    layout |= {"showlegend": bool(earlier), "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"}}
    return Plot("blocks", "SQNR per block", _blocks_in_words(end), data, layout)


def by_need(found: Sequence[BlockFidelity]) -> list[BlockFidelity]:
    """The blocks, the worst first; then those that are equal, then those that are gone."""
    return sorted(found, key=lambda block: (block.gone, block.sqnr_db is None, block.sqnr_db or 0.0, block.index))


def _quality(rows: Sequence[Row]) -> tuple[str, dict[str, Figure]] | None:
    """The metric of the rows by label; where no row has one, the agreement with float."""
    metrics = {row.label: row.metric for row in rows if row.metric}
    if metrics:
        return next(iter(metrics.values())).name, metrics
    shares = {row.label: row.agreement for row in rows if row.agreement}
    return ("agreement with float", shares) if shares else None


def _points(rows: Sequence[Row], figures: dict[str, Figure], batch: int) -> list[tuple[Row, Latency, tuple[float, float, float]]]:
    """The rows timed at a batch size, from fast to slow, with ratio and interval."""
    found = []
    for row in rows:
        for latency in row.latency:
            if latency.batch == batch and latency.ratio is not None and row.label in figures:
                low = latency.ratio if latency.ratio_low is None else latency.ratio_low
                high = latency.ratio if latency.ratio_high is None else latency.ratio_high
                found.append((row, latency, (latency.ratio, low, high)))
    return sorted(found, key=lambda point: point[2][0])


def _trade_off(
    rows: Sequence[Row],
    name: str,
    figures: dict[str, Figure],
    batch: int,
    points: list[tuple[Row, Latency, tuple[float, float, float]]],
    across: dict[str, Any],
    up: dict[str, Any],
) -> Plot:
    numbers, data, said = marks(rows), [], []
    for rank, (row, latency, (ratio, low, high)) in enumerate(points):
        told = f"{name} {_told(figures[row.label])}, time {wording.ratio(ratio)} {wording.ratio_interval(latency)}".strip()
        said.append(f"{row.label}: {told}")
        data.append(
            {
                "type": "scatter",
                "mode": "markers+text",
                "x": [ratio],
                "y": [figures[row.label].value],
                "error_x": {**_bar(), "array": [high - ratio], "arrayminus": [ratio - low]},
                "error_y": _bar(figures[row.label]),
                "marker": _marker(numbers[row.label]),
                "text": [escape(row.label)],
                "textposition": _beside(rank, len(points)),
                "textfont": {**_TEXT, "color": "var(--ink)"},
                "cliponaxis": False,
                "hoverinfo": "text",
                "hovertext": [_hover(row, latency, name, figures[row.label])],
            }
        )
    layout = _layout(dict(across), dict(up))
    reference = next((figures[row.label] for row in rows if row.validated == "reference" and row.label in figures), None)
    layout["shapes"], layout["annotations"] = _float(reference)
    heading = f"batch {batch}"
    return Plot(f"trade-off-{batch}", heading, f"{heading}: {'; '.join(said)}.", data, layout)


def _beside(rank: int, count: int) -> str:
    """Where a point's name stands: away from its neighbours, clear of its bars."""
    if rank == 0:
        return "top left" if count > 1 else "top right"
    if rank == count - 1:
        return "top right"
    return "bottom right" if rank % 2 else "bottom left"


def _hover(row: Row, latency: Latency, name: str, figure: Figure) -> str:
    lines = [
        f"<b>{escape(row.label)}</b>, batch {latency.batch}",
        f"{escape(name)} {_told(figure)}",
        f"{latency.median_ms:.3g} ms, {wording.ratio(latency.ratio)} {wording.ratio_interval(latency)}",
    ]
    if latency.float_median_ms is not None:
        lines.append(f"float {latency.float_median_ms:.3g} ms")
    return "<br>".join([*lines, escape(latency.runtime)])


def _float(reference: Figure | None) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Where float stands: a line at ratio 1, a line at its metric, and its interval as a band."""
    line = {"type": "line", "layer": "below", "line": {"color": "var(--reference)", "width": 1.5, "dash": "dot"}}
    shapes = [{**line, "x0": 1, "x1": 1, "xref": "x", "y0": 0, "y1": 1, "yref": "paper"}]
    notes = [_note("float", 1, 1, "right", "top", xref="x", yref="paper", xshift=-4)]
    if reference is not None:
        if reference.low is not None and reference.high is not None:
            band = {"type": "rect", "layer": "below", "fillcolor": "var(--band)", "line": {"width": 0}}
            shapes.insert(0, {**band, "x0": 0, "x1": 1, "xref": "paper", "y0": reference.low, "y1": reference.high, "yref": "y"})
        at = {"y0": reference.value, "y1": reference.value, "yref": "y"}
        shapes.append({**line, "x0": 0, "x1": 1, "xref": "paper", **at})
        told = f"float {wording.figure(reference.value)}"
        notes.append(_note(told, 0, reference.value, "left", "bottom", xref="paper", yref="y", xshift=4))
    return shapes, notes


def _note(text: str, x: float, y: float, xanchor: str, yanchor: str, **more: Any) -> dict[str, Any]:
    font = {**_TEXT, "size": 12}
    return {"text": text, "x": x, "y": y, "xanchor": xanchor, "yanchor": yanchor, "showarrow": False, "font": font, **more}


def _told(figure: Figure) -> str:
    return f"{wording.figure(figure.value)} {wording.interval(figure)}".strip()


def _bar(figure: Figure | None = None) -> dict[str, Any]:
    """An error bar, in the tone of intervals."""
    bar: dict[str, Any] = {"type": "data", "symmetric": False, "color": "var(--interval)", "thickness": 1.5, "width": 4}
    low = high = 0.0
    if figure is not None and figure.low is not None and figure.high is not None:
        low, high = figure.value - figure.low, figure.high - figure.value
    return {**bar, "array": [max(0.0, high)], "arrayminus": [max(0.0, low)]}


def _marker(number: int) -> dict[str, Any]:
    colour = "var(--reference)" if number == 0 else f"var(--mark-{(number - 1) % COLOURS + 1})"
    symbol = "line-ns-open" if number == 0 else SYMBOLS[(number - 1) % len(SYMBOLS)]
    return {"color": colour, "symbol": symbol, "size": 12, "line": {"color": "var(--paper)", "width": 1.5}}


def _span(figures: Sequence[Figure]) -> list[float]:
    """A range that holds all intervals, with some air."""
    low = min(figure.value if figure.low is None else figure.low for figure in figures)
    high = max(figure.value if figure.high is None else figure.high for figure in figures)
    air = (high - low) * 0.18 or max(abs(high) * 0.02, 1e-3)
    return [low - air, high + air]


def _layout(across: dict[str, Any], up: dict[str, Any]) -> dict[str, Any]:
    axis = {
        "fixedrange": True,
        "zeroline": False,
        "gridcolor": "var(--grid)",
        "linecolor": "var(--line)",
        "tickfont": {**_TEXT, "size": 12},
        "automargin": True,
    }
    title = {"font": {**_TEXT, "size": 13}}
    return {
        "autosize": True,
        "height": 340,
        "margin": {"l": 64, "r": 12, "t": 12, "b": 52},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": _TEXT,
        "showlegend": False,
        "dragmode": False,
        "hovermode": "closest",
        "hoverlabel": {"bgcolor": "var(--raised)", "bordercolor": "var(--line)", "font": {**_TEXT, "color": "var(--ink)"}},
        "xaxis": {**axis, **across, "title": {**title, **across.get("title", {})}},
        "yaxis": {**axis, **up, "title": {**title, **up.get("title", {})}},
    }


def _line(name: str, found: Sequence[BlockFidelity], undone: bool, number: int, count: int) -> dict[str, Any]:
    """An earlier pass: a thin line; the earlier, the fainter; dashed where the pass was taken back."""
    shown = [block for block in found if block.sqnr_db is not None]
    tone = min(3, 3 - (count - 1 - number)) if count <= 3 else 1 + number * 2 // max(1, count - 1)
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": escape(name) + (" (taken back)" if undone else ""),
        "x": [block.index for block in shown],
        "y": [block.sqnr_db for block in shown],
        "line": {"color": f"var(--tone-{max(1, tone)})", "width": 1.5, "dash": "dot" if undone else "solid"},
        "marker": {"size": 5, "symbol": "circle-open" if undone else "circle"},
        "hoverinfo": "text",
        "hovertext": [f"{_block(block)}<br>{escape(name)}" for block in shown],
    }


def _final(found: Sequence[BlockFidelity], several: bool) -> dict[str, Any]:
    shown = [block for block in found if block.sqnr_db is not None]
    low = min((block.sqnr_db for block in shown if block.sqnr_db is not None), default=-math.inf)
    worst = [block.sqnr_db == low for block in shown]
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": "at the end" if several else "SQNR",
        "x": [block.index for block in shown],
        "y": [block.sqnr_db for block in shown],
        "line": {"color": "var(--mark-1)", "width": 2.5},
        "marker": {
            "size": [13 if bad else 8 for bad in worst],
            "symbol": ["diamond" if bad else "circle" for bad in worst],
            "color": ["var(--missed)" if bad else "var(--mark-1)" for bad in worst],
            "line": {"color": "var(--paper)", "width": 1.5},
        },
        "hoverinfo": "text",
        "hovertext": [_block(block) for block in shown],
    }


def _block(block: BlockFidelity) -> str:
    return f"<b>block {block.index}</b> {escape(block.path)}<br>{block.sqnr_db:.1f} dB over {block.rows} rows"


def _worst(found: Sequence[BlockFidelity]) -> list[dict[str, Any]]:
    known = [block for block in found if block.sqnr_db is not None]
    if len(known) < 2:
        return []
    worst = min(known, key=lambda block: block.sqnr_db or 0.0)
    assert worst.sqnr_db is not None
    text = f"<b>worst: block {worst.index}, {worst.sqnr_db:.1f} dB</b>"
    anchor = "left" if worst.index < max(block.index for block in found) / 2 else "right"
    note = _note(text, worst.index, worst.sqnr_db, anchor, "top", xref="x", yref="y", yshift=-10)
    return [{**note, "font": {**note["font"], "color": "var(--missed)"}}]


def _gone(found: Sequence[BlockFidelity]) -> list[dict[str, Any]]:
    band = {"type": "rect", "layer": "below", "fillcolor": "var(--band)", "line": {"width": 0}, "xref": "x", "yref": "paper"}
    return [{**band, "x0": block.index - 0.4, "x1": block.index + 0.4, "y0": 0, "y1": 1} for block in found if block.gone]


def _equal(found: Sequence[BlockFidelity]) -> list[dict[str, Any]]:
    """Words where a block has no figure: it is gone, or nothing differs in it."""
    turned = {"xref": "x", "yref": "paper", "textangle": -90}
    return [
        _note("gone" if block.gone else "equal", block.index, 0.5 if block.gone else 0.98, "center", "top", **turned)
        for block in found
        if block.sqnr_db is None
    ]


def _step(found: Sequence[BlockFidelity]) -> int:
    return max(1, math.ceil(len(found) / 16))


def _blocks_in_words(found: Sequence[BlockFidelity]) -> str:
    known = sorted((block for block in found if block.sqnr_db is not None), key=lambda block: block.sqnr_db or 0.0)
    parts = []
    if known:
        worst, best = known[0], known[-1]
        parts.append(f"Block {worst.index} ({worst.path}) keeps least: {worst.sqnr_db:.1f} dB.")
        if len(known) > 1:
            parts.append(f"Block {best.index} keeps most: {best.sqnr_db:.1f} dB.")
    equal = [str(block.index) for block in found if block.sqnr_db is None and not block.gone]
    if equal:
        parts.append(f"Nothing differs in block {wording.listed(equal)}.")
    if gone := [str(block.index) for block in found if block.gone]:
        parts.append(f"Taken out: block {wording.listed(gone)}.")
    return " ".join(parts)
