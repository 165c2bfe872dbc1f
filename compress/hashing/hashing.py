"""One run of ``hash_attention``: codes are learnt block by block, the blocks are chosen, and what is left may be trained."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from calibrate.errors import UserError
from compress.algorithms.hash_learning import Fit, Learnt, learn
from compress.depth.repair import Judge, finite, parted
from compress.distillation.blocks import distil_blocks
from compress.distillation.listening import count
from compress.hashing.attentions import Hashable
from compress.hashing.recorded import record
from compress.layers import HashedAttention

if TYPE_CHECKING:
    from compress.passes.contract import Context
    from compress.passes.hash_attention import HashAttention as Options

__all__ = ["Hashing"]


class Hashing:
    """One run of the pass: what was learnt, which blocks have it, and what is said about it."""

    def __init__(self, options: Options, model: nn.Module, context: Context, found: Sequence[Hashable]) -> None:
        """
        Raises:
            UserError: there are no calibration rows.
        """
        from compress.rehearsal import stand_in

        self.options, self.model, self.context, self.found = options, model, context, found
        every = list(context.calibration())
        if not count(every):
            raise UserError(options.name, "there are no calibration rows", "Name at least one row under data.calibration.")
        self.fit, self.held = parted(every)
        self.judge = Judge(model, context.call, self.held)
        self.original = stand_in(model) if options.distill else None
        self.layers: dict[str, HashedAttention] = {}
        self.alone: dict[str, float] = {}
        self.told: dict[str, dict[str, Any]] = {}

    def run(self) -> None:
        for number, one in enumerate(self.found):
            path = one.block.path
            learnt = self._learnt(number, one)
            self.layers[path] = HashedAttention.holding(learnt.codes)
            self.alone[path] = self._level_alone(path)
            self.told[path] = _told(self.options, one, learnt) | {"sqnr_db_alone": finite(self.alone[path])}
        kept = self._kept()
        for path, layer in self.layers.items():
            self.told[path]["hashed"] = path not in kept
            if path not in kept:
                self.context.surgery.attach(self.model, path, layer)
        hashed = [path for path in self.layers if path not in kept]
        report = self.context.report
        report |= {"hashed": hashed, "kept": kept, "blocks": self.told, "sqnr_db": finite(self.judge.sqnr_db(self.model))}
        report |= {"rows": count(self.fit), "held_rows": self.judge.rows}
        if self.original is not None and hashed:
            report["distillation"] = self._distilled(self.original, hashed)

    def _learnt(self, number: int, one: Hashable) -> Learnt:
        """Codes for one block, from what the model without any hashed attention asks there."""
        options, context, path = self.options, self.context, one.block.path
        generator = torch.Generator().manual_seed(context.seed)
        maps, held = (record(self.model, context.call, path, part, generator) for part in (self.fit, self.held))
        total = len(self.found) * max(options.steps, 1)

        def progress(done: int) -> None:
            context.progress(number * max(options.steps, 1) + done, total, f"hash codes of {path}")

        progress(0)
        try:
            return learn(
                maps, held, options.bits, options.anchors, options.pairs, options.steps, generator, options.shared, progress
            )
        except ValueError as error:
            what = f"{path}: the calibration rows have too few tokens, {error}"
            raise UserError(options.name, what, "Name more rows, or fewer anchors.") from None

    def _level_alone(self, path: str) -> float:
        """How near the model's output on the held-out rows stays with hash attention in this block only."""
        handles = self.layers[path].attach(self.model, path)
        try:
            return self.judge.sqnr_db(self.model)
        finally:
            HashedAttention.detach(self.model, path, handles)

    def _kept(self) -> list[str]:
        """The blocks that keep softmax attention: those alone in which hash attention costs most."""
        worst = sorted(self.alone, key=lambda path: self.alone[path])[: self.options.keep]
        return [path for path in self.layers if path in worst]

    def _distilled(self, original: nn.Module, hashed: Sequence[str]) -> dict[str, Any]:
        blocks = {block.path: block.path for block in self.context.anatomy.blocks}
        first = list(blocks).index(hashed[0])
        with _learning(self.layers):
            return distil_blocks(
                self.model,
                original,
                self.context,
                (self.fit, self.held),
                self.options.distill,
                blocks,
                list(blocks)[first:],
            )


@contextmanager
def _learning(layers: Mapping[str, HashedAttention]) -> Iterator[None]:
    """While it is open, gradients pass the signs of the layers."""
    for layer in layers.values():
        layer.learning = True
    try:
        yield
    finally:
        for layer in layers.values():
            del layer.learning


def _told(options: Options, one: Hashable, learnt: Learnt) -> dict[str, Any]:
    """What the report says of one block."""
    bits, anchors = options.bits, options.anchors
    return {
        "block": one.block.index,
        "tokens": one.keys,
        "macs": {"softmax": one.macs(), "hash": one.hash_macs(bits, anchors)},
        "fewer_macs_from_tokens": one.even_tokens(bits, anchors),
        "row_kl_nats": {name: round(float(fit.divergence.mean()), 4) for name, fit in learnt.stages.items()},
        "correlation": {name: round(float(fit.correlation.mean()), 4) for name, fit in learnt.stages.items()},
        "heads": _by_head(learnt.stages["learnt"]),
    }


def _by_head(fit: Fit) -> list[dict[str, float]]:
    pairs = zip(fit.divergence.tolist(), fit.correlation.tolist(), strict=True)
    return [{"row_kl_nats": round(kl, 4), "correlation": round(r, 4)} for kl, r in pairs]
