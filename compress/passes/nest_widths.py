"""Units sorted by importance, so that every width is a prefix: one saved model yields many sizes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from calibrate.errors import UserError
from calibrate.modes import frozen
from compress.anatomy import Anatomy
from compress.passes.contract import Context, Pass, Target
from compress.width.nested import Layout, Nested, SortedUnits, layout_of, rounded
from compress.width.permuting import reorder
from compress.width.unit_costs import unit_bytes, whole_cost
from compress.width.unit_scores import scored
from compress.width.units import Units, Unseparable, find_units

__all__ = ["NestWidths"]


class NestWidths(Pass):
    """Sort the neurons of every MLP, and the heads of every attention, by importance: the model computes what it did.

    MatFormer (Devvrit et al. 2023, arXiv 2310.07707, sec. 3) trains nested feed-forward blocks whose smaller versions are
    prefixes of the larger ones, and mixes widths over the blocks (Mix'n'Match). This is what is left of it without training: a
    permutation of hidden units, most important first by the score of ``prune_width``. The run keeps the sorted model and the
    importance of every unit in its folder ``nested``; ``compress extract`` cuts prefixes out of it at any width, per block or
    under a budget, without scoring again. Query heads that share keys and values move together. A part whose units cannot be
    told apart, or whose function a permutation would change, stays as it is and is named.
    """

    name: ClassVar[str] = "nest_widths"
    source: ClassVar[str] = "Devvrit et al. 2023, arXiv 2310.07707"
    needs_calibration: ClassVar[bool] = True
    nests: ClassVar[bool] = True

    heads: bool = Field(True, description="Whether attention heads are sorted too, so that they can be cut.")
    score: Literal["trajectory", "magnitude", "random"] = Field(
        "trajectory", description="How units are ranked; magnitude looks at weights only, random is a control."
    )
    rows: int = Field(64, ge=1, description="Calibration rows that units are scored on.")

    @model_validator(mode="after")
    def _whole(self) -> NestWidths:
        if self.score != "trajectory" and "rows" in self.chosen:
            raise ValueError(f"rows goes with score: trajectory\nTake rows out, or score: {self.score}.")
        return self

    @property
    def calibrates(self) -> bool:
        return self.score == "trajectory"

    def targets(self, model: nn.Module, anatomy: Anatomy) -> list[Target]:
        found = []
        for units in self._units(model, anatomy)[0]:
            for path in (*units.rows, units.sink):
                roles = next((site.roles for site in anatomy.sites if site.path == path), ())
                found.append(Target(path, ", ".join(roles), f"{units.kind}s sorted"))
        return found

    def skips(self, model: nn.Module, anatomy: Anatomy) -> dict[str, str]:
        return self._units(model, anatomy)[1]

    def rehearse(self, model: nn.Module, anatomy: Anatomy, surgery: object) -> None:
        """Shapes and bytes stay."""

    def run(self, model: nn.Module, context: Context) -> nn.Module:
        anatomy = context.anatomy
        units, skipped = self._units(model, anatomy)
        signature, example = anatomy.traced
        done: list[SortedUnits] = []
        levels: list[float] = []
        with frozen(model):
            scores = scored(model, context, units, self.score, self.rows)
            for number, (one, score) in enumerate(zip(units, scores, strict=True)):
                context.progress(number, len(units), f"{one.kind}s of block {one.block} are sorted")
                order = torch.argsort(score, descending=True, stable=True).tolist()
                try:
                    levels.append(reorder(model, signature, example, one, order))
                except UserError as error:
                    skipped[f"{anatomy.blocks[one.block].path} ({one.kind}s)"] = error.what
                    continue
                done.append(_described(model, one, order, score))
        if not done:
            path, reason = next(iter(skipped.items()))
            raise UserError(self.name, "nothing could be sorted", f"{path}: {reason}.")
        context.nested = Nested(
            fingerprint=context.fingerprint,
            score=self.score,
            blocks_flops=whole_cost(model, anatomy, macs=True),
            model_bytes=whole_cost(model, anatomy, macs=False),
            units=tuple(done),
            skipped=skipped,
        )
        nearest = min(levels)
        context.report |= {
            "sorted": [_told(one) for one in done],
            "sqnr_db": nearest if nearest < float("inf") else None,
            "skipped": skipped,
        }
        return model

    def _units(self, model: nn.Module, anatomy: Anatomy) -> tuple[list[Units], dict[str, str]]:
        """Units that can be sorted, and why those of other blocks cannot, by path.

        Raises:
            UserError: there is none.
        """
        signature, example = anatomy.traced
        with frozen(model):
            found = [one for one in find_units(model, signature, anatomy, example) if one.kind == "neuron" or self.heads]
        units = [one for one in found if isinstance(one, Units) and not _uneven(one)]
        told = dict(_reasons(found))
        skipped = {f"{anatomy.blocks[block].path} ({kind}s)": why for (block, kind), why in told.items()}
        if not units:
            reason = next((f"{path}: {why}." for path, why in skipped.items()), "See what it has with: compress inspect.")
            raise UserError(self.name, "no block has units that can be sorted", reason)
        return units, skipped


def _reasons(found: list[Units | Unseparable]) -> Iterator[tuple[tuple[int, str], str]]:
    for one in found:
        if isinstance(one, Unseparable):
            yield (one.block, one.kind), one.reason
        elif _uneven(one):
            yield (one.block, one.kind), "their channels are not evenly spaced"


def _uneven(units: Units) -> bool:
    return any(layout_of(channels) is None for channels in (units.columns, *units.rows.values()))


def _described(model: nn.Module, units: Units, order: list[int], score: Tensor) -> SortedUnits:
    return SortedUnits(
        block=units.block,
        kind=units.kind,
        sink=units.sink,
        columns=_layout(units.columns),
        rows={path: _layout(rows) for path, rows in units.rows.items()},
        heads=units.heads,
        flops=units.flops,
        size_bytes=unit_bytes(model, units),
        order=tuple(order),
        importance=rounded(score[order]),
    )


def _layout(channels: Tensor) -> Layout:
    found = layout_of(channels)
    assert found is not None
    return found


def _told(units: SortedUnits) -> dict[str, object]:
    """For the report: how much of the importance lies in the first half."""
    whole = sum(units.importance)
    half = sum(units.importance[: len(units) // 2])
    return {
        "block": units.block,
        "kind": units.kind,
        "sink": units.sink,
        "units": len(units),
        "importance_of_first_half": half / whole if whole else 1.0,
    }
