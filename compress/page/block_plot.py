"""SQNR of each block, from the first to the last, so that the worst one is seen at once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import Any

from compress.page import wording
from compress.page.drawing import MUTED, Plot, layout, note
from compress.report import BlockFidelity, Report

__all__ = ["blocks", "by_need"]


def blocks(report: Report) -> Plot | None:
    """One line for each pass that measured its blocks, and a strong one for the end; None where there is no figure."""
    lines = [(f"after {number}. {step.name}", step.blocks, step.undone) for number, step in enumerate(report.steps, 1)]
    lines = [line for line in lines if line[1]]
    end = report.blocks or next((found for _, found, undone in reversed(lines) if not undone), [])
    if not any(block.sqnr_db is not None or block.gone for block in end):
        return None
    earlier = [line for line in lines if line[1] != end]
    data = [_earlier(*line, number, len(earlier)) for number, line in enumerate(earlier)]
    data.append(_final(end, bool(earlier)))
    shown = [block.sqnr_db for found in (*(line[1] for line in earlier), end) for block in found if block.sqnr_db is not None]
    low, high = min(shown, default=0.0), max(shown, default=1.0)
    last = max(block.index for block in end)
    frame = layout(
        {"title": {"text": "block", "standoff": 8}, "range": [-0.6, last + 0.6], "dtick": max(1, math.ceil(len(end) / 16))},
        {"title": {"text": "SQNR, dB"}, "range": [min(0.0, low * 1.1), high * 1.15]},
    )
    frame |= {"shapes": _gone(end), "annotations": [*_worst(end), *_without(end)], "height": 340 if earlier else 300}
    frame |= {"showlegend": bool(earlier), "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"}}
    return Plot("plot-blocks", "SQNR per block", _words(end), data, frame)


def by_need(found: Sequence[BlockFidelity]) -> list[BlockFidelity]:
    """The blocks, the worst first; then those without a figure, then those that are gone."""
    return sorted(found, key=lambda block: (block.gone, block.sqnr_db is None, block.sqnr_db or 0.0, block.index))


def _earlier(name: str, found: Sequence[BlockFidelity], undone: bool, number: int, count: int) -> dict[str, Any]:
    """A pass before the end: a thin line; the earlier, the fainter; dotted where the pass was taken back."""
    tone = max(1, 3 - (count - 1 - number))
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": escape(name) + (" (taken back)" if undone else ""),
        "x": [block.index for block in found],
        "y": [block.sqnr_db for block in found],
        "line": {"color": f"var(--tone-{tone})", "width": 1.5, "dash": "dot" if undone else "solid"},
        "marker": {"size": 6, "symbol": "circle-open" if undone else "circle"},
        "hoverinfo": "text",
        "hovertext": [f"{_block(block)}<br>{escape(name)}" for block in found],
    }


def _final(found: Sequence[BlockFidelity], several: bool) -> dict[str, Any]:
    known = [block.sqnr_db for block in found if block.sqnr_db is not None]
    worst = [len(known) > 1 and block.sqnr_db == min(known) for block in found]
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": "at the end" if several else "SQNR",
        "x": [block.index for block in found],
        "y": [block.sqnr_db for block in found],
        "line": {"color": "var(--mark-1)", "width": 2.5},
        "marker": {
            "size": [14 if bad else 8 for bad in worst],
            "symbol": ["diamond" if bad else "circle" for bad in worst],
            "color": ["var(--missed)" if bad else "var(--mark-1)" for bad in worst],
            "opacity": 1,
            "line": {"color": "var(--paper)", "width": 1.5},
        },
        "hoverinfo": "text",
        "hovertext": [_block(block) for block in found],
    }


def _block(block: BlockFidelity) -> str:
    if block.sqnr_db is None:  # a gap in the line, which cannot be pointed at
        return ""
    return f"<b>block {block.index}</b> {escape(block.path)}<br>{block.sqnr_db:.1f} dB over {block.rows} rows"


def _worst(found: Sequence[BlockFidelity]) -> list[dict[str, Any]]:
    known = [block for block in found if block.sqnr_db is not None]
    if len(known) < 2:
        return []
    worst = by_need(known)[0]
    assert worst.sqnr_db is not None
    text = f"<b>worst: block {worst.index}, {worst.sqnr_db:.1f} dB</b>"
    anchor = "left" if worst.index < max(block.index for block in found) / 2 else "right"
    under = worst.sqnr_db > 0.2 * max(block.sqnr_db or 0.0 for block in known)
    place: dict[str, Any] = {"yanchor": "top" if under else "bottom", "yshift": -12 if under else 12}
    font = {**MUTED, "size": 13, "color": "var(--missed)"}
    return [note(text, worst.index, worst.sqnr_db, xanchor=anchor, xref="x", yref="y", font=font, **place)]


def _gone(found: Sequence[BlockFidelity]) -> list[dict[str, Any]]:
    band = {"type": "rect", "layer": "below", "fillcolor": "var(--band)", "line": {"width": 0}, "xref": "x", "yref": "paper"}
    return [{**band, "x0": block.index - 0.4, "x1": block.index + 0.4, "y0": 0, "y1": 1} for block in found if block.gone]


def _without(found: Sequence[BlockFidelity]) -> list[dict[str, Any]]:
    """A word where a block has no figure: it is gone, it could not be compared, or nothing differs in it."""
    at = {"xref": "x", "yref": "paper", "textangle": -90}
    words = [(block, "gone" if block.gone else "no figure" if block.note else "equal") for block in found]
    return [note(word, block.index, 0.04, "center", "bottom", **at) for block, word in words if block.sqnr_db is None]


def _words(found: Sequence[BlockFidelity]) -> str:
    known = by_need([block for block in found if block.sqnr_db is not None])
    parts = []
    if known:
        parts.append(f"Block {known[0].index} ({known[0].path}) keeps least: {known[0].sqnr_db:.1f} dB.")
    if len(known) > 1:
        parts.append(f"Block {known[-1].index} keeps most: {known[-1].sqnr_db:.1f} dB.")
    if equal := [str(block.index) for block in found if block.sqnr_db is None and not block.gone and not block.note]:
        parts.append(f"Nothing differs in {_numbered(equal)}.")
    if unknown := [str(block.index) for block in found if block.sqnr_db is None and not block.gone and block.note]:
        parts.append(f"Not compared: {_numbered(unknown)}.")
    if gone := [str(block.index) for block in found if block.gone]:
        parts.append(f"Taken out: {_numbered(gone)}.")
    return " ".join(parts)


def _numbered(numbers: list[str]) -> str:
    return f"block{'s'[: len(numbers) > 1]} {wording.listed(numbers)}"
