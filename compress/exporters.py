"""The exporters that a recipe can name, in one tuple."""

from __future__ import annotations

from collections.abc import Mapping

from export.contract import Exporter
from export.to_coreml import CoreMLExporter
from export.to_onnx import OnnxExporter
from export.to_tensorrt import TensorRTExporter

__all__ = ["EXPORTERS", "known_exporters"]

EXPORTERS: tuple[type[Exporter], ...] = (OnnxExporter, CoreMLExporter, TensorRTExporter)


def known_exporters() -> Mapping[str, type[Exporter]]:
    """Exporter classes by their name in a recipe."""
    return {exporter.format: exporter for exporter in EXPORTERS}
