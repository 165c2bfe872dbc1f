"""What the passes that take tokens out have in common: the options of a schedule, what is refused, and what is told."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field, PositiveInt, model_validator
from torch import nn

from calibrate.errors import UserError
from compress.anatomy import Anatomy
from compress.layers.token_reducer import Place
from compress.passes.contract import Context, Pass, Target
from compress.surgery import Surgery
from compress.tokens.attaching import attach, place_of, touched
from compress.tokens.layout import Layout, find_layout
from compress.tokens.pictures import longest, pictures
from compress.tokens.schedule import How, Schedule, check, from_reduce, shares
from compress.tokens.search import Found, Problem, by_flops, by_time, even

__all__ = ["TokenPass"]

_STRENGTHS = ("keep", "reduce", "share", "flops", "latency_ratio")


class TokenPass(Pass):
    """Options of a schedule. A subclass says how tokens are chosen (``how``)."""

    fixes: ClassVar[tuple[str, ...]] = ("tokens",)

    keep: dict[int, PositiveInt] = Field(
        {},
        description="Tokens that are left after a block, by its number: {2: 48, 4: 32}. Name one of the first five options.",
        json_schema_extra={"propertyNames": {"pattern": "^-?[0-9]+$"}},
    )
    reduce: int | list[int] = Field(
        0, description="Tokens that each block takes out: one number for all (fewer where fewer can go), or one for each block."
    )
    share: float | None = Field(None, gt=0, lt=1, description="Share of its tokens that each of `blocks` hands on.")
    flops: float | None = Field(
        None, gt=0, le=1, description="Share of the model's FLOPs that stays; which blocks take tokens out is searched."
    )
    latency_ratio: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Share of the time that stays of the model as it is at this pass: measured in the first format that can be "
        "timed here.",
    )
    enter: PositiveInt | None = Field(
        None, description="Tokens that the first block gets: padded ones go first, then those at the end; for padded text."
    )
    blocks: list[int] = Field([], description="Numbers of the blocks that may take tokens out, -1 is the last; none named: all.")
    protect: int | None = Field(
        None, ge=0, le=64, description="Tokens at the start that stay; null: the class tokens that the head reads."
    )
    separators: list[int] | None = Field(
        None, description="Token ids that stay, such as [102]; null: the one that all rows end with. [] protects none."
    )
    rows: int = Field(128, ge=1, description="Calibration rows that schedules are compared on.")

    @model_validator(mode="after")
    def _one_strength(self) -> TokenPass:
        given = [name for name in _STRENGTHS if getattr(self, name) not in (None, {}, 0, [])]
        if len(given) > 1 or not (given or self.enter):
            raise ValueError("name one of keep, reduce, share, flops and latency_ratio\nFor example flops: 0.7")
        counts = [self.reduce] if isinstance(self.reduce, int) else self.reduce
        if min(counts, default=0) < 0:
            raise ValueError("reduce: a block cannot take out fewer than 0 tokens\nWrite 0 where none go.")
        if self.blocks and self.keep:
            raise ValueError("blocks does not go with keep, which says where tokens leave\nTake one of them out.")
        if "rows" in self.chosen and not self._searches:
            raise ValueError("rows goes with flops and latency_ratio\nTake it out.")
        return self

    def how(self, layout: Layout, seed: int = 0) -> How:
        """How this pass chooses tokens."""
        raise NotImplementedError

    @property
    def _searches(self) -> bool:
        return self.flops is not None or self.latency_ratio is not None

    @property
    def calibrates(self) -> bool:
        return self._searches

    @property
    def timed(self) -> str:
        return "" if self.latency_ratio is None else f"latency_ratio, flops: {self.latency_ratio:g}"

    @property
    def assumes(self) -> str:
        if not self._searches:
            return ""
        measured = (
            "" if self.latency_ratio is None else f", and what it takes is measured; planned as flops: {self.latency_ratio:g}"
        )
        return f"which blocks take tokens out is searched by the run{measured}"

    def targets(self, model: nn.Module, anatomy: Anatomy) -> list[Target]:
        layout, how, place = self._found(model, anatomy)
        schedule = self._planned(anatomy, layout, how, place)
        counts = dict(zip(layout.numbers, schedule.after(layout), strict=True))
        named = {block.index: block.path for block in layout.blocks}
        found = []
        verb = "merges" if how.merges else "prunes"
        stations = touched(layout, schedule, how)
        if how.separators and stations:
            found.append(Target(layout.ids, "embedding", "tells where separators are"))
        for number, kept in stations.items():
            given, then = counts[number]
            action = f"{verb} {given} tokens to {then}" if kept is not None else "gets masks and sizes for fewer tokens"
            if self.enter and number == layout.numbers[0]:
                action = f"enters with {given} of {layout.tokens} tokens; {action}"
            found.append(Target(named[number], "block", action))
        return found

    def rehearse(self, model: nn.Module, anatomy: Anatomy, surgery: Surgery) -> None:
        layout, how, place = self._found(model, anatomy)
        attach(model, surgery, layout, self._planned(anatomy, layout, how, place), how, place)

    def run(self, model: nn.Module, context: Context) -> nn.Module:
        anatomy = context.anatomy
        layout, how, place = self._found(model, anatomy, context.seed)
        schedule = self._planned(anatomy, layout, how, place)
        if self._searches:
            found = self._searched(model, context, layout, how, place)
            schedule = found.schedule
            context.report |= found.json()
        attach(model, context.surgery, layout, schedule, how, place)
        context.report |= self._told(context, layout, schedule, how, place)
        signature, example = anatomy.traced
        shown = longest(context.calibration(), example)
        context.report["pictures"] = pictures(model, signature, shown, _places(layout, schedule))
        return model

    def _searched(self, model: nn.Module, context: Context, layout: Layout, how: How, place: Place) -> Found:
        problem = self._problem(model, context, layout, how, place)
        if self.flops is not None:
            return by_flops(problem, context, self.flops, self.rows)
        if context.latency is None or self.latency_ratio is None:
            raise UserError(
                self.name, "latency_ratio is measured, and no file can be timed here", f"Write flops: {self.latency_ratio:g}."
            )
        return by_time(problem, context, self.latency_ratio, self.rows)

    def problem(self, model: nn.Module, context: Context) -> Problem:
        """What a search over the blocks of this pass starts from: the blocks, how tokens are chosen, what a schedule costs.

        Raises:
            UserError: tokens cannot leave the model.
        """
        return self._problem(model, context, *self._found(model, context.anatomy, context.seed))

    def _problem(self, model: nn.Module, context: Context, layout: Layout, how: How, place: Place) -> Problem:
        return Problem(self.name, model, context.anatomy, layout, how, place, self._numbers(layout), self.enter)

    def _told(self, context: Context, layout: Layout, schedule: Schedule, how: How, place: Place) -> dict[str, Any]:
        return {
            "tokens": [
                {"block": number, "given": given, "handed_on": then}
                for number, (given, then) in zip(layout.numbers, schedule.after(layout), strict=True)
            ],
            "keep": schedule.json(),
            "flops_share": shares(layout, context.anatomy, schedule, how, place),
            "protected": how.prefix,
            "separators": list(how.separators),
            "place": place,
        }

    def _found(self, model: nn.Module, anatomy: Anatomy, seed: int = 0) -> tuple[Layout, How, Place]:
        """Where tokens can leave, how they are chosen, and where in a block they go.

        Raises:
            UserError: they cannot.
        """
        layout = find_layout(self.name, model, anatomy)
        how = self.how(layout, seed)
        self._fits(layout, how)
        return layout, how, place_of(self.name, model, anatomy, layout, how)

    def _fits(self, layout: Layout, how: How) -> None:
        if how.merges and layout.causal:
            raise UserError(
                self.name,
                "its tokens see only those before them, and a merged token would stand at two places",
                "Use prune_tokens, or leave tokens alone in a causal model.",
            )
        if layout.per_token and not how.merges:
            hint = (
                "merge_tokens gives every position the token that it was merged into."
                if not layout.causal
                else ("Tokens of a causal language model cannot leave.")
            )
            raise UserError(self.name, "the model gives one output for each token, and pruned ones have none", hint)
        if how.separators and not layout.ids:
            raise UserError(self.name, "separators: no embedding that reads token ids was found", "Take separators out.")
        if self.enter is not None and not layout.masked:
            raise UserError(self.name, "enter takes padded tokens out, and this model gets no mask", "Take enter out.")

    def _numbers(self, layout: Layout) -> list[int]:
        """Numbers of the blocks that may take tokens out."""
        count = layout.numbers[-1] + 1
        for number in self.blocks:
            if number not in layout.numbers and number + count not in layout.numbers:
                there = f"There are {len(layout.numbers)}: {layout.numbers[0]} to {layout.numbers[-1]}."
                raise UserError(self.name, f"blocks: there is no block {number}", there)
        return sorted({number % count for number in self.blocks}) or layout.numbers

    def _planned(self, anatomy: Anatomy, layout: Layout, how: How, place: Place) -> Schedule:
        """The schedule as far as it is known without data."""
        numbers = self._numbers(layout)
        if self.flops is not None or self.latency_ratio is not None:
            ratio = self.flops or self.latency_ratio or 1.0
            problem = Problem(self.name, nn.Identity(), anatomy, layout, how, place, numbers, self.enter)
            schedule = even(problem, ratio)
        elif self.share is not None:
            now, keep = self.enter or layout.tokens, {}
            for number in [number for number in layout.numbers if number in numbers]:
                now = keep[number] = max(round(now * self.share), how.prefix + 1, 2)
            schedule = Schedule(keep, self.enter)
        elif self.keep or not self.reduce:
            schedule = Schedule(dict(self.keep), self.enter)
        else:
            schedule = from_reduce(self.name, self.reduce, layout, numbers, how)
            schedule = Schedule(schedule.keep, self.enter)
        check(self.name, schedule, layout, how.prefix, how.merges)
        return schedule


def _places(layout: Layout, schedule: Schedule) -> list[int]:
    """Numbers of the blocks at which tokens leave, the first twice where they leave before it too."""
    counts = zip(layout.numbers, schedule.after(layout), strict=True)
    entered = [layout.numbers[0]] if schedule.enter and schedule.enter < layout.tokens else []
    return entered + [number for number, (given, then) in counts if then < given]
