"""What is left of a model is trained, without labels, until its blocks and its output give again what the original gave."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from calibrate.signature import Batch
from compress.depth.repair import Judge, finite
from compress.distillation.training import Course, Lesson, distil

if TYPE_CHECKING:
    from compress.passes.contract import Context

__all__ = ["distil_blocks", "thinned"]

_RATE = 0.001
"""Of Adam, in root mean squares of a weight of the blocks (their median): a step moves no weight by more."""
_MASKED = 0.6
"""Largest share of the tokens of a row that is masked."""
_ROWS = 16
_PATIENCE = 1 << 30
"""The loss may rise while the rate is high: what counts is where it ends."""


def distil_blocks(
    model: nn.Module,
    original: nn.Module,
    context: Context,
    rows: tuple[Sequence[Batch], Sequence[Batch]],
    epochs: int,
    blocks: Mapping[str, str],
    trained: Sequence[str],
) -> dict[str, Any]:
    """Trains what the blocks hold until their outputs, and the model's, are those that the original gives for the rows.

    The parameters stay only if the model's output on held-out rows gets nearer to the original's; they are replaced, not written
    into, so that another model that shares them keeps its own. Quantized weights, those that are shared with what is outside the
    blocks, and all that are not float32 stay as they are.

    Where rows have an attention mask, tokens of them are masked at random: a model knows the rows that it was trained on by
    heart, and what it gives for others is what should be learnt.

    Args:
        rows: to learn from, and held out.
        epochs: times that each row to learn from is seen.
        blocks: path of each block in the model -> its path in the original.
        trained: those of them whose parameters learn; the blocks that are done before the first of them are run once only.

    Returns:
        What there is to report.
    """
    names = _trainable(model, trained)
    if not names:
        return {"because": "no block has a float32 weight to train"}
    places = {path: (path.rpartition(".")[0], path.rpartition(".")[2]) for path in names}
    old = {path: model.get_submodule(owner)._parameters[name] for path, (owner, name) in places.items()}
    generator = torch.Generator().manual_seed(context.seed)
    fit, held = (thinned(part, generator) for part in rows)
    judge = Judge(original, context.call, rows[1] if held is rows[1] else [*rows[1], *held])
    before = judge.sqnr_db(model)
    lesson = Lesson(original, context.call, (fit, held), {path: blocks[path] for path in trained}, "features", _ROWS)
    if lesson.left_out:
        context.report.setdefault("warnings", []).append(lesson.left_out)
    matrices = [model.get_parameter(name) for name in names if model.get_parameter(name).dim() > 1]
    rate = _RATE * statistics.median(map(_size, matrices))
    course = Course(epochs=epochs, rows=_ROWS, patience=_PATIENCE, seed=context.seed)
    taught = distil(model, context.call, lesson, dict.fromkeys(names, rate), list(blocks), course, context.progress)
    after = judge.sqnr_db(model)
    told: dict[str, Any] = {"epochs": epochs, "rate": rate, "sqnr_db_before": finite(before), "sqnr_db_after": finite(after)}
    if not after > before and taught.best_step:
        for path, (owner, name) in places.items():
            model.get_submodule(owner)._parameters[name] = old[path]
        told |= {"sqnr_db_after": finite(before), "undone": "the model's outputs on the held-out rows were nearer without it"}
    if not (lesson.fit and lesson.held):
        told["because"] = lesson.left_out
    return told | {"training": taught.json()}


def thinned(batches: Sequence[Batch], generator: torch.Generator) -> Sequence[Batch]:
    """The rows with a random share of their tokens masked, from none to most, but never the first; the very same batches where
    they have no attention mask."""
    if not all("attention_mask" in batch and batch["attention_mask"].dim() == 2 for batch in batches):
        return batches
    found = []
    for batch in batches:
        mask = batch["attention_mask"]
        share = _MASKED * torch.rand(len(mask), 1, generator=generator)
        stays = torch.rand(mask.shape, generator=generator) >= share
        first = torch.zeros_like(stays).scatter_(1, mask.ne(0).int().argmax(1, keepdim=True).cpu(), True)
        found.append({**batch, "attention_mask": mask * (stays | first).to(mask)})
    return found


def _trainable(model: nn.Module, blocks: Sequence[str]) -> list[str]:
    """Names of the parameters that only the blocks hold; none where they hold no matrix."""
    inside = {
        id(parameter): f"{path}.{name}"
        for path in reversed(blocks)
        for name, parameter in reversed(list(model.get_submodule(path).named_parameters()))
        if parameter.dtype == torch.float32
    }
    within = tuple(f"{path}." for path in blocks)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if not name.startswith(within):
            inside.pop(id(parameter), None)
    names = list(inside.values())[::-1]
    return names if any(model.get_parameter(name).dim() > 1 for name in names) else []


def _size(parameter: nn.Parameter) -> float:
    return float(parameter.detach().double().square().mean().sqrt())
