"""The projections that add to the residual stream make up for what was taken out before them.

One after the other their weights become those with which the stream behind them comes nearest to the float model, in least
squares over the calibration rows (``compress.width.repair``). They stay only where the output on held-out rows gets nearer too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress

from torch import Tensor, nn

from calibrate.capture import Enough
from calibrate.modes import frozen
from calibrate.signature import Batch
from compress.anatomy import Anatomy
from compress.depth.repair import Judge
from compress.depth.residual_stream import watched
from compress.depth.sublayers import PARTS, Sublayer, find_sublayers
from compress.surgery import Edit
from compress.whereabouts import Whereabouts
from compress.width.repair import repair

__all__ = ["Original", "refit"]

Call = Callable[[nn.Module, Batch], Tensor]


class Original:
    """The model before the pass, around the same tensors, and its sublayers in the order in which they join the stream."""

    def __init__(self, model: nn.Module, anatomy: Anatomy) -> None:
        from compress.rehearsal import stand_in

        self.model = stand_in(model)
        found = [one for part in PARTS for one in find_sublayers(self.model, anatomy, anatomy.blocks, part)]
        self.order = sorted((one for one in found if not one.unfit), key=lambda one: (one.block, PARTS.index(one.part)))
        self.tied = {site.path for site in anatomy.sites if site.tied} | {site.tied for site in anatomy.sites if site.tied}
        self.where = Whereabouts.of(self.model, [one.sink for one in found])

    def behind(self, gone: Sequence[Sublayer], blocks: Sequence[int]) -> list[Sublayer]:
        """The sublayers that are left behind the first of those that are gone."""
        sinks = {one.sink for one in gone}
        found, missing = [], False
        for one in self.order:
            if one.sink in sinks or one.block in blocks:
                missing = True
            elif missing:
                found.append(one)
        return [one for one in found if one.constant == one.sink and not one.obstacle and one.sink not in self.tied]


def refit(
    model: nn.Module,
    call: Call,
    original: Original,
    after: Sequence[Sublayer],
    edits: Sequence[Edit],
    rows: tuple[Sequence[Batch], Sequence[Batch]],
    judge: Judge,
    progress: Callable[[int, int, str], None] = lambda done, total, what: None,
) -> list[str]:
    """Refits the last projections of the given sublayers, in order; returns the paths, in the float model, of those that stay."""
    kept = []
    level = judge.sqnr_db(model)
    for number, one in enumerate(after):
        progress(number, len(after), f"repair {one.sink}")
        path = original.where.after(one.sink, edits)
        if path is None:
            continue
        module = model.get_submodule(path)
        old = dict(module._parameters)
        with frozen(model), frozen(original.model):  # the weights that are made stay, and may get gradients
            done = repair(model, call, path, _behind(model, call, original, one.sink, path), *rows)
        if done.ridge is None:
            continue
        now = judge.sqnr_db(model)
        if now > level:
            level = now
            kept.append(one.sink)
        else:
            module._parameters.update(old)
    return kept


def _behind(model: nn.Module, call: Call, original: Original, before: str, now: str) -> Callable[[Batch], Tensor]:
    """What the projection should give: the float model's stream behind it, less the stream as it is now before it."""

    def wanted(batch: Batch) -> Tensor:
        stream, added = _join(original.model, call, before, batch)
        return stream + added - _join(model, call, now, batch)[0]

    return wanted


def _join(model: nn.Module, call: Call, sink: str, batch: Batch) -> tuple[Tensor, Tensor]:
    seen: list[tuple[Tensor, Tensor]] = []

    def heard(path: str, stream: Tensor, added: Tensor) -> None:
        seen.append((stream.clone(), added.clone()))
        raise Enough

    with suppress(Enough), watched(model, [sink], heard):
        call(model, batch)
    return seen[-1]
