"""How much each site hurts: the loss at the model's outputs when this site alone is quantized, without labels.

The parts that run before a site give what they gave before (``compress.width.restart``), so that a site at the end costs little.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from calibrate.capture import counted
from calibrate.modes import evaluating
from calibrate.signature import Batch
from compress.depth.grafts import grafting
from compress.quantization.bit_groups import FLOAT, BitGroup
from compress.quantization.quantized_sites import plan_sites
from compress.quantization.rounded_layers import site_layers
from compress.rehearsal import stand_in
from compress.surgery import Surgery, parent_of
from compress.width.restart import MOST_BYTES, Restart, parts

if TYPE_CHECKING:
    from compress.layers.conversion import QuantizedLayer
    from compress.passes.contract import Context
    from compress.passes.quantize import Quantize

__all__ = ["Loss", "Reference", "Sensitivity", "decibels", "losses_alone", "measure"]

_LOST = 1e12
"""The noise of outputs that are not finite."""


@dataclass(frozen=True)
class Loss:
    """What is lost at the outputs.

    Attributes:
        noise: sum of squared errors over the sum of squares of the float outputs.
        kl: mean Kullback-Leibler divergence of the softmax of the last dimension, in nats; None for single scores. It means
            something where that dimension holds logits.
        agreement: share of rows (tokens) whose largest output is the same; None for single scores.
    """

    noise: float
    kl: float | None = None
    agreement: float | None = None

    def json(self) -> dict[str, float | None]:
        return {"db": decibels(self.noise), "noise": self.noise, "kl": self.kl, "agreement": self.agreement}


@dataclass
class Reference:
    """The rows on which losses are measured, and what the float model gives for them."""

    call: Callable[[nn.Module, Batch], Tensor]
    batches: list[Batch]
    outputs: list[Tensor]

    @property
    def rows(self) -> int:
        return sum(_rows(batch) for batch in self.batches)

    def loss(self, model: nn.Module) -> Loss:
        """Of a whole model."""
        with evaluating(model):
            return self.compared(self.call(model, batch) for batch in self.batches)

    def compared(self, given: Iterable[Tensor]) -> Loss:
        """Of outputs, one for each batch; padded positions do not count."""
        sums = _Sums()
        for batch, wanted, got in zip(self.batches, self.outputs, given, strict=True):
            sums.add(wanted, got, counted(wanted, batch.get("attention_mask")))
        return sums.loss


@dataclass
class Sensitivity:
    """The loss of every group at every setting.

    Attributes:
        groups, losses: in one order.
        reference: the rows and the float outputs.
    """

    groups: list[BitGroup]
    losses: list[dict[str, Loss]]
    reference: Reference

    @property
    def noises(self) -> list[dict[str, float]]:
        """What each group loses at each setting, as one number."""
        return [{name: loss.noise for name, loss in losses.items()} for losses in self.losses]

    def json(self) -> list[dict[str, Any]]:
        """One entry for each group, in the model's order."""
        return [
            {
                "sites": list(group.paths),
                "role": group.role,
                "settings": {name: {"bytes": group.sizes[name], **found[name].json()} for name in group.settings},
                "refused": dict(group.refused),
            }
            for group, found in zip(self.groups, self.losses, strict=True)
        ]


@dataclass
class _Sums:
    signal: float = 0.0
    noise: float = 0.0
    kl: float = 0.0
    same: int = 0
    rows: int = 0
    classes: bool = True

    def add(self, wanted: Tensor, given: Tensor, valid: Tensor | None) -> None:
        wanted, given = (x.double() if valid is None else x[valid].double() for x in (wanted, given))
        self.signal += float(wanted.square().sum())
        self.noise += float((given - wanted).square().sum())
        self.classes &= wanted.dim() > 1 and wanted.shape[-1] > 1
        if self.classes:
            first, second = wanted.log_softmax(-1), given.log_softmax(-1)
            self.kl += float((first.exp() * (first - second)).sum())
            self.same += int(((wanted.argmax(-1) == given.argmax(-1)) & given.isfinite().all(-1)).sum())
            self.rows += wanted.shape[:-1].numel()

    @property
    def loss(self) -> Loss:
        noise = self.noise / max(self.signal, 1e-300)
        noise = min(noise, _LOST) if math.isfinite(noise) else _LOST
        if not (self.classes and self.rows):
            return Loss(noise)
        kl = self.kl / self.rows
        return Loss(noise, max(kl, 0.0) if math.isfinite(kl) else None, self.same / self.rows)


def measure(
    step: Quantize, model: nn.Module, context: Context, groups: Sequence[BitGroup], rows: int, said: str = "sites measured"
) -> Sensitivity:
    """The loss of each group at each of its settings while everything else stays float.

    The model itself is not changed. Layers are made as ``step`` makes them, from all calibration rows.

    Args:
        step: without ``mixed`` and ``max_drop``.
        rows: on so many calibration rows losses are measured, spread evenly over them in whole batches.
    """
    trial = stand_in(model)
    apart = replace(context, report={}, surgery=Surgery())
    blocks = [block.path for block in context.anatomy.blocks]
    restart = Restart(trial, context.call, parts(blocks, (path for group in groups for path in group.paths)))
    by_path = {path: group for group in groups for path in group.paths}
    settings = {path: [one for one in group.settings.values() if one.weights != FLOAT] for path, group in by_path.items()}
    known = {job.site.path for job in plan_sites(step, model, context.anatomy)[0]}
    waiting: dict[str, dict[str, list[QuantizedLayer]]] = {}
    found: dict[str, dict[str, Loss]] = {}
    reference: Reference | None = None
    for path, layers in site_layers(step, trial, apart, {path: settings.get(path, []) for path in known}):
        if path not in by_path:
            continue
        if reference is None:  # only now: factors may have been folded into the trial's parameters
            reference = _remembered(restart, trial, context, rows)
        group = by_path[path]
        ready = waiting.setdefault(group.name, {})
        ready[path] = layers
        if len(ready) == len([one for one in group.paths if one in known]):
            found[group.name] = _losses(restart, reference, trial, group, waiting.pop(group.name))
            context.progress(len(found), len(groups), said)
    assert reference is not None
    return Sensitivity(list(groups), [found[group.name] for group in groups], reference)


def losses_alone(
    model: nn.Module,
    context: Context,
    layers: Mapping[str, nn.Module],
    rows: int,
    progress: Callable[[int, int, str], None] = lambda done, total, what: None,
) -> dict[str, Loss]:
    """What is lost at the outputs when one layer alone stands in the place of the module at its path, for each."""
    restart = Restart(model, context.call, parts((block.path for block in context.anatomy.blocks), layers))
    reference = _remembered(restart, model, context, rows)
    found = {}
    for number, (path, layer) in enumerate(layers.items()):
        start = restart.start([path])
        with evaluating(model), grafting(model, {path: layer}):
            found[path] = reference.compared(restart.run(index, start).output for index in range(len(reference.batches)))
        progress(number + 1, len(layers), "sites measured")
    return found


def decibels(noise: float) -> float | None:
    """SQNR of a relative noise; None where there is none."""
    return -10 * math.log10(noise) if noise > 0 else None


def _losses(
    restart: Restart, reference: Reference, model: nn.Module, group: BitGroup, layers: Mapping[str, list[QuantizedLayer]]
) -> dict[str, Loss]:
    start = restart.start(group.paths)
    found = {}
    rounded = [name for name, options in group.settings.items() if options.weights != FLOAT]
    for number, name in enumerate(rounded):
        chosen = {path: some[number] for path, some in layers.items()}
        with evaluating(model), _in_place(model, chosen):
            found[name] = reference.compared(restart.run(index, start).output for index in range(len(reference.batches)))
    if FLOAT in group.settings:
        found[FLOAT] = Loss(0.0, None if not found else 0.0, None if not found else 1.0)
    return {name: found[name] for name in group.settings}


def _remembered(restart: Restart, model: nn.Module, context: Context, rows: int) -> Reference:
    """Runs the rows that are measured through the float model; what its parts give is remembered, up to a limit."""
    batches = _spread(list(context.calibration()), rows)
    held = 0
    with evaluating(model):
        for number, batch in enumerate(batches):
            if number and held * (number + 1) / number > MOST_BYTES:  # fewer rows of a large model, but always a batch
                batches = batches[:number]
                break
            restart.add(batch)
            held += sum(tensor.nbytes for tensor in restart.reference(number).features.values())
        for path in restart.order:
            restart.exact(path)
    return Reference(context.call, batches, [restart.reference(number).output for number in range(len(batches))])


def _spread(batches: list[Batch], rows: int) -> list[Batch]:
    """Whole batches, evenly spread, with at least so many rows where there are as many; the last one is cut to fit."""
    sizes = [_rows(batch) for batch in batches]
    if sum(sizes) <= rows:
        return batches
    wanted = max(1, math.ceil(rows * len(batches) / sum(sizes)))
    chosen = [batches[number * len(batches) // wanted] for number in range(wanted)]
    over = sum(map(_rows, chosen)) - rows
    last = chosen[-1]
    if over > 0:
        chosen[-1] = {name: tensor[: max(1, _rows(last) - over)] for name, tensor in last.items()}
    return chosen


@contextmanager
def _in_place(model: nn.Module, layers: Mapping[str, QuantizedLayer]) -> Iterator[None]:
    """The layers stand in the model, wherever the modules that they stand for do; equal grids share codes, as they will."""
    before = {path: model.get_submodule(path) for path in layers}
    first: dict[Any, Any] = {}
    for layer in layers.values():
        grid = layer.quantized_weight.grid
        layer.quantized_weight = first.setdefault(grid, layer.quantized_weight)
        layer.eval()
    places = [
        (*parent_of(model, path), layers[own])
        for path, module in model.named_modules(remove_duplicate=False)
        for own, old in before.items()
        if module is old
    ]
    try:
        for parent, name, layer in places:
            setattr(parent, name, layer)
        yield
    finally:
        for parent, name, layer in places:
            own = next(path for path, made in layers.items() if made is layer)
            setattr(parent, name, before[own])


def _rows(batch: Batch) -> int:
    return next(iter(batch.values())).shape[0]
