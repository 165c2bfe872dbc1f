"""Estimates and fidelities as figures of the report, in numbers that JSON has."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from compress.report import Figure

if TYPE_CHECKING:
    from calibrate.fidelity import Fidelity
    from calibrate.metrics import Estimate

__all__ = ["agreement", "decibels", "figure"]

_WORST_DB = -999.0
_LARGEST = 1e9


def figure(name: str, estimate: Estimate) -> Figure:
    """An estimate as a figure of the report, in numbers that JSON has: what is not finite (the perplexity of a model that gives
    NaN) becomes the largest figure told, a difference of two such 0, an end of their interval none."""
    return Figure(
        name=name,
        value=_told(estimate.value) or 0.0,
        low=_told(estimate.low),
        high=_told(estimate.high),
        rows=estimate.rows,
        method=estimate.method,
    )


def _told(value: float) -> float | None:
    return None if math.isnan(value) else min(max(value, -_LARGEST), _LARGEST)


def agreement(fidelity: Fidelity | None) -> Figure | None:
    """The share of rows with the same answer; None where there are no classes."""
    estimate = fidelity.agreement_estimate if fidelity is not None else None
    return figure("agreement", estimate) if estimate else None


def decibels(fidelity: Fidelity | None) -> float | None:
    """The SQNR as JSON can hold it: None where the outputs are equal, and the lowest number for what is not finite."""
    if fidelity is None or fidelity.sqnr_db == math.inf:
        return None
    return max(fidelity.sqnr_db, _WORST_DB)
