"""One-bit weights, and inputs of eight bits or one."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field, NonNegativeInt, PositiveInt, model_validator
from torch import nn

from calibrate.ranges import RangeMethod
from compress.anatomy import Anatomy
from compress.binarization.binary_sites import action, binary_layer, plan_binary
from compress.binarization.conversion import binarize
from compress.binarization.products import Products, find_products
from compress.layers import BinaryProducts
from compress.passes.contract import Context, Pass, Target, blank
from compress.passes.quantize import Quantize
from compress.surgery import Surgery

__all__ = ["Binarize"]


class Binarize(Pass):
    """Keep one bit of each weight, and train what that breaks, without labels.

    A weight becomes its sign times a factor for each row, group of inputs or tensor: the factor that is nearest in squares
    (Rastegari et al. 2016, arXiv 1603.05279, sec. 3.1). With ``shift`` the signs are those of the weight less its mean, and the
    mean is carried (BiPFT: Xing et al. 2024, AAAI). With two or three ``bases`` it is a sum of so many signs with factors of
    their own (Guo et al. 2017, arXiv 1706.02021), by least squares. The factors of a row are whole multiples of one float16
    number, so that every runtime computes with the same integers: a file holds the bits, and INT8 kernels run them. The sign of
    0 is +1.

    ``repair`` trains the layers: each keeps a float weight whose signs are the bits, gradients pass as if there were no sign
    (Bengio et al. 2013, arXiv 1308.3432), and blocks and outputs are drawn to what the float model gives for the calibration
    rows; first block by block, then all together. Scales, biases and norms in the blocks learn too. Rows held out from training
    choose the state that is kept; the start is one of them. It wants thousands of rows; a few hundred already help.

    Inputs are rounded to 8 bits (``static``), to one (``binary``: a threshold for each channel and one scale, which the repair
    trains too; {0, scale} where inputs are never negative), or stay float. No runtime here multiplies bits: one-bit inputs are
    carried as INT8 codes, exactly.

    With ``products: binary`` the products of attention are of one bit too: signs of queries, keys and values about thresholds,
    and probabilities of 0 or one scale; what that leaves of both products is estimated by products of rank one (BiPFT's residual
    polynomials), whose vectors the repair learns.

    Without ``sites`` it takes every projection inside the blocks; what comes before and after, and the tables, stays. With
    ``count`` so many are taken, those that lose least alone at the model's outputs, and ``rest`` says what becomes of the others.
    """

    name: ClassVar[str] = "binarize"
    source: ClassVar[str] = (
        "Rastegari et al. 2016, arXiv 1603.05279; BiPFT: Xing et al. 2024, AAAI; bases: Guo et al. 2017, arXiv 1706.02021; "
        "straight-through gradients: Bengio et al. 2013, arXiv 1308.3432"
    )
    needs_calibration: ClassVar[bool] = True

    bases: Literal[1, 2, 3] = Field(1, description="Bits of each weight: signs whose scaled sum it is.")
    granularity: Literal["tensor", "channel", "group"] = Field(
        "channel", description="What shares a factor: a tensor (one base only), an output channel, or a group of its inputs."
    )
    group_size: PositiveInt | None = Field(
        None, description="Inputs that share factors, with granularity: group; has to divide the inputs."
    )
    shift: bool = Field(
        False, description="Signs of the weight less its mean, and the mean carried as a whole number of the row's scale."
    )
    activations: Literal["static", "binary", "none"] = Field(
        "static",
        description="static: inputs of 8 bits with a scale from calibration rows; binary: of one bit; none: float.",
    )
    products: Literal["float", "binary"] = Field(
        "float",
        description="binary: queries, keys, values and probabilities of attention become one bit too, with BiPFT's estimators of "
        "rank one for what the bits leave; an accuracy tool: no runtime here has such products, and they run in float.",
    )
    activation_symmetric: bool = Field(True, description="Static inputs without zero point: TensorRT takes no other.")
    range: RangeMethod = Field("mse", description="How calibration rows become the range of a static input.")
    sites: list[str] | None = Field(
        None, description="Roles or module paths, wildcards allowed. Default: every projection inside the blocks."
    )
    skip: list[str] = Field([], description="Roles or module paths that are left, wildcards allowed.")
    count: PositiveInt | None = Field(
        None, description="How many sites are binarized: those that lose least alone, measured on calibration rows. Default: all."
    )
    rest: Literal["8", "float"] = Field(
        "8",
        description="What the sites that count leaves become: weights and inputs of 8 bits by quantize's defaults, or nothing.",
    )
    sensitivity_rows: PositiveInt = Field(64, description="Calibration rows on which each site's loss is measured, for count.")
    bias_correction: bool = Field(
        True, description="Adds to each bias, before the repair, what the signs take from the layer's mean output on the rows."
    )
    repair: NonNegativeInt = Field(
        600, description="Steps in which all blocks are trained together; 0, with block_repair 0: no repair."
    )
    block_repair: NonNegativeInt = Field(0, description="Steps before that in which each block is trained by itself.")
    repair_rows: PositiveInt = Field(32, description="Calibration rows in one step.")
    rate: float = Field(
        0.01, gt=0, le=1, description="Learning rate of the repair (Adam), in root mean squares of what is trained."
    )
    patience: PositiveInt = Field(
        10, description="The repair stops after so many checks in a row, of 20, that were no better on the rows held out."
    )
    minutes: float | None = Field(
        None,
        gt=0,
        description="The repair stops after so many, wherever it is. What it reaches then hangs on the machine: the report names "
        "the steps, which give it again.",
    )
    input_rows: PositiveInt = Field(
        256, description="Calibration rows, the first so many, on which ranges and means of inputs are measured."
    )
    batch_size: PositiveInt = Field(8, description="Rows that run through the model at a time during calibration.")

    @model_validator(mode="after")
    def _consistent(self) -> Binarize:
        if (self.granularity == "group") != (self.group_size is not None):
            what = (
                "granularity: group needs a group_size" if self.group_size is None else "group_size goes with granularity: group"
            )
            raise ValueError(f"{what}\nWrite both, or neither.")
        if self.granularity == "tensor" and (self.bases > 1 or self.shift):
            raise ValueError("granularity: tensor is for one base without shift\nUse channel or group.")
        if self.count is None:
            for option in ("rest", "sensitivity_rows"):
                if option in self.chosen:
                    raise ValueError(f"{option} goes with count\nAdd count, or take {option} out.")
        if not self.repairs:
            for option in ("rate", "patience", "minutes", "repair_rows"):
                if option in self.chosen:
                    raise ValueError(f"{option} goes with repair, which is 0\nTake {option} out, or let repair be more.")
        if self.activations != "static":
            for option in ("range", "activation_symmetric"):
                if option in self.chosen:
                    raise ValueError(f"{option} goes with activations: static\nTake it out.")
        return self

    @property
    def repairs(self) -> bool:
        return bool(self.repair or self.block_repair)

    @property
    def judges(self) -> bool:
        return True

    @property
    def calibrates(self) -> bool:
        return (
            self.repairs
            or self.activations != "none"
            or self.products == "binary"
            or self.bias_correction
            or self.count is not None
        )

    @property
    def assumes(self) -> str:
        if self.count is None:
            return ""
        return "which sites are binarized is chosen when the pass runs; sizes are those with the smallest ones, which is the most"

    def targets(self, model: nn.Module, anatomy: Anatomy) -> list[Target]:
        jobs = {job.site.path: job for job in plan_binary(self, model, anatomy)[0]}
        inside = {job.site.block for job in jobs.values() if job.site.block is not None}
        found = []
        for site in anatomy.sites:
            if site.path in jobs:
                found.append(Target(site.path, ", ".join(site.roles), action(self, jobs[site.path])))
            elif self.repairs and site.kind == "norm" and site.block in inside:
                found.append(Target(site.path, "norm", "trained by the repair"))
        attentions = self.attentions(model, anatomy)[0]
        return found + [Target(one.block.path, "attention", "products of one bit") for one in attentions]

    def skips(self, model: nn.Module, anatomy: Anatomy) -> dict[str, str]:
        return plan_binary(self, model, anatomy)[1] | self.attentions(model, anatomy)[1]

    def attentions(self, model: nn.Module, anatomy: Anatomy) -> tuple[list[Products], dict[str, str]]:
        """Those whose products become bits, and why others do not: in the blocks that hold a site.

        Raises:
            UserError: there is none.
        """
        if self.products == "float":
            return [], {}
        inside = {job.site.block for job in plan_binary(self, model, anatomy)[0]}
        return find_products(self.name, model, anatomy, [block for block in anatomy.blocks if block.index in inside])

    def preview(self, model: nn.Module, anatomy: Anatomy) -> dict[str, nn.Module]:
        jobs = plan_binary(self, model, anatomy)[0]
        if self.count is not None:
            jobs = sorted(jobs, key=lambda job: job.site.parameters)
        binary, rest = jobs[: self.count], jobs[self.count :] if self.count is not None else []
        with torch.device("meta"):
            made: dict[str, nn.Module] = {job.site.path: binary_layer(self, model, job) for job in binary}
        if rest and self.rest == "8":
            made |= self.eight_bits([job.site.path for job in rest]).preview(model, anatomy)
        layers = {job.site.path: made[job.site.path] for job in jobs if job.site.path in made}
        with torch.device("meta"):
            attached = {f"{one.block.path}.{BinaryProducts.child}": one.layer() for one in self.attentions(model, anatomy)[0]}
        return layers | attached

    def rehearse(self, model: nn.Module, anatomy: Anatomy, surgery: Surgery) -> None:
        for path, layer in self.preview(model, anatomy).items():
            made = blank(layer, len(surgery.edits))
            if isinstance(made, BinaryProducts):
                surgery.attach(model, path.rpartition(".")[0], made)
            else:
                surgery.replace(model, path, made)

    def ranges(self, paths: list[str]) -> Quantize:
        """Options of ``quantize`` under which the ranges of inputs of 8 bits are found."""
        return Quantize(
            sites=paths,
            smooth=False,
            range=self.range,
            activation_symmetric=self.activation_symmetric,
            batch_size=self.batch_size,
        )

    def eight_bits(self, paths: list[str]) -> Quantize:
        """What makes INT8 layers of the sites that ``count`` leaves."""
        return Quantize(sites=paths, activation_symmetric=self.activation_symmetric, batch_size=self.batch_size)

    def run(self, model: nn.Module, context: Context) -> nn.Module:
        return binarize(self, model, context)
