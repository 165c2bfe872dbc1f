"""Ranges of inputs and weights that are searched by what they do to the model's outputs, one block at a time."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
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
from compress.quantization.quantized_sites import Job, by_tensor, input_grid, weight_range

if TYPE_CHECKING:
    from compress.passes.contract import Context
    from compress.passes.quantize import Quantize

__all__ = ["POSITIONS", "best_of", "decibels", "readers", "schemes", "searched_ranges", "settled"]

POSITIONS = 1024
"""Positions of a tensor that a search looks at, drawn from the rows."""


def searched_ranges(
    step: Quantize, model: nn.Module, context: Context, jobs: list[Job], inputs: dict[str, Seen]
) -> dict[str, Seen]:
    """What was seen, with searched ranges for every input that is rounded; layers that read one tensor share its range.

    The model is the float one, with factors that can be folded in it. Inputs and gradients of one block are held at a time.
    A layer that does not run in the rows with gradients keeps its extremes; the report names it.
    """
    if step.range != "hessian" or not inputs:
        return inputs
    found = dict(inputs)
    mine = [job for job in jobs if job.rounds_input and job.site.path in inputs and not inputs[job.site.path].nothing]
    rows = first_rows(context.calibration(), step.range_rows)
    done, kept = 0, {}
    for _, stage in itertools.groupby(mine, key=lambda job: job.site.block):
        block = list(stage)
        context.progress(done, len(mine), f"ranges by gradients: {block[0].site.path}")
        heard = felt(model, context.call, rows, [job.site.path for job in block], positions=POSITIONS, seed=context.seed)
        for job in block:
            if job.site.path not in heard:
                kept[job.site.path] = f"minmax: it does not run in the first {step.range_rows} calibration rows"
        for group in by_tensor((job for job in block if job.site.path in heard), inputs).values():
            searches = {symmetric: _search(step, model, group, inputs, heard, symmetric) for symmetric in schemes(step)}
            found |= settled(group, inputs, searches)
        done += len(block)
    if kept:
        context.report["ranges_kept"] = kept
    return found


def schemes(step: Quantize) -> tuple[bool, ...]:
    """The schemes that an input may have: symmetric or not."""
    return (True, False) if step.activation_symmetric == "best" else (step.activation_symmetric,)


def best_of(searches: dict[bool, Ranges]) -> tuple[bool, Ranges]:
    """The scheme with the least error; of equals the symmetric one, which needs no zero point and suits every runtime."""
    return min(searches.items(), key=lambda one: (one[1].after, not one[0]))


def settled(
    group: Sequence[Job], inputs: dict[str, Seen], searches: dict[bool, Ranges], gain_db: float | None = None
) -> dict[str, Seen]:
    """What was seen by the layers of a group, with the ranges of the scheme that costs least.

    Args:
        gain_db: what that gains over the extremes; None: what the search gained.
    """
    symmetric, best = best_of(searches)
    gain_db = decibels(best.before, best.after) if gain_db is None else gain_db
    lost = decibels(searches[not symmetric].after, best.after) if len(searches) > 1 else None
    found = {}
    for job, (scale, zero_point) in zip(group, best.weights, strict=True):
        searched = Searched(best.low, best.high, scale, zero_point, gain_db, symmetric, lost)
        found[job.site.path] = replace(inputs[job.site.path], searched=searched)
    return found


def decibels(before: float, after: float) -> float:
    """How much less the second error is; 0 where there is none."""
    return 10 * math.log10(before / after) if after > 0 and before > 0 else 0.0


def readers(step: Quantize, model: nn.Module, group: Sequence[Job], seen: Seen, heard: dict[str, Felt]) -> list[Reader]:
    """The layers of a group, their weights divided by the factors of their inputs."""
    found = []
    for job in group:
        module = model.get_submodule(job.site.path)
        weight = weight_of(module, job.site.kind).float()
        how = weight_range(step, job.grid)
        slopes = heard[job.site.path].slopes
        weight = weight if seen.factor is None else weight / seen.factor
        found.append(Reader(weight, job.grid, how, slopes, _applied(module, job)))
    return found


@torch.no_grad()
def _search(
    step: Quantize, model: nn.Module, group: list[Job], inputs: dict[str, Seen], heard: dict[str, Felt], symmetric: bool
) -> Ranges:
    seen, grid = inputs[group[0].site.path], input_grid(step, symmetric)
    given = heard[group[0].site.path].inputs
    if seen.factor is not None:
        given = given * seen.factor
    return search_ranges(given, readers(step, model, group, seen, heard), grid, *seen.range(grid))


def _applied(module: nn.Module, job: Job) -> Callable[[Tensor, Tensor], Tensor]:
    if job.site.kind != "conv2d":
        return F.linear
    conv: Any = module
    return functools.partial(F.conv2d, stride=conv.stride, padding=conv.padding, dilation=conv.dilation, groups=conv.groups)
