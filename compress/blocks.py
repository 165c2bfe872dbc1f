"""How much of each block's output was kept: the float model's outputs on a few rows, kept in a file, against the model's now.

The float outputs are taken before the passes, because passes change the model in place. Both models get the same calibration
rows, each from the first layer on, so that the figure of a block holds what the blocks before it lost too: the block where
it falls is the one that hurts.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count, takewhile
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from calibrate.capture import counted, split
from calibrate.fidelity import Fidelity
from calibrate.modes import evaluating
from calibrate.signature import Batch
from compress.report import BlockFidelity
from compress.surgery import Edit
from compress.whereabouts import Whereabouts

__all__ = ["MOST_BYTES", "MOST_ROWS", "compare", "keep_outputs"]

MOST_ROWS = 16
MOST_BYTES = 64_000_000
"""Most that is kept of the float model; of a large model fewer rows are kept, but always one."""

_PIECE = 4
_KEY = "blocks"
_LOWEST_DB = -999.0

Call = Callable[[nn.Module, Batch], Any]


def keep_outputs(model: nn.Module, call: Call, paths: Sequence[str], batches: Iterable[Batch], path: Path) -> Path:
    """Writes the outputs of the blocks of a float model on the first rows to a safetensors file.

    Args:
        call: runs the model on one batch.
        paths: module paths of the blocks, in order.
        batches: calibration rows; only the first few are asked for.
        path: the file; written under a temporary name and renamed.
    """
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    rows = 0
    first = list(_first_rows(batches, MOST_ROWS))
    with evaluating(model), _listening(model, dict(enumerate(paths))) as heard:
        for number, piece in enumerate(split(_first_rows(first, _affordable(model, call, heard, first)), _PIECE)):
            heard.start()
            call(model, piece)
            rows += _rows(piece)
            for index, outputs in heard.outputs().items():
                for turn, output in enumerate(outputs):
                    tensors[f"{number}.{index}.{turn}"] = output
    places = Whereabouts.of(model, paths).places
    told = {"rows": rows, "blocks": [[block, list(places[block])] for block in paths]}
    unfinished = path.with_name(f".{path.name}.part")
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, unfinished, metadata={_KEY: json.dumps(told)})
    os.replace(unfinished, path)
    return path


def compare(model: nn.Module, call: Call, edits: Sequence[Edit], batches: Iterable[Batch], path: Path) -> list[BlockFidelity]:
    """The SQNR of each block of the model as it is now against the float outputs in the file that ``keep_outputs`` wrote.

    Padded positions do not count where the batch has an attention mask and the output is [B, T, ...] or [B * T, C].

    Args:
        edits: what passes did to the module tree since, in order: blocks are followed through renumbered lists.
        batches: the same calibration rows, in the same batches.
    """
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        told = json.loads(file.metadata()[_KEY])
        blocks: list[tuple[str, list[int]]] = told["blocks"]
        rows, names = int(told["rows"]), set(file.keys())

        def kept(number: int, index: int) -> list[Tensor]:
            turns = takewhile(names.__contains__, (f"{number}.{index}.{turn}" for turn in count()))
            return [file.get_tensor(name) for name in turns]

        found = _found(model, blocks, edits)
        sums = {index: _Comparison() for index in found}
        with evaluating(model), _listening(model, found) as heard:
            for number, piece in enumerate(split(_first_rows(batches, rows), _PIECE)):
                heard.start()
                call(model, piece)
                for index, outputs in heard.outputs().items():
                    sums[index].add(kept(number, index), outputs, piece.get("attention_mask"))
    return [
        sums[index].record(index, block, rows)
        if index in sums
        else BlockFidelity(index=index, path=block, sqnr_db=None, gone=True, rows=0, note="a pass took it out")
        for index, (block, _) in enumerate(blocks)
    ]


def _found(model: nn.Module, blocks: Sequence[tuple[str, list[int]]], edits: Sequence[Edit]) -> dict[int, str]:
    """Where the blocks that are still there are now, by their number in the float model."""
    whereabouts = Whereabouts(dict(blocks))
    modules = {path for path, _ in model.named_modules(remove_duplicate=False)}
    now = {index: whereabouts.after(block, edits) for index, (block, _) in enumerate(blocks)}
    return {index: path for index, path in now.items() if path is not None and path in modules}


class _Comparison:
    """One block's sums over the rows, or why there is no figure."""

    def __init__(self) -> None:
        self.fidelity = Fidelity(classes=False)
        self.note = ""

    def add(self, kept: Sequence[Tensor], outputs: Sequence[Tensor], mask: Tensor | None) -> None:
        if len(kept) != len(outputs):
            self.note = f"called {len(outputs)} times instead of {len(kept)}" if outputs else "it does not run any more"
        for reference, other in zip(kept, outputs, strict=False):
            if other.shape != reference.shape:
                self.note = f"its output is {list(other.shape)} instead of {list(reference.shape)}"
                continue
            valid = counted(reference, mask)
            self.fidelity.update(*((reference, other) if valid is None else (reference[valid], other[valid])))

    def record(self, index: int, path: str, rows: int) -> BlockFidelity:
        level = None if self.note or self.fidelity.sqnr_db == math.inf else max(self.fidelity.sqnr_db, _LOWEST_DB)
        return BlockFidelity(index=index, path=path, sqnr_db=level, rows=0 if self.note else rows, note=self.note)


class _Heard:
    """What the blocks gave in the current call. A module under several paths is one module: its calls are shared out among
    its paths in their order."""

    def __init__(self, modules: dict[int, nn.Module]) -> None:
        self.turns: dict[int, list[int]] = {}
        for index, module in modules.items():
            self.turns.setdefault(id(module), []).append(index)
        self.given: dict[int, list[Tensor]] = {}

    def start(self) -> None:
        self.given = {}

    def hear(self, module: nn.Module, args: Any, output: Any) -> None:
        tensor = _first_tensor(output)
        if tensor is not None:
            # A copy: the layers after it may add to the tensor in place.
            self.given.setdefault(id(module), []).append(tensor.detach().to("cpu", copy=True).contiguous())

    def outputs(self) -> dict[int, list[Tensor]]:
        """Outputs of each block in the order of its calls, by the block's number."""
        found = {}
        for module, indices in self.turns.items():
            given = self.given.get(module, [])
            each = -(-len(given) // len(indices))
            for turn, index in enumerate(indices):
                found[index] = given[turn * each : (turn + 1) * each]
        return found

    def bytes(self) -> int:
        return sum(tensor.nbytes for given in self.given.values() for tensor in given)


@contextmanager
def _listening(model: nn.Module, paths: dict[int, str]) -> Iterator[_Heard]:
    """Hears what the modules at the paths give; leaves no hook behind."""
    modules = {index: model.get_submodule(path) for index, path in paths.items()}
    heard = _Heard(modules)
    handles = [module.register_forward_hook(heard.hear) for module in {id(m): m for m in modules.values()}.values()]
    try:
        yield heard
    finally:
        for handle in handles:
            handle.remove()


def _affordable(model: nn.Module, call: Call, heard: _Heard, batches: Iterable[Batch]) -> int:
    """How many rows to keep, from what one row takes."""
    for row in _first_rows(batches, 1):
        heard.start()
        call(model, row)
        return max(1, min(MOST_ROWS, MOST_BYTES // max(1, heard.bytes())))
    return 0


def _first_tensor(output: Any) -> Tensor | None:
    """The output itself, or the first tensor of a tuple, a list or a mapping."""
    if isinstance(output, Tensor):
        return output
    values = output.values() if hasattr(output, "values") else output if isinstance(output, (tuple, list)) else ()
    return next((tensor for tensor in map(_first_tensor, values) if tensor is not None), None)


def _first_rows(batches: Iterable[Batch], rows: int) -> Iterator[Batch]:
    """The first rows, in batches."""
    for batch in batches:
        if rows <= 0:
            return
        yield {name: tensor[:rows] for name, tensor in batch.items()}
        rows -= _rows(batch)


def _rows(batch: Batch) -> int:
    return next(iter(batch.values())).shape[0]
