"""Round-to-nearest quantization of weights and activations."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor, nn

from calibrate.capture import Captured, capture, shared_inputs
from calibrate.errors import UserError
from calibrate.grid import Bits, Granularity, Grid
from calibrate.ranges import Channels, Observer, RangeMethod, RangeObserver, range_observer, storable
from compress.algorithms.rounding import WeightRange, codes_of, rounding_loss, scales_of
from compress.algorithms.smoothing import Smoothing, smoothing
from compress.anatomy import Anatomy, Site
from compress.layers import QuantConv2d, is_quantized
from compress.layers.conversion import QuantizedLayer, matrix_shape, obstacle, quantized_layer, weight_of
from compress.passes.contract import Context, Pass, Target, blank
from compress.surgery import Surgery
from compress.tied import Ties

__all__ = ["Quantize"]

_ENOUGH_DB, _WORTH_DB = 28.0, 3.0
"""A layer's input is smoothed where its output is expected below the first, and at least the second is gained."""


@dataclass(frozen=True)
class _Job:
    """One module to quantize: where, on which grid, and whether its input is rounded too."""

    site: Site
    grid: Grid
    rounds_input: bool


class Quantize(Pass):
    """Round weights, and the inputs of the layers that hold them, to integers.

    A weight becomes integer codes with one scale for each output channel, group of inputs or tensor; it is rounded to
    the nearest code (Jacob et al. 2018, arXiv 1712.05877; Nagel et al. 2021, arXiv 2106.08295). Static activations get
    one scale for each tensor from calibration rows, in which padded positions do not count; layers that read the same
    tensor share its scale. Scales are float16 numbers, so that every artifact holds the same ones.

    Handles linear layers, GPT-2's Conv1D (turned into a linear layer), 2-D convolutions and embeddings. Without
    ``sites`` it takes every projection inside the blocks: not the embeddings, not the norms, not the head. What it
    cannot take stays float and is listed in the report with the reason.
    """

    name: ClassVar[str] = "quantize"
    source: ClassVar[str] = (
        "Jacob et al. 2018, arXiv 1712.05877; Nagel et al. 2021, arXiv 2106.08295; Xiao et al. 2023, arXiv 2211.10438"
    )
    needs_calibration: ClassVar[bool] = True

    weights: Bits = Field(8, description="Bits of each weight.")
    granularity: Granularity | None = Field(
        None,
        description="One scale for each output channel, group of inputs, or tensor. Default: channel for 8 bits, group "
        "for 4 and 2 bits; convolutions and embeddings are per channel (row) unless this says tensor.",
    )
    group_size: PositiveInt | None = Field(
        None, description="Inputs that share a scale; has to divide the inputs. Default: 32 where groups are used."
    )
    symmetric: bool = Field(True, description="Weights without zero points.")
    weight_range: WeightRange | None = Field(
        None,
        description="minmax covers every weight; mse searches the clipping of each channel or group. Default: minmax "
        "for 8 bits, mse below.",
    )
    activations: Literal["static", "dynamic", "none"] = Field(
        "static",
        description="static: one scale from calibration rows; dynamic: made from each tensor when the model runs; "
        "none: only weights are rounded.",
    )
    activation_bits: Literal[8] = Field(8, description="Bits of each activation.")
    activation_symmetric: bool = Field(
        True,
        description="Static activations without zero point: TensorRT takes no other. Dynamic ones always have one.",
    )
    range: RangeMethod = Field("mse", description="How calibration rows become the range of a static activation.")
    percentile: float = Field(
        99.99, gt=50, le=100, description="Per cent of the values that the range holds, for range: percentile."
    )
    sites: list[str] | None = Field(
        None, description="Roles or module paths, wildcards allowed. Default: every projection inside the blocks."
    )
    skip: list[str] = Field([], description="Roles or module paths that stay float, wildcards allowed.")
    embeddings: Bits | None = Field(
        None,
        description="Bits of all embedding tables, one scale for each row; a head that is tied to one shares its codes. Default: "
        "they stay float.",
    )
    smooth: bool = Field(
        True,
        description="Where a linear layer has its input to itself, its output is expected below 28 dB, and 3 dB are "
        "gained: each input channel is multiplied by a factor of its own before it is rounded, and the weight divided by "
        "it (SmoothQuant, arXiv 2211.10438; the strength is searched for each layer). Costs one multiplication a layer. "
        "Only with static activations.",
    )
    bias_correction: bool = Field(
        True,
        description="Adds to each bias what rounding the weight takes from the mean output on the calibration rows "
        "(Nagel et al. 2019, arXiv 1906.04721, sec. 4.2). Only with static activations.",
    )
    batch_size: PositiveInt = Field(8, description="Rows that run through the model at a time during calibration.")

    @model_validator(mode="after")
    def _consistent(self) -> Quantize:
        if self.group_size and self.granularity in ("channel", "tensor"):
            raise ValueError(f"group_size has no meaning with granularity {self.granularity}")
        return self

    def targets(self, model: nn.Module, anatomy: Anatomy) -> list[Target]:
        return [Target(job.site.path, ", ".join(job.site.roles), self._action(job)) for job in self._plan(model, anatomy)[0]]

    def preview(self, model: nn.Module, anatomy: Anatomy) -> dict[str, nn.Module]:
        with torch.device("meta"):
            return {job.site.path: self._layer(model, job) for job in self._plan(model, anatomy)[0]}

    def rehearse(self, model: nn.Module, anatomy: Anatomy, surgery: Surgery) -> None:
        jobs, _ = self._plan(model, anatomy)
        ties = Ties.of(model, {job.site.path: job.grid for job in jobs})
        for job in jobs:
            module = model.get_submodule(job.site.path)
            with torch.device("meta"):
                layer = self._layer(model, job)
            if layer.bias is not None:
                layer.bias = nn.Parameter(module.get_parameter("bias").detach().float(), requires_grad=False)
            surgery.replace(model, job.site.path, blank(layer, len(surgery.edits)))
            ties.settle(model, surgery, job.site.path)

    def skips(self, model: nn.Module, anatomy: Anatomy) -> dict[str, str]:
        return self._plan(model, anatomy)[1]

    @property
    def calibrates(self) -> bool:
        return self.activations == "static"

    def run(self, model: nn.Module, context: Context) -> nn.Module:
        jobs, skipped = self._plan(model, context.anatomy)
        captured = self._calibrate(model, context, jobs)
        ties = Ties.of(model, {job.site.path: job.grid for job in jobs})
        report: dict[str, Any] = {}
        with torch.no_grad():
            for done, job in enumerate(jobs):
                context.progress(done, len(jobs), job.site.path)
                report[job.site.path] = self._convert(model, context, job, captured, ties)
        context.progress(len(jobs), len(jobs), "quantized")
        context.report |= {
            "sites": report,
            "skipped": skipped,
            "ties": ties.said,
            "calibration_rows": captured.rows if captured else 0,
            "padding_counted": list(captured.padding_counted) if captured else [],
        }
        return model

    def _plan(self, model: nn.Module, anatomy: Anatomy) -> tuple[list[_Job], dict[str, str]]:
        """What will be quantized, in the model's order, and why other targets will not be."""
        chosen = self._chosen(anatomy)
        left = {site.path for site in anatomy.select(self.skip, self.name)} if self.skip else set()
        jobs, skipped = [], {}
        for site in anatomy.sites:
            if site.path not in chosen:
                continue
            if site.kind != "other" and is_quantized(model.get_submodule(site.path)):
                if site.path in left:
                    continue
                raise UserError(self.name, f"{site.path} is quantized already", f"Leave it out with skip: [{site.path}].")
            reason = "named under skip" if site.path in left else obstacle(model, site.path, site.kind)
            if reason:
                skipped[site.path] = reason
            else:
                rounds_input = site.kind != "embedding" and self.activations != "none"
                jobs.append(_Job(site, self._grid(model, site), rounds_input))
        if not jobs:
            raise UserError(self.name, "there is nothing to quantize", _first_reason(skipped))
        if self.embeddings is not None:
            jobs += self._tied_heads(model, anatomy, jobs, left)
        return jobs, skipped

    def _tied_heads(self, model: nn.Module, anatomy: Anatomy, jobs: list[_Job], left: set[str]) -> list[_Job]:
        """Linear layers that hold the weight of a table that is quantized, and that nothing else was said of: they share its
        codes, their inputs stay float. Otherwise the file would hold the weight twice, once in float."""
        tables = {id(model.get_submodule(job.site.path).weight): job for job in jobs if job.site.kind == "embedding"}
        planned = {job.site.path for job in jobs} | left
        linears = [site for site in anatomy.sites if site.kind == "linear" and site.path not in planned]
        tied = [(site, tables.get(id(model.get_submodule(site.path).weight))) for site in linears]
        return [_Job(site, table.grid, False) for site, table in tied if table is not None]

    def _chosen(self, anatomy: Anatomy) -> set[str]:
        if self.sites is None:
            inside = [site for site in anatomy.sites if site.block is not None]
            chosen = {site.path for site in inside if site.kind not in ("norm", "embedding") and site.roles}
        else:
            chosen = {site.path for site in anatomy.select(self.sites, self.name) if site.kind != "norm"}
        if self.embeddings is not None:
            tables = {site.path for site in anatomy.sites if site.kind == "embedding" or _is_table(site)}
            if not tables:
                raise UserError(self.name, "embeddings: the model has no embedding table", "Leave embeddings out.")
            chosen |= tables
        return chosen

    def _grid(self, model: nn.Module, site: Site) -> Grid:
        bits = (self.embeddings or self.weights) if site.kind == "embedding" else self.weights
        _, columns = matrix_shape(model.get_submodule(site.path), site.kind)
        granularity: Granularity = self.granularity or ("group" if self.group_size or bits < 8 else "channel")
        if site.kind in ("embedding", "conv2d") and granularity == "group":
            granularity = "channel"
        if site.kind == "embedding" and columns * bits % 8:
            raise UserError(
                self.name,
                f"{bits}-bit codes of the {columns} columns of {site.path} do not fill whole bytes",
                "Use 8 bits there.",
            )
        if granularity != "group":
            return Grid(bits, self.symmetric, granularity)
        size = self.group_size or 32
        if columns % size:
            near = _divisors_near(columns, size)
            raise UserError(
                self.name,
                f"group_size {size} does not divide the {columns} inputs of {site.path}",
                f"Divisors near it: {', '.join(map(str, near))}.",
            )
        return Grid(bits, self.symmetric, granularity, size)

    def _action(self, job: _Job) -> str:
        grid = job.grid
        unit = f"group of {grid.group_size}" if grid.granularity == "group" else grid.granularity
        inputs = f", inputs {self.activation_bits} bits {self.activations}" if job.rounds_input else ""
        return f"weights {grid.bits} bits per {unit}{inputs}"

    def _layer(self, model: nn.Module, job: _Job, channels: int | None = None) -> QuantizedLayer:
        symmetric = self.activation_symmetric and self.activations == "static"
        activation: dict[str, Any] = {"kind": self.activations, "bits": self.activation_bits, "symmetric": symmetric}
        if channels is not None:
            activation["channels"] = channels
        module = model.get_submodule(job.site.path)
        return quantized_layer(module, job.site.kind, job.grid, activation if job.rounds_input else None)

    def _calibrate(self, model: nn.Module, context: Context, jobs: list[_Job]) -> Captured | None:
        if self.activations != "static":
            return None
        requests = self._requests(model, context, [job for job in jobs if job.rounds_input])
        captured = capture(
            model,
            context.call,
            context.calibration(),
            requests,
            batch_size=self.batch_size,
            progress=lambda rows: context.progress(rows, context.rows, "calibration rows"),
        )
        if captured.silent:
            raise UserError(
                self.name,
                f"{', '.join(captured.silent)} never ran on the calibration rows",
                f"Leave out what does not run: skip: [{', '.join(captured.silent)}].",
            )
        return captured

    def _requests(self, model: nn.Module, context: Context, jobs: list[_Job]) -> dict[str, Sequence[Observer]]:
        """What is observed at each site; sites that read the same tensor get the same observers."""
        kinds = {job.site.path: job.site.kind for job in jobs}
        first = next(iter(context.calibration()), None)
        leaders = {} if first is None else shared_inputs(model, context.call, first, dict.fromkeys(kinds, self.range))
        importance: dict[str, Tensor] = {}
        for path, kind in kinds.items():
            leader, columns = leaders.get(path, path), _column_energy(model.get_submodule(path), kind)
            importance[leader] = importance[leader] + columns if leader in importance else columns
        made = {
            leader: (range_observer(self.range, self.percentile, energy), Channels()) for leader, energy in importance.items()
        }
        return {path: made[leaders.get(path, path)] for path in kinds}

    def _convert(self, model: nn.Module, context: Context, job: _Job, captured: Captured | None, ties: Ties) -> dict[str, Any]:
        """Replaces one module and says what was done."""
        path, kind = job.site.path, job.site.kind
        module = model.get_submodule(path)
        weight = weight_of(module, kind)
        seen = _Seen.of(captured, path) if captured is not None and job.rounds_input else None
        smoothed = self._smoothing(job, weight, seen) if seen is not None else None
        layer = self._layer(model, job, None if smoothed is None else weight.shape[1]).to(weight.device)
        if layer.bias is not None:
            layer.bias.copy_(module.get_parameter("bias"))
        how = self.weight_range or ("minmax" if job.grid.bits == 8 else "mse")
        says = _round_weight(layer, weight if smoothed is None else weight / smoothed.factor.to(weight.device), how)
        if seen is not None:
            says["activation"] = self._fit_input(path, layer, seen, smoothed)
            if self.bias_correction and layer.bias is not None:
                says["bias_correction"] = _correct_bias(layer, weight, seen.channels)
        context.surgery.replace(model, path, layer)
        ties.settle(model, context.surgery, path)
        return says

    def _smoothing(self, job: _Job, weight: Tensor, seen: _Seen) -> Smoothing | None:
        """Factors for the input's channels, or None where they are not wanted, not possible or not worth it."""
        if not self.smooth or not seen.alone or job.site.kind == "conv2d":
            return None
        channels = seen.channels
        statistics = (channels.low, channels.high, channels.mean_square)
        low, high, mean_square = (statistic.to(weight.device) for statistic in statistics)
        found = smoothing(weight, low, high, mean_square, job.grid, self._input_grid)
        return found if found.before_db < _ENOUGH_DB and found.gain_db >= _WORTH_DB else None

    def _fit_input(self, path: str, layer: QuantizedLayer, seen: _Seen, smoothed: Smoothing | None) -> dict[str, Any]:
        """Gives the layer's input its grid, and says which."""
        ranged, grid = seen.ranged, layer.activation
        assert grid is not None
        if seen.channels.count == 0 or ranged.low == ranged.high == 0:
            raise UserError(
                self.name,
                f"the input of {path} is always 0 on the calibration rows: it has no range",
                f"Use rows that reach it, or leave it float with skip: [{path}].",
            )
        says: dict[str, Any] = {"seen": [ranged.low, ranged.high]}
        if smoothed is None:
            low, high = ranged.range(self._input_grid)
            says |= {"method": self.range, "clipped_percent": _finite(100 * ranged.clipped(low, high))}
        else:
            assert grid.factor is not None
            grid.factor.copy_(smoothed.factor)
            low = float((seen.channels.low * smoothed.factor).amin())
            high = float((seen.channels.high * smoothed.factor).amax())
            says |= {
                "method": "minmax",
                "clipped_percent": 0.0,
                "smoothed": smoothed.strength,
                "gain_db": smoothed.gain_db,
            }
        scale, zero_point = storable(self._input_grid, torch.tensor(low), torch.tensor(high))
        grid.scale.copy_(scale)
        if zero_point is not None:
            grid.zero_point.copy_(zero_point)
        if seen.leader:
            says["same_tensor_as"] = seen.leader
        return says | {"range": [low, high], "scale": float(scale), "zero_point": int(grid.zero_point)}

    @property
    def _input_grid(self) -> Grid:
        return Grid(self.activation_bits, self.activation_symmetric, "tensor")


@dataclass(frozen=True)
class _Seen:
    """What calibration saw at one site; ``alone``: no other quantized layer reads the same tensor."""

    ranged: RangeObserver
    channels: Channels
    leader: str | None
    alone: bool

    @classmethod
    def of(cls, captured: Captured, path: str) -> _Seen:
        ranged, channels = captured.observers[path]
        assert isinstance(ranged, RangeObserver)
        assert isinstance(channels, Channels)
        leader = captured.shared.get(path)
        return cls(ranged, channels, leader, leader is None and path not in captured.shared.values())


def _round_weight(layer: QuantizedLayer, weight: Tensor, how: WeightRange) -> dict[str, Any]:
    """Stores the weight's codes in the layer and says what the rounding cost."""
    grid = layer.quantized_weight.grid
    scale, zero_point = scales_of(weight, grid, how)
    codes = codes_of(weight, grid, scale, zero_point)
    layer.quantized_weight.store(codes, scale, zero_point)
    return {
        "bits": grid.bits,
        "granularity": grid.granularity,
        "group_size": grid.group_size,
        "scale": [float(scale.min()), float(scale.max())],
        "weight_sqnr_db": _finite(rounding_loss(weight, codes, grid, scale, zero_point)),
    }


def _column_energy(module: nn.Module, kind: str) -> Tensor:
    """The squared norms of the weight's columns, one for each input channel [C]."""
    weight = weight_of(module, kind).float()
    if kind != "conv2d":
        return weight.square().sum(0)
    groups = int(getattr(module, "groups", 1))
    return weight.square().sum((2, 3)).reshape(groups, -1, weight.shape[1]).sum(1).reshape(-1)


def _correct_bias(layer: QuantizedLayer, weight: Tensor, channels: Channels) -> float:
    """Adds ``(W - W_quantized) E[x]`` to the bias [O]; returns the largest change.

    A convolution's error is summed over its window, as if the mean were the same at every place of it.
    """
    assert layer.bias is not None
    error = weight.float() - layer.weight
    mean = channels.mean.to(error.device)
    if isinstance(layer, QuantConv2d):
        error = error.sum((2, 3))
        means = mean.reshape(layer.groups, 1, -1).expand(-1, error.shape[0] // layer.groups, -1)
        shift = (error * means.reshape(error.shape)).sum(1)
    else:
        shift = error @ mean
    layer.bias += shift
    return float(shift.abs().max())


def _is_table(site: Site) -> bool:
    """Whether a site is a table that is a parameter of its own, as position embeddings of vision transformers are."""
    return site.kind == "other" and "embedding" in site.roles


def _divisors_near(number: int, wanted: int) -> list[int]:
    """The nearest divisors on both sides of ``wanted``."""
    divisors = [size for size in range(1, number + 1) if number % size == 0]
    below = [size for size in divisors if size < wanted][-1:]
    return below + [size for size in divisors if size > wanted][:1]


def _finite(value: float) -> float | None:
    """None where JSON has no number."""
    return value if math.isfinite(value) else None


def _first_reason(skipped: Mapping[str, str]) -> str:
    for path, reason in skipped.items():
        return f"{path}: {reason}." + (f" {len(skipped) - 1} more like it." if len(skipped) > 1 else "")
    return "Name roles or module paths under sites."
