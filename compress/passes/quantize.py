"""Quantization of weights and activations to integers."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, NonNegativeInt, PositiveInt, model_validator
from torch import Tensor, nn

from calibrate.capture import Captured, capture, shared_inputs
from calibrate.errors import UserError
from calibrate.grid import Bits, Granularity, Grid
from calibrate.ranges import Channels, Observer, RangeMethod, range_observer
from calibrate.second_moment import SecondMoment
from compress.algorithms.gptq import NotPositiveDefinite, gptq, output_error, refined
from compress.algorithms.rounding import WeightRange, codes_of, multiples, scales_of
from compress.algorithms.smoothing import Smoothing, balanced, smoothing
from compress.anatomy import Anatomy, Site
from compress.bit_choice import choose, forecast
from compress.bit_driver import drive
from compress.folding import folds
from compress.layers import QuantEmbedding, is_quantized
from compress.layers.conversion import QuantizedLayer, matrix_shape, obstacle, quantized_layer, weight_of
from compress.layers.fitting import Seen, column_energy, fit_input, shift_bias, store_weight
from compress.nncf_layers import put_in, require_nncf
from compress.nncf_options import beyond_nncf, nncf_refusal, nncf_settings
from compress.passes.contract import Context, Pass, Target, blank
from compress.site_options import Choice, Mixed, SiteOptions, label, options_of, overridden
from compress.surgery import Surgery
from compress.tied import Ties

__all__ = ["Quantize"]

_WORTH_DB, _WORTH_FOLDED_DB = 3.0, 0.5
"""What factors have to gain where the layer multiplies by them, and where they are folded into the layer before."""

_HALF = 0.5
"""What rounding by the output is expected to leave of the noise of rounding to the nearest code."""


@dataclass(frozen=True)
class _Job:
    """One module to quantize: where, on which grid, whether its input is rounded too, and the table whose codes it shares."""

    site: Site
    grid: Grid
    rounds_input: bool
    table: Site | None = None


class Quantize(Pass):
    """Round weights, and the inputs of the layers that hold them, to integers.

    A weight becomes integer codes with one scale for each output channel, group of inputs or tensor; it is rounded to
    the nearest code (Jacob et al. 2018, arXiv 1712.05877; Nagel et al. 2021, arXiv 2106.08295), or so that the layer's
    output on the calibration rows changes least (``rounding: gptq``; Frantar et al. 2023, arXiv 2210.17323), block after
    block, on the inputs that the blocks already quantized give. Static activations get one scale for each tensor from
    calibration rows, in which padded positions do not count; layers that read the same tensor share its scale. Scales are
    float16 numbers, so that every artifact holds the same ones.

    Factors that smooth an input (``smooth``) move into the norm or the projection that makes the input wherever nothing
    else reads it, which costs nothing when the model runs: that layer's weight and bias change too, though it is no target.

    Handles linear layers, GPT-2's Conv1D (turned into a linear layer), 2-D convolutions and embeddings. Without
    ``sites`` it takes every projection inside the blocks: not the embeddings, not the norms, not the head. What it
    cannot take stays float and is listed in the report with the reason.

    With ``mixed`` the bits of each site are chosen: what the outputs lose when it alone is rounded is measured on calibration
    rows, those losses add up as noise (they are reported beside what the whole then loses), and the least sum under a budget
    is found exactly, as a knapsack (Hubara et al. 2020, arXiv 2006.10518, sec. 4, with the outputs' squared error in the
    place of the task loss). Sites that hold one weight share their bits; a site that cannot take a candidate has another.
    Bytes are those in memory, with room for the factors of smoothed inputs. With ``max_drop`` the strongest setting is tried
    first, and the sites that lose most are undone until the drop on the rows that judge is allowed; how many is found by
    bisection.

    ``engine: nncf`` leaves all of this to NNCF (nncf.quantize, or nncf.compress_weights with ``activations: none``; its preset
    for transformers): its ranges, SmoothQuant, fast bias correction and weight compression. It is given the calibration rows
    one by one, padding included, and works on two copies of the model. Codes, scales, zero points, factors and biases are
    read out of the torch model that it gives back; what it would have rounded besides the weights and inputs of layers is
    named in the report under ``skipped``.
    """

    name: ClassVar[str] = "quantize"
    source: ClassVar[str] = (
        "Jacob et al. 2018, arXiv 1712.05877; Nagel et al. 2021, arXiv 2106.08295; Xiao et al. 2023, arXiv 2211.10438; "
        "Frantar et al. 2023, arXiv 2210.17323; Behdin et al. 2023, arXiv 2309.01885; engine: nncf: Kozlov et al. 2020, arXiv "
        "2002.08679; mixed: Hubara et al. 2020, arXiv 2006.10518"
    )
    needs_calibration: ClassVar[bool] = True

    engine: Literal["own", "nncf"] = Field(
        "own",
        description="nncf: ranges, factors, biases and codes are found by NNCF (Intel's toolkit, extra nncf) on the torch model; "
        "an option that it lacks is refused.",
    )
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
    overrides: dict[str, Choice | SiteOptions] = Field(
        {},
        description="Sites that differ, by role or module path (wildcards allowed; a later pattern holds over an earlier one): "
        "bits of the weights, float, or {weights, activations: none}.",
    )
    mixed: Mixed | None = Field(
        None,
        description="Bits chosen site by site, among candidates, so that the outputs on calibration rows are predicted to lose "
        "least under one budget: size_ratio, size_mb or loss_db. The report tells them as overrides.",
    )
    max_drop: float | None = Field(
        None,
        ge=0,
        le=1,
        description="How much worse than the model given this one may be: the metric on the rows of data.validation (perplexity: "
        "a share), or without them the share of predictions on calibration rows that change. The sites that lose most alone are "
        "undone until that holds: left float, or with mixed (without a budget) given what costs least.",
    )
    evaluations: int = Field(
        12, ge=3, le=1000, description="With max_drop: most runs over the rows that judge; what they do not settle stays float."
    )
    group_scales: Literal["free", "multiples"] = Field(
        "free",
        description="multiples: the scales of a channel's groups are whole multiples of one step, so that static 8-bit inputs "
        "and 4- or 2-bit weights in groups meet on integer kernels in ONNX Runtime and OpenVINO.",
    )
    embedding_group_size: PositiveInt | None = Field(
        None, description="Columns of a table's row that share a scale. Default: the whole row."
    )
    smooth: bool | Literal["balanced"] = Field(
        True,
        description="Each input channel of a linear layer is multiplied by a factor of its own before it is rounded, and the "
        "weight divided by it (SmoothQuant, arXiv 2211.10438; the strength is searched for each tensor; balanced: each "
        "factor by descent on the expected noise, up to a second a layer more). Where the layer that makes the tensor can "
        "take the factors in, that is free; elsewhere it costs one multiplication a tensor, and is done where the output is "
        "expected below smooth_below_db and 3 dB are gained. Only with static activations.",
    )
    alpha: float | None = Field(
        None,
        ge=0,
        le=1,
        description="SmoothQuant's strength for every tensor. Only with engine: nncf, where it is 0.95 by itself.",
    )
    smooth_below_db: float = Field(
        28.0, description="Expected SQNR of a layer's output, in dB, below which factors are worth a multiplication."
    )
    rounding: Literal["nearest", "gptq"] = Field(
        "nearest",
        description="nearest: each weight to its nearest code; gptq: the weights of linear layers so that the layer's output "
        "on the calibration rows changes least. Needs at least as many positions in the rows as a layer has inputs.",
    )
    damping: float = Field(0.01, gt=0, le=1, description="Part of the mean diagonal that is added to GPTQ's Hessian.")
    column_order: bool = Field(True, description="GPTQ rounds the inputs with the largest second moments first.")
    refinements: NonNegativeInt = Field(
        2, description="Rounds of coordinate descent after GPTQ (arXiv 2309.01885): no output's error grows by them."
    )
    unfactorable: Literal["stop", "nearest"] = Field(
        "stop", description="What becomes of a layer whose Hessian has no Cholesky factor: an error, or the nearest codes."
    )
    bias_correction: bool = Field(
        True,
        description="Adds to each bias what rounding takes from the layer's mean output on the calibration rows "
        "(Nagel et al. 2019, arXiv 1906.04721, sec. 4.2). Only with static activations or rounding: gptq.",
    )
    scale_estimation: bool = Field(
        False,
        description="NNCF searches the scales of 4-bit weights by the layer's output. Only with engine: nncf, activations: none.",
    )
    batch_size: PositiveInt = Field(8, description="Rows that run through the model at a time during calibration.")

    @model_validator(mode="after")
    def _consistent(self) -> Quantize:
        if self.group_size and self.granularity in ("channel", "tensor"):
            raise ValueError(f"group_size has no meaning with granularity {self.granularity}")
        if self.group_scales == "multiples" and self.weights == 8 and not self.several:
            raise ValueError("group_scales: multiples is for weights of 4 or 2 bits in groups")
        if self.mixed is not None and not self.mixed.budgets and self.max_drop is None:
            raise ValueError("mixed has no budget\nAdd size_ratio, size_mb or loss_db to it, or max_drop beside it.")
        if self.mixed is not None and self.mixed.budgets and self.max_drop is not None:
            raise ValueError("max_drop and a budget of mixed both say how far to go\nKeep one of them.")
        if wrong := nncf_refusal(self):
            raise ValueError(wrong)
        return self

    @property
    def several(self) -> bool:
        """Whether sites may differ in bits."""
        return self.mixed is not None or any(isinstance(options_of(one).weights, int) for one in self.overrides.values())

    @property
    def chooses(self) -> bool:
        """Whether bits are chosen when the pass runs."""
        return self.mixed is not None or self.max_drop is not None

    @property
    def uniform(self) -> Quantize:
        """The same with 8 bits at first, where bits are chosen: every site can take those."""
        return self if self.mixed is None else self.model_copy(update={"weights": 8, "embeddings": self.embeddings and 8})

    def targets(self, model: nn.Module, anatomy: Anatomy) -> list[Target]:
        jobs = self.uniform._plan(model, anatomy)[0]
        return [Target(job.site.path, ", ".join(job.site.roles), self._action(job)) for job in jobs]

    def preview(self, model: nn.Module, anatomy: Anatomy) -> dict[str, nn.Module]:
        if self.chooses:
            return forecast(self, model, anatomy).preview(model, anatomy)
        with torch.device("meta"):
            return {job.site.path: self._layer(model, job) for job in self._plan(model, anatomy)[0]}

    def rehearse(self, model: nn.Module, anatomy: Anatomy, surgery: Surgery) -> None:
        if self.chooses:
            forecast(self, model, anatomy).rehearse(model, anatomy, surgery)
            return
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
        return self.uniform._plan(model, anatomy)[1]

    @property
    def judges(self) -> bool:
        return self.max_drop is not None

    @property
    def assumes(self) -> str:
        if self.max_drop is not None:
            return "max_drop undoes what it has to when the pass runs; sizes are those of the strongest setting"
        if self.mixed is None:
            return ""
        if self.mixed.loss_db is not None:
            return "bits are chosen by loss_db when the pass runs; sizes are those of the smallest choice"
        return "bits are chosen when the pass runs; the choice that is shown is one that keeps the budget, which bounds the size"

    @property
    def calibrates(self) -> bool:
        return self.chooses or self.activations == "static" or self.rounding == "gptq" or self.engine == "nncf"

    def run(self, model: nn.Module, context: Context) -> nn.Module:
        if self.max_drop is not None:
            return drive(self, model, context)
        if self.mixed is not None:
            return choose(self, model, context)
        jobs, skipped = self._plan(model, context.anatomy)
        if self.engine == "nncf":
            return self._by_nncf(model, context, jobs, skipped)
        captured = self._calibrate(model, context, jobs)
        inputs = self._smoothed(model, context, jobs, captured) if captured else {}
        ties = Ties.of(model, {job.site.path: job.grid for job in jobs})
        report: dict[str, Any] = {}
        for stage in self._stages(jobs):
            moments = self._moments(model, context, stage, ties)
            with torch.no_grad():
                for job in stage:
                    path = job.site.path
                    context.progress(len(report), len(jobs), path)
                    report[path] = self._convert(model, context, job, inputs.get(path), moments.get(path), ties)
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

    def sites_of(self, model: nn.Module, anatomy: Anatomy) -> tuple[list[tuple[Site, Site | None]], dict[str, str]]:
        """Sites that would be quantized, each with the table whose codes it shares, and why others would not be."""
        jobs, skipped = self._plan(model, anatomy)
        return [(job.site, job.table) for job in jobs], skipped

    def empty_layer(self, model: nn.Module, site: Site, options: SiteOptions, table: Site | None = None) -> QuantizedLayer:
        """The layer that would stand at a site with these options, its codes still zero; ``table``: see ``sites_of``.

        Raises:
            UserError: the site cannot take them.
        """
        return self._layer(model, self._job(model, site, options, table))

    def site_layers(
        self, model: nn.Module, context: Context, settings: Mapping[str, Sequence[SiteOptions]]
    ) -> Iterator[tuple[str, list[QuantizedLayer]]]:
        """For one site after the other the layers that would stand there, one for each setting but float; none is put in.

        They are made from what the float model gives. Factors of inputs are folded into ``model`` where they can be, which
        changes its parameters but not its function.

        Args:
            settings: by path, of every site that ``sites_of`` names.
        """
        jobs, _ = self._plan(model, context.anatomy)
        captured = self._calibrate(model, context, jobs)
        inputs = self._smoothed(model, context, jobs, captured) if captured else {}
        ties = Ties.of(model, {job.site.path: job.grid for job in jobs})
        for stage in self._stages(jobs):
            moments = self._moments(model, context, stage, ties)
            for job in stage:
                path, made = job.site.path, []
                for options in settings[path]:
                    one = self._job(model, job.site, options, job.table)
                    with torch.no_grad():
                        seen = inputs.get(path) if one.rounds_input else None
                        made.append(self._filled(model, one, seen, moments.get(path))[0])
                yield path, made
            del moments

    def _by_nncf(self, model: nn.Module, context: Context, jobs: list[_Job], skipped: dict[str, str]) -> nn.Module:
        places = [(job.site, job.grid) for job in jobs]
        said = put_in(model, context, places, nncf_settings(self), self.activations == "static")
        context.report |= said | {"skipped": skipped | said["skipped"], "padding_counted": []}
        return model

    def _plan(self, model: nn.Module, anatomy: Anatomy) -> tuple[list[_Job], dict[str, str]]:
        """What will be quantized, in the model's order, and why other targets will not be."""
        if self.engine == "nncf":
            require_nncf()
        chosen = self._chosen(anatomy)
        left = {site.path for site in anatomy.select(self.skip, self.name)} if self.skip else set()
        own = overridden(anatomy, self.overrides, chosen, self.name)
        jobs, skipped = [], {}
        for site in anatomy.sites:
            if site.path not in chosen:
                continue
            if site.kind != "other" and is_quantized(model.get_submodule(site.path)):
                if site.path in left:
                    continue
                raise UserError(self.name, f"{site.path} is quantized already", f"Leave it out with skip: [{site.path}].")
            options = own.get(site.path, SiteOptions())
            reason = "named under skip" if site.path in left else obstacle(model, site.path, site.kind)
            if not reason and self.engine == "nncf":
                reason = beyond_nncf(self, site, (site.kind == "embedding" and self.embeddings) or self.weights)
            if reason:
                skipped[site.path] = reason
            elif options.weights == "float":
                skipped[site.path] = "float under overrides"
            else:
                jobs.append(self._job(model, site, options))
        if not jobs:
            raise UserError(self.name, "there is nothing to quantize", _first_reason(skipped))
        if self.embeddings is not None and (self.engine, self.activations) != ("nncf", "static"):
            jobs += self._tied_heads(model, anatomy, jobs, left)
        return jobs, skipped

    def _job(self, model: nn.Module, site: Site, options: SiteOptions, table: Site | None = None) -> _Job:
        assert options.weights != "float"
        rounds_input = site.kind != "embedding" and table is None and "none" not in (self.activations, options.activations)
        return _Job(site, self._grid(model, table or site, options.weights), rounds_input, table)

    def _tied_heads(self, model: nn.Module, anatomy: Anatomy, jobs: list[_Job], left: set[str]) -> list[_Job]:
        """Linear layers that hold the weight of a table that is quantized, and that nothing else was said of: they share its
        codes, their inputs stay float. Otherwise the file would hold the weight twice, once in float."""
        tables = {id(model.get_submodule(job.site.path).weight): job for job in jobs if job.site.kind == "embedding"}
        planned = {job.site.path for job in jobs} | left
        linears = [site for site in anatomy.sites if site.kind == "linear" and site.path not in planned]
        tied = [(site, tables.get(id(model.get_submodule(site.path).weight))) for site in linears]
        return [_Job(site, table.grid, False, table.site) for site, table in tied if table is not None]

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

    def _grid(self, model: nn.Module, site: Site, bits: Bits | None = None) -> Grid:
        bits = bits or (site.kind == "embedding" and self.embeddings) or self.weights
        _, columns = matrix_shape(model.get_submodule(site.path), site.kind)
        granularity: Granularity = self.granularity or (
            "group" if bits < 8 or (self.group_size and not self.several) else "channel"
        )
        if site.kind in ("embedding", "conv2d") and granularity == "group":
            granularity = "channel"
        if site.kind == "embedding" and self.embedding_group_size:
            granularity = "group"
        if site.kind == "embedding" and columns * bits % 8:
            raise UserError(
                self.name,
                f"{bits}-bit codes of the {columns} columns of {site.path} do not fill whole bytes",
                "Use 8 bits there.",
            )
        if granularity != "group":
            return Grid(bits, self.symmetric, granularity)
        size = (self.embedding_group_size if site.kind == "embedding" else None) or self.group_size or 32
        if columns % size:
            near = _divisors_near(columns, size)
            raise UserError(
                self.name,
                f"group_size {size} does not divide the {columns} inputs of {site.path}",
                f"Divisors near it: {', '.join(map(str, near))}.",
            )
        return Grid(bits, self.symmetric, granularity, size)

    def _action(self, job: _Job) -> str:
        if self.mixed is not None:
            return f"weights chosen from {', '.join(label(options_of(one)) for one in self.mixed.candidates)}"
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
            raise self._silent(captured)
        return captured

    def _requests(self, model: nn.Module, context: Context, jobs: list[_Job]) -> dict[str, Sequence[Observer]]:
        """What is observed at each site; sites that read the same tensor get the same observers."""
        kinds = {job.site.path: job.site.kind for job in jobs}
        first = next(iter(context.calibration()), None)
        leaders = {} if first is None else shared_inputs(model, context.call, first, dict.fromkeys(kinds, self.range))
        importance: dict[str, Tensor] = {}
        for path, kind in kinds.items():
            leader, columns = leaders.get(path, path), column_energy(model.get_submodule(path), kind)
            importance[leader] = importance[leader] + columns if leader in importance else columns
        made = {
            leader: (range_observer(self.range, self.percentile, energy), Channels()) for leader, energy in importance.items()
        }
        return {path: made[leaders.get(path, path)] for path in kinds}

    def _smoothed(self, model: nn.Module, context: Context, jobs: list[_Job], captured: Captured) -> dict[str, Seen]:
        """What was seen at each site whose input is rounded; factors that can be are folded into the model."""
        by_path = {job.site.path: job for job in jobs if job.rounds_input}
        inputs = {path: Seen.of(captured, path) for path in by_path}
        if not self.smooth:
            return inputs
        groups: dict[str, list[_Job]] = {}
        for path, seen in inputs.items():
            groups.setdefault(seen.leader or path, []).append(by_path[path])
        found = {}
        for number, (leader, group) in enumerate(groups.items()):
            context.progress(number, len(groups), f"factors for {leader}")
            smoothed = self._factors(model, group, inputs[leader])
            if smoothed is not None and smoothed.gain_db >= _WORTH_FOLDED_DB:
                found[leader] = smoothed
        places = folds(model, context, [[job.site for job in groups[leader]] for leader in found])
        for leader, smoothed in found.items():
            place = places.get(leader)
            if place is not None:
                place.apply(model, smoothed.factor)
            elif smoothed.before_db >= self.smooth_below_db or smoothed.gain_db < _WORTH_DB:
                continue
            for job in groups[leader]:
                path = job.site.path
                inputs[path] = replace(inputs[path], smoothed=smoothed, folded=place.producer if place else None)
        return inputs

    def _factors(self, model: nn.Module, group: list[_Job], seen: Seen) -> Smoothing | None:
        """Factors for a tensor that the layers of a group read, or None where a convolution is among them."""
        if any(job.site.kind == "conv2d" for job in group) or seen.nothing:
            return None
        weight = torch.cat([weight_of(model.get_submodule(job.site.path), job.site.kind) for job in group])
        channels = seen.channels
        low, high, mean_square = (
            statistic.to(weight.device) for statistic in (channels.low, channels.high, channels.mean_square)
        )
        if self.smooth == "balanced":
            share = _HALF if self.rounding == "gptq" else 1.0
            return balanced(weight, low, high, mean_square, group[0].grid, self._input_grid, weight_share=share)
        return smoothing(weight, low, high, mean_square, group[0].grid, self._input_grid)

    def _stages(self, jobs: list[_Job]) -> list[list[_Job]]:
        """The jobs that are rounded on the same state of the model: all, or with GPTQ those of a block."""
        if self.rounding == "nearest":
            return [jobs]
        return [list(stage) for _, stage in itertools.groupby(jobs, key=lambda job: (job.site.block, job.site.kind))]

    def _moments(self, model: nn.Module, context: Context, stage: list[_Job], ties: Ties) -> dict[str, SecondMoment]:
        """The second moments of the inputs of a stage's linear layers, as the model is now; none without GPTQ."""
        kinds = ("linear", "conv1d")
        paths = [job.site.path for job in stage if job.site.kind in kinds and not ties.holders[job.site.path]]
        if self.rounding == "nearest" or not paths:
            return {}
        captured = capture(
            model,
            context.call,
            context.calibration(),
            {path: (SecondMoment(),) for path in paths},
            batch_size=self.batch_size,
            whole=False,
        )
        if captured.silent:
            raise self._silent(captured)
        moments: dict[str, SecondMoment] = {}
        for path in paths:
            moment = captured.observers[path][0]
            assert isinstance(moment, SecondMoment)
            inputs = moment.matrix.shape[0]
            if moment.count < inputs:
                needed = math.ceil(captured.rows * inputs / max(moment.count, 1))
                raise UserError(
                    self.name,
                    f"rounding: gptq at {path} needs {inputs} positions, and the {captured.rows} calibration rows have "
                    f"{moment.count}",
                    f"Use about {needed} rows, or rounding: nearest.",
                )
            moments[path] = moment
        return moments

    def _convert(
        self, model: nn.Module, context: Context, job: _Job, seen: Seen | None, moment: SecondMoment | None, ties: Ties
    ) -> dict[str, Any]:
        """Replaces one module and says what was done."""
        layer, says = self._filled(model, job, seen, moment)
        context.surgery.replace(model, job.site.path, layer)
        ties.settle(model, context.surgery, job.site.path)
        return says

    def _filled(
        self, model: nn.Module, job: _Job, seen: Seen | None, moment: SecondMoment | None
    ) -> tuple[QuantizedLayer, dict[str, Any]]:
        """The layer that stands in for one module, with all its numbers, and what was done."""
        path, kind = job.site.path, job.site.kind
        module = model.get_submodule(path)
        weight = weight_of(module, kind)
        factor = None if seen is None or seen.factor is None else seen.factor.to(weight.device)
        layer = self._layer(model, job, None if factor is None else weight.shape[1]).to(weight.device)
        if layer.bias is not None:
            layer.bias.copy_(module.get_parameter("bias"))
        says = self._round(path, layer, weight if factor is None else weight / factor, factor, moment)
        if seen is not None:
            if seen.nothing:
                raise UserError(
                    self.name,
                    f"the input of {path} is always 0 on the calibration rows: it has no range",
                    f"Use rows that reach it, or leave it float with skip: [{path}].",
                )
            says["activation"] = fit_input(layer, seen, self._input_grid, self.range)
        mean = seen.mean if seen is not None else None if moment is None else moment.mean
        if self.bias_correction and layer.bias is not None and mean is not None:
            says["bias_correction"] = shift_bias(layer, weight, mean)
        return layer, says

    def _round(
        self, path: str, layer: QuantizedLayer, weight: Tensor, factor: Tensor | None, moment: SecondMoment | None
    ) -> dict[str, Any]:
        """Gives the layer its codes and says how."""
        grid = layer.quantized_weight.grid
        how = self.weight_range or ("minmax" if grid.bits == 8 else "mse")
        scale, zero_point = scales_of(weight, grid, how)
        if self.group_scales == "multiples" and grid.granularity == "group" and not isinstance(layer, QuantEmbedding):
            scale = multiples(scale, grid)
        nearest = codes_of(weight, grid, scale, zero_point)
        if moment is None:
            return store_weight(layer, weight, nearest, scale, zero_point) | {"rounding": "nearest"}
        hessian = moment.matrix if factor is None else moment.matrix * factor * factor.unsqueeze(1)
        try:
            codes = gptq(weight, hessian, grid, scale, zero_point, damping=self.damping, order=self.column_order)
        except NotPositiveDefinite as failure:
            if self.unfactorable == "stop":
                raise UserError(
                    self.name,
                    f"{path}: {failure}",
                    "Use more calibration rows, a larger damping, or unfactorable: nearest.",
                ) from failure
            return store_weight(layer, weight, nearest, scale, zero_point) | {"rounding": "nearest", "because": str(failure)}
        codes = refined(weight, codes, hessian, grid, scale, zero_point, self.refinements)
        errors = [
            float(output_error(weight, grid.dequantize(given, scale, zero_point), hessian).sum()) for given in (nearest, codes)
        ]
        gain = 10 * math.log10(errors[0] / errors[1]) if min(errors) > 0 else 0.0
        return store_weight(layer, weight, codes, scale, zero_point) | {"rounding": "gptq", "rounding_gain_db": gain}

    def _silent(self, captured: Captured) -> UserError:
        silent = ", ".join(captured.silent)
        return UserError(
            self.name, f"{silent} never ran on the calibration rows", f"Leave out what does not run: skip: [{silent}]."
        )

    @property
    def _input_grid(self) -> Grid:
        return Grid(self.activation_bits, self.activation_symmetric, "tensor")


def _is_table(site: Site) -> bool:
    """Whether a site is a table that is a parameter of its own, as position embeddings of vision transformers are."""
    return site.kind == "other" and "embedding" in site.roles


def _divisors_near(number: int, wanted: int) -> list[int]:
    """The nearest divisors on both sides of ``wanted``."""
    divisors = [size for size in range(1, number + 1) if number % size == 0]
    below = [size for size in divisors if size < wanted][-1:]
    return below + [size for size in divisors if size > wanted][:1]


def _first_reason(skipped: Mapping[str, str]) -> str:
    for path, reason in skipped.items():
        return f"{path}: {reason}." + (f" {len(skipped) - 1} more like it." if len(skipped) > 1 else "")
    return "Name roles or module paths under sites."
