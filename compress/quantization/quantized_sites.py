"""Which sites ``quantize`` takes, on which grid each is rounded, and why the others stay as they are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import nn

from calibrate.errors import UserError
from calibrate.grid import Bits, Granularity, Grid
from compress.algorithms.rounding import WeightRange
from compress.anatomy import Anatomy, Site
from compress.layers import is_quantized
from compress.layers.conversion import QuantizedLayer, matrix_shape, obstacle, quantized_layer
from compress.layers.quantized import ActivationGrid
from compress.quantization.float8 import is_float8
from compress.quantization.nncf_layers import require_nncf
from compress.quantization.nncf_options import beyond_nncf
from compress.quantization.site_options import SiteOptions, label, options_of, overridden

if TYPE_CHECKING:
    from compress.layers.fitting import Seen
    from compress.passes.quantize import Quantize

__all__ = ["Job", "action", "by_tensor", "input_grid", "plan_sites", "site_job", "site_layer", "weight_range"]


@dataclass(frozen=True)
class Job:
    """One module to quantize: where, on which grid, whether its input is rounded too, and the table whose codes it shares."""

    site: Site
    grid: Grid
    rounds_input: bool
    table: Site | None = None


def by_tensor(jobs: Iterable[Job], inputs: Mapping[str, Seen]) -> dict[str, list[Job]]:
    """Jobs with what was seen of their inputs, those together that read one tensor, by the path of its first reader."""
    groups: dict[str, list[Job]] = {}
    for job in jobs:
        groups.setdefault(inputs[job.site.path].leader or job.site.path, []).append(job)
    return groups


def plan_sites(step: Quantize, model: nn.Module, anatomy: Anatomy) -> tuple[list[Job], dict[str, str]]:
    """What will be quantized, in the model's order, and why other targets will not be.

    Raises:
        UserError: a site cannot take what the options ask of it, or there is nothing to quantize.
    """
    if step.engine == "nncf":
        require_nncf()
    _require_gradients(step, model)
    chosen = _chosen(step, anatomy)
    left = {site.path for site in anatomy.select(step.skip, step.name)} if step.skip else set()
    own = overridden(anatomy, step.overrides, chosen, step.name)
    jobs, skipped = [], {}
    for site in anatomy.sites:
        if site.path not in chosen:
            continue
        if site.kind != "other" and is_quantized(model.get_submodule(site.path)):
            if site.path in left:
                continue
            raise UserError(step.name, f"{site.path} is quantized already", f"Leave it out with skip: [{site.path}].")
        options = own.get(site.path, SiteOptions())
        reason = "named under skip" if site.path in left else obstacle(model, site.path, site.kind)
        if not reason and step.engine == "nncf":
            reason = beyond_nncf(step, site, (site.kind == "embedding" and step.embeddings) or int(step.weights))
        if reason:
            skipped[site.path] = reason
        elif options.weights == "float":
            skipped[site.path] = "float under overrides"
        else:
            jobs.append(site_job(step, model, site, options))
    if not jobs:
        raise UserError(step.name, "there is nothing to quantize", _first_reason(skipped))
    if step.embeddings is not None and (step.engine, step.activations) != ("nncf", "static"):
        jobs += _tied_heads(step, model, anatomy, jobs, left)
    return jobs, skipped


def site_job(step: Quantize, model: nn.Module, site: Site, options: SiteOptions, table: Site | None = None) -> Job:
    """One site with these options; ``table``: whose codes it shares.

    Raises:
        UserError: the site cannot take them.
    """
    assert options.weights != "float"
    rounds_input = site.kind != "embedding" and table is None and "none" not in (step.activations, options.activations)
    grid = _grid(step, model, table or site, options.weights)
    reduced = bool(step.reduce_range) and rounds_input and (grid.bits == 8 or step.group_scales == "multiples")
    if step.reduce_range == "pairs" and site.kind in ("linear", "conv1d"):
        reduced = reduced and not (grid.bits == 8 and grid.symmetric and grid.granularity != "group")
    return Job(site, replace(grid, reduced=reduced), rounds_input, table)


def site_layer(
    step: Quantize, model: nn.Module, job: Job, channels: int | None = None, symmetric: bool | None = None
) -> QuantizedLayer:
    """The layer that would stand at a site, its codes still zero.

    Args:
        channels: of a factor for its inputs.
        symmetric: whether its input has no zero point, where that is chosen site by site.
    """
    without_zero_point = input_grid(step, symmetric).symmetric and step.activations == "static"
    activation: dict[str, Any] = {"kind": step.activations, "bits": step.activation_bits, "symmetric": without_zero_point}
    activation |= {"e4m3": True} if is_float8(step) else {}
    if channels is not None:
        activation["channels"] = channels
    module = model.get_submodule(job.site.path)
    return quantized_layer(module, job.site.kind, job.grid, activation if job.rounds_input else None)


def action(step: Quantize, job: Job) -> str:
    """What will happen at a site, in a few words."""
    if step.mixed is not None:
        return f"weights chosen from {', '.join(label(options_of(one)) for one in step.mixed.candidates)}"
    grid = job.grid
    unit = f"group of {grid.group_size}" if grid.granularity == "group" else grid.granularity
    bits = "fp8" if is_float8(step) else f"{step.activation_bits} bits"
    inputs = f", inputs {bits} {step.activations}" if job.rounds_input else ""
    scales = ", scales powers of two" if grid.power_of_two else ""
    return f"weights {'fp8' if grid.e4m3 else f'{grid.bits} bits'} per {unit}{inputs}{scales}"


def input_grid(step: Quantize, symmetric: bool | None = None) -> Grid:
    """The grid of static activations; with ``activation_symmetric: best`` it has zero points where nothing else was found."""
    without_zero_point = step.activation_symmetric is True if symmetric is None else symmetric
    powers = step.scales == "power_of_two"
    return Grid(step.activation_bits, without_zero_point, "tensor", e4m3=is_float8(step), power_of_two=powers)


def weight_range(step: Quantize, grid: Grid) -> WeightRange:
    """How ranges of a weight are found: a power of two that covers it may be twice as wide as need be, and is searched."""
    return step.weight_range or ("minmax" if grid.bits == 8 and not grid.power_of_two else "mse")


def _require_gradients(step: Quantize, model: nn.Module) -> None:
    """Gradients do not pass a layer whose inputs are rounded."""
    wants = {"range: hessian": step.range == "hessian", "embedding_rounding: gptq": step.embedding_rounding == "gptq"}
    asked = next((name for name, wanted in wants.items() if wanted), None)
    rounded = next((path for path, module in model.named_modules() if isinstance(module, ActivationGrid)), None)
    if asked is not None and rounded is not None:
        path = rounded.rpartition(".")[0]
        raise UserError(
            step.name,
            f"{asked} needs gradients, which do not pass {path}: its inputs are rounded already",
            "Put this pass before the one that rounds them, or leave the option out.",
        )


def _tied_heads(step: Quantize, model: nn.Module, anatomy: Anatomy, jobs: list[Job], left: set[str]) -> list[Job]:
    """Linear layers that hold the weight of a table that is quantized, and that nothing else was said of: they share its
    codes, their inputs stay float. Otherwise the file would hold the weight twice, once in float."""
    tables = {id(model.get_submodule(job.site.path).weight): job for job in jobs if job.site.kind == "embedding"}
    planned = {job.site.path for job in jobs} | left
    linears = [site for site in anatomy.sites if site.kind == "linear" and site.path not in planned]
    tied = [(site, tables.get(id(model.get_submodule(site.path).weight))) for site in linears]
    return [Job(site, table.grid, False, table.site) for site, table in tied if table is not None]


def _chosen(step: Quantize, anatomy: Anatomy) -> set[str]:
    if step.sites is None:
        inside = [site for site in anatomy.sites if site.block is not None]
        chosen = {site.path for site in inside if site.kind not in ("norm", "embedding") and site.roles}
    else:
        chosen = {site.path for site in anatomy.select(step.sites, step.name) if site.kind != "norm"}
    if step.embeddings is not None:
        tables = {site.path for site in anatomy.sites if site.kind == "embedding" or _is_table(site)}
        if not tables:
            raise UserError(step.name, "embeddings: the model has no embedding table", "Leave embeddings out.")
        chosen |= tables
    return chosen


def _grid(step: Quantize, model: nn.Module, site: Site, bits: Bits | None = None) -> Grid:
    bits = bits or (site.kind == "embedding" and step.embeddings) or (8 if step.weights == "fp8" else step.weights)
    floats = is_float8(step) and site.kind != "embedding"
    _, columns = matrix_shape(model.get_submodule(site.path), site.kind)
    granularity: Granularity = step.granularity or ("group" if bits < 8 or (step.group_size and not step.several) else "channel")
    if site.kind in ("embedding", "conv2d") and granularity == "group":
        granularity = "channel"
    if site.kind == "embedding" and step.embedding_group_size:
        granularity = "group"
    if site.kind == "embedding" and columns * bits % 8:
        raise UserError(
            step.name,
            f"{bits}-bit codes of the {columns} columns of {site.path} do not fill whole bytes",
            "Use 8 bits there.",
        )
    powers = step.scales == "power_of_two"
    if granularity != "group":
        return Grid(bits, step.symmetric, granularity, e4m3=floats, power_of_two=powers)
    size = (step.embedding_group_size if site.kind == "embedding" else None) or step.group_size or 32
    if columns % size:
        near = _divisors_near(columns, size)
        raise UserError(
            step.name,
            f"group_size {size} does not divide the {columns} inputs of {site.path}",
            f"Divisors near it: {', '.join(map(str, near))}.",
        )
    return Grid(bits, step.symmetric, granularity, size, power_of_two=powers)


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
