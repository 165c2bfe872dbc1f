"""Twin ranges as the benchmark simulates them: never worse than one, nothing counted twice, exact in standard operators."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from simulated_bits import TwinGrid

from calibrate import ops
from calibrate.fidelity import sqnr_db
from calibrate.grid import Grid
from compress.layers.quantized import ActivationGrid


def gelu(rows: int = 4000) -> Tensor:
    return F.gelu(torch.randn(rows, generator=torch.Generator().manual_seed(0)))


def twin(x: Tensor, bits: int) -> TwinGrid:
    return TwinGrid(ActivationGrid("static"), float(x.min()), float(x.max()), bits)


def single(x: Tensor, bits: int) -> Tensor:
    scale, zero = Grid(bits, False, "tensor").parameters(x.min(), x.max())
    assert zero is not None
    rounded: Tensor = ops.quantize_dequantize(x, scale, zero, bits)
    return rounded


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_two_ranges_are_never_worse_than_one(bits: int) -> None:
    x = gelu()
    assert sqnr_db(x, twin(x, bits)(x)) >= sqnr_db(x, single(x, bits))


def test_where_one_value_is_large_one_range_loses_what_is_negative() -> None:
    x = torch.cat([gelu().clamp(max=0.0), torch.tensor([40.0])])
    assert sqnr_db(x[:-1], twin(x, 8)(x)[:-1]) > sqnr_db(x[:-1], single(x, 8)[:-1]) + 6


def test_no_value_is_counted_twice() -> None:
    x = torch.tensor([-0.17, -0.05, 0.0, 0.05, 0.5, 3.0])
    grid = twin(x, 8)
    steps = torch.where(x < 0, grid.negative, grid.positive)
    assert ((grid(x) - x).abs() <= steps / 2 * (1 + 1e-5)).all()
    assert float(grid(x)[2]) == 0
    split = 0.125  # the sum of both branches without clipping adds the split to every value
    assert float((x.clamp(max=split) + x.clamp(min=split) - x).abs().max()) == pytest.approx(split)


def test_two_pairs_of_standard_operators_and_one_weight_say_the_same() -> None:
    onnx = pytest.importorskip("onnx", reason="onnx is not installed")
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    x = gelu(64 * 16).reshape(64, 16)
    grid, weight = twin(x, 8), torch.randn(16, 8, generator=torch.Generator().manual_seed(1))
    make, numpy = onnx.helper, onnx.numpy_helper
    constants = {
        "w": weight.numpy(),
        "s0": grid.negative.numpy(),
        "s1": grid.positive.numpy(),
        "z0": np.uint8(255),
        "z1": np.uint8(0),
    }
    nodes = []
    for part in "01":
        nodes += [
            make.make_node("QuantizeLinear", ["x", f"s{part}", f"z{part}"], [f"q{part}"]),
            make.make_node("DequantizeLinear", [f"q{part}", f"s{part}", f"z{part}"], [f"d{part}"]),
            make.make_node("MatMul", [f"d{part}", "w"], [f"y{part}"]),
        ]
    nodes.append(make.make_node("Sum", ["y0", "y1"], ["y"]))
    value = make.make_tensor_value_info
    graph = make.make_graph(
        nodes,
        "twin",
        [value("x", onnx.TensorProto.FLOAT, [64, 16])],
        [value("y", onnx.TensorProto.FLOAT, [64, 8])],
        [numpy.from_array(np.asarray(array), name) for name, array in constants.items()],
    )
    model = make.make_model(graph, opset_imports=[make.make_opsetid("", 21)], ir_version=10)
    given = runtime.InferenceSession(model.SerializeToString()).run(None, {"x": x.numpy()})[0]
    assert sqnr_db(grid(x) @ weight, torch.from_numpy(given)) > 110
