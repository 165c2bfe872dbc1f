"""The pass of a recipe that ``compress sensitivity`` is about, and the model as it gets it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from calibrate.errors import UserError
from compress.anatomy import Anatomy, find
from compress.checks import placed
from compress.datasets import Data, load_data
from compress.passes.contract import Context
from compress.passes.quantize import Quantize
from compress.passes.token_schedule import TokenPass
from compress.preparation import model_of
from compress.progress import Progress
from compress.surgery import Surgery

if TYPE_CHECKING:
    from compress.recipe import Recipe
    from compress.sources import Source

__all__ = ["check_setting", "measured_pass", "reached"]


def measured_pass(recipe: Recipe, named: str | None = None) -> tuple[int, Quantize | TokenPass]:
    """The pass whose places are measured, and its number: the first of the name, or else the first ``quantize``, or else the
    first that takes tokens out.

    Raises:
        UserError: there is none.
    """
    found = [(number, step) for number, step in enumerate(recipe.passes) if isinstance(step, Quantize | TokenPass)]
    if named is not None:
        chosen = [one for one in found if one[1].name == named]
        if not chosen:
            there = ", ".join(dict.fromkeys(step.name for _, step in found))
            what = f"the recipe has no pass {named!r} whose places could be measured"
            raise UserError("--pass", what, f"There is: {there}." if there else "")
        return chosen[0]
    chosen = [one for one in found if isinstance(one[1], Quantize)] or found
    if not chosen:
        what = "the recipe has no quantize pass whose sites could be measured, and none that takes tokens out"
        raise UserError(recipe.place("passes"), what, "Add one, such as `- quantize: {weights: 8}`.")
    return chosen[0]


def reached(recipe: Recipe, number: int, trust: bool, progress: Progress) -> tuple[Source, nn.Module, Context]:
    """The recipe's model as its pass ``number`` gets it, and what that pass is given; calibration rows alone are read.

    Args:
        trust: whether Python files that the recipe names may be run.
    """
    torch.manual_seed(recipe.seed)
    torch.set_num_threads(recipe.threads)
    with progress.step("load model and calibration data"):
        source = model_of(recipe, trust)
        data = load_data(recipe, source, evaluation=False)
    model = _after(recipe, source, data, number, progress)
    return source, model, _context(recipe, source, data, model, Surgery(), progress)


def check_setting(given: str | None, known: Sequence[str]) -> None:
    """Refuses a setting that is not among those that are measured."""
    if given is not None and given not in known:
        raise UserError("--by", f"{given!r} is not a setting that is measured", f"There is: {', '.join(known)}.")


def _after(recipe: Recipe, source: Source, data: Data, count: int, progress: Progress) -> nn.Module:
    """The model after the first passes."""
    model, surgery = source.model, Surgery()
    for number, step in enumerate(recipe.passes[:count]):
        with progress.step(f"pass {number + 1}: {step.name}"), placed(recipe, "passes", number, step.name):
            if step.timed:
                what = f"{step.timed.partition(', ')[0]} is measured in files, which this command does not write"
                raise UserError(
                    step.name, what, f"Put {recipe.passes[count].name} first in a copy of the recipe, or take the option out."
                )
            context = _context(recipe, source, data, model, surgery, progress)
            context.validation = data.judge(source, recipe.data.metric) if step.validates or step.judges else None
            model = step.run(model, context)
    return model


def _context(recipe: Recipe, source: Source, data: Data, model: nn.Module, surgery: Surgery, progress: Progress) -> Context:
    return Context(
        signature=source.signature,
        anatomy=_anatomy(recipe, source, data, model),
        calibration=data.calibration_batches,
        surgery=surgery,
        rows=len(data.calibration) * data.calibration.group,
        seed=recipe.seed,
        progress=progress.update,
        fingerprint=source.fingerprint,
    )


def _anatomy(recipe: Recipe, source: Source, data: Data, model: nn.Module) -> Anatomy:
    return find(model, source.signature, data.example, {str(role): paths for role, paths in recipe.model.roles.items()})
