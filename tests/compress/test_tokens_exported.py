"""Models that hand on fewer tokens, as files: exact in every runtime, static, and without what a runtime cannot do."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
from families import build
from sweeps import swept
from torch import nn

from calibrate.fidelity import sqnr_db
from calibrate.signature import Batch, Signature
from compress.anatomy import find
from compress.passes.contract import Context
from compress.passes.fuse_tokens import FuseTokens
from compress.passes.merge_tokens import MergeTokens
from compress.passes.prune_tokens import PruneTokens
from compress.passes.token_schedule import TokenPass
from compress.surgery import Surgery
from export.graph import Traceable
from export.to_coreml import CoreMLExporter
from export.to_onnx import OnnxExporter
from export.to_tensorrt import TensorRTExporter

NEVER = {"ScatterElements", "ScatterND", "Scatter", "Loop", "If", "Scan", "NonZero", "Unique"}
STEPS = {
    "zero_tprune": PruneTokens(keep={0: 11, 1: 7}, votes=2),
    "received": PruneTokens(keep={0: 11}, score="received"),
    "random": PruneTokens(keep={0: 11}, score="random"),
    "merge": MergeTokens(keep={0: 11, 1: 7}),
    "fuse": FuseTokens(keep={0: 11}),
}


@functools.cache
def reduced(name: str, method: str) -> tuple[nn.Module, Signature, Batch, Traceable]:
    model, signature, example = build(name)
    step: TokenPass = STEPS[method]
    context = Context(signature, find(model, signature, example), lambda: iter([example]), Surgery())
    after = step.run(model, context)
    return after, signature, example, Traceable(after, signature, example)


@pytest.mark.parametrize(
    ("name", "method"),
    swept(
        [
            ("vit", "zero_tprune"),
            ("vit", "merge"),
            ("vit", "random"),
            ("bert", "received"),
            ("bert", "fuse"),
            ("sentence_bert", "merge"),
        ],
        [("bert", "fuse")],
    ),
)
def test_onnx_and_core_ml_files_choose_the_same_tokens(name: str, method: str, tmp_path: Path) -> None:
    import onnx

    model, signature, example, traceable = reduced(name, method)
    with torch.inference_mode():
        wanted = signature.call(model, example)
    for exporter in (OnnxExporter(), CoreMLExporter(precision="float32")):
        artifact = exporter.write(traceable, tmp_path / Path(exporter.filename).name)
        runner = exporter.open(artifact.path, 1)
        rows = runner.rows or len(wanted)
        cuts = [{key: value[row : row + rows] for key, value in example.items()} for row in range(0, len(wanted), rows)]
        assert sqnr_db(wanted, torch.cat([runner(cut) for cut in cuts])) > 90
        runner.close()
    graph = onnx.load(str(tmp_path / "model.onnx")).graph
    assert not NEVER & {node.op_type for node in graph.node}
    assert any(node.op_type == "TopK" for node in graph.node)


def test_planted_ties_go_the_same_way_everywhere(tmp_path: Path) -> None:
    """An image of equal patches: every score and every similarity is a tie, and every runtime picks the earlier tokens."""
    model, signature, example, traceable = reduced("vit", "merge")
    same = {"pixel_values": example["pixel_values"][:, :, :8, :8].repeat(1, 1, 4, 4)}
    with torch.inference_mode():
        wanted = signature.call(model, same)
    for exporter in (OnnxExporter(), CoreMLExporter(precision="float32")):
        artifact = exporter.write(traceable, tmp_path / Path(exporter.filename).name)
        runner = exporter.open(artifact.path, 1)
        rows = runner.rows or len(wanted)
        cuts = [{"pixel_values": same["pixel_values"][row : row + rows]} for row in range(0, len(wanted), rows)]
        assert sqnr_db(wanted, torch.cat([runner(cut) for cut in cuts])) > 90
        runner.close()


@pytest.mark.parametrize(("name", "method"), swept([("vit", "merge"), ("bert", "received")], [("vit", "merge")]))
def test_the_tensorrt_builder_takes_the_graph(name: str, method: str, tmp_path: Path) -> None:
    exporter = TensorRTExporter()
    if exporter.missing():
        pytest.skip(str(exporter.missing()))
    _, _, _, traceable = reduced(name, method)
    artifact = exporter.write(traceable, tmp_path / Path(exporter.filename).name)
    assert artifact.size_bytes > 0
