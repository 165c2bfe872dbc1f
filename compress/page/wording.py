"""Numbers and intervals as the page writes them: those that the table of the terminal has too, and its own."""

from __future__ import annotations

import math
from typing import Any

from compress.report import Latency
from compress.wording import decibel, figure, interval, ratio, share, size

__all__ = [
    "decibel",
    "figure",
    "flat",
    "interval",
    "listed",
    "memory",
    "paces",
    "pairs",
    "plain",
    "ratio",
    "ratio_interval",
    "roles",
    "seconds",
    "share",
    "size",
    "times",
]


def ratio_interval(latency: Latency) -> str:
    """The 95 % interval of a ratio of times; empty where it has none."""
    if latency.ratio_low is None or latency.ratio_high is None:
        return ""
    return f"[{latency.ratio_low:.2f}, {latency.ratio_high:.2f}]"


def memory(stored: float) -> str:
    """Bytes as GB (10**9), below one GB as MB."""
    return f"{stored / 1e9:.2f} GB" if stored >= 1e9 else f"{stored / 1e6:.0f} MB"


def seconds(value: float) -> str:
    """Seconds to two or three digits; from two minutes on minutes too, below a tenth milliseconds."""
    if value >= 120:
        return f"{int(value // 60)} min {int(value % 60):02} s"
    if value >= 1:
        return f"{value:.1f} s"
    return f"{value:.2f} s" if value >= 0.1 else f"{value * 1000:.0f} ms"


def times(value: float, smaller: str, larger: str) -> str:
    """A ratio in words: ``3.3 times smaller`` for 0.31, ``1.6 times larger`` for 1.58, ``equal`` very near one."""
    factor, word = (1 / value, smaller) if value < 1 else (value, larger)
    return f"no {smaller}" if factor < 1.005 else f"{_factor(factor)} times {word}"


def paces(low: float, high: float) -> str:
    """The interval of a ratio of times in words, both ends on one side of 1: ``1.8 to 7.1 times faster``."""
    ends, word = ((1 / high, 1 / low), "faster") if high < 1 else ((low, high), "slower")
    return f"{_factor(ends[0])} to {_factor(ends[1])} times {word}"


def _factor(value: float) -> str:
    return f"{value:.2g}" if value < 9.95 else f"{value:.0f}"


def roles(names: str) -> str:
    """Roles that share a layer, with what they have in common said once: ``attention.query, key, value``."""
    first, *others = names.split(", ")
    start = first.rpartition(".")[0] + "."
    return ", ".join([first, *(name.removeprefix(start) for name in others)]) if start != "." else names


def listed(parts: list[str]) -> str:
    """a, b and c."""
    return ", ".join(parts[:-1]) + f" and {parts[-1]}" if len(parts) > 1 else "".join(parts)


def plain(value: Any) -> str:
    """Any JSON value in one short line: numbers to four digits, pairs as ranges, nothing as a dash."""
    if value is None or value in ("", [], {}):
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    if isinstance(value, float):
        return f"{value:.4g}" if math.isfinite(value) else str(value)
    if isinstance(value, list):
        if len(value) == 2 and all(isinstance(end, float) for end in value):
            return f"{plain(value[0])} … {plain(value[1])}"
        nested = any(isinstance(entry, list | dict) for entry in value)
        return ("; " if nested else ", ").join(plain(entry) for entry in value)
    if isinstance(value, dict):
        return ", ".join(f"{key} {plain(entry)}" for key, entry in value.items())
    return str(value)


def flat(told: Any, before: str = "") -> dict[str, Any]:
    """A site's figures with those of inner parts beside them: ``activation`` with ``scale`` becomes ``activation scale``."""
    if not isinstance(told, dict):
        return {before.strip() or "figure": told}
    found: dict[str, Any] = {}
    for name, value in told.items():
        found |= flat(value, f"{before}{name} ") if isinstance(value, dict) else {f"{before}{name}": value}
    return found


def pairs(told: Any) -> tuple[tuple[str, str], ...]:
    """(name, value) of everything in a JSON object; what stands inside another object is named after both."""
    return tuple((name.replace("_", " "), plain(value)) for name, value in flat(told or {}).items())
