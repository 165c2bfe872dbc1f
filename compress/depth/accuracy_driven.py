"""AxFormer's removal of what a fine-tuned model does better, or as well, without (Nagarajan et al., arXiv 2010.03688).

Coarse to fine: whole attention and MLP sublayers first, the last of the model first; then heads, in attentions that stayed, those
first that were missed least. What is tried is what a removal leaves: layers without weights for a sublayer, zeros behind a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from torch import nn

from calibrate.errors import UserError
from calibrate.modes import frozen
from compress.anatomy import Anatomy
from compress.depth.choice import Candidate
from compress.depth.greedy import Change, Greedy, Trial
from compress.depth.sublayers import PARTS, Sublayer, take_out
from compress.rehearsal import stand_in
from compress.surgery import Surgery, parent_of
from compress.width.slicing import slice_units
from compress.width.units import Units, Unseparable, find_units, masked

if TYPE_CHECKING:
    from compress.passes.contract import Context

__all__ = ["Driver", "separable_heads"]


class _WithoutSublayer(Change):
    """A sublayer out of the model, as ``take_out`` leaves it."""

    def __init__(self, model: nn.Module, surgery: Surgery, candidate: Candidate, sublayer: Sublayer, constant: bool) -> None:
        self.model, self.surgery, self.candidate, self.sublayer, self.constant = model, surgery, candidate, sublayer, constant
        self.told = {"block": sublayer.block, "part": sublayer.part, "path": sublayer.sink}
        self.what = f"the {sublayer.part} of block {sublayer.block}"
        self.old: dict[str, nn.Module] = {}

    def do(self) -> None:
        one = self.sublayer
        self.old = {path: self.model.get_submodule(path) for path in (*(s.path for s in one.sites), *one.norms, *one.after)}
        self.done = len(self.surgery.edits)
        take_out(self.model, self.surgery, one, self.constant)

    def undo(self) -> None:
        for path, module in self.old.items():
            parent, name = parent_of(self.model, path)
            setattr(parent, name, module)
        del self.surgery.edits[self.done :]


class _WithoutHead(Change):
    """A head (or the query heads that share keys and values) switched off."""

    def __init__(self, model: nn.Module, units: Units, number: int) -> None:
        self.model, self.units, self.number = model, units, number
        self.told = {"block": units.block, "part": "head", "path": units.sink, "head": number}
        self.what = f"head {number} of block {units.block}"
        self.mask: AbstractContextManager[nn.Module] | None = None

    def do(self) -> None:
        self.mask = masked(self.model, self.units, [self.number])
        self.mask.__enter__()

    def undo(self) -> None:
        if self.mask is not None:
            self.mask.__exit__(None, None, None)
            self.mask = None


class Driver:
    """One search; ``greedy`` holds what was tried.

    Args:
        constant: whether the layers that are left keep a bias, of zeros, for a later repair.
        heads: whether heads of the attentions that stay are tried too.
        reserved: runs over the validation rows to be kept for later, beside the last one.
    """

    def __init__(
        self, model: nn.Module, context: Context, greedy: Greedy, *, constant: bool = False, heads: bool = True, reserved: int = 0
    ) -> None:
        self.model, self.context, self.greedy = model, context, greedy
        self.constant, self.heads, self.reserved = constant, heads, 1 + reserved
        self.gone: dict[str, list[int]] = {}
        """Heads that went, by the path of their output projection."""

    def run(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        """Takes sublayers and heads out; returns the sublayers that went."""
        heads = separable_heads(self.model, self.context.anatomy)[0] if self.heads else {}
        changes = [
            _WithoutSublayer(self.model, self.context.surgery, one, one.sublayer, self.constant)
            for one in sorted(candidates, key=_depth, reverse=True)
            if one.sublayer
        ]
        trials = self.greedy.run(changes, self.reserved)
        if heads:
            self._heads([trial for trial in trials if not trial.taken], heads)
        if any(trial.taken for trial in self.greedy.trials):
            self.greedy.finish()
        return [change.candidate for change in changes if any(trial.change is change and trial.taken for trial in trials)]

    def _heads(self, stayed: list[Trial], heads: dict[str, Units]) -> None:
        """Tries the heads of the attentions that stayed, then takes out for good those that went."""
        inspected = sorted((trial for trial in stayed if trial.change.told["path"] in heads), key=lambda one: one.judged.loss)
        units = [heads[trial.change.told["path"]] for trial in inspected]
        changes = [_WithoutHead(self.model, one, number) for one in units for number in range(len(one))]
        try:
            trials = self.greedy.run(changes, self.reserved)
        finally:
            for change in changes:
                change.undo()
        for trial in trials:
            if trial.taken:
                self.gone.setdefault(trial.change.told["path"], []).append(trial.change.told["head"])
        signature, example = self.context.anatomy.traced
        with frozen(self.model):
            for one in units:
                slice_units(self.model, self.context.surgery, signature, example, one, self.gone.get(one.sink, []))


def separable_heads(model: nn.Module, anatomy: Anatomy) -> tuple[dict[str, Units], dict[str, str]]:
    """Heads that can go on their own, by the path of their output projection; and why those of other blocks cannot, by path.

    Taking one out of each block is tried on a stand-in that shares the model's tensors.
    """
    signature, example = anatomy.traced
    found = [one for one in find_units(model, signature, anatomy, example) if one.kind == "head"]
    others = {f"{anatomy.blocks[one.block].path} (heads)": one.reason for one in found if isinstance(one, Unseparable)}
    heads, trial = {}, stand_in(model)
    with frozen(trial):
        for one in found:
            if isinstance(one, Unseparable):
                continue
            try:
                slice_units(trial, Surgery(), signature, example, one, [0])
                heads[one.sink] = one
            except UserError as error:
                others[f"{anatomy.blocks[one.block].path} (heads)"] = error.what
    return heads, others


def _depth(candidate: Candidate) -> tuple[int, int]:
    part = candidate.sublayer.part if candidate.sublayer else PARTS[0]
    return candidate.block.index, PARTS.index(part)
