"""Training after a fusion, without labels: the fused model should give what its parents give together.

Distillation from an ensemble (Hinton et al. 2015, arXiv 1503.02531, sec. 1), from the mean of the parents' probabilities.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from calibrate.capture import split
from calibrate.signature import Batch
from compress.depth.repair import parted
from compress.distillation.progressive import Road, Travelled, travel
from compress.distillation.training import LiveLesson

if TYPE_CHECKING:
    from compress.passes.contract import Context

__all__ = ["tune"]


class _Parents(nn.Module):
    """Models of the same classes, which give the logarithm of their mean probability; a single one gives what it gives."""

    def __init__(self, models: Sequence[nn.Module], shares: Sequence[float], context: Context) -> None:
        super().__init__()
        self.models, self.shares, self.context = nn.ModuleList(models), shares, context

    def forward(self, batch: Batch) -> Tensor:
        given = [self.context.call(model, batch) for model in self.models]
        if len(given) == 1:
            return given[0]
        mixed = [share * one.float().softmax(-1) for share, one in zip(self.shares, given, strict=True)]
        return torch.stack(mixed).sum(0).clamp(min=1e-12).log()


class _Nothing:
    """An exchange of nothing."""

    def set(self, share: float, learning: bool) -> None:
        pass

    def settle(self, batches: list[Batch], call: Any) -> None:
        pass


def tune(
    model: nn.Module, parents: Sequence[nn.Module], shares: Sequence[float], context: Context, steps: int, rows: int, rate: float
) -> Travelled:
    """Trains all parameters of a model on the calibration rows; the last fourth, 64 at most, is held out and says which state is
    kept, so that it ends no further from its parents than it began.

    Args:
        parents: the models that were fused, of the same classes; or the one whose output it should give.
        shares: of the parents in the mean; they sum to 1.
        rows: in one step.
    """
    fit, held = ([*split(part, rows)] for part in parted(context.calibration()))
    asked = [(parent, share) for parent, share in zip(parents, shares, strict=True) if share]
    teacher = _Parents([parent for parent, _ in asked], [share for _, share in asked], context)
    logits = bool(context.anatomy.roles.get("head")) and context.signature.output in ("tensor", "logits")

    def call(one: nn.Module, batch: Batch) -> Tensor:
        given: Tensor = one(batch) if one is teacher else context.call(one, batch)
        return given

    lesson = LiveLesson(teacher, call, (fit, held), (), "logits" if logits else "features")
    road = Road(steps, rate, decay=0.0, fixed=0.0, seed=context.seed)
    return travel(model, call, lesson, _Nothing(), road, context.progress, context.scratch)
