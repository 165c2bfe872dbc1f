"""The size of a TensorRT engine, from the graph that the builder would be given; nothing is built."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["UNCERTAIN", "builder_bytes", "engine_bytes"]

_FIXED, _ATTENTION, _KIND = 760_000, 577_000, 29_000
UNCERTAIN = 0.35
"""Share of what is told beside the file's constants that there may be more or less."""
_BUILDER, _COPIES, _COMPILED = 200_000_000, 3.4, 16


def engine_bytes(graph: ir.Model) -> int:
    """Bytes of an engine of TensorRT-RTX 1.7 for its default targets.

    The engine holds the constants as the graph stores them, and the source of each distinct kernel, 131 to 185 kB each. How
    many kernels there are was fitted to 18 engines (2 to 6 layers of BERT, ViT, GPT-2 and Llama; 8 and 4 bits; 2.4 to 28 MB):
    0.76 MB, 0.58 MB for each softmax (blocks of a model do not share all of their kernels) and 29 kB for each kind of
    operation. The rest beside the constants was within 14 % there: the file within 9 % where it is small, within 3 % above
    10 MB. Elsewhere the file was told too large: by 35 % for GPT-2 of 4 layers in 4 bits, by 60 % for a float model of 0.8 MB.
    Other versions, and NVIDIA's TensorRT for one GPU, differ. A table that is also a head is stored twice.
    """
    kinds = Counter(node.op_type for node in graph.graph)
    held = (value.const_value for value in graph.graph.initializers.values())
    stored = sum(int(tensor.nbytes) for tensor in held if tensor is not None)
    return stored + _twice(graph) + _FIXED + _ATTENTION * kinds["Softmax"] + _KIND * len(kinds)


def builder_bytes(graph_bytes: int, engine: int) -> int:
    """Peak memory of the builder's own process for a file and the engine made of it: 200 MB, 3.4 copies of the file, and 16 times
    what is in the engine beside it (measured 204 to 417 MB for files of 0 to 45 MB, within 4 %)."""
    return _BUILDER + int(_COPIES * graph_bytes) + _COMPILED * max(0, engine - graph_bytes)


def _twice(graph: ir.Model) -> int:
    """Bytes of dequantized tables that both a Gather and a product read."""
    total = 0
    for value in graph.graph.initializers.values():
        readers = {kind for node, _ in value.uses() for kind in _readers(node)}
        if "Gather" in readers and readers & {"MatMul", "Gemm"} and value.const_value is not None:
            total += int(value.const_value.nbytes)
    return total


def _readers(node: ir.Node) -> set[str]:
    if node.op_type not in ("DequantizeLinear", "Transpose", "Cast"):
        return {node.op_type}
    return {kind for reader, _ in node.outputs[0].uses() for kind in _readers(reader)}
