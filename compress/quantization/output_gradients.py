"""How the model's outputs hang on what its layers give: gradients of random combinations of the outputs.

Each output is multiplied by a random sign and all are added up; over the signs, the mean of the products of that sum's gradients
is ``J^T J``, with J the derivative of the outputs (Hutchinson 1990). So the mean square of a gradient says what a small error
there does to the squared error of the outputs. No labels are read, and the gradient does not vanish, as that of a divergence
between the model and itself does. Shapes: B batch, N positions, C channels, O outputs.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from calibrate.capture import counted, split
from calibrate.errors import UserError
from calibrate.modes import frozen, modes_kept
from calibrate.second_moment import SecondMoment
from calibrate.signature import Batch

__all__ = ["Felt", "felt", "felt_again", "table_moment"]

Call = Callable[[nn.Module, Batch], Tensor]

_Place = tuple[str, int]
"""A module's path, and the number of a call of it."""

_PROBES = 2
"""Random combinations of the outputs for each batch."""
_TABLE_PROBES = 4
_ROWS = 8
"""Rows that run with gradients at a time."""


@dataclass(frozen=True)
class Felt:
    """What a layer received at some positions, and the mean squared gradient at each output of it there.

    Attributes:
        inputs: [N, C], or [B, C, h, w] of a convolution.
        slopes: [N, O], or [B, O, h, w].
        places: where the positions were: the piece of the rows, the call of the layer, and which of its positions that count
            (or images).
    """

    inputs: Tensor
    slopes: Tensor
    places: tuple[tuple[int, int, Tensor], ...] = ()


def felt(
    model: nn.Module, call: Call, batches: Iterable[Batch], paths: Sequence[str], *, positions: int, seed: int = 0
) -> dict[str, Felt]:
    """For the modules at ``paths`` what they receive, in all their calls, and how the outputs hang on what they give.

    A module that does not run is left out.

    Only these modules and what runs after them are differentiated. Padded positions are left out; of a linear layer's about
    ``positions`` are kept, drawn from all batches; of a convolution's inputs whole images of the size that comes first, as many
    as have so many positions. Layers that read the same tensors have the same, whatever they give.

    Args:
        batches: a few rows of them run at a time, forwards and backwards.

    Raises:
        UserError: no gradient reaches them.
    """
    pieces = list(split(batches, _ROWS))
    share = 1 / max(len(pieces), 1)
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, list[tuple[Tensor, Tensor]]] = {path: [] for path in paths}
    places: dict[str, list[tuple[int, int, Tensor]]] = {path: [] for path in paths}
    for piece, batch in enumerate(pieces):
        chosen: dict[int, Tensor] = {}
        inputs, gradients = _probed(model, call, batch, paths, _PROBES, generator)
        for (path, number), given in inputs.items():
            slopes = torch.stack([one[path, number] for one in gradients]).float().square().mean(0)
            given = given.float()
            mask = counted(given, batch.get("attention_mask"))
            wanted = positions * share / sum(path == other for other, _ in inputs)
            if isinstance(model.get_submodule(path), nn.Conv2d):
                images = max(1, round(wanted / given[0, 0].numel()))
                if not found[path] or found[path][0][0].shape[1:] == given.shape[1:]:
                    found[path].append((given[:images].clone(), slopes[:images].clone()))
                    places[path].append((piece, number, torch.arange(len(found[path][-1][0]))))
                continue
            flat, flat_slopes = _flat(given, mask), _flat(slopes, mask)
            if len(flat) not in chosen:
                most = max(1, round(wanted))
                chosen[len(flat)] = torch.randperm(len(flat), generator=generator)[:most].sort().values
            found[path].append((flat[chosen[len(flat)]].clone(), flat_slopes[chosen[len(flat)]].clone()))
            places[path].append((piece, number, chosen[len(flat)]))
    return {path: Felt(torch.cat([one[0] for one in parts]), torch.cat([one[1] for one in parts]), tuple(places[path]))
            for path, parts in found.items() if parts}  # fmt: skip


def felt_again(model: nn.Module, call: Call, batches: Iterable[Batch], before: Mapping[str, Felt]) -> dict[str, Tensor]:
    """What the layers receive as the model is now, at the very positions of ``before``; nothing is differentiated.

    Args:
        batches: the rows that ``felt`` was given.
    """
    received: dict[_Place, Tensor] = {}
    calls = Counter[str]()

    def hook(path: str) -> Callable[..., None]:
        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            received[path, calls[path]] = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
            calls[path] += 1

        return note

    found: dict[str, list[Tensor]] = {path: [] for path in before}
    handles = [model.get_submodule(path).register_forward_pre_hook(hook(path), with_kwargs=True) for path in before]
    try:
        with frozen(model):
            for piece, batch in enumerate(split(batches, _ROWS)):
                received.clear()
                calls.clear()
                call(model, batch)
                for path, one in before.items():
                    image = isinstance(model.get_submodule(path), nn.Conv2d)
                    for _, number, which in (place for place in one.places if place[0] == piece):
                        given = received[path, number].float()
                        mask = counted(given, batch.get("attention_mask"))
                        found[path].append((given if image else _flat(given, mask))[which].clone())
    finally:
        for handle in handles:
            handle.remove()
    return {path: torch.cat(parts) for path, parts in found.items()}


def _flat(values: Tensor, mask: Tensor | None) -> Tensor:
    """[.., C] as [N, C], the positions that count."""
    flat = values.reshape(-1, values.shape[-1])
    return flat if mask is None else flat[mask.reshape(-1)]


def table_moment(
    model: nn.Module,
    call: Call,
    batches: Iterable[Batch],
    path: str,
    *,
    seed: int = 0,
    progress: Callable[[int], None] = lambda rows: None,
) -> SecondMoment:
    """The mean [C, C] of ``J^T J`` at what an embedding gives, over the positions that count.

    An error e in a row of the table changes the squared error of the outputs by about ``e^T H e`` wherever the row is read, so
    that this stands for all of its rows as a layer's second moments do for the rows of its weight.

    Args:
        progress: is told the number of rows done.
    """
    generator = torch.Generator().manual_seed(seed)
    moment, rows = SecondMoment(), 0
    for batch in split(batches, _ROWS):
        _, gradients = _probed(model, call, batch, [path], _TABLE_PROBES, generator)
        for gradient in itertools.chain.from_iterable(one.values() for one in gradients):
            mask = counted(gradient, batch.get("attention_mask"))
            moment.update((gradient if mask is None else gradient[mask]).reshape(-1, gradient.shape[-1]))
        rows += len(next(iter(batch.values())))
        progress(rows)
    return moment


def _probed(
    model: nn.Module, call: Call, batch: Batch, paths: Sequence[str], probes: int, generator: torch.Generator
) -> tuple[dict[_Place, Tensor], list[dict[_Place, Tensor]]]:
    """Inputs by path and call, and for each probe the gradient at the outputs."""
    with modes_kept(model), torch.enable_grad(), _listening(model, paths) as heard:
        model.eval()
        outputs = call(model, batch)
        if not outputs.requires_grad:
            raise UserError(
                "quantize",
                f"no gradient of the outputs reaches {', '.join(paths)}",
                "Leave out range: hessian and embedding_rounding: gptq.",
            )
        found = []
        ran = sorted(heard, key=lambda place: (paths.index(place[0]), place[1]))
        for _ in range(probes):
            signs = (torch.randint(0, 2, outputs.shape, generator=generator) * 2 - 1).to(outputs)
            added = [heard[place][1] for place in ran]
            grown = torch.autograd.grad((outputs * signs).sum(), added, retain_graph=True, allow_unused=True)
            found.append({place: torch.zeros_like(zero) if one is None else one.detach()
                          for place, one, zero in zip(ran, grown, added, strict=True)})  # fmt: skip
    return {place: heard[place][0] for place in ran}, found


@contextmanager
def _listening(model: nn.Module, paths: Sequence[str]) -> Iterator[dict[_Place, tuple[Tensor, Tensor]]]:
    """Adds a zero, which gradients are asked of, to what each module gives in each call; no parameter is differentiated."""
    heard: dict[_Place, tuple[Tensor, Tensor]] = {}
    calls = Counter[str]()
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def hook(path: str) -> Callable[..., Any]:
        def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
            zero = torch.zeros_like(output, requires_grad=True)
            given = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
            heard[path, calls[path]] = (given.detach(), zero)
            calls[path] += 1
            return output + zero

        return after

    handles = [model.get_submodule(path).register_forward_hook(hook(path), with_kwargs=True) for path in paths]
    try:
        for parameter in learning:
            parameter.requires_grad_(False)
        yield heard
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)
        for handle in handles:
            handle.remove()
