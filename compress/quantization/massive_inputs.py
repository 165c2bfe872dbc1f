"""Inputs with massive activations: found on calibration rows, and rounded in the way that the model's outputs lose least by.

A handful of entries, at a few positions and in fixed channels, are larger than all others by orders of magnitude (Sun et al.
2024, arXiv 2402.17762). A range that covers them leaves the other positions a code or two; one that does not clips what the model
hangs on. Which is worse is measured. Shapes: B rows, T positions, C channels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from calibrate.capture import channels_last, counted, split, visiting
from calibrate.massive import LEAST, massive
from calibrate.modes import evaluating
from calibrate.ranges import RangeMethod, range_observer
from calibrate.signature import Batch
from compress.anatomy import Anatomy
from compress.layers.fitting import Seen, column_energy, finite
from compress.quantization.float8 import is_float8
from compress.quantization.massive_ways import FloatOutputs, Made, MassiveTensor, best_way
from compress.quantization.quantized_sites import Job, by_tensor

if TYPE_CHECKING:
    from compress.passes.contract import Context
    from compress.passes.quantize import Quantize

__all__ = ["loud_streams", "protected"]

_NAMED = 3
"""Layers with float inputs that a warning names."""


@contextmanager
def loud_streams(step: Quantize, model: nn.Module, anatomy: Anatomy) -> Iterator[list[str]]:
    """Norms, which read the residual stream, that receive a value large enough to be a massive activation meanwhile.

    Those of images are left out where nothing says which dimension holds the channels.
    """
    loud: list[str] = []

    def visit(path: str, module: nn.Module, x: Tensor) -> None:
        if path not in loud and float(x.detach().abs().amax()) > LEAST and _channels_known(module, x):
            loud.append(path)

    norms = [site.path for site in anatomy.sites if site.kind == "norm"]
    with visiting(model, norms if _asked(step) else [], visit):
        yield loud


def _channels_known(norm: nn.Module, x: Tensor) -> bool:
    """Whether it is plain which dimension holds the channels: of images, the second or the last may."""
    weight = getattr(norm, "weight", None)
    x = channels_last(norm, x)
    return x.dim() < 4 or (isinstance(weight, Tensor) and x.shape[1] != weight.numel() == x.shape[-1])


def protected(
    step: Quantize, model: nn.Module, context: Context, jobs: list[Job], inputs: dict[str, Seen], loud: Sequence[str], made: Made
) -> tuple[list[Job], dict[str, Seen], dict[str, Seen]]:
    """The jobs, and what was seen of their inputs, with another range, factors, or a float input where a tensor has massive
    activations and its readers do better so. Nothing changes where there are none.

    Of the ranges the one is taken that the model's outputs lose least by; factors that are found for the other positions, which
    cost a multiplication, and float inputs, which cost the integer kernel, only where they gain 3 dB on that and there are not
    35 dB without them.

    Args:
        loud: norms whose input may have massive activations.
        made: a layer for a job and what was seen of its input.

    Returns:
        Third what was seen at layers whose weights are rounded by their outputs without the massive positions: a sum over all
        positions says nothing of the others, which are what such layers are rounded for.
    """
    if not _asked(step):
        return jobs, inputs, {}
    groups = by_tensor((job for job in jobs if job.rounds_input and job.site.path in inputs), inputs)
    wanted = {leader for leader in groups if float(inputs[leader].channels.absmax.max()) > LEAST}
    if not wanted and not loud:
        return jobs, inputs, {}
    apart: dict[str, Seen] = {}
    found = _swept(step, model, context, {path: groups[path] for path in wanted}, inputs, loud)
    told: dict[str, Any] = {}
    streams = {path: tensor.entries.json() for path, tensor in found.items() if path in loud}
    leaders = [leader for leader in groups if leader in found]
    outputs = FloatOutputs(step, model, context, [job.site.path for leader in leaders for job in groups[leader]])
    for leader in leaders:
        tensor, group = found[leader], groups[leader]
        context.progress(len(told), len(leaders), f"massive activations at {leader}")
        chosen, measured = best_way(step, model, outputs, group, inputs, tensor, made)
        told[leader] = tensor.entries.json() | {
            "readers": [job.site.path for job in group],
            "rounded": chosen.name,
            "output_sqnr_db": {name: finite(value) for name, value in measured.items()},
        }
        if chosen.name != "everything":
            apart |= {job.site.path: inputs[job.site.path] for job in group}
        inputs = {path: seen for path, seen in (inputs | chosen.inputs).items() if seen is not None}
        jobs = [next((one for one in chosen.jobs if one.site.path == job.site.path), job) for job in jobs]
    left = [path for one in told.values() if one["rounded"] == "float" for path in one["readers"]]
    if left:
        named = ", ".join(left[:_NAMED]) + (f" and {len(left) - _NAMED} more" if len(left) > _NAMED else "")
        layers = "1 layer keeps a float input" if len(left) == 1 else f"{len(left)} layers keep float inputs"
        context.report.setdefault("warnings", []).append(f"{layers} because of massive activations: {named}")
    if told or streams:
        context.report["massive_activations"] = {"inputs": told, "residual_stream": streams}
    return jobs, inputs, apart


def _asked(step: Quantize) -> bool:
    return step.massive_activations == "protect" and step.activations == "static" and not is_float8(step)


def _swept(
    step: Quantize,
    model: nn.Module,
    context: Context,
    groups: Mapping[str, list[Job]],
    inputs: Mapping[str, Seen],
    loud: Sequence[str],
) -> dict[str, MassiveTensor]:
    """Runs the calibration rows and looks at the tensors that these groups, and these norms, receive.

    Returns:
        By path, tensors with a handful of massive entries.
    """
    method: RangeMethod = "minmax" if step.range == "hessian" else step.range
    found = {}
    for path in (*groups, *loud):
        readers = [column_energy(model.get_submodule(job.site.path), job.site.kind) for job in groups.get(path, [])]
        energy = torch.stack(readers).sum(0) if readers else None
        found[path] = MassiveTensor(range_observer(method, step.percentile, energy))
    batch: Batch = {}

    def visit(path: str, module: nn.Module, x: Tensor) -> None:
        seen = inputs.get(path) if path in groups else None
        _look(found[path], channels_last(module, x), seen, batch)

    with evaluating(model), visiting(model, list(found), visit):
        for piece in split(context.calibration(), step.batch_size):
            batch = piece
            context.call(model, piece)
    return {path: tensor for path, tensor in found.items() if tensor.entries.handful}


def _look(tensor: MassiveTensor, x: Tensor, seen: Seen | None, batch: Batch) -> None:
    """Takes in one call: entries of the tensor as the float model has it, ranges as its readers round it."""
    ids = batch.get("input_ids")
    x, counts = _rows(x, batch.get("attention_mask"))
    hidden = x if seen is None else seen.before_folding(x)
    entries = massive(hidden, counts)
    tensor.entries.add(hidden, entries, counts, ids if ids is not None and ids.shape == x.shape[:2] else None)
    ordinary = ~entries.any(-1) if counts is None else ~entries.any(-1) & counts.to(entries.device)
    if seen is None or not bool(ordinary.any()):
        return
    tensor.given.update(x.flatten(0, 1) if counts is None else x[counts])
    tensor.ordinary.update(x[ordinary])
    tensor.ranged.update(x[ordinary])


def _rows(x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """A tensor of any rank as [B, T, C] ([1, N, C] where rows cannot be told apart), and which positions count."""
    counts = counted(x, mask)
    if x.dim() == 2:
        x = x.unsqueeze(0) if counts is None or mask is None else x.reshape(*mask.shape, -1)
    rows = x.reshape(x.shape[0], -1, x.shape[-1])
    if counts is None:
        return rows, None
    counts = counts.reshape(x.shape[:2])
    counts = counts.reshape(*counts.shape, *[1] * (x.dim() - 3)).expand(x.shape[:-1])
    return rows, counts.reshape(rows.shape[:2]).to(rows.device)
