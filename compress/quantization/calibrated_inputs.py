"""What calibration rows say of the inputs of the layers that ``quantize`` rounds: ranges, factors that smooth them, moments."""

from __future__ import annotations

import functools
import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from calibrate.capture import Captured, capture, shared_inputs
from calibrate.errors import UserError
from calibrate.massive import massive
from calibrate.ranges import Channels, Observer, RangeMethod, range_observer
from calibrate.second_moment import SecondMoment
from compress.algorithms.smoothing import Smoothing, aligned, balanced, smoothing
from compress.depth.output_scores import first_rows
from compress.distillation.walk import Walk
from compress.layers.conversion import weight_of
from compress.layers.fitting import Seen, column_energy
from compress.quantization.float8 import is_float8, range_of, smooths
from compress.quantization.folding import folds
from compress.quantization.output_gradients import table_moment
from compress.quantization.quantized_sites import Job, by_tensor, input_grid
from compress.quantization.reparameterized_inputs import reparameterized
from compress.tied import Ties

if TYPE_CHECKING:
    from compress.passes.contract import Context
    from compress.passes.quantize import Quantize

__all__ = ["TABLE_ROWS", "calibrated", "second_moments", "smoothed_inputs", "table_moments"]

_WORTH_DB, _WORTH_FOLDED_DB = 3.0, 0.5
"""What factors have to gain where the layer multiplies by them, and where they are folded into the layer before."""

TABLE_ROWS = 512
"""Calibration rows that run with gradients for a table, at most."""

_HALF = 0.5
"""What rounding by the output is expected to leave of the noise of rounding to the nearest code."""


def calibrated(step: Quantize, model: nn.Module, context: Context, jobs: list[Job]) -> Captured | None:
    if step.activations != "static":
        return None
    requests = _requests(step, model, context, [job for job in jobs if job.rounds_input])
    captured = capture(
        model,
        context.call,
        context.calibration(),
        requests,
        batch_size=step.batch_size,
        progress=lambda rows: context.progress(rows, context.rows, "calibration rows"),
    )
    if captured.silent:
        raise _silent(step, captured)
    return captured


def smoothed_inputs(step: Quantize, model: nn.Module, context: Context, jobs: list[Job], captured: Captured) -> dict[str, Seen]:
    """What was seen at each site whose input is rounded; factors that can be are folded into the model."""
    rounded = [job for job in jobs if job.rounds_input]
    inputs = {job.site.path: Seen.of(captured, job.site.path) for job in rounded}
    if not smooths(step):
        return inputs
    groups = by_tensor(rounded, inputs)
    if step.smooth == "repq":
        inputs |= reparameterized(step, model, context, groups, inputs)
        groups = {leader: group for leader, group in groups.items() if inputs[leader].moved is None}
    found = {}
    for number, (leader, group) in enumerate(groups.items()):
        context.progress(number, len(groups), f"factors for {leader}")
        smoothed = _factors(step, model, group, inputs[leader])
        if smoothed is not None and smoothed.gain_db >= _WORTH_FOLDED_DB:
            found[leader] = smoothed
    places = folds(model, context, [[job.site for job in groups[leader]] for leader in found])
    for leader, smoothed in found.items():
        place = places.get(leader)
        if place is not None:
            place.apply(model, smoothed.factor)
        elif smoothed.before_db >= step.smooth_below_db or smoothed.gain_db < _WORTH_DB:
            continue
        for job in groups[leader]:
            path = job.site.path
            inputs[path] = replace(inputs[path], smoothed=smoothed, folded=place.producer if place else None)
    return inputs


class _OrdinaryMoment(SecondMoment):
    """The second moments of an input at the positions without massive activations."""

    def __init__(self, seen: Seen) -> None:
        super().__init__()
        self._seen = seen

    @property
    def key(self) -> Hashable:
        return "second moment without massive activations"

    def update(self, values: Tensor) -> None:
        ordinary = ~massive(self._seen.before_folding(values)).any(-1)
        if bool(ordinary.any()):
            super().update(values[ordinary])


def second_moments(
    step: Quantize, model: nn.Module, walk: Walk, stage: list[Job], ties: Ties, apart: Mapping[str, Seen]
) -> dict[str, SecondMoment]:
    """The second moments of the inputs of a stage's linear layers, as the model is now; none with ``rounding: nearest``.

    Args:
        apart: of layers at which positions with massive activations do not count, what was seen of their inputs.
    """
    kinds = ("linear", "conv1d")
    paths = [job.site.path for job in stage if job.site.kind in kinds and not ties.holders[job.site.path]]
    if step.rounding == "nearest" or not paths:
        return {}
    captured = capture(
        model,
        walk.call,
        walk.pieces,
        {path: (_OrdinaryMoment(apart[path]) if path in apart else SecondMoment(),) for path in paths},
        whole=False,
    )
    if captured.silent:
        raise _silent(step, captured)
    moments: dict[str, SecondMoment] = {}
    for path in paths:
        moment = captured.observers[path][0]
        assert isinstance(moment, SecondMoment)
        needs = max(moment.matrix.shape[0], 1)
        if moment.count < needs:
            rows = math.ceil(captured.rows * needs / max(moment.count, 1))
            raise UserError(
                step.name,
                f"rounding: {step.rounding} at {path} needs {needs} positions, and the {captured.rows} calibration rows have "
                f"{moment.count}",
                f"Use about {rows} rows, or rounding: nearest.",
            )
        moments[path] = moment
    return moments


def table_moments(step: Quantize, model: nn.Module, context: Context, jobs: list[Job], ties: Ties) -> dict[str, SecondMoment]:
    """For the tables of few bits how the model's outputs hang on what they give; none with ``embedding_rounding: nearest``.

    A table that a head is tied to is left out: what the head does with it is another matter.
    """
    if step.embedding_rounding == "nearest":
        return {}
    found, most = {}, 0
    for job in jobs:
        if job.site.kind == "embedding" and job.grid.bits < 8 and not ties.holders[job.site.path]:
            path = job.site.path
            rows = first_rows(context.calibration(), TABLE_ROWS)
            most = sum(len(next(iter(batch.values()))) for batch in rows)
            told = functools.partial(_told, context, most, path)
            found[path] = table_moment(model, context.call, rows, path, seed=context.seed, progress=told)
    if found:
        context.report["table_gradient_rows"] = most
    return found


def _told(context: Context, most: int, path: str, rows: int) -> None:
    context.progress(rows, most, f"rows with gradients at {path}")


def _requests(step: Quantize, model: nn.Module, context: Context, jobs: list[Job]) -> dict[str, Sequence[Observer]]:
    """What is observed at each site; sites that read the same tensor get the same observers."""
    kinds = {job.site.path: job.site.kind for job in jobs}
    first = next(iter(context.calibration()), None)
    leaders = {} if first is None else shared_inputs(model, context.call, first, dict.fromkeys(kinds, range_of(step)))
    importance: dict[str, Tensor] = {}
    for path, kind in kinds.items():
        leader, columns = leaders.get(path, path), column_energy(model.get_submodule(path), kind)
        importance[leader] = importance[leader] + columns if leader in importance else columns
    method: RangeMethod = "minmax" if step.range == "hessian" or is_float8(step) else step.range
    made = {leader: (range_observer(method, step.percentile, energy), Channels()) for leader, energy in importance.items()}
    return {path: made[leaders.get(path, path)] for path in kinds}


def _factors(step: Quantize, model: nn.Module, group: list[Job], seen: Seen) -> Smoothing | None:
    """Factors for a tensor that the layers of a group read, or None where a convolution is among them."""
    if any(job.site.kind == "conv2d" for job in group) or seen.nothing:
        return None
    weight = torch.cat([weight_of(model.get_submodule(job.site.path), job.site.kind) for job in group])
    channels = seen.channels
    low, high, mean_square = (statistic.to(weight.device) for statistic in (channels.low, channels.high, channels.mean_square))
    given = weight, low, high, mean_square, group[0].grid, input_grid(step)
    share = 1.0 if step.rounding == "nearest" else _HALF
    found = balanced(*given, weight_share=share) if step.smooth == "balanced" else smoothing(*given)
    return aligned(found, *given) if step.scales == "power_of_two" else found


def _silent(step: Quantize, captured: Captured) -> UserError:
    silent = ", ".join(captured.silent)
    return UserError(step.name, f"{silent} never ran on the calibration rows", f"Leave out what does not run: skip: [{silent}].")
