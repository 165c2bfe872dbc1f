"""What a model loses when tokens leave at one block alone, for some keep rates: ``compress sensitivity`` of a token pass."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, Field

from calibrate.errors import UserError
from calibrate.inventory import inventory
from compress.checks import placed
from compress.measured_pass import check_setting, reached
from compress.passes.token_schedule import TokenPass
from compress.progress import Progress
from compress.quantization.sensitivity import Reference
from compress.sensitivity_view import Cell, Row, View
from compress.tokens.schedule import Schedule, check
from compress.tokens.search import Problem, reference

if TYPE_CHECKING:
    from compress.recipe import Recipe

__all__ = ["BlockLoss", "KeepLoss", "TokenSensitivity", "make"]

_RATES = {"90 %": 0.9, "75 %": 0.75, "50 %": 0.5, "25 %": 0.25}
_ROWS = 64


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class KeepLoss(_Record):
    """One block that hands on fewer tokens, all others as they are."""

    kept: int = Field(description="tokens that the block hands on")
    flops: float = Field(description="share of the model's FLOPs that stays")
    db: float | None = Field(description="SQNR of the model's outputs; null: nothing is lost")
    noise: float = Field(description="squared error of the outputs over their squares")
    kl: float | None = Field(description="mean divergence of the softmax of the outputs, in nats; null for single scores")
    agreement: float | None = Field(description="share of rows whose largest output stays; null for single scores")


class BlockLoss(_Record):
    """One block."""

    block: int
    path: str
    settings: dict[str, KeepLoss]
    refused: dict[str, str] = Field(description="keep rates that it cannot take, with the reason")


class TokenSensitivity(_Record):
    """The loss of every block at every keep rate. Fields are only ever added to within one version."""

    version: Literal[1] = 1
    name: str
    model: str
    measured: str = Field(description="the pass that chooses the tokens, with its options")
    before: list[str] = Field(description="passes that were carried out first")
    place: str = Field(description="file:line:column of the pass")
    rows: int = Field(description="calibration rows on which losses were measured")
    calibration: int = Field(description="calibration rows that there are")
    tokens: int = Field(description="tokens that the first block gets")
    settings: list[str] = Field(description="shares of its tokens that a block hands on")
    bytes_before: int
    blocks: list[BlockLoss]

    def view(self) -> View:
        """As people read it."""
        return View(
            name=self.name,
            model=self.model,
            before=self.before,
            facts=f"{self.rows} of {self.calibration} calibration rows, no labels",
            title=f"SQNR of the model's outputs in dB when {self.measured} leaves a share of {self.tokens} tokens at one block",
            lede=f"How much of the model’s outputs is kept when {self.measured} leaves that share of the {self.tokens} tokens at "
            "one block and all other blocks hand on what they get; higher is better. FLOPs: what then stays of the model’s.",
            place="block",
            settings=self.settings,
            cost="FLOPs",
            rows=[
                Row(one.path, "", {name: Cell(found.db, f"{found.flops:.1%}") for name, found in one.settings.items()})
                for one in self.blocks
            ],
            total=None,
            notes=self._notes(),
        )

    def _notes(self) -> list[str]:
        everywhere = [name for name in _RATES if all(name in one.refused for one in self.blocks)]
        single = [
            f"{one.path} cannot hand on {name}: {reason}"
            for one in self.blocks
            for name, reason in one.refused.items()
            if name not in everywhere
        ]
        return [*(f"no block can hand on {name}: {self.blocks[0].refused[name]}" for name in everywhere), *single]


def make(
    recipe: Recipe,
    number: int,
    step: TokenPass,
    *,
    trust: bool = False,
    rows: int | None = None,
    by: str | None = None,
    progress: Progress | None = None,
) -> TokenSensitivity:
    """Carries out the passes before a token pass in memory, then lets tokens leave at one block at a time.

    How tokens are chosen, and what is protected, is as the pass says; its schedule is not used, ``blocks`` is.

    Args:
        number, step: the pass.
        trust: whether Python files that the recipe names may be run.
        rows: calibration rows on which losses are measured (default: 64).
        by: a setting that has to be among those that are measured.

    Raises:
        UserError: ``by`` is not among the settings; tokens cannot leave the model; or what would stop the run, with its place.
    """
    progress = progress or Progress()
    check_setting(by, list(_RATES))
    source, model, context = reached(recipe, number, trust, progress)
    with progress.step("the loss of each block"), placed(recipe, "passes", number, step.name):
        problem = step.problem(model, context)
        judge = reference(model, context, rows or _ROWS)
        blocks = []
        for done, block in enumerate(problem.numbers, 1):
            blocks.append(_measured(problem, judge, block))
            context.progress(done, len(problem.numbers), "blocks measured")
    return TokenSensitivity(
        name=recipe.name,
        model=source.name,
        measured=step.name,
        before=[one.name for one in recipe.passes[:number]],
        place=recipe.place("passes", number, step.name),
        rows=judge.rows,
        calibration=context.rows,
        tokens=problem.layout.tokens,
        settings=[name for name in _RATES if any(name in one.settings for one in blocks)],
        bytes_before=sum(entry.bytes for entry in inventory(model).values()),
        blocks=blocks,
    )


def _measured(problem: Problem, judge: Reference, block: int) -> BlockLoss:
    settings: dict[str, KeepLoss] = {}
    refused: dict[str, str] = {}
    for name, rate in _RATES.items():
        schedule = Schedule({block: _kept(problem, rate)})
        try:
            check(problem.where, schedule, problem.layout, problem.how.prefix, problem.how.merges)
        except UserError as error:
            refused[name] = error.what
            continue
        told = judge.loss(problem.made(schedule)).json() | {"kept": schedule.keep[block], "flops": problem.share(schedule)}
        settings[name] = KeepLoss.model_validate(told)
    path = next(one.path for one in problem.layout.blocks if one.index == block)
    return BlockLoss(block=block, path=path, settings=settings, refused=refused)


def _kept(problem: Problem, rate: float) -> int:
    """Tokens at a keep rate; where half of them merge, one or two more stay if the protected ones ask for it."""
    tokens, prefix = problem.layout.tokens, problem.how.prefix
    kept = math.ceil(tokens * rate)
    least = tokens - (tokens - prefix) // 2
    return least if problem.how.merges and kept < least <= kept + prefix + 1 else kept
