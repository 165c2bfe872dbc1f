"""Scores of heads and neurons: how much the model would miss each.

The trajectory score of a unit is the distance, summed over the outputs of its own block and of the later ones, and at the logits,
between the model and the model without the unit (``compress.algorithms.trajectory``). Switching off each of ten thousand neurons
takes hours; so all units are first scored to second order, from a few backward passes, and then each block's scores are scaled to
what some of its units, switched off for real, do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from calibrate.capture import split
from calibrate.signature import Batch
from compress.algorithms import trajectory
from compress.layers.conversion import is_conv1d, outputs_of
from compress.width.restart import Restart, Run
from compress.width.units import Units, masked

if TYPE_CHECKING:
    from compress.passes.contract import Context

__all__ = ["Distance", "exact_scores", "magnitudes", "random_scores", "scored", "trajectory_scores"]

_POSITIONS = 128
"""Positions of a row that are compared; of longer rows as many are drawn."""
_GROUPS = 4
"""Groups of a block's neurons that are switched off together to scale the scores."""
_APART, _SEEDS = 2_654_435_761, (1 << 32) - 1
"""Between the seeds of two runs; and torch's generator on the CPU looks at 32 bits of a seed."""

Progress = Callable[[int, int, str], None]


def scored(model: nn.Module, context: Context, units: Sequence[Units], score: str, rows: int) -> list[Tensor]:
    """Scores of units by the method that a recipe names, [units] each.

    Args:
        score: ``trajectory``, ``magnitude`` or ``random``.
        rows: calibration rows that a trajectory score looks at.
    """
    if score == "random":
        return random_scores(units, context.seed)
    if score == "magnitude":
        return [magnitudes(model, one) for one in units]
    paths = [block.path for block in context.anatomy.blocks]
    logits = bool(context.anatomy.roles.get("head")) and context.signature.output in ("tensor", "logits")
    batches = _first(context.calibration(), rows)
    return trajectory_scores(
        model, context.call, batches, units, paths, logits=logits, seed=context.seed, progress=context.progress
    )


def magnitudes(model: nn.Module, units: Units) -> Tensor:
    """Squared weights that read a unit times the mean squared weights that make it, [units]: a score without data."""
    sink = model.get_submodule(units.sink)
    weight = sink.get_parameter("weight").detach()
    columns = weight.square().flatten(2).sum(2) if weight.dim() > 2 else weight.square()
    read = (columns.sum(1) if is_conv1d(sink) else columns.sum(0))[units.columns].sum(1)
    made = torch.zeros_like(read)
    for path, rows in units.rows.items():
        module = model.get_submodule(path)
        weight = module.get_parameter("weight").detach()
        if weight.dim() > 1:
            matrix = weight.T if is_conv1d(module) else weight.flatten(1)
            made += matrix.square().sum(1)[rows].sum(1)
    return (read * made).double()


def random_scores(units: Sequence[Units], seed: int) -> list[Tensor]:
    """Scores that mean nothing: the control. In proportion to what a unit costs, so that no kind of unit is spared."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(len(one), generator=generator, dtype=torch.float64) * one.flops for one in units]


def trajectory_scores(
    model: nn.Module,
    call: Callable[[nn.Module, Batch], Tensor],
    batches: Iterable[Batch],
    units: Sequence[Units],
    paths: Sequence[str],
    *,
    logits: bool = True,
    seed: int = 0,
    probes: int = 4,
    weight: float = 1.0,
    progress: Progress = lambda done, total, what: None,
) -> list[Tensor]:
    """The trajectory score of every unit, [units] each: 0 for a unit that changes nothing.

    Args:
        paths: of the blocks, by ``Units.block``.
        logits: whether the output holds logits (divergence) or features (relative error).
        weight: of the distance of the outputs, in units of that of the features.
    """
    distance = Distance(logits, seed)
    restart = Restart(model, call, paths)
    totals = [torch.zeros(2, len(one), dtype=torch.float64) for one in units]
    rows = 0
    kept = list(batches)
    for number, batch in enumerate(kept):
        progress(number, len(kept), "scores to second order")
        _add_second_order(model, call, batch, units, paths, distance, rows, probes, totals)
        rows += next(iter(batch.values())).shape[0]
    with torch.no_grad():
        for batch in kept:
            restart.add(batch)
        _scale(model, restart, units, paths, distance, totals, rows, progress)
    return _joined(totals, weight)


def _first(batches: Iterable[Batch], rows: int) -> list[Batch]:
    """The first so many rows, in batches of at most 16: a batch is run with gradients."""
    found, left = [], rows
    for batch in split(batches, 16):
        if left <= 0:
            break
        found.append({name: tensor[:left] for name, tensor in batch.items()})
        left -= next(iter(batch.values())).shape[0]
    return found


@dataclass(frozen=True)
class Distance:
    """Between two runs of a model on one batch, and probes of it."""

    logits: bool
    seed: int

    def rows(self, reference: Run, other: Run, paths: Sequence[str], batch: Batch, widths: dict[str, int]) -> Tensor:
        """Distances of features and of outputs, [2, B]."""
        features = torch.zeros(other.output.shape[0], device=other.output.device)
        for path in paths:
            if path in reference.features and path in other.features:
                before, valid = self._positions(reference.features[path], batch, widths.get(path))
                after, _ = self._positions(other.features[path], batch, widths.get(path))
                features = features + trajectory.manifold_distance(before, after, valid)
        measure = trajectory.divergence if self.logits else trajectory.relative_error
        return torch.stack([features, measure(reference.output, other.output, _valid(other.output, batch))])

    def probes(self, run: Run, batch: Batch, first: int, draw: int, widths: dict[str, int]) -> tuple[Tensor, Tensor]:
        """Two numbers whose squared change is the distances of the features and of the outputs, in the mean over drawings."""
        rows = run.output.shape[0]
        seeds = [self.seed * _APART + (first + row << 8) + draw & _SEEDS for row in range(rows)]
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]

        def signs(*shape: int) -> Tensor:
            drawn = [torch.randint(0, 2, shape, generator=generator) for generator in generators]
            return (2 * torch.stack(drawn) - 1).to(run.output.dtype).to(run.output.device)

        features = run.output.new_zeros(())
        for path, tensor in run.features.items():
            positions, valid = self._positions(tensor, batch, widths.get(path))
            features = features + trajectory.manifold_probe(positions, valid, signs(*[positions.shape[1]] * 2))
        probe = trajectory.divergence_probe if self.logits else trajectory.relative_probe
        return features, probe(run.output, _valid(run.output, batch), signs(*run.output.shape[1:]))

    def _positions(self, tensor: Tensor, batch: Batch, width: int | None) -> tuple[Tensor, Tensor | None]:
        """Features as [B, T, C], and which positions count; of many positions some."""
        rows = next(iter(batch.values())).shape[0]
        if width is not None and tensor.dim() > 2 and tensor.shape[-1] != width and tensor.shape[1] == width:
            tensor = tensor.movedim(1, -1)
        features = tensor.reshape(rows, -1, tensor.shape[-1])
        mask = batch.get("attention_mask")
        valid = mask != 0 if mask is not None and mask.shape == features.shape[:2] else None
        if features.shape[1] > _POSITIONS:
            generator = torch.Generator().manual_seed(self.seed)
            chosen = torch.randperm(features.shape[1], generator=generator)[:_POSITIONS].to(features.device)
            features, valid = features[:, chosen], None if valid is None else valid[:, chosen]
        return features, valid


def exact_scores(
    model: nn.Module,
    restart: Restart,
    units: Units,
    groups: Sequence[Sequence[int]],
    paths: Sequence[str],
    distance: Distance,
    widths: dict[str, int],
) -> Tensor:
    """Distances of features and outputs for groups of units of one block, switched off for real, [2, groups]."""
    restart.exact(paths[units.block])
    found = torch.zeros(2, len(groups), dtype=torch.float64)
    rows = 0
    for number, batch in enumerate(restart.batches):
        rows += next(iter(batch.values())).shape[0]
        reference = restart.reference(number)
        for at, group in enumerate(groups):
            with masked(model, units, group):
                other = restart.run(number, paths[units.block])
            found[:, at] += distance.rows(reference, other, paths, batch, widths).double().sum(1).cpu()
    return found / rows


def _scale(
    model: nn.Module,
    restart: Restart,
    units: Sequence[Units],
    paths: Sequence[str],
    distance: Distance,
    totals: list[Tensor],
    rows: int,
    progress: Progress,
) -> None:
    """Heads get their exact score; scores of neurons are scaled by block to what groups of them do."""
    widths = _widths(model, units, paths)
    for number, (one, total) in enumerate(zip(units, totals, strict=True)):
        progress(number, len(units), f"{one.kind}s of block {one.block}")
        total /= rows
        if one.kind == "head":
            groups = [[unit] for unit in range(len(one))]
            total.copy_(exact_scores(model, restart, one, groups, paths, distance, widths))
            continue
        order = total.sum(0).argsort().tolist()
        count = min(_GROUPS, len(order))
        groups = [
            order[at * len(order) // (2 * count) : (at + 1) * len(order) // (2 * count)] or order[:1] for at in range(count)
        ]
        exact = exact_scores(model, restart, one, groups, paths, distance, widths)
        guessed = torch.stack([total[:, group].sum(1) for group in groups], 1)
        for term in range(2):
            usable = (exact[term] > 0) & (guessed[term] > 0)
            if usable.any():
                total[term] *= (exact[term][usable] / guessed[term][usable]).log().mean().exp()


def _joined(totals: list[Tensor], weight: float) -> list[Tensor]:
    """Both distances in one number: each in its mean over all units, so that neither is lost in the other."""
    every = torch.cat(totals, 1).clamp(min=0)
    means = every.mean(1)
    joined = []
    for total in totals:
        terms = [
            share * term.clamp(min=0) / mean for share, term, mean in zip((1.0, weight), total, means, strict=True) if mean > 0
        ]
        joined.append(sum(terms, torch.zeros(total.shape[1], dtype=torch.float64)))
    return joined


def _add_second_order(
    model: nn.Module,
    call: Callable[[nn.Module, Batch], Tensor],
    batch: Batch,
    units: Sequence[Units],
    paths: Sequence[str],
    distance: Distance,
    first: int,
    probes: int,
    totals: list[Tensor],
) -> None:
    """Adds what each unit changes in the two distances of each row, to second order, from backward passes."""
    rows = next(iter(batch.values())).shape[0]
    widths = _widths(model, units, paths)
    features: dict[str, Tensor] = {}
    switches: dict[str, Tensor] = {}
    handles = []
    for path in paths:
        handles.append(model.get_submodule(path).register_forward_hook(_feature(path, features)))
    for one in units:
        handles.append(model.get_submodule(one.sink).register_forward_pre_hook(_switch(one.sink, switches)))
    try:
        with torch.enable_grad():
            run = Run(features, call(model, batch))
            for draw in range(probes):
                for term, probe in enumerate(distance.probes(run, batch, first, draw, widths)):
                    if not probe.requires_grad:
                        continue
                    given = torch.autograd.grad(probe, list(switches.values()), retain_graph=True, allow_unused=True)
                    by_sink = dict(zip(switches, given, strict=True))
                    for one, total in zip(units, totals, strict=True):
                        change = by_sink[one.sink]
                        if change is not None:
                            by_row = change.reshape(rows, -1, change.shape[-1]).sum(1)
                            by_unit = by_row[:, one.columns.to(by_row.device)].sum(2).double()
                            total[term] += by_unit.square().sum(0).cpu() / probes
    finally:
        for handle in handles:
            handle.remove()


def _feature(path: str, features: dict[str, Tensor]) -> Any:
    from compress.width.restart import first_tensor

    def hook(module: nn.Module, inputs: Any, output: Any) -> None:
        features.setdefault(path, first_tensor(output))

    return hook


def _switch(path: str, switches: dict[str, Tensor]) -> Any:
    """Multiplies each channel of a sink's input by a one of its own, of which the gradient is asked."""

    def hook(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        x = inputs[0]
        if path not in switches:
            width = x.shape[1] if isinstance(module, nn.Conv2d) else x.shape[-1]
            switches[path] = torch.ones(x.shape[0], width, dtype=x.dtype, device=x.device, requires_grad=True)
        one = switches[path]
        shape = (
            (one.shape[0], one.shape[1], 1, 1)
            if isinstance(module, nn.Conv2d)
            else (one.shape[0], *[1] * (x.dim() - 2), one.shape[1])
        )
        return (x * one.reshape(shape), *inputs[1:])

    return hook


def _widths(model: nn.Module, units: Sequence[Units], paths: Sequence[str]) -> dict[str, int]:
    """Channels of each block's output, as far as its units tell."""
    found = {}
    for one in units:
        found[paths[one.block]] = outputs_of(model.get_submodule(one.sink))
    return found


def _valid(output: Tensor, batch: Batch) -> Tensor | None:
    mask = batch.get("attention_mask")
    return mask != 0 if mask is not None and output.dim() == 3 and mask.shape == output.shape[:2] else None
