"""The toolkit from Python: what the commands do, returned instead of printed."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calibrate.errors import UserError
from compress.recipe import ModelSpec, Recipe, read
from compress.shipped import find_recipe

if TYPE_CHECKING:
    from compress.anatomy import Anatomy
    from compress.planning import Plan
    from compress.progress import Progress
    from compress.quantization.sensitivity_report import SensitivityReport
    from compress.report import Report
    from compress.sources import Source
    from compress.tokens.sensitivity import TokenSensitivity

__all__ = ["apply", "extract", "inspect", "plan", "sensitivity", "validate"]

_SECTION = re.compile(r"model(\.(source|task|checkpoint|roles(\.[\w.]+)?))?|data(\.\w+)*")
_MODEL = re.compile(r"(hf|timm|embedded):.*|.*\.py:[A-Za-z_]\w*")


def apply(
    recipe: Recipe | str | Path,
    out: str | Path | None = None,
    *,
    trust: bool = False,
    evaluate: bool = True,
    fresh: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Carries out a recipe: ``compress apply`` from Python.

    Args:
        recipe: a recipe, the path of its file, or the name of a shipped one.
        out: the run folder (default: ``runs/<recipe name>`` in the working directory).
        trust: whether Python files that the recipe names may be run.
        evaluate: False writes and audits the files without running them on the evaluation rows.
        fresh: begins again, and removes what a run left in the folder.
        progress: where to tell how far the run is (default: nowhere).

    Raises:
        UserError: what the user can change, with the place; ``MissingRuntime`` where a library is absent.
    """
    from compress import run

    found = recipe if isinstance(recipe, Recipe) else read(find_recipe(str(recipe)))
    folder = Path(out) if out is not None else Path("runs") / found.name
    with _placed(found):
        return run.apply(found, folder, trust=trust, evaluate=evaluate, fresh=fresh, progress=progress)


def plan(recipe: Recipe | str | Path, *, trust: bool = False, evaluate: bool = True, progress: Progress | None = None) -> Plan:
    """What a recipe will do and cost, without doing it: ``compress plan`` from Python.

    Args:
        recipe: a recipe, the path of its file, or the name of a shipped one.
        trust: whether Python files that the recipe names may be run.
        evaluate: False plans a run that judges nothing.
        progress: where to tell how far the plan is (default: nowhere).

    Raises:
        UserError: what would stop the run, with the place; ``MissingRuntime`` where a library is absent.
    """
    from compress import planning

    found = recipe if isinstance(recipe, Recipe) else read(find_recipe(str(recipe)))
    with _placed(found):
        return planning.make(found, trust=trust, evaluate=evaluate, progress=progress)


def sensitivity(
    recipe: Recipe | str | Path,
    *,
    step: str | None = None,
    trust: bool = False,
    rows: int | None = None,
    by: str | None = None,
    progress: Progress | None = None,
) -> SensitivityReport | TokenSensitivity:
    """What each site of a recipe's ``quantize`` loses alone, or each block where tokens leave, without labels: ``compress
    sensitivity`` from Python.

    Args:
        recipe: a recipe, the path of its file, or the name of a shipped one.
        step: name of the pass that is measured (default: the first ``quantize``, or else the first that takes tokens out).
        trust: whether Python files that the recipe names may be run.
        rows: calibration rows on which losses are measured (default: 64, or as ``mixed`` says).
        by: a setting that has to be among those that are measured: refused before anything is, where it is not.
        progress: where to tell how far it is (default: nowhere).

    Raises:
        UserError: what the user can change, with the place; ``MissingRuntime`` where a library is absent.
    """
    from compress.measured_pass import measured_pass
    from compress.passes.quantize import Quantize
    from compress.quantization import sensitivity_report
    from compress.tokens import sensitivity as token_sensitivity

    found = recipe if isinstance(recipe, Recipe) else read(find_recipe(str(recipe)))
    with _placed(found):
        number, measured = measured_pass(found, step)
        if isinstance(measured, Quantize):
            return sensitivity_report.make(found, number, measured, trust=trust, rows=rows, by=by, progress=progress)
        return token_sensitivity.make(found, number, measured, trust=trust, rows=rows, by=by, progress=progress)


@contextmanager
def _placed(recipe: Recipe) -> Iterator[None]:
    """Puts the place in the recipe before a mistake that names its section or its model alone."""
    try:
        yield
    except UserError as error:
        if _SECTION.fullmatch(error.where):
            error.where = f"{recipe.place(*error.where.split('.', 2))}: {error.where}"
        elif error.where.startswith(("hf:", "timm:")):
            error.where = f"{recipe.place('model', 'source')}: {error.where}"
        raise


def extract(
    run: str | Path,
    out: str | Path | None = None,
    *,
    trust: bool = False,
    evaluate: bool = True,
    fresh: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> Report:
    """Cuts a smaller model out of a run with ``nest_widths``: ``compress extract`` from Python.

    Args:
        run: the run folder.
        out: the folder of the new run (default: beside it, named after the run and the width).
        trust, evaluate, fresh, progress: as of ``apply``.
        options: of the pass ``extract_width``, such as ``width=0.5`` or ``macs=0.7``.

    Raises:
        UserError: what the user can change, with the place; ``MissingRuntime`` where a library is absent.
    """
    from compress.width.extraction import extracting

    asked = {name: tuple(value) if isinstance(value, list) else value for name, value in options.items() if value is not None}
    recipe, folder = extracting(Path(run), None if out is None else Path(out), asked)
    try:
        return apply(recipe, folder, trust=trust, evaluate=evaluate, fresh=fresh, progress=progress)
    except UserError as error:
        made = folder / "recipe.yaml"
        if not made.is_file():  # nothing was begun: a place in it would lead nowhere
            error.where = re.sub(rf"{re.escape(str(made))}(:\d+)*", f"the recipe of {run}", error.where)
        raise


def inspect(target: Recipe | str | Path, *, trust: bool = False) -> tuple[Source, Anatomy]:
    """The model of a recipe, or a model alone (``hf:path``, ``timm:name``, ``file.py:function``), and its parts.

    Raises:
        UserError: what the user can change, with the place; ``MissingRuntime`` where a library is absent.
    """
    from compress.anatomy import find
    from compress.sources import load_model

    spec, base, seed = _model_of(target)
    source = load_model(spec.source, base=base, trust=trust, task=spec.task, checkpoint=spec.checkpoint, seed=seed)
    roles = {str(role): list(paths) for role, paths in spec.roles.items()}
    return source, find(source.model, source.signature, source.example(), roles)


def validate(folder: str | Path, *, trust: bool = False, progress: Progress | None = None) -> Report:
    """Judges the files of a finished run again: ``compress validate`` from Python."""
    from compress import validation

    return validation.validate(Path(folder), trust=trust, progress=progress)


def _model_of(target: Recipe | str | Path) -> tuple[ModelSpec, Path, int]:
    if isinstance(target, str) and _MODEL.fullmatch(target) and not os.path.lexists(target):
        return ModelSpec(source=target), Path(), 0
    if not isinstance(target, Recipe) and os.path.isfile(os.path.join(target, "config.json")):
        raise UserError(str(target), "is the folder of a model, not a recipe", f"Write hf:{target} for the model in it.")
    recipe = target if isinstance(target, Recipe) else read(find_recipe(str(target)))
    return recipe.model, recipe.base, recipe.seed
