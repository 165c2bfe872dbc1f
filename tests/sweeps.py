"""Sweeps over many cases: each test run takes the few that differ most, ``pytest -m slow`` all others."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest

__all__ = ["swept"]


def swept(cases: Iterable[Any], often: Collection[Any]) -> list[Any]:
    """The cases for ``parametrize`` (tuples for several names); those that are not among ``often`` are slow."""
    cases = list(cases)
    assert all(case in cases for case in often), "a case that runs often has to exist"
    values = [case if isinstance(case, tuple) else (case,) for case in cases]
    marks = [() if case in often else (pytest.mark.slow,) for case in cases]
    return [pytest.param(*value, marks=mark) for value, mark in zip(values, marks, strict=True)]
