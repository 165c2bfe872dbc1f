"""Narrower blocks: attention heads and MLP neurons taken out under a budget."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, NonNegativeInt, model_validator
from torch import Tensor, nn

from calibrate.errors import UserError
from calibrate.modes import frozen
from calibrate.signature import Batch, Signature
from compress.anatomy import Anatomy, find
from compress.depth.output_scores import first_rows
from compress.depth.repair import MOST_HELD
from compress.distillation.blocks import distil_blocks
from compress.passes.contract import Context, Pass, Target
from compress.rehearsal import stand_in
from compress.surgery import Surgery
from compress.width.counts import counted, numbered
from compress.width.repair import held_out
from compress.width.repaired import repair_behind
from compress.width.search import Group, TooSmall, choose
from compress.width.slicing import slice_units
from compress.width.timed_choice import chosen_by_time
from compress.width.unit_costs import unit_bytes, whole_cost
from compress.width.unit_scores import scored
from compress.width.units import Units, Unseparable, find_units

__all__ = ["PruneWidth"]

_BUSY = 0.1
"""Width of the interval of a ratio of times above which a choice by them is doubtful."""
_NOISE = 0.02
"""Of a measured ratio, by which the smallest one that is named may be off."""


class PruneWidth(Pass):
    """Take out the attention heads and MLP neurons that are missed least, until the blocks fit a budget.

    OPTIN (Khaki & Plataniotis 2024, arXiv 2403.17921): a unit's score is its trajectory error, the change of the outputs of the
    blocks from its own on and of the logits when it is switched off (sec. 3.2); units are ranked over all blocks by score per
    cost, and the cheapest set that meets the budget goes (sec. 3.3). The paper's code weights heads and neurons by their number
    in the layer; this does not. With ``latency_ratio`` the cost is time: files of the model with a few widths of each kind of
    block are timed, the chosen set is timed before it is taken, and the budget is corrected by that. Units leave for good: the
    weights get smaller, an emptied sublayer keeps its bias only. Query heads that share keys and values go together. What is left
    is repaired without labels: each following projection gets the least-squares weights for the outputs it had before, first
    block first, kept where held-out calibration rows agree. With ``distill`` the blocks are then trained, without labels, until
    their outputs and the model's are what they were; that too stays only where the held-out rows agree.
    """

    name: ClassVar[str] = "prune_width"
    source: ClassVar[str] = "Khaki & Plataniotis 2024, arXiv 2403.17921"
    needs_calibration: ClassVar[bool] = True

    macs: float | None = Field(
        None, gt=0, le=1, description="Share of the blocks' multiply-accumulates that stays. Name one of the first four options."
    )
    size_ratio: float | None = Field(None, gt=0, le=1, description="Share of the model's bytes in memory that stays.")
    latency_ratio: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Share of the time that stays of the model as it is at this pass: measured in the first format that can be "
        "timed here, at the first batch size of measure. Times vary: another run may keep other units.",
    )
    stay: dict[Literal["heads", "neurons"], list[NonNegativeInt | None]] = Field(
        {}, description="How many heads and neurons stay, block by block; null where none can go. Runs tell their own numbers."
    )
    heads: bool = Field(True, description="Whether attention heads may go.")
    neurons: bool = Field(True, description="Whether neurons of the MLPs may go.")
    round_to: int = Field(16, ge=1, le=1024, description="Neurons that stay in a block are a multiple of it, as kernels like.")
    blocks: list[int] = Field([], description="Numbers of the blocks that may lose units, -1 is the last; none named: all.")
    skip: list[int] = Field([], description="Numbers of the blocks that stay as they are.")
    score: Literal["trajectory", "magnitude", "random"] = Field(
        "trajectory", description="How units are ranked; magnitude looks at weights only, random is a control."
    )
    rows: int = Field(64, ge=1, description="Calibration rows that units are scored on.")
    repair: bool = Field(True, description="Whether the projections behind are fitted to the calibration rows.")
    distill: int = Field(
        0,
        ge=0,
        le=1000,
        description="After the repair: how often each calibration row is seen by a training, without labels, of the blocks from "
        "the first on that lost units, so that they give what they gave. It wants 1000 rows or more; 0: no training.",
    )

    @model_validator(mode="after")
    def _whole(self) -> PruneWidth:
        given = [name for name in ("macs", "size_ratio", "latency_ratio", "stay") if getattr(self, name) not in (None, {})]
        if len(given) != 1:
            raise ValueError("name one of macs, size_ratio, latency_ratio and stay\nFor example macs: 0.7")
        if not (self.heads or self.neurons):
            raise ValueError("heads and neurons are both false: nothing may go\nLeave one of them true.")
        if self.score != "trajectory" and "rows" in self.chosen:
            raise ValueError(f"rows goes with score: trajectory\nTake rows out, or score: {self.score}.")
        if self.distill and not self.repair:
            raise ValueError("distill does not go with repair: false\nTake one of them out.")
        return self

    @property
    def calibrates(self) -> bool:
        return self.score == "trajectory" or self.repair

    @property
    def timed(self) -> str:
        return "" if self.latency_ratio is None else f"latency_ratio, macs: {self.latency_ratio:g}"

    @property
    def assumes(self) -> str:
        if self.latency_ratio is None:
            return ""
        return f"what latency_ratio takes is measured by the run; planned as macs: {self.latency_ratio:g}"

    def targets(self, model: nn.Module, anatomy: Anatomy) -> list[Target]:
        if self._ratio == 1:
            self._numbers(anatomy)
            return []
        action = {"head": "may lose heads", "neuron": "may lose neurons"}
        found = []
        for units in self._units(model, anatomy)[0]:
            for path in (*units.rows, units.sink):
                roles = next((site.roles for site in anatomy.sites if site.path == path), ())
                found.append(Target(path, ", ".join(roles), action[units.kind]))
        return found

    def skips(self, model: nn.Module, anatomy: Anatomy) -> dict[str, str]:
        return {} if self._ratio == 1 else self._units(model, anatomy)[1]

    def rehearse(self, model: nn.Module, anatomy: Anatomy, surgery: Surgery) -> None:
        if self._ratio == 1:
            return
        units, _ = self._units(model, anatomy)
        alike = [torch.arange(len(one), dtype=torch.float64) / len(one) * self._cost(model, one) for one in units]
        gone = self._choice(model, anatomy, units, alike, rehearsed=True)
        signature, example = anatomy.traced
        _take_out(model, surgery, signature, example, units, gone)

    def run(self, model: nn.Module, context: Context) -> nn.Module:
        anatomy = context.anatomy
        if self._ratio == 1:
            self._numbers(anatomy)
            context.report |= {"gone": [], "kept_share": 1.0, "skipped": {}}
            return model
        units, skipped = self._units(model, anatomy)
        whole = whole_cost(model, anatomy, macs=self._macs)
        with frozen(model):
            scores = scored(model, context, units, self.score, self.rows)
            by_time = self.latency_ratio is not None
            gone = self._in_time(model, context, units, scores) if by_time else self._choice(model, anatomy, units, scores)
            original = stand_in(model) if self.repair else None
            signature, example = anatomy.traced
            _take_out(model, context.surgery, signature, example, units, gone, context)
            context.report |= _told(units, gone, scores) | {"skipped": skipped}
            if original is not None:
                touched = [one for one, numbers in zip(units, gone, strict=True) if numbers]
                told = repair_behind(model, original, context, [one.sink for one in touched])
                if self.distill and touched:
                    told["distillation"] = self._distilled(model, original, context, min(one.block for one in touched))
                context.report["repair"] = told
            after = find(model, signature, example) if self._macs else anatomy
            context.report["kept_share"] = whole_cost(model, after, macs=self._macs) / whole
        return model

    def _distilled(self, model: nn.Module, original: nn.Module, context: Context, first: int) -> dict[str, Any]:
        """Trains the blocks from the given one on."""
        fit, held = held_out(context.calibration())
        if not fit or not held:
            return {"because": "there are too few calibration rows to hold some out"}
        paths = [block.path for block in context.anatomy.blocks]
        alike = {path: path for path in paths}
        return distil_blocks(model, original, context, (fit, first_rows(held, MOST_HELD)), self.distill, alike, paths[first:])

    @property
    def _ratio(self) -> float:
        """What stays, as a share; 0 where ``stay`` counts it."""
        return next((share for share in (self.macs, self.size_ratio, self.latency_ratio) if share is not None), 0.0)

    @property
    def _macs(self) -> bool:
        """Whether what stays is counted in multiply-accumulates, else in bytes."""
        return self.size_ratio is None

    def _numbers(self, anatomy: Anatomy) -> set[int]:
        """Indices of the blocks that may lose units.

        Raises:
            UserError: a number that no block has, or no block is left.
        """
        count = len(anatomy.blocks)
        for option, numbers in (("blocks", self.blocks), ("skip", self.skip)):
            for number in numbers:
                if not -count <= number < count:
                    there = f"There are {count}: 0 to {count - 1}." if count else "No blocks were found; see: compress inspect."
                    raise UserError(self.name, f"{option}: there is no block {number}", there)
        named = {number % count for number in self.blocks} or set(range(count))
        left = named - {number % count for number in self.skip}
        if not left:
            what = "no block is left that may lose units" if count else "the model has no blocks"
            raise UserError(self.name, what, "Take a number off skip." if count else "See what it has with: compress inspect.")
        return left

    def _units(self, model: nn.Module, anatomy: Anatomy) -> tuple[list[Units], dict[str, str]]:
        """Units that may go, and why those of other blocks may not, by path.

        Raises:
            UserError: there is none.
        """
        numbers = self._numbers(anatomy)
        signature, example = anatomy.traced
        kinds = [kind for kind, wanted in (("head", self.heads), ("neuron", self.neurons)) if wanted]
        found = find_units(model, signature, anatomy, example)
        mine = [one for one in found if one.kind in kinds and one.block in numbers]
        units = [one for one in mine if isinstance(one, Units)]
        skipped = {f"{anatomy.blocks[one.block].path} ({one.kind}s)": one.reason for one in mine if isinstance(one, Unseparable)}
        if not units:
            reason = next((f"{path}: {why}." for path, why in skipped.items()), "See what it has with: compress inspect.")
            raise UserError(self.name, f"no block has {' or '.join(f'{kind}s' for kind in kinds)} that can go", reason)
        return units, skipped

    def _cost(self, model: nn.Module, units: Units) -> float:
        """Of one unit: its FLOPs, or its bytes."""
        return units.flops if self._macs else unit_bytes(model, units)

    def _groups(self, model: nn.Module, units: list[Units], scores: Sequence[Tensor]) -> list[Group]:
        groups = []
        for one, score in zip(units, scores, strict=True):
            step = self.round_to if one.kind == "neuron" else 1
            stays = isinstance(model.get_submodule(one.sink), nn.Conv2d)
            groups.append(Group(score, self._cost(model, one), step, min(step, len(one)) if stays else 0))
        return groups

    def _choice(
        self, model: nn.Module, anatomy: Anatomy, units: list[Units], scores: Sequence[Tensor], *, rehearsed: bool = False
    ) -> list[list[int]]:
        """Numbers of the units that go, for each of ``units``, by MACs or bytes, or as counted by ``stay``."""
        groups = self._groups(model, units, scores)
        if self.stay:
            counts = counted(self.stay, units, len(anatomy.blocks), self.name)
            return [sorted(group.ranked[:count]) for group, count in zip(groups, counts, strict=True)]
        total = whole_cost(model, anatomy, macs=self._macs)
        loose = total - sum(group.costs(len(group.scores)) for group in groups)
        try:
            return choose(groups, loose, self._ratio * total)
        except TooSmall as error:
            if rehearsed and self.latency_ratio is not None:
                return choose(groups, loose, error.least * (1 + 1e-9))
            option = "macs" if self.macs is not None else "size_ratio"
            raise self._too_small(option, f"{error.least / total:.4f}", _up(error.least / total)) from None

    def _too_small(self, option: str, least: str, enough: float) -> UserError:
        what = f"{option}: {self._ratio:g} is less than what stays in any case, {least}"
        return UserError(self.name, what, f"Ask for {enough} or more, or let more blocks and parts lose units.")

    def _in_time(self, model: nn.Module, context: Context, units: list[Units], scores: Sequence[Tensor]) -> list[list[int]]:
        """Numbers of the units that go, for each of ``units``, by measured time; tells of it, and how to get the same again."""
        ratio = self.latency_ratio or 1.0
        if context.latency is None:
            raise UserError(self.name, "latency_ratio is measured, and no file can be timed here", f"Write macs: {ratio:g}.")
        signature, example = context.anatomy.traced

        def make(gone: list[list[int]]) -> nn.Module:
            trial = stand_in(model)
            _take_out(trial, Surgery(), signature, example, units, gone)
            return trial

        groups = self._groups(model, units, scores)
        try:
            done, told = chosen_by_time(units, groups, ratio, make, context.latency, context.progress)
        except TooSmall as error:
            raise self._too_small("latency_ratio", f"about {error.least:.3f}", _up(error.least + _NOISE)) from None
        gone = done.chosen.choice
        stay = numbered(units, gone, len(context.anatomy.blocks))
        options = self.model_dump(mode="json", exclude={"latency_ratio", "stay"}, exclude_defaults=True)
        context.report |= {"latency": told, "same_again": {self.name: {"stay": stay, **options}}}
        written = ", ".join(f"{name}: {numbers}" for name, numbers in stay.items()).replace("None", "null")
        again = f"chosen by measured times, which vary between runs; the same units go again with stay: {{{written}}}"
        context.report["warnings"] = [again, *done.cautions]
        return gone


def _take_out(
    model: nn.Module,
    surgery: Surgery,
    signature: Signature,
    example: Batch,
    units: list[Units],
    gone: list[list[int]],
    context: Context | None = None,
) -> None:
    for number, (one, numbers) in enumerate(zip(units, gone, strict=True)):
        if context is not None:
            context.progress(number, len(units), f"{one.kind}s of block {one.block} leave")
        try:
            slice_units(model, surgery, signature, example, one, numbers)
        except UserError as error:
            spare = "heads: false" if one.kind == "head" else "neurons: false"
            raise UserError(error.where, error.what, f"Leave them with {spare}, or skip: [{one.block}].") from error


def _told(units: list[Units], gone: list[list[int]], scores: Sequence[Tensor]) -> dict[str, Any]:
    """What stays in each block, and the scores of what went."""
    return {
        "gone": [
            {
                "block": one.block,
                "kind": one.kind,
                "sink": one.sink,
                "of": len(one),
                "stay": len(one) - len(numbers),
                "units": numbers if one.kind == "head" else len(numbers),
                "score_gone": float(score[numbers].sum()),
                "score_all": float(score.sum()),
            }
            for one, numbers, score in zip(units, gone, scores, strict=True)
        ]
    }


def _up(share: float) -> float:
    """Rounded up to four digits."""
    return -(-int(share * 1e6 + 1) // 100) / 1e4
