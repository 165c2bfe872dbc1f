"""The written file: bytes, names, external data, free dimensions, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from calibrate.errors import UserError
from calibrate.signature import Signature, TensorSpec
from export.graph import Traceable

pytest.importorskip("onnxruntime")

import onnx
from test_onnx_carried import codes_of, made, quantized, sqnr

from export import to_onnx
from export.onnx_file import contents, read, write
from export.onnx_runner import OnnxRunner
from export.to_onnx import OnnxExporter, lower


def test_bytes_are_the_same_each_time(tmp_path: Path) -> None:
    exporter = OnnxExporter()
    for name in ("one.onnx", "two.onnx"):
        model, signature, batch = quantized("text", bits=4)
        exporter.write(Traceable(model, signature, batch), tmp_path / name)
    assert (tmp_path / "one.onnx").read_bytes() == (tmp_path / "two.onnx").read_bytes()


def test_names_and_metadata(tmp_path: Path) -> None:
    model, signature, batch = made("text")
    OnnxExporter().write(Traceable(model, signature, batch, "small"), tmp_path / "model.onnx")
    proto = onnx.load(tmp_path / "model.onnx")
    onnx.checker.check_model(proto, full_check=True)
    assert proto.producer_name == "transformer-compress"
    assert {item.key: item.value for item in proto.metadata_props}["compress.name"] == "small"
    assert [item.name for item in proto.graph.input] == ["ids", "mask"]
    assert [item.name for item in proto.graph.output] == ["output"]
    assert proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    assert {"up.weight", "up.bias", "words.weight"} <= {item.name for item in proto.graph.initializer}
    assert any(node.name.startswith("up/MatMul") for node in proto.graph.node)
    assert contents(tmp_path / "model.onnx").float_layers == ("down", "key", "out", "query", "up", "value", "words")


def test_onnx_loads_what_was_written_by_hand(tmp_path: Path) -> None:
    """Oracle: the file equals what the onnx library writes for the same model, tensor by tensor."""
    import onnx_ir as ir

    model, signature, batch = quantized("text", bits=4, activations=None, group=16)
    lowered = lower(Traceable(model, signature, batch), "portable")
    write(lowered, tmp_path / "model.onnx")
    ours, theirs = onnx.load(tmp_path / "model.onnx"), ir.to_proto(lowered)
    assert list(ours.graph.node) == list(theirs.graph.node)
    wanted = {item.name: onnx.numpy_helper.to_array(item) for item in theirs.graph.initializer}
    found = {item.name: onnx.numpy_helper.to_array(item) for item in ours.graph.initializer}
    assert found.keys() == wanted.keys()
    assert all((found[name] == wanted[name]).all() and found[name].dtype == wanted[name].dtype for name in wanted)


def test_external_data_above_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(to_onnx, "LIMIT_BYTES", 4096)
    model, signature, batch = quantized("text")
    exporter = OnnxExporter()
    artifact = exporter.write(Traceable(model, signature, batch), tmp_path / "model.onnx")
    assert sorted(item.name for item in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data"]
    assert artifact.size_bytes == sum(item.stat().st_size for item in tmp_path.iterdir())
    with torch.no_grad():
        assert sqnr(signature.call(model, batch), exporter.open(artifact.path, 1)(batch)) >= 50
    wanted = codes_of(model)
    assert all((codes == wanted[path]).all() for path, codes in exporter.contents(artifact.path).codes.items())
    assert exporter.kept_float(artifact.path) == []
    monkeypatch.undo()
    exporter.write(Traceable(model, signature, batch), tmp_path / "model.onnx")
    assert [item.name for item in tmp_path.iterdir()] == ["model.onnx"]


def test_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, signature, batch = made("text")
    lowered = lower(Traceable(model, signature, batch))
    (tmp_path / "model.onnx").write_bytes(b"before")

    def broken(tensor: object) -> bytes:
        raise OSError("disk full")

    monkeypatch.setattr("export.onnx_file._raw", broken)
    with pytest.raises(OSError, match="disk full"):
        write(lowered, tmp_path / "model.onnx")
    assert [item.name for item in tmp_path.iterdir()] == ["model.onnx"]
    assert (tmp_path / "model.onnx").read_bytes() == b"before"


def test_free_batch_and_tokens_and_ragged_rows(tmp_path: Path) -> None:
    model, signature, batch = made("text")
    artifact = OnnxExporter(dynamic=("batch", "tokens")).write(Traceable(model, signature, batch), tmp_path / "model.onnx")
    runner = OnnxRunner(artifact.path, 1)
    assert runner.rows is None
    for rows, tokens in ((1, 12), (2, 7), (3, 16)):
        ids = torch.randint(1, 40, (rows, tokens))
        mask = (torch.arange(tokens) < torch.randint(2, tokens + 1, (rows, 1))).long()
        with torch.no_grad():
            assert sqnr(model(ids, mask), runner({"ids": ids, "mask": mask})) >= 100
    padded = runner({name: torch.nn.functional.pad(tensor[:1], (0, 3)) for name, tensor in batch.items()})
    alone = runner({name: tensor[:1, :3] for name, tensor in batch.items()})
    assert sqnr(alone, padded[:, :3]) >= 100


def test_fixed_batch_is_said(tmp_path: Path) -> None:
    model, signature, batch = made("pixels")
    artifact = OnnxExporter(dynamic=(), batch=3).write(Traceable(model, signature, batch), tmp_path / "model.onnx")
    runner = OnnxRunner(artifact.path, 1)
    assert runner.rows == 3
    with torch.no_grad():
        assert sqnr(model(batch["pixels"]), runner(batch)) >= 100


def test_positions_bound_a_free_length(tmp_path: Path) -> None:
    """A table of 16 positions allows lengths up to 16; the trace asks for the bound and gets it."""
    model, signature, batch = made("text")
    program = Traceable(model, signature, batch).program(frozenset({"batch", "tokens"}))
    assert {int(item.upper) for item in program.range_constraints.values() if item.upper < 100} == {16}


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    model, signature, batch = quantized("text", activations="dynamic")
    with pytest.raises(UserError, match="static ranges only"):
        lower(Traceable(model, signature, batch), "tensorrt")
    model.up.activation.bits = 4  # type: ignore[union-attr,assignment]
    assert [path for path, _ in OnnxExporter().refuses(model)] == ["up"]
    model, signature, batch = quantized("text", symmetric=False)
    with pytest.raises(UserError, match="no zero point"):
        lower(Traceable(model, signature, batch), "tensorrt")
    (tmp_path / "broken.onnx").write_bytes(b"not onnx")
    for path in (tmp_path / "broken.onnx", tmp_path / "absent.onnx"):
        with pytest.raises(UserError, match=path.name):
            read(path)
        with pytest.raises(UserError, match=path.name):
            OnnxRunner(path, 1)


def test_data_dependent_shapes_are_named(tmp_path: Path) -> None:
    class Masked(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x[x > 0].sum()

    source = Traceable(Masked(), Signature((TensorSpec("x", torch.float32, ("batch", 4)),)), {"x": torch.randn(2, 4)})
    with pytest.raises(UserError):
        lower(source)


def test_a_tied_float_table_is_stored_once(tmp_path: Path) -> None:
    """A head that shares the embedding reads it through a Transpose, which runtimes fold when they load the file."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(500, 32), nn.Linear(32, 500, bias=False)
            self.head.weight = self.table.weight

        def forward(self, ids: Tensor) -> Tensor:
            logits: Tensor = self.head(self.table(ids))
            return logits

    model, ids = Tied().eval(), torch.randint(0, 500, (2, 7))
    signature = Signature((TensorSpec("ids", torch.int64, ("batch", 7)),))
    path = tmp_path / "tied.onnx"
    artifact = OnnxExporter(openvino=False).write(Traceable(model, signature, {"ids": ids}), path)
    assert artifact.size_bytes < 1.2 * 4 * 500 * 32
    with torch.no_grad():
        reference = model(ids)
    made = OnnxExporter().open(path, 1)({"ids": ids})
    assert 10 * torch.log10(reference.square().sum() / (reference - made).square().sum().clamp(min=1e-30)) > 100
