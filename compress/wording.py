"""Figures in words: what the table of the terminal, the page and the cards write alike."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from compress.report import Figure, Row

__all__ = ["decibel", "figure", "interval", "ratio", "share", "size"]


def figure(value: float, sign: str = "") -> str:
    """A metric or its drop to four decimals; ``sign`` is ``+`` where a plus sign is to be seen."""
    return f"{value:{sign}.4f}"


def interval(found: Figure | None, sign: str = "", decimals: int = 3) -> str:
    """The 95 % interval of a figure; empty where it has none."""
    if found is None or found.low is None or found.high is None:
        return ""
    return f"[{found.low:{sign}.{decimals}f}, {found.high:{sign}.{decimals}f}]"


def share(found: Figure) -> str:
    """A share of rows in per cent."""
    return f"{found.value:.2%}"


def decibel(row: Row) -> str:
    """The SQNR of a row against float; ``equal`` where nothing differs, ``-`` where nothing was run."""
    if row.validated == "none":
        return "-"
    return "equal" if row.sqnr_db is None else f"{row.sqnr_db:.1f}"


def ratio(value: float | None) -> str:
    """A ratio to float: 0.31x."""
    return "" if value is None else f"{value:.2f}x"


def size(stored: float) -> str:
    """Bytes as MB (10**6), below 0.1 MB as kB, below 1 kB as they are."""
    if stored >= 1e5:
        return f"{stored / 1e6:.2f} MB"
    return f"{stored / 1e3:.1f} kB" if stored >= 1000 else f"{stored:.0f} B"
