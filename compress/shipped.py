"""The recipes that come with the package: finding them, listing them, and the text of ``recipes/README.md``."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calibrate.errors import UserError

if TYPE_CHECKING:
    from pydantic import BaseModel

__all__ = ["KINDS", "Shipped", "find_recipe", "options", "readme", "recipes_folder", "shipped_recipes", "summary"]

KINDS = ("To begin with", "Text", "Language models", "Images", "A model of your own")
"""What a recipe is for, in the order in which recipes are listed."""
_DEVICES = {"onnx": "CPU", "coreml": "phone", "tensorrt": "NVIDIA GPU"}


@dataclass(frozen=True)
class Shipped:
    """A recipe of the package: its name, its file, what its leading comment says, and what of it tells it from the others.

    Attributes:
        kind: one of ``KINDS``.
        devices: what its files are for: CPU, phone, NVIDIA GPU.
        passes: what is done, in order: "weights 8 bits, activations static".
    """

    name: str
    path: Path
    comment: str
    kind: str
    devices: tuple[str, ...]
    passes: tuple[str, ...]

    @property
    def title(self) -> str:
        """The first line of the comment."""
        return self.comment.split("\n")[0]

    @classmethod
    def of(cls, path: Path) -> Shipped:
        """Reads the file as YAML alone: torch and pydantic are not needed to list recipes."""
        from compress.yaml_positions import parse

        text = path.read_text("utf-8")
        root = parse(text).root
        content: Any = root.data() if root is not None else {}
        devices = tuple(word for name, word in _DEVICES.items() if name in _names(content["export"]))
        return cls(path.stem, path, _comment(text), _kind(content), devices, tuple(map(_told, content["passes"])))


def recipes_folder() -> Path:
    """The folder of the shipped recipes: in the installed package, or beside the packages in a checkout."""
    import importlib.resources

    try:
        installed = Path(str(importlib.resources.files("compress.recipes") / "quickstart.yaml"))
        if installed.is_file():
            return installed.parent
    except (ModuleNotFoundError, TypeError):
        pass
    return Path(__file__).resolve().parent.parent / "recipes"


def shipped_recipes(folder: Path | None = None) -> list[Shipped]:
    """All shipped recipes, by kind and name."""
    folder = folder or recipes_folder()
    found = [Shipped.of(path) for path in folder.glob("*.yaml")]
    return sorted(found, key=lambda one: (KINDS.index(one.kind), one.name))


def find_recipe(given: str) -> Path:
    """The file of a recipe, by its path or by the name of a shipped one.

    Raises:
        UserError: there is neither; names the nearest shipped one.
    """
    path = Path(given)
    names = {shipped.name: shipped.path for shipped in shipped_recipes()}
    if os.path.lexists(path):
        return path
    if given in names:
        return names[given]
    near = difflib.get_close_matches(path.stem, names, n=1, cutoff=0.5)
    hint = f"Shipped with the package: {', '.join(names)}."
    raise UserError(given, "no such recipe", f"Did you mean `{near[0]}`? {hint}" if near else hint)


def readme() -> str:
    """The text of ``recipes/README.md``: the recipes by their comments, and every option of every pass and exporter."""
    from compress.exporters import known_exporters
    from compress.passes import PASSES

    lines = ["# Recipes", "", "This file is written by `compress recipes --markdown`; a test keeps it true.", ""]
    lines += ["`compress apply NAME` runs one by its name. To make your own, copy the nearest one and change the lines that"]
    lines += ["its comments point at; `compress schema` gives editors the names and values of every key.", ""]
    lines += [*_gallery(shipped_recipes())]
    lines += ["", "# Keys of a recipe", "", *_keys()]
    lines += ["", "# Passes", "", *_sections({entry.name: entry for entry in PASSES})]
    lines += ["", "# Exporters", "", *_sections(known_exporters())]
    return "\n".join(lines).rstrip() + "\n"


def options(model: type[BaseModel]) -> list[tuple[str, str, str, str]]:
    """Name, allowed values, default and description of every option of a pass or exporter."""
    from compress.faults import allowed

    schema = model.model_json_schema()
    made = []
    for name, field in schema.get("properties", {}).items():
        default = "required" if name in schema.get("required", []) else _yaml(field.get("default"))
        description = " ".join(str(field.get("description", "")).split())
        made.append((name, allowed(schema, [name]), default, description))
    return made


def summary(model: type[BaseModel]) -> str:
    """The first paragraph of a docstring, on one line."""
    return " ".join((model.__doc__ or "").strip().split("\n\n")[0].split()).replace("``", "`")


def _gallery(shipped: list[Shipped]) -> Iterable[str]:
    """The recipes: a table, then what each says of itself, by kind."""
    yield from ("| | recipe | for | what is done |", "|---|---|---|---|")
    for before, one in zip([None, *shipped], shipped, strict=False):
        kind = "" if before is not None and before.kind == one.kind else one.kind
        link = f"[{one.name}](#{one.name})"
        yield f"| {kind} | {link} | {', '.join(one.devices)} | {'; '.join(dict.fromkeys(one.passes))} |"
    for kind in KINDS:
        yield from ("", f"## {kind}")
        for one in shipped:
            if one.kind == kind:
                yield from ("", f"### {one.name}", "", f"[{one.path.name}]({one.path.name})", "", *one.comment.split("\n"))


def _kind(content: Mapping[str, Any]) -> str:
    model, form = content["model"], content["data"]["format"]
    if form == "text":
        causal = isinstance(model, dict) and model.get("task") == "causal-lm"
        return "Language models" if causal else "Text"
    return {"embedded": "To begin with", "arrays": "A model of your own"}.get(form, "Images")


def _told(entry: Any) -> str:
    """A pass of a recipe in a few words."""
    ((name, options),) = entry.items() if isinstance(entry, dict) else ((str(entry), {}),)
    if name != "quantize":
        return str(name).replace("_", " ")
    rounded = options.get("activations", "static")
    if mixed := options.get("mixed"):
        bits = f"weights {' or '.join(map(str, mixed.get('candidates', ['chosen'])))} bits"
    else:
        weights = options.get("weights", 8)
        bits = f"weights {weights} bits" if isinstance(weights, int) else f"weights {weights}"
    return f"{bits}, activations {'float' if rounded == 'none' else rounded}"


def _names(entries: Iterable[Any]) -> list[str]:
    """The names of passes or exporters as a recipe lists them, with options or without."""
    return [next(iter(entry)) if isinstance(entry, dict) else str(entry) for entry in entries]


def _keys() -> Iterable[str]:
    from compress.recipe import Recipe
    from compress.sections import Accept, DataSpec, Measure, ModelSpec, Split

    sections: dict[str, type[BaseModel]] = {
        "recipe": Recipe,
        "model": ModelSpec,
        "data": DataSpec,
        "data.calibration`, `data.validation` and `data.evaluation": Split,
        "accept": Accept,
        "measure": Measure,
    }
    yield from _sections(sections)


def _sections(choices: Mapping[str, type[BaseModel]]) -> Iterable[str]:
    for number, (name, choice) in enumerate(choices.items()):
        yield from [""] if number else []
        yield from (f"## `{name}`", "", summary(choice))
        if source := getattr(choice, "source", ""):
            yield from ("", f"Source: {source}")
        rows = options(choice)
        if rows:
            yield from ("", "| option | values | default | |", "|---|---|---|---|")
        for row in rows:
            cells = (f"`{row[0]}`", *(cell.replace("|", "\\|") for cell in row[1:]))
            yield f"| {' | '.join(cells)} |"


def _comment(text: str) -> str:
    lines = []
    for line in text.split("\n"):
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#").removeprefix(" "))
    return "\n".join(lines).rstrip()


def _yaml(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, dict):
        said = [f"{key}: {word}" for key, inner in value.items() if (word := _yaml(inner))]
        return f"{{{', '.join(said)}}}" if said else ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return f"[{', '.join(_yaml(item) for item in value)}]" if value else ""
    return str(value)
