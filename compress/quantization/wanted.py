"""What the float blocks give, one block at a time, while the model is rounded block after block."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from compress.distillation.training import Lesson
from compress.distillation.walk import Walk
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
    """One block: what it gave, and its layers."""

    def __init__(self, step: Quantize, model: nn.Module, context: Context, block: str, lesson: Lesson) -> None:
        self.step, self.model, self.context = step, model, context
        self.block, self.lesson = block, lesson
        self.paths: list[str] = []

    def note(self, job: Job, ties: Ties) -> None:
        """Notes a layer that is going to be rounded, if it can learn."""
        if job.site.kind in ("linear", "conv1d", "conv2d") and not ties.holders[job.site.path]:
            self.paths.append(job.site.path)

    def reconstruct(self, walk: Walk, inputs: Mapping[str, Seen]) -> dict[str, Any]:
        """Moves codes and biases of the block, which is rounded by now."""
        limits = {}
        for path in self.paths:
            layer = self.model.get_submodule(path)
            assert isinstance(layer, (QuantLinear, QuantConv2d))
            seen = inputs.get(path)
            energy = None if seen is None else seen.energy
            pairs = self.step.reduce_range == "pairs"
            limits[path] = pair_limit(layer, energy) if pairs else None
        steps, seed = self.step.rounding_steps, self.context.seed
        return reconstructed(self.model, walk, self.lesson, self.paths, limits, steps, seed)
