"""What NNCF made of a model, put into it: codes, grids and biases go into the layers that every exporter knows."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from calibrate.errors import MissingRuntime
from calibrate.grid import Grid
from calibrate.signature import Batch
from compress.anatomy import Site
from compress.layers.conversion import quantized_layer, weight_of
from compress.layers.fitting import store_weight
from compress.quantization.folding import folds
from compress.quantization.nncf_engine import NncfResult, NncfSettings, nncf_quantized, nncf_weights
from compress.quantization.nncf_reading import Read
from compress.tied import Ties

if TYPE_CHECKING:
    from compress.passes.contract import Context

__all__ = ["Place", "put_in", "require_nncf"]

Place = tuple[Site, Grid]
"""A layer, and the grid that its weight gets."""


def require_nncf() -> None:
    """Raises ``MissingRuntime`` where NNCF is not installed."""
    if importlib.util.find_spec("nncf") is None:
        raise MissingRuntime("", "engine: nncf needs nncf, which is not installed", "pip install 'transformer-compress[nncf]'")


def put_in(model: nn.Module, context: Context, places: Sequence[Place], settings: NncfSettings, static: bool) -> dict[str, Any]:
    """Quantizes the layers at the given places with NNCF, in place; returns what the report should say.

    Args:
        static: weights and inputs by ``nncf.quantize``; else weights alone by ``nncf.compress_weights``.

    Raises:
        UserError: NNCF cannot handle the model.
        MissingRuntime: it is not installed.
    """
    require_nncf()
    rows = _rows(context)
    grids = {site.path: grid for site, grid in places}
    if static:
        result = nncf_quantized(model, context.signature, rows, list(grids), settings, context.progress)
    else:
        result = nncf_weights(model, context.signature, rows, grids, settings)
    ties = Ties.of(model, grids)
    _share_codes(result, ties)
    with torch.no_grad():
        for name, bias in result.biases.items():
            model.get_parameter(name).copy_(bias)
        folded = _folded(model, context, places, result)
        report: dict[str, Any] = {}
        for site, grid in places:
            made = result.layers.get(site.path)
            if made is None:
                continue
            context.progress(len(report), len(result.layers), site.path)
            report[site.path] = _replaced(model, context, site, grid, made, folded.get(site.path), ties)
            if f"{site.path}.bias" in result.biases:
                report[site.path]["bias_correction"] = "fast"
    others = sorted(set(result.biases) - {f"{path}.bias" for path in report})
    said = {"sites": report, "skipped": result.left, "ties": ties.said, "calibration_rows": len(rows)}
    return said | ({"corrected": others} if others else {})


def _rows(context: Context) -> list[Batch]:
    """Calibration rows one by one, as NNCF is usually given them; positions that are padding count in its ranges."""
    names = context.signature.names
    return [
        {name: batch[name][row : row + 1] for name in names}
        for batch in context.calibration()
        for row in range(batch[names[0]].shape[0])
    ]


def _share_codes(result: NncfResult, ties: Ties) -> None:
    """Layers that hold the weight of another one have its codes."""
    for path, others in ties.holders.items():
        source = next((result.layers[other] for other in others if other in result.layers), None)
        if path not in result.layers and source is not None and source.input_scale is None:
            result.layers[path] = source
            result.left.pop(path, None)


def _folded(model: nn.Module, context: Context, places: Sequence[Place], result: NncfResult) -> dict[str, str]:
    """SmoothQuant's factors moved into the norm before, where nothing else reads it: by site, the path of the norm."""
    groups: dict[int, list[Site]] = {}
    for site, _ in places:
        made = result.layers.get(site.path)
        if made is not None and made.factor is not None:
            groups.setdefault(made.shared, []).append(site)
    norms = {site.path for site in context.anatomy.sites if site.kind == "norm"}
    found = folds(model, context, list(groups.values()))
    folded: dict[str, str] = {}
    for fold in found.values():
        factor = result.layers[fold.consumers[0]].factor
        if factor is not None and fold.producer in norms:
            fold.apply(model, factor)
            folded |= dict.fromkeys(fold.consumers, fold.producer)
    return folded


def _replaced(
    model: nn.Module, context: Context, site: Site, grid: Grid, made: Read, folded: str | None, ties: Ties
) -> dict[str, Any]:
    """Replaces one layer and says what was done."""
    module = model.get_submodule(site.path)
    if made.zero_point is not None and grid.symmetric:
        grid = replace(grid, symmetric=False)
    activation: dict[str, Any] | None = None
    if made.input_scale is not None:
        activation = {"kind": "static", "bits": 8, "symmetric": made.input_zero_point == 0}
        if made.factor is not None and folded is None:
            activation["channels"] = made.factor.numel()
    layer = quantized_layer(module, site.kind, grid, activation)
    if layer.bias is not None:
        layer.bias.copy_(module.get_parameter("bias"))
    weight = weight_of(module, site.kind) if made.weight is None else made.weight
    says = store_weight(layer, weight, made.codes, made.scale, made.zero_point) | {"engine": "nncf"}
    if layer.activation is not None and made.input_scale is not None:
        layer.activation.scale.fill_(made.input_scale)
        layer.activation.zero_point.fill_(made.input_zero_point)
        says["activation"] = {"scale": made.input_scale, "zero_point": made.input_zero_point}
        if made.factor is not None:
            says["activation"]["smoothed"] = True
            if layer.activation.factor is not None:
                layer.activation.factor.copy_(made.factor)
            else:
                says["activation"]["folded_into"] = folded
    context.surgery.replace(model, site.path, layer)
    ties.settle(model, context.surgery, site.path)
    return says
