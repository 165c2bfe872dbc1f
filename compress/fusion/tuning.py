"""Training after a fusion, without labels: the fused model should give what its parents give together.

Distillation from an ensemble (Hinton et al. 2015, arXiv 1503.02531, sec. 1), from the mean of the parents' probabilities; or of
their outputs, where these are no scores of classes of which one is right.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from calibrate.capture import split
from calibrate.modes import evaluating
from calibrate.signature import Batch
from compress.depth.repair import parted
from compress.distillation.progressive import Road, Travelled, travel
from compress.distillation.training import LiveLesson

if TYPE_CHECKING:
    from compress.passes.contract import Context

__all__ = ["tune"]


class _Parents(nn.Module):
    """Models of the same outputs, which give the mean of them, or, of ``logits``, the logarithm of their mean probability; a
    single one gives what it gives."""

    def __init__(self, models: Sequence[nn.Module], shares: Sequence[float], context: Context, logits: bool) -> None:
        super().__init__()
        self.models, self.shares, self.context, self.logits = nn.ModuleList(models), shares, context, logits

    def forward(self, batch: Batch) -> Tensor:
        given = [self.context.call(model, batch) for model in self.models]
        if len(given) == 1:
            return given[0]
        given = [one.float().softmax(-1) if self.logits else one.float() for one in given]
        mixed = torch.stack([share * one for share, one in zip(self.shares, given, strict=True)]).sum(0)
        return mixed.clamp(min=1e-12).log() if self.logits else mixed


def _gives_logits(model: nn.Module, context: Context) -> bool:
    """Whether the output scores classes of which one is right, so that a softmax makes probabilities of it: not one number (a
    regression), nor classes that hold or not each by itself, as far as the model's configuration says so."""
    if not context.anatomy.roles.get("head") or context.signature.output not in ("tensor", "logits"):
        return False
    if getattr(getattr(model, "config", None), "problem_type", None) in ("regression", "multi_label_classification"):
        return False
    with evaluating(model):
        given = context.call(model, context.anatomy.traced[1])
    return given.dim() > 1 and given.shape[-1] > 1


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
        parents: the models that were fused, of the same outputs; or the one whose output it should give.
        shares: of the parents in the mean; they sum to 1.
        rows: in one step.
    """
    fit, held = ([*split(part, rows)] for part in parted(context.calibration()))
    asked = [(parent, share) for parent, share in zip(parents, shares, strict=True) if share]
    logits = _gives_logits(asked[0][0], context)
    teacher = _Parents([parent for parent, _ in asked], [share for _, share in asked], context, logits)

    def call(one: nn.Module, batch: Batch) -> Tensor:
        given: Tensor = one(batch) if one is teacher else context.call(one, batch)
        return given

    lesson = LiveLesson(teacher, call, (fit, held), (), "logits" if logits else "features")
    road = Road(steps, rate, decay=0.0, fixed=0.0, seed=context.seed)
    return travel(model, call, lesson, _Nothing(), road, context.progress, context.scratch)
