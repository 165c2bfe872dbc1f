"""Accuracy-aware driving: the strongest setting first, then the sites that lose most are undone until the drop is allowed.

The sites are ordered by what each loses alone; how many have to be undone is found by bisection, as if the drop fell with each.
It need not, so the answer may not be the strongest that is allowed; but it was judged itself, and it held.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from torch import nn

from calibrate.capture import counted
from calibrate.errors import UserError
from calibrate.fidelity import Fidelity
from calibrate.metrics import metric
from calibrate.modes import evaluating
from compress.quantization.bit_choice import Bits, as_options, dealt, decided
from compress.quantization.bit_groups import FLOAT
from compress.quantization.sensitivity import Sensitivity, measure
from compress.quantization.site_options import Choice, SiteOptions
from compress.rehearsal import stand_in
from compress.surgery import Surgery

if TYPE_CHECKING:
    from compress.labelled import Judged
    from compress.passes.contract import Context
    from compress.passes.quantize import Quantize

__all__ = ["drive"]

_STEPS = 64
"""Assignments between the strongest and none at all that a frontier is thinned to."""
_ROWS = 64

Settings = dict[str, str]


@dataclass
class _Judge:
    """How much worse a model is than the one that the pass was given, and how often that was asked."""

    model: nn.Module
    context: Context
    most: int
    reference: Judged | None = None
    told: list[dict[str, Any]] = field(default_factory=list)

    def begin(self) -> None:
        if self.context.validation is not None:
            self.reference = self.context.validation.judge(self.model)
            self.told.append({"undone": None, "drop": 0.0, **self.reference.json()})

    @property
    def by(self) -> dict[str, Any]:
        if self.context.validation is not None:
            return {"proxy": False, **self.context.validation.describe()}
        return {"proxy": True, "rows": self.context.rows, "metric": "agreement with the model given, on calibration rows"}

    @property
    def left(self) -> int:
        return self.most - len(self.told)

    def drop(self, model: nn.Module, undone: int) -> float:
        validation, reference = self.context.validation, self.reference
        if validation is None or reference is None:
            drop = 1 - self._agreement(model)
            self.told.append({"undone": undone, "drop": drop})
            return drop
        judged = validation.judge(model)
        if judged.metric is None or reference.metric is None:
            drop = judged.loss / max(reference.loss, 1e-12) - 1
        else:
            lost = reference.metric.value - judged.metric.value
            better = metric(validation.metric_name).higher_is_better
            drop = lost if better else -lost / max(reference.metric.value, 1e-12)
        drop = drop if math.isfinite(drop) else math.inf
        self.told.append({"undone": undone, "drop": drop if math.isfinite(drop) else None, **judged.json()})
        return drop

    def _agreement(self, model: nn.Module) -> float:
        """Of the model with the one given, on all calibration rows."""
        sums = Fidelity()
        with evaluating(self.model), evaluating(model):
            for batch in self.context.calibration():
                wanted, got = (self.context.call(one, batch) for one in (self.model, model))
                valid = counted(wanted, batch.get("attention_mask"))
                sums.update(*(x if valid is None else x[valid] for x in (wanted, got)))
        if sums.agreement is None:
            raise UserError(
                "quantize",
                "max_drop has nothing to judge by: the model gives single scores, and there are no validation rows",
                "Name labelled rows under data.validation.",
            )
        return sums.agreement


def drive(step: Quantize, model: nn.Module, context: Context) -> nn.Module:
    """``quantize`` at the strongest setting for which the drop on the rows that judge is at most ``step.max_drop``.

    Raises:
        UserError: there is nothing to judge by.
    """
    assert step.max_drop is not None
    judge = _Judge(stand_in(model), context, step.evaluations)
    judge.begin()
    bits, found, ladder = _ladder(step, model, context)
    tried: dict[int, float] = {}
    low, high = -1, len(ladder)  # below low nothing holds, as far as was tried; at the end of the ladder nothing is rounded
    rung = 0
    while low + 1 < high and judge.left > 1:
        context.progress(len(judge.told), step.evaluations, f"tried: {rung} of {len(ladder)} steps undone")
        trial = stand_in(model)
        _fixed(step, bits, ladder[rung]).run(trial, replace(context, report={}, surgery=Surgery()))
        tried[rung] = judge.drop(trial, rung)
        if tried[rung] <= step.max_drop:
            high = rung
        else:
            low = rung
        rung = (low + high) // 2
    if high < len(ladder):
        model = _fixed(step, bits, ladder[high]).run(model, context)
        again = judge.drop(model, high)
        if again > step.max_drop:
            what = f"max_drop: the chosen setting lost {again:.4g} when it was verified, and {tried[high]:.4g} when it was tried"
            raise UserError("quantize", what, "Use threads: 1, or a wider max_drop.")
    context.report["max_drop"] = _told(step, judge, bits, found, ladder, high)
    _warn(step, context, len(ladder), high, through=low + 1 == high)
    return model


def _ladder(step: Quantize, model: nn.Module, context: Context) -> tuple[Bits, Sensitivity, list[Settings]]:
    """Assignments from the strongest to the gentlest that still rounds something."""
    candidates: Sequence[Choice | SiteOptions] = step.mixed.candidates if step.mixed else (SiteOptions(), "float")
    bits = Bits.of(step, model, context.anatomy, candidates, undo=step.mixed is None)
    found = measure(step, model, context, bits.groups, step.mixed.rows if step.mixed else _ROWS)
    losses = found.noises
    if step.mixed is not None:
        curve = bits.frontier(losses if step.mixed.score == "sensitivity" else dealt(found, context.seed))
        count = min(_STEPS, len(curve))
        points = sorted({round(number * (len(curve) - 1) / max(1, count - 1)) for number in range(count)})
        made = [bits.settings(curve.choices(point)) for point in points]
    else:
        own = {group.name: next((name for name in group.settings if name != FLOAT), FLOAT) for group in bits.groups}
        alone = {group.name: loss[own[group.name]] for group, loss in zip(bits.groups, losses, strict=True)}
        order = sorted(own, key=lambda name: -alone[name])
        made = [own | dict.fromkeys(order[:count], FLOAT) for count in range(len(order))]
    return bits, found, [one for one in made if set(one.values()) != {FLOAT}]


def _fixed(step: Quantize, bits: Bits, settings: Settings) -> Quantize:
    """The pass as a recipe could have written it: with ``mixed`` every site is named, else only what was undone."""
    named = bits.groups if step.mixed else [group for group in bits.groups if settings[group.name] == FLOAT]
    return decided(step, named, settings)


def _told(
    step: Quantize, judge: _Judge, bits: Bits, found: Sensitivity, ladder: Sequence[Settings], chosen: int
) -> dict[str, Any]:
    whole = chosen == len(ladder)
    settings = dict.fromkeys([group.name for group in bits.groups], FLOAT) if whole else ladder[chosen]
    named = bits.groups if step.mixed else [group for group in bits.groups if settings[group.name] == FLOAT]
    sites = found.json()
    for group, entry in zip(bits.groups, sites, strict=True):
        entry["chosen"] = settings[group.name]
    return {
        "asked": step.max_drop,
        "judged_by": judge.by,
        "drop": 0.0 if whole else judge.told[-1]["drop"],
        "undone": chosen,
        "of": len(ladder),
        "evaluations": judge.told,
        "most": step.evaluations,
        "overrides": as_options(named, settings),
        "sites": sites,
        "kept": bits.stuck,
    }


def _warn(step: Quantize, context: Context, steps: int, chosen: int, *, through: bool) -> None:
    warnings = context.report.setdefault("warnings", [])
    if context.validation is None:
        warnings.append(
            f"max_drop {step.max_drop:g} was judged by the predictions that change on calibration rows, because the recipe names "
            "no data.validation: no labels were read, and the metric may drop by more or less"
        )
    else:
        warnings.append(f"max_drop was judged by {context.validation.rows} validation rows, which chose: others have to judge")
    if not through:
        warnings.append("max_drop: the evaluations were used up before the search was; more of them may undo less")
    if chosen == steps:
        warnings.append(f"max_drop {step.max_drop:g} held for nothing that was tried: no site is quantized")
