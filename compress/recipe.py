"""The recipe: one YAML file is the whole run. Strict, with the place of every fault, all faults at once."""

from __future__ import annotations

import functools
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PrivateAttr, ValidationError

from calibrate.errors import UserError
from compress.choices import Chosen, Short
from compress.exporters import known_exporters
from compress.faults import RecipeError, explain, mistyped
from compress.passes import Pass, known_passes
from compress.sections import Accept, DataSpec, Limits, Measure, MeasureWhen, ModelSource, ModelSpec, RowSpan, Section, Split
from compress.yaml_positions import Document, Fault, Step, parse
from export.contract import Exporter

__all__ = [
    "Accept",
    "DataSpec",
    "Limits",
    "Measure",
    "ModelSpec",
    "Recipe",
    "RecipeError",
    "RowSpan",
    "Split",
    "parse_recipe",
    "read",
    "recipe_schema",
]

_MAX_BYTES = 256 * 1024
_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"


def _without_default(schema: dict[str, Any]) -> None:
    del schema["default"]


class Recipe(Section):
    """One run: the model, the data, the passes in order, the files to write, and the contract they must meet."""

    name: Annotated[str, Field(pattern=_NAME, max_length=100, examples=["bert-int8"])] = Field(
        "",
        description="name of the run (default: the file's name); its folder is runs/<name>",
        json_schema_extra=_without_default,
    )
    model: Annotated[ModelSpec, Short("source", ModelSource)] = Field(description="the model: its source, or a mapping")
    data: DataSpec = Field(description="calibration and evaluation rows, and how they become inputs")
    passes: tuple[Annotated[Pass, Chosen(known_passes, "a pass")], ...] = Field(
        description="what is done to the model, in this order; `compress passes` lists them"
    )
    export: tuple[Annotated[Exporter, Chosen(known_exporters, "an exporter")], ...] = Field(description="the files to write")
    accept: Accept = Field(Accept(), description="the contract; a run that misses it exits with code 1 and keeps its files")
    measure: Annotated[Measure, Short("when", MeasureWhen)] = Field(
        Measure(), description="how time is measured, or alone: each_pass"
    )
    undo: Literal["never", "unpaid"] = Field(
        "never",
        description="unpaid: takes back a pass that costs accuracy and brings neither size nor speed; needs measure: each_pass",
    )
    seed: int = Field(0, ge=0, le=2**32 - 1, description="seed of every random choice")
    threads: int = Field(1, ge=1, le=1024, description="threads for passes and for measured runs")

    _text: str = PrivateAttr("")
    _where: str = PrivateAttr("recipe.yaml")
    _base: Path = PrivateAttr(Path())
    _document: Document | None = PrivateAttr(None)

    @classmethod
    def read(cls, path: str | Path) -> Recipe:
        """The recipe in a YAML file; see ``compress.recipe.read``."""
        return read(path)

    @property
    def text(self) -> str:
        """The file as it was written."""
        return self._text

    @property
    def base(self) -> Path:
        """The folder that paths in the recipe are relative to."""
        return self._base

    def path(self, written: Path) -> Path:
        """A path as the recipe writes it, made relative to the recipe's folder."""
        return self._base / written

    def place(self, *path: Step, key: bool = False) -> str:
        """``file:line:column`` of a value (or of its key), for errors that turn up later:
        ``place("passes", 0, "quantize", "group_size")``. Steps that the file does not write are passed over."""
        line, column = self._document.place(path, key=key) if self._document is not None else (1, 1)
        return f"{self._where}:{line}:{column}"


def read(path: str | Path, *, base: Path | None = None) -> Recipe:
    """The recipe in a YAML file.

    Args:
        path: the file.
        base: the folder that paths in the recipe are relative to (default: that of the file).

    Raises:
        UserError: the file cannot be read.
        RecipeError: with every fault of the file and its place.
    """
    path = Path(path)
    return parse_recipe(_text_of(path), where=str(path), base=path.parent if base is None else base, stem=path.stem)


def parse_recipe(text: str, *, where: str = "recipe.yaml", base: Path = Path(), stem: str = "recipe") -> Recipe:
    """The recipe in a YAML text.

    Args:
        where: what errors call the file.
        base: the folder that paths in the recipe are relative to.
        stem: the name of the run where the text has none.

    Raises:
        RecipeError: with every fault of the text and its place.
    """
    from compress.contradictions import contradictions

    document = parse(text)
    if document.root is None:
        raise RecipeError(where, document.faults)
    data = document.root.data()
    if not isinstance(data, dict):
        hint = "Begin with `model:`; `compress recipes` lists examples."
        place = (document.root.line, document.root.column)
        raise RecipeError(where, [*document.faults, Fault(*place, "a recipe is a mapping of keys to values", hint)])
    faults = [*document.faults, *mistyped(document, recipe_schema())]
    try:
        recipe = Recipe.model_validate({"name": _name(stem), **data})
    except ValidationError as error:
        faults += explain(error.errors(include_url=False), document, recipe_schema())
    else:
        if faults:
            raise RecipeError(where, _once(faults))
        recipe._text, recipe._where, recipe._base, recipe._document = text, where, base, document
        for step in recipe.passes:
            step._base = base
        faults += contradictions(recipe, document)
    if faults:
        raise RecipeError(where, _once(faults))
    return recipe


def _text_of(path: Path) -> str:
    """The text of a small UTF-8 file.

    Raises:
        UserError: the file is absent, no regular file, not readable, larger than 256 KiB or not UTF-8 (with the place).
    """
    where = str(path)
    if os.path.isdir(path):
        raise UserError(where, "is a folder, a recipe is one YAML file", f"Name the file in it, such as {path / 'recipe.yaml'}.")
    if not os.path.exists(path):
        raise UserError(where, "no such file", "`compress recipes` lists the recipes that come with the package.")
    if not os.path.isfile(path):
        raise UserError(where, "is not a regular file", "A recipe is one YAML file.")
    try:
        size = path.stat().st_size
        raw = path.read_bytes() if size <= _MAX_BYTES else b""
    except OSError as error:
        raise UserError(where, f"cannot be read: {error.strerror}", "Check the permissions of the file.") from None
    if size > _MAX_BYTES:
        raise UserError(f"{where}:1:1", f"{size} bytes is too large for a recipe", f"A recipe has at most {_MAX_BYTES} bytes.")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = raw[: error.start].decode("utf-8", "replace")
        line, column = before.count("\n") + 1, len(before) - (before.rfind("\n") + 1) + 1
        what = f"byte 0x{raw[error.start]:02x} is not UTF-8 text"
        raise UserError(f"{where}:{line}:{column}", what, "Save the file as UTF-8.") from None


@functools.cache
def recipe_schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of a recipe, with every option of every pass and exporter."""
    schema = Recipe.model_json_schema(mode="validation")
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "transformer-compress recipe"}


def _once(faults: list[Fault]) -> list[Fault]:
    """One fault a place: what the YAML reader refused is not complained about again."""
    seen: dict[tuple[int, int], Fault] = {}
    for fault in faults:
        seen.setdefault((fault.line, fault.column), fault)
    return list(seen.values())


def _name(stem: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip("-._")[:100] or "recipe"
