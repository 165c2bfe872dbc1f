"""One run of ``drop_layers``: what is measured, what goes, what is put in its place, and what is said about it."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from calibrate.errors import UserError
from calibrate.signature import Batch
from compress.depth.accuracy_driven import Driver
from compress.depth.choice import Candidate, Candidates, measure, one_shot, run_of_blocks
from compress.depth.greedy import Greedy
from compress.depth.output_scores import OutputNoise, choose_by_output, first_rows
from compress.depth.refit import Original, refit
from compress.depth.repair import Judge, finite, keep_constants, parted
from compress.depth.sublayers import Sublayer
from compress.distillation.blocks import distil_blocks
from compress.whereabouts import Whereabouts

if TYPE_CHECKING:
    from compress.passes.contract import Context
    from compress.passes.drop_layers import DropLayers

__all__ = ["Removal"]


class Removal:
    """One run of the pass: what was measured, what goes, and what is said about it."""

    def __init__(self, options: DropLayers, model: nn.Module, context: Context) -> None:
        self.options, self.model, self.context = options, model, context
        self.fit: list[Batch] = []
        self.held: list[Batch] = []
        self.judge: Judge | None = None
        if options.calibrates:
            every = list(context.calibration())
            if not every:
                raise UserError(options.name, "there are no calibration rows", "Name at least one row under data.calibration.")
            self.fit, self.held = parted(every) if options.repairs else (every, [])
            self.judge = Judge(model, context.call, self.held) if options.repairs else None
        self.original = Original(model, context.anatomy) if options.repairs else None
        self.start = len(context.edits)
        self.means: dict[str, Tensor] = {}
        self.kept: list[str] = []
        self.skipped: dict[str, str] = {}
        self.greedy: Greedy | None = None

    def run(self) -> None:
        if self.options.accuracy_driven:
            chosen, scores = self._driven(), dict[str, float]()
        else:
            chosen, scores = self._choose() if self.options.chooses else (self._named(), {})
        sublayers = [one.sublayer for one in chosen if one.sublayer]
        report: dict[str, Any] = {
            "blocks": [one.block.path for one in chosen if not one.sublayer],
            "projections": [site.path for one in sublayers for site in one.sites],
            "norms": [path for one in sublayers for path in (*one.norms, *one.after)],
            "dropped": [_told(one, scores.get(one.key)) for one in chosen],
            "skipped": self.skipped,
        }
        self.context.report |= report
        if self.judge:
            blocks = [one.block.index for one in chosen if not one.sublayer]
            repaired = self._repaired if self.greedy is None else self._allowed
            self.context.report["repair"] = repaired(sublayers, blocks)
        if self.greedy is not None:
            self.context.report["accuracy_driven"] = self.greedy.json()

    def _named(self) -> list[Candidate]:
        anatomy = self.context.anatomy
        blocks = [Candidate(block.path, block) for block in self.options.named_blocks(anatomy)]
        named = self.options.named_sublayers(self.model, anatomy)
        chosen = [*blocks, *(Candidate(one.sink, anatomy.blocks[one.block], one) for one in named)]
        if self.judge and named:
            fit = [one for one in chosen if one.sublayer and not one.sublayer.unfit]
            self._measured(fit, [one.key for one in fit])
        self._gone(chosen)
        return chosen

    def _driven(self) -> list[Candidate]:
        """Those that the validation rows let go; heads may have gone too."""
        options, context = self.options, self.context
        candidates = options.driven_candidates(self.model, context.anatomy)
        self.skipped = options.skips(self.model, context.anatomy)
        if self.judge:
            self._measured(list(candidates.these), [one.key for one in candidates.these])
        judge = context.judge(options.name)
        self.greedy = Greedy(self.model, judge, options.tolerance, options.evaluations, context.progress)
        driver = Driver(
            self.model,
            context,
            self.greedy,
            constant=self.judge is not None,
            heads=options.tries_heads,
            reserved=int(self.judge is not None),
        )
        chosen = driver.run(candidates.these)
        context.report["heads"] = driver.gone
        return chosen

    def _allowed(self, sublayers: list[Sublayer], blocks: list[int]) -> dict[str, Any]:
        """Repairs, and takes it back where the loss on the validation rows rises."""
        assert self.judge is not None
        assert self.original is not None
        assert self.greedy is not None
        behind = [self.model.get_submodule(one.sink) for one in self.original.behind(sublayers, blocks)]
        old = [dict(module._parameters) for module in behind]
        before = self.greedy.now
        self._keep_means(sublayers)
        told = self._repaired(sublayers, blocks)
        if self.kept or told["refitted"]:
            after = self.greedy.finish()
            told |= {"loss_before": before.loss, "loss_after": after.loss}
        if self.greedy.now.loss > before.loss:
            for module, parameters in zip(behind, old, strict=True):
                module._parameters.update(parameters)
            with torch.no_grad():
                for path in self.kept:
                    self.model.get_submodule(path).get_parameter("bias").zero_()
            self.greedy.now = before
            told["undone"] = "the loss on the validation rows was lower without it"
        return told

    def _choose(self) -> tuple[list[Candidate], dict[str, float]]:
        candidates, count = self.options.candidates(self.model, self.context.anatomy)
        self.skipped = candidates.others
        if not count:
            return [], {}
        if self.options.score == "output":
            return self._by_output(candidates, count), {}
        if self.options.method == "consecutive":
            seed = self.context.seed if self.options.score == "random" else None
            chosen, gaps = run_of_blocks(
                self.model, self.context.call, self._rows([*self.fit, *self.held]), candidates, count, seed
            )
            self.context.report["scores"] = [{"blocks": [first, first + count - 1], "similarity": gaps[first]} for first in gaps]
            self._gone(chosen)
            return chosen, {}
        return self._rounds(candidates, count)

    def _by_output(self, candidates: Candidates, count: int) -> list[Candidate]:
        """Those without which the output changes least, and what was measured for it."""
        options, context = self.options, self.context
        batches = first_rows([*self.fit, *self.held], options.rows)
        paths = [block.path for block in context.anatomy.blocks]
        measure = OutputNoise(self.model, context.call, batches, paths, context.progress)
        chosen, told = choose_by_output(measure, candidates, count, options.method)
        context.report |= told
        if self.judge and any(one.sublayer for one in chosen):
            self._measured(chosen, [one.key for one in chosen])
        self._gone(chosen)
        return chosen

    def _rounds(self, candidates: Candidates, count: int) -> tuple[list[Candidate], dict[str, float]]:
        """One round that takes all, or one for each."""
        left = list(candidates.these)
        gone: list[Candidate] = []
        at: dict[str, float] = {}
        drawn = random.Random(self.context.seed)
        chance = {one.key: drawn.random() for one in left}
        where = Whereabouts.of(self.model, [one.block.path for one in left])
        start = len(self.context.edits)
        each = 1 if self.options.method == "iterative" else count
        while len(gone) < count:
            edits = self.context.edits[start:]
            now = [where.after(one.block.path, edits) or "" for one in left]
            similar = self._measured(left, now)
            if similar and not gone:
                self.context.report["scores"] = [_told(one, similar[one.key]) for one in left]
            scores = similar if self.options.score == "similarity" else chance
            fit = [one for one in left if candidates.allowed(gone, one)]
            rest = Candidates(candidates.kind, tuple(fit), {}, candidates.blocks)
            round_ = one_shot(rest, [scores[one.key] for one in fit], each)
            at |= {one.key: similar[one.key] for one in round_ if one.key in similar}
            self._gone(round_, dict(zip([one.key for one in left], now, strict=True)))
            gone += round_
            left = [one for one in left if one not in round_]
        return gone, at

    def _measured(self, left: list[Candidate], paths: list[str]) -> dict[str, float]:
        """Similarities now over all rows, by key; the means, over rows not held out, are kept. Nothing where none is read."""
        if not self.options.calibrates:
            return {}
        call = self.context.call
        sums = measure(self.model, call, self._rows(self.fit), left, paths)
        self.means |= {one.key: total.mean for one, total in zip(left, sums, strict=True) if total.mean is not None}
        for total, more in zip(sums, measure(self.model, call, self.held, left, paths), strict=True):
            total.tokens += more.tokens
            total.cosine += more.cosine
        return {one.key: total.similarity for one, total in zip(left, sums, strict=True)}

    def _rows(self, batches: list[Batch]) -> Iterator[Batch]:
        done = 0
        total = sum(next(iter(batch.values())).shape[0] for batch in batches)
        for batch in batches:
            yield batch
            done += next(iter(batch.values())).shape[0]
            self.context.progress(done, total, "similarity")

    def _gone(self, chosen: list[Candidate], now: dict[str, str] | None = None) -> None:
        """Takes the chosen out, the constants that help put in their place."""
        sublayers = [one.sublayer for one in chosen if one.sublayer]
        blocks = [(now or {}).get(one.key, one.block.path) for one in chosen if not one.sublayer]
        self.options.take_out_parts(self.model, self.context.surgery, blocks, sublayers)
        self._keep_means(sublayers)

    def _keep_means(self, sublayers: list[Sublayer]) -> None:
        if self.judge:
            means = {one.constant: self.means[one.sink] for one in sublayers if one.constant and one.sink in self.means}
            self.kept += keep_constants(self.model, self.judge, means)

    def _repaired(self, sublayers: list[Sublayer], blocks: list[int]) -> dict[str, Any]:
        assert self.judge is not None
        assert self.original is not None
        after = self.judge.sqnr_db(self.model)
        bare = self._without() if self.kept else after
        behind = self.original.behind(sublayers, blocks)
        rows, edits = (self.fit, self.held), self.context.edits[self.start :]
        refitted = refit(self.model, self.context.call, self.original, behind, edits, rows, self.judge, self.context.progress)
        after = self.judge.sqnr_db(self.model) if refitted else after
        places = [one.constant for one in sublayers if one.constant]
        told: dict[str, Any] = {"rows": self.judge.rows, "sqnr_db_before": finite(bare), "sqnr_db_after": finite(after)}
        no_place = [one.sink for one in sublayers if not one.constant]
        told |= {"refitted": refitted}
        if self.options.distill and edits:
            first = min([one.block for one in sublayers] + [number - 1 for number in blocks])
            told["distillation"] = self._distilled(first)
        return {**told, "constants": self.kept, "not_better": [p for p in places if p not in self.kept], "no_place": no_place}

    def _distilled(self, first: int) -> dict[str, Any]:
        """Trains the blocks that are left, from the given one on."""
        assert self.original is not None
        edits = self.context.edits[self.start :]
        whole = [block.path for block in self.context.anatomy.blocks]
        where = Whereabouts.of(self.original.model, whole)
        left = {now: path for path in whole if (now := where.after(path, edits)) is not None}
        trained = [now for now, path in left.items() if whole.index(path) >= first]
        rows = (self.fit, self.held)
        return distil_blocks(self.model, self.original.model, self.context, rows, self.options.distill, left, trained)

    def _without(self) -> float:
        """The level on the held-out rows with all constants at zero."""
        assert self.judge is not None
        biases = [self.model.get_submodule(path).get_parameter("bias") for path in self.kept]
        values = [bias.detach().clone() for bias in biases]
        with torch.no_grad():
            for bias in biases:
                bias.zero_()
            level = self.judge.sqnr_db(self.model)
            for bias, value in zip(biases, values, strict=True):
                bias.copy_(value)
        return level


def _told(one: Candidate, similarity: float | None) -> dict[str, Any]:
    told: dict[str, Any] = {"block": one.block.index, "part": one.part, "path": one.key}
    return told if similarity is None else {**told, "similarity": similarity}
