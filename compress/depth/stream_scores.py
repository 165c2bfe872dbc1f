"""How similar the residual stream is before and after each part of a model, over calibration rows, in one sweep."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from calibrate.capture import counted
from calibrate.modes import evaluating
from calibrate.signature import Batch
from compress.algorithms.similarity import Sums
from compress.depth.residual_stream import watched

__all__ = ["measure_runs", "measure_sublayers", "runs_alike"]

Call = Callable[[nn.Module, Batch], Tensor]


def measure_sublayers(model: nn.Module, call: Call, batches: Iterable[Batch], sinks: Sequence[str]) -> dict[str, Sums]:
    """For each sublayer, by its last projection: the stream before the join against the stream after it, and what was added.

    Padded positions do not count. In a model with parallel branches each is judged as if it alone joined.
    """
    found = {sink: Sums() for sink in sinks}
    mask: list[Tensor | None] = [None]

    def heard(sink: str, before: Tensor, added: Tensor) -> None:
        axis = 1 if before.dim() == 4 and isinstance(model.get_submodule(sink), nn.Conv2d) else -1
        stream, more = before.movedim(axis, -1), added.movedim(axis, -1)
        valid = counted(stream, mask[0])
        if valid is not None:
            stream, more = stream[valid], more[valid]
        stream, more = stream.reshape(-1, stream.shape[-1]).float(), more.reshape(-1, more.shape[-1]).float()
        found[sink].add(stream, stream + more, more)

    with evaluating(model):
        for batch in batches:
            mask[0] = batch.get("attention_mask")
            with watched(model, sinks, heard):
                call(model, batch)
    return found


def measure_runs(model: nn.Module, call: Call, batches: Iterable[Batch], runs: Mapping[int, tuple[str, str]]) -> dict[int, Sums]:
    """For each run of blocks (first path, last path): the stream before the first against the stream after the last."""
    found = {key: Sums() for key in runs}
    starts: dict[str, Tensor] = {}

    def entered(path: str, x: Tensor) -> None:
        starts[path] = x.clone()

    def left(path: str, x: Tensor, mask: Tensor | None) -> None:
        for key, (first, last) in runs.items():
            if last == path and first in starts and starts[first].shape == x.shape:
                before, after = starts[first].float(), x.float()
                valid = counted(x, mask)
                if valid is not None:
                    before, after = before[valid], after[valid]
                if x.dim() == 4 and mask is None and _channels_first(model, path):
                    before, after = before.movedim(1, -1), after.movedim(1, -1)
                found[key].add(before.reshape(-1, before.shape[-1]), after.reshape(-1, after.shape[-1]))

    paths = [path for run in runs.values() for path in run]
    with evaluating(model):
        for batch in batches:
            starts.clear()
            mask = batch.get("attention_mask")
            with _at(model, paths, entered, partial(left, mask=mask)):
                call(model, batch)
    return found


def runs_alike(model: nn.Module, run: Callable[[], Tensor], paths: Sequence[str]) -> dict[str, str]:
    """For each block why its input and output cannot be compared; "": they can."""
    shapes: dict[str, list[tuple[int, ...]]] = {path: [] for path in paths}
    calls = dict.fromkeys(paths, 0)

    def left(path: str, x: Tensor) -> None:
        calls[path] += 1
        shapes[path].append(tuple(x.shape))

    with evaluating(model), _at(model, paths, lambda path, x: shapes[path].append(tuple(x.shape)), left):
        run()
    return {path: _why(calls[path], shapes[path]) for path in paths}


def _why(calls: int, shapes: list[tuple[int, ...]]) -> str:
    if calls != 1:
        return f"it runs {calls} times with the same weights" if calls else "it does not run"
    if len(shapes) != 2:
        return "its input is no tensor"
    return "" if shapes[0] == shapes[1] else f"it makes {list(shapes[1])} of {list(shapes[0])}"


def _channels_first(model: nn.Module, path: str) -> bool:
    return any(isinstance(module, nn.Conv2d) for module in model.get_submodule(path).modules())


@contextmanager
def _at(
    model: nn.Module, paths: Iterable[str], entered: Callable[[str, Tensor], None], left: Callable[[str, Tensor], None]
) -> Iterator[None]:
    """Is told the first tensor that each module takes, and the first that it gives; leaves no hook behind."""
    handles = []

    def before(path: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            x = _first(args) if _first(args) is not None else _first(kwargs.get("hidden_states"))
            if x is not None:
                entered(path, x)

        return hook

    def after(path: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            x = _first(output)
            if x is not None:
                left(path, x)

        return hook

    for path in dict.fromkeys(paths):
        module = model.get_submodule(path)
        handles += [
            module.register_forward_pre_hook(before(path), with_kwargs=True),
            module.register_forward_hook(after(path)),
        ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _first(value: Any) -> Tensor | None:
    if isinstance(value, Tensor):
        return value
    if isinstance(value, (tuple, list)):
        return next((found for entry in value if (found := _first(entry)) is not None), None)
    return None
