"""Bits chosen site by site under a budget: losses of single sites add up, and the knapsack is solved exactly."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import nn

from calibrate.errors import UserError
from calibrate.inventory import inventory
from compress.algorithms.knapsack import Frontier, frontier
from compress.quantization.bit_groups import FLOAT, BitGroup, bit_groups
from compress.quantization.bit_times import in_time
from compress.quantization.sensitivity import Loss, Sensitivity, decibels, measure
from compress.quantization.site_options import Choice, Mixed, SiteOptions
from compress.rehearsal import stand_in
from compress.surgery import Surgery

if TYPE_CHECKING:
    from compress.anatomy import Anatomy
    from compress.passes.contract import Context
    from compress.passes.quantize import Quantize

__all__ = ["Assignment", "Bits", "as_options", "choose", "dealt", "decided", "forecast"]

_TRIALS = 8
"""Assignments that are tried for a loss, before the best of all."""
_POINTS = 60
"""Points of the frontier that a report keeps."""


@dataclass(frozen=True)
class Bits:
    """What can be chosen from: the groups of a model and the bytes of everything else."""

    groups: list[BitGroup]
    stuck: dict[str, str]
    fixed: int
    before: int

    @classmethod
    def of(
        cls,
        step: Quantize,
        model: nn.Module,
        anatomy: Anatomy,
        candidates: Sequence[Choice | SiteOptions],
        *,
        undo: bool = False,
        strict: bool = True,
    ) -> Bits:
        """See ``bit_groups``, which raises UserError for a candidate that no site can take, if ``strict``."""
        groups, stuck = bit_groups(step, model, anatomy, candidates, undo=undo, strict=strict)
        before = sum(entry.bytes for entry in inventory(model).values())
        return cls(groups, stuck, before - sum(group.whole for group in groups), before)

    def frontier(self, losses: Sequence[Mapping[str, float]]) -> Frontier:
        """Of bytes (without those of everything else) and loss; choices are counted as in ``settings``."""
        sizes = [[group.sizes[name] for name in group.settings] for group in self.groups]
        return frontier(
            sizes, [[found[name] for name in group.settings] for group, found in zip(self.groups, losses, strict=True)]
        )

    def settings(self, choices: Sequence[int]) -> dict[str, str]:
        """The setting of each group by its name."""
        return {group.name: list(group.settings)[choice] for group, choice in zip(self.groups, choices, strict=True)}

    def bytes(self, settings: Mapping[str, str]) -> int:
        """Of the whole model."""
        return self.fixed + sum(group.sizes[settings[group.name]] for group in self.groups)

    def budget(self, mixed: Mixed) -> int | None:
        """Most bytes of the whole model; None where the budget is none of size.

        Raises:
            UserError: no assignment meets it.
        """
        if mixed.size_ratio is not None:
            most = math.floor(mixed.size_ratio * self.before)
        elif mixed.size_mb is not None:
            most = math.floor(mixed.size_mb * 1e6)
        else:
            return None
        least = self.fixed + sum(min(group.sizes.values()) for group in self.groups)
        if least > most:
            ((option, asked),) = mixed.budgets.items()
            best = math.ceil(least / self.before * 1e4) / 1e4 if option == "size_ratio" else math.ceil(least / 1e3) / 1e3
            held = self.fixed / 1e6
            raise UserError(
                "quantize",
                f"mixed asks for {option} {asked:g}, and the least that these candidates give is {best:g} "
                f"({least / 1e6:.3f} MB, of which {held:.3f} MB are no sites of the pass)",
                f"Ask for {best:g} or more, or add smaller candidates, sites or embeddings.",
            )
        return most


@dataclass(frozen=True)
class Assignment:
    """A setting for each group.

    Attributes:
        size: bytes of the whole model, room for factors of smoothed inputs among them.
        noise: the sum of what the single sites lose.
    """

    settings: dict[str, str]
    size: int
    noise: float


def choose(step: Quantize, model: nn.Module, context: Context) -> nn.Module:
    """``quantize`` with the bits that meet the budget of ``step.mixed`` at the least predicted loss.

    Raises:
        UserError: no assignment meets the budget; tells the best that can be met.
    """
    mixed = step.mixed
    assert mixed is not None
    bits = Bits.of(step, model, context.anatomy, mixed.candidates)
    budget = bits.budget(mixed)
    found = measure(step, model, context, bits.groups, mixed.rows)
    curve, losses = bits.frontier(found.noises), found.noises
    if mixed.score == "random":
        losses = dealt(found, context.seed)
    scored = curve if mixed.score == "sensitivity" else bits.frontier(losses)
    tried: list[dict[str, float | None]] = []
    latency: dict[str, Any] = {}
    if mixed.latency_ratio is not None:
        chosen, latency = _fast_enough(step, model, context, bits, found, losses)
    elif budget is not None:
        point = scored.within(budget - bits.fixed)
        assert point is not None
        chosen = _rounding(_assigned(bits, found, scored, point), mixed)
    else:
        chosen = _good_enough(step, model, context, bits, found, scored, tried)
    model = decided(step, bits.groups, chosen.settings).run(model, context)
    context.report["mixed"] = {
        "budget": mixed.budgets,
        "score": mixed.score,
        **_told(bits, found, chosen, curve),
        "measured": found.reference.loss(model).json(),
        "bytes_after": sum(entry.bytes for entry in inventory(model).values()),
        "tried": tried,
        **({"latency": latency} if latency else {}),
    }
    _warn(context)
    return model


def decided(step: Quantize, groups: Sequence[BitGroup], settings: Mapping[str, str]) -> Quantize:
    """The pass with these settings, as a recipe could have written it: nothing is left to choose."""
    chosen = {path: value for group in groups for path, value in group.override(settings[group.name]).items()}
    overrides = {pattern: value for pattern, value in step.overrides.items() if pattern not in chosen} | chosen
    return step.model_copy(update={"mixed": None, "max_drop": None, "overrides": overrides})


def _assigned(bits: Bits, found: Sensitivity, curve: Frontier, point: int) -> Assignment:
    settings = bits.settings(curve.choices(point))
    return Assignment(settings, bits.bytes(settings), _noise_of(found, settings))


def _rounding(chosen: Assignment, mixed: Mixed) -> Assignment:
    """The same, if it rounds anything at all."""
    if set(chosen.settings.values()) == {FLOAT}:
        ((option, asked),) = mixed.budgets.items()
        what = f"mixed asks for {option} {asked:g}, which leaves every site float"
        raise UserError("quantize", what, "Ask for a tighter budget, or take float out of candidates.")
    return chosen


def _good_enough(
    step: Quantize,
    model: nn.Module,
    context: Context,
    bits: Bits,
    found: Sensitivity,
    curve: Frontier,
    tried: list[dict[str, float | None]],
) -> Assignment:
    """The smallest assignment that is predicted, and then found, to keep so many decibels: where the sum of the single losses
    says too little, more is asked of it."""
    assert step.mixed is not None
    assert step.mixed.loss_db is not None
    asked = wanted = step.mixed.loss_db
    last = -1
    while True:
        point = curve.least(10 ** (-wanted / 10))
        end = len(curve) - 1
        point = end if point is None or len(tried) == _TRIALS else min(max(point, last + 1), end)
        chosen = _rounding(_assigned(bits, found, curve, point), step.mixed)
        trial = decided(step, bits.groups, chosen.settings).run(stand_in(model), replace(context, report={}, surgery=Surgery()))
        measured = decibels(found.reference.loss(trial).noise)
        tried.append({"bytes": chosen.size, "predicted_db": decibels(chosen.noise), "measured_db": measured})
        if measured is None or measured >= asked:
            return chosen
        if point == end:
            raise UserError(
                "quantize",
                f"mixed asks for loss_db {asked:g}, and the best that these candidates give is {measured:.1f} dB",
                f"Ask for {math.floor(measured * 10) / 10:g} or less, or add float to candidates.",
            )
        wanted, last = wanted + max(asked - measured, 0.1), point


def _fast_enough(
    step: Quantize,
    model: nn.Module,
    context: Context,
    bits: Bits,
    found: Sensitivity,
    losses: Sequence[Mapping[str, float]],
) -> tuple[Assignment, dict[str, Any]]:
    """The assignment of least loss whose file was found to take no longer than asked, and what is told of times."""
    assert step.mixed is not None
    assert step.mixed.latency_ratio is not None
    done, told = in_time(
        step, model, context, bits.groups, losses, step.mixed.latency_ratio, lambda one: decided(step, bits.groups, one)
    )
    again = "bits are chosen by measured times, which vary between runs; the same ones come again with the overrides below"
    context.report.setdefault("warnings", []).extend([again, *done.cautions])
    settings = done.chosen.choice
    return _rounding(Assignment(settings, bits.bytes(settings), _noise_of(found, settings)), step.mixed), told


def _told(bits: Bits, found: Sensitivity, chosen: Assignment, curve: Frontier) -> dict[str, Any]:
    """What a report says of an assignment: it can be written as ``overrides`` again."""
    sites = found.json()
    for group, entry in zip(bits.groups, sites, strict=True):
        entry["chosen"] = chosen.settings[group.name]
    return {
        "rows": found.reference.rows,
        "predicted_db": decibels(chosen.noise),
        "bytes_before": bits.before,
        "bytes_predicted": chosen.size,
        "exact": curve.exact,
        "overrides": as_options(bits.groups, chosen.settings),
        "sites": sites,
        "kept": bits.stuck,
        "curve": [
            {"bytes": bits.fixed + int(curve.costs[at]), "db": decibels(float(curve.losses[at]))} for at in _thinned(curve)
        ],
    }


def as_options(groups: Sequence[BitGroup], settings: Mapping[str, str]) -> dict[str, Any]:
    """An assignment as a recipe writes it under ``overrides``."""
    found: dict[str, Any] = {}
    for group in groups:
        for path, value in group.override(settings[group.name]).items():
            found[path] = value.model_dump(exclude_none=True) if isinstance(value, SiteOptions) else value
    return found


def forecast(step: Quantize, model: nn.Module, anatomy: Anatomy) -> Quantize:
    """``step`` with an assignment that meets a budget of size, or the smallest one, without data: for rehearsals.

    Every candidate that a site can take is there, so that a runtime which cannot carry one refuses it.

    Raises:
        UserError: no assignment meets the budget.
    """
    if step.mixed is None:
        return step.model_copy(update={"max_drop": None})
    bits = Bits.of(step, model, anatomy, step.mixed.candidates)
    budget = bits.budget(step.mixed)
    curve = bits.frontier([{name: _guessed(group, name) for name in group.settings} for group in bits.groups])
    point = 0 if budget is None else curve.within(budget - bits.fixed)
    assert point is not None
    settings = bits.settings(curve.choices(point))
    for name in {name for group in bits.groups for name in group.settings} - set(settings.values()):
        if name == FLOAT:
            continue
        takers = [group for group in bits.groups if name in group.settings]
        settings[min(takers, key=lambda group: group.numbers).name] = name
    return decided(step, bits.groups, settings)


def _guessed(group: BitGroup, name: str) -> float:
    """A stand-in for a loss that was not measured."""
    bits = group.settings[name].weights
    if bits == FLOAT:
        return 0.0
    return group.numbers * (4.0 ** -int(bits or 8) + (0.0 if group.settings[name].activations else 4.0**-8))


def _noise_of(found: Sensitivity, settings: Mapping[str, str]) -> float:
    """The predicted loss of an assignment: those of the single sites together."""
    return sum(losses[settings[group.name]].noise for group, losses in zip(found.groups, found.losses, strict=True))


def dealt(found: Sensitivity, seed: int) -> list[dict[str, float]]:
    """Losses that keep what a setting costs on average, and know nothing of the sites."""
    names = {name for losses in found.losses for name in losses}
    rng = random.Random(seed)
    means = {name: _mean([losses[name] for losses in found.losses if name in losses]) for name in names}
    luck = [rng.lognormvariate(0, 2) for _ in found.groups]
    return [{name: means[name] * factor for name in losses} for losses, factor in zip(found.losses, luck, strict=True)]


def _mean(losses: Sequence[Loss]) -> float:
    return sum(loss.noise for loss in losses) / len(losses)


def _thinned(curve: Frontier) -> list[int]:
    count = min(_POINTS, len(curve))
    return sorted({round(number * (len(curve) - 1) / max(1, count - 1)) for number in range(count)})


def _warn(context: Context) -> None:
    """Says so where the sum of the single losses is no measure of the whole."""
    said = context.report["mixed"]
    predicted, measured = said["predicted_db"], said["measured"]["db"]
    if predicted is not None and measured is not None and measured < predicted - 3:
        context.report.setdefault("warnings", []).append(
            f"mixed: {predicted:.1f} dB were predicted from single sites, and the whole has {measured:.1f} dB on the same rows: "
            "their losses do more than add up"
        )
