"""What leaves a norm on a grid for each channel: scales and zero points move into the norm and the layers that read it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import nn

from compress.algorithms.reparameterization import reparameterization
from compress.layers.fitting import Seen
from compress.quantization.folding import folds
from compress.quantization.quantized_sites import Job, input_grid

if TYPE_CHECKING:
    from compress.passes.contract import Context
    from compress.passes.quantize import Quantize

__all__ = ["reparameterized"]

_LEFT = "no norm with a bias makes it for linear layers with biases alone"


def reparameterized(
    step: Quantize, model: nn.Module, context: Context, groups: Mapping[str, list[Job]], inputs: Mapping[str, Seen]
) -> dict[str, Seen]:
    """What was seen at the sites of these groups that read a norm and nothing else does, which is changed in the model.

    Args:
        groups: layers that read one tensor, by the first of them.
    """
    wanted = [leader for leader in groups if not inputs[leader].nothing]
    places = folds(model, context, [[job.site for job in groups[leader]] for leader in wanted], shifted=True)
    found = {}
    for leader, place in places.items():
        seen = inputs[leader]
        moved = reparameterization(seen.channels.low, seen.channels.high, input_grid(step))
        place.apply(model, moved.factor, moved.shift)
        for job in groups[leader]:
            found[job.site.path] = replace(inputs[job.site.path], moved=moved, folded=place.producer)
    context.report["reparameterized"] = {
        "norms": {leader: place.producer for leader, place in places.items()},
        "left": {leader: _LEFT for leader in groups if leader not in places},
    }
    return found
