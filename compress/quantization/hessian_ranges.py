"""Ranges of inputs and weights that are searched by what they do to the model's outputs, one block at a time."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compress.algorithms.range_search import Ranges, Reader, search_ranges
from compress.depth.output_scores import first_rows
from compress.layers.conversion import weight_of
from compress.layers.fitting import Searched, Seen
from compress.quantization.output_gradients import Felt, felt
from compress.quantization.quantized_sites import Job, input_grid

if TYPE_CHECKING:
    from compress.passes.contract import Context
    from compress.passes.quantize import Quantize

__all__ = ["searched_ranges"]

_POSITIONS = 1024
"""Positions of a tensor that a search looks at, drawn from the rows."""


def searched_ranges(
    step: Quantize, model: nn.Module, context: Context, jobs: list[Job], inputs: dict[str, Seen]
) -> dict[str, Seen]:
    """What was seen, with searched ranges for every input that is rounded; layers that read one tensor share its range.

    The model is the float one, with factors that can be folded in it. Inputs and gradients of one block are held at a time.
    """
    if step.range != "hessian" or not inputs:
        return inputs
    found = dict(inputs)
    mine = [job for job in jobs if job.rounds_input and job.site.path in inputs and not inputs[job.site.path].nothing]
    rows = first_rows(context.calibration(), step.range_rows)
    done = 0
    for _, stage in itertools.groupby(mine, key=lambda job: job.site.block):
        block = list(stage)
        context.progress(done, len(mine), f"ranges by gradients: {block[0].site.path}")
        heard = felt(model, context.call, rows, [job.site.path for job in block], positions=_POSITIONS, seed=context.seed)
        groups: dict[str, list[Job]] = {}
        for job in block:
            if job.site.path in heard:
                groups.setdefault(inputs[job.site.path].leader or job.site.path, []).append(job)
        for group in groups.values():
            ranges = _search(step, model, group, inputs[group[0].site.path], heard)
            gain = 10 * math.log10(ranges.before / ranges.after) if ranges.after > 0 else 0.0
            for job, (scale, zero_point) in zip(group, ranges.weights, strict=True):
                searched = Searched(ranges.low, ranges.high, scale, zero_point, gain)
                found[job.site.path] = replace(inputs[job.site.path], searched=searched)
        done += len(block)
    return found


@torch.no_grad()
def _search(step: Quantize, model: nn.Module, group: list[Job], seen: Seen, heard: dict[str, Felt]) -> Ranges:
    given = heard[group[0].site.path].inputs
    factor = seen.factor
    if factor is not None:
        given = given * factor
    readers = []
    for job in group:
        module = model.get_submodule(job.site.path)
        weight = weight_of(module, job.site.kind).float()
        how = step.weight_range or ("minmax" if job.grid.bits == 8 else "mse")
        slopes = heard[job.site.path].slopes
        readers.append(Reader(weight if factor is None else weight / factor, job.grid, how, slopes, _applied(module, job)))
    return search_ranges(given, readers, input_grid(step), *seen.range(input_grid(step)))


def _applied(module: nn.Module, job: Job) -> Callable[[Tensor, Tensor], Tensor]:
    if job.site.kind != "conv2d":
        return F.linear
    conv: Any = module
    return functools.partial(F.conv2d, stride=conv.stride, padding=conv.padding, dilation=conv.dilation, groups=conv.groups)
