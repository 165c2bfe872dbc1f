"""Teaches coremltools what it lacks, for the duration of one conversion: our carrier ops, and a few plain torch ops.

Everything here is undone when the conversion ends: the registry of converters and the patched functions are those of
before.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from calibrate.bits import unpack_signs
from calibrate.errors import UserError
from calibrate.grid import unpack
from export.coreml_weights import BinaryWeight, Target, Weight

__all__ = ["Carrier", "conversion", "decomposed", "finite", "fused_attention"]

# Kept whole instead of decomposed: Core ML has the operation, or coremltools' converter of it gives a smaller program.
_KEPT = [
    "linear",
    "layer_norm",
    "native_layer_norm",
    "gelu",
    "_softmax",
    "softmax.int",
    "silu",
    "relu",
    "matmul",
    "conv2d",
    "conv2d.padding",
    "expand",
    "scaled_dot_product_attention",
    "roll",
    "adaptive_avg_pool1d",
    "adaptive_avg_pool2d",
    "upsample_bilinear2d.vec",
    "pixel_shuffle",
    "hardswish",
    "hardsigmoid",
    "leaky_relu",
    "elu",
    "hardtanh",
    "prelu",
    "softplus",
    "mish",
]

_ATTENTION = ("attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
"""Names of what ``scaled_dot_product_attention`` takes after queries, keys and values."""
_HIDDEN = -3e4
"""Added to a score that is masked: float16 has room for two of them."""
_MASK = 1e30
"""A constant beyond it means minus (or plus) infinity: no trained weight is that large."""


def decomposed(program: ExportedProgram) -> ExportedProgram:
    """The program in the operations that coremltools converts well."""
    table = torch.export.default_decompositions()
    for name in _KEPT:
        packet, _, overload = name.partition(".")
        op = getattr(getattr(torch.ops.aten, packet, None), overload or "default", None)
        if op in table:
            del table[op]
    decomposition: ExportedProgram = program.run_decompositions(table)
    return decomposition


def fused_attention(program: ExportedProgram) -> ExportedProgram:
    """Attention as the one operation that iOS 18 has for it: that one scales by 1/sqrt(D) itself, D channels a head, and is given
    masks of numbers, since with masks of truth values a query that attends to nothing gets no number.

    coremltools 9 writes any attention with a scale of its own as products and a softmax; transformers always states one.
    """
    aten, graph = torch.ops.aten, program.graph_module.graph
    numbers: dict[fx.Node, fx.Node] = {}
    for node in [node for node in graph.nodes if node.target is aten.scaled_dot_product_attention.default]:
        options = dict(zip(_ATTENTION, node.args[3:], strict=False)) | node.kwargs
        query, mask, scale = node.args[0], options.get("attn_mask"), options.pop("scale", None)
        if options.get("enable_gqa") or query.meta["val"].dtype != torch.float32:
            continue  # coremltools widens products of 16-bit values, and the operation takes one type
        with graph.inserting_before(node):
            root = math.sqrt(query.meta["val"].shape[-1])
            if scale is not None and not math.isclose(scale * root, 1, rel_tol=1e-6):
                query = _added(graph, aten.mul.Tensor, query, scale * root)
            if mask is not None and mask.meta["val"].dtype == torch.bool:
                if mask not in numbers:
                    seen = _added(graph, aten._to_copy.default, mask, dtype=torch.float32)
                    numbers[mask] = _added(graph, aten.mul.Tensor, _added(graph, aten.rsub.Scalar, seen, 1.0), _HIDDEN)
                options["attn_mask"] = numbers[mask]
        # By position: coremltools reads is_causal nowhere else.
        node.args = (query, *node.args[1:3], options.get("attn_mask"), 0.0, options.get("is_causal", False))
        node.kwargs = {}
    program.graph_module.recompile()
    return program


def _added(graph: fx.Graph, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
    """A new node, with the value of the trace."""
    node = graph.call_function(target, args, kwargs)
    values = [argument.meta["val"] if isinstance(argument, fx.Node) else argument for argument in args]
    node.meta["val"] = target(*values, **kwargs)
    return node


def finite(program: ExportedProgram, half: bool) -> ExportedProgram:
    """Replaces the infinities of attention masks by finite numbers: Core ML's float16 has no room for -3.4e38.

    In float16 every constant below -65504 becomes -3e4, so that two masks can be added without an overflow; in float32
    what is beyond 1e30 becomes 1e30 with its sign.
    """
    program._state_dict, program._constants = dict(program._state_dict), dict(program._constants)
    for node in program.graph_module.graph.nodes:
        if node.op == "call_function":
            node.args = torch.fx.node.map_aggregate(node.args, lambda value: _finite_number(value, half))
            node.kwargs = torch.fx.node.map_aggregate(node.kwargs, lambda value: _finite_number(value, half))
    for holder in (program.constants, program.state_dict):
        for name, value in holder.items():
            if isinstance(value, Tensor) and value.is_floating_point() and value.numel():
                holder[name] = _finite_tensor(value, half)
    return program


def _finite_number(value: Any, half: bool) -> Any:
    if isinstance(value, float) and not math.isnan(value):
        if half and value < -65504:
            return -3e4
        if abs(value) >= _MASK:
            return math.copysign(3e4 if half else _MASK, value)
    return value


def _finite_tensor(value: Tensor, half: bool) -> Tensor:
    low, high = (float(limit) for limit in torch.aminmax(value.detach()))
    if low >= (-65504 if half else -_MASK) and high < _MASK:
        return value
    limit = 3e4 if half else _MASK
    changed = torch.where(value >= _MASK, limit, torch.where(value < (-65504 if half else -_MASK), -limit, value.detach()))
    return torch.nn.Parameter(changed, requires_grad=False) if isinstance(value, torch.nn.Parameter) else changed


class Carrier:
    """Converters of our carrier ops; remembers which weight operation holds the codes of which buffer.

    Args:
        target: the oldest system that must run the package.
        buffers: placeholder name in the traced graph -> dotted name of the buffer in the traced module.
    """

    def __init__(self, target: Target, buffers: Mapping[str, str]) -> None:
        """``names``: weight operation -> the buffers whose codes it holds (equal weights share one operation)."""
        self.target, self.buffers = target, buffers
        self.emitted: dict[str, Any] = {}
        self.names: dict[str, list[str]] = {}
        self.named: dict[str, str] = {}

    def converters(self) -> dict[str, Callable[[Any, Any], None]]:
        return {
            "binary": self.binary,
            "dequantize": self.dequantize,
            "embedding": self.embedding,
            "quantize_dequantize": self.quantize_dequantize,
        }

    def weight(self, node: Any, inputs: list[Any], first: int) -> Any:
        """The dense weight of the carrier arguments (codes, scale, zero_point, bits, shape) that begin at ``first``."""
        codes, scale, shift, bits, shape = inputs[first : first + 5]
        sizes, width = [int(size) for size in np.atleast_1d(shape.val)], int(bits.val)
        stored = torch.from_numpy(np.array(codes.val)).reshape(-1)
        weight = Weight(
            unpack(stored, width, sizes).numpy(),
            np.array(scale.val, np.float32),
            None if shift is None else np.array(shift.val, np.int8),
            width,
        )
        return self._emit(weight, node.inputs[first])

    def binary(self, context: Any, node: Any) -> None:
        """A weight from planes of bits: the arguments are codes, multiples, shift, scale and shape."""
        inputs = _inputs(context, node)
        sizes = [int(size) for size in np.atleast_1d(inputs[4].val)]
        planes = unpack_signs(torch.from_numpy(np.array(inputs[0].val)).reshape(-1), sizes).numpy()
        multiples, shift = (None if given is None else np.array(given.val, np.int8) for given in inputs[1:3])
        weight = BinaryWeight(planes, multiples, shift, np.array(inputs[3].val, np.float32))
        context.add(self._emit(weight, node.inputs[0]), node.name)

    def _emit(self, weight: Weight | BinaryWeight, codes: Any) -> Any:
        """The operation of a weight, one for equal weights; ``codes`` is the name of the buffer in the traced graph."""
        key = weight.key()
        if key not in self.emitted:
            name = f"codes_{len(self.emitted)}"
            self.emitted[key], self.names[name] = weight.emit(self.target, name), []
            self.named[key] = name
        source = self.buffers[str(codes)]
        if source not in self.names[self.named[key]]:
            self.names[self.named[key]].append(source)
        return self.emitted[key]

    def dequantize(self, context: Any, node: Any) -> None:
        context.add(self.weight(node, _inputs(context, node), 0), node.name)

    def embedding(self, context: Any, node: Any) -> None:
        from coremltools.converters.mil.mil import Builder as mb

        inputs = _inputs(context, node)
        ids = mb.cast(x=inputs[0], dtype="int32")
        context.add(mb.gather(x=self.weight(node, inputs, 1), indices=ids, axis=0, name=node.name))

    def quantize_dequantize(self, context: Any, node: Any) -> None:
        from coremltools.converters.mil.mil import Builder as mb

        x, scale, shift, bits = _inputs(context, node)
        if int(bits.val) != 8 or self.target == "iOS16":
            raise UserError("", f"Core ML {self.target} cannot round activations to {int(bits.val)} bits", "Use 8, iOS17.")
        step, zero = np.float32(np.asarray(scale.val).item()), np.int8(np.asarray(shift.val).item())
        arguments = {"scale": step} if zero == 0 else {"scale": step, "zero_point": zero}
        codes = mb.quantize(input=x, output_dtype="int8", **arguments)
        context.add(mb.dequantize(input=codes, name=node.name, **arguments))


def _inputs(context: Any, node: Any) -> list[Any]:
    from coremltools.converters.mil.frontend.torch import ops

    return list(ops._get_inputs(context, node))


def _alias(context: Any, node: Any) -> None:
    context.add(_inputs(context, node)[0], node.name)


def _new_ones(context: Any, node: Any) -> None:
    from coremltools.converters.mil.mil import Builder as mb

    shape = _inputs(context, node)[1]
    shape = mb.concat(values=shape, axis=0) if isinstance(shape, list | tuple) else shape
    context.add(mb.fill(shape=shape, value=1.0, name=node.name))


def _clamp(both: Callable[[Any, Any], None]) -> Callable[[Any, Any], None]:
    """One-sided clamps as ``maximum`` or ``minimum``: the converter of coremltools fills the other bound with 3.4e38."""

    def clamp(context: Any, node: Any) -> None:
        from coremltools.converters.mil.frontend._utils import promote_input_dtypes
        from coremltools.converters.mil.mil import Builder as mb

        x, low, high = (*_inputs(context, node), None, None)[:3]
        if (low is None) == (high is None):
            both(context, node)
            return
        x, bound = promote_input_dtypes([x, high if low is None else low])
        function = mb.minimum if low is None else mb.maximum
        context.add(function(x=x, y=bound, name=node.name))

    return clamp


def _gelu(context: Any, node: Any) -> None:
    """The converter of coremltools does not see ``approximate="tanh"`` where it is given by name, as traced graphs do."""
    from coremltools.converters.mil.mil import Builder as mb

    given = [*node.inputs[1:], (node.kwinputs or {}).get("approximate")]
    mode = "TANH_APPROXIMATION" if "tanh" in str(given) else "EXACT"
    context.add(mb.gelu(x=context[node.inputs[0]], mode=mode, name=node.name))


def _logical(name: str) -> Callable[[Any, Any], None]:
    """``|`` and ``^`` of booleans."""

    def convert(context: Any, node: Any) -> None:
        from coremltools.converters.mil.mil import Builder as mb
        from coremltools.converters.mil.mil import types

        x, y = _inputs(context, node)
        if not (types.is_bool(x.dtype) and types.is_bool(y.dtype)):
            raise NotImplementedError(f"{node.kind} of whole numbers")
        context.add(getattr(mb, name)(x=x, y=y, name=node.name))

    return convert


def _scalar(function: Callable[..., None]) -> Callable[..., None]:
    """numpy 2.4 no longer makes an int of a one-element array; converters written for older ones expect it to."""

    def cast(context: Any, node: Any, dtype: type, dtype_name: str) -> None:
        from coremltools.converters.mil.mil import Builder as mb

        x = _inputs(context, node)[0]
        if x.can_be_folded_to_const() and np.size(x.val) == 1:
            context.add(mb.const(val=dtype(np.asarray(x.val).item()), name=node.name), node.name)
        else:
            function(context, node, dtype, dtype_name)

    return cast


def _overflows(op: Any) -> bool:
    """Whether a constant of the operation is beyond float16: what coremltools asks of every operation, but fast."""
    for given in op.inputs.values():
        for variable in given if isinstance(given, list | tuple) else [given]:
            made_by = getattr(variable, "op", None)
            if made_by is None or made_by.op_type != "const" or not variable.is_tensor_or_scalar_of(dtype="fp32"):
                continue
            values = np.asarray(made_by.val.val)
            if values.size and max(abs(float(values.min())), abs(float(values.max()))) > 65504:
                return True
    return False


_LACKING: dict[str, Callable[[Any, Any], None]] = {
    "alias": _alias,
    "new_ones": _new_ones,
    "bitwise_or": _logical("logical_or"),
    "bitwise_xor": _logical("logical_xor"),
}


class _Silent:
    """Stands in for the progress bar of coremltools."""

    def __new__(cls, items: Any, *_: Any, **__: Any) -> Any:
        return items


@contextmanager
def conversion(carrier: Carrier) -> Iterator[None]:
    """coremltools with our converters and patches, and without progress bars; as before when the block ends."""
    from coremltools.converters.mil.frontend.torch import ops
    from coremltools.converters.mil.frontend.torch.torch_op_registry import _TORCH_OPS_REGISTRY as registry
    from coremltools.converters.mil.mil import Program
    from coremltools.converters.mil.mil.passes import pass_pipeline
    from coremltools.converters.mil.mil.passes.defs.quantization import FP16ComputePrecision

    patches: list[tuple[Any, str, Any]] = [
        (ops, "_cast", _scalar(ops._cast)),
        (ops, "_tqdm", _Silent),
        (pass_pipeline, "tqdm", _Silent),
        (Program, "validate", lambda program, **_: None),  # after each of 110 passes; ``write`` does it once
        (FP16ComputePrecision, "fp16_overflow", staticmethod(_overflows)),
    ]
    before = [(owner, name, vars(owner)[name]) for owner, name, _ in patches]
    known = dict(registry.name_to_func_mapping)
    try:
        for owner, name, value in patches:
            setattr(owner, name, value)
        for name, converter in carrier.converters().items():
            for spelling in (f"compress::{name}", f"compress.{name}", f"compress.{name}.default"):
                registry.name_to_func_mapping[spelling] = converter
        registry.name_to_func_mapping["clamp"] = _clamp(registry.name_to_func_mapping["clamp"])
        registry.name_to_func_mapping["gelu"] = _gelu
        for name, converter in _LACKING.items():
            registry.name_to_func_mapping.setdefault(name, converter)
        yield
    finally:
        registry.name_to_func_mapping.clear()
        registry.name_to_func_mapping.update(known)
        for owner, name, value in before:
            setattr(owner, name, value)
