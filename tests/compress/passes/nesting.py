"""Run folders with a sorted model, made without a run: as much of them as ``extract_width`` reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn
from trial import Trial, tried

from calibrate.signature import Batch, Signature
from compress import manifest
from compress.passes.extract_width import ExtractWidth
from compress.passes.nest_widths import NestWidths
from compress.saved import save
from compress.width import nested


def nest(folder: Path, model: nn.Module, signature: Signature, batches: list[Batch], **options: Any) -> Trial:
    """Sorts the units of a copy of the model and keeps it in ``folder``."""
    trial = tried(NestWidths(**{"score": "magnitude", **options}), model, signature, batches)
    keep(trial, folder)
    return trial


def keep(trial: Trial, folder: Path) -> None:
    """Makes a run folder of what a pass left."""
    checkpoint = folder / "checkpoint"
    checkpoint.mkdir(parents=True)
    save(trial.after, trial.context.edits, {"kind": "none"}, trial.signature, checkpoint)
    assert trial.context.nested is not None
    nested.keep(checkpoint, trial.context.nested, folder / nested.FOLDER)
    seal(folder)


def seal(folder: Path) -> None:
    """Writes a manifest over the files as they are."""
    files = {f"nested/{path.name}": {"sha256": manifest.digest(path)} for path in (folder / "nested").iterdir()}
    manifest.write_json(folder / "manifest.json", {"version": 1, "base": ".", "files": files})


def extract(folder: Path, trial: Trial, **options: Any) -> Trial:
    """Cuts a smaller model out of the sorted one, beginning with the float model as a run does."""
    return tried(ExtractWidth(run_folder=folder, **options), trial.before, trial.signature, trial.rows)
