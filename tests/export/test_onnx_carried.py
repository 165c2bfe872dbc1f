"""Quantized models in ONNX: the codes in the file, the kernels that run, and the numbers, against the eager torch model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sweeps import swept
from torch import Tensor, nn

from calibrate.grid import Grid
from calibrate.signature import Batch, Signature, TensorSpec
from compress.algorithms.rounding import multiples
from compress.layers.quantized import QuantConv2d, QuantEmbedding, QuantLinear, is_quantized
from export.graph import Traceable

pytest.importorskip("onnxruntime")

import onnx_ir as ir

from export.onnx_file import contents, read, write
from export.onnx_runner import OnnxRunner, executed_ops
from export.saturation import saturates
from export.to_onnx import OnnxExporter, lower, open_openvino


class Text(nn.Module):
    """A post-norm encoder layer in the manner of BERT: embeddings, attention with a padding mask, MLP, a tied head."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(40, 32), nn.Embedding(16, 32)
        self.query, self.key, self.value, self.out = (nn.Linear(32, 32) for _ in range(4))
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)
        self.norm, self.last = nn.LayerNorm(32), nn.LayerNorm(32)
        self.register_buffer("positions", torch.arange(16)[None])

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        batch, tokens = ids.shape
        x = self.norm(self.words(ids) + self.places(self.positions[:, :tokens]))
        q, k, v = (layer(x).view(batch, tokens, 4, 8).transpose(1, 2) for layer in (self.query, self.key, self.value))
        seen = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None, :].bool())
        x = self.norm(x + self.out(seen.transpose(1, 2).reshape(batch, tokens, 32)))
        return self.last(x + self.down(nn.functional.gelu(self.up(x))))


class Pixels(nn.Module):
    """Patches by a convolution, an overlapping and a depthwise convolution, a norm, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(4, 16, 2, 2)
        self.conv, self.depth = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 8)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.patches(pixels)
        x = x + torch.relu(self.conv(x)) + self.depth(x)
        return self.head(self.norm(x.flatten(2).transpose(1, 2)).mean(1))


TEXT = Signature((TensorSpec("ids", torch.int64, ("batch", "tokens")), TensorSpec("mask", torch.int64, ("batch", "tokens"))))
PIXELS = Signature((TensorSpec("pixels", torch.float32, ("batch", 4, 8, 8)),))


def made(kind: str, seed: int = 0) -> tuple[nn.Module, Signature, Batch]:
    torch.manual_seed(seed)
    model, signature = (Text(), TEXT) if kind == "text" else (Pixels(), PIXELS)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(
                parameter, std=1.0 if parameter.shape[0] in (40, 16) and kind == "text" else parameter[0].numel() ** -0.5
            )
    if kind == "pixels":
        return model.eval(), signature, {"pixels": torch.randn(3, 4, 8, 8)}
    lengths = torch.tensor([3, 12, 7])
    mask = (torch.arange(12) < lengths[:, None]).long()
    return model.eval(), signature, {"ids": torch.randint(1, 40, (3, 12)) * mask, "mask": mask}


def quantized(
    kind: str,
    activations: str | None = "static",
    bits: int = 8,
    group: int | None = None,
    symmetric: bool = True,
    tensor: bool = False,
    stepped: bool = False,
    reduced: bool | None = None,
) -> tuple[nn.Module, Signature, Batch]:
    """The model with every linear layer, convolution and table as codes, ranges from its own example. Codes have 7 bits where
    this processor's integer kernels need that to be exact, unless ``reduced`` says otherwise."""
    model, signature, batch = made(kind)
    reduced = saturates("onnxruntime") if reduced is None else reduced
    grid = Grid(bits, symmetric, "group" if group else "tensor" if tensor else "channel", group, reduced)
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    layers = {path: layer for path, layer in model.named_modules() if isinstance(layer, (nn.Linear, nn.Conv2d, nn.Embedding))}
    hooks = [
        layer.register_forward_pre_hook(lambda _, x, path=path: seen.__setitem__(path, x[0].float().aminmax()))
        for path, layer in layers.items()
    ]
    with torch.no_grad():
        signature.call(model, batch)
    for hook in hooks:
        hook.remove()
    for path, layer in layers.items():
        weight = layer.weight.detach()
        layer_grid = grid if not group or weight[0].numel() % group == 0 else Grid(bits, symmetric, "channel", None, reduced)
        blocks = layer_grid.blocks(weight)
        scale, shift = layer_grid.parameters(blocks.amin(-1), blocks.amax(-1))
        if stepped and layer_grid.group_size:
            scale = multiples(scale, layer_grid)
        rounding = {"kind": activations, "bits": 8, "symmetric": symmetric} if activations else None
        shape = tuple(weight.shape)
        new: Any
        if isinstance(layer, nn.Embedding):
            new = QuantEmbedding(shape, layer_grid)
        elif isinstance(layer, nn.Conv2d):
            new = QuantConv2d(shape, layer_grid, rounding, True, layer.stride, layer.padding, layer.dilation, layer.groups)
        else:
            new = QuantLinear(shape, layer_grid, rounding, True)
        new.quantized_weight.store(layer_grid.quantize(weight, scale, shift), scale, shift)
        if new.bias is not None:
            new.bias.data = layer.bias.detach()
        if new.activation is not None and activations == "static":
            scale, shift = Grid(8, symmetric, "tensor").parameters(*seen[path])
            new.activation.scale = scale.reshape(())
            if shift is not None:
                new.activation.zero_point = shift.reshape(())
        setattr(model, path, new)
    return model.eval(), signature, batch


def sqnr(reference: Tensor, other: Tensor) -> float:
    assert reference.shape == other.shape
    noise = ((reference.double() - other.double()) ** 2).sum()
    return float(10 * torch.log10((reference.double() ** 2).sum() / noise.clamp(min=1e-200)))


def codes_of(model: nn.Module) -> dict[str, np.ndarray[Any, Any]]:
    return {path: m.quantized_weight.integers().numpy() for path, m in model.named_modules() if is_quantized(m)}


WAYS: dict[str, dict[str, Any]] = {
    "static": {},
    "static asymmetric": {"symmetric": False},
    "static per tensor": {"tensor": True},
    "static 4": {"bits": 4},
    "static 3": {"bits": 3},
    "static 2": {"bits": 2},
    "static 4 stepped groups": {"bits": 4, "group": 16, "stepped": True},
    "static 4 stepped groups with zero points": {"bits": 4, "group": 16, "stepped": True, "symmetric": False},
    "static 3 stepped groups": {"bits": 3, "group": 8, "stepped": True},
    "static 2 stepped groups": {"bits": 2, "group": 8, "stepped": True},
    "dynamic": {"activations": "dynamic"},
    "dynamic asymmetric": {"activations": "dynamic", "symmetric": False},
    "dynamic 4": {"activations": "dynamic", "bits": 4},
    "dynamic 3 asymmetric": {"activations": "dynamic", "bits": 3, "symmetric": False},
}
OFTEN = [
    "static asymmetric", "static per tensor", "static 2", "static 4 stepped groups with zero points", "dynamic asymmetric",
    "dynamic 4",
]  # fmt: skip
WEIGHT_ONLY: dict[str, dict[str, Any]] = {
    "8": {"bits": 8},
    "8 groups": {"bits": 8, "group": 16},
    "4": {"bits": 4},
    "4 groups": {"bits": 4, "group": 16},
    "4 asymmetric": {"bits": 4, "group": 16, "symmetric": False},
    "3": {"bits": 3},
    "3 groups": {"bits": 3, "group": 16},
    "3 asymmetric": {"bits": 3, "group": 16, "symmetric": False},
    "2 groups": {"bits": 2, "group": 16},
    "2 asymmetric": {"bits": 2, "symmetric": False},
}


@pytest.mark.parametrize(
    ("kind", "way", "dialect"),
    swept(
        [(kind, way, dialect) for kind in ("text", "pixels") for way in WAYS for dialect in ("onnxruntime", "portable")],
        [
            *(("text", way, "onnxruntime") for way in OFTEN),
            *(("pixels", way, "onnxruntime") for way in ("static", "dynamic 4")),
            *(("text", way, "portable") for way in ("static 4 stepped groups with zero points", "dynamic")),
        ],
    ),
)
def test_integer_kernels_equal_eager(kind: str, way: str, dialect: str, tmp_path: Path) -> None:
    """Integer products are exact in both, so only float rounding is left, and what it does to a value on the edge between
    two codes: one such flip is one step of a grid, hence 50 dB and not 100."""
    model, signature, batch = quantized(kind, **WAYS[way])
    exporter = OnnxExporter(dialect=dialect, dynamic=("batch", "tokens") if kind == "text" else ("batch",))
    artifact = exporter.write(Traceable(model, signature, batch), tmp_path / "model.onnx")
    with torch.no_grad():
        reference = signature.call(model, batch)
    assert sqnr(reference, exporter.open(artifact.path, 1)(batch)) >= 50
    found, wanted = exporter.contents(artifact.path), codes_of(model)
    assert found.codes.keys() == wanted.keys()
    assert all((found.codes[path] == wanted[path]).all() for path in wanted)
    assert found.float_layers == ()
    if kind == "text":
        ran = executed_ops(artifact.path)
        assert ran.get("com.microsoft::MatMulIntegerToFloat", 0) + ran.get("com.microsoft::DynamicQuantizeMatMul", 0) == 6
        assert not any(name in ran for name in ("DequantizeLinear", "Gemm", "com.microsoft::SkipLayerNormalization", "IsNaN"))
        assert exporter.kept_float(artifact.path) == []


@pytest.mark.parametrize("dialect", ["onnxruntime", "portable"])
@pytest.mark.parametrize("way", WEIGHT_ONLY)
def test_weights_alone(way: str, dialect: str, tmp_path: Path) -> None:
    """ONNX Runtime's MatMulNBits rounds activations to 8 bits per block (about 35 dB and more for one layer after another);
    with its optimizer off, standard operators compute what the graph says."""
    model, signature, batch = quantized("text", activations=None, **WEIGHT_ONLY[way])
    artifact = OnnxExporter(dialect=dialect).write(Traceable(model, signature, batch), tmp_path / "model.onnx")
    with torch.no_grad():
        reference = signature.call(model, batch)
    assert sqnr(reference, OnnxRunner(artifact.path, 1)(batch)) >= 25
    if dialect == "portable":
        assert sqnr(reference, plain(artifact.path, batch)) >= 100
        assert all(node.domain == "" for node in read(artifact.path).graph)
    found, wanted = contents(artifact.path).codes, codes_of(model)
    assert found.keys() == wanted.keys()
    assert all((found[path] == wanted[path]).all() for path in wanted)
    assert artifact.details["notes"]


@pytest.mark.parametrize("dialect", ["onnxruntime", "portable"])
@pytest.mark.parametrize("way", WEIGHT_ONLY)
def test_weights_that_are_unpacked_when_the_file_is_opened(way: str, dialect: str, tmp_path: Path) -> None:
    """The same codes on disk; float products, as exact as the compressed torch model; no larger by more than what packed files
    do not need."""
    model, signature, batch = quantized("text", activations=None, **WEIGHT_ONLY[way])
    with torch.no_grad():
        reference = signature.call(model, batch)
    levels, sizes = [], []
    for weights_only in ("packed", "unpacked"):
        exporter = OnnxExporter(dialect=dialect, weights_only=weights_only)
        artifact = exporter.write(Traceable(model, signature, batch), tmp_path / weights_only / "model.onnx")
        assert exporter.forecast(Traceable(model, signature, batch)).size_bytes == pytest.approx(artifact.size_bytes, rel=0.02)
        levels.append(sqnr(reference, OnnxRunner(artifact.path, 1)(batch)))
        sizes.append(artifact.size_bytes)
        found, wanted = contents(artifact.path).codes, codes_of(model)
        assert found.keys() == wanted.keys()
        assert all((found[path] == wanted[path]).all() for path in wanted)
    ran = executed_ops(artifact.path)
    assert not any("NBits" in name or "Dequantize" in name for name in ran)
    assert levels[1] > 80
    assert levels[0] < 80 or way.startswith("2"), "packed products of 4 and 8 bits round their inputs"
    assert sizes[1] < 1.1 * sizes[0] + 1024 * len(wanted), "a few nodes for each weight"


def plain(path: Path, batch: Batch) -> Tensor:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {name: batch[name].numpy() for name in (i.name for i in session.get_inputs())})[0])


@pytest.mark.parametrize(
    "way", [{}, {"bits": 4}, {"bits": 4, "group": 16, "activations": None}, {"bits": 2, "activations": None}]
)
@pytest.mark.parametrize("float16", [False, True])
def test_tensorrt_dialect(way: dict[str, Any], float16: bool, tmp_path: Path) -> None:
    """The graph that TensorRT gets, computed as written by ONNX Runtime; float16 leaves about 2**-11 (66 dB) for each value,
    and moves some over the edge between two codes."""
    model, signature, batch = quantized("text", **way)
    lowered = lower(Traceable(model, signature, batch), "tensorrt", ("batch",), float16=float16)
    write(lowered, tmp_path / "model.onnx")
    ops = {node.op_type for node in lowered.graph}
    assert ops.isdisjoint({"MatMulNBits", "DynamicQuantizeLinear", "MatMulInteger", "Sum"})
    shifts = [node.inputs[2].const_value.numpy() for node in lowered.graph if node.op_type == "QuantizeLinear"]
    assert all(shift.dtype == np.int8 and shift == 0 for shift in shifts)
    with torch.no_grad():
        reference = signature.call(model, batch)
    assert sqnr(reference, plain(tmp_path / "model.onnx", batch)) >= (25 if float16 else 50)
    found, wanted = contents(tmp_path / "model.onnx").codes, codes_of(model)
    assert all((found[path] == wanted[path]).all() for path in wanted)


def test_activations_are_unsigned_and_shared(tmp_path: Path) -> None:
    model, signature, batch = quantized("text")
    model.key.activation, model.value.activation = model.query.activation, model.query.activation  # type: ignore[union-attr]
    source = Traceable(model, signature, batch)
    for dialect in ("onnxruntime", "portable"):
        lowered = lower(source, dialect)  # type: ignore[arg-type]
        quantizers = [node for node in lowered.graph if node.op_type == "QuantizeLinear"]
        assert len(quantizers) == 4
        assert all(node.inputs[2].const_value.numpy() == 128 for node in quantizers)
        assert all(node.inputs[2].const_value.dtype == ir.DataType.UINT8 for node in quantizers)
    held = [item for node in lowered.graph if node.op_type == "Add" for item in node.inputs if item.is_initializer()]
    assert len(held) == 6
    assert all(len(bias.shape) == 3 for bias in held), "a bias of one dimension makes ONNX Runtime build a float Gemm"


def test_both_dialects_give_the_same_numbers(tmp_path: Path) -> None:
    """The fused kernel, with the bias inside, is what ONNX Runtime makes of the Q/DQ of the portable file."""
    model, signature, batch = quantized("text")
    source, outputs = Traceable(model, signature, batch), []
    for dialect in ("onnxruntime", "portable"):
        lowered = lower(source, dialect)  # type: ignore[arg-type]
        fused = [node for node in lowered.graph if node.op_type == "MatMulIntegerToFloat"]
        assert len(fused) == (6 if dialect == "onnxruntime" else 0)
        assert all(len(node.inputs) == 7 and len(node.inputs[6].shape) == 1 for node in fused)
        write(lowered, tmp_path / f"{dialect}.onnx")
        outputs.append(OnnxRunner(tmp_path / f"{dialect}.onnx", 1)(batch))
    assert sqnr(outputs[0], outputs[1]) > 120


def test_scales_that_are_float16_numbers_are_stored_as_such(tmp_path: Path) -> None:
    model, signature, batch = quantized("text")
    held = []
    for exact in (False, True):
        for path, layer in model.named_modules():
            if is_quantized(layer) and (exact or path != "up"):
                codes: Any = layer.quantized_weight
                codes.scale = codes.scale.half().float()
        write(lower(Traceable(model, signature, batch)), tmp_path / "model.onnx")
        graph = read(tmp_path / "model.onnx").graph
        held.append({name: value.dtype for name, value in graph.initializers.items() if name.endswith(".scale")})
    assert held[1]["words.scale"] == held[1]["places.scale"] == held[1]["up.scale"] == ir.DataType.FLOAT16
    assert held[0]["up.scale"] == ir.DataType.FLOAT, "its scales were no float16 numbers"
    assert held[1]["query.scale"] == ir.DataType.FLOAT, "too few to be worth a node"
    with torch.no_grad():
        assert sqnr(signature.call(model, batch), OnnxRunner(tmp_path / "model.onnx", 1)(batch)) >= 50


def test_a_flipped_code_is_seen(tmp_path: Path) -> None:
    """Control: one code changed in the file is found by reading it back, and a wrong zero point by running it."""
    model, signature, batch = quantized("text")
    source = Traceable(model, signature, batch)
    lowered = lower(source)
    held = lowered.graph.initializers["query.codes"]
    array = np.array(held.const_value.numpy())
    array[3, 5] += 1
    held.const_value = ir.Tensor(array, name="query.codes")
    write(lowered, tmp_path / "flipped.onnx")
    found, wanted = contents(tmp_path / "flipped.onnx").codes["query"], codes_of(model)["query"]
    assert np.argwhere(found != wanted).tolist() == [[5, 3]]

    lowered = lower(source, "portable")
    quantizer = next(node for node in lowered.graph if node.op_type == "QuantizeLinear")
    zero = next(name for name, value in lowered.graph.initializers.items() if value is quantizer.inputs[2])
    lowered.graph.initializers[zero].const_value = ir.Tensor(np.array(121, np.uint8), name=zero)
    for node in list(lowered.graph):
        if node.op_type == "DequantizeLinear" and len(node.inputs) == 3:
            node.replace_input_with(2, ir.Value(name="right"))
    right = next(node.inputs[2] for node in lowered.graph if node.op_type == "DequantizeLinear" and len(node.inputs) == 3)
    for node in lowered.graph:
        if node.op_type == "DequantizeLinear" and len(node.inputs) == 3:
            node.replace_input_with(2, right)
    right.const_value = ir.Tensor(np.array(128, np.uint8), name="right")
    right.shape, right.type = ir.Shape(()), ir.TensorType(ir.DataType.UINT8)
    lowered.graph.register_initializer(right)
    write(lowered, tmp_path / "shifted.onnx")
    with torch.no_grad():
        reference = signature.call(model, batch)
    assert sqnr(reference, OnnxRunner(tmp_path / "shifted.onnx", 1)(batch)) < 30


@pytest.mark.parametrize("bits", [8, 3])
def test_tied_codes_are_stored_once(bits: int, tmp_path: Path) -> None:
    grid = Grid(bits)  # type: ignore[arg-type]

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = QuantEmbedding((40, 32), grid), QuantLinear((40, 32), grid, None, False)
            codes = torch.randint(-grid.high, grid.high + 1, (40, 32), dtype=torch.int8)
            self.table.quantized_weight.store(codes, torch.rand(40, 1) / 100, None)
            self.head.quantized_weight = self.table.quantized_weight

        def forward(self, ids: Tensor) -> Tensor:
            out: Tensor = self.head(torch.tanh(self.table(ids)))
            return out

    model, batch = Tied().eval(), {"ids": torch.randint(0, 40, (2, 5))}
    signature = Signature((TensorSpec("ids", torch.int64, ("batch", "tokens")),))
    artifact = OnnxExporter().write(Traceable(model, signature, batch), tmp_path / "model.onnx")
    found = contents(artifact.path)
    assert found.bytes_by_dtype["int8" if bits == 8 else "uint8"] == 40 * 32 * bits // 8
    assert found.codes.keys() == {"table", "head"}
    assert (found.codes["head"] == codes_of(model)["table"]).all()
    assert sqnr(model(batch["ids"]), OnnxRunner(artifact.path, 1)(batch)) >= 25


@pytest.mark.parametrize(
    "way", [{}, {"bits": 4}, {"bits": 3}, {"activations": None, "bits": 3}, {"activations": None, "bits": 2}]
)
def test_openvino_runs_the_same_file(way: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    model, signature, batch = quantized("text", **way)
    artifact = OnnxExporter(dynamic=("batch", "tokens")).write(Traceable(model, signature, batch), tmp_path / "model.onnx")
    runner = open_openvino(artifact.path, 1)
    assert "f32" in runner.runtime
    with torch.no_grad():
        for rows in (1, 3):
            part = {name: tensor[:rows] for name, tensor in batch.items()}
            assert sqnr(signature.call(model, part), runner(part)) >= 40
