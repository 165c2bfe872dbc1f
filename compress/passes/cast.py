"""Weights and products in 16-bit floating point, where nothing overflows."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from calibrate.errors import UserError
from calibrate.modes import evaluating
from compress.anatomy import Anatomy, Site
from compress.layers.cast import CastConv2d, CastEmbedding, CastLinear, Short
from compress.layers.conversion import obstacle, weight_of
from compress.passes.contract import Context, Pass, Target, blank
from compress.surgery import Surgery

__all__ = ["Cast"]

Layer = CastLinear | CastConv2d | CastEmbedding


@dataclass
class _Seen:
    """What passed through one layer: largest absolute values, and the energy that rounding its input would lose."""

    largest_input: float = 0.0
    largest_output: float = 0.0
    energy: float = 0.0
    lost: float = 0.0
    outputs: int = field(default=0, repr=False)


class Cast(Pass):
    """Weights of layers, and the products that they are in, in float16 or bfloat16.

    Each linear layer (GPT-2's Conv1D as one), 2-D convolution and embedding casts its input, multiplies in 16 bits and gives its
    output back in float32. All between them stays in float32: norms, softmax, additions, activation functions; they hold no
    weights worth the name, and it is there that sums of squares and exponentials leave the range of float16 (Micikevicius et al.
    2018, arXiv 1710.03740, sec. 3.3 and 4).

    A layer is an island, in float32 with its weight, where on the calibration rows ``margin`` times its largest input or output
    is beyond what the type holds (65504 for float16), or where rounding its weight or its input to the type leaves less than
    ``least_db`` (numbers below 6e-5 lose digits in float16). Massive activations are found so (Sun et al. 2024, arXiv
    2402.17762). Padded positions count: an infinity there spreads all the same.

    Inputs and outputs of the model keep their types. What writes float16 around weights by itself (Core ML, TensorRT) leaves that
    to this pass where it was run. Core ML has no bfloat16, and ONNX Runtime has no products in it on a CPU; those in float16 it
    computes in float32 there.
    """

    name: ClassVar[str] = "cast"
    source: ClassVar[str] = "Micikevicius et al. 2018, arXiv 1710.03740; Sun et al. 2024, arXiv 2402.17762"
    needs_calibration: ClassVar[bool] = True

    to: Short = Field("float16", description="The type of weights and products.")
    sites: list[str] | None = Field(
        None, description="Roles or module paths, wildcards allowed. Default: every linear layer, convolution and embedding."
    )
    skip: list[str] = Field([], description="Roles or module paths that stay float32, wildcards allowed.")
    islands: Literal["auto", "none"] = Field(
        "auto", description="auto: a layer that would overflow or lose digits stays float32; none: every site is cast."
    )
    margin: float = Field(4.0, ge=1, description="The largest number seen, times this, has to fit the type.")
    least_db: float | None = Field(
        None,
        description="Decibels that rounding a weight or an input has to leave. Default: 60 for float16, 45 for bfloat16.",
    )

    def targets(self, model: nn.Module, anatomy: Anatomy) -> list[Target]:
        return [
            Target(site.path, ", ".join(site.roles), f"weight and product in {self.to}") for site in self._plan(model, anatomy)[0]
        ]

    def preview(self, model: nn.Module, anatomy: Anatomy) -> dict[str, nn.Module]:
        with torch.device("meta"):
            return {site.path: self._layer(model, site) for site in self._plan(model, anatomy)[0]}

    def rehearse(self, model: nn.Module, anatomy: Anatomy, surgery: Surgery) -> None:
        sites, _ = self._plan(model, anatomy)
        ties = _tied(model, sites)
        for path, layer in self.preview(model, anatomy).items():
            surgery.replace(model, path, blank(layer, len(surgery.edits)))
            _settle(model, surgery, path, ties)

    def skips(self, model: nn.Module, anatomy: Anatomy) -> dict[str, str]:
        return self._plan(model, anatomy)[1]

    @property
    def calibrates(self) -> bool:
        return self.islands == "auto"

    @property
    def assumes(self) -> str:
        return "cast finds no layer that has to stay float32" if self.islands == "auto" else ""

    def run(self, model: nn.Module, context: Context) -> nn.Module:
        sites, skipped = self._plan(model, context.anatomy)
        seen = self._observed(model, context, sites) if self.islands == "auto" else {}
        ties = _tied(model, sites)
        report: dict[str, Any] = {}
        islands: dict[str, str] = {}
        for number, site in enumerate(sites):
            context.progress(number, len(sites), site.path)
            says = self._says(model, site, seen.get(site.path))
            reason = self._reason(site, says) if site.path in seen else None
            if reason:
                islands[site.path] = reason
            else:
                self._replace(model, context, site, ties)
            report[site.path] = says | {"dtype": "float32" if reason else self.to}
        context.report |= {
            "sites": report,
            "islands": islands,
            "skipped": skipped,
            "calibration_rows": context.rows if seen else 0,
        }
        if len(islands) == len(sites):
            context.report["warnings"] = [f"no layer could be cast to {self.to}"]
        return model

    def _plan(self, model: nn.Module, anatomy: Anatomy) -> tuple[list[Site], dict[str, str]]:
        """What will be cast, in the model's order, and why other named sites will not be."""
        kinds = ("linear", "conv1d", "conv2d", "embedding")
        found = anatomy.select(self.sites, self.name) if self.sites is not None else anatomy.sites
        chosen = {site.path for site in found if site.kind in kinds}
        left = {site.path for site in anatomy.select(self.skip, self.name)} if self.skip else set()
        sites, skipped = [], {}
        for site in anatomy.sites:
            if site.path not in chosen:
                continue
            module = model.get_submodule(site.path)
            reason = "named under skip" if site.path in left else obstacle(model, site.path, site.kind)
            if hasattr(module, "quantized_weight"):
                reason = "it is quantized"
            if hasattr(module, "cast_to") and site.path not in left:
                raise UserError(self.name, f"{site.path} is cast already", f"Leave it out with skip: [{site.path}].")
            if reason:
                skipped[site.path] = reason
            else:
                sites.append(site)
        if not sites:
            first = next((f"{path}: {reason}." for path, reason in skipped.items()), "Name roles or module paths under sites.")
            raise UserError(self.name, "there is nothing to cast", first)
        return sites, skipped

    def _layer(self, model: nn.Module, site: Site) -> Layer:
        module: Any = model.get_submodule(site.path)
        shape, bias = tuple(weight_of(module, site.kind).shape), getattr(module, "bias", None) is not None
        if site.kind == "embedding":
            return CastEmbedding(shape, self.to, padding_idx=getattr(module, "padding_idx", None))
        if site.kind == "conv2d":
            return CastConv2d(shape, self.to, bias, module.stride, module.padding, module.dilation, module.groups)
        return CastLinear(shape, self.to, bias)

    def _replace(self, model: nn.Module, context: Context, site: Site, ties: dict[str, list[str]]) -> None:
        module = model.get_submodule(site.path)
        weight = weight_of(module, site.kind)
        layer = self._layer(model, site).to(weight.device)
        with torch.no_grad():
            layer.stored.values.copy_(weight)
            if layer.bias is not None:
                layer.bias.copy_(module.get_parameter("bias"))
        context.surgery.replace(model, site.path, layer)
        _settle(model, context.surgery, site.path, ties)

    def _observed(self, model: nn.Module, context: Context, sites: list[Site]) -> dict[str, _Seen]:
        """What passes through each site on the calibration rows."""
        seen = {site.path: _Seen() for site in sites}
        handles = [model.get_submodule(path).register_forward_hook(self._watch(kept)) for path, kept in seen.items()]
        rows = 0
        try:
            with evaluating(model):
                for batch in context.calibration():
                    context.progress(rows, context.rows, "calibration rows")
                    context.call(model, batch)
                    rows += next(iter(batch.values())).shape[0]
        finally:
            for handle in handles:
                handle.remove()
        silent = [path for path, kept in seen.items() if not kept.outputs]
        if silent:
            what = f"{', '.join(silent)} never ran on the calibration rows"
            raise UserError(self.name, what, f"Leave out what does not run: skip: [{', '.join(silent)}].")
        return seen

    def _watch(self, kept: _Seen) -> Callable[..., None]:
        short = getattr(torch, self.to)

        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            kept.outputs += 1
            kept.largest_output = max(kept.largest_output, float(output.abs().amax()))
            given = args[0] if args else None
            if isinstance(given, Tensor) and given.is_floating_point():
                kept.largest_input = max(kept.largest_input, float(given.abs().amax()))
                kept.energy += float(given.double().square().sum())
                kept.lost += float((given - given.to(short).to(given.dtype)).double().square().sum())

        return hook

    def _says(self, model: nn.Module, site: Site, seen: _Seen | None) -> dict[str, Any]:
        weight = weight_of(model.get_submodule(site.path), site.kind).float()
        lost = (weight - weight.to(getattr(torch, self.to)).float()).double().square().sum()
        says: dict[str, Any] = {"weight_sqnr_db": _db(float(weight.double().square().sum()), float(lost))}
        if seen is not None:
            says |= {"largest_input": _number(seen.largest_input), "largest_output": _number(seen.largest_output)}
            says["input_sqnr_db"] = _db(seen.energy, seen.lost)
        return says

    def _reason(self, site: Site, says: dict[str, Any]) -> str | None:
        """Why a site has to stay float32, or None."""
        limit = torch.finfo(getattr(torch, self.to)).max
        for name in ("input", "output"):
            largest = says[f"largest_{name}"]
            if largest is None or largest * self.margin > limit:
                told = "infinite" if largest is None else f"up to {largest:.3g}"
                return f"its {name} is {told}: {self.margin:g} times that is more than the {limit:.5g} that {self.to} holds"
        least = self.least_db if self.least_db is not None else {"float16": 60.0, "bfloat16": 45.0}[self.to]
        for name in ("weight", "input"):
            found = says[f"{name}_sqnr_db"]
            if found is not None and found < least:
                return f"{self.to} leaves {found:.1f} dB of its {name}, less than {least:g}"
        return None


def _number(value: float) -> float | None:
    """None where JSON has no number."""
    return value if math.isfinite(value) else None


def _db(energy: float, lost: float) -> float | None:
    """The ratio in dB; None where nothing is lost. Numbers that are lost altogether count as far as infinity: -1000."""
    if not math.isfinite(lost):
        return -1000.0
    return 10 * math.log10(energy / lost) if lost > 0 and energy > 0 else None


def _tied(model: nn.Module, sites: list[Site]) -> dict[str, list[str]]:
    """For each site the sites whose module, or whose weight, is the same."""
    holders: dict[int, list[str]] = {}
    for site in sites:
        holders.setdefault(id(model.get_submodule(site.path)._parameters["weight"]), []).append(site.path)
    return {path: [other for other in group if other != path] for group in holders.values() for path in group}


def _settle(model: nn.Module, surgery: Surgery, path: str, ties: dict[str, list[str]]) -> None:
    """What held one weight holds one 16-bit weight."""
    for other in ties[path]:
        if hasattr(model.get_submodule(other), "stored"):
            surgery.share(model, f"{path}.stored", f"{other}.stored")
            return
