"""What the float blocks give, one block at a time, while the model is rounded block after block."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from calibrate.second_moment import SecondMoment
from compress.distillation.training import Lesson
from compress.distillation.walk import Walk
from compress.layers.conversion import weight_of
from compress.layers.fitting import Seen, pair_limit
from compress.layers.quantized import QuantConv2d, QuantLinear
from compress.quantization.reconstruction import reconstructed
from compress.tied import Ties

if TYPE_CHECKING:
    from compress.passes.contract import Context
    from compress.passes.quantize import Quantize
    from compress.quantization.quantized_sites import Job

__all__ = ["Teacher", "Wanted"]

_EACH = 4
"""Of so many pieces of the rows one is held out."""


class Wanted:
    """Walks through the float model just before it is rounded; nothing without ``rounding: reconstruct``."""

    def __init__(self, step: Quantize, model: nn.Module, context: Context) -> None:
        self.step, self.model, self.context = step, model, context
        self.walk: Walk | None = None

    def of(self, stage: list[Job], walk: Walk, later: list[str]) -> Teacher | None:
        """What the block of a stage gives as long as it is float; None where the stage is no block."""
        if self.step.rounding != "reconstruct":
            return None
        if self.walk is None:
            self.walk = Walk(self.model, self.context.call, walk.pieces)
        blocks = [one.path for one in self.context.anatomy.blocks]
        teacher, number = None, stage[0].site.block
        if number is not None:
            block = next(one.path for one in self.context.anatomy.blocks if one.index == number)
            pieces = self.walk.pieces
            held = pieces[_EACH - 1 :: _EACH] or pieces
            fit = [piece for place, piece in enumerate(pieces) if place % _EACH != _EACH - 1 or len(pieces) < _EACH]
            lesson = Lesson(self.model, self.walk.call, (fit, held), [block], step=self.step.batch_size)
            teacher = Teacher(self.step, self.model, self.context, block, lesson)
        self.walk.reach(later, blocks)
        return teacher


class Teacher:
    """One block: what it gave, and the float weights of its layers."""

    def __init__(self, step: Quantize, model: nn.Module, context: Context, block: str, lesson: Lesson) -> None:
        self.step, self.model, self.context = step, model, context
        self.block, self.lesson = block, lesson
        self.weights: dict[str, Tensor] = {}

    def keep(self, job: Job, seen: Seen | None, moment: SecondMoment | None, ties: Ties) -> None:
        """Keeps the weight of a layer that is going to be rounded, if it can learn."""
        path, kind = job.site.path, job.site.kind
        if kind not in ("linear", "conv1d", "conv2d") or ties.holders[path]:
            return
        weight = weight_of(self.model.get_submodule(path), kind).float()
        factor = None if seen is None else seen.factor
        self.weights[path] = weight.clone() if factor is None else weight / factor.to(weight)

    def reconstruct(self, walk: Walk, inputs: Mapping[str, Seen]) -> dict[str, Any]:
        """Moves codes and biases of the block, which is rounded by now."""
        limits = {}
        for path in self.weights:
            layer = self.model.get_submodule(path)
            assert isinstance(layer, (QuantLinear, QuantConv2d))
            codes, seen = layer.quantized_weight, inputs.get(path)
            bounded = self.step.pair_sums == "bounded" and seen is not None
            limits[path] = pair_limit(layer, seen, codes.scale, codes.zero_point) if bounded and seen else None
        steps, seed = self.step.rounding_steps, self.context.seed
        return reconstructed(self.model, walk, self.lesson, self.weights, limits, steps, seed)
