"""What taking parts out of a model does to its own output, and the set of parts whose loss does least.

A part is switched off, not taken out: the model's output is the same. What ran before the first part of a set is remembered,
so that a set costs what comes after it only. No labels are read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from calibrate.capture import counted, split
from calibrate.modes import evaluating
from calibrate.signature import Batch
from compress.algorithms.similarity import first_allowed
from compress.depth.choice import Candidate, Candidates
from compress.depth.repair import finite
from compress.width.restart import Restart, first_tensor

__all__ = ["Chosen", "OutputNoise", "choose_by_output", "first_rows", "least_noise", "without"]

Told = dict[str, Any]
Call = Callable[[nn.Module, Batch], Tensor]
Progress = Callable[[int, int, str], None]

_ROWS = 32
"""Rows that are run at a time."""
_WIDTH = 8
"""Sets that a search takes on from one size to the next."""


@dataclass
class OutputNoise:
    """The change of a model's output over calibration rows when parts are off: squared error over square, 0 for no change.

    Attributes:
        paths: of all blocks; what those give that run before the first part that is off is remembered.
        runs: sets that were measured.
    """

    model: nn.Module
    call: Call
    batches: Sequence[Batch]
    paths: Sequence[str]
    progress: Progress = lambda done, total, what: None
    runs: int = field(default=0, init=False)

    def of(self, sets: Sequence[Sequence[Candidate]]) -> list[float]:
        """One number for each set of parts that are off together; padded positions do not count."""
        noise = torch.zeros(len(sets), dtype=torch.float64)
        signal, done = 0.0, 0
        restart = Restart(self.model, self.call, self.paths)
        pieces = list(split(self.batches, _ROWS))
        with evaluating(self.model):
            for batch in pieces:
                restart.begin(batch)
                wanted = restart.reference(0).output.double()
                valid = counted(wanted, batch.get("attention_mask"))
                signal += float(_kept(wanted, valid).square().sum())
                for number, parts in enumerate(sets):
                    start = _first(restart, parts)
                    restart.exact(start)
                    with without(self.model, parts):
                        given = restart.run(0, start).output.double()
                    noise[number] += float(_kept(given - wanted, valid).square().sum())
                    done += 1
                    self.progress(done, len(sets) * len(pieces), "outputs without parts")
        self.runs += len(sets)
        return (noise / max(signal, 1e-300)).nan_to_num(nan=torch.inf).tolist()


@dataclass(frozen=True)
class Chosen:
    """Parts that can go together.

    Attributes:
        parts: in the order in which they were added.
        noise: of the whole set; after: when each of them was added to those before it.
        singly: of each candidate alone, where that was measured.
    """

    parts: tuple[Candidate, ...]
    noise: float
    after: tuple[float, ...]
    singly: dict[str, float]


def least_noise(measure: OutputNoise, candidates: Candidates, count: int, width: int) -> Chosen:
    """The set of ``count`` parts without which the output changes least, as far as a beam search finds it.

    Sets grow by one part at a time, and the best ``width`` of each size go on: 1 is greedy, and where no size has more sets than
    that, all are tried. Of equal ones the first in the model's order goes.
    """
    order = {one.key: number for number, one in enumerate(candidates.these)}
    best: list[Chosen] = [Chosen((), 0.0, (), {})]
    singly: dict[str, float] = {}
    for _ in range(count):
        grown: dict[frozenset[str], tuple[Chosen, Candidate]] = {}
        for chosen in best:
            for one in candidates.these:
                if one not in chosen.parts and candidates.allowed(chosen.parts, one):
                    grown.setdefault(frozenset([one.key, *(part.key for part in chosen.parts)]), (chosen, one))
        noises = measure.of([(*chosen.parts, one) for chosen, one in grown.values()])
        found = [
            Chosen((*chosen.parts, one), noise, (*chosen.after, noise), {})
            for (chosen, one), noise in zip(grown.values(), noises, strict=True)
        ]
        singly = singly or {chosen.parts[0].key: chosen.noise for chosen in found}
        found.sort(key=lambda chosen: (chosen.noise, sorted(order[part.key] for part in chosen.parts)))
        best = found[:width]
    return Chosen(best[0].parts, best[0].noise, best[0].after, singly)


def choose_by_output(measure: OutputNoise, candidates: Candidates, count: int, method: str) -> tuple[list[Candidate], Told]:
    """The parts that go, and what to report of the choice.

    Args:
        method: ``one_shot``, ``consecutive``, ``iterative`` or ``search``, as ``drop_layers`` says.
    """
    if method == "consecutive":
        runs = candidates.runs(count)
        noises = dict(zip(runs, measure.of(list(runs.values())), strict=True))
        first = min(noises, key=lambda start: noises[start])
        ends = {start: [run[0].block.index, run[-1].block.index] for start, run in runs.items()}
        scores: list[Told] = [{"blocks": ends[start], "noise": finite(noise)} for start, noise in noises.items()]
        chosen = Chosen(tuple(runs[first]), noises[first], (), {})
    elif method == "one_shot":
        alone = dict(zip(candidates.these, measure.of([[one] for one in candidates.these]), strict=True))
        parts = first_allowed({one: -noise for one, noise in alone.items()}, count, candidates.allowed)
        together = measure.of([parts])[0] if count > 1 else alone[parts[0]]
        chosen = Chosen(tuple(parts), together, (), {one.key: noise for one, noise in alone.items()})
    else:
        chosen = least_noise(measure, candidates, count, 1 if method == "iterative" else _WIDTH)
    if method != "consecutive":
        noted = [one for one in candidates.these if one.key in chosen.singly]
        scores = [
            {"block": one.block.index, "part": one.part, "path": one.key, "noise": finite(chosen.singly[one.key])}
            for one in noted
        ]
    rows = sum(next(iter(batch.values())).shape[0] for batch in measure.batches)
    together_told = {"rows": rows, "sets": measure.runs, "noise": finite(chosen.noise)}
    return list(chosen.parts), {"scores": scores, "without_them": together_told}


def first_rows(batches: Iterable[Batch], rows: int) -> list[Batch]:
    """The first so many rows of the batches."""
    found = []
    for batch in batches:
        if rows > 0:
            found.append({name: tensor[:rows] for name, tensor in batch.items()})
        rows -= next(iter(batch.values())).shape[0]
    return found


@contextmanager
def without(model: nn.Module, parts: Iterable[Candidate]) -> Iterator[None]:
    """Parts are off: a sublayer adds zeros to the residual stream, a block gives what it receives."""
    handles = []
    for one in parts:
        if one.sublayer is None:
            handles.append(model.get_submodule(one.key).register_forward_hook(_passed_on, with_kwargs=True))
            continue
        for path in (one.sublayer.sink, *one.sublayer.after):
            handles.append(model.get_submodule(path).register_forward_hook(_zeros))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _zeros(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return torch.zeros_like(output)


def _passed_on(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
    """The output of a block with what it received in the place of its first tensor."""
    received = next((leaf for leaf in _pytree.tree_leaves((args, kwargs.get("hidden_states"))) if isinstance(leaf, Tensor)), None)
    given = first_tensor(output)
    return _pytree.tree_map(lambda leaf: received if leaf is given else leaf, output)


def _first(restart: Restart, parts: Sequence[Candidate]) -> str:
    """The block that runs first of those that parts are off in."""
    paths = {one.block.path for one in parts}
    return next((path for path in restart.order if path in paths), "")


def _kept(x: Tensor, valid: Tensor | None) -> Tensor:
    return x if valid is None else x[valid]
