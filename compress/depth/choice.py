"""Which blocks or sublayers can be taken out, and which of them are."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from calibrate.errors import UserError
from calibrate.signature import Batch
from compress.algorithms.similarity import Sums, best_run, first_allowed
from compress.anatomy import Anatomy, Block
from compress.depth.stream_scores import measure_runs, measure_sublayers, runs_alike
from compress.depth.sublayers import PARTS, Part, Sublayer, find_sublayers

__all__ = ["Candidate", "Candidates", "find_candidates", "measure", "one_shot", "refuse", "run_of_blocks"]

Call = Callable[[nn.Module, Batch], Tensor]
Kind = Literal["block", "attention", "mlp", "both"]


@dataclass(frozen=True)
class Candidate:
    """A block, or a sublayer of it; ``key`` is the path of the block, or of the sublayer's last projection."""

    key: str
    block: Block
    sublayer: Sublayer | None = None

    @property
    def part(self) -> str:
        return self.sublayer.part if self.sublayer else "block"

    @property
    def parameters(self) -> int:
        return self.sublayer.parameters if self.sublayer else self.block.parameters


@dataclass(frozen=True)
class Candidates:
    """Those that can be taken out, in the model's order, and why others cannot, by path.

    Attributes:
        most: how many can be taken out together.
    """

    kind: Kind
    these: tuple[Candidate, ...]
    others: dict[str, str]
    blocks: tuple[Block, ...]

    @property
    def most(self) -> int:
        return len(first_allowed(dict.fromkeys(self.these, 0.0), len(self.these), self.allowed))

    def allowed(self, chosen: Sequence[Candidate], candidate: Candidate) -> bool:
        """Whether one more may go: a list of blocks keeps at least one."""
        if candidate.sublayer:
            return True
        inside = [block for block in self.blocks if block.container == candidate.block.container]
        gone = [one for one in chosen if one.block.container == candidate.block.container]
        return len(gone) + 1 < len(inside)

    def runs(self, count: int) -> dict[int, list[Candidate]]:
        """Runs of ``count`` neighbours in one list, by where they start, that leave at least one block there."""
        found = {}
        for start in range(len(self.these) - count + 1):
            run = list(self.these[start : start + count])
            first = run[0].block
            near = all(
                one.block.container == first.container and one.block.position == first.position + step
                for step, one in enumerate(run)
            )
            if near and self.allowed(run[1:], run[0]):
                found[start] = run
        return found

    def typical(self, count: int, near: bool) -> list[Candidate]:
        """As many candidates of typical sizes, without data: what a rehearsal takes out."""
        if not count:
            return []
        mean = sum(one.parameters for one in self.these) / max(len(self.these), 1) * count
        if near:
            return min(self.runs(count).values(), key=lambda run: abs(sum(one.parameters for one in run) - mean))
        ranked = sorted(self.these, key=lambda one: one.parameters)
        spread = {ranked[(2 * step + 1) * len(ranked) // (2 * count)]: 1.0 for step in range(count)}
        return first_allowed({one: spread.get(one, 0.0) for one in self.these}, count, self.allowed)


def find_candidates(model: nn.Module, anatomy: Anatomy, kind: Kind) -> Candidates:
    """The blocks, or the sublayers of one kind or both, that a similarity can choose from."""
    found = _blocks(model, anatomy) if kind == "block" else _sublayers(model, anatomy, PARTS if kind == "both" else (kind,))
    return Candidates(kind, tuple(found[0]), found[1], anatomy.blocks)


def measure(
    model: nn.Module, call: Call, batches: Iterable[Batch], left: Sequence[Candidate], paths: Sequence[str]
) -> list[Sums]:
    """The sums of each candidate; ``paths``: where the blocks are now."""
    if left and left[0].sublayer:
        sums = measure_sublayers(model, call, batches, [one.key for one in left])
        return [sums[one.key] for one in left]
    runs = measure_runs(model, call, batches, {number: (path, path) for number, path in enumerate(paths)})
    return [runs[number] for number in range(len(left))]


def one_shot(candidates: Candidates, scores: Sequence[float], count: int) -> list[Candidate]:
    """The candidates with the highest scores, the highest first."""
    return first_allowed(dict(zip(candidates.these, scores, strict=True)), count, candidates.allowed)


def run_of_blocks(
    model: nn.Module, call: Call, batches: Iterable[Batch], candidates: Candidates, count: int, seed: int | None
) -> tuple[list[Candidate], dict[int, float]]:
    """The run of neighbouring blocks that changes the stream least, and the similarity of every run by its first block.

    Args:
        seed: chooses at random instead.
    """
    runs = candidates.runs(count)
    if seed is not None:
        return runs[random.Random(seed).choice(list(runs))], {}
    ends = {start: (run[0].key, run[-1].key) for start, run in runs.items()}
    gaps = {start: sums.similarity for start, sums in measure_runs(model, call, batches, ends).items()}
    return runs[best_run(gaps)], {runs[start][0].block.index: gap for start, gap in gaps.items()}


def refuse(where: str, candidates: Candidates, count: int, near: bool) -> None:
    """Raises if so many cannot be taken out.

    Raises:
        UserError: the model has no such part; there are fewer; a run so long does not exist.
    """
    what = {"block": "blocks", "attention": "attention sublayers", "mlp": "MLP sublayers", "both": "sublayers"}[candidates.kind]
    why = "; ".join(f"{path}: {reason}" for path, reason in list(candidates.others.items())[:3])
    if not candidates.these:
        because = f"no {what} of this model can be taken out" if why else f"this model has no {what}"
        raise UserError(where, because, f"{why}." if why else "See what it has with: compress inspect.")
    if count > candidates.most:
        raise UserError(
            where,
            f"count: {count} {what} are to go, and {candidates.most} can be taken out",
            (f"Not among them: {why}." if why else f"Choose 1 to {candidates.most}.")
            if candidates.kind != "block"
            else f"Choose 1 to {candidates.most}: a list keeps at least one block.{f' Not among them: {why}.' if why else ''}",
        )
    if near and count and not candidates.runs(count):
        raise UserError(where, f"there are no {count} neighbouring blocks that can be taken out", "Choose fewer, or one_shot.")


def _blocks(model: nn.Module, anatomy: Anatomy) -> tuple[list[Candidate], dict[str, str]]:
    listed = [block for block in anatomy.blocks if block.container is not None]
    reasons = {block.path: "it is in no list of blocks" for block in anatomy.blocks if block.container is None}
    signature, example = anatomy.signature, anatomy.example
    if signature is not None and example is not None:
        alike = runs_alike(model, lambda: signature.call(model, example), [block.path for block in listed])
        reasons |= {path: reason for path, reason in alike.items() if reason}
    return [Candidate(block.path, block) for block in listed if block.path not in reasons], reasons


def _sublayers(model: nn.Module, anatomy: Anatomy, parts: Sequence[Part]) -> tuple[list[Candidate], dict[str, str]]:
    found = [sublayer for part in parts for sublayer in find_sublayers(model, anatomy, anatomy.blocks, part)]
    found.sort(key=lambda sublayer: (sublayer.block, PARTS.index(sublayer.part)))
    reasons = {one.sink: one.obstacle or one.unfit for one in found if one.obstacle or one.unfit}
    fit = [Candidate(one.sink, anatomy.blocks[one.block], one) for one in found if one.sink not in reasons]
    return fit, reasons
