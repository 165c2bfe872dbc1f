"""The usual engine of ``quantize``: layers that hold integers, made from float ones and from what calibration rows say."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from calibrate.capture import split
from calibrate.errors import UserError
from calibrate.grid import Grid
from calibrate.second_moment import SecondMoment
from compress.algorithms.adaround import adaround
from compress.algorithms.gptq import NotPositiveDefinite, gptq, output_error, refined
from compress.algorithms.pair_sums import PairLimit, roomier
from compress.algorithms.rounding import codes_of, multiples, scales_of
from compress.algorithms.scale_fitting import fitted_scales
from compress.distillation.walk import Walk
from compress.layers import QuantEmbedding
from compress.layers.conversion import QuantizedLayer, weight_of
from compress.layers.fitting import Seen, fit_input, pair_limit, shift_bias, shorten_bias, store_weight
from compress.quantization.calibrated_inputs import calibrated, second_moments, smoothed_inputs, table_moments
from compress.quantization.float8 import range_of
from compress.quantization.hessian_ranges import searched_ranges
from compress.quantization.joint_ranges import joint_ranges
from compress.quantization.massive_inputs import loud_streams, protected
from compress.quantization.quantized_sites import Job, input_grid, plan_sites, site_job, site_layer, weight_range
from compress.quantization.site_options import SiteOptions
from compress.quantization.wanted import Wanted
from compress.tied import Ties

if TYPE_CHECKING:
    from compress.passes.contract import Context
    from compress.passes.quantize import Quantize

__all__ = ["round_sites", "site_layers"]

_PART = 1 << 22
"""Weights whose rounding is held in memory at a time."""


def round_sites(step: Quantize, model: nn.Module, context: Context) -> nn.Module:
    """Replaces the module at every site that ``step`` takes, block after block with GPTQ, and reports what was done.

    Raises:
        UserError: calibration rows do not reach a site, or are too few for GPTQ.
    """
    jobs, skipped = plan_sites(step, model, context.anatomy)
    with loud_streams(step, model, context.anatomy) as loud:
        captured = calibrated(step, model, context, jobs)
    inputs = smoothed_inputs(step, model, context, jobs, captured) if captured else {}
    inputs = searched_ranges(step, model, context, jobs, inputs)
    made = functools.partial(_nearest, step, model)
    inputs = joint_ranges(step, model, context, jobs, inputs, made)
    jobs, inputs, apart = protected(step, model, context, jobs, inputs, loud, made)
    ties = Ties.of(model, {job.site.path: job.grid for job in jobs})
    tables = table_moments(step, model, context, jobs, ties)
    report: dict[str, Any] = {}
    blocks: dict[str, Any] = {}
    wanted = Wanted(step, model, context)
    for stage, walk, later in _walked(step, model, context, jobs):
        moments = tables | second_moments(step, model, walk, stage, ties, apart)
        teacher = wanted.of(stage, walk, later)
        with torch.no_grad():
            for job in stage:
                path = job.site.path
                context.progress(len(report), len(jobs), path)
                if teacher is not None:
                    teacher.note(job, ties)
                report[path] = _convert(step, model, context, job, inputs.get(path), moments.get(path), ties)
        del moments
        if teacher is not None and teacher.paths:
            context.progress(len(report), len(jobs), f"reconstructs {teacher.block}")
            blocks[teacher.block] = teacher.reconstruct(walk, inputs)
    context.progress(len(jobs), len(jobs), "quantized")
    context.report |= {
        "sites": report,
        **({"blocks": blocks} if step.rounding == "reconstruct" else {}),
        "skipped": skipped,
        "ties": ties.said,
        "calibration_rows": captured.rows if captured else 0,
        "padding_counted": list(captured.padding_counted) if captured else [],
    }
    return model


def site_layers(
    step: Quantize, model: nn.Module, context: Context, settings: Mapping[str, Sequence[SiteOptions]]
) -> Iterator[tuple[str, list[QuantizedLayer]]]:
    """For one site after the other the layers that would stand there, one for each setting but float; none is put in.

    They are made from what the float model gives, with ``range: mse`` in the place of ``hessian``, which knows no single sites,
    and tables with their nearest codes. Factors of inputs are folded into ``model`` where they can be, which changes its
    parameters but not its function.

    Args:
        settings: by path, of every site that ``plan_sites`` names.
    """
    if step.range == "hessian":
        schemes = {"activation_symmetric": step.activation_symmetric is True}
        step = step.model_copy(update={"range": "mse", "bridges": "alone", **schemes})
    jobs, _ = plan_sites(step, model, context.anatomy)
    captured = calibrated(step, model, context, jobs)
    inputs = smoothed_inputs(step, model, context, jobs, captured) if captured else {}
    ties = Ties.of(model, {job.site.path: job.grid for job in jobs})
    for stage, walk, _ in _walked(step, model, context, jobs):
        moments = second_moments(step, model, walk, stage, ties, {})
        for job in stage:
            path, made = job.site.path, []
            for options in settings[path]:
                one = site_job(step, model, job.site, options, job.table)
                with torch.no_grad():
                    seen = inputs.get(path) if one.rounds_input else None
                    made.append(_filled(step, model, one, seen, moments.get(path))[0])
            yield path, made
        del moments


def _stages(step: Quantize, jobs: list[Job]) -> list[list[Job]]:
    """The jobs that are rounded on the same state of the model: all, or with GPTQ those of a block."""
    if step.rounding == "nearest":
        return [jobs]
    if step.rounding == "reconstruct":
        return [list(stage) for _, stage in itertools.groupby(jobs, key=lambda job: job.site.block)]
    return [list(stage) for _, stage in itertools.groupby(jobs, key=lambda job: (job.site.block, job.site.kind))]


def _walked(step: Quantize, model: nn.Module, context: Context, jobs: list[Job]) -> Iterator[tuple[list[Job], Walk, list[str]]]:
    """The stages one after the other, the rows as they reach each, and the paths of the stages after it: blocks that are
    finished are not run again."""
    stages = _stages(step, jobs)
    walk = Walk(model, context.call, [] if step.rounding == "nearest" else split(context.calibration(), step.batch_size))
    blocks = [block.path for block in context.anatomy.blocks]
    for number, stage in enumerate(stages):
        later = [job.site.path for rest in stages[number + 1 :] for job in rest]
        walk.reach([*(job.site.path for job in stage), *later], blocks)
        yield stage, walk, later


def _convert(
    step: Quantize, model: nn.Module, context: Context, job: Job, seen: Seen | None, moment: SecondMoment | None, ties: Ties
) -> dict[str, Any]:
    """Replaces one module and says what was done."""
    layer, says = _filled(step, model, job, seen, moment)
    context.surgery.replace(model, job.site.path, layer)
    ties.settle(model, context.surgery, job.site.path)
    return says


def _nearest(step: Quantize, model: nn.Module, job: Job, seen: Seen | None) -> QuantizedLayer:
    """The layer that stands in for one module, with the nearest codes."""
    return _filled(step, model, job, seen, None)[0]


def _filled(
    step: Quantize, model: nn.Module, job: Job, seen: Seen | None, moment: SecondMoment | None
) -> tuple[QuantizedLayer, dict[str, Any]]:
    """The layer that stands in for one module, with all its numbers, and what was done."""
    path, kind = job.site.path, job.site.kind
    module = model.get_submodule(path)
    weight = weight_of(module, kind)
    factor = None if seen is None or seen.factor is None else seen.factor.to(weight.device)
    symmetric = None if seen is None or seen.searched is None else seen.searched.symmetric
    layer = site_layer(step, model, job, None if factor is None else weight.shape[1], symmetric).to(weight.device)
    if layer.bias is not None:
        layer.bias.copy_(module.get_parameter("bias"))
    inputs: dict[str, Any] = {}
    if seen is not None:
        if seen.nothing:
            raise UserError(
                step.name,
                f"the input of {path} is always 0 on the calibration rows: it has no range",
                f"Use rows that reach it, or leave it float with skip: [{path}].",
            )
        inputs["activation"] = fit_input(layer, seen, input_grid(step, symmetric), range_of(step))
    says = _round(step, path, layer, weight if factor is None else weight / factor, factor, moment, seen) | inputs
    mean = seen.mean if seen is not None else None if moment is None else moment.mean
    if step.bias_correction and layer.bias is not None and mean is not None:
        says["bias_correction"] = shift_bias(layer, weight, mean)
    if seen is not None:
        shorten_bias(layer)
    return layer, says


def _round(
    step: Quantize,
    path: str,
    layer: QuantizedLayer,
    weight: Tensor,
    factor: Tensor | None,
    moment: SecondMoment | None,
    seen: Seen | None,
) -> dict[str, Any]:
    """Gives the layer its codes and says how."""
    grid = layer.quantized_weight.grid
    scale, zero_point = _scales(step, layer, weight, seen)
    nearest = codes_of(weight, grid, scale, zero_point)
    says: dict[str, Any] = {}
    pairs = step.reduce_range == "pairs"
    limit = pair_limit(layer, None if seen is None else seen.energy) if pairs else None
    if limit is not None:
        says["overflowing_pairs"] = limit.overflowing(nearest)
        scale = roomier(weight, grid, scale, limit)
        nearest = limit.project(codes_of(weight, grid, scale, zero_point))
    if moment is None:
        shared = step.embedding_rounding == "gptq" and isinstance(layer, QuantEmbedding) and grid.bits < 8
        because = {"because": "a head shares it"} if shared else {}
        return says | store_weight(layer, weight, nearest, scale, zero_point) | {"rounding": "nearest"} | because
    hessian = moment.matrix if factor is None else moment.matrix * factor * factor.unsqueeze(1)
    how = "adaround" if step.rounding == "adaround" and not isinstance(layer, QuantEmbedding) else "gptq"
    try:
        parts = [
            _by_output(step, how, part, hessian, grid, (_part(scale, rows), _part(zero_point, rows)), nearest[rows], limit)
            for part, rows in _parts(weight, grid)
        ]
    except NotPositiveDefinite as failure:
        if step.unfactorable == "stop":
            raise UserError(
                step.name,
                f"{path}: {failure}",
                "Use more calibration rows, a larger damping, or unfactorable: nearest.",
            ) from failure
        says |= store_weight(layer, weight, nearest, scale, zero_point)
        return says | {"rounding": "nearest", "because": str(failure)}
    codes, fitted = torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])
    says["rounding"] = how
    says["rounding_gain_db"] = _gain(weight, (nearest, codes), hessian, grid, (scale, fitted), zero_point)
    return says | store_weight(layer, weight, codes, fitted, zero_point)


def _scales(step: Quantize, layer: QuantizedLayer, weight: Tensor, seen: Seen | None) -> tuple[Tensor, Tensor | None]:
    grid = layer.quantized_weight.grid
    if seen is not None and seen.searched is not None:
        scale, zero_point = seen.searched.scale, seen.searched.zero_point
    else:
        scale, zero_point = scales_of(weight, grid, weight_range(step, grid))
    if step.group_scales == "multiples" and grid.granularity == "group" and not isinstance(layer, QuantEmbedding):
        scale = multiples(scale, grid, weight)
    return scale, zero_point


def _by_output(
    step: Quantize,
    how: str,
    weight: Tensor,
    hessian: Tensor,
    grid: Grid,
    parameters: tuple[Tensor, Tensor | None],
    nearest: Tensor,
    limit: PairLimit | None,
) -> tuple[Tensor, Tensor]:
    """Codes by what they do to the output, and their scales."""
    scale, zero_point = parameters
    if how == "adaround":
        codes = adaround(weight, hessian, grid, scale, zero_point, nearest, step.rounding_steps)
        codes = codes if limit is None else limit.project(codes)
    else:
        codes = gptq(weight, hessian, grid, scale, zero_point, damping=step.damping, order=step.column_order, limit=limit)
    codes = refined(weight, codes, hessian, grid, scale, zero_point, step.refinements, limit)
    for _ in range(step.scale_rounds):
        scale = fitted_scales(weight, codes, hessian, grid, scale, zero_point)
        codes = refined(weight, codes, hessian, grid, scale, zero_point, max(1, step.refinements), limit)
    return codes, scale


def _parts(weight: Tensor, grid: Grid) -> Iterator[tuple[Tensor, slice]]:
    """Whole rows, which know nothing of each other: large tables are rounded in parts."""
    size = len(weight) if grid.granularity == "tensor" else max(1, _PART // weight.shape[1])
    for start in range(0, len(weight), size):
        rows = slice(start, start + size)
        yield weight[rows], rows


def _part(parameter: Tensor | None, rows: slice) -> Any:
    return parameter if parameter is None or len(parameter) == 1 else parameter[rows]


def _gain(
    weight: Tensor,
    given: tuple[Tensor, Tensor],
    hessian: Tensor,
    grid: Grid,
    scales: tuple[Tensor, Tensor],
    zero_point: Tensor | None,
) -> float:
    """How many dB less the second codes cost the layer's output than the first, each with its scales."""
    errors = [
        sum(
            float(output_error(part, grid.dequantize(codes[rows], _part(scale, rows), _part(zero_point, rows)), hessian).sum())
            for part, rows in _parts(weight, grid)
        )
        for codes, scale in zip(given, scales, strict=True)
    ]
    return 10 * math.log10(errors[0] / errors[1]) if min(errors) > 0 else 0.0
