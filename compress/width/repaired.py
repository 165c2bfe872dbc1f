"""Repair of the projections behind what was cut out, judged on rows that none was fitted to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from calibrate.fidelity import Fidelity
from calibrate.signature import Batch
from compress.width.repair import Repaired, held_out, outputs_at, repair

if TYPE_CHECKING:
    from compress.passes.contract import Context

__all__ = ["repair_behind"]


def repair_behind(model: nn.Module, original: nn.Module, context: Context, sinks: Sequence[str]) -> dict[str, Any]:
    """Repairs the projections at the given paths, first to last, and says what it was worth on the held-out calibration rows;
    if they are further from the original's outputs then, all is undone."""
    fit, held = held_out(context.calibration())
    if not fit or not held:
        return {"because": "there are too few calibration rows to hold some out"}
    before = _sqnr(original, model, context, held)
    old = {path: dict(model.get_submodule(path).named_parameters()) for path in sinks}
    done: list[Repaired] = []
    for number, path in enumerate(sinks):
        context.progress(number, len(sinks), f"repair {path}")
        wanted = outputs_at(original, context.call, path)
        done.append(repair(model, context.call, path, wanted, fit, held))
    after = _sqnr(original, model, context, held)
    told = {"sites": [each.json() for each in done], "sqnr_before_db": before, "sqnr_after_db": after}
    if after < before:
        for path, parameters in old.items():
            for name, parameter in parameters.items():
                model.get_submodule(path).register_parameter(name, parameter)
        told["undone"] = "the model's outputs on the held-out rows were nearer without it"
    return told


def _sqnr(original: nn.Module, model: nn.Module, context: Context, batches: list[Batch]) -> float:
    fidelity = Fidelity()
    for batch in batches:
        mask = batch.get("attention_mask")
        fidelity.update(context.call(original, batch), context.call(model, batch), mask)
    return fidelity.sqnr_db
