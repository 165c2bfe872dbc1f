"""What NNCF did to a torch model, read from the graph that it keeps of it: grids, codes, factors and biases by layer.

Shapes: O outputs, I inputs, G groups, C channels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from calibrate.grid import Grid
from calibrate.signature import raw_path

__all__ = ["Operation", "Read", "decompressed", "operations", "read", "rounded_elsewhere"]

_PORTS = {"linear": (0, 1), "conv2d": (0, 1), "embedding": (None, 1), "addmm": (1, 2)}
"""Operations with weights, and which of their arguments are the data and the weight."""
_MOVES = {
    "reshape", "view", "flatten", "transpose", "permute", "contiguous", "dropout", "squeeze", "unsqueeze", "expand", "to", "type",
    "__getitem__", "unbind", "split", "chunk",
}  # fmt: skip
_QUANTIZERS = {"symmetric_quantize", "asymmetric_quantize"}


@dataclass(frozen=True)
class Operation:
    """One call of a layer in NNCF's graph: its name there, the layer's module path, and the arguments that are followed."""

    name: str
    path: str
    data: int | None
    weight: int


@dataclass(frozen=True)
class Read:
    """What NNCF made of one layer.

    Attributes:
        codes: signed, int8, in the shape of the weight as [O, I ...].
        scale, zero_point: [O, G] or [1, 1] (``calibrate.grid``); no zero point where all are 0.
        input_scale, input_zero_point: of the input's grid, 8 bits, signed; None where it is not rounded.
        factor: [C], what the input is multiplied by first; the codes are those of the divided weight.
        shared: a number that layers have in common whose factors are one module.
        weight: the float weight that the codes are of, factors in it.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    input_scale: float | None = None
    input_zero_point: int = 0
    factor: Tensor | None = None
    shared: int = 0
    weight: Tensor | None = None


def operations(graph: Any) -> list[Operation]:
    """The calls of layers whose weight is a parameter called ``weight``, in order."""
    found = []
    for node in graph.get_all_nodes():
        if node.node_type not in _PORTS or "_hook__" in node.node_name:
            continue
        data, weight = _PORTS[node.node_type]
        name = _constant(graph, node, weight)
        if name is not None and name.endswith(".weight"):
            found.append(Operation(node.node_name, raw_path(name.removesuffix(".weight")), data, weight))
    return found


def rounded_elsewhere(graph: Any, taken: set[str]) -> list[str]:
    """Operations, by their names in NNCF's graph, that read a rounded tensor and are not among ``taken``."""
    found = []
    for node in graph.get_all_nodes():
        own = "_hook__" in node.node_name or node.node_type in (_MOVES | {"nncf_model_const", "nncf_model_output"})
        if own or node.node_name in taken:
            continue
        if any(_above(graph, given, _QUANTIZERS) is not None for given in _arguments(graph, node).values()):
            found.append(node.node_name)
    return found


def read(graph: Any, model: nn.Module, operation: Operation) -> Read | None:
    """What NNCF made of one layer of the model that it gave back; None where it left the weight alone."""
    modules = dict(model.named_modules(remove_duplicate=False))
    node = graph.get_node_by_name(operation.name)
    quantizer = _above(graph, _arguments(graph, node)[operation.weight], _QUANTIZERS)
    if quantizer is None:
        return None
    weight = model.get_parameter(f"model.{operation.path}.weight").detach()
    codes, scale, zero_point = _weight(_owner(graph, quantizer, modules), weight)
    if node.node_type == "addmm":
        codes, weight = codes.t().contiguous(), weight.t()
    if operation.data is None:
        return Read(codes, scale, zero_point, weight=weight)
    given = _arguments(graph, node)[operation.data]
    rounding, multiply = _above(graph, given, _QUANTIZERS), _above(graph, given, {"mul"} | _QUANTIZERS, last=True)
    if rounding is None:
        return Read(codes, scale, zero_point, weight=weight)
    step, shift = _input(_owner(graph, rounding, modules))
    if multiply is None:
        return Read(codes, scale, zero_point, step, shift, weight=weight)
    factors = _owner(graph, multiply, modules)
    factor = factors.scale.detach().reshape(-1)
    return Read(codes, scale, zero_point, step, shift, factor, id(factors), weight)


def decompressed(hook: Any, stored: Tensor, shape: torch.Size, grid: Grid) -> Read:
    """A weight that NNCF keeps as codes, with the module that makes it float again."""
    scale, shift = hook._scale.detach().float(), getattr(hook, "_zero_point", None)
    middle = 128 if grid.bits == 8 else 8
    if grid.bits == 8:
        signed = stored.detach().to(torch.int16) - (0 if shift is None else middle)
    else:
        signed = _halves(stored.detach()) - middle
        shift = shift if shift is None else _halves(shift.detach())
    codes = signed.to(torch.int8).reshape(shape)
    if scale.shape[0] == 1 and scale.numel() > 1:  # a weight [I, O]
        codes, scale = codes.t().contiguous(), scale.reshape(-1, 1)
    rows = scale.shape[0]
    if shift is not None:
        shift = (shift.to(torch.int16) - middle).to(torch.int8).reshape(rows, -1)
    return Read(codes, scale.reshape(rows, -1), shift)


def _halves(packed: Tensor) -> Tensor:
    """Bytes as their two fields of four bits, the low one first; int16, one-dimensional."""
    return torch.stack((packed & 15, packed >> 4), -1).reshape(-1).to(torch.int16)


def _weight(quantizer: Any, weight: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes, scale and zero point of a weight under NNCF's fake quantizer."""
    low, _, scale, shift = quantizer.get_parameters_for_torch_fq()
    shape = tuple(quantizer.scale_shape)
    spread = [size if size > 1 else 1 for size in shape] if len(shape) == weight.dim() else [1] * weight.dim()
    with torch.no_grad():
        dense = quantizer.quantize(weight)
    signed = (dense / scale.reshape(spread)).round() + shift.reshape(spread) - (128 if low == 0 else 0)
    zero_point = (shift - (128 if low == 0 else 0)).to(torch.int8).reshape(-1, 1)
    return signed.to(torch.int8), scale.float().reshape(-1, 1), zero_point if bool(zero_point.any()) else None


def _input(quantizer: Any) -> tuple[float, int]:
    """Scale and signed zero point of an input's grid."""
    low, _, scale, shift = quantizer.get_parameters_for_torch_fq()
    return float(scale), int(shift) - (128 if low == 0 else 0)


def _arguments(graph: Any, node: Any) -> dict[int, Any]:
    return {edge.input_port_id: edge.from_node for edge in graph.get_input_edges(node)}


def _chain(graph: Any, node: Any) -> Iterator[Any]:
    """A node and those above it, as long as they only move numbers, round them or multiply by SmoothQuant's factors."""
    while True:
        yield node
        scaled = node.node_type == "mul" and "_hook__" in node.node_name
        if node.node_type not in _MOVES | _QUANTIZERS and not scaled:
            return
        above = _arguments(graph, node).get(0)
        if above is None:
            return
        node = above


def _above(graph: Any, node: Any, kinds: set[str], last: bool = False) -> Any:
    """The nearest of the given kinds in a chain; with ``last`` the farthest one that is no quantizer."""
    met = [each for each in _chain(graph, node) if each.node_type in kinds]
    met = [each for each in met if each.node_type != "mul" or "_hook__" in each.node_name]
    if last:
        met = [each for each in met if each.node_type not in _QUANTIZERS]
    return met[0] if met else None


def _constant(graph: Any, node: Any, port: int) -> str | None:
    """The name of the parameter that an argument is, if it is one."""
    above = _arguments(graph, node).get(port)
    if above is None:
        return None
    *_, origin = _chain(graph, above)
    attributes = origin.layer_attributes
    return str(attributes.name) if origin.node_type == "nncf_model_const" and attributes is not None else None


def _owner(graph: Any, node: Any, modules: Mapping[str, nn.Module]) -> Any:
    """The module of NNCF's that holds the numbers of a node."""
    for port, given in sorted(_arguments(graph, node).items()):
        if port and given.node_type == "nncf_model_const":
            return modules[given.layer_attributes.name.rpartition(".")[0]]
    raise KeyError(node.node_name)
