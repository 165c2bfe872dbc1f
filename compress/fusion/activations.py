"""How alike the units of two models are on the same rows: correlations, gathered in one sweep in constant memory.

Shapes: S samples (rows times tokens), N units of the other model, M units of the anchor.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from calibrate.capture import counted, split
from calibrate.errors import UserError
from calibrate.modes import evaluating
from calibrate.signature import Batch
from compress.depth.residual_stream import watched
from compress.fusion.axes import Layout

__all__ = ["Activations", "listen"]

Call = Callable[[nn.Module, Batch], Tensor]
Heard = dict[tuple[str, int], Tensor]
"""What an axis carries, [S, units]; with a number where it is heard in several places (queries and keys)."""


@dataclass
class _Moments:
    """Of two lists of units over the same samples, around what they are in the mean of the first samples."""

    shift: tuple[Tensor, Tensor]
    count: int = 0
    sums: list[Tensor] = field(default_factory=lambda: [torch.zeros(())] * 5)

    def add(self, one: Tensor, other: Tensor) -> None:
        a, b = one.double() - self.shift[0], other.double() - self.shift[1]
        more = [a.sum(0), b.sum(0), a.square().sum(0), b.square().sum(0), a.T @ b]
        self.sums = [before + now for before, now in zip(self.sums, more, strict=True)]
        self.count += len(a)

    def squared_distance(self) -> Tensor:
        """[N, M]: mean square of the difference of standardized units; one that never changes counts as zero."""
        a, b, aa, bb, ab = (total / self.count for total in self.sums)
        spread = (aa - a.square()).clamp(min=0).sqrt(), (bb - b.square()).clamp(min=0).sqrt()
        alive = [one > 1e-7 * size.sqrt() for one, size in zip(spread, (aa, bb), strict=True)]
        scale = spread[0].clamp(min=1e-150)[:, None] * spread[1].clamp(min=1e-150)
        correlation = torch.where(alive[0][:, None] & alive[1], (ab - a[:, None] * b) / scale, torch.zeros(()).double())
        return (alive[0].double()[:, None] + alive[1].double() - 2 * correlation).clamp(min=0)


@dataclass
class Activations:
    """What was gathered; it takes 8 bytes for each pair of units of one axis.

    Attributes:
        rows: that went through both models.
        loudness: mean absolute value of each unit of the anchor, by axis of the stream and its branches, [M].
    """

    rows: int = 0
    moments: dict[tuple[str, int], _Moments] = field(default_factory=dict)
    loudness: dict[str, Tensor] = field(default_factory=dict)

    def cost(self, *axes: str) -> Tensor:
        """[N, M]: root mean square over samples, and over the places where these axes are heard, of the difference between
        standardized units (the euclidean ground metric of the paper, up to a factor that is the same for all pairs)."""
        parts = [moments.squared_distance() for (axis, _), moments in self.moments.items() if axis in axes]
        return torch.stack(parts).mean(0).sqrt()


def listen(
    models: tuple[nn.Module, nn.Module],
    layouts: tuple[Layout, Layout],
    call: Call,
    batches: Iterable[Batch],
    rows: int,
    progress: Callable[[int, int, str], None],
) -> Activations:
    """Runs both models (the other, the anchor) on the same rows.

    Args:
        rows: most rows that are used.

    Raises:
        UserError: there are no rows, or what a layer adds never joins the residual stream.
    """
    found = Activations()
    for batch in split(batches, 16):
        size = min(rows - found.rows, next(iter(batch.values())).shape[0])
        part = {name: tensor[:size] for name, tensor in batch.items()}
        one, other = (_heard(model, layout, call, part) for model, layout in zip(models, layouts, strict=True))
        for key in one:
            shift = one[key][:64].double().mean(0), other[key][:64].double().mean(0)
            found.moments.setdefault(key, _Moments(shift)).add(one[key], other[key])
        for (axis, _), x in other.items():
            if axis.startswith(("stream.", "branch.")):
                found.loudness[axis] = found.loudness.get(axis, torch.zeros(())) + x.double().abs().sum(0)
        found.rows += size
        progress(found.rows, rows, "rows through both models")
        if found.rows >= rows:
            break
    if not found.rows:
        raise UserError("calibration", "there are no rows", "Name at least one row under data.calibration.")
    return found


def _heard(model: nn.Module, layout: Layout, call: Call, batch: Batch) -> Heard:
    heard: Heard = {}
    mask = batch.get("attention_mask")

    def samples(x: Tensor) -> Tensor:
        valid = counted(x, mask)
        return (x.detach() if valid is None else x.detach()[valid]).reshape(-1, x.shape[-1])

    def note(axis: str, x: Tensor) -> None:
        number = next(n for n in itertools.count() if (axis, n) not in heard)
        heard[axis, number] = samples(x)

    def after(pieces: list[tuple[str, int, int]]) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            for axis, start, size in pieces:
                note(axis, output[..., start : start + size])

        return hook

    def joined(sink: str, before: Tensor, added: Tensor) -> None:
        place = layout.sinks.index(sink)
        if (f"branch.{place + 1}", 0) not in heard:
            heard[f"stream.{place}", 0], heard[f"branch.{place + 1}", 0] = samples(before.clone()), samples(added.clone())
            if place + 1 == len(layout.sinks):
                heard[f"stream.{place + 1}", 0] = heard[f"stream.{place}", 0] + heard[f"branch.{place + 1}", 0]

    with ExitStack() as stack:
        for path, pieces in _asked(layout).items():
            stack.callback(model.get_submodule(path).register_forward_hook(after(pieces)).remove)
        stack.enter_context(evaluating(model))
        stack.enter_context(watched(model, layout.sinks, joined))
        call(model, batch)
    silent = [sink for place, sink in enumerate(layout.sinks) if (f"branch.{place + 1}", 0) not in heard]
    if silent:
        raise UserError(silent[0], "what it gives joins no residual stream", "Take metric: weights.")
    return heard


def _asked(layout: Layout) -> dict[str, list[tuple[str, int, int]]]:
    """By module path the axes inside its outputs, each with its place there; the stream is heard where it is joined."""
    asked: dict[str, list[tuple[str, int, int]]] = {}
    for axis, places in layout.made.items():
        if not axis.startswith(("stream.", "branch.")):
            for path, piece in places:
                asked.setdefault(path, []).append((axis, piece.start, piece.size))
    return asked
