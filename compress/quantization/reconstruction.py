"""A block whose weights are rounded together, so that its output is again what the float block gave.

Li et al. 2021 (BRECQ, arXiv 2102.05426): the block is the unit that is reconstructed. Each weight may move to a neighbouring
code: an offset is learnt straight through the rounding, as Cheng et al. 2023 (arXiv 2309.05516) do, which needs hundreds of steps
and not ten thousands, together with the biases. It begins at the codes of GPTQ, at their middle, so that what GPTQ moved on
purpose does not move back by chance. Its inputs are those that the blocks rounded
before give, the output wanted is the float model's. Shapes: O outputs, I inputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compress.algorithms.pair_sums import PairLimit
from compress.distillation.training import Course, Lesson, distil
from compress.distillation.walk import Walk
from compress.layers.fitting import shorten_bias
from compress.layers.quantized import ActivationGrid, QuantConv2d, QuantLinear
from compress.surgery import parent_of

__all__ = ["Learnable", "reconstructed"]

_TRAVEL = 1.5
"""How far an offset could go at the full rate in all steps, in codes. Half a code moves a weight: as the rate falls, only those
that are pulled one way by most batches get there; the others walk to and fro."""
_BIAS_RATE = 0.004


class Learnable(nn.Module):
    """A quantized layer whose codes can move by one and whose bias learns; with a gradient through both roundings.

    Attributes:
        offset: what is added to each weight before it is rounded, in codes, in the weight's shape; 0: the codes as they are.
    """

    layer: QuantLinear | QuantConv2d

    def __init__(self, layer: QuantLinear | QuantConv2d, free: Tensor | None) -> None:
        """
        Args:
            free: which weights may move, in their shape; None: all.
        """
        super().__init__()
        object.__setattr__(self, "layer", layer)  # no child: its parameters are not learnt
        self.start = layer.quantized_weight.integers().float()
        self.free = free
        self.offset = nn.Parameter(torch.zeros_like(self.start))
        self.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach().clone())

    def codes(self) -> Tensor:
        """Integer codes (float dtype) in the weight's shape, with a gradient to the offsets."""
        grid = self.layer.quantized_weight.grid
        moved = self.offset.clamp(-1, 1)
        place = self.start + (moved if self.free is None else moved * self.free)
        return place + (place.round().clamp(grid.low, grid.high) - place).detach()

    def forward(self, x: Tensor) -> Tensor:
        layer, held = self.layer, self.layer.quantized_weight
        blocks = held.grid.blocks(self.codes())
        if held.zero_point is not None:
            blocks = blocks - held.zero_point.float().unsqueeze(-1)
        weight = (blocks * held.scale.unsqueeze(-1)).reshape(held.shape)
        if layer.activation is not None:
            x = _rounded(x, layer.activation)
        if isinstance(layer, QuantConv2d):
            return F.conv2d(x, weight, self.bias, layer.stride, layer.padding, layer.dilation, layer.groups)
        return F.linear(x, weight, self.bias)

    @torch.no_grad()
    def settle(self) -> float:
        """Gives the layer what was learnt; returns the share of the codes that moved."""
        held, codes = self.layer.quantized_weight, self.codes().to(torch.int8)
        moved = float((codes != held.integers()).float().mean())
        held.store(codes, held.scale, held.zero_point)
        if self.bias is not None and self.layer.bias is not None:
            self.layer.bias.copy_(self.bias)
            if self.layer.activation is not None:
                shorten_bias(self.layer)
        return moved


def reconstructed(
    model: nn.Module,
    walk: Walk,
    lesson: Lesson,
    paths: Sequence[str],
    limits: Mapping[str, PairLimit | None],
    steps: int,
    seed: int,
) -> dict[str, Any]:
    """Moves codes and biases of the quantized layers of one block until its output is what the lesson says.

    The state that is nearest on held-out rows stays, the start included.

    Args:
        walk: calls the model with the blocks behind it as they are, rounded.
        lesson: what the float block gave, to learn from and to judge on.
        paths: of the layers.
        limits: for each path what neighbouring codes may be together.

    Returns:
        What there is to report.
    """
    learning: dict[str, Learnable] = {}
    layers = {path: model.get_submodule(path) for path in paths}
    for path, layer in layers.items():
        assert isinstance(layer, (QuantLinear, QuantConv2d))
        limit = limits.get(path)
        free = None if limit is None else limit.loose(layer.quantized_weight.integers())
        learning[path] = Learnable(layer, free)
        parent, name = parent_of(model, path)
        setattr(parent, name, learning[path])
    try:
        planned = max(1, steps)
        rates = {f"{path}.offset": _TRAVEL / planned for path in learning}
        for path, one in learning.items():
            if one.bias is not None:
                rates[f"{path}.bias"] = _BIAS_RATE * max(float(one.bias.detach().square().mean().sqrt()), 1e-3)
        epochs = -(-planned // max(1, len(lesson.fit)))
        course = Course(epochs=epochs, steps=planned, checks=5, patience=1 << 30, seed=seed)
        taught = distil(model, walk.call, lesson, rates, course=course)
    finally:
        for path, layer in layers.items():
            parent, name = parent_of(model, path)
            setattr(parent, name, layer)
    moved = {path: one.settle() for path, one in learning.items()} if taught.best_step else dict.fromkeys(learning, 0.0)
    return {
        "sqnr_db_before": taught.sqnr_db_before,
        "sqnr_db_after": taught.sqnr_db_after,
        "best_step": taught.best_step,
        "steps": taught.steps,
        "rows": taught.rows,
        "held_rows": taught.held_rows,
        "moved_percent": {path: 100 * share for path, share in moved.items()},
    }


def _rounded(x: Tensor, grid: ActivationGrid) -> Tensor:
    """The input on its grid, with the gradient of the clamp; a range made when the model runs is taken as it is."""
    if grid.factor is not None:
        x = x * grid.factor
    low, high = -(2 ** (grid.bits - 1)), 2 ** (grid.bits - 1) - 1
    if grid.kind == "dynamic":
        least, most = x.detach().amin().clamp(max=0.0), x.detach().amax().clamp(min=0.0)
        scale = ((most - least) / (high - low)).clamp(min=2.0**-126)
        shift = low + (-least / scale).round()
    else:
        scale, shift = grid.scale, grid.zero_point.float()
    place = (x / scale + shift).clamp(low, high)
    codes = ((x / scale).round() + shift).clamp(low, high)
    rounded: Tensor = (place + (codes - place).detach() - shift) * scale
    return rounded
