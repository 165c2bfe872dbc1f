"""The ways to round an input that has massive activations, and the one that the model's outputs lose least by.

Shapes: C channels.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from calibrate.capture import counted, split
from calibrate.fidelity import ratio_db
from calibrate.grid import Grid
from calibrate.massive import MassiveEntries
from calibrate.modes import evaluating
from calibrate.ranges import Channels, RangeObserver
from calibrate.signature import Batch
from compress.algorithms.smoothing import Smoothing, smoothing
from compress.depth.grafts import grafting
from compress.depth.output_scores import first_rows
from compress.layers.conversion import weight_of
from compress.layers.fitting import Seen
from compress.quantization.quantized_sites import Job, input_grid, site_job
from compress.quantization.site_options import SiteOptions
from compress.width.restart import MOST_BYTES, Restart, parts

if TYPE_CHECKING:
    from compress.layers.conversion import QuantizedLayer
    from compress.passes.contract import Context
    from compress.passes.quantize import Quantize

__all__ = ["FloatOutputs", "Made", "MassiveTensor", "Way", "best_way"]

_ROWS = 64
"""Calibration rows on which the ways to round an input are compared, at most: fewer of a large model (``MOST_BYTES``)."""
_ENOUGH_DB, _WORTH_DB = 35.0, 3.0
"""What of the model's outputs is good enough with one input rounded, and what a costlier way has to gain below that."""

Made = Callable[[Job, Seen | None], "QuantizedLayer"]


@dataclass
class MassiveTensor:
    """What one tensor holds that is massive, and what was seen of it.

    Attributes:
        ranged, ordinary: of the positions without massive activations, as the readers receive them.
        given: of all positions.
    """

    ranged: RangeObserver
    given: Channels = field(default_factory=Channels)
    ordinary: Channels = field(default_factory=Channels)
    entries: MassiveEntries = field(default_factory=MassiveEntries)


@dataclass(frozen=True)
class Way:
    """A way to round the input of a group: its jobs, and what is seen of each input; None: it stays float."""

    name: str
    jobs: list[Job]
    inputs: dict[str, Seen | None]
    dear: bool = False


class FloatOutputs:
    """What the float model gives on the first calibration rows, and how much of it is lost with other layers in it.

    The float model runs once, when it is first asked for. Blocks that run before a layer give what they gave then.

    Args:
        paths: of the modules that others will stand for.
    """

    def __init__(self, step: Quantize, model: nn.Module, context: Context, paths: Sequence[str]) -> None:
        self._model, self._context, self._size = model, context, step.batch_size
        self._paths = parts((block.path for block in context.anatomy.blocks), paths)

    @functools.cached_property
    def _restart(self) -> Restart:
        restart = Restart(self._model, self._context.call, self._paths)
        with evaluating(self._model):
            for row in first_rows(self._context.calibration(), 1):
                restart.begin(row)
            run = restart.reference(0)
            bytes_of_a_row = run.output.nbytes + sum(tensor.nbytes for tensor in run.features.values())
            rows = max(1, min(_ROWS, MOST_BYTES // bytes_of_a_row))
            first, *others = split(first_rows(self._context.calibration(), rows), self._size)
            restart.begin(first)
            for piece in others:
                restart.add(piece)
        return restart

    @functools.cached_property
    def _signal(self) -> float:
        restart = self._restart
        return sum(_energy(restart.reference(number).output, batch) for number, batch in enumerate(restart.batches))

    def sqnr_db(self, layers: Mapping[str, nn.Module]) -> float:
        """With layers in the place of the modules at their paths, at positions that count; -inf where something is not finite."""
        restart, noise = self._restart, 0.0
        start = restart.start(layers)
        with evaluating(self._model):
            restart.exact(start)  # asked of the float model
        with grafting(self._model, layers), evaluating(self._model):
            for number, batch in enumerate(restart.batches):
                noise += _energy(restart.run(number, start).output - restart.reference(number).output, batch)
        return ratio_db(self._signal, noise)


def _energy(x: Tensor, batch: Batch) -> float:
    """The sum of squares at positions that count."""
    valid = counted(x, batch.get("attention_mask"))
    return float((x if valid is None else x[valid]).square().sum(dtype=torch.float64))


def best_way(
    step: Quantize,
    model: nn.Module,
    outputs: FloatOutputs,
    group: list[Job],
    inputs: Mapping[str, Seen],
    tensor: MassiveTensor,
    made: Made,
) -> tuple[Way, dict[str, float]]:
    """The way to round a group's input, and the SQNR of the model's outputs with each, in dB.

    Args:
        made: a layer for a job and what was seen of its input.
    """
    ways = _ways(step, model, group, inputs, tensor)
    measured = {}
    for way in ways:
        with torch.no_grad():
            layers = {job.site.path: made(job, way.inputs[job.site.path]) for job in way.jobs}
        measured[way.name] = outputs.sqnr_db(layers)
    best = max((way for way in ways if not way.dear), key=lambda way: measured[way.name])
    for way in (way for way in ways if way.dear):
        if measured[best.name] < _ENOUGH_DB and measured[way.name] >= measured[best.name] + _WORTH_DB:
            best = way
    return best, measured


def _ways(step: Quantize, model: nn.Module, group: list[Job], inputs: Mapping[str, Seen], tensor: MassiveTensor) -> list[Way]:
    """The cheapest first."""
    paths = [job.site.path for job in group]
    seen, grid, ordinary = inputs[paths[0]], input_grid(step), tensor.ordinary
    means: dict[str, Any] = {"ordinary_mean": ordinary.mean, "ordinary_mean_square": ordinary.mean_square}
    given = {path: replace(inputs[path], **means) for path in paths}

    def way(name: str, dear: bool = False, **changes: Any) -> Way:
        return Way(name, group, {path: replace(one, **changes) for path, one in given.items()}, dear)

    ways = [way("everything"), way("the other positions", kept=_kept(seen, tensor, grid))]
    afresh: dict[str, Any] = {"channels": tensor.given, "folded": None, "moved": None, "searched": None}
    if seen.factor is not None:
        without = way("the other positions, without factors", kept=tensor.ranged.range(grid), smoothed=None, **afresh)
        ways.insert(0, without)
    if step.smooth and all(job.site.kind != "conv2d" for job in group):
        weight = torch.cat([weight_of(model.get_submodule(job.site.path), job.site.kind) for job in group])
        for name, over in (("everything", tensor.given), ("the other positions", ordinary)):
            low, high, loud = (one.to(weight.device) for one in (over.low, over.high, ordinary.mean_square))
            smoothed = smoothing(weight, low, high, loud, group[0].grid, grid)
            kept = None if over is tensor.given else _smoothed_range(over, smoothed)
            if smoothed.gain_db > 0:
                ways.append(way(f"{name}, with factors", True, smoothed=smoothed, kept=kept, **afresh))
    options = [SiteOptions(weights=job.grid.bits, activations="none") for job in group]
    left = [site_job(step, model, job.site, one, job.table) for job, one in zip(group, options, strict=True)]
    return [*ways, Way("float", left, dict.fromkeys(paths), True)]


def _kept(seen: Seen, tensor: MassiveTensor, grid: Grid) -> tuple[float, float]:
    """The range of the positions without massive activations, with the factors that there are."""
    if seen.smoothed is not None and seen.factor is not None:
        return _smoothed_range(tensor.ordinary, seen.smoothed)
    if seen.smoothed is None and seen.moved is None:
        return tensor.ranged.range(grid)
    return tensor.ranged.low, tensor.ranged.high


def _smoothed_range(channels: Channels, smoothed: Smoothing) -> tuple[float, float]:
    factor = smoothed.factor.to(channels.low)
    return float((channels.low * factor).amin()), float((channels.high * factor).amax())
