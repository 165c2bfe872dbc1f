"""``compress extract``: from a run with ``nest_widths`` the recipe of a smaller model, without scoring anything again."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from calibrate.errors import UserError
from compress import manifest
from compress.passes.extract_width import ExtractWidth
from compress.recipe import Recipe, parse_recipe, read
from compress.width.nested import read as read_nested
from compress.yaml_positions import parse

__all__ = ["extracting", "name_of", "shares"]


_WIDTH = "A width is a share above 0 and at most 1."
_HINTS = {
    "macs": "A budget is a share above 0 and at most 1.",
    "size_ratio": "A budget is a share above 0 and at most 1.",
    "round_to": "Neurons that stay are a multiple of a whole number, at least 1 and at most 1024.",
}


def extracting(run: Path, out: Path | None, options: dict[str, Any]) -> tuple[Recipe, Path]:
    """The recipe that cuts a smaller model out of a run's sorted one, and the folder for it.

    It is the run's own recipe with the passes up to ``nest_widths`` replaced by ``extract_width``; those after it stay, and so do
    data, exporters and contract.

    Args:
        run: the folder of the run.
        out: the folder of the new run (default: beside the other, named after it and the width).
        options: of ``extract_width``, but the folder; none of them None.

    Raises:
        UserError: no such run, it sorted nothing, or the options ask for what it cannot give.
    """
    nested = read_nested(run, whole=True)
    base = (run / manifest.read(run)["base"]).resolve()
    recipe = read(run / "recipe.yaml", base=base)
    step = _step(os.path.relpath(run.resolve(), base), options)
    step.kept(nested)
    name = name_of(manifest.read(run).get("recipe", recipe.name), options)
    folder = out if out is not None else run.resolve().parent / name if run.is_symlink() else run.parent / name
    if folder.resolve() == run.resolve():
        raise UserError(str(folder), "is the run that is cut from", "Name another folder with --out.")
    text = _composed(recipe, step, name, run)
    return parse_recipe(text, where=str(folder / "recipe.yaml"), base=base, stem=name), folder


def shares(asked: Mapping[str, str | None]) -> dict[str, float | tuple[float, ...]]:
    """Numbers as they are written on the command line: one, or several with commas between them; what is not asked is left out.

    Raises:
        UserError: something that is no number, with its option.
    """
    found: dict[str, float | tuple[float, ...]] = {}
    for option, text in asked.items():
        if text is None:
            continue
        where = f"--{option.replace('_', '-')}"
        try:
            numbers = tuple(float(part) for part in text.split(","))
        except ValueError:
            example = "1,0.75,0.5" if option == "widths" else "0.5"
            raise UserError(where, f"{text[:60]!r} is not a number", f"For example {where} {example}.") from None
        if len(numbers) > 1 and option not in ("widths", "heads"):
            raise UserError(where, f"takes one number, not {len(numbers)}", "Widths of single blocks go with --widths.")
        found[option] = numbers if option == "widths" or len(numbers) > 1 else numbers[0]
    return found


def name_of(name: str, options: dict[str, Any]) -> str:
    """A name for the smaller model's run, from the run's name and what is asked for."""
    said = []
    for option, short in (("width", "w"), ("widths", "w"), ("macs", "macs"), ("size_ratio", "size"), ("heads", "heads")):
        if (value := options.get(option)) is not None:
            said.append(short + "-".join(f"{one:g}" for one in (value if isinstance(value, tuple) else (value,))))
    if (number := options.get("round_to")) is not None:
        said.append(f"r{number}")
    found = "-".join([name, *said, *(["repaired"] if options.get("repair") else [])])
    return found if len(found) <= 80 else f"{name[:60]}-mixed-{hashlib.sha256(found.encode()).hexdigest()[:8]}"


def _step(folder: str, options: dict[str, Any]) -> ExtractWidth:
    try:
        return ExtractWidth(run_folder=Path(folder), **options)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = f"--{str(first['loc'][0]).replace('_', '-')}" if first["loc"] else "compress extract"
        what, _, hint = first["msg"].removeprefix("Value error, ").partition("\n")
        if first["loc"]:
            what, hint = f"{first['input']}: {what[0].lower()}{what[1:]}", _HINTS.get(str(first["loc"][0]), _WIDTH)
        raise UserError(where, what, hint) from None


def _composed(recipe: Recipe, step: ExtractWidth, name: str, run: Path) -> str:
    """The run's recipe, with the sorted model for its first passes."""
    root = parse(recipe.text).root
    assert root is not None
    data = root.data()
    assert isinstance(data, dict)
    count = next(number for number, one in enumerate(recipe.passes) if one.nests) + 1
    options = step.model_dump(mode="json", exclude_defaults=True)
    made = {"name": name, **{key: value for key, value in data.items() if key != "name"}}
    made["passes"] = [{step.name: options}, *data["passes"][count:]]
    head = f"# Made by `compress extract` from the run {run.name}: its recipe, with the sorted model for its first passes.\n"
    return head + yaml.safe_dump(made, sort_keys=False, allow_unicode=True)
