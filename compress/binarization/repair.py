"""Binarized layers are trained, without labels, until their blocks and the model give again what the float model gave.

Shapes: B batch, T tokens.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from calibrate.fidelity import sqnr_db
from calibrate.modes import evaluating
from calibrate.signature import Batch
from compress.anatomy import Block
from compress.binarization.latent import Latent, LatentActivation
from compress.distillation.blocks import thinned
from compress.distillation.training import Course, LiveLesson, Taught, distil
from compress.layers import BinaryProducts

if TYPE_CHECKING:
    from compress.passes.contract import Context

__all__ = ["Plan", "repaired"]

_CHECKS = 20
_POOL = 16
"""Batches whose rows are sorted by length together, so that little is padded."""
_SAME_DB = 60.0
"""Outputs without padded columns that agree so well are the same: the columns can go."""


@dataclass(frozen=True)
class Plan:
    """How long the repair takes, and how fast it goes.

    Attributes:
        block_steps: for each block by itself, on what the binarized blocks before it give.
        steps: of all blocks together.
        rows: in one step.
        rate: of Adam, in root mean squares of what is trained.
        patience: checks in a row, of ``_CHECKS``, that may be no better.
        seconds: for all of it, or None.
    """

    block_steps: int
    steps: int
    rows: int
    rate: float
    patience: int
    seconds: float | None
    seed: int


def repaired(
    model: nn.Module,
    original: nn.Module,
    context: Context,
    latents: Mapping[str, Latent],
    rows: tuple[Sequence[Batch], Sequence[Batch]],
    plan: Plan,
) -> dict[str, Any]:
    """Trains the latent layers, which stand in the model, with the norms and biases around them; the best state on the held-out
    rows is kept, that of the start included.

    First each block alone, first to last, then all of them with the model's output: squared errors over squares, of every block
    and of the output. Where rows have an attention mask, tokens are masked at random and padding is cut off.

    Args:
        original: the float model.
        latents: by path; rows: to learn from, held out.

    Returns:
        What there is to report.
    """
    blocks = [block for block in context.anatomy.blocks if _inside(latents, block)]
    every = [block.path for block in context.anatomy.blocks]
    share = None if plan.seconds is None else plan.seconds / (2 if plan.block_steps else 1)
    told: dict[str, Any] = {}
    maker = _Batches(original, context.call, rows, plan)
    if plan.block_steps:
        told["blocks"] = {}
        for number, block in enumerate(blocks):
            lesson = LiveLesson(original, context.call, maker.made(plan.block_steps, number), [block.path])
            rates = _rates(model, latents, [block], plan.rate, block)
            course = _course(plan, plan.block_steps, None if share is None else share / len(blocks))
            taught = distil(model, context.call, lesson, rates, every, course, _said(context, f"repair of {block.path}"))
            told["blocks"][block.path] = taught.json()
            _warn(context, f"the repair of {block.path}", taught, plan.rate)
    if plan.steps:
        lesson = LiveLesson(original, context.call, maker.made(plan.steps, len(blocks)), [b.path for b in blocks], "features")
        rates = _rates(model, latents, blocks, plan.rate)
        taught = distil(model, context.call, lesson, rates, every, _course(plan, plan.steps, share), _said(context, "repair"))
        told["whole"] = taught.json()
        _warn(context, "the repair", taught, plan.rate)
    return told


def _course(plan: Plan, steps: int, seconds: float | None) -> Course:
    return Course(1, steps, plan.rows, checks=_CHECKS, patience=plan.patience, seconds=seconds, betas=(0.9, 0.98), seed=plan.seed)


def _said(context: Context, what: str) -> Callable[[int, int, str], None]:
    return lambda done, total, _: context.progress(done, total, what)


def _warn(context: Context, what: str, taught: Taught, rate: float) -> None:
    """Says that it diverged, or that it was no use."""
    broke = "diverged" in taught.stopped or "finite" in taught.stopped
    if not taught.steps or (taught.best_step and not broke):
        return
    text = f"{what} was stopped after {taught.steps} of {taught.planned} steps: {taught.stopped}; " if taught.stopped else ""
    text += f"the state after step {taught.best_step} is kept" if taught.best_step else "the state before it is kept"
    if not taught.best_step:
        text += f": on the held-out rows nothing was better. Try a lower rate than {rate:g}, or more calibration rows"
    context.report.setdefault("warnings", []).append(text if taught.stopped else f"after {what} {text}")


def _inside(latents: Mapping[str, Latent], block: Block) -> bool:
    return any(path.startswith(f"{block.path}.") for path in latents)


def _rates(
    model: nn.Module, latents: Mapping[str, Latent], blocks: Sequence[Block], rate: float, alone: Block | None = None
) -> dict[str, float]:
    """Names of what is trained, with the rate of each: a share of its own size, biases and norms of the size of weights."""
    places = tuple(f"{block.path}." for block in blocks)
    chosen = dict(latents) if alone is None else {path: one for path, one in latents.items() if path.startswith(places)}
    sizes = {path: _size(latent.weight) for path, latent in chosen.items()}
    usual = statistics.median(sizes.values())
    norms = {site.path for block in blocks for site in block.sites if site.kind == "norm"}
    rates: dict[str, float] = {}
    for name, parameter in model.named_parameters():
        owner, _, kind = name.rpartition(".")
        inside = name.startswith(places) or owner in chosen or owner.removesuffix(".activation") in chosen
        if not inside or parameter.dtype != torch.float32:
            continue
        if owner in chosen and kind in ("weight", "scale"):
            rates[name] = rate * max(_size(parameter), 1e-8)
        elif isinstance(model.get_submodule(owner), LatentActivation):
            rates[name] = rate * max(_size(parameter), 1e-3)
        elif isinstance(model.get_submodule(owner), BinaryProducts):
            rates[name] = rate * (_size(parameter) if kind.endswith("scale") else usual)
        elif owner in chosen or owner in norms:
            rates[name] = rate * usual
    return rates


def _size(parameter: Tensor) -> float:
    return float(parameter.detach().double().square().mean().sqrt())


class _Batches:
    """Makes batches to learn from and to judge on."""

    def __init__(
        self,
        model: nn.Module,
        call: Callable[[nn.Module, Batch], Tensor],
        rows: tuple[Sequence[Batch], Sequence[Batch]],
        plan: Plan,
    ) -> None:
        self.plan = plan
        self.trims = _trims(model, call, rows[0][0])
        self.rows = _whole(rows[0])
        generator = torch.Generator().manual_seed(plan.seed)
        self.held = list(self._cut(thinned(rows[1], generator)))

    def made(self, steps: int, stage: int) -> tuple[list[Batch], list[Batch]]:
        """``steps`` batches, each epoch shuffled and masked anew, and the held-out ones."""
        generator = torch.Generator().manual_seed(self.plan.seed + 1 + stage)
        found: list[Batch] = []
        while len(found) < steps:
            found += self._epoch(generator)
        return found[:steps], self.held

    def _epoch(self, generator: torch.Generator) -> list[Batch]:
        count = len(next(iter(self.rows.values())))
        order, size = torch.randperm(count, generator=generator), min(self.plan.rows, count)
        if self.trims:
            lengths = self.rows["attention_mask"].sum(1)[order]
            pool = size * _POOL
            order = torch.cat([part[lengths[at].argsort(stable=True)] for at, part in _parts(order, pool)])
        pieces = [order[start : start + size] for start in range(0, count - size + 1, size)]
        batches = [{name: tensor[piece] for name, tensor in self.rows.items()} for piece in pieces]
        shuffled = [batches[number] for number in torch.randperm(len(batches), generator=generator).tolist()]
        return list(self._cut(thinned(shuffled, generator)))

    def _cut(self, batches: Sequence[Batch]) -> Iterator[Batch]:
        for batch in batches:
            if not self.trims:
                yield batch
                continue
            length = int(batch["attention_mask"].ne(0).any(0).nonzero().amax()) + 1
            yield {name: tensor[:, :length] if tensor.dim() == 2 else tensor for name, tensor in batch.items()}


def _whole(batches: Sequence[Batch]) -> Batch:
    """All rows in one batch; those of shorter batches are padded to the longest, masked."""
    longest = max((batch["attention_mask"].shape[1] for batch in batches if "attention_mask" in batch), default=0)

    def even(tensor: Tensor, batch: Batch) -> Tensor:
        mask = batch.get("attention_mask")
        if mask is None or tensor.dim() != 2 or tensor.shape != mask.shape:
            return tensor
        return nn.functional.pad(tensor, (0, longest - tensor.shape[1]))

    return {name: torch.cat([even(batch[name], batch) for batch in batches]) for name in batches[0]}


def _parts(order: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    for start in range(0, len(order), size):
        part = order[start : start + size]
        yield torch.arange(start, start + len(part)), part


def _trims(model: nn.Module, call: Callable[[nn.Module, Batch], Tensor], batch: Batch) -> bool:
    """Whether columns that are padded in every row can go: all inputs are [B, T], and the model gives the same without."""
    mask = batch.get("attention_mask")
    if mask is None or any(tensor.shape != mask.shape for tensor in batch.values() if tensor.dim() > 1):
        return False
    row = {name: tensor[:1] for name, tensor in batch.items()}
    length = int(row["attention_mask"].ne(0).any(0).nonzero().amax()) + 1
    cut = {name: tensor[:, :length] if tensor.dim() == 2 else tensor for name, tensor in row.items()}
    with evaluating(model):
        whole, short = call(model, row), call(model, cut)
    if whole.dim() > 2 and whole.shape[1] == mask.shape[1]:
        whole = whole[:, :length]
    return whole.shape == short.shape and sqnr_db(whole, short) > _SAME_DB
