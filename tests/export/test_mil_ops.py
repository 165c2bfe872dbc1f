"""The interpreter's operations against torch: one saved program, one output an operation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from coreml_models import saved, sqnr
from torch import Tensor
from torch.nn import functional as F

pytest.importorskip("coremltools", reason="Core ML needs coremltools")

from coremltools.converters.mil.mil import Builder as mb

from calibrate.errors import UserError
from export.mil import Program, UnknownOp
from export.mil_ops import KERNELS

INPUTS = {
    "x": ((2, 4, 8, 8), "float32"),
    "y": ((2, 4, 8, 8), "float32"),
    "i": ((2, 4, 8, 8), "int32"),
    "q": ((2, 3, 5, 4), "float32"),
    "k": ((2, 3, 6, 4), "float32"),
}
WEIGHT = np.random.default_rng(0).standard_normal((6, 4, 3, 3)).astype(np.float32)
GROUPED = np.random.default_rng(1).standard_normal((8, 2, 3, 3)).astype(np.float32)
MATRIX = np.random.default_rng(2).standard_normal((5, 8)).astype(np.float32)
VECTOR = np.random.default_rng(3).standard_normal(4).astype(np.float32)
POSITIVE = np.abs(VECTOR) + 0.5
W, G, M, V, P = (torch.from_numpy(array) for array in (WEIGHT, GROUPED, MATRIX, VECTOR, POSITIVE))
EIGHT = np.arange(8, dtype=np.float32)

# name: (what MIL computes, what torch computes) of the inputs v.x, v.y, v.q, v.k (floats) and v.i (0..7)
Case = tuple[Callable[..., Any], Callable[..., Tensor]]
CASES: dict[str, Case] = {
    "add": (lambda v: mb.add(x=v.x, y=v.y), lambda v: v.x + v.y),
    "sub": (lambda v: mb.sub(x=v.x, y=1.5), lambda v: v.x - 1.5),
    "mul": (lambda v: mb.mul(x=v.x, y=v.y), lambda v: v.x * v.y),
    "real_div": (lambda v: mb.real_div(x=v.x, y=mb.add(x=mb.abs(x=v.y), y=1.0)), lambda v: v.x / (v.y.abs() + 1)),
    "floor_div": (lambda v: mb.floor_div(x=v.i, y=3), lambda v: v.i // 3),
    "mod": (lambda v: mb.mod(x=v.i, y=3), lambda v: v.i % 3),
    "maximum": (lambda v: mb.maximum(x=v.x, y=v.y), lambda v: torch.maximum(v.x, v.y)),
    "minimum": (lambda v: mb.minimum(x=v.x, y=v.y), lambda v: torch.minimum(v.x, v.y)),
    "pow": (lambda v: mb.pow(x=v.x, y=2.0), lambda v: v.x**2),
    "select": (lambda v: mb.select(cond=mb.greater(x=v.x, y=v.y), a=v.x, b=v.y), lambda v: torch.where(v.x > v.y, v.x, v.y)),
    "compare": (
        lambda v: mb.cast(x=mb.logical_and(x=mb.less_equal(x=v.i, y=5), y=mb.not_equal(x=v.i, y=2)), dtype="int32"),
        lambda v: ((v.i <= 5) & (v.i != 2)).long(),
    ),
    "logic": (
        lambda v: mb.cast(
            x=mb.logical_xor(
                x=mb.logical_or(x=mb.less(x=v.i, y=2), y=mb.greater_equal(x=v.i, y=6)), y=mb.logical_not(x=mb.equal(x=v.i, y=0))
            ),
            dtype="fp32",
        ),
        lambda v: (((v.i < 2) | (v.i >= 6)) ^ (v.i != 0)).float(),
    ),
    "abs": (lambda v: mb.abs(x=v.x), lambda v: v.x.abs()),
    "exp": (lambda v: mb.exp(x=v.x), lambda v: v.x.exp()),
    "exp2": (lambda v: mb.exp2(x=v.x), lambda v: v.x.exp2()),
    "log": (lambda v: mb.log(x=mb.square(x=v.x), epsilon=0.01), lambda v: (v.x * v.x + 0.01).log()),
    "sqrt": (lambda v: mb.sqrt(x=mb.abs(x=v.x)), lambda v: v.x.abs().sqrt()),
    "rsqrt": (lambda v: mb.rsqrt(x=mb.square(x=v.x), epsilon=0.01), lambda v: (v.x * v.x + 0.01).rsqrt()),
    "inverse": (lambda v: mb.inverse(x=mb.square(x=v.x), epsilon=0.5), lambda v: 1 / (v.x * v.x + 0.5)),
    "sin": (lambda v: mb.sin(x=v.x), lambda v: v.x.sin()),
    "cos": (lambda v: mb.cos(x=v.x), lambda v: v.x.cos()),
    "tanh": (lambda v: mb.tanh(x=v.x), lambda v: v.x.tanh()),
    "erf": (lambda v: mb.erf(x=v.x), lambda v: v.x.erf()),
    "sign": (lambda v: mb.sign(x=v.x), lambda v: v.x.sign()),
    "floor": (lambda v: mb.floor(x=v.x), lambda v: v.x.floor()),
    "ceil": (lambda v: mb.ceil(x=v.x), lambda v: v.x.ceil()),
    "round": (lambda v: mb.round(x=v.x), lambda v: v.x.round()),
    "clip": (lambda v: mb.clip(x=v.x, alpha=-0.5, beta=0.7), lambda v: v.x.clamp(-0.5, 0.7)),
    "cast": (lambda v: mb.cast(x=v.x, dtype="int32"), lambda v: v.x.trunc().long()),
    "relu": (lambda v: mb.relu(x=v.x), lambda v: v.x.relu()),
    "relu6": (lambda v: mb.relu6(x=v.x), lambda v: F.relu6(v.x)),
    "leaky_relu": (lambda v: mb.leaky_relu(x=v.x, alpha=0.2), lambda v: F.leaky_relu(v.x, 0.2)),
    "thresholded_relu": (lambda v: mb.thresholded_relu(x=v.x, alpha=0.3), lambda v: torch.where(v.x >= 0.3, v.x, 0.0)),
    "prelu": (lambda v: mb.prelu(x=v.x, alpha=POSITIVE), lambda v: F.prelu(v.x, P)),
    "elu": (lambda v: mb.elu(x=v.x, alpha=0.7), lambda v: F.elu(v.x, 0.7)),
    "silu": (lambda v: mb.silu(x=v.x), lambda v: F.silu(v.x)),
    "sigmoid": (lambda v: mb.sigmoid(x=v.x), lambda v: v.x.sigmoid()),
    "sigmoid_hard": (lambda v: mb.sigmoid_hard(x=v.x, alpha=1 / 6, beta=0.5), lambda v: F.hardsigmoid(v.x)),
    "softplus": (lambda v: mb.softplus(x=v.x), lambda v: F.softplus(v.x)),
    "softsign": (lambda v: mb.softsign(x=v.x), lambda v: F.softsign(v.x)),
    "gelu": (lambda v: mb.gelu(x=v.x), lambda v: F.gelu(v.x)),
    "gelu_tanh": (lambda v: mb.gelu(x=v.x, mode="TANH_APPROXIMATION"), lambda v: F.gelu(v.x, approximate="tanh")),
    "softmax": (lambda v: mb.softmax(x=v.x, axis=1), lambda v: v.x.softmax(1)),
    "reduce_mean": (lambda v: mb.reduce_mean(x=v.x, axes=[1, 3], keep_dims=True), lambda v: v.x.mean([1, 3], keepdim=True)),
    "reduce_sum": (lambda v: mb.reduce_sum(x=v.x, axes=[-1]), lambda v: v.x.sum(-1)),
    "reduce_max": (lambda v: mb.reduce_max(x=v.x, axes=[2]), lambda v: v.x.amax(2)),
    "reduce_min": (lambda v: mb.reduce_min(x=v.x, axes=[2]), lambda v: v.x.amin(2)),
    "reduce_prod": (lambda v: mb.reduce_prod(x=v.x, axes=[1]), lambda v: v.x.prod(1)),
    "reduce_l1_norm": (lambda v: mb.reduce_l1_norm(x=v.x, axes=[1]), lambda v: v.x.abs().sum(1)),
    "reduce_l2_norm": (lambda v: mb.reduce_l2_norm(x=v.x, axes=[1]), lambda v: v.x.norm(dim=1)),
    "reduce_sum_square": (lambda v: mb.reduce_sum_square(x=v.x, axes=[1]), lambda v: v.x.square().sum(1)),
    "reduce_log_sum_exp": (lambda v: mb.reduce_log_sum_exp(x=v.x, axes=[1]), lambda v: v.x.logsumexp(1)),
    "reduce_argmax": (lambda v: mb.reduce_argmax(x=v.x, axis=1), lambda v: v.x.argmax(1)),
    "linear": (lambda v: mb.linear(x=v.x, weight=MATRIX, bias=np.ones(5, np.float32)), lambda v: F.linear(v.x, M, torch.ones(5))),
    "matmul": (lambda v: mb.matmul(x=v.q, y=v.k, transpose_y=True), lambda v: v.q @ v.k.mT),
    "matmul_x": (lambda v: mb.matmul(x=v.x, y=v.y, transpose_x=True), lambda v: v.x.mT @ v.y),
    "einsum": (
        lambda v: mb.einsum(values=(v.x, mb.transpose(x=v.y, perm=[0, 2, 3, 1])), equation="nchw,nwhu->nchu"),
        lambda v: torch.einsum("nchw,nuwh->nchu", v.x, v.y),
    ),
    "attention": (
        lambda v: mb.scaled_dot_product_attention(query=v.q, key=v.k, value=v.k),
        lambda v: F.scaled_dot_product_attention(v.q, v.k, v.k),
    ),
    "conv": (
        lambda v: mb.conv(x=v.x, weight=WEIGHT, strides=[2, 1], pad_type="custom", pad=[1, 0, 2, 1]),
        lambda v: F.conv2d(F.pad(v.x, [2, 1, 1, 0]), W, None, (2, 1)),
    ),
    "conv_groups": (
        lambda v: mb.conv(x=v.x, weight=GROUPED, groups=2, dilations=[2, 2], pad_type="same"),
        lambda v: F.conv2d(v.x, G, None, 1, 2, 2, 2),
    ),
    "conv_transpose": (
        lambda v: mb.conv_transpose(x=v.x, weight=WEIGHT[:4], strides=[2, 2]),
        lambda v: F.conv_transpose2d(v.x, W[:4], None, 2),
    ),
    "avg_pool": (
        lambda v: mb.avg_pool(
            x=v.x, kernel_sizes=[3, 3], strides=[2, 2], pad_type="custom", pad=[1, 1, 1, 1], exclude_padding_from_average=True
        ),
        lambda v: F.avg_pool2d(v.x, 3, 2, 1, count_include_pad=False),
    ),
    "max_pool": (
        lambda v: mb.max_pool(x=v.x, kernel_sizes=[3, 3], strides=[2, 2], pad_type="custom", pad=[1, 1, 1, 1]),
        lambda v: F.max_pool2d(v.x, 3, 2, 1),
    ),
    "layer_norm": (
        lambda v: mb.layer_norm(x=v.x, axes=[-1], gamma=EIGHT, beta=EIGHT + 1, epsilon=0.001),
        lambda v: F.layer_norm(v.x, (8,), torch.from_numpy(EIGHT), torch.from_numpy(EIGHT + 1), 0.001),
    ),
    "batch_norm": (
        lambda v: mb.batch_norm(x=v.x, mean=VECTOR, variance=POSITIVE, gamma=POSITIVE, beta=VECTOR),
        lambda v: F.batch_norm(v.x, V, P, P, V),
    ),
    "instance_norm": (
        lambda v: mb.instance_norm(x=v.x, gamma=POSITIVE, beta=VECTOR),
        lambda v: F.instance_norm(v.x, weight=P, bias=V),
    ),
    "upsample_bilinear": (
        lambda v: mb.upsample_bilinear(x=v.x, scale_factor_height=2.0, scale_factor_width=2.0, align_corners=False),
        lambda v: F.interpolate(v.x, scale_factor=2, mode="bilinear"),
    ),
    "upsample_nearest_neighbor": (
        lambda v: mb.upsample_nearest_neighbor(x=v.x, scale_factor_height=2.0, scale_factor_width=2.0),
        lambda v: F.interpolate(v.x, scale_factor=2),
    ),
    "resize_bilinear": (
        lambda v: mb.resize_bilinear(x=v.x, target_size_height=5, target_size_width=12, sampling_mode="UNALIGN_CORNERS"),
        lambda v: F.interpolate(v.x, (5, 12), mode="bilinear"),
    ),
    "reshape": (lambda v: mb.reshape(x=v.x, shape=[2, -1, 16]), lambda v: v.x.reshape(2, -1, 16)),
    "expand_dims": (lambda v: mb.expand_dims(x=v.q, axes=[0]), lambda v: v.q[None]),
    "squeeze": (lambda v: mb.squeeze(x=mb.expand_dims(x=v.q, axes=[1]), axes=[1]), lambda v: v.q),
    "transpose": (lambda v: mb.transpose(x=v.x, perm=[0, 2, -1, 1]), lambda v: v.x.permute(0, 2, 3, 1)),
    "tile": (lambda v: mb.tile(x=v.q, reps=[1, 2, 1, 3]), lambda v: v.q.repeat(1, 2, 1, 3)),
    "reverse": (lambda v: mb.reverse(x=v.x, axes=[1]), lambda v: v.x.flip(1)),
    "concat": (lambda v: mb.concat(values=(v.x, v.y), axis=1), lambda v: torch.cat([v.x, v.y], 1)),
    "interleave": (
        lambda v: mb.concat(values=(v.x, v.y), axis=1, interleave=True),
        lambda v: torch.stack([v.x, v.y], 2).flatten(1, 2),
    ),
    "stack": (lambda v: mb.stack(values=(v.x, v.y), axis=1), lambda v: torch.stack([v.x, v.y], 1)),
    "split": (lambda v: mb.split(x=v.x, split_sizes=[3, 5], axis=2)[1], lambda v: v.x[:, :, 3:]),
    "slice_by_index": (
        lambda v: mb.slice_by_index(
            x=v.x,
            begin=[0, 1, 1, -6],
            end=[0, 2, -1, 0],
            stride=[1, 1, 2, 1],
            end_mask=[True, False, False, True],
            squeeze_mask=[False, True, False, False],
        ),
        lambda v: v.x[:, 1, 1:-1:2, -6:],
    ),
    "slice_reversed": (
        lambda v: mb.slice_by_index(x=v.x, begin=[0, 0, 7, 0], end=[2, 4, 0, 8], stride=[1, 1, -2, 1]),
        lambda v: v.x[:, :, [7, 5, 3, 1]],
    ),
    "slice_by_size": (lambda v: mb.slice_by_size(x=v.x, begin=[0, 1, 2, 3], size=[2, 2, -1, 4]), lambda v: v.x[:, 1:3, 2:, 3:7]),
    "slice_update": (
        lambda v: mb.slice_update(
            x=v.x, update=mb.slice_by_size(x=v.y, begin=[0, 0, 0, 0], size=[2, 4, 2, 8]), begin=[0, 0, 3, 0], end=[2, 4, 5, 8]
        ),
        lambda v: torch.cat([v.x[:, :, :3], v.y[:, :, :2], v.x[:, :, 5:]], 2),
    ),
    "gather": (
        lambda v: mb.gather(x=v.x, indices=np.array([[3, 0], [-1, 2]], np.int32), axis=2),
        lambda v: v.x[:, :, torch.tensor([[3, 0], [-1, 2]])],
    ),
    "gather_batch": (
        lambda v: mb.gather(x=v.x, indices=np.array([[3, 0], [1, 2]], np.int32), axis=1, batch_dims=1),
        lambda v: torch.stack([v.x[0, [3, 0]], v.x[1, [1, 2]]]),
    ),
    "gather_nd": (lambda v: mb.gather_nd(x=v.x, indices=np.array([[0, 1], [1, 3]], np.int32)), lambda v: v.x[[0, 1], [1, 3]]),
    "gather_along_axis": (lambda v: mb.gather_along_axis(x=v.x, indices=v.i, axis=3), lambda v: v.x.gather(3, v.i)),
    "scatter_nd": (
        lambda v: mb.scatter_nd(data=v.x, indices=np.array([[0], [1]], np.int32), updates=v.y, mode="update"),
        lambda v: v.y,
    ),
    "scatter_along_axis": (
        lambda v: mb.scatter_along_axis(data=v.x, indices=v.i, updates=v.y, axis=2, mode="add"),
        lambda v: v.x.scatter_add(2, v.i, v.y),
    ),
    "shape": (lambda v: mb.shape(x=v.x), lambda v: torch.tensor([2, 4, 8, 8])),
    "fill": (lambda v: mb.mul(x=mb.fill(shape=mb.shape(x=v.x), value=2.5), y=v.x), lambda v: v.x * 2.5),
    "range_1d": (
        lambda v: mb.range_1d(start=0, end=mb.reduce_max(x=v.i, keep_dims=False), step=2),
        lambda v: torch.arange(0, int(v.i.max()), 2),
    ),
    "cumsum": (
        lambda v: mb.cumsum(x=v.x, axis=2, exclusive=True, reverse=True),
        lambda v: (v.x.flip(2).cumsum(2) - v.x.flip(2)).flip(2),
    ),
    "pad": (
        lambda v: mb.pad(x=v.x, pad=[1, 0, 2, 3], mode="constant", constant_val=0.5),
        lambda v: F.pad(v.x, [2, 3, 1, 0], value=0.5),
    ),
    "pad_reflect": (
        lambda v: mb.pad(x=v.x, pad=[1, 2, 2, 1], mode="reflect"),
        lambda v: F.pad(v.x, [2, 1, 1, 2], mode="reflect"),
    ),
    "topk": (lambda v: mb.topk(x=v.x, k=3, axis=-1)[0], lambda v: v.x.topk(3).values),
    "band_part": (lambda v: mb.band_part(x=v.x, lower=1, upper=2), lambda v: v.x.tril(2).triu(-1)),
    "one_hot": (lambda v: mb.one_hot(indices=v.i, one_hot_vector_size=8), lambda v: F.one_hot(v.i, 8)),
    "argsort": (lambda v: mb.argsort(x=v.x, axis=-1, ascending=True), lambda v: v.x.argsort(-1)),
    "pixel_shuffle": (lambda v: mb.pixel_shuffle(x=v.x, upscale_factor=2), lambda v: F.pixel_shuffle(v.x, 2)),
    "pixel_unshuffle": (lambda v: mb.pixel_unshuffle(x=v.x, downscale_factor=np.uint32(2)), lambda v: F.pixel_unshuffle(v.x, 2)),
    "quantize": (
        lambda v: mb.dequantize(
            input=mb.quantize(input=v.x, scale=np.float32(0.02), zero_point=np.int8(7), output_dtype="int8"),
            scale=np.float32(0.02),
            zero_point=np.int8(7),
        ),
        lambda v: ((v.x / 0.02).round() + 7).clamp(-128, 127).sub(7) * 0.02,
    ),
    "quantize_channel": (
        lambda v: mb.dequantize(
            input=mb.quantize(input=v.x, scale=POSITIVE / 99, output_dtype="uint8", axis=1), scale=POSITIVE / 99, axis=1
        ),
        lambda v: (v.x / (P / 99)[:, None, None]).round().clamp(0, 255) * (P / 99)[:, None, None],
    ),
}


@pytest.fixture(scope="module")
def inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    drawn = {name: torch.randn(shape, generator=generator) for name, (shape, kind) in INPUTS.items() if kind == "float32"}
    return {**drawn, "i": torch.randint(0, 8, INPUTS["i"][0], generator=generator)}


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    def body(x: Any, y: Any, i: Any, q: Any, k: Any) -> Any:
        return tuple(
            mb.identity(x=case[0](SimpleNamespace(x=x, y=y, i=i, q=q, k=k)), name=f"out_{name}") for name, case in CASES.items()
        )

    program = Program(saved(tmp_path_factory.mktemp("ops") / "ops.mlpackage", INPUTS, body))
    return program(inputs)


@pytest.mark.parametrize("name", CASES)
def test_an_operation_equals_torch(name: str, outputs: dict[str, Tensor], inputs: dict[str, Tensor]) -> None:
    """Oracle: torch. 100 dB is float32's rounding through a few operations; a wrong axis or mode gives under 20 dB."""
    expected = CASES[name][1](SimpleNamespace(**inputs))
    actual = outputs[f"out_{name}"]
    assert actual.shape == expected.shape
    assert sqnr(expected.float(), actual.float()) >= 100


def test_the_table_covers_the_operations_that_were_met() -> None:
    kinds = {"constexpr_blockwise_shift_scale", "constexpr_lut_to_dense", "constexpr_sparse_to_dense", "quantize", "linear"}
    assert kinds <= set(KERNELS)
    assert len(KERNELS) >= 80


def test_an_unknown_operation_is_named(tmp_path: Path) -> None:
    path = saved(tmp_path / "unknown.mlpackage", {"x": ((2, 3), "float32")}, lambda x: mb.erf(x=mb.asin(x=x)))
    kernel = KERNELS.pop("asin")
    try:
        with pytest.raises(UnknownOp, match="asin"):
            Program(path)
    finally:
        KERNELS["asin"] = kernel


def test_inputs_are_checked(tmp_path: Path) -> None:
    program = Program(saved(tmp_path / "p.mlpackage", {"x": ((2, 3), "float32")}, lambda x: mb.relu(x=x)))
    with pytest.raises(UserError, match="input 'x' is missing"):
        program({})
    with pytest.raises(UserError, match=r"is \[4, 3\], the program takes \[2, 3\]"):
        program({"x": torch.zeros(4, 3)})


def test_a_kernel_of_the_wrong_shape_is_caught(tmp_path: Path) -> None:
    """Control: every result is held against the type that the program states."""
    path = saved(tmp_path / "p.mlpackage", {"x": ((2, 3), "float32")}, lambda x: mb.relu(x=x))
    kernel = KERNELS["relu"]
    KERNELS["relu"] = lambda args: args["x"].mT
    try:
        with pytest.raises(AssertionError, match="relu"):
            Program(path)({"x": torch.zeros(2, 3)})
    finally:
        KERNELS["relu"] = kernel


def test_float16_results_are_rounded(tmp_path: Path) -> None:
    """Law: each value of a float16 program is a float16 number, and equals float32 arithmetic rounded once an operation."""
    path = saved(tmp_path / "half.mlpackage", {"x": ((4, 5), "float16")}, lambda x: mb.mul(x=mb.exp(x=x), y=np.float16(1 / 3)))
    x = torch.randn(4, 5)
    result = next(iter(Program(path)({"x": x}).values()))
    expected = (x.half().float().exp().half().float() * float(np.float16(1 / 3))).half().float()
    assert torch.equal(result, expected)
