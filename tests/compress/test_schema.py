"""The JSON Schema of recipes: it reaches every option, and editors judge a recipe as the reader does."""

from __future__ import annotations

import copy
import functools
import json
import operator
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import jsonschema
import pytest
from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo
from sweeps import swept

from compress.anatomy import ROLES
from compress.editor_schema import editor_schema
from compress.exporters import EXPORTERS
from compress.faults import allowed, alternatives
from compress.passes import known_passes
from compress.recipe import Recipe, RecipeError, parse_recipe, recipe_schema
from compress.sections import Accept, DataSpec, Limits, Measure, ModelSpec, Role, Split
from compress.shipped import recipes_folder
from compress.yaml_positions import parse

VALIDATOR = jsonschema.Draft202012Validator(editor_schema())
RECIPES = sorted([*recipes_folder().glob("*.yaml"), *(Path(__file__).parents[1] / "benchmarks" / "recipes").glob("*.yaml")])


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
    if value is GONE:
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
    for schema in (recipe_schema(), editor_schema()):
        jsonschema.Draft202012Validator.check_schema(schema)
        assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
        json.dumps(schema, allow_nan=False)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipes_are_valid_in_both(path: Path) -> None:
    VALIDATOR.validate(values(path))
    assert not refused(values(path))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("weights: 8", "wieghts: 8"),
        ("weights: 8", "weights: 5"),
        ("weights: 8", 'weights: "8"'),
        ("activations: static", "activations: [static]"),
        ("- quantize:", "- quantise:"),
        ("metric_drop: 0.005", "metric_drop: much"),
        ("sqnr_db: 20", "sqnr_db: -1"),
        ("format: text", "format: words"),
        ("tokens: 64", "tokens: 0"),
        ("label: label", "lable: label"),
        ("- onnx", "- onnx: {opset: 12}"),
        ("- onnx", "- onnx: {dynamic: batch}"),
        ("- onnx", "- onnx: {}\n    coreml: {}"),
        ("model: hf:path/to/model", "model: path/to/model"),
        ("model: hf:path/to/model", ""),
        ("batch_sizes: [1, 8]", "batch_sizes: []"),
        ("rows: 256", "rows: some"),
    ],
)
def test_wrong_recipes_are_rejected_by_both(old: str, new: str) -> None:
    text = (recipes_folder() / "int8-text-encoder.yaml").read_text()
    assert old in text
    document = parse(text.replace(old, new))
    assert document.root is not None
    assert not VALIDATOR.is_valid(document.root.data())
    assert refused(document.root.data())


@pytest.mark.parametrize("path", swept(RECIPES, RECIPES[::4]), ids=lambda path: path.stem)
def test_what_is_done_to_a_recipe_is_judged_the_same(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What keys say together (``contradictions``) is beyond JSON Schema and is switched off."""
    monkeypatch.setattr("compress.contradictions.contradictions", lambda *_: [])
    assert judged_alike(values(path), (GONE, {"@": 1}), samples=False) > 20


@pytest.mark.slow
def test_every_value_at_every_key_is_judged_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Recipes that together name every key, each with every kind of value that it may have, and with wrong ones."""
    monkeypatch.setattr("compress.contradictions.contradictions", lambda *_: [])
    documents = list(complete())
    written = {tuple(step for step in place if isinstance(step, str)) for _, one in documents for place in places(one)}
    assert {place for place in keys(editor_schema()) if place not in written} == set(), "keys that no recipe here names"
    assert sum(judged_alike(document, WRONG, below=key) for key, document in documents) > 1000


GONE = object()
WRONG: tuple[Any, ...] = (
    GONE, None, "", "@", "8", "true", -7, 0, 3, 0.5, 10**12, True, [], {}, ["@"], [1, 2], {"@": 1},
)  # fmt: skip
"""8.0 is not among them: JSON Schema takes it for an integer, the reader, which sees how it is written, does not."""


def judged_alike(data: Any, wrong: tuple[Any, ...], samples: bool = True, below: str | None = None) -> int:
    """How many of the recipes that one change makes of a sound one are refused by the schema; fails where the reader judges
    any of them differently. With ``below`` only what stands at or below that key is changed."""
    assert VALIDATOR.is_valid(data)
    assert not refused(data)
    refusals = 0
    for place in places(data):
        if below is not None and place[0] != below:
            continue
        meant = [sample(one) for one in alternatives(editor_schema(), place)] if samples else []
        strangers = [((*place[:-1], "stranger"), 1)] if isinstance(place[-1], str) else []
        for where, value in [*((place, value) for value in (*wrong, *meant)), *strangers]:
            mutant = changed(data, where, value)
            invalid = not VALIDATOR.is_valid(mutant)
            assert refused(mutant) == (invalid or refused_by_a_check(mutant)), (where, value)
            refusals += invalid
    return refusals


def sample(schema: Any) -> Any:
    """A value that a schema allows, with all its keys."""
    if "$ref" in schema or "anyOf" in schema:
        members = alternatives({"$defs": editor_schema()["$defs"], **schema}, ())
        return sample(next(one for one in members if one.get("type") != "null"))
    if "const" in schema or "enum" in schema:
        return schema.get("enum", [schema.get("const")])[0]
    if schema.get("examples") and "properties" not in schema:
        return schema["examples"][0]
    kind = schema.get("type")
    if kind in ("integer", "number"):
        least = schema.get("minimum", schema.get("exclusiveMinimum", 0))
        return least if "minimum" in schema else least + 1
    if kind == "array":
        given = schema.get("prefixItems", [schema["items"]] if "items" in schema else [])
        return [sample(one) for one in given]
    if kind in ("object", ["object", "null"]):
        free = schema.get("additionalProperties")
        made = {name: sample(one) for name, one in schema.get("properties", {}).items()}
        return made if not isinstance(free, dict) else {**made, "tokens": sample(free)}
    return {"string": "text", "boolean": True, "null": None}[kind]


def complete() -> Iterator[tuple[str, dict[str, Any]]]:
    """Small recipes that together name every key of the schema, and the key of each that it is about."""
    schema = editor_schema()
    least = {"model": "hf:x", "data": {"format": "text"}, "passes": [], "export": []}
    for key in schema["properties"]:
        if key in ("passes", "export"):
            continue
        for one in alternatives(schema, [key]):
            if one.get("type") != "null":
                yield from ((key, made) for made in with_mappings({**least, key: sample(one)}))
    for key, known in (("passes", known_passes()), ("export", {one.format: one for one in EXPORTERS})):
        for name, entry in known.items():
            reference = next(one for one in alternatives(schema, [key, 0, name]))
            for options in (one for part in apart(entry, sample(reference)) for one in sound(entry, part)):
                yield from ((key, made) for made in with_mappings({**least, key: [{name: options}]}))
            if not refused({**least, key: [name]}):
                yield key, {**least, key: [name, {name: None}, {name: {}}]}


def with_mappings(document: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The recipe, and one for each place at which a mapping may stand for something simpler."""
    yield document
    for place in places(document):
        for one in alternatives(editor_schema(), place):
            if "properties" in one and not isinstance(functools.reduce(operator.getitem, place, document), dict):
                yield changed(document, place, sample(one))


COMPANIONS: dict[str, dict[str, Any]] = {
    "alpha": {"engine": "nncf"},
    "scale_estimation": {"engine": "nncf", "weights": 4, "activations": "none"},
    "sublayers": {"count": 1},
    "rows": {"count": 1, "score": "output"},
}
"""Options that mean nothing without others."""


def apart(model: Any, options: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The options, and one for each further mapping that an option needs because its own keys do not go together."""
    made = dict(options)
    for name, value in options.items():
        inner = [one for one in typing.get_args(model.model_fields[name].annotation) if hasattr(one, "model_fields")]
        if inner and isinstance(value, dict):
            made[name], *others = sound(inner[0], value)
            yield from ({name: other} for other in others)
    yield made


def sound(model: Any, options: dict[str, Any], needed: dict[str, Any] | None = None) -> Iterator[dict[str, Any]]:
    """The options in as few mappings as the model takes them: some do not go together."""
    if needed is None:
        needed = {name: value for name, value in options.items() if model.model_fields[name].is_required()}
    kept: dict[str, Any] = dict(COMPANIONS.get(next(iter(options)), {}))
    left: dict[str, Any] = {}
    for name, value in options.items():
        try:
            model(**{**needed, **kept, name: value})
            kept[name] = value
        except ValidationError:
            left[name] = value
    assert kept, f"{model.__name__} takes none of {left}"
    yield {**needed, **kept}
    if left := {name: value for name, value in left.items() if name not in needed}:
        yield from sound(model, left, needed)


def keys(schema: Any, path: tuple[str, ...] = (), part: Any = None) -> Iterator[tuple[str, ...]]:
    """Every key that a recipe may have, as the keys on the way to it."""
    for one in alternatives({"$defs": schema["$defs"], **(part or schema)}, ()):
        for name, inner in one.get("properties", {}).items():
            yield (*path, name)
            yield from keys(schema, (*path, name), inner)
        if isinstance(one.get("items"), dict):
            yield from keys(schema, path, one["items"])


def named(model: type[BaseModel]) -> dict[str, FieldInfo]:
    """The options by the names that a recipe gives them."""
    return {field.alias or name: field for name, field in model.model_fields.items()}


def test_it_reaches_every_option_of_every_pass_and_exporter() -> None:
    schema = recipe_schema()
    for name, entry in known_passes().items():
        for option in named(entry):
            assert alternatives(schema, ["passes", 0, name, option]), (name, option)
    for exporter in EXPORTERS:
        for option in named(exporter):
            assert alternatives(schema, ["export", 0, exporter.format, option]), (exporter, option)


def test_every_option_is_described() -> None:
    """A key without a description is a key that nobody can use from an editor."""
    schema = recipe_schema()
    own = [Recipe, *(part for part in _parts(Recipe))]
    for model in [*own, *known_passes().values(), *EXPORTERS]:
        for name, field in named(model).items():
            assert field.description, f"{model.__name__}.{name}"
            assert allowed(model.model_json_schema(), [name]), f"{model.__name__}.{name}"
    assert schema["additionalProperties"] is False
    for name, part in schema["$defs"].items():
        if part.get("type") == "object" and "properties" in part:
            assert part["additionalProperties"] is False, name


def mappings(part: Any) -> Iterator[dict[str, Any]]:
    """Every schema with properties, in a schema."""
    if isinstance(part, dict):
        if "properties" in part and not isinstance(part["properties"].get("type"), str):
            yield part
        for inner in part.values():
            yield from mappings(inner)
    elif isinstance(part, list):
        for inner in part:
            yield from mappings(inner)


def test_editors_find_a_description_at_every_key_and_no_key_beside_them() -> None:
    found = list(mappings(editor_schema()))
    assert len(found) > 15
    for part in found:
        assert part["additionalProperties"] is False, part.get("title")
        for name, option in part["properties"].items():
            assert len(option.get("description", "")) > 5, f"{part.get('title')}: {name}"
            assert "``" not in option["description"]
            assert option.get("markdownDescription", option["description"]) == option["description"]
            assert option.get("default", ...) is not None, f"an editor would write null: {name}"
    names = [one for part in found for one in part.get("anyOf", [])]
    assert all(len(one["enumDescriptions"]) == len(one["enum"]) for one in names if "enumDescriptions" in one)
    for key in ("passes", "export"):
        alone = next(one for one in alternatives(editor_schema(), [key, 0]) if "enum" in one)
        assert len(alone["enumDescriptions"]) == len(alone["enum"]) > 0


def test_defaults_are_those_of_the_reader() -> None:
    """In the printed schema, at every place of every pass, exporter and section; absent where there is none or it is null."""
    schema = editor_schema()
    models = [(["passes", 0, name], entry) for name, entry in known_passes().items()]
    models += [(["export", 0, entry.format], entry) for entry in EXPORTERS]
    models += [([], Recipe), (["data"], DataSpec), (["data", "evaluation"], Split), (["accept"], Accept)]
    models += [(["accept", "onnx"], Limits), (["model"], ModelSpec), (["measure"], Measure)]
    count = 0
    for path, model in models:
        fields = named(model)
        shown = next(one for one in alternatives(schema, path) if set(fields) <= set(one.get("properties", {})))
        assert set(shown["properties"]) == set(fields)
        assert set(shown.get("required", [])) == {name for name, field in fields.items() if field.is_required()}
        for name, field in fields.items():
            default = None if field.is_required() else TypeAdapter(Any).dump_python(field.get_default(), mode="json")
            written = shown["properties"][name].get("default")
            if isinstance(default, dict) and isinstance(written, dict):
                assert {key: value for key, value in default.items() if written.get(key) != value and value} == {}
            elif (model, name) != (Recipe, "name"):
                assert written == default, (model.__name__, name)
                count += written is not None
    assert count > 30


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
