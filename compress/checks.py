"""What is refused before anything runs, beside what a rehearsal of the passes finds; and the place of a mistake."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from calibrate.errors import UserError
from export.graph import Traceable

if TYPE_CHECKING:
    from compress.recipe import Recipe
    from compress.yaml_positions import Step

__all__ = ["check_exporters", "placed"]


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
        place = recipe.place(*path, error.what.partition(" ")[0])  # an option, where the first word names one
        error.where = f"{place}: {error.where}" if error.where else place
        raise
