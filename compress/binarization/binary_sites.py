"""Which sites ``binarize`` takes, how each becomes bits, and why the others stay as they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from calibrate.errors import UserError
from compress.algorithms.binarizing import Binarized, binarized
from compress.anatomy import Anatomy, Site
from compress.layers import BinaryConv2d, BinaryLinear, is_quantized
from compress.layers.conversion import matrix_shape, obstacle, weight_of

if TYPE_CHECKING:
    from compress.passes.binarize import Binarize

__all__ = ["BinaryJob", "action", "binary_layer", "bits_of", "plan_binary"]


@dataclass(frozen=True)
class BinaryJob:
    """One module whose weight becomes bits: where, and how its input is rounded ("static", "binary", or "none")."""

    site: Site
    activations: str


def plan_binary(step: Binarize, model: nn.Module, anatomy: Anatomy) -> tuple[list[BinaryJob], dict[str, str]]:
    """What may be binarized, in the model's order, and why other targets will not be.

    Raises:
        UserError: a site cannot take what the options ask of it, or there is nothing to binarize.
    """
    chosen = _chosen(step, anatomy)
    left = {site.path for site in anatomy.select(step.skip, step.name)} if step.skip else set()
    jobs, skipped = [], {}
    for site in anatomy.sites:
        if site.path not in chosen:
            continue
        if site.path in left:
            skipped[site.path] = "named under skip"
        elif site.kind in ("norm", "embedding"):
            raise UserError(step.name, f"{site.path} is {_A[site.kind]}, and has no product to run on bits", _HINTS[site.kind])
        elif site.kind != "other" and is_quantized(model.get_submodule(site.path)):
            raise UserError(step.name, f"{site.path} is quantized already", f"Leave it out with skip: [{site.path}].")
        elif reason := obstacle(model, site.path, site.kind):
            skipped[site.path] = reason
        elif _shared(model, site.path):
            skipped[site.path] = "another module holds the same weight"
        else:
            _check_groups(step, model, site)
            jobs.append(BinaryJob(site, _activations(step, site)))
    if not jobs:
        reasons = [f"{path}: {reason}." for path, reason in skipped.items()]
        raise UserError(step.name, "there is nothing to binarize", (reasons or ["Name roles or module paths under sites."])[0])
    if step.count is not None and step.count > len(jobs):
        raise UserError(step.name, f"count: {step.count} is more than the {len(jobs)} sites there are", "Use fewer, or no count.")
    return jobs, skipped


def binary_layer(step: Binarize, model: nn.Module, job: BinaryJob, nonnegative: bool = False) -> BinaryLinear | BinaryConv2d:
    """The layer that would stand at a site, its bits still all -1."""
    module: Any = model.get_submodule(job.site.path)
    shape = tuple(weight_of(module, job.site.kind).shape)
    weight = {"shape": list(shape), "bases": step.bases, "group_size": step.group_size, "shift": step.shift}
    bias = getattr(module, "bias", None) is not None
    activation: dict[str, Any] | None = None
    if job.activations == "static":
        activation = {"kind": "static", "bits": 8, "symmetric": step.activation_symmetric}
    elif job.activations == "binary":
        activation = {"kind": "binary", "channels": shape[1], "nonnegative": nonnegative}
    if job.site.kind != "conv2d":
        return BinaryLinear(weight, activation, bias)
    padding = module.padding if isinstance(module.padding, str) else list(module.padding)
    geometry = {"stride": list(module.stride), "padding": padding, "dilation": list(module.dilation), "groups": module.groups}
    return BinaryConv2d(weight, activation, bias, geometry)


def bits_of(step: Binarize, weight: Tensor) -> Binarized:
    """A weight of any rank as bits; its planes are [K, O, I]."""
    scale = "tensor" if step.granularity == "tensor" else "row"
    with torch.no_grad():
        return binarized(weight.reshape(weight.shape[0], -1), step.bases, step.group_size, step.shift, scale)  # type: ignore[arg-type]


def action(step: Binarize, job: BinaryJob) -> str:
    """What will happen at a site, in a few words."""
    bases = "1 bit" if step.bases == 1 else f"{step.bases} bases of 1 bit"
    unit = {"tensor": "tensor", "channel": "row", "group": f"group of {step.group_size}"}[step.granularity]
    shifted = ", with the mean" if step.shift else ""
    inputs = {"static": ", inputs 8 bits static", "binary": ", inputs 1 bit", "none": ""}[job.activations]
    chosen = "" if step.count is None else f", if it is one of the {step.count} that lose least"
    return f"weights {bases} per {unit}{shifted}{inputs}{chosen}"


_A = {"norm": "a norm", "embedding": "an embedding table"}
_HINTS = {
    "norm": "Norms stay float: leave it out of sites.",
    "embedding": "Round it with quantize: {sites: [embedding], weights: 4, activations: none}.",
}


def _chosen(step: Binarize, anatomy: Anatomy) -> set[str]:
    if step.sites is not None:
        return {site.path for site in anatomy.select(step.sites, step.name)}
    inside = [site for site in anatomy.sites if site.block is not None and site.roles]
    return {site.path for site in inside if site.kind not in ("norm", "embedding")}


def _activations(step: Binarize, site: Site) -> str:
    """Convolutions have no threshold for each channel: their inputs keep 8 bits."""
    return "static" if step.activations == "binary" and site.kind == "conv2d" else step.activations


def _check_groups(step: Binarize, model: nn.Module, site: Site) -> None:
    columns = matrix_shape(model.get_submodule(site.path), site.kind)[1]
    if step.group_size and columns % step.group_size:
        near = [size for size in range(1, columns + 1) if columns % size == 0]
        around = [*[size for size in near if size < step.group_size][-1:], *[size for size in near if size > step.group_size][:1]]
        raise UserError(
            step.name,
            f"group_size {step.group_size} does not divide the {columns} inputs of {site.path}",
            f"Divisors near it: {', '.join(map(str, around))}.",
        )


def _shared(model: nn.Module, path: str) -> bool:
    weight = model.get_submodule(path).get_parameter("weight")
    return sum(value is weight for module in model.modules() for value in module._parameters.values()) > 1
