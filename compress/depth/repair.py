"""What a sublayer added in the mean stays as a constant, where that brings the model nearer to what it was.

The constant nearest to what the sublayer added, in squares over the tokens of the calibration rows, is its mean. Whether it
helps is judged on rows that were held out, by the model's own output.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from calibrate.capture import counted
from calibrate.fidelity import Fidelity
from calibrate.modes import evaluating
from calibrate.signature import Batch

__all__ = ["MOST_HELD", "Judge", "finite", "keep_constants", "parted"]

Call = Callable[[nn.Module, Batch], Tensor]

MOST_HELD = 64
"""Most rows that are held out: what the model gives for them stays in memory."""
_SHARE = 4


def parted(batches: Iterable[Batch]) -> tuple[list[Batch], list[Batch]]:
    """Rows to measure on, and held-out rows to judge on: of all the last fourth, at most ``MOST_HELD``.

    A single row is both.
    """
    every = list(batches)
    rows = sum(_rows(batch) for batch in every)
    cut = rows - max(1, min(MOST_HELD, rows // _SHARE))
    if rows < 2:
        return every, every
    fit: list[Batch] = []
    held: list[Batch] = []
    for batch in every:
        inside = max(0, min(_rows(batch), cut))
        fit += [{name: tensor[:inside] for name, tensor in batch.items()}] if inside else []
        held += [{name: tensor[inside:] for name, tensor in batch.items()}] if inside < _rows(batch) else []
        cut -= inside
    return fit, held


class Judge:
    """What a model gave for some rows before it was changed, and how near it is to that now."""

    def __init__(self, model: nn.Module, call: Call, batches: Sequence[Batch]) -> None:
        self.call, self.batches = call, batches
        with evaluating(model):
            self.wanted = [call(model, batch).detach().clone() for batch in batches]

    @property
    def rows(self) -> int:
        return sum(map(_rows, self.batches))

    def sqnr_db(self, model: nn.Module) -> float:
        """Of the model's output now against what it was; padded positions do not count."""
        fidelity = Fidelity(classes=False)
        with evaluating(model):
            for batch, wanted in zip(self.batches, self.wanted, strict=True):
                given, valid = self.call(model, batch), counted(wanted, batch.get("attention_mask"))
                fidelity.update(*((wanted, given) if valid is None else (wanted[valid], given[valid])))
        return fidelity.sqnr_db


def keep_constants(model: nn.Module, judge: Judge, means: dict[str, Tensor]) -> list[str]:
    """Writes means into the biases of the layers at the given paths, in order; each stays only if the model's output on the
    held-out rows gets nearer to what it was. Returns the paths of those that stay."""
    kept = []
    level = judge.sqnr_db(model)
    for path, mean in means.items():
        bias = model.get_submodule(path).get_parameter("bias")
        with torch.no_grad():
            bias.copy_(mean)
        now = judge.sqnr_db(model)
        if now > level:
            level = now
            kept.append(path)
        else:
            with torch.no_grad():
                bias.zero_()
    return kept


def finite(level: float) -> float | None:
    """A level in dB for the report; None: nothing differs, or it is not finite."""
    return level if math.isfinite(level) else None


def _rows(batch: Batch) -> int:
    return next(iter(batch.values())).shape[0]
