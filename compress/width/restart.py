"""Runs a model again from one of its blocks on: what the blocks before it gave is remembered, not computed."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from calibrate.fidelity import sqnr_db
from calibrate.signature import Batch

__all__ = ["MOST_BYTES", "Restart", "Run", "first_tensor", "parts"]

_SAME_DB = 100.0
MOST_BYTES = 256_000_000
"""Most that who runs a model again should remember of what it and its blocks gave."""


@dataclass
class Run:
    """What a model gave for one batch: the outputs of its blocks in their first call, and its own."""

    features: dict[str, Tensor]
    output: Tensor


@dataclass
class _Record:
    batch: Batch
    output: Tensor
    calls: dict[str, list[Any]] = field(default_factory=dict)
    started: dict[str, int] = field(default_factory=dict)
    ended: dict[str, int] = field(default_factory=dict)


class Restart:
    """A model, some batches, and what each block gave for them.

    The model is run as it is, and only the blocks that were done before the given one starts answer from memory; so that
    nothing needs to be known of what is between blocks. Where that does not give the same outputs, as with a model that
    hands something on beside them, everything is computed again.

    Attributes:
        batches: the batches; references: what the unchanged model gives for each.
    """

    def __init__(self, model: nn.Module, call: Callable[[nn.Module, Batch], Tensor], paths: Sequence[str]) -> None:
        self._model, self._call, self._paths = model, call, list(paths)
        self._records: list[_Record] = []
        self._exact: dict[str, bool] = {}

    @property
    def batches(self) -> list[Batch]:
        return [record.batch for record in self._records]

    @property
    def order(self) -> list[str]:
        """Paths of the blocks in the order in which they run; without those that do not."""
        return sorted(self._records[0].started, key=self._records[0].started.__getitem__)

    def start(self, paths: Collection[str]) -> str:
        """The first block to run that is, or holds, one of the modules at these paths; "" where none does."""
        return next((block for block in self.order if any(_inside(path, block) for path in paths)), "")

    def add(self, batch: Batch) -> None:
        """Runs one more batch and remembers it."""
        self._records.append(_recorded(self._model, self._call, self._paths, batch))

    def begin(self, batch: Batch) -> None:
        """Forgets all batches but this one, which is run."""
        self._records = []
        self.add(batch)

    def reference(self, number: int) -> Run:
        record = self._records[number]
        return Run({path: first_tensor(calls[0]) for path, calls in record.calls.items()}, record.output)

    def run(self, number: int, path: str) -> Run:
        """The model on a batch, from the block at ``path`` on (as hooks or other changes make it there)."""
        record = self._records[number]
        return self._resumed(record, self._before(record, path) if self.exact(path) else {})

    def exact(self, path: str) -> bool:
        """Whether running from a block on gives what running the whole gives; asked of the unchanged model, once."""
        if path not in self._exact:
            record = self._records[0]
            level = sqnr_db(record.output, self._resumed(record, self._before(record, path)).output)
            self._exact[path] = level == math.inf or level > _SAME_DB
        return self._exact[path]

    def _resumed(self, record: _Record, before: dict[str, list[Any]]) -> Run:
        features: dict[str, Tensor] = {}
        handles = []
        for path in self._paths:
            if path not in before:
                handles.append(self._model.get_submodule(path).register_forward_hook(_keep(path, features)))
        try:
            with _answering(self._model, before):
                output = self._call(self._model, record.batch)
        finally:
            for handle in handles:
                handle.remove()
        return Run(features, output)

    def _before(self, record: _Record, path: str) -> dict[str, list[Any]]:
        start = record.started.get(path, 0)
        return {other: calls for other, calls in record.calls.items() if record.ended[other] < start}


def parts(blocks: Iterable[str], paths: Iterable[str]) -> list[str]:
    """The blocks, and those of the modules at ``paths`` that are in none of them."""
    blocks = list(blocks)
    return [*blocks, *(path for path in paths if not any(_inside(path, block) for block in blocks))]


def _inside(path: str, part: str) -> bool:
    return path == part or path.startswith(f"{part}.")


def _keep(path: str, features: dict[str, Tensor]) -> Any:
    def hook(module: nn.Module, inputs: Any, output: Any) -> None:
        features.setdefault(path, first_tensor(output))

    return hook


def first_tensor(output: Any) -> Tensor:
    """The first tensor of floats in what a block returned."""
    found = [leaf for leaf in _pytree.tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    return found[0]


def _copied(output: Any) -> Any:
    """The same with tensors of its own: what follows may work in place."""
    return _pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, output)


def _recorded(model: nn.Module, call: Callable[[nn.Module, Batch], Tensor], paths: list[str], batch: Batch) -> _Record:
    record = _Record(batch, torch.empty(0))
    clock = iter(range(1 << 40))
    handles = []

    def started(path: str) -> Any:
        def hook(module: nn.Module, inputs: Any) -> None:
            record.started.setdefault(path, next(clock))

        return hook

    def ended(path: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            record.calls.setdefault(path, []).append(_copied(output))
            record.ended[path] = next(clock)

        return hook

    for path in paths:
        handles.append(model.get_submodule(path).register_forward_pre_hook(started(path)))
        handles.append(model.get_submodule(path).register_forward_hook(ended(path)))
    try:
        record.output = call(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return record


@contextmanager
def _answering(model: nn.Module, before: dict[str, list[Any]]) -> Iterator[None]:
    """Blocks give what they gave before, call by call."""

    def answer(calls: list[Any]) -> Callable[..., Any]:
        remaining = iter(calls)
        return lambda *args, **kwargs: _copied(next(remaining))

    modules = {path: model.get_submodule(path) for path in before}
    own = {path: module.__dict__.get("forward") for path, module in modules.items()}
    try:
        for path, module in modules.items():
            module.__dict__["forward"] = answer(before[path])
        yield
    finally:
        for path, module in modules.items():
            if own[path] is None:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = own[path]
