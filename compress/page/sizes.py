"""Where the bytes are: by role before and after, and by element type in each file."""

from __future__ import annotations

from dataclasses import dataclass

from compress.page import wording
from compress.page.outcome import marks
from compress.report import Report

__all__ = ["FileBytes", "Part", "RoleBar", "files", "legend", "roles"]

_FLOAT = ("float64", "float32", "bfloat16", "float16")
_ORDER = (*_FLOAT, "float8_e4m3", "int8", "uint8", "int4", "uint4", "int2", "uint2", "bool")


@dataclass(frozen=True)
class RoleBar:
    """Bytes of one role before and after; ``before_share`` and ``after_share`` are per cent of the largest bar."""

    role: str
    before: str
    after: str
    ratio: str
    before_share: float
    after_share: float


@dataclass(frozen=True)
class Part:
    """A stretch of a bar: an element type, its bytes, its share of the whole bar in per cent, and its tone (1 to 6)."""

    name: str
    size: str
    share: float
    tone: int


@dataclass(frozen=True)
class FileBytes:
    """A file: what it weighs beside the float file of its format, and its weights by element type."""

    label: str
    mark: int
    path: str
    size: str
    float_size: str
    width: float
    float_width: float
    parts: tuple[Part, ...]


def roles(report: Report) -> list[RoleBar]:
    """One bar for each role, the heaviest first, and the sum at the end."""
    found = sorted(report.roles, key=lambda role: (-role.before, -role.after, role.role))
    largest = max((max(role.before, role.after) for role in found), default=0) or 1
    bars = [_role(role.role, role.before, role.after, largest) for role in found]
    if len(found) > 1:
        before, after = sum(role.before for role in found), sum(role.after for role in found)
        bars.append(_role("all", before, after, max(before, after) or 1))
    return bars


def _role(name: str, before: int, after: int, largest: int) -> RoleBar:
    ratio = wording.ratio(after / before) if before else "new"
    shares = (round(100 * before / largest, 2), round(100 * after / largest, 2))
    return RoleBar(wording.roles(name), wording.size(before), wording.size(after) if after else "gone", ratio, *shares)


def files(report: Report) -> list[FileBytes]:
    """Each file once, in the order of the table; bars have one scale, so that files can be compared."""
    numbers, tones = marks(report.rows), _tones(report)
    rows = {row.path: row for row in reversed(report.rows) if row.path and row.size_bytes}
    sizes = {path: (row.size_bytes or 0, _float_size(row.size_bytes or 0, row.size_ratio)) for path, row in rows.items()}
    largest = max((max(pair) for pair in sizes.values()), default=0) or 1
    found = []
    for row in report.rows:
        if row.path not in sizes or rows[row.path] is not row:
            continue
        stored, before = sizes[row.path]
        weights = {name: size for name, size in (row.audit.bytes_by_dtype if row.audit else {}).items() if size}
        parts = [(name, size, tones[name]) for name, size in sorted(weights.items(), key=lambda item: _place(item[0]))]
        rest = stored - sum(weights.values())
        if weights and rest > 0:
            parts.append(("everything else", rest, 0))
        whole = sum(size for _, size, _ in parts) or 1
        found.append(
            FileBytes(
                label=row.label,
                mark=numbers[row.label],
                path=row.path,
                size=wording.size(stored),
                float_size=wording.size(before) if before else "",
                width=round(100 * stored / largest, 2),
                float_width=round(100 * before / largest, 2),
                parts=tuple(Part(name, wording.size(size), round(100 * size / whole, 3), tone) for name, size, tone in parts),
            )
        )
    return found


def legend(report: Report) -> list[tuple[str, int]]:
    """Each element type with its tone; what is no weight comes last."""
    tones = _tones(report)
    return [*sorted(tones.items(), key=lambda item: _place(item[0])), ("everything else", 0)] if tones else []


def _float_size(stored: int, ratio: float | None) -> float:
    return stored / ratio if ratio else 0.0


def _tones(report: Report) -> dict[str, int]:
    """The tone of each element type: float types from the dark end, whole numbers from the bright one."""
    names = {name for row in report.rows if row.audit for name, size in row.audit.bytes_by_dtype.items() if size}
    floats = [name for name in sorted(names, key=_place) if name.startswith(("float", "bfloat"))]
    others = [name for name in sorted(names, key=_place) if name not in floats]
    return {name: 4 + min(number, 2) for number, name in enumerate(floats)} | {
        name: 1 + min(number, 2) for number, name in enumerate(others)
    }


def _place(name: str) -> tuple[int, str]:
    """Floats first, then whole numbers from wide to narrow, then the rest by name."""
    known = next((number for number, start in enumerate(_ORDER) if name.startswith(start)), len(_ORDER))
    return known, name
