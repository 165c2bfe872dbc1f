"""CHANGES MODELS: recipes, anatomy, passes, and the run that turns a recipe into validated files.

From Python::

    import compress

    report = compress.apply("my.yaml", out="runs/mine")     # the same as `compress apply my.yaml --out runs/mine`
    planned = compress.plan("my.yaml")                      # what it would do and cost: a Plan
    smaller = compress.extract("runs/mine", width=0.5)      # from a run with nest_widths, without scoring again
    model = compress.load("runs/mine")                      # the compressed torch model
    source, anatomy = compress.inspect("hf:path/to/model")  # the parts of a model
    recipe = compress.Recipe.read("my.yaml")                # a recipe, checked
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from compress.api import apply, extract, inspect, plan, sensitivity, validate
    from compress.recipe import Recipe
    from compress.saved import load

__all__ = ["Recipe", "apply", "extract", "inspect", "load", "plan", "sensitivity", "validate"]

_HOMES = {
    "Recipe": "compress.recipe",
    "apply": "compress.api",
    "extract": "compress.api",
    "inspect": "compress.api",
    "load": "compress.saved",
    "plan": "compress.api",
    "sensitivity": "compress.api",
    "validate": "compress.api",
}


def __getattr__(name: str) -> Any:
    """Imports on first use, so that ``import compress`` and ``compress --help`` do not wait for torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
