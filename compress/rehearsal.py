"""What the passes of a recipe will leave, found on a copy of the model that shares its tensors: no data, no arithmetic."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from calibrate.errors import UserError
from calibrate.inventory import inventory
from calibrate.signature import Batch
from compress.anatomy import Anatomy, find
from compress.checks import check_lengths, check_timed, placed
from compress.surgery import Edit, Surgery

if TYPE_CHECKING:
    from compress.passes.contract import Pass, Target
    from compress.recipe import Recipe
    from compress.sources import Source

__all__ = ["Rehearsal", "Rehearsed", "rehearse", "stand_in"]


@dataclass(frozen=True)
class Rehearsed:
    """One pass as it was rehearsed.

    Attributes:
        anatomy: the parts of the model before the pass.
        skips: sites that the pass leaves as they are, by path, with the reason.
        bytes_before, bytes_after: of all parameters and buffers in memory, tied ones once.
    """

    step: Pass
    anatomy: Anatomy
    targets: tuple[Target, ...]
    skips: Mapping[str, str]
    bytes_before: int
    bytes_after: int


@dataclass(frozen=True)
class Rehearsal:
    """A model as all passes of a recipe will leave it, as far as shapes and bytes go, and what was noted on the way;
    ``edits`` are those that the passes made; ``wasted``: (pass, later pass, how many layers that the first changed and the second
    took out again)."""

    model: nn.Module
    steps: tuple[Rehearsed, ...]
    edits: tuple[Edit, ...]
    wasted: tuple[tuple[int, int, int], ...] = ()


def rehearse(recipe: Recipe, source: Source, anatomy: Anatomy, example: Batch) -> Rehearsal:
    """Takes the passes through a copy of the model in their order and refuses what would fail later.

    Each pass is checked on what the passes before it leave, whose parts are found anew; the source's own model is not
    touched. What is left in the end is shown to every exporter.

    Args:
        anatomy: the parts of the float model.
        example: the batch that a model is traced with.

    Raises:
        UserError: a target that does not exist by then, a precondition that fails, or a layer that a runtime cannot carry,
            with the place in the recipe.
    """
    model, surgery = stand_in(source.model), Surgery()
    roles = {str(role): paths for role, paths in recipe.model.roles.items()}
    steps: list[Rehearsed] = []
    changed: list[set[nn.Module]] = []
    wasted: list[tuple[int, int, int]] = []
    blame: list[dict[str, int]] = [{} for _ in recipe.export]
    for number, step in enumerate(recipe.passes):
        check_lengths(recipe, step)
        with placed(recipe, "passes", number, step.name):
            if number:
                anatomy = find(model, source.signature, example, roles)
            before = _stored(model)
            check_timed(recipe, step)
            targets, skips = step.targets(model, anatomy), step.skips(model, anatomy)
            step.rehearse(model, anatomy, surgery)
        steps.append(Rehearsed(step, anatomy, tuple(targets), skips, before, _stored(model)))
        present = set(model.modules())
        for earlier, layers in enumerate(changed):
            if gone := layers - present:
                wasted.append((earlier, number, len(gone)))
                layers -= gone
        changed.append({module for path, module in model.named_modules() if path in {target.path for target in targets}})
        for exporter, since in zip(recipe.export, blame, strict=True):
            for path, _ in exporter.refuses(model):
                since.setdefault(path, number)
    _carried(recipe, model, blame)
    return Rehearsal(model, tuple(steps), tuple(surgery.edits), tuple(wasted))


def stand_in(model: nn.Module) -> nn.Module:
    """A copy of a model's structure around the very same tensors: it costs no memory, and surgery on it leaves the model
    alone. Attributes that cannot be copied are shared."""
    memo = _tensors(model)
    try:
        return copy.deepcopy(model, memo)
    except Exception:  # whatever a foreign attribute raises when it is copied
        memo = _tensors(model) | _uncopyable(model)
        return copy.deepcopy(model, memo)


def _tensors(model: nn.Module) -> dict[int, Any]:
    """The memo with which ``copy.deepcopy`` keeps every tensor of a model."""
    held = (value for module in model.modules() for value in vars(module).values() if isinstance(value, torch.Tensor))
    return {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers(), *held)}


def _uncopyable(model: nn.Module) -> dict[int, Any]:
    found = {}
    for module in model.modules():
        for name, value in vars(module).items():
            if name in ("_modules", "_parameters", "_buffers") or isinstance(value, nn.Module):
                continue
            try:
                copy.deepcopy(value, _tensors(model) | {id(child): child for child in model.modules()})
            except Exception:
                found[id(value)] = value
    return found


def _stored(model: nn.Module) -> int:
    return sum(entry.bytes for entry in inventory(model).values())


def _carried(recipe: Recipe, model: nn.Module, blame: list[dict[str, int]]) -> None:
    """Refuses what a requested runtime cannot carry; ``blame``: for each exporter the pass since which a path is refused."""
    for exporter, since in zip(recipe.export, blame, strict=True):
        if not (refused := exporter.refuses(model)):
            continue
        path, reason = refused[0]
        more = f" (and {len(refused) - 1} more places)" if len(refused) > 1 else ""
        number = since.get(path, len(recipe.passes) - 1)
        name = recipe.passes[number].name
        raise UserError(
            f"{recipe.place('passes', number, name)}: {name}",
            f"{exporter.format} cannot carry {path}: {reason}{more}",
            f"Change the pass, or take {exporter.format} out of export.",
        )
