"""Quality against time: one plot for each batch size, or quality alone where nothing was timed."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from compress.page import wording
from compress.page.drawing import MUTED, Plot, bar, decimals, layout, line, marker, note, span
from compress.page.outcome import marks
from compress.report import Figure, Latency, Report, Row

__all__ = ["quality", "trade_off", "untimed"]

_Point = tuple[Row, Latency, float]


def trade_off(report: Report) -> tuple[str, list[Plot]]:
    """The name of the quality, and one plot for each batch size; time is the ratio to the float file in the same runtime."""
    name, figures = _quality(report.rows)
    points: dict[int, list[_Point]] = {}
    for row in report.rows:
        for latency in row.latency:
            if latency.ratio is not None and row.label in figures:
                points.setdefault(latency.batch, []).append((row, latency, latency.ratio))
    if not points:
        return name, []
    across = {
        "range": [0, _end([point for found in points.values() for point in found])],
        "title": {"text": "time, ratio to float in the same runtime", "standoff": 8},
    }
    ends = span(list(figures.values()))
    up = {"range": ends, "tickformat": decimals(ends), "title": {"text": escape(name)}}
    numbers = marks(report.rows)
    reference = next((figures.get(row.label) for row in report.rows if row.validated == "reference"), None)
    plots = []
    for batch, found in sorted(points.items()):
        found.sort(key=lambda point: point[2])
        told = [f"{row.label}: {name} {_told(figures[row.label])}, time {_ratio(latency)}" for row, latency, _ in found]
        frame = layout(across, up)
        frame["shapes"], frame["annotations"] = _float(reference, ends)
        data = [_point(point, rank, found, name, figures, numbers) for rank, point in enumerate(found)]
        plots.append(Plot(f"plot-batch-{batch}", f"batch {batch}", f"batch {batch}: {'; '.join(told)}.", data, frame))
    return name, plots


def untimed(report: Report) -> list[tuple[str, str]]:
    """The files that no plot against time can show, each with the reason."""
    found, (name, figures) = [], _quality(report.rows)
    for row in report.rows:
        timed = any(latency.ratio is not None for latency in row.latency)
        if row.validated == "reference" or (timed and row.label in figures):
            continue
        if timed:
            found.append((row.label, f"timed, but without {name}"))
            continue
        why = {
            "none": f"not run{': ' + row.note if row.note else ''}",
            "interpreter": "run by an interpreter of the saved program, whose time says nothing of the device",
            "proxy": "its exact graph was run in another runtime, whose time says nothing of this one",
        }.get(row.validated, "timed, but without a float file to compare with" if row.latency else row.note or "not timed")
        found.append((row.label, why))
    return found


def quality(report: Report) -> Plot | None:
    """The quality of every row with its interval; None where nothing was run."""
    name, figures = _quality(report.rows)
    if not figures:
        return None
    numbers, rows = marks(report.rows), [row for row in report.rows if row.label in figures]
    data = [
        {
            "type": "scatter",
            "mode": "markers",
            "x": [figures[row.label].value],
            "y": [escape(row.label)],
            "error_x": bar(numbers[row.label], figures[row.label]),
            "marker": marker(numbers[row.label]),
            "hoverinfo": "text",
            "hovertext": [f"<b>{escape(row.label)}</b><br>{escape(name)} {_told(figures[row.label])}"],
        }
        for row in reversed(rows)
    ]
    frame = layout({"range": span(list(figures.values())), "title": {"text": escape(name)}}, {"type": "category"})
    frame["height"] = 90 + 40 * len(rows)
    frame["yaxis"]["tickfont"] = {**MUTED, "size": 13, "color": "var(--ink)"}
    says = "; ".join(f"{row.label} {_told(figures[row.label])}" for row in rows)
    return Plot("plot-quality", name, f"{name} of each file with its 95 % interval: {says}.", data, frame)


def _quality(rows: Sequence[Row]) -> tuple[str, dict[str, Figure]]:
    """The metric of the rows by label; where no row has one, the agreement with float."""
    metrics = {row.label: row.metric for row in rows if row.metric}
    if metrics:
        return next(iter(metrics.values())).name, metrics
    return "agreement with float", {row.label: row.agreement for row in rows if row.agreement}


def _point(
    point: _Point, rank: int, found: list[_Point], name: str, figures: dict[str, Figure], numbers: dict[str, int]
) -> dict[str, Any]:
    row, latency, ratio = point
    number = numbers[row.label]
    low = ratio if latency.ratio_low is None else latency.ratio_low
    high = ratio if latency.ratio_high is None else latency.ratio_high
    return {
        "type": "scatter",
        "mode": "markers+text",
        "x": [ratio],
        "y": [figures[row.label].value],
        "error_x": {**bar(number), "array": [max(0.0, high - ratio)], "arrayminus": [max(0.0, ratio - low)]},
        "error_y": bar(number, figures[row.label]),
        "marker": marker(number),
        "text": [escape(row.label)],
        "textposition": _beside(rank, len(found), ratio),
        "textfont": {**MUTED, "size": 13, "color": "var(--ink)"},
        "hoverinfo": "text",
        "hovertext": [_hover(row, latency, name, figures[row.label])],
    }


def _end(points: Sequence[_Point]) -> float:
    """Where the axis of time ends: all points are in it, and float; a bar that is very long runs out of the frame."""
    reach = max(latency.ratio_high or ratio for _, latency, ratio in points)
    return max(1.12, 1.06 * min(reach, 1.5 * max(ratio for *_, ratio in points)))


def _beside(rank: int, count: int, ratio: float) -> str:
    """Where a point's name stands: away from its neighbours, clear of its bars, not over the axis."""
    if rank == count - 1:
        return "top right"
    if ratio < 0.3:
        return "bottom right"
    return ("top left", "bottom left", "bottom right")[rank % 3]


def _hover(row: Row, latency: Latency, name: str, figure: Figure) -> str:
    lines = [
        f"<b>{escape(row.label)}</b>, batch {latency.batch}",
        f"{escape(name)} {_told(figure)}",
        f"{latency.median_ms:.3g} ms, {_ratio(latency)}",
    ]
    if latency.float_median_ms is not None:
        lines.append(f"float {latency.float_median_ms:.3g} ms")
    return "<br>".join([*lines, escape(latency.runtime)])


def _float(reference: Figure | None, up: Sequence[float]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Where float stands: a line at ratio 1, a line at its metric, and its interval as a band."""
    shapes = [line(1, 1, 0, 1, "x", "paper")]
    notes = [note("float", 1, 1, "right", "top", xref="x", yref="paper", xshift=-4)]
    if reference is None:
        return shapes, notes
    shapes.append(line(0, 1, reference.value, reference.value, "paper", "y"))
    low = high = reference.value
    if reference.low is not None and reference.high is not None:
        low, high = reference.low, reference.high
        ends = {"x0": 0, "x1": 1, "xref": "paper", "y0": reference.low, "y1": reference.high, "yref": "y"}
        shapes.insert(0, {"type": "rect", "layer": "below", "fillcolor": "var(--band)", "line": {"width": 0}, **ends})
    within = "bottom" if high - low > 0.2 * (up[1] - up[0]) else "top"
    notes.append(note(f"float {_told(reference)}", 1, low, "right", within, xref="x", yref="y", xshift=-6))
    return shapes, notes


def _told(figure: Figure) -> str:
    return f"{wording.figure(figure.value)} {wording.interval(figure)}".strip()


def _ratio(latency: Latency) -> str:
    return f"{wording.ratio(latency.ratio)} {wording.ratio_interval(latency)}".strip()
