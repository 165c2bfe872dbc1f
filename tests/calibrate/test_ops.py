"""The carrier ops against the grid, and in a traced graph."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from calibrate import ops
from calibrate.grid import Bits, Grid, pack

CHOICES: list[tuple[Bits, bool, int | None]] = [(8, True, None), (8, False, None), (4, True, 8), (4, False, 8), (2, True, 8)]


def made(bits: Bits, symmetric: bool, size: int | None, shape: tuple[int, ...]) -> tuple[Grid, Tensor, Tensor, Tensor | None]:
    """A grid, codes in the weight's shape, and their scales."""
    grid = Grid(bits, symmetric, "group" if size else "channel", size)
    values = torch.randn(shape)
    blocks = grid.blocks(values)
    scale, zero_point = grid.parameters(blocks.amin(-1), blocks.amax(-1))
    return grid, grid.quantize(values, scale, zero_point), scale, zero_point


@pytest.mark.parametrize(("bits", "symmetric", "size"), CHOICES)
@pytest.mark.parametrize("shape", [(6, 16), (4, 2, 2, 4)])
def test_dequantize_is_the_grids(bits: Bits, symmetric: bool, size: int | None, shape: tuple[int, ...]) -> None:
    grid, codes, scale, zero_point = made(bits, symmetric, size, shape)
    dense = ops.dequantize(pack(codes, bits), scale, zero_point, bits, list(shape))
    assert torch.equal(dense, grid.dequantize(codes, scale, zero_point))


@pytest.mark.parametrize(("bits", "symmetric", "size"), CHOICES)
def test_embedding_is_a_lookup_in_the_dense_table(bits: Bits, symmetric: bool, size: int | None) -> None:
    grid, codes, scale, zero_point = made(bits, symmetric, size, (10, 16))
    ids = torch.tensor([[1, 9, 9], [0, 3, 5]])
    rows = ops.embedding(ids, pack(codes, bits), scale, zero_point, bits, [10, 16])
    assert torch.equal(rows, grid.dequantize(codes, scale, zero_point)[ids])


def test_static_activations_are_the_grids() -> None:
    grid, x = Grid(8, False, "tensor"), torch.randn(3, 5) * 3
    scale, zero_point = grid.parameters(torch.tensor([[-2.0]]), torch.tensor([[6.0]]))
    assert zero_point is not None
    expected = grid.dequantize(grid.quantize(x, scale, zero_point), scale, zero_point)
    assert torch.equal(ops.quantize_dequantize(x, scale[0, 0], zero_point[0, 0], 8), expected)


def test_dynamic_activations_cover_the_tensor_and_keep_zero() -> None:
    x = torch.randn(4, 6) + 1
    x[0, 0] = 0
    y = ops.quantize_dequantize_dynamic(x, 8)
    step = float(x.max().clamp(min=0) - x.min().clamp(max=0)) / 255
    assert float((x - y).abs().max()) <= step / 2 * 1.001
    assert float(y[0, 0]) == 0
    assert torch.equal(ops.quantize_dequantize_dynamic(torch.zeros(3), 8), torch.zeros(3))


class Carried(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        _, codes, scale, _ = made(4, True, 8, (6, 16))
        self.register_buffer("codes", pack(codes, 4))
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, ops.dequantize(self.codes, self.scale, None, 4, [6, 16]))


def test_codes_stay_integers_in_a_traced_graph() -> None:
    module, x = Carried(), torch.randn(3, 16)
    program = torch.export.export(module, (x,), strict=False)
    called = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert torch.ops.compress.dequantize.default in called
    assert program.state_dict["codes"].dtype == torch.uint8
    assert torch.equal(program.module()(x), module(x))
