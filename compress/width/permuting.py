"""Puts the heads or neurons of a block in another order: a permutation of weights that leaves the function alone."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from calibrate.errors import UserError
from calibrate.fidelity import sqnr_db
from calibrate.signature import Batch, Signature
from compress.layers.conversion import is_conv1d, outputs_of
from compress.width.slicing import head_tables, output_axes, put_back
from compress.width.units import Units

__all__ = ["reorder"]

_SAME_DB = 100.0
"""Least agreement with the model before: float32 sums in another order differ by 120 dB or more."""


def reorder(model: nn.Module, signature: Signature, example: Batch, units: Units, order: Sequence[int]) -> float:
    """Puts unit ``order[i]`` at place i and returns how near the outputs stay, in dB (infinite: the same bits).

    Tensors are replaced, not written into, so that another model that shares them keeps its own. Tables with one value for each
    head go along where that is what keeps the function.

    Raises:
        UserError: the model then computes something else; it is left as it was.
    """
    with torch.inference_mode():
        expected = signature.call(model, example)
    if list(order) == list(range(len(units))):
        return math.inf
    nearest = -math.inf
    for tables in (False, True) if units.kind == "head" else (False,):
        try:
            with put_back(model, units):
                _permute(model, units, list(order), tables)
                with torch.inference_mode():
                    nearest = max(nearest, level := sqnr_db(expected, signature.call(model, example)))
                if level < _SAME_DB:
                    raise UserError(units.sink, "not yet", "")
        except UserError:
            continue
        return level
    what = f"with its {units.kind}s in another order, block {units.block} computes something else ({nearest:.0f} dB)"
    raise UserError(units.sink, what, f"Leave the {units.kind}s of block {units.block} as they are.")


def _permute(model: nn.Module, units: Units, order: list[int], tables: bool) -> None:
    for path, rows in units.rows.items():
        module = model.get_submodule(path)
        norm = isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d))
        count = int(module.get_parameter("weight").shape[0]) if norm else outputs_of(module)
        for name, axis in output_axes(module, count):
            _take(module, name, axis, _moved(rows, order, count))
    sink = model.get_submodule(units.sink)
    axis = 0 if is_conv1d(sink) else 1
    width = int(sink.get_parameter("weight").shape[axis])
    _take(sink, "weight", axis, _moved(units.columns, order, width))
    if tables:
        count = len(units) * units.heads
        each = int(units.columns.numel()) // count
        moved = _moved(units.columns[:, ::each] // each, order, count)
        for path, name, axis in list(head_tables(model, units)):
            _take(model.get_submodule(path), name, axis, moved)


def _moved(channels: Tensor, order: list[int], count: int) -> Tensor:
    """For each of ``count`` channels the one that comes to its place; those that no unit owns stay."""
    found = torch.arange(count)
    found[channels.flatten()] = channels[order].flatten()
    return found


def _take(module: nn.Module, name: str, axis: int, chosen: Tensor) -> None:
    tensor = getattr(module, name)
    moved = tensor.detach().index_select(axis, chosen.to(tensor.device))
    setattr(module, name, nn.Parameter(moved, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else moved)
