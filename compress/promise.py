"""What a compressed model promises of its files, and what is known of a file without running it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from compress.report import Audit, Row
from export.contract import Artifact, Exporter
from export.graph import Traceable
from export.validate import audit

__all__ = ["Promise", "described", "unjudged"]


@dataclass(frozen=True)
class Promise:
    """What a compressed model promises of every file that is written from it.

    Attributes:
        codes: signed codes (int8), by module path, of every quantized layer that the model's output depends on.
        dynamic_activations: whether some activation grid is made from the batch itself.
    """

    codes: dict[str, np.ndarray[Any, Any]]
    dynamic_activations: bool

    @classmethod
    def of(cls, source: Traceable) -> Promise:
        """Reads it from the model and its traced graph."""
        from compress.layers import ActivationGrid, BinaryCodes, Codes

        reached = source.reached()
        codes = {
            path.removesuffix(".quantized_weight"): module.integers().numpy()
            for path, module in source.model.named_modules(remove_duplicate=False)
            if isinstance(module, Codes | BinaryCodes) and f"{path}.codes" in reached
        }
        grids = (module for module in source.model.modules() if isinstance(module, ActivationGrid))
        return cls(codes, any(grid.kind == "dynamic" for grid in grids))


def described(
    exporter: Exporter, artifact: Artifact, promise: Promise, folder: Path, baseline: Artifact | None
) -> dict[str, Any]:
    """What is known of a file without running it; raises ``LostInExport`` where its integers are not the model's."""
    audited = audit(promise.codes, exporter.contents(artifact.path), str(artifact.path))
    return {
        "format": exporter.format,
        "path": artifact.path.relative_to(folder).as_posix(),
        "size_bytes": artifact.size_bytes,
        "size_ratio": artifact.size_bytes / baseline.size_bytes if baseline else None,
        "audit": Audit(**vars(audited)),
        "details": dict(artifact.details),
    }


def unjudged(exporter: Exporter, artifact: Artifact, promise: Promise, folder: Path) -> Row:
    """The row of a file that was written and audited but, as asked, not run."""
    known = described(exporter, artifact, promise, folder, None)
    return Row(label=exporter.format, **known, validated="none", note="evaluation was switched off")
