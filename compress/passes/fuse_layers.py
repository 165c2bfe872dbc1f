"""Blocks go, and what they knew goes into their neighbours."""

from __future__ import annotations

import math
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator
from torch import nn

from calibrate.errors import UserError
from compress.anatomy import Anatomy
from compress.depth.choice import Candidates, find_candidates, refuse
from compress.depth.fusion import Fusion
from compress.depth.grafts import neighbours, pairs
from compress.depth.sublayers import shorten
from compress.passes.contract import Context, Pass, Target
from compress.surgery import Surgery

__all__ = ["FuseLayers"]


class FuseLayers(Pass):
    """Take out the blocks that the model's last hidden state hangs on least, and graft their weights onto their neighbours.

    FuseGPT (arXiv 2411.14507). One block after another: its influence is one minus the mean over tokens of the cosine between
    what the last block gives with it and without it, measured anew for each (sec. 3.2). Every linear layer of the other blocks
    in its group becomes W + B A + (C1 C2) * W_out, with W_out the layer of the same name in the block that goes, and its bias
    b + c * b_out (sec. 3.3). Only these low-rank factors are trained, on calibration rows without labels, until the group
    gives what it gave before: the squared error of the stream behind it, over its mean square, since a divergence over
    features of a hidden state means nothing. They begin as plain dropping, exactly; the state that is best on held-out rows
    is folded into plain layers, and stays only where the model's own output comes nearer to the float model's than by
    dropping. A layer whose shape differs from that of its namesake is left as it is, and named.

    What is left is a plain, shorter model; positions for key-value caches and counts in its config are put right.
    """

    name: ClassVar[str] = "fuse_layers"
    source: ClassVar[str] = "Pei et al. 2024, FuseGPT, arXiv 2411.14507"
    needs_calibration: ClassVar[bool] = True

    blocks: list[int] = Field([], description="Numbers of the blocks that go, instead of a choice; -1 is the last.")
    count: Annotated[int, Field(gt=0)] | None = Field(None, description="How many go; the influence chooses which.")
    ratio: Annotated[float, Field(ge=0.0, lt=1.0)] | None = Field(
        None, description="The share that goes, rounded up; 0.25 where neither blocks nor count is given."
    )
    score: Literal["influence", "random"] = Field("influence", description="random: a seeded choice, as a control.")
    candidates: int = Field(1, ge=1, description="So many blocks of least influence are tried each time; the best result stays.")
    group: int = Field(8, ge=2, description="Neighbouring blocks that are trained together, with the one that goes.")
    rank: int = Field(128, ge=1, description="Rank of the factors; at most the smaller side of the weight.")
    epochs: int = Field(20, ge=0, description="Times that each row is learnt from, for each block that goes.")
    steps: Annotated[int, Field(ge=0)] | None = Field(None, description="Most steps for each block that goes.")
    rows_per_step: int = Field(8, ge=1, description="Rows in one step.")
    coefficient_rate: float = Field(1e-3, ge=0.0, description="Learning rate of what is taken over: C1, C2, c.")
    rate: float = Field(
        1e-3, ge=0.0, description="Learning rate of what is added: A, B; the paper takes 9.65e-6, for models of billions."
    )

    @model_validator(mode="after")
    def _one_way(self) -> FuseLayers:
        given = [name for name in ("blocks", "count", "ratio") if getattr(self, name) not in (None, [])]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} each say what goes\nKeep one of them.")
        if self.score == "random" and "candidates" in self.chosen:
            raise ValueError("candidates goes with score: influence\nTake candidates out, or score: random.")
        if len(set(self.blocks)) != len(self.blocks):
            raise ValueError(f"blocks names {next(n for n in self.blocks if self.blocks.count(n) > 1)} twice\nName each once.")
        return self

    def targets(self, model: nn.Module, anatomy: Anatomy) -> list[Target]:
        candidates, count = self.choice(model, anatomy)
        if not count:
            return []
        if not self.blocks:
            action = f"one of {len(candidates.these)}: {count} of these are taken out, the others learn from them"
            return [Target(one.key, "block", action) for one in candidates.these]
        goes = {one.key for one in candidates.these}
        found = {
            one.key: Target(one.key, "block", "taken out, its weights grafted onto its neighbours") for one in candidates.these
        }
        for one in candidates.these:
            group = {b.path: b for b in neighbours(one.block, anatomy.blocks, self.group) if b.path not in goes}
            roles = {site.path: ", ".join(site.roles) for block in group.values() for site in block.sites}
            for pair in pairs(model, one.block, one.key, group):
                if not pair.obstacle:
                    found[pair.own] = Target(pair.own, roles[pair.own], "learns from a block that goes")
        return list(found.values())

    def skips(self, model: nn.Module, anatomy: Anatomy) -> dict[str, str]:
        return {} if self.blocks else self.choice(model, anatomy)[0].others

    def rehearse(self, model: nn.Module, anatomy: Anatomy, surgery: Surgery) -> None:
        candidates, count = self.choice(model, anatomy)
        listed: dict[str, list[int]] = {}
        for one in candidates.typical(count, near=False):
            listed.setdefault(one.block.container or "", []).append(one.block.position)
        for container, positions in listed.items():
            shorten(model, surgery, container, positions)

    def run(self, model: nn.Module, context: Context) -> nn.Module:
        Fusion(self, model, context).run()
        return model

    def choice(self, model: nn.Module, anatomy: Anatomy) -> tuple[Candidates, int]:
        """The blocks that may go, and how many of them do.

        Raises:
            UserError: there are none, or fewer; a number that no block has, or of a block that cannot go.
        """
        candidates = find_candidates(model, anatomy, "block")
        if self.blocks:
            candidates = self._named(candidates, anatomy)
        share = 0.25 if self.ratio is None else self.ratio
        count = len(self.blocks) or (self.count if self.count is not None else math.ceil(share * len(candidates.these)))
        refuse(self.name, candidates, count, near=False)
        return candidates, count

    def _named(self, candidates: Candidates, anatomy: Anatomy) -> Candidates:
        total = len(anatomy.blocks)
        for number in self.blocks:
            if not -total <= number < total:
                hint = f"There are {total}: 0 to {total - 1}." if total else "No blocks were found; see: compress inspect."
                raise UserError(self.name, f"blocks: there is no block {number}", hint)
        wanted = {anatomy.blocks[number % total].path for number in self.blocks}
        if len(wanted) < len(self.blocks):
            raise UserError(self.name, "blocks names one block twice", "Negative numbers count from the end.")
        for path in sorted(wanted & set(candidates.others)):
            raise UserError(self.name, f"{path} cannot be taken out: {candidates.others[path]}", "Leave it off blocks.")
        these = tuple(one for one in candidates.these if one.key in wanted)
        return Candidates(candidates.kind, these, {}, candidates.blocks)
