"""Whole models: the saved package, run by the interpreter, against the torch model on ragged rows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from coreml_models import family, sqnr, trace
from sweeps import swept

pytest.importorskip("coremltools", reason="Core ML needs coremltools")
pytest.importorskip("transformers", reason="the small models are transformers'")

from export.coreml_contents import infinite
from export.mil_package import Package
from export.to_coreml import CoreMLExporter

# float16 follows the same program; one model of each kind of mask and layer is enough
MODELS = {
    "bert": ("float32", "float16"),
    "bert_eager": ("float32",),
    "sentence_bert": ("float32",),
    "vit": ("float32", "float16"),
    "gpt2": ("float32", "float16"),
    "llama": ("float32", "float16"),
    "swin": ("float32", "float16"),
    "mobilevit": ("float16",),
    "siglip_vision": ("float32",),
}


@pytest.mark.parametrize("name", swept(MODELS, ["bert", "llama"]))
def test_a_model_keeps_its_output(name: str, tmp_path: Path) -> None:
    """Bounds: float32 differs by the order of sums (90 dB); float16 rounds each result to 11 bits, 2**-11 of its size is
    66 dB, and some hundred roundings in a row leave at least 40 dB."""
    model, signature, example = family(name)
    source = trace(model, signature, example, name)
    rows = source.inputs(2)
    with torch.no_grad():
        reference = signature.call(model, rows)
    for precision in MODELS[name]:
        exporter = CoreMLExporter(precision=precision, batch=2)
        artifact = exporter.write(source, tmp_path / "model.mlpackage")
        runner = exporter.open(artifact.path, threads=1)
        result = runner(rows)
        assert runner.rows == 2
        assert result.shape == reference.shape
        assert sqnr(reference, result) >= (90 if precision == "float32" else 40)
        assert not infinite(Package(artifact.path))
        if "attention_mask" in rows:  # control: the mask is in the program, and it matters
            everything = {**rows, "attention_mask": torch.ones_like(rows["attention_mask"])}
            assert sqnr(reference, runner(everything)) < 40
