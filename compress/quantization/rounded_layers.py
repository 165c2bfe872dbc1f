"""The usual engine of ``quantize``: layers that hold integers, made from float ones and from what calibration rows say."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from calibrate.errors import UserError
from calibrate.second_moment import SecondMoment
from compress.algorithms.gptq import NotPositiveDefinite, gptq, output_error, refined
from compress.algorithms.rounding import codes_of, multiples, scales_of
from compress.layers import QuantEmbedding
from compress.layers.conversion import QuantizedLayer, weight_of
from compress.layers.fitting import Seen, fit_input, shift_bias, store_weight
from compress.quantization.calibrated_inputs import calibrated, second_moments, smoothed_inputs
from compress.quantization.quantized_sites import Job, input_grid, plan_sites, site_job, site_layer
from compress.quantization.site_options import SiteOptions
from compress.tied import Ties

if TYPE_CHECKING:
    from compress.passes.contract import Context
    from compress.passes.quantize import Quantize

__all__ = ["round_sites", "site_layers"]


def round_sites(step: Quantize, model: nn.Module, context: Context) -> nn.Module:
    """Replaces the module at every site that ``step`` takes, block after block with GPTQ, and reports what was done.

    Raises:
        UserError: calibration rows do not reach a site, or are too few for GPTQ.
    """
    jobs, skipped = plan_sites(step, model, context.anatomy)
    captured = calibrated(step, model, context, jobs)
    inputs = smoothed_inputs(step, model, context, jobs, captured) if captured else {}
    ties = Ties.of(model, {job.site.path: job.grid for job in jobs})
    report: dict[str, Any] = {}
    for stage in _stages(step, jobs):
        moments = second_moments(step, model, context, stage, ties)
        with torch.no_grad():
            for job in stage:
                path = job.site.path
                context.progress(len(report), len(jobs), path)
                report[path] = _convert(step, model, context, job, inputs.get(path), moments.get(path), ties)
        del moments
    context.progress(len(jobs), len(jobs), "quantized")
    context.report |= {
        "sites": report,
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

    They are made from what the float model gives. Factors of inputs are folded into ``model`` where they can be, which
    changes its parameters but not its function.

    Args:
        settings: by path, of every site that ``plan_sites`` names.
    """
    jobs, _ = plan_sites(step, model, context.anatomy)
    captured = calibrated(step, model, context, jobs)
    inputs = smoothed_inputs(step, model, context, jobs, captured) if captured else {}
    ties = Ties.of(model, {job.site.path: job.grid for job in jobs})
    for stage in _stages(step, jobs):
        moments = second_moments(step, model, context, stage, ties)
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
    return [list(stage) for _, stage in itertools.groupby(jobs, key=lambda job: (job.site.block, job.site.kind))]


def _convert(
    step: Quantize, model: nn.Module, context: Context, job: Job, seen: Seen | None, moment: SecondMoment | None, ties: Ties
) -> dict[str, Any]:
    """Replaces one module and says what was done."""
    layer, says = _filled(step, model, job, seen, moment)
    context.surgery.replace(model, job.site.path, layer)
    ties.settle(model, context.surgery, job.site.path)
    return says


def _filled(
    step: Quantize, model: nn.Module, job: Job, seen: Seen | None, moment: SecondMoment | None
) -> tuple[QuantizedLayer, dict[str, Any]]:
    """The layer that stands in for one module, with all its numbers, and what was done."""
    path, kind = job.site.path, job.site.kind
    module = model.get_submodule(path)
    weight = weight_of(module, kind)
    factor = None if seen is None or seen.factor is None else seen.factor.to(weight.device)
    layer = site_layer(step, model, job, None if factor is None else weight.shape[1]).to(weight.device)
    if layer.bias is not None:
        layer.bias.copy_(module.get_parameter("bias"))
    says = _round(step, path, layer, weight if factor is None else weight / factor, factor, moment)
    if seen is not None:
        if seen.nothing:
            raise UserError(
                step.name,
                f"the input of {path} is always 0 on the calibration rows: it has no range",
                f"Use rows that reach it, or leave it float with skip: [{path}].",
            )
        says["activation"] = fit_input(layer, seen, input_grid(step), step.range)
    mean = seen.mean if seen is not None else None if moment is None else moment.mean
    if step.bias_correction and layer.bias is not None and mean is not None:
        says["bias_correction"] = shift_bias(layer, weight, mean)
    return layer, says


def _round(
    step: Quantize, path: str, layer: QuantizedLayer, weight: Tensor, factor: Tensor | None, moment: SecondMoment | None
) -> dict[str, Any]:
    """Gives the layer its codes and says how."""
    grid = layer.quantized_weight.grid
    how = step.weight_range or ("minmax" if grid.bits == 8 else "mse")
    scale, zero_point = scales_of(weight, grid, how)
    if step.group_scales == "multiples" and grid.granularity == "group" and not isinstance(layer, QuantEmbedding):
        scale = multiples(scale, grid)
    nearest = codes_of(weight, grid, scale, zero_point)
    if moment is None:
        return store_weight(layer, weight, nearest, scale, zero_point) | {"rounding": "nearest"}
    hessian = moment.matrix if factor is None else moment.matrix * factor * factor.unsqueeze(1)
    try:
        codes = gptq(weight, hessian, grid, scale, zero_point, damping=step.damping, order=step.column_order)
    except NotPositiveDefinite as failure:
        if step.unfactorable == "stop":
            raise UserError(
                step.name,
                f"{path}: {failure}",
                "Use more calibration rows, a larger damping, or unfactorable: nearest.",
            ) from failure
        return store_weight(layer, weight, nearest, scale, zero_point) | {"rounding": "nearest", "because": str(failure)}
    codes = refined(weight, codes, hessian, grid, scale, zero_point, step.refinements)
    errors = [float(output_error(weight, grid.dequantize(given, scale, zero_point), hessian).sum()) for given in (nearest, codes)]
    gain = 10 * math.log10(errors[0] / errors[1]) if min(errors) > 0 else 0.0
    return store_weight(layer, weight, codes, scale, zero_point) | {"rounding": "gptq", "rounding_gain_db": gain}
