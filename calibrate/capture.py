"""Runs batches once through a model and gathers statistics of what named modules receive; leaves no hook behind."""

from __future__ import annotations

import itertools
import math
import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from calibrate.errors import UserError
from calibrate.modes import evaluating
from calibrate.ranges import Observer
from calibrate.signature import Batch

__all__ = [
    "Captured",
    "Enough",
    "capture",
    "channels_last",
    "counted",
    "given",
    "received",
    "shared_inputs",
    "split",
    "visiting",
]

Call = Callable[[nn.Module, Batch], Any]


class Enough(Exception):
    """Raised in a hook once everything that was asked has run: whoever called the model suppresses it.

    The rest of the model then never runs, which takes most of the time where the module asked is an early one.
    """


@dataclass(frozen=True)
class Captured:
    """What one sweep gathered.

    Attributes:
        observers: for each requested path its observers; sites that see the same tensor hold the same objects.
        shared: for each path whose tensor another site saw before it, that site.
        rows: how many rows went through the model.
        padding_counted: sites whose input has no [batch, tokens] layout although the batches carry an attention mask,
            so that padded positions could not be told apart there.
        silent: requested paths that never ran.
    """

    observers: Mapping[str, Sequence[Observer]]
    shared: Mapping[str, str]
    rows: int
    padding_counted: tuple[str, ...] = ()
    silent: tuple[str, ...] = ()


def capture(
    model: nn.Module,
    call: Call,
    batches: Iterable[Batch],
    requests: Mapping[str, Sequence[Observer]],
    *,
    batch_size: int | None = None,
    progress: Callable[[int], None] = lambda rows: None,
    whole: bool = True,
) -> Captured:
    """Feeds what the module at each path receives, as [N, C], to the observers requested there: one sweep for all.

    Positions whose ``attention_mask`` is 0 do not count where the input is [batch, tokens, ...] or [batch * tokens, C].
    Inputs of convolutions are taken with their channels last. Nothing is stored but the observers' own states, so that
    memory does not grow with the number of rows. The model runs in eval mode and ``torch.inference_mode``; its modes
    are put back and the hooks taken off in any case.

    Args:
        call: runs the model on one batch.
        batch_size: batches are cut into pieces of at most this many rows; None leaves them.
        progress: is told the number of rows done.
        whole: False leaves each batch when the last requested site has its input, as counted on one row.

    Raises:
        UserError: there is no batch, or a counted position holds NaN or infinity (names the site, the batch, the row).
    """
    pieces = iter(split(batches, batch_size))
    first = next(pieces, None)
    if first is None:
        raise UserError("calibration", "there are no rows", "Name at least one row under data.calibration.")
    asked = {path: tuple(observer.key for observer in requests[path]) for path in requests}
    leaders = shared_inputs(model, call, first, asked)
    with evaluating(model):
        sweep = _Sweep({path: requests[path] for path in requests if leaders.get(path, path) == path})
        if not whole:
            sweep.last = _inputs_in_one_call(model, call, first, sweep.requests)
        with visiting(model, sweep.requests, sweep.observe):
            for number, batch in enumerate(itertools.chain([first], pieces)):
                sweep.start(number, batch)
                with suppress(Enough):
                    call(model, batch)
                progress(sweep.rows)
    shared = {path: leader for path, leader in leaders.items() if path != leader}
    return Captured(
        observers={path: requests[shared.get(path, path)] for path in requests},
        shared=shared,
        rows=sweep.rows,
        padding_counted=tuple(path for path in sweep.requests if path in sweep.unmasked),
        silent=tuple(path for path in requests if shared.get(path, path) not in sweep.ran),
    )


def shared_inputs(model: nn.Module, call: Call, batch: Batch, asked: Mapping[str, Hashable]) -> dict[str, str]:
    """For each path that runs, the first one that is asked the same and receives the very same tensors.

    Args:
        batch: its first row is run.
        asked: module paths and, for each, what is asked there: only equal ones share.
    """
    seen: dict[int, tuple[weakref.ref[Tensor], int]] = {}
    received: dict[str, list[int]] = {path: [] for path in asked}
    numbers = itertools.count()

    def note(path: str, module: nn.Module, x: Tensor) -> None:
        known = seen.get(id(x))
        if known is None or known[0]() is not x:
            known = seen[id(x)] = (weakref.ref(x), next(numbers))
        received[path].append(known[1])

    with evaluating(model), visiting(model, asked, note):
        call(model, {name: tensor[:1] for name, tensor in batch.items()})
    leaders: dict[tuple[Any, ...], str] = {}
    found = {}
    for path, tensors in received.items():
        if tensors:
            layout = _channel_axis(model.get_submodule(path))
            found[path] = leaders.setdefault((tuple(tensors), asked[path], layout), path)
    return found


def split(batches: Iterable[Batch], size: int | None) -> Iterator[Batch]:
    """The same rows in batches of at most ``size`` rows."""
    for batch in batches:
        rows = _rows(batch)
        for start in range(0, rows, size or max(rows, 1)):
            yield {name: tensor[start : start + (size or rows)] for name, tensor in batch.items()}


def received(model: nn.Module, call: Call, path: str, batch: Batch) -> Tensor:
    """The first tensor that the module at ``path`` receives when it is first called; the model stops there.

    Raises:
        LookupError: the module never runs.
    """
    seen: list[Tensor] = []

    def note(path: str, module: nn.Module, x: Tensor) -> None:
        seen.append(x.detach())
        raise Enough

    with visiting(model, [path], note), suppress(Enough):
        call(model, batch)
    return seen[0]


def given(model: nn.Module, call: Call, path: str, batch: Batch) -> Tensor:
    """The tensor that the module at ``path`` gives when it is first called; the model stops there.

    Raises:
        LookupError: the module never runs.
    """
    seen: list[Tensor] = []

    def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
        seen.append(output.detach())
        raise Enough

    handle = model.get_submodule(path).register_forward_hook(hook)
    try:
        with suppress(Enough):
            call(model, batch)
    finally:
        handle.remove()
    return seen[0]


def counted(x: Tensor, mask: Tensor | None) -> Tensor | None:
    """Which positions of ``x`` count: booleans over its leading dimensions; None where the mask does not fit: all do.

    Args:
        x: [B, T, ..., C] or [B * T, C].
        mask: [B, T], zero where padded.
    """
    if mask is None or mask.dim() != 2:
        return None
    if x.dim() >= 3 and x.shape[:2] == mask.shape:
        return mask != 0
    if x.dim() == 2 and mask.shape[1] > 1 and x.shape[0] == mask.numel():
        return mask.reshape(-1) != 0
    return None


@dataclass
class _Sweep:
    """Where the sweep is: the batch, its mask, its first row; which sites ran; inputs seen, and after how many to stop."""

    requests: Mapping[str, Sequence[Observer]]
    rows: int = 0
    number: int = 0
    size: int = 0
    mask: Tensor | None = None
    numbers: Tensor | None = None
    ran: set[str] = field(default_factory=set)
    unmasked: set[str] = field(default_factory=set)
    seen: int = 0
    last: int | None = None

    def start(self, number: int, batch: Batch) -> None:
        self.number, self.size, self.mask = number, _rows(batch), batch.get("attention_mask")
        self.numbers = batch.get("calibration_row")
        self.rows += self.size
        self.seen = 0

    def observe(self, path: str, module: nn.Module, x: Tensor) -> None:
        self._take(path, module, x)
        self.seen += 1
        if self.seen == self.last:
            raise Enough

    def _take(self, path: str, module: nn.Module, x: Tensor) -> None:
        self.ran.add(path)
        valid = counted(x, self.mask)
        if valid is None and self.mask is not None:
            self.unmasked.add(path)
        values = channels_last(module, x)
        matrix = (values if valid is None else values[valid.to(values.device)]).reshape(-1, values.shape[-1])
        if matrix.numel() == 0:
            return
        low, high = torch.aminmax(matrix)
        if not (math.isfinite(low) and math.isfinite(high)):
            raise self._broken(path, values, valid)
        for observer in self.requests[path]:
            observer.update(matrix)

    def _broken(self, path: str, values: Tensor, valid: Tensor | None) -> UserError:
        bad = ~values.isfinite()
        if valid is not None:
            bad &= valid.to(bad.device).reshape(*valid.shape, *[1] * (bad.dim() - valid.dim()))
        position = int(bad.reshape(bad.shape[0], -1).any(1).nonzero()[0])
        kind = "NaN" if bool((values.isnan() & bad).any()) else "infinity"
        where = f"batch {self.number}"
        if values.shape[0] % self.size == 0:
            place = position * self.size // values.shape[0]
            row = self.rows - self.size + place if self.numbers is None else int(self.numbers[place])
            where += f", row {row} of the calibration rows (counted from 0)"
        return UserError(
            path,
            f"{kind} in its input in {where}",
            "Take that row out, or mend the model: it is not quantized here yet.",
        )


def _inputs_in_one_call(model: nn.Module, call: Call, batch: Batch, paths: Iterable[str]) -> int:
    """How many inputs the modules at these paths receive in one call."""
    seen: list[str] = []
    with visiting(model, paths, lambda path, module, x: seen.append(path)):
        call(model, {name: tensor[:1] for name, tensor in batch.items()})
    return len(seen)


@contextmanager
def visiting(model: nn.Module, paths: Iterable[str], visit: Callable[[str, nn.Module, Tensor], None]) -> Iterator[None]:
    """Tells ``visit`` the path, the module and the first tensor that it receives, each time one of the modules runs."""

    def hook(path: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            visit(path, module, next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)))

        return before

    handles = []
    try:
        for path in paths:
            handles.append(model.get_submodule(path).register_forward_pre_hook(hook(path), with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


_CHANNELS_FIRST = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.GroupNorm)


def _channel_axis(module: nn.Module) -> int:
    return 1 if isinstance(module, _CHANNELS_FIRST) else -1


def channels_last(module: nn.Module, x: Tensor) -> Tensor:
    """What a module receives as [..., C], whether its channels are the second dimension, as a convolution's, or the last."""
    return x.detach().movedim(_channel_axis(module), -1)


def _rows(batch: Batch) -> int:
    return next(iter(batch.values())).shape[0]
