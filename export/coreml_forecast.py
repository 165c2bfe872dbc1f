"""The size of a Core ML package, from the traced graph alone: nothing is converted, no tensor is read.

A package is a weight file and a program. The weight file holds each constant of ten elements or more behind a header of 64
bytes, each padded to 64 bytes (``MILBlob``); which constants there are is read from the graph, so that slices of tables that
coremltools folds are seen. The program's text is told by counting operations, with the bytes for each kind that were fitted to
18 packages of BERT, ViT, GPT-2 and Llama with 2 to 12 layers (28 to 108 kB of text, 8 and 4 bits): within 17 % of the text and
1.4 % of the package there; too little where layers get factors for their channels, which only calibration decides. The Manifest
has 617 bytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from export.coreml_weights import Target, stored_bits

__all__ = ["package_bytes", "weight_bytes"]

_BLOCK, _SMALLEST, _MANIFEST = 64, 10, 617
_FIXED = 2000
_TEXT = {"slice": 890, "quantize": 625, "weight": 310, "layer": 825, "other": 150}
"""Bytes of program text for each operation of the graph, its constants and their names included."""
_KINDS = {
    **dict.fromkeys(("slice", "select", "split_with_sizes"), "slice"),
    "quantize_dequantize": "quantize",
    **dict.fromkeys(("binary", "dequantize", "embedding"), "weight"),
    **dict.fromkeys(("linear", "conv2d", "convolution", "layer_norm", "addmm"), "layer"),
    **dict.fromkeys(
        ("expand", "clone", "_assert_tensor_metadata", "alias", "_to_copy", "arange", "detach", "full", "unsqueeze"), ""
    ),
    "scaled_dot_product_attention": "",
}
_CARRIED = ("compress.binary", "compress.dequantize", "compress.embedding")


def package_bytes(program: ExportedProgram, half: bool, target: Target = "iOS18") -> int:
    """Bytes of the files of a package; ``half``: floats in the program have 16 bits."""
    return _MANIFEST + _text_bytes(program.graph) + weight_bytes(program, half, target)


def weight_bytes(program: ExportedProgram, half: bool, target: Target = "iOS18") -> int:
    """Bytes of ``weight.bin``."""
    total = _BLOCK + _beyond_codes(program, half, target)
    for tensor in _stored(program):
        bits = tensor.element_size() * 8
        if tensor.is_floating_point():
            bits = 16 if half or tensor.dtype in (torch.float16, torch.bfloat16) else 32
        elif tensor.dtype not in (torch.int8, torch.uint8):
            continue  # other integers stand in the program's text
        if tensor.numel() >= _SMALLEST:
            total += _BLOCK + -(-tensor.numel() * bits // 8 // _BLOCK) * _BLOCK
    return total


def _beyond_codes(program: ExportedProgram, half: bool, target: Target) -> int:
    """Bytes that codes of 3 and 2 bits take beside what the graph holds of them: their tables, and a bit more where they lie in
    four (``export.coreml_weights``)."""
    names, state = _held(program)
    counted: dict[Any, int] = {}
    for node in program.graph.nodes:
        first = {"compress.dequantize": 0, "compress.embedding": 1}.get(str(node.target).removesuffix(".default"))
        if first is None or node.args[first + 3] > 3:
            continue
        codes, scale, _, bits, shape = node.args[first : first + 5]
        rows, groups = scale.meta["val"].shape
        count = math.prod(shape)
        stored = stored_bits(target, bits, count // (rows * groups))
        more = count * (stored - bits) // 8
        if stored < 4 and target == "iOS18":
            width = 2 if half else 4
            more += rows * groups * (2**bits if groups > 1 else (2**bits - 1) * width)
        counted[_identity(codes, names, state)] = more
    return sum(counted.values())


def _text_bytes(graph: fx.Graph) -> int:
    total = _FIXED
    for node in graph.nodes:
        name = str(node.target)
        if node.op == "call_function" and (kind := _KINDS.get(name.split(".")[1] if "." in name else name, "other")):
            total += _TEXT[kind]
    return total


def _stored(program: ExportedProgram) -> Iterator[Tensor]:
    """Constants that operations on real values read, each once: parameters, and what folds out of them."""
    names, state = _held(program)
    constant: set[fx.Node] = set()
    used: dict[Any, Tensor] = {}
    for node in program.graph.nodes:
        carried = str(node.target).startswith(_CARRIED)
        held_there = node.op == "placeholder" and node.name in names
        folds = node.op == "call_function" and not carried and all(item in constant for item in node.all_input_nodes)
        if held_there or folds:
            constant.add(node)
        elif node.op != "placeholder":
            for item in node.all_input_nodes:
                held = item.meta.get("val")
                if item in constant and isinstance(held, Tensor):
                    used.setdefault(_identity(item, names, state), held)
    yield from used.values()


def _held(program: ExportedProgram) -> tuple[dict[str, str], dict[str, Any]]:
    """Placeholders by the names of what they hold, and that by its name."""
    signature = program.graph_signature
    names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers, **signature.inputs_to_lifted_tensor_constants}
    return names, {**program.state_dict, **program.constants}


def _identity(node: fx.Node, names: dict[str, str], state: dict[str, Any]) -> Any:
    """Equal for names of one tensor."""
    tensor = state.get(names[node.name]) if node.name in names else None
    return node if tensor is None else (tensor.data_ptr(), math.prod(tensor.shape), tensor.dtype)
