"""What comes out of a part of a model: heard at named modules, kept within a bound of memory, and computed again from the first
module on that changed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from calibrate.fidelity import sqnr_db
from calibrate.modes import modes_kept
from calibrate.signature import Batch
from compress.width.restart import first_tensor

__all__ = [
    "MOST_BYTES",
    "OUTPUT",
    "Heard",
    "Packed",
    "Part",
    "Store",
    "answering",
    "calls_of",
    "count",
    "done_before",
    "hear",
    "shape_of",
    "still",
]

Call = Callable[[nn.Module, Batch], Tensor]
Heard = dict[str, Tensor]

OUTPUT = ""
"""The key of the model's own output among what was heard."""
MOST_BYTES = 512 << 20
"""Of what is recorded, and as much again of what a part receives; beyond it float16, then fewer rows."""
_SAME_DB = 100.0


class Part:
    """The model from the first module on that has something to learn; what the blocks before it gave is remembered."""

    def __init__(
        self,
        model: nn.Module,
        call: Call,
        batches: tuple[list[Batch], list[Batch]],
        paths: Sequence[str],
        output: bool,
        owners: Sequence[str],
        blocks: Sequence[str],
    ) -> None:
        """
        Args:
            batches: two lists of them, those to learn from and the held-out ones.
            paths: of the modules that are heard; ``output``: whether the model's output is too.
            owners: of what changes: everything before the first of them that runs stays as it is.
            blocks: of the model.
        """
        self.model, self.call, self.batches = model, call, batches
        self.paths, self.output = dict.fromkeys(paths), output
        self.memory: tuple[list[dict[str, list[Any]]], ...] = ([], [])
        first = next((part[0] for part in self.batches if part), None)
        if first is None:
            return
        done = done_before(model, call, first, owners, blocks)
        if done:
            self._remember(done)

    @property
    def remembers(self) -> bool:
        return any(self.memory)

    def heard(self, which: int, number: int) -> Heard:
        """What comes out for a batch now; ``which``: 0 of those to learn from, 1 of the held-out."""
        before = self.memory[which][number] if self.memory[which] else {}
        with answering(self.model, before):
            return hear(self.model, self.call, self.batches[which][number], self.paths, self.output)

    @torch.no_grad()
    def _remember(self, done: list[str]) -> None:
        """Runs all batches once and keeps what the last of the blocks gave, and of the others only the shapes."""
        store = Store(sum(map(count, self.batches)), MOST_BYTES)
        whole = self.heard(int(not self.batches[0]), 0)
        memory: tuple[list[dict[str, list[Any]]], ...] = ([], [])
        for part, kept in zip(self.batches, memory, strict=True):
            for batch in part:
                calls = calls_of(self.model, self.call, batch, done)
                last = done[-1]
                found = {path: [_pytree.tree_map(shape_of, output) for output in calls[path]] for path in done[:-1]}
                packed = store.packed_all(calls[last], count([batch]))
                if packed is None:
                    return
                kept.append(found | {last: packed})
        self.memory = memory
        again = self.heard(int(not self.batches[0]), 0)
        if any(not (level == math.inf or level > _SAME_DB) for level in (sqnr_db(whole[key], again[key]) for key in whole)):
            self.memory = ([], [])


@contextmanager
def still(model: nn.Module, gradients: bool = False) -> Iterator[None]:
    """Eval mode, and gradients or none; each module's own mode is put back."""
    with modes_kept(model), torch.set_grad_enabled(gradients):
        model.eval()
        yield


@dataclass(frozen=True)
class Packed:
    """A tensor as it is kept: in float32, or in float16 over its largest value."""

    values: Tensor
    scale: float = 0.0

    @property
    def tensor(self) -> Tensor:
        return self.values.float() * self.scale if self.scale else self.values


class Store:
    """Keeps tensors of so many rows within a number of bytes; the first that come decide how."""

    def __init__(self, rows: int, most_bytes: int) -> None:
        self.rows, self.left = rows, most_bytes
        self.half: bool | None = None

    def room(self, values: Any, rows: int, spared: int = 0) -> int:
        """For how many of these rows there is room, when so many bytes stay free."""
        size = self._size(values, rows) / max(rows, 1)
        return min(rows, int(max(self.left - spared, 0) / size)) if size else rows

    def packed(self, heard: Heard, rows: int) -> dict[str, Packed] | None:
        """None: there is no room for them."""
        packed: dict[str, Packed] | None = self.packed_all(heard, rows)
        return packed if packed is not None else None

    def packed_all(self, values: Any, rows: int) -> Any:
        size = self._size(values, rows)
        if size > self.left:
            return None
        self.left -= size
        return _pytree.tree_map(self._packed, values)

    def _size(self, values: Any, rows: int) -> int:
        size: int = sum(leaf.numel() * 4 for leaf in _pytree.tree_leaves(values) if _floating(leaf))
        if self.half is None:
            self.half = size / max(rows, 1) * self.rows > self.left
        return size // 2 if self.half else size

    def _packed(self, leaf: Any) -> Any:
        if not _floating(leaf):
            return leaf
        x = leaf.detach()
        if not self.half:
            return Packed(x.to(torch.float32, copy=True))
        scale = float(x.abs().max()) / 6e4 or 1.0
        return Packed((x / scale).half(), scale)


class _Enough(Exception):
    """All that is wanted was heard."""


def hear(model: nn.Module, call: Call, batch: Batch, paths: Mapping[str, str | None], output: bool) -> Heard:
    """What the modules give in their first call, by key, and the model's output if it is wanted; otherwise the rest is not run.

    Raises:
        ValueError: one of them does not run.
    """
    heard: Heard = {}
    handles = []

    def hook(key: str) -> Any:
        def after(module: nn.Module, inputs: Any, given: Any) -> None:
            if key not in heard:
                heard[key] = first_tensor(given).clone()
            if not output and len(heard) == len(paths):
                raise _Enough

        return after

    try:
        for key, path in paths.items():
            handles.append(model.get_submodule(path or key).register_forward_hook(hook(key)))
        given = call(model, batch)
        if output:
            heard[OUTPUT] = given
    except _Enough:
        pass
    finally:
        for handle in handles:
            handle.remove()
    missing = [path or key for key, path in paths.items() if key not in heard]
    if missing:
        raise ValueError(f"{missing[0]} does not run")
    return heard


def done_before(model: nn.Module, call: Call, batch: Batch, owners: Sequence[str], blocks: Sequence[str]) -> list[str]:
    """The blocks that are done before the first of the owners runs, in the order in which they end."""
    order: list[tuple[str, str]] = []
    handles = []
    for path in owners:
        handles.append(model.get_submodule(path).register_forward_pre_hook(lambda m, a, p=path: order.append(("owner", p))))
    for path in blocks:
        handles.append(model.get_submodule(path).register_forward_hook(lambda m, a, o, p=path: order.append(("block", p))))
    try:
        with torch.no_grad():
            call(model, {name: tensor[:1] for name, tensor in batch.items()})
    finally:
        for handle in handles:
            handle.remove()
    start = next((number for number, (kind, _) in enumerate(order) if kind == "owner"), 0)
    before = [path for _, path in order[:start]]
    after = {path for kind, path in order[start:] if kind == "block"}
    return [path for path in dict.fromkeys(before) if path not in after]


def calls_of(model: nn.Module, call: Call, batch: Batch, paths: Sequence[str]) -> dict[str, list[Any]]:
    """What the modules give, call by call; nothing after the last of them is run."""
    found: dict[str, list[Any]] = {path: [] for path in paths}
    handles = []

    def hook(path: str) -> Any:
        def after(module: nn.Module, inputs: Any, output: Any) -> None:
            found[path].append(_pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, output))
            if path == paths[-1]:
                raise _Enough

        return after

    try:
        for path in paths:
            handles.append(model.get_submodule(path).register_forward_hook(hook(path)))
        call(model, batch)
    except _Enough:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return found


@contextmanager
def answering(model: nn.Module, before: Mapping[str, list[Any]]) -> Iterator[None]:
    """Modules give what they gave before, call by call."""

    def answer(calls: list[Any]) -> Callable[..., Any]:
        remaining = iter(calls)
        return lambda *args, **kwargs: _pytree.tree_map(_unpacked, next(remaining))

    modules = {path: model.get_submodule(path) for path in before}
    own = {path: module.__dict__.get("forward") for path, module in modules.items()}
    try:
        for path, module in modules.items():
            module.__dict__["forward"] = answer(before[path])
        yield
    finally:
        for path, module in modules.items():
            module.__dict__.pop("forward", None)
            if own[path] is not None:
                module.__dict__["forward"] = own[path]


def _unpacked(leaf: Any) -> Any:
    """A tensor that the model may write into."""
    return leaf.tensor.clone() if isinstance(leaf, Packed) else leaf.clone() if isinstance(leaf, Tensor) else leaf


def shape_of(leaf: Any) -> Any:
    """Zeros of the same shape that take no memory: nobody reads them but a block that does not run."""
    return leaf.new_zeros(()).expand(leaf.shape) if isinstance(leaf, Tensor) else leaf


def _floating(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


def count(batches: Sequence[Batch]) -> int:
    return sum(next(iter(batch.values())).shape[0] for batch in batches)
