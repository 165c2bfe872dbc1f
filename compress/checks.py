"""What is refused before anything runs, beside what a rehearsal of the passes finds; and the place of a mistake."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from calibrate.errors import UserError
from export.graph import Traceable

if TYPE_CHECKING:
    from compress.passes.contract import Pass
    from compress.recipe import Recipe
    from compress.yaml_positions import Step

__all__ = ["check_exporters", "check_lengths", "check_timed", "placed"]


def check_exporters(recipe: Recipe, source: Traceable) -> None:
    """Refuses options of exporters that name what the model does not have."""
    for number, exporter in enumerate(recipe.export):
        with placed(recipe, "export", number, exporter.format):
            exporter.check(source)


def check_timed(recipe: Recipe, step: Pass) -> None:
    """Refuses a pass that measures times where no file of the recipe can be timed on this machine.

    Raises:
        UserError: names what to write instead.
    """
    if not step.timed or any(exporter.timed_here() for exporter in recipe.export):
        return
    option, _, instead = step.timed.partition(", ")
    files = ", ".join(exporter.format for exporter in recipe.export)
    found = f"none of the files ({files}) can be timed on this machine" if files else "the recipe exports no file to time"
    raise UserError(step.name, f"{option} is measured, and {found}", f"Write {instead} instead, or add onnx to export.")


def check_lengths(recipe: Recipe, step: Pass) -> None:
    """Refuses a pass that fixes a dimension which a file of the recipe is to leave free.

    Raises:
        UserError: names the exporter's option.
    """
    for number, exporter in enumerate(recipe.export):
        free = [name for name in getattr(exporter, "dynamic", ()) if name in step.fixes]
        if free:
            place = recipe.place("export", number, exporter.format, "dynamic")
            left = [name for name in getattr(exporter, "dynamic", ()) if name not in step.fixes]
            what = f"dynamic leaves the number of {free[0]} free, and {step.name} fixes it"
            raise UserError(f"{place}: {exporter.format}", what, f"Write dynamic: [{', '.join(left)}].")


@contextmanager
def placed(recipe: Recipe, *path: Step) -> Iterator[None]:
    """Puts the place of a pass or an exporter in the recipe before what it says of a mistake."""
    try:
        yield
    except UserError as error:
        place = recipe.place(*path, error.what.partition(" ")[0])  # an option, where the first word names one
        error.where = f"{place}: {error.where}" if error.where else place
        raise
