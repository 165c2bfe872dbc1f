"""What heads and neurons cost, and what a model costs in all: in FLOPs or in bytes."""

from __future__ import annotations

from torch import nn

from calibrate.inventory import inventory
from compress.anatomy import Anatomy
from compress.layers.conversion import outputs_of
from compress.width.units import Units

__all__ = ["unit_bytes", "whole_cost"]


def whole_cost(model: nn.Module, anatomy: Anatomy, *, macs: bool) -> float:
    """FLOPs of all blocks for one row, or bytes of the model."""
    if macs:
        return float(sum(block.flops for block in anatomy.blocks))
    return float(sum(entry.bytes for entry in inventory(model).values()))


def unit_bytes(model: nn.Module, units: Units) -> float:
    """Bytes of one unit in the layers that make it and in the one that reads it."""
    count = len(units)
    total = 0.0
    for path, rows in units.rows.items():
        module = model.get_submodule(path)
        outputs = outputs_of(module)
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            if outputs in tensor.shape:
                total += tensor.nbytes * rows.shape[1] / outputs
    sink = model.get_submodule(units.sink).get_parameter("weight")
    return total + sink.nbytes / count
