"""Figures of the report in words, one way for all cards."""

from __future__ import annotations

import re
from typing import Any

from compress.report import Figure, Latency, Row
from compress.wording import interval

__all__ = [
    "NOT_MEASURED",
    "bytes_of",
    "decibels",
    "drop",
    "listed",
    "metric",
    "option",
    "share",
    "size",
    "time_of",
    "without_paths",
]

NOT_MEASURED = "not measured"
_PATH = re.compile(r"(?<![\w./:~*\\-])(?:/(?!/)[^\s/'\"`|<>()]+)+/([^\s/'\"`|<>()]+)")
_MOST = 12


def metric(figure: Figure | None) -> str:
    """``0.8739 [0.8502, 0.8943]``."""
    return NOT_MEASURED if figure is None else f"{figure.value:.4f}" + _interval(figure)


def drop(figure: Figure | None) -> str:
    """``+0.0023 [-0.0055, +0.0101]``; positive is worse."""
    return NOT_MEASURED if figure is None else f"{figure.value:+.4f}" + _interval(figure, "+")


def share(figure: Figure | None) -> str:
    """``99.08 % [98.20 %, 99.53 %]``."""
    if figure is None:
        return NOT_MEASURED
    ends = f" [{figure.low:.2%}, {figure.high:.2%}]" if figure.low is not None and figure.high is not None else ""
    return f"{figure.value:.2%}{ends}".replace("%", " %")


def decibels(value: float | None, row: Row) -> str:
    """Of a file that was run; without noise there is no number."""
    if row.validated == "none":
        return NOT_MEASURED
    return "equal" if value is None else f"{value:.1f} dB"


def time_of(latency: Latency | None) -> str:
    """Median and range of the file, of the float file in the same runtime, and their ratio."""
    if latency is None:
        return NOT_MEASURED
    said = f"{latency.median_ms:.3g} ms ({latency.low_ms:.3g} to {latency.high_ms:.3g})"
    if latency.float_median_ms is not None:
        said += f"; float file {latency.float_median_ms:.3g} ms"
    if latency.ratio is not None:
        ends = f" [{latency.ratio_low:.3f}, {latency.ratio_high:.3f}]" if latency.ratio_low is not None else ""
        said += f"; ratio {latency.ratio:.3f}{ends}"
    return said


def size(row: Row) -> str:
    """Bytes, and the ratio to the float file of the same format."""
    if row.size_bytes is None:
        return NOT_MEASURED
    return bytes_of(row.size_bytes) + (f", {row.size_ratio:.3f} of the float file" if row.size_ratio is not None else "")


def bytes_of(count: int) -> str:
    """``23,152,836 bytes (23.15 MB)``."""
    return f"{count:,} bytes ({count / 1e6:.2f} MB)"


def option(value: Any) -> str:
    """The value of an option as a recipe writes it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return ", ".join(option(item) for item in value)
    if isinstance(value, dict):
        return "; ".join(f"{key}: {option(item)}" for key, item in value.items())
    return str(value)


def listed(names: list[str]) -> str:
    """Names in code style; of many the first, and how many more."""
    shown = ", ".join(f"`{name}`" for name in names[:_MOST])
    return shown + (f" and {len(names) - _MOST} more" if len(names) > _MOST else "")


def without_paths(text: str) -> str:
    """The text with every absolute path cut to its last part: a card is read elsewhere."""
    return _PATH.sub(r"\1", text)


def _interval(figure: Figure, sign: str = "") -> str:
    ends = interval(figure, sign, decimals=4)
    return f" {ends}" if ends else ""
