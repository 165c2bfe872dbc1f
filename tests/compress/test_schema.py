"""The JSON Schema of recipes: it reaches every option, and editors judge a recipe as the reader does."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import jsonschema
import pytest
from pydantic import ValidationError

from compress.anatomy import ROLES
from compress.exporters import EXPORTERS
from compress.faults import allowed, alternatives
from compress.passes import known_passes
from compress.recipe import Recipe, RecipeError, parse_recipe, recipe_schema
from compress.sections import Limits, Role
from compress.shipped import recipes_folder
from compress.yaml_positions import parse

VALIDATOR = jsonschema.Draft202012Validator(recipe_schema())
RECIPES = sorted(recipes_folder().glob("*.yaml"))


def values(path: Path) -> Any:
    document = parse(path.read_text())
    assert document.root is not None
    return document.root.data()


def places(data: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Every place of a document that holds something."""
    steps: Any = data if isinstance(data, dict) else range(len(data)) if isinstance(data, list) else ()
    for step in steps:
        yield (*path, step)
        yield from places(data[step], (*path, step))


def changed(data: Any, path: tuple[str | int, ...], value: Any) -> Any:
    made = copy.deepcopy(data)
    holder = made
    for step in path[:-1]:
        holder = holder[step]
    if value is None:
        del holder[path[-1]]
    else:
        holder[path[-1]] = value
    return made


def refused(data: Any) -> bool:
    try:
        parse_recipe(json.dumps(data))
    except RecipeError:
        return True
    return False


def refused_by_a_check(data: Any) -> bool:
    """Whether a pass refuses options that are each in order (a validator over several of them): no schema says that."""
    try:
        Recipe.model_validate(data)
    except ValidationError as error:
        return {line["type"] for line in error.errors()} == {"value_error"}
    return False


def test_the_schema_is_a_schema() -> None:
    jsonschema.Draft202012Validator.check_schema(recipe_schema())
    assert recipe_schema()["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    json.dumps(recipe_schema(), allow_nan=False)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipes_are_valid_in_both(path: Path) -> None:
    VALIDATOR.validate(values(path))
    assert not refused(values(path))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_mutant_is_judged_the_same(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every value of a recipe is replaced by wrong ones, removed, and given a stranger beside it.

    What keys say together (``contradictions``) is beyond JSON Schema and is switched off.
    """
    monkeypatch.setattr("compress.contradictions.contradictions", lambda *_: [])
    data, refusals = values(path), 0
    assert VALIDATOR.is_valid(data)
    for place in places(data):
        stranger = (*place[:-1], "stranger")
        mutants = [(place, value) for value in (None, "@", -7, 0.5, True, [], {}, ["@"], {"@": 1}, [-7])]
        for where, value in [*mutants, *([(stranger, 1)] if isinstance(place[-1], str) else [])]:
            mutant = changed(data, where, value)
            invalid = not VALIDATOR.is_valid(mutant)
            assert refused(mutant) == (invalid or refused_by_a_check(mutant)), (where, value)
            refusals += invalid
    assert refusals > 100


def test_it_reaches_every_option_of_every_pass_and_exporter() -> None:
    schema = recipe_schema()
    for name, entry in known_passes().items():
        for option in entry.model_fields:
            assert alternatives(schema, ["passes", 0, name, option]), (name, option)
    for exporter in EXPORTERS:
        for option in exporter.model_fields:
            assert alternatives(schema, ["export", 0, exporter.format, option]), (exporter, option)


def test_every_option_is_described() -> None:
    """A key without a description is a key that nobody can use from an editor."""
    schema = recipe_schema()
    own = [Recipe, *(part for part in _parts(Recipe))]
    for model in [*own, *known_passes().values(), *EXPORTERS]:
        for name, field in model.model_fields.items():
            assert field.description, f"{model.__name__}.{name}"
            assert allowed(model.model_json_schema(), [name]), f"{model.__name__}.{name}"
    assert schema["additionalProperties"] is False
    for name, part in schema["$defs"].items():
        if part.get("type") == "object" and "properties" in part:
            assert part["additionalProperties"] is False, name


def test_a_name_alone_stands_where_all_options_have_defaults() -> None:
    words = {word for one in alternatives(recipe_schema(), ["export", 0]) for word in one.get("enum", [one.get("const")])}
    assert {exporter.format for exporter in EXPORTERS} <= words


def test_the_contract_knows_every_exporter() -> None:
    accept = Recipe.model_fields["accept"].annotation
    assert accept is not None
    for exporter in EXPORTERS:
        assert accept.model_fields[exporter.format].annotation is Limits
        assert exporter.format in allowed(recipe_schema(), ["accept", "unvalidated", 0])


def test_roles_are_those_of_the_anatomy() -> None:
    assert set(get_args(Role)) == set(ROLES)


def _parts(model: Any) -> Iterator[Any]:
    for field in model.model_fields.values():
        for inner in (field.annotation, *getattr(field.annotation, "__args__", ())):
            if isinstance(inner, type) and inner.__module__ == "compress.sections":
                yield inner
                yield from _parts(inner)
