"""What a run and a later validation begin with: the runtimes are there, and the recipe's model is loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING

from calibrate.errors import MissingRuntime
from compress.sources import Source, load_model

if TYPE_CHECKING:
    from compress.recipe import Recipe

__all__ = ["model_of", "require_runtimes"]


def require_runtimes(recipe: Recipe) -> None:
    """Raises ``MissingRuntime`` for the first exporter whose library is absent; names the extra that installs it."""
    for exporter in recipe.export:
        if reason := exporter.missing():
            raise MissingRuntime(f"export.{exporter.format}", reason, f"pip install 'transformer-compress[{exporter.extra}]'")


def model_of(recipe: Recipe, trust: bool) -> Source:
    """The recipe's float model."""
    spec = recipe.model
    return load_model(spec.source, base=recipe.base, trust=trust, task=spec.task, checkpoint=spec.checkpoint, seed=recipe.seed)
