"""Narrower blocks: attention heads and MLP neurons taken out under a budget."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from calibrate.errors import UserError
from calibrate.modes import frozen
from calibrate.signature import Batch, Signature
from compress.anatomy import Anatomy, find
from compress.passes.contract import Context, Pass, Target
from compress.rehearsal import stand_in
from compress.slicing import slice_units
from compress.surgery import Surgery
from compress.unit_costs import unit_bytes, whole_cost
from compress.unit_scores import scored
from compress.units import Units, Unseparable, find_units
from compress.width_repair import repair_behind
from compress.width_search import Group, TooSmall, choose

__all__ = ["PruneWidth"]


class PruneWidth(Pass):
    """Take out the attention heads and MLP neurons that are missed least, until the blocks fit a budget.

    OPTIN (Khaki & Plataniotis 2024, arXiv 2403.17921): a unit's score is its trajectory error, the change of the outputs of the
    blocks from its own on and of the logits when it is switched off (sec. 3.2); units are ranked over all blocks by score per
    cost, and the cheapest set that meets the budget goes (sec. 3.3). The paper's code weights heads and neurons by their number
    in the layer; this does not. Units leave for good: the weights get smaller, an emptied sublayer keeps its bias only. Query
    heads that share keys and values go together. What is left is repaired without labels: each following projection gets the
    least-squares weights for the outputs it had before, first block first, kept where held-out calibration rows agree.
    """

    name: ClassVar[str] = "prune_width"
    source: ClassVar[str] = "Khaki & Plataniotis 2024, arXiv 2403.17921"
    needs_calibration: ClassVar[bool] = True

    macs: float | None = Field(
        None, gt=0, le=1, description="Share of the blocks' multiply-accumulates that stays. Name this or size_ratio."
    )
    size_ratio: float | None = Field(None, gt=0, le=1, description="Share of the model's bytes in memory that stays.")
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

    @model_validator(mode="after")
    def _whole(self) -> PruneWidth:
        if (self.macs is None) == (self.size_ratio is None):
            raise ValueError("name one of macs and size_ratio\nFor example macs: 0.7")
        if not (self.heads or self.neurons):
            raise ValueError("heads and neurons are both false: nothing may go\nLeave one of them true.")
        return self

    @property
    def calibrates(self) -> bool:
        return self.score == "trajectory" or self.repair

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
        gone = self._choice(model, anatomy, units, alike)
        signature, example = anatomy.traced
        _take_out(model, surgery, signature, example, units, gone)

    def run(self, model: nn.Module, context: Context) -> nn.Module:
        anatomy = context.anatomy
        if self._ratio == 1:
            self._numbers(anatomy)
            context.report |= {"gone": [], "kept_share": 1.0, "skipped": {}}
            return model
        units, skipped = self._units(model, anatomy)
        whole = whole_cost(model, anatomy, macs=self.macs is not None)
        with frozen(model):
            scores = scored(model, context, units, self.score, self.rows)
            gone = self._choice(model, anatomy, units, scores)
            original = stand_in(model) if self.repair else None
            signature, example = anatomy.traced
            _take_out(model, context.surgery, signature, example, units, gone, context)
            context.report |= _told(units, gone, scores) | {"skipped": skipped}
            if original is not None:
                touched = [one.sink for one, numbers in zip(units, gone, strict=True) if numbers]
                context.report["repair"] = repair_behind(model, original, context, touched)
            after = find(model, signature, example) if self.macs is not None else anatomy
            context.report["kept_share"] = whole_cost(model, after, macs=self.macs is not None) / whole
        return model

    @property
    def _ratio(self) -> float:
        return self.macs if self.macs is not None else self.size_ratio or 1.0

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
        return units.flops if self.macs is not None else unit_bytes(model, units)

    def _choice(self, model: nn.Module, anatomy: Anatomy, units: list[Units], scores: Sequence[Tensor]) -> list[list[int]]:
        groups = []
        for one, score in zip(units, scores, strict=True):
            step = self.round_to if one.kind == "neuron" else 1
            stays = isinstance(model.get_submodule(one.sink), nn.Conv2d)
            groups.append(Group(score, self._cost(model, one), step, min(step, len(one)) if stays else 0))
        total = whole_cost(model, anatomy, macs=self.macs is not None)
        loose = total - sum(len(group.scores) * group.cost for group in groups)
        try:
            return choose(groups, loose, self._ratio * total)
        except TooSmall as error:
            option = "macs" if self.macs is not None else "size_ratio"
            least = error.least / total
            what = f"{option}: {self._ratio:g} is less than what stays in any case, {least:.4f}"
            raise UserError(self.name, what, f"Ask for {_up(least)} or more, or let more blocks and parts lose units.") from None


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
