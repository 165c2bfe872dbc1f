"""One run of ``fuse_layers``: which block goes, what its neighbours learn of it, and what is said about it."""

from __future__ import annotations

import math
import random
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from calibrate.errors import UserError
from calibrate.signature import Batch
from compress.algorithms.similarity import first_allowed
from compress.depth.choice import Candidate
from compress.depth.grafts import BASE, COEFFICIENTS, Graft, grafting, influences, neighbours, pairs, passing
from compress.depth.repair import Judge, finite, parted
from compress.depth.sublayers import shorten
from compress.distillation.training import Course, Lesson, Taught, distil
from compress.whereabouts import Whereabouts

if TYPE_CHECKING:
    from compress.passes.contract import Context
    from compress.passes.fuse_layers import FuseLayers

__all__ = ["LEAST_ROWS", "Fusion"]

LEAST_ROWS = 8
_INFLUENCE_ROWS = 32
"""Rows that the influence is measured on (as the published code does)."""
_CHECKS = 10


@dataclass
class _Trial:
    """One block without which the model was tried.

    Attributes:
        grafts: what was learnt, by path of the layer; empty where plain dropping was better.
        skipped: layers that nothing was injected into, with the reason.
        dropped, fused: how near the model's output on held-out rows is to the float model's, in dB.
    """

    one: Candidate
    group: list[str]
    grafts: dict[str, Graft]
    skipped: dict[str, str]
    taught: Taught
    dropped: float
    fused: float

    @property
    def kept(self) -> bool:
        return self.taught.best_step > 0 and self.fused > self.dropped

    @property
    def level(self) -> float:
        return self.fused if self.kept else self.dropped


class Fusion:
    """One run of the pass."""

    def __init__(self, options: FuseLayers, model: nn.Module, context: Context) -> None:
        self.options, self.model, self.context = options, model, context
        self.candidates, self.count = options.choice(model, context.anatomy)
        every: list[Batch] = list(context.calibration()) if self.count else []
        rows = sum(next(iter(batch.values())).shape[0] for batch in every)
        if self.count and rows < LEAST_ROWS:
            what = f"{rows} calibration rows are too few to learn from some and judge on others"
            raise UserError(options.name, what, f"Give at least {LEAST_ROWS} rows under data.calibration.")
        self.fit, self.held = parted(every)
        self.judge = Judge(model, context.call, self.held)
        self.where = Whereabouts.of(model, [block.path for block in context.anatomy.blocks])
        self.start = len(context.edits)
        self.drawn = random.Random(context.seed)

    def run(self) -> None:
        gone: list[Candidate] = []
        rounds: list[dict[str, Any]] = []
        report = self.context.report
        report |= {"blocks": [], "rounds": rounds, "skipped": self.candidates.others, "held_rows": self.judge.rows}
        while len(gone) < self.count:
            scores = self._scores(gone)
            left = {one: scores[one.key] for one in self.candidates.these if one not in gone}
            allowed = {one: score for one, score in left.items() if self.candidates.allowed(gone, one)}
            best, levels = self._best(first_allowed(allowed, self._tries), len(gone))
            rounds.append(self._told(best, scores, levels))
            self._taken(best)
            gone.append(best.one)
            report["blocks"].append(best.one.key)
        if gone:
            report["output_sqnr_db"] = finite(self.judge.sqnr_db(self.model))

    def _best(self, these: list[Candidate], number: int) -> tuple[_Trial, dict[str, float]]:
        """The trial that leaves the model's output nearest to the float model's, and how near each one leaves it."""
        best = self._tried(these[0], number, 0)
        levels = {best.one.key: best.level}
        for attempt, one in enumerate(these[1:], 1):
            trial = self._tried(one, number, attempt)
            levels[one.key] = trial.level
            best = trial if trial.level > best.level else best
        return best, levels

    @property
    def _tries(self) -> int:
        return self.options.candidates if self.options.score == "influence" else 1

    def _now(self, path: str) -> str | None:
        return self.where.after(path, self.context.edits[self.start :])

    def _scores(self, gone: list[Candidate]) -> dict[str, float]:
        """The influence of each block that is left, as a cosine, by its path in the float model; or random numbers."""
        if self.options.score == "random":
            return {one.key: self.drawn.random() for one in self.candidates.these}
        asked = {one.key: now for one in self.candidates.these if (now := self._now(one.key))}
        progress = self._progress(len(gone))
        found = influences(self.model, self.context.call, self._few(), self._blocks(), list(asked.values()), progress)
        return {path: found[now] for path, now in asked.items()}

    def _blocks(self) -> list[str]:
        """Where the blocks are that are left."""
        return [now for block in self.context.anatomy.blocks if (now := self._now(block.path))]

    def _few(self) -> list[Batch]:
        few, rows = [], _INFLUENCE_ROWS
        for batch in self.fit:
            part = {name: tensor[:rows] for name, tensor in batch.items()}
            size = next(iter(part.values())).shape[0]
            few += [part] if size else []
            rows -= size
        return few

    def _progress(self, number: int) -> Any:
        return lambda done, total, what: self.context.progress(done, total, f"block {number + 1} of {self.count}: {what}")

    def _tried(self, one: Candidate, number: int, attempt: int) -> _Trial:
        """Trains the group of a block without it; the model is as it was after, and what was learnt is in the grafts."""
        now = self._now(one.key) or ""
        near = {path: block for block in self._group(one) if (path := self._now(block.path))}
        stays = {path: block for path, block in near.items() if path != now}
        found = pairs(self.model, one.block, now, stays)
        generator = torch.Generator().manual_seed((self.context.seed * 1009 + number) * 1009 + attempt)
        grafts = {
            pair.own: Graft(
                self.model.get_submodule(pair.own), self.model.get_submodule(pair.other), self.options.rank, generator
            )
            for pair in found
            if not pair.obstacle
        }
        rows, call = (self.fit, self.held), self.context.call
        lesson = Lesson(self.model, call, rows, [list(near)[-1]], step=self.options.rows_per_step)
        if lesson.left_out and lesson.left_out not in self.context.report.get("warnings", ()):
            self.context.report.setdefault("warnings", []).append(lesson.left_out)
        with ExitStack() as stack:
            stack.enter_context(passing(self.model.get_submodule(now)))
            stack.enter_context(grafting(self.model, grafts))
            dropped = self.judge.sqnr_db(self.model)
            progress = self._progress(number)
            taught = distil(self.model, call, lesson, self._rates(grafts), self._blocks(), self._course(number), progress)
            fused = self.judge.sqnr_db(self.model) if taught.best_step else dropped
        skipped = {pair.own: pair.obstacle for pair in found if pair.obstacle}
        return _Trial(one, [block.path for block in near.values()], grafts, skipped, taught, dropped, fused)

    def _group(self, one: Candidate) -> list[Any]:
        """The block with its neighbours among those that are left."""
        left = [block for block in self.context.anatomy.blocks if self._now(block.path)]
        return neighbours(one.block, left, self.options.group)

    def _rates(self, grafts: dict[str, Graft]) -> dict[str, float]:
        rates: dict[str, float] = {}
        for path, graft in grafts.items():
            for names, rate in ((BASE, self.options.rate), (COEFFICIENTS, self.options.coefficient_rate)):
                rates |= {f"{path}.{name}": rate for name in names if rate and graft._parameters[name] is not None}
        return rates

    def _course(self, number: int) -> Course:
        options = self.options
        seed = self.context.seed * 1009 + number
        return Course(epochs=options.epochs, steps=options.steps, rows=options.rows_per_step, checks=_CHECKS, seed=seed)

    def _taken(self, trial: _Trial) -> None:
        """Folds what was learnt, and takes the block out."""
        if trial.kept:
            for graft in trial.grafts.values():
                graft.fold()
        now = self._now(trial.one.key) or ""
        container, _, name = now.rpartition(".")
        position = list(dict(self.model.get_submodule(container).named_children())).index(name)
        shorten(self.model, self.context.surgery, container, [position])

    def _told(self, trial: _Trial, scores: dict[str, float], levels: dict[str, float]) -> dict[str, Any]:
        said: dict[str, Any] = {"block": trial.one.block.index, "path": trial.one.key, "group": trial.group}
        if self.options.score == "influence":
            said["similarity_without"] = scores
        if len(levels) > 1:
            said["tried"] = [{"path": path, "output_sqnr_db": finite(level)} for path, level in levels.items()]
        said |= {"injected": len(trial.grafts), "not_injected": trial.skipped, "training": trial.taught.json()}
        said |= {"output_sqnr_db_dropped": finite(trial.dropped), "output_sqnr_db_fused": finite(trial.fused)}
        return said | {"kept": trial.kept, **({} if trial.kept else {"because": _because(trial)})}


def _because(trial: _Trial) -> str:
    if not trial.grafts:
        return "no layer of its group has one of the same shape in the block that went"
    if not trial.taught.best_step:
        return "no step was better than dropping" if trial.dropped < math.inf else "dropping changes nothing"
    return "the model's output came no nearer"
