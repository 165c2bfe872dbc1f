"""Small explicit Q/DQ graphs, written node by node, for the engine builder."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np


def perceptron(
    path: Path,
    *,
    float16: bool = True,
    activations: bool = True,
    bits: int = 8,
    group: int | None = None,
    activation_zero: int = 0,
    rows: int | str = "batch",
    widths: tuple[int, ...] = (64, 128, 32),
    seed: int = 0,
) -> dict[str, np.ndarray[Any, Any]]:
    """Writes ``x [batch, 5, I] -> linear, relu, linear -> output``; returns the codes [I, O] of each layer."""
    import ml_dtypes
    from onnx import TensorProto, checker, helper, numpy_helper, save

    random = np.random.default_rng(seed)
    real = np.dtype(np.float16 if float16 else np.float32)
    kind = TensorProto.FLOAT16 if float16 else TensorProto.FLOAT
    nodes, initializers, codes = [], [], {}

    def constant(name: str, array: Any) -> str:
        initializers.append(numpy_helper.from_array(array, name))
        return name

    def node(op: str, inputs: list[str], output: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(op, inputs, [output], name=output, **attributes))
        return output

    value = node("Cast", ["x"], "x/cast", to=kind)
    for index, (inputs, outputs) in enumerate(pairwise(widths)):
        layer = f"layers.{index}"
        if activations:
            scale = constant(f"{layer}.activation.scale", np.array(0.03, real))
            zero = constant(f"{layer}.activation.zero_point", np.array(activation_zero, np.int8))
            value = node("QuantizeLinear", [value, scale, zero], f"{layer}.quantize")
            value = node("DequantizeLinear", [value, scale, zero], f"{layer}.dequantize")
        limit = 2 ** (bits - 1) - 1
        codes[layer] = random.integers(-limit, limit + 1, (inputs, outputs)).astype(np.int8)
        spread = 1.5 / (limit * inputs**0.5)
        size = (outputs,) if group is None else (inputs // group, outputs)
        scales = constant(f"{layer}.scale", (spread * random.uniform(0.8, 1.2, size)).astype(real))
        stored = codes[layer] if bits == 8 else codes[layer].astype(ml_dtypes.int4)
        layout = {"axis": 1} if group is None else {"axis": 0, "block_size": group}
        weight = node("DequantizeLinear", [constant(f"{layer}.codes", stored), scales], f"{layer}.weight", **layout)
        value = node("MatMul", [value, weight], f"{layer}.matmul")
        bias = constant(f"{layer}.bias", random.standard_normal(outputs).astype(real))
        value = node("Sum", [value, bias], f"{layer}.sum")
        if index + 2 < len(widths):
            value = node("Relu", [value], f"{layer}.relu")
    nodes.append(helper.make_node("Cast", [value], ["output"], to=TensorProto.FLOAT))
    takes = helper.make_tensor_value_info("x", TensorProto.FLOAT, [rows, 5, widths[0]])
    gives = helper.make_tensor_value_info("output", TensorProto.FLOAT, [rows, 5, widths[-1]])
    graph = helper.make_graph(nodes, "perceptron", [takes], [gives], initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    checker.check_model(model)
    save(model, str(path))
    return codes


def merged(path: Path, *, width: int = 64) -> dict[str, np.ndarray[Any, Any]]:
    """Writes three INT8 products of one quantized input, as of query, key and value; returns their codes [I, O]."""
    from onnx import TensorProto, helper, numpy_helper, save

    random, nodes, initializers, codes = np.random.default_rng(3), [], [], {}
    for name, array in (("scale", np.array(0.03, np.float16)), ("zero", np.array(0, np.int8))):
        initializers.append(numpy_helper.from_array(array, name))
    nodes.append(helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"], name="quantize"))
    nodes.append(helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["d"], name="dequantize"))
    for layer in ("query", "key", "value"):
        codes[layer] = random.integers(-127, 128, (width, width)).astype(np.int8)
        scales = (0.02 / width * random.uniform(0.8, 1.2, width)).astype(np.float16)
        initializers.append(numpy_helper.from_array(codes[layer], f"{layer}.codes"))
        initializers.append(numpy_helper.from_array(scales, f"{layer}.scale"))
        inputs = [f"{layer}.codes", f"{layer}.scale"]
        nodes.append(helper.make_node("DequantizeLinear", inputs, [f"{layer}.weight"], name=f"{layer}.weight", axis=1))
        nodes.append(helper.make_node("MatMul", ["d", f"{layer}.weight"], [layer], name=f"{layer}.matmul"))
    nodes.append(helper.make_node("Mul", ["query", "key"], ["product"], name="product"))
    nodes.append(helper.make_node("Sum", ["product", "value"], ["output"], name="sum"))
    takes = helper.make_tensor_value_info("x", TensorProto.FLOAT16, [2, 5, width])
    gives = helper.make_tensor_value_info("output", TensorProto.FLOAT16, [2, 5, width])
    graph = helper.make_graph(nodes, "merged", [takes], [gives], initializers)
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), str(path))
    return codes
