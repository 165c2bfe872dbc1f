"""What is refused before anything runs: passes whose targets do not exist, files that a runtime cannot carry."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from torch import nn

from calibrate.errors import UserError
from compress.anatomy import Anatomy
from export.graph import Traceable

if TYPE_CHECKING:
    from compress.recipe import Recipe
    from compress.yaml_positions import Step

__all__ = ["check", "check_exporters", "placed"]


def check(recipe: Recipe, model: nn.Module, anatomy: Anatomy) -> None:
    """Refuses, before anything runs, a pass whose targets do not exist or that a requested runtime cannot carry.

    The first pass is checked against the model as it is; later ones are checked again when their turn comes, because the
    model may have changed by then.

    Raises:
        UserError: names the pass, the place and the runtime.
    """
    for number, step in enumerate(recipe.passes):
        try:
            with placed(recipe, "passes", number, step.name):
                step.targets(model, anatomy)
        except UserError:
            if number == 0:
                raise
            continue
        preview = _tree(step.preview(model, anatomy))
        for exporter in recipe.export:
            if refused := exporter.refuses(preview):
                path, reason = refused[0]
                more = f" (and {len(refused) - 1} more places)" if len(refused) > 1 else ""
                raise UserError(
                    f"{recipe.place('passes', number, step.name)}: {step.name}",
                    f"{exporter.format} cannot carry {path}: {reason}{more}",
                    f"Change the pass, or take {exporter.format} out of export.",
                )


def check_exporters(recipe: Recipe, source: Traceable) -> None:
    """Refuses options of exporters that name what the model does not have."""
    for number, exporter in enumerate(recipe.export):
        with placed(recipe, "export", number, exporter.format):
            exporter.check(source)


@contextmanager
def placed(recipe: Recipe, *path: Step) -> Iterator[None]:
    """Puts the place of a pass or an exporter in the recipe before what it says of a mistake."""
    try:
        yield
    except UserError as error:
        place = recipe.place(*path)
        error.where = f"{place}: {error.where}" if error.where else place
        raise


def _tree(layers: dict[str, nn.Module]) -> nn.Module:
    """A module with the given modules at the given paths, and nothing else."""
    root = nn.Module()
    for path, layer in layers.items():
        holder = root
        *parents, name = path.split(".")
        for parent in parents:
            if parent not in holder._modules:
                holder.add_module(parent, nn.Module())
            holder = holder.get_submodule(parent)
        holder.add_module(name, layer)
    return root
