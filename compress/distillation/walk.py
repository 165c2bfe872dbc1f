"""A walk through a model block by block: what the blocks behind it gave for the calibration rows is kept, and not computed again.

Only what the last of them gave is kept in full, so that memory holds one block's activations.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree

from calibrate.fidelity import sqnr_db
from calibrate.modes import evaluating
from calibrate.signature import Batch
from compress.distillation.listening import MOST_BYTES, Packed, Store, answering, calls_of, count, done_before, shape_of

__all__ = ["Walk"]

_SAME_DB = 100.0


class Walk:
    """The calibration rows in pieces, and a ``call`` for them that begins behind the blocks that are finished.

    Attributes:
        pieces: the rows; a caller gives them back to ``call`` as they are.
        behind: the blocks that are not run any more, in the order in which they ended.
    """

    def __init__(self, model: nn.Module, call: Callable[[nn.Module, Batch], Any], pieces: Iterable[Batch]) -> None:
        self.model, self._call = model, call
        self.pieces = list(pieces)
        self.behind: list[str] = []
        self._memory: dict[tuple[int, int], dict[str, list[Any]]] = {}
        self._gives_up = False

    def call(self, model: nn.Module, batch: Batch) -> Any:
        """The model's output; what is no piece of the rows is run from the beginning."""
        before = self._memory.get(_key(batch)) if model is self.model else None
        if before is None:
            return self._call(model, batch)
        with answering(model, before):
            return self._call(model, batch)

    def reach(self, owners: Sequence[str], blocks: Sequence[str]) -> None:
        """Goes on, to behind the blocks that are done before the first of the modules at ``owners`` runs.

        They are run once more, as they are now. Where a model computes otherwise than block after block, or where there is no
        room, nothing is kept and every call runs the whole model.
        """
        if self._gives_up or not self.pieces or not owners:
            return
        with evaluating(self.model):
            done = done_before(self.model, self._call, self.pieces[0], owners, blocks)
            if len(done) <= len(self.behind):
                return
            store = Store(sum(count([piece]) for piece in self.pieces), MOST_BYTES)
            for piece in self.pieces:
                if not self._step(piece, done, store):
                    self._give_up()
                    return
            self.behind = done
            if not self._same():
                self._give_up()

    def _step(self, piece: Batch, done: list[str], store: Store) -> bool:
        before = self._memory.get(_key(piece), {})
        new = [path for path in done if path not in before]
        with answering(self.model, before):
            calls = calls_of(self.model, self._call, piece, new)
        kept = store.packed_all(calls[new[-1]], count([piece]))
        if kept is None:
            return False
        shapes = {path: [_shapes(output) for output in outputs] for path, outputs in [*before.items(), *calls.items()]}
        self._memory[_key(piece)] = shapes | {new[-1]: kept}
        return True

    def _same(self) -> bool:
        piece = self.pieces[0]
        whole, part = (run(self.model, piece) for run in (self._call, self.call))
        level = sqnr_db(whole, part) if isinstance(whole, Tensor) and isinstance(part, Tensor) else math.nan
        return level == math.inf or level > _SAME_DB

    def _give_up(self) -> None:
        self._memory, self.behind, self._gives_up = {}, [], True


def _shapes(output: Any) -> Any:
    return _pytree.tree_map(lambda leaf: shape_of(leaf.values if isinstance(leaf, Packed) else leaf), output)


def _key(batch: Batch) -> tuple[int, int]:
    first = next(iter(batch.values()))
    return first.data_ptr(), first.shape[0]
