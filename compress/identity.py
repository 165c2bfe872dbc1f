"""What makes two runs the same run: only then does one go on from where the other was interrupted."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import platform
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import calibrate
import compress
import export
from compress import manifest

if TYPE_CHECKING:
    from compress.datasets import Data
    from compress.recipe import Recipe
    from compress.sources import Source

__all__ = ["differences", "identity"]

_PACKAGES = (calibrate, compress, export)


def identity(recipe: Recipe, source: Source, data: Data, out: Path, *, evaluate: bool) -> dict[str, str]:
    """A digest of each thing that a run's files and figures follow from, under the name that messages call it by."""
    from calibrate.latency import processor_name

    contents = {
        "the recipe": [*_content(recipe), os.path.relpath(os.path.realpath(recipe.base), os.path.realpath(out))],
        "the weights": [source.fingerprint],
        "the calibration rows": [data.calibration.fingerprint],
        "the validation rows": [data.validation.fingerprint if data.validation else "none"],
        "the evaluation rows": [data.evaluation.fingerprint if data.evaluation else "none"],
        "the files that passes read": [manifest.digest(file) for step in recipe.passes for file in step.reads if file.is_file()],
        "the other models": [digest for step in recipe.passes for digest in step.fingerprints],
        "the program": [_digest(_program(recipe))],
        "the installed libraries": [json.dumps(manifest.versions(), sort_keys=True), platform.python_version()],
        "the processor": [processor_name(), platform.machine()],
        "the option --no-evaluation": [str(evaluate)],
    }
    return {name: hashlib.sha256(json.dumps(content).encode()).hexdigest() for name, content in contents.items()}


def differences(before: dict[str, str], now: dict[str, str]) -> list[str]:
    """Names of what is not as it was."""
    return [name for name in now if before.get(name) != now[name]]


def _content(recipe: Recipe) -> list[str]:
    """What a recipe asks for, whatever its file looks like."""
    plain = recipe.model_dump(mode="json", exclude={"passes", "export"})
    chosen = [[step.name, step.model_dump(mode="json")] for step in recipe.passes]
    chosen += [[exporter.format, exporter.model_dump(mode="json")] for exporter in recipe.export]
    return [json.dumps(plain, sort_keys=True), json.dumps(chosen, sort_keys=True)]


def _program(recipe: Recipe) -> list[Path]:
    """Source files that a run executes: of these packages, of the packages that add its passes and exporters, and of a model
    of the user's own."""
    files = {file for package in _PACKAGES for folder in package.__path__ for file in Path(folder).rglob("*.py")}
    for kind in (*map(type, recipe.passes), *map(type, recipe.export)):
        root = sys.modules[kind.__module__.partition(".")[0]]
        folders = [Path(folder) for folder in getattr(root, "__path__", ())]
        files |= {file for folder in folders for file in folder.rglob("*.py")} or {Path(inspect.getfile(kind))}
    own = [recipe.base / Path(recipe.model.source.rpartition(":")[0]).expanduser()]
    own += [file for step in recipe.passes for file in step.reads]
    for file in own:
        if file.suffix == ".py":
            files |= _beside(file.parent)
    return sorted(files)


def _beside(folder: Path) -> set[Path]:
    """Modules that were imported from a folder of the user's; some (``torch.classes``) name a file that does not exist."""
    home = folder.resolve()
    loaded = [getattr(module, "__file__", None) for module in list(sys.modules.values())]
    found = {Path(file).resolve() for file in loaded if file and file.endswith(".py")}
    return {file for file in found if file.is_relative_to(home) and "site-packages" not in file.parts and file.is_file()}


def _digest(files: Iterable[Path]) -> str:
    whole = hashlib.sha256()
    for file in files:
        whole.update(hashlib.sha256(file.read_bytes()).digest())
    return whole.hexdigest()
