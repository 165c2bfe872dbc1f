"""Quantization of weights and activations to integers."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field, NonNegativeInt, PositiveInt, model_validator
from torch import nn

from calibrate.grid import Bits, Granularity
from calibrate.ranges import RangeMethod
from compress.algorithms.rounding import WeightRange
from compress.anatomy import Anatomy
from compress.layers.fitting import shorten_bias
from compress.passes.contract import Context, Pass, Target, blank
from compress.quantization.bit_choice import choose, forecast
from compress.quantization.bit_driver import drive
from compress.quantization.float8 import float8_refusal
from compress.quantization.joint_ranges import require_bridges
from compress.quantization.nncf_layers import put_in
from compress.quantization.nncf_options import nncf_refusal, nncf_settings
from compress.quantization.powers_of_two import left_float, power_of_two_refusal
from compress.quantization.quantized_sites import action, plan_sites, site_layer
from compress.quantization.rounded_layers import round_sites
from compress.quantization.site_options import Choice, Mixed, SiteOptions, options_of
from compress.surgery import Surgery
from compress.tied import Ties

__all__ = ["Quantize"]


class Quantize(Pass):
    """Round weights, and the inputs of the layers that hold them, to integers.

    A weight becomes integer codes with one scale for each output channel, group of inputs or tensor; it is rounded to
    the nearest code (Jacob et al. 2018, arXiv 1712.05877; Nagel et al. 2021, arXiv 2106.08295), or so that the layer's
    output on the calibration rows changes least (``rounding: gptq``; Frantar et al. 2023, arXiv 2210.17323; ``adaround``: Nagel
    et al. 2020, arXiv 2004.10568), block after block, on the inputs that the blocks already quantized give. ``reconstruct``
    begins with GPTQ; then codes, each by one at most, and biases of a block learn to give the float block's output (Li et al.
    2021, arXiv 2102.05426), on three of four batches of the calibration rows; the others judge what stays. Static
    activations get one scale for each tensor from calibration rows, in which padded positions do not count; layers that read
    the same tensor share its scale. Scales are float16 numbers, so that every artifact holds the same ones; with ``scales:
    power_of_two`` powers of two (Dong et al. 2023, BCT, arXiv 2304.01483; the rule is ``Grid``'s).

    Factors that smooth an input (``smooth``) move into the norm or the projection that makes the input wherever nothing
    else reads it, which costs nothing when the model runs: that layer's weight and bias change too, though it is no target.

    Handles linear layers, GPT-2's Conv1D (turned into a linear layer), 2-D convolutions and embeddings. Without
    ``sites`` it takes every projection inside the blocks: not the embeddings, not the norms, not the head. What it
    cannot take stays float and is listed in the report with the reason.

    With ``mixed`` the bits of each site are chosen: what the outputs lose when it alone is rounded is measured on calibration
    rows, those losses add up as noise (they are reported beside what the whole then loses), and the least sum under a budget
    is found exactly, as a knapsack (Hubara et al. 2020, arXiv 2006.10518, sec. 4, with the outputs' squared error in the
    place of the task loss). Sites that hold one weight share their bits; a site that cannot take a candidate has another.
    Bytes are those in memory, with room for the factors of smoothed inputs. With ``latency_ratio`` the cost is time: files with
    each kind of layer at each setting are timed, those times add up, and the chosen bits are timed as a whole.

    With ``max_drop`` the strongest setting is tried first, and the sites that lose most are undone until the drop on the rows
    that judge is allowed; how many is found by bisection.

    ``engine: nncf`` leaves all of this to NNCF (nncf.quantize, or nncf.compress_weights with ``activations: none``; its preset
    for transformers): its ranges, SmoothQuant, fast bias correction and weight compression. It is given the calibration rows
    one by one, padding included, and works on two copies of the model. Codes, scales, zero points, factors and biases are
    read out of the torch model that it gives back; what it would have rounded besides the weights and inputs of layers is
    named in the report under ``skipped``.
    """

    name: ClassVar[str] = "quantize"
    source: ClassVar[str] = (
        "Jacob et al. 2018, arXiv 1712.05877; Nagel et al. 2021, arXiv 2106.08295; Xiao et al. 2023, arXiv 2211.10438; "
        "Frantar et al. 2023, arXiv 2210.17323; Nagel et al. 2020, arXiv 2004.10568; Li et al. 2021, arXiv 2102.05426; Behdin et "
        "al. 2023, arXiv 2309.01885; Yuan et al. 2022, arXiv 2111.12293; Lee et al. 2023, arXiv 2303.12557; Zhang et al. 2024, "
        "arXiv 2403.07134; Sun et al. 2024, arXiv 2402.17762; Li et al. 2023, arXiv 2212.08254; Dong et al. "
        "2023, arXiv 2304.01483; engine: nncf: Kozlov et al. 2020, arXiv 2002.08679; mixed: Hubara et al. 2020, arXiv 2006.10518"
    )
    needs_calibration: ClassVar[bool] = True

    engine: Literal["own", "nncf"] = Field(
        "own",
        description="nncf: ranges, factors, biases and codes are found by NNCF (Intel's toolkit, extra nncf) on the torch model; "
        "an option that it lacks is refused.",
    )
    weights: Literal[Bits, "fp8"] = Field(
        8,
        description="Bits of each weight. TensorRT holds 3 and 2 in 4, Core ML 3 in 4 where groups have 64 inputs or fewer. fp8: "
        "8-bit floating point (E4M3), and inputs too, for TensorRT on GPUs of compute capability 8.9 and later.",
    )
    granularity: Granularity | None = Field(
        None,
        description="One scale for each output channel, group of inputs, or tensor. Default: channel for 8 bits, group "
        "below; convolutions and embeddings are per channel (row) unless this says tensor.",
    )
    group_size: PositiveInt | None = Field(
        None, description="Inputs that share a scale; has to divide the inputs. Default: 32 where groups are used."
    )
    symmetric: bool = Field(True, description="Weights without zero points.")
    scales: Literal["free", "power_of_two"] = Field(
        "free",
        description="power_of_two: scales of weights, tables and static inputs are powers of two (BCT, arXiv 2304.01483): of a "
        "weight the best of four around its largest value by squared error, or with weight_range: minmax the one that covers it.",
    )
    weight_range: WeightRange | None = Field(
        None,
        description="minmax covers every weight; mse searches the clipping of each channel or group. Default: minmax "
        "for 8 bits, mse below and where scales are powers of two.",
    )
    reduce_range: bool | Literal["pairs"] = Field(
        False,
        description="true: weights that meet 8-bit inputs have codes of 7 bits, -64 to 63, because the integer kernels of x86 "
        "processors without VNNI add two neighbouring products in 16 bits and saturate on larger ones; pairs: codes of linear "
        "layers keep 8 bits, and only those give way of which two side by side add up to more than 128 (convolutions, groups and "
        "weights with zero points as with true). A run says where its own processor saturates.",
    )
    activations: Literal["static", "dynamic", "none"] = Field(
        "static",
        description="static: one scale from calibration rows; dynamic: made from each tensor when the model runs; "
        "none: only weights are rounded.",
    )
    activation_bits: Literal[8] = Field(8, description="Bits of each activation.")
    activation_symmetric: bool | Literal["best"] = Field(
        True,
        description="Static activations without zero point: TensorRT takes no other. Dynamic ones always have one. best: each "
        "input has the scheme that costs less by the error of range: hessian, the symmetric one where both cost the same "
        "(Q-HyViT, arXiv 2303.12557).",
    )
    range: RangeMethod | Literal["hessian"] = Field(
        "mse",
        description="How calibration rows become the range of a static activation. hessian: ranges of inputs and of the weights "
        "that meet them are searched in turn, so that the outputs of layers change least where the model's outputs hang on them "
        "(PTQ4ViT, arXiv 2111.12293, with gradients of random combinations of the outputs); mixed and max_drop score single "
        "layers with mse.",
    )
    range_rows: PositiveInt = Field(64, description="With range: hessian: calibration rows that run with gradients.")
    bridges: Literal["alone", "joint"] = Field(
        "alone",
        description="joint: where features of convolutions become tokens of an attention, and back, ranges are searched one "
        "layer after the other, each on what the layers before it give when they are rounded (Q-HyViT, arXiv 2303.12557). Only "
        "with range: hessian.",
    )
    percentile: float = Field(
        99.99, gt=50, le=100, description="Per cent of the values that the range holds, for range: percentile."
    )
    massive_activations: Literal["protect", "ignore"] = Field(
        "protect",
        description="What becomes of static inputs in which a handful of values are above 100 and 1,000 times the median (arXiv "
        "2402.17762). protect: they are reported, and the model's outputs on up to 64 calibration rows say whether the range "
        "covers them or the other positions, or, where 3 dB are gained and needed, whether the layer has factors or a float "
        "input; nothing changes where there are none.",
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
        "least under one budget: size_ratio, size_mb, latency_ratio or loss_db. The report tells them as overrides.",
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
        "and weights of fewer bits in groups meet on integer kernels in ONNX Runtime and OpenVINO.",
    )
    embedding_group_size: PositiveInt | None = Field(
        None, description="Columns of a table's row that share a scale. Default: the whole row."
    )
    smooth: bool | Literal["balanced", "repq"] = Field(
        True,
        description="Each input channel of a linear layer is multiplied by a factor of its own before it is rounded, and the "
        "weight divided by it (SmoothQuant, arXiv 2211.10438; the strength is searched for each tensor; balanced: each "
        "factor by descent on the expected noise, up to a second a layer more). Where the layer that makes the tensor can "
        "take the factors in, that is free; elsewhere it costs one multiplication a tensor, and is done where the output is "
        "expected below smooth_below_db and 3 dB are gained. repq: every channel that leaves a norm has a scale and a zero point "
        "of its own, which move into the norm and the layers after it (RepQ-ViT, arXiv 2212.08254; with activation_symmetric: "
        "false); elsewhere it is as true. Only with static activations.",
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
    rounding: Literal["nearest", "gptq", "adaround", "reconstruct"] = Field(
        "nearest",
        description="nearest: each weight to its nearest code; gptq: the weights of linear layers so that the layer's output "
        "on the calibration rows changes least; adaround: the same, each weight up or down, by descent; reconstruct: after gptq, "
        "codes and biases of a block learn together to give what the float block gave, and keep what held-out rows confirm. "
        "All but nearest need at least as many positions in the rows as a layer has inputs.",
    )
    embedding_rounding: Literal["nearest", "gptq"] = Field(
        "nearest",
        description="gptq: rows of tables of fewer than 8 bits so that the model's outputs change least, by GPTQ with their "
        "gradients on at most 512 rows in the place of a layer's inputs.",
    )
    scale_rounds: NonNegativeInt = Field(
        0,
        description="Rounds in which scales are fitted to GPTQ's codes by least squares (COMQ, arXiv "
        "2403.07134) and the codes to the scales: no output's error grows by them. Not with group_scales: multiples.",
    )
    rounding_steps: PositiveInt = Field(
        200, le=100_000, description="Steps of descent: a layer's with rounding: adaround, a block's with reconstruct."
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
            raise ValueError("group_scales: multiples is for weights of fewer than 8 bits in groups")
        if self.reduce_range and self.activations == "none":
            raise ValueError("reduce_range says nothing where inputs are not rounded\nLeave it out.")
        if self.mixed is not None and not self.mixed.budgets and self.max_drop is None:
            raise ValueError(
                "mixed has no budget\nAdd size_ratio, size_mb, loss_db or latency_ratio to it, or max_drop beside it."
            )
        if wrong := float8_refusal(self) or power_of_two_refusal(self) or self._useless():
            raise ValueError(wrong)
        if self.mixed is not None and self.mixed.budgets and self.max_drop is not None:
            raise ValueError("max_drop and a budget of mixed both say how far to go\nKeep one of them.")
        for option, bits in (("weights", self.weights), ("embeddings", self.embeddings)):
            if self.mixed is not None and bits not in (None, 8):
                what = f"mixed chooses the bits, and {option}: {bits} would say nothing of them"
                raise ValueError(f"{what}\nName {bits} among its candidates, and take {option} out or let it be 8.")
        if "rounding_steps" in self.chosen and self.rounding in ("nearest", "gptq"):
            what = f"rounding_steps says nothing with rounding: {self.rounding}"
            raise ValueError(f"{what}\nLeave it out, or use rounding: adaround or reconstruct.")
        if self.mixed is not None and self.rounding == "reconstruct":
            raise ValueError(
                "mixed measures each site alone, and rounding: reconstruct rounds blocks together\nUse rounding: gptq."
            )
        if wrong := nncf_refusal(self):
            raise ValueError(wrong)
        return self

    def _useless(self) -> str | None:
        """An option that would say nothing, and the way out."""
        if self.range == "hessian" and self.activations != "static":
            return "range: hessian searches the ranges of static activations\nUse activations: static, or leave it out."
        if self.smooth == "repq" and (self.activation_symmetric or self.activations != "static"):
            wrong = "smooth: repq gives channels zero points"
            return f"{wrong}\nAdd activation_symmetric: false to static ones, or use another smooth."
        if self.smooth == "repq" and self.range == "hessian":
            return "range: hessian would search again what smooth: repq sets\nUse another range, or smooth: balanced."
        if "massive_activations" in self.chosen and self.activations != "static":
            return "massive_activations is about static activations\nUse activations: static, or leave it out."
        if self.range != "hessian" and (self.bridges == "joint" or self.activation_symmetric == "best"):
            asked = "bridges: joint" if self.bridges == "joint" else "activation_symmetric: best"
            return f"{asked} goes by the error that range: hessian searches\nAdd range: hessian, or leave it out."
        if "range_rows" in self.chosen and self.range != "hessian":
            return f"range_rows says nothing with range: {self.range}\nLeave it out, or use range: hessian."
        if self.embedding_rounding == "gptq" and self.embeddings in (None, 8):
            return "embedding_rounding: gptq is for tables of fewer than 8 bits\nAdd embeddings: 4, or leave it out."
        if self.scale_rounds and self.rounding not in ("gptq", "reconstruct"):
            return f"scale_rounds says nothing with rounding: {self.rounding}\nLeave it out, or use rounding: gptq."
        if self.scale_rounds and self.granularity == "tensor":
            return "scale_rounds fits scales of channels or groups\nUse granularity: channel or group, or leave it out."
        if self.scale_rounds and self.group_scales == "multiples":
            return "scale_rounds: scales that are multiples of one step cannot be fitted one by one\nLeave it out."
        return None

    @property
    def several(self) -> bool:
        """Whether sites may differ in bits."""
        return self.mixed is not None or any(isinstance(options_of(one).weights, int) for one in self.overrides.values())

    @property
    def chooses(self) -> bool:
        """Whether bits are chosen when the pass runs."""
        return self.mixed is not None or self.max_drop is not None

    def targets(self, model: nn.Module, anatomy: Anatomy) -> list[Target]:
        jobs = plan_sites(self, model, anatomy)[0]
        require_bridges(self, anatomy, jobs)
        return [Target(job.site.path, ", ".join(job.site.roles), action(self, job)) for job in jobs]

    def preview(self, model: nn.Module, anatomy: Anatomy) -> dict[str, nn.Module]:
        if self.chooses:
            return forecast(self, model, anatomy).preview(model, anatomy)
        with torch.device("meta"):
            return {job.site.path: site_layer(self, model, job) for job in plan_sites(self, model, anatomy)[0]}

    def rehearse(self, model: nn.Module, anatomy: Anatomy, surgery: Surgery) -> None:
        if self.chooses:
            forecast(self, model, anatomy).rehearse(model, anatomy, surgery)
            return
        jobs, _ = plan_sites(self, model, anatomy)
        ties = Ties.of(model, {job.site.path: job.grid for job in jobs})
        for job in jobs:
            module = model.get_submodule(job.site.path)
            with torch.device("meta"):
                layer = site_layer(self, model, job)
            if layer.bias is not None:
                layer.bias = nn.Parameter(module.get_parameter("bias").detach().float().clone(), requires_grad=False)
                if self.engine == "own" and self.activations == "static" and job.rounds_input:
                    shorten_bias(layer)
            surgery.replace(model, job.site.path, blank(layer, len(surgery.edits)))
            ties.settle(model, surgery, job.site.path)

    def skips(self, model: nn.Module, anatomy: Anatomy) -> dict[str, str]:
        return plan_sites(self, model, anatomy)[1]

    @property
    def judges(self) -> bool:
        return self.max_drop is not None

    @property
    def timed(self) -> str:
        by_time = self.mixed is not None and self.mixed.latency_ratio is not None
        return "mixed: latency_ratio, size_ratio or loss_db" if by_time else ""

    @property
    def computed_float(self) -> str:
        return left_float(self)

    @property
    def assumes(self) -> str:
        if self.max_drop is not None:
            return "max_drop undoes what it has to when the pass runs; sizes are those of the strongest setting"
        if self.mixed is None:
            return ""
        for option in ("loss_db", "latency_ratio"):
            if option in self.mixed.budgets:
                return f"bits are chosen by {option} when the pass runs; sizes are those of the smallest choice"
        return "bits are chosen when the pass runs; the choice that is shown is one that keeps the budget, which bounds the size"

    @property
    def calibrates(self) -> bool:
        rounds = {self.rounding, self.embedding_rounding} != {"nearest"}
        return self.chooses or self.activations == "static" or rounds or self.engine == "nncf"

    def run(self, model: nn.Module, context: Context) -> nn.Module:
        if self.max_drop is not None:
            return drive(self, model, context)
        if self.mixed is not None:
            return choose(self, model, context)
        if self.engine == "nncf":
            return self._by_nncf(model, context)
        return round_sites(self, model, context)

    def _by_nncf(self, model: nn.Module, context: Context) -> nn.Module:
        jobs, skipped = plan_sites(self, model, context.anatomy)
        places = [(job.site, job.grid) for job in jobs]
        said = put_in(model, context, places, nncf_settings(self), self.activations == "static")
        context.report |= said | {"skipped": skipped | said["skipped"], "padding_counted": []}
        return model
