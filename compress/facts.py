"""What the costs of a run are made from: measured on the model and on one calibration batch."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from calibrate.footprint import live_bytes
from calibrate.inventory import inventory
from calibrate.modes import evaluating
from compress.anatomy import Anatomy
from compress.datasets import Data
from compress.rehearsal import Rehearsal
from export.contract import Exporter, Forecast
from export.memory import peak_bytes, resident_bytes

if TYPE_CHECKING:
    from compress.recipe import Recipe
    from compress.sources import Source

__all__ = ["Facts", "gathered"]

_KEPT_ROWS, _KEPT_BYTES = 64, 8_000_000
_BLOCK_ROWS, _BLOCK_BYTES = 16, 64_000_000


@dataclass(frozen=True)
class Facts:
    """What the sums are made from, all in bytes.

    Attributes:
        resident: this process now, with libraries, float model and traces.
        floats: the float model; compressed: the model after all passes.
        activations: most that lives at a time while one calibration batch runs.
        largest: the largest parameter.
        files: exporter, forecast of its file, and forecast of the float file (None where nothing is evaluated).
        openvino: exporters whose file is run in OpenVINO too.
        sizes: batch sizes that files are run with: all, and those of the float file.
        blocks: outputs of the blocks that are kept while the run goes on.
        outputs: of both models on the evaluation rows; None where their number is not known without reading them.
        kept: evaluation rows kept with the files.
        source: configuration and tokenizer.
        checkpoints: the model after each pass.
        each_pass: whether the files are written after each pass.
    """

    floats: int
    compressed: int
    activations: int
    largest: int
    files: Sequence[tuple[Exporter, Forecast, Forecast | None]]
    sizes: tuple[int, int]
    blocks: int
    outputs: int | None
    kept: int
    source: int
    checkpoints: Sequence[int]
    each_pass: bool = False
    evaluates: bool = True
    resident: int = field(default_factory=resident_bytes)
    peak: int = field(default_factory=peak_bytes)


def gathered(
    recipe: Recipe,
    source: Source,
    data: Data,
    anatomy: Anatomy,
    rehearsal: Rehearsal,
    files: Sequence[tuple[Exporter, Forecast, Forecast | None]],
) -> Facts:
    """Runs one calibration batch through the float model, and asks the recipe, the rehearsal and the forecasts for the rest."""
    batch = next(iter(data.calibration_batches()))
    rows = next(iter(batch.values())).shape[0]
    given: dict[str, torch.Tensor] = {}

    def run() -> None:
        given["output"] = source.signature.call(source.model, batch)

    with evaluating(source.model), _block_bytes(source.model, [block.path for block in anatomy.blocks]) as heard:
        activations = live_bytes(run)
    a_row = -(-given["output"].nbytes // rows)
    of_blocks = max(1, sum(heard.values()) // rows)
    evaluates = any(baseline is not None for _, _, baseline in files)
    split = recipe.data.evaluation if evaluates else None
    judged = 0 if split is None else split.count
    wide = sum(tensor.nbytes for tensor in batch.values()) // rows + 2 * a_row
    sizes = {data.batch_size, 4, 1, *recipe.measure.batch_sizes}
    return Facts(
        floats=sum(entry.bytes for entry in inventory(source.model).values()),
        compressed=rehearsal.steps[-1].bytes_after if rehearsal.steps else _stored(source.model),
        activations=activations,
        largest=max((parameter.nbytes for parameter in source.model.parameters()), default=0),
        files=files,
        sizes=(len(sizes), len(recipe.measure.batch_sizes)),
        blocks=of_blocks * min(_BLOCK_ROWS, len(data.calibration), max(1, _BLOCK_BYTES // of_blocks)),
        outputs=None if judged is None else 2 * judged * data.calibration.group * a_row,
        kept=min(_KEPT_ROWS, max(4, _KEPT_BYTES // max(1, wide))) * wide,
        source=sum(os.path.getsize(path) for path in source.files),
        checkpoints=[step.bytes_after for step in rehearsal.steps],
        each_pass=recipe.measure.when == "each_pass",
        evaluates=evaluates,
    )


@contextmanager
def _block_bytes(model: nn.Module, paths: Sequence[str]) -> Iterator[dict[str, int]]:
    """While it lasts, notes the bytes that each module at the given paths gives."""
    heard: dict[str, int] = {}

    def hook(path: str) -> Any:
        def after(module: nn.Module, args: Any, output: Any) -> None:
            heard[path] = next((leaf.nbytes for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor)), 0)

        return after

    handles = [model.get_submodule(path).register_forward_hook(hook(path)) for path in paths]
    try:
        yield heard
    finally:
        for handle in handles:
            handle.remove()


def _stored(model: nn.Module) -> int:
    return sum(entry.bytes for entry in inventory(model).values())
