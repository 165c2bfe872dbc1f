"""The exporter end to end on a small padded text encoder: integers survive, the proxy agrees, refusals come before."""

from __future__ import annotations

import importlib
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn import functional as F

from calibrate.errors import MissingRuntime, UserError
from calibrate.grid import Grid
from calibrate.signature import Signature, TensorSpec
from compress.layers.quantized import QuantConv2d, QuantEmbedding, QuantLinear
from export import tensorrt_contents, to_tensorrt
from export.graph import Traceable
from export.to_tensorrt import TensorRTExporter

WIDTH, TOKENS, VOCABULARY, HEADS = 32, 12, 50, 4


class Encoder(nn.Module):
    """One attention block with a padding mask, an MLP, and a head over the first token."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding: nn.Module = nn.Embedding(VOCABULARY, WIDTH)
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.down, self.head = nn.Linear(WIDTH, 64), nn.Linear(64, WIDTH), nn.Linear(WIDTH, 6)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        y = self.norm1(x)
        split = [layer(y).unflatten(-1, (HEADS, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value)]
        mask = attention_mask[:, None, None, :].bool()
        x = x + self.out(F.scaled_dot_product_attention(*split, attn_mask=mask).transpose(1, 2).flatten(2))
        x = x + self.down(F.gelu(self.up(self.norm2(x))))
        head: Tensor = self.head(x[:, 0])
        return head


def _example() -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(1)
    lengths = torch.tensor([12, 5, 9, 3, 7, 12, 4, 6])
    return {
        "input_ids": torch.randint(0, VOCABULARY, (8, TOKENS), generator=random),
        "attention_mask": (torch.arange(TOKENS) < lengths[:, None]).long(),
    }


def _signature() -> Signature:
    shape = ("batch", "tokens")
    return Signature((TensorSpec("input_ids", torch.int64, shape), TensorSpec("attention_mask", torch.int64, shape)))


def _float() -> Encoder:
    torch.manual_seed(0)
    model = Encoder().eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    nn.init.normal_(model.embedding.weight)  # type: ignore[arg-type]
    return model


def _quantized(grid: Grid, activation: str | None, table: bool = True) -> Encoder:
    """The float model with every linear (and the table) as codes; activation scales from the example's own ranges."""
    model = _float()
    ranges: dict[str, float] = {}
    hooks = [
        module.register_forward_pre_hook(lambda _, args, name=name: ranges.update({name: float(args[0].abs().max())}))
        for name, module in model.named_children()
        if isinstance(module, nn.Linear)
    ]
    with torch.no_grad():
        model(**_example())
    for hook in hooks:
        hook.remove()
    for name, module in list(model.named_children()):
        if isinstance(module, nn.Linear):
            told = {"kind": activation, "symmetric": True} if activation else None
            layer = QuantLinear(tuple(module.weight.shape), grid, told, bias=True)
            _store(layer, module.weight.detach(), grid)
            layer.bias.copy_(module.bias.detach())  # type: ignore[union-attr]
            if activation == "static":
                layer.activation.scale = torch.tensor(ranges[name] / 127)  # type: ignore[union-attr]
            setattr(model, name, layer)
        elif isinstance(module, nn.Embedding) and table:
            rows = Grid(grid.bits, granularity="channel")
            embedding = QuantEmbedding(tuple(module.weight.shape), rows)
            _store(embedding, module.weight.detach(), rows)
            model.embedding = embedding
    return model.eval()


def _store(layer: Any, weight: Tensor, grid: Grid) -> None:
    blocks = grid.blocks(weight)
    scale, zero_point = grid.parameters(blocks.amin(-1), blocks.amax(-1))
    layer.quantized_weight.store(grid.quantize(weight, scale, zero_point), scale, zero_point)


def _codes(model: nn.Module) -> dict[str, np.ndarray[Any, Any]]:
    return {
        name: module.quantized_weight.integers().numpy()  # type: ignore[union-attr,operator]
        for name, module in model.named_modules()
        if hasattr(module, "quantized_weight")
    }


def _sqnr(reference: Tensor, other: Tensor) -> float:
    error = (reference.double() - other.double()).square().sum().clamp(min=1e-300)
    return float(10 * torch.log10(reference.double().square().sum() / error))


INT8, INT4, INT3, INT2 = Grid(8), Grid(4, granularity="group", group_size=16), Grid(3), Grid(2)
CASES = {
    "w8a8": (INT8, "static", {}, "int8"),
    "w8a8 float32": (INT8, "static", {"precision": "float32"}, "int8"),
    "w8": (INT8, None, {}, "int8"),
    "w4 groups": (INT4, None, {}, "int4"),
    "w4a8": (Grid(4), "static", {}, "int4"),
    "w3": (INT3, None, {}, "int4"),
    "w2": (INT2, None, {}, "int4"),
    "tokens": (INT8, "static", {"dynamic": ["batch", "tokens"], "profile": {"tokens": [2, 8, 12]}}, "int8"),
    "fixed": (INT8, "static", {"dynamic": [], "batch": 2}, "int8"),
}


@pytest.fixture
def built() -> None:
    pytest.importorskip("tensorrt_rtx", reason="needs the extra tensorrt-rtx")
    pytest.importorskip("onnxruntime", reason="needs the extra onnx")


@pytest.fixture(scope="module")
def once(tmp_path_factory: pytest.TempPathFactory) -> tuple[Encoder, Path]:
    """The INT8 model and its engine, built once; tests that change the files take a copy."""
    pytest.importorskip("tensorrt_rtx", reason="needs the extra tensorrt-rtx")
    pytest.importorskip("onnxruntime", reason="needs the extra onnx")
    model, path = _quantized(INT8, "static"), tmp_path_factory.mktemp("engine") / "model.engine"
    TensorRTExporter().write(Traceable(model, _signature(), _example()), path)
    return model, path


def _copy(path: Path, folder: Path) -> Path:
    for file in path.parent.iterdir():
        shutil.copy(file, folder / file.name)
    return folder / path.name


@pytest.mark.usefixtures("built")
@pytest.mark.parametrize("case", CASES)
def test_the_same_codes_are_in_the_engine_and_the_proxy_agrees(case: str, tmp_path: Path) -> None:
    grid, activation, options, kind = CASES[case]
    model = _quantized(grid, activation)
    exporter = TensorRTExporter(**options)
    assert exporter.refuses(model) == []
    path = tmp_path / exporter.filename
    artifact = exporter.write(Traceable(model, _signature(), _example()), path)
    assert sorted(file.name for file in path.parent.iterdir()) == ["model.engine", "model.qdq.onnx"]
    assert artifact.size_bytes == path.stat().st_size

    contents, codes = exporter.contents(path), _codes(model)
    assert set(contents.codes) == set(codes)
    for name, array in codes.items():
        assert np.array_equal(contents.codes[name], array), name
    integers = sum(array.size for array in codes.values())
    assert contents.bytes_by_dtype[kind] >= integers * (1 if kind == "int8" else 0.5)
    assert contents.float_layers == ()
    found = artifact.details["codes_in_engine"]
    assert (found["layers"], found["found"], found["not_found"]) == (len(codes), len(codes), [])
    assert artifact.details["kernels"] >= 8
    assert artifact.details["fully_connected"] >= 5
    assert ("note" in artifact.details) == (case in ("w3", "w2"))

    runner = exporter.open(path, threads=1)
    assert (runner.how, runner.measurable, runner.rows) == ("proxy", False, 2 if case == "fixed" else None)
    assert "proxy for TensorRT-RTX" in runner.runtime
    rows = {name: value[:2] for name, value in _example().items()} if case == "fixed" else _example()
    if case == "tokens":
        rows = {name: value[1:3, :9] for name, value in rows.items()}
    with torch.no_grad():
        expected = model(**rows)
    # float16 rounds each of some 40 node results to 2**-11 (66 dB): about 50 dB together. A code that falls on the
    # other side of a rounding edge of an 8-bit activation costs a step of 1/127 in one of many sums.
    floor = 30.0 if activation else 45.0
    assert _sqnr(expected, runner(rows)) > (90.0 if options.get("precision") == "float32" and not activation else floor)


def test_control_a_code_flipped_in_the_qdq_file_is_noticed(once: tuple[Encoder, Path], tmp_path: Path) -> None:
    import onnx

    (model, built), exporter = once, TensorRTExporter()
    path = _copy(built, tmp_path)
    given = tensorrt_contents.qdq_path(path)
    file = onnx.load(str(given))
    kept = [item for item in file.graph.initializer if item.data_type == onnx.TensorProto.INT8]
    table = next(item for item in kept if len(item.dims) > 1)
    raw = bytearray(table.raw_data)
    raw[7] ^= 1
    table.raw_data = bytes(raw)
    onnx.save(file, str(given))
    contents, codes = exporter.contents(path), _codes(model)
    differing = [name for name, array in codes.items() if not np.array_equal(contents.codes.get(name, 0), array)]
    assert len(differing) == 1
    assert tensorrt_contents.engine_report(path)["codes_in_engine"]["not_found"] == differing


def test_control_an_engine_without_the_integers_does_not_count(once: tuple[Encoder, Path], tmp_path: Path) -> None:
    (model, built), exporter = once, TensorRTExporter()
    path = _copy(built, tmp_path)
    exporter.write(Traceable(_float(), _signature(), _example()), tmp_path / "float.engine")
    (tmp_path / "float.engine").replace(path)
    contents = exporter.contents(path)
    assert contents.codes == {}
    assert set(_codes(model)) <= set(contents.float_layers)


class Patches(nn.Module):
    """A patch embedding and a depthwise convolution as codes, and a head over the mean."""

    def __init__(self, grid: Grid, activation: dict[str, Any] | None) -> None:
        super().__init__()
        self.patch = QuantConv2d((16, 3, 4, 4), grid, activation, bias=True, stride=(4, 4))
        self.depthwise = QuantConv2d((16, 1, 3, 3), grid, activation, bias=False, padding=(1, 1), groups=16)
        self.head = QuantLinear((10, 16), grid, activation, bias=True)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.patch(pixels)
        head: Tensor = self.head((x + self.depthwise(x)).flatten(2).mean(2))
        return head


class Tied(nn.Module):
    """A table that is read by rows and is the head's weight too; its scales are too small for float16."""

    def __init__(self, grid: Grid, activation: dict[str, Any] | None) -> None:
        super().__init__()
        self.table = QuantEmbedding((VOCABULARY, WIDTH), grid)
        self.norm = nn.LayerNorm(WIDTH)
        self.head = QuantLinear((VOCABULARY, WIDTH), grid, activation, bias=False)
        self.head.quantized_weight = self.table.quantized_weight

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        logits: Tensor = self.head(self.norm(self.table(input_ids) * 1000.0 + attention_mask.unsqueeze(-1)))
        return logits


@pytest.mark.usefixtures("built")
@pytest.mark.parametrize(("bits", "static"), [(8, True), (4, False)])
@pytest.mark.parametrize("kind", [Patches, Tied])
def test_convolutions_and_tied_tables_keep_their_codes(kind: type[nn.Module], bits: int, static: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = kind(Grid(bits), {"kind": "static", "symmetric": True} if static else None).eval()
    signature, example = _signature(), _example()
    if kind is Patches:
        signature = Signature((TensorSpec("pixels", torch.float32, ("batch", 3, 16, 16)),))
        example = {"pixels": torch.randn(4, 3, 16, 16)}
    for module in model.modules():
        if hasattr(module, "quantized_weight"):
            shape: tuple[int, ...] = module.quantized_weight.shape  # type: ignore[union-attr,assignment]
            spread = 1e-3 if kind is Tied else (shape[0] / torch.Size(shape).numel()) ** 0.5
            _store(module, spread * torch.randn(shape), Grid(bits))
        if static and getattr(module, "activation", None) is not None:
            module.activation.scale = torch.tensor(4 / 127)  # type: ignore[union-attr]
    exporter, path = TensorRTExporter(), tmp_path / "model.engine"
    artifact = exporter.write(Traceable(model, signature, example), path)
    held, codes = exporter.contents(path).codes, _codes(model)
    assert {name: np.array_equal(held[name], array) for name, array in codes.items()} == dict.fromkeys(codes, True)
    assert artifact.details["codes_in_engine"]["not_found"] == []
    with torch.no_grad():
        assert _sqnr(model(**example), exporter.open(path, 1)(example)) > (30.0 if static else 50.0)


def test_the_methods_that_run_an_engine_exist() -> None:
    trt = pytest.importorskip("tensorrt_rtx", reason="needs the extra tensorrt-rtx")
    engine = {"get_tensor_name", "num_io_tensors", "get_tensor_mode", "get_tensor_dtype", "get_tensor_shape"}
    assert engine | {"get_tensor_profile_shape", "create_execution_context"} <= set(dir(trt.ICudaEngine))
    context = {"set_input_shape", "set_tensor_address", "get_tensor_shape", "execute_async_v3"}
    assert context <= set(dir(trt.IExecutionContext))
    assert {"FLOAT", "HALF", "INT8", "INT32", "INT64", "BOOL"} <= set(trt.DataType.__members__)


@pytest.mark.usefixtures("built")
def test_a_float_model_is_written_and_runs_as_proxy(tmp_path: Path) -> None:
    exporter, path = TensorRTExporter(precision="float32"), tmp_path / "model.engine"
    model = _float()
    exporter.write(Traceable(model, _signature(), _example()), path)
    assert exporter.contents(path).codes == {}
    with torch.no_grad():
        assert _sqnr(model(**_example()), exporter.open(path, 1)(_example())) > 90.0


def test_a_failed_build_leaves_what_was_there(
    once: tuple[Encoder, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (model, built), exporter = once, TensorRTExporter()
    path, source = _copy(built, tmp_path), Traceable(model, _signature(), _example())
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def fail(*_: Any, **__: Any) -> None:
        raise UserError("here", "refused")

    monkeypatch.setattr(to_tensorrt, "build_engine", fail)
    with pytest.raises(UserError, match="refused"):
        exporter.write(source, path)
    with pytest.raises(UserError, match="refused"):
        exporter.write(source, tmp_path / "other.engine")
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    monkeypatch.undo()
    exporter.write(source, path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before, "builds are deterministic"


def test_weights_kept_apart_move_along_and_old_ones_go(tmp_path: Path) -> None:
    path = tmp_path / "model.engine"
    for names in (["model.engine", "model.qdq.onnx", "model.qdq.onnx.data"], ["model.engine", "model.qdq.onnx"]):
        folder = tmp_path / "unfinished"
        folder.mkdir(exist_ok=True)
        for name in names:
            (folder / name).write_text(f"{name} of {len(names)}")
        to_tensorrt._move(folder, path)
        folder.rmdir()
        assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {n: f"{n} of {len(names)}" for n in names}


# -- refusals, options and absent things: no builder needed ----------------------------------------------------------


def _linear(grid: Grid, activation: dict[str, Any] | None = None, shape: tuple[int, ...] = (6, 8)) -> nn.Module:
    return nn.ModuleDict({"layer": QuantLinear(shape, grid, activation, bias=False)})


def _convolution(grid: Grid, activation: dict[str, Any] | None) -> nn.Module:
    return nn.ModuleDict({"layer": QuantConv2d((4, 8, 1, 1), grid, activation, bias=False)})


@pytest.mark.parametrize(
    ("model", "word"),
    [
        (_linear(Grid(8, symmetric=False)), "weight codes are asymmetric"),
        (_linear(INT8, {"kind": "static", "symmetric": False}), "activation codes are asymmetric"),
        (_linear(INT8, {"kind": "dynamic"}), "made at run time"),
        (_linear(INT8, {"kind": "static", "bits": 4}), "4 bits"),
        (_linear(Grid(8, granularity="group", group_size=4), {"kind": "static"}), "group scales"),
        (_linear(Grid(4, granularity="group", group_size=1)), "2 or more"),
        (_linear(Grid(4), shape=(3, 5)), "odd number"),
        (_convolution(Grid(4, granularity="group", group_size=4), None), "by channel"),
    ],
)
def test_what_tensorrt_cannot_carry_is_refused_at_its_place(model: nn.Module, word: str) -> None:
    refused = TensorRTExporter().refuses(model)
    assert [path for path, _ in refused] == ["layer"]
    assert word in refused[0][1]


@pytest.mark.parametrize(
    "model",
    [
        _linear(INT8, {"kind": "static"}),
        _linear(INT2),
        _linear(Grid(2), {"kind": "static"}),
        _linear(Grid(4, granularity="group", group_size=2)),
        _linear(Grid(8, granularity="tensor"), {"kind": "static"}),
        _convolution(INT8, {"kind": "static"}),
        nn.Linear(3, 3),
    ],
)
def test_the_rest_is_not_refused(model: nn.Module) -> None:
    assert TensorRTExporter().refuses(model) == []


def test_a_zero_point_that_is_not_zero_is_refused_whatever_the_grid_says() -> None:
    model = _linear(INT8, {"kind": "static"})
    model["layer"].activation.zero_point.fill_(3)  # type: ignore[index]
    assert "asymmetric" in TensorRTExporter().refuses(model)[0][1]


@pytest.mark.parametrize(
    ("options", "place", "what"),
    [
        ({"dynamic": ["batch", "pixels"]}, "export.tensorrt.dynamic", "no dimension 'pixels'"),
        ({"profile": {"tokens": [1, 8, 12]}}, "export.tensorrt.profile", "tokens is not dynamic"),
        ({"profile": {"rows": [1, 8, 12]}}, "export.tensorrt.profile", "no dimension 'rows'"),
    ],
)
def test_dimensions_that_do_not_exist_are_the_users_mistake(options: dict[str, Any], place: str, what: str) -> None:
    source = Traceable(_float(), _signature(), _example())
    with pytest.raises(UserError) as caught:
        TensorRTExporter(**options)._ranges(source)
    assert caught.value.where == place
    assert what in caught.value.what
    assert caught.value.hint


def test_profiles_have_an_order_and_reach_every_input() -> None:
    with pytest.raises(ValidationError, match="not in order"):
        TensorRTExporter(profile={"batch": [4, 2, 8]})
    with pytest.raises(ValidationError):
        TensorRTExporter(profile={"batch": [1, 2]})
    source = Traceable(_float(), _signature(), _example())
    exporter = TensorRTExporter(dynamic=["batch", "tokens"], profile={"batch": [1, 4, 8]})
    shapes = to_tensorrt._profile(source, exporter._ranges(source))
    assert shapes["input_ids"] == shapes["attention_mask"] == [[1, 2], [4, TOKENS], [8, TOKENS]]
    assert to_tensorrt._profile(source, TensorRTExporter()._ranges(source))["input_ids"] == [[1, 12], [1, 12], [16, 12]]
    assert to_tensorrt._profile(source, {}) == {}


def test_an_absent_builder_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(to_tensorrt, "_installed", lambda module: False)
    monkeypatch.setattr(to_tensorrt, "gpu_name", lambda: None)
    assert TensorRTExporter().missing() == "TensorRT-RTX is not installed"
    with pytest.raises(MissingRuntime, match="not installed") as caught:
        TensorRTExporter().write(Traceable(_float(), _signature(), _example()), tmp_path / "model.engine")
    assert "transformer-compress[tensorrt-rtx]" in caught.value.hint
    assert not list(tmp_path.iterdir())


def test_the_builder_follows_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(to_tensorrt, "_installed", lambda module: True)
    monkeypatch.setattr(to_tensorrt, "gpu_name", lambda: "a GPU")
    assert TensorRTExporter()._builder() == "tensorrt"
    assert TensorRTExporter(builder="tensorrt-rtx")._builder() == "tensorrt-rtx"
    with pytest.raises(UserError, match="for the GPU in this machine"):
        TensorRTExporter(compute_capabilities=["8.6"])._ready()
    monkeypatch.setattr(to_tensorrt, "gpu_name", lambda: None)
    assert TensorRTExporter()._builder() == "tensorrt-rtx"
    assert "there is none" in (TensorRTExporter(builder="tensorrt").missing() or "")


def test_a_file_that_nothing_can_run_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(to_tensorrt, "gpu_name", lambda: None)
    path = tmp_path / "model.engine"
    with pytest.raises(UserError, match="no such engine"):
        TensorRTExporter().open(path, 1)
    path.write_bytes(b"vtrt" + bytes(60))
    runner = TensorRTExporter().open(path, 1)
    assert (runner.how, runner.measurable) == ("none", False)
    assert "model.qdq.onnx" in runner.runtime
    assert "is gone" in runner.runtime
    with pytest.raises(UserError, match="cannot be run here"):
        runner(_example())
    tensorrt_contents.qdq_path(path).write_bytes(b"not a model")
    pytest.importorskip("onnxruntime", reason="needs the extra onnx")
    assert "ONNX Runtime cannot run" in TensorRTExporter().open(path, 1).runtime


@pytest.mark.gpu
@pytest.mark.usefixtures("built")
def test_an_engine_runs_on_the_gpu_as_the_model_does(tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU and a CUDA build of torch")
    exporter, path = TensorRTExporter(), tmp_path / "model.engine"
    model = _quantized(INT8, "static")
    exporter.write(Traceable(model, _signature(), _example()), path)
    runner = exporter.open(path, 1)
    assert (runner.how, runner.measurable) == ("runtime", True)
    with torch.no_grad():
        expected = model(**_example())
    assert _sqnr(expected, runner(_example())) > 30.0
    many = {name: value.repeat(5, 1) for name, value in _example().items()}
    assert _sqnr(expected.repeat(5, 1), runner(many)) > 30.0
    runner.close()


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.usefixtures("built")
def test_wide_constants_beside_float16_values_build(family: str, tmp_path: Path) -> None:
    """GELU written out and RMSNorm hold float32 islands; the builder takes one type for both operands."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "compress"))
    families = importlib.import_module("families")
    model, signature, batch = families.build(family)
    exporter, path = TensorRTExporter(), tmp_path / "model.engine"
    exporter.write(Traceable(model.eval(), signature, batch), path)
    with torch.no_grad():
        reference = signature.call(model, batch)
    assert _sqnr(reference, exporter.open(path, 1)(batch)) >= 50, "float16 keeps 11 bits: 66 dB for one rounding"
