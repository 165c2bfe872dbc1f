"""The JSON Schema of recipes as editors need it: the reader's own, with more to show and the same to allow.

Written for what the YAML language server of VS Code and others shows: ``description`` and ``markdownDescription`` at every
key and at every name that may stand alone, ``default`` where there is one, ``enum`` for the keys of mappings. A test holds
that it allows exactly what the reader's schema allows.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from typing import Any

__all__ = ["editor_schema"]

Schema = dict[str, Any]

_COLUMNS = {
    "text": "the text, or the first of two sentences",
    "pair": "the second of two sentences",
    "label": "the class (a number or a name), or a score",
    "image": "the image, as bytes or in the layout that `datasets` writes",
}


@functools.cache
def editor_schema() -> Schema:
    """The schema that ``compress schema`` prints (draft 2020-12)."""
    from compress.exporters import known_exporters
    from compress.passes import known_passes
    from compress.recipe import recipe_schema
    from compress.shipped import summary

    schema = copy.deepcopy(recipe_schema())
    for key, known in (("passes", known_passes()), ("export", known_exporters())):
        told = {name: summary(model) for name, model in known.items()}
        _name_choices(schema["properties"][key]["items"], told, schema["$defs"])
    for part in list(_parts(schema)):
        _without_null(part)
        _keys(part)
        _described(part)
    for part in _parts(schema):
        for name, option in part.get("properties", {}).items():
            if "title" in option and option["title"] != name:
                del option["title"]
    return schema


def _name_choices(items: Schema, told: dict[str, str], definitions: Schema) -> None:
    """Says at each name what it does, whether it stands alone or has options; a name with nothing after its colon is taken
    for the name alone by the definition's own type, because servers read a union there as a value to fill in."""
    for choice in items["anyOf"]:
        if "properties" not in choice:
            names = choice.pop("enum", None) or [choice.pop("const")]
            choice |= {"enum": names, "title": "a name alone", "description": "With the defaults of all options."}
            choice["enumDescriptions"] = [told[name].replace("`", "") for name in names]
            continue
        ((name, value),) = choice["properties"].items()
        reference = value if "$ref" in value else next(one for one in value["anyOf"] if "$ref" in one)
        if reference is not value:
            definitions[reference["$ref"].rpartition("/")[2]]["type"] = ["object", "null"]
        choice["title"] = name
        choice["properties"][name] = {"$ref": reference["$ref"], "title": name, "description": told[name]}


def _parts(schema: Any) -> Iterator[Schema]:
    """Every schema in a schema, itself first."""
    if not isinstance(schema, dict):
        return
    yield schema
    for key in ("anyOf", "oneOf", "allOf", "prefixItems"):
        for one in schema.get(key, ()):
            yield from _parts(one)
    for key in ("properties", "$defs"):
        for one in schema.get(key, {}).values():
            yield from _parts(one)
    for key in ("items", "additionalProperties"):
        yield from _parts(schema.get(key))


def _without_null(part: Schema) -> None:
    """No default is no default: editors would write ``null`` into the file."""
    if "default" in part and part["default"] is None:
        del part["default"]


def _keys(part: Schema) -> None:
    """The known keys of a mapping as properties: editors complete those, and not ``propertyNames``."""
    names = part.get("propertyNames", {}).get("enum")
    if names is None or not isinstance(part.get("additionalProperties"), dict):
        return
    value = part["additionalProperties"]
    part["properties"] = {
        name: {**copy.deepcopy(value), "description": _COLUMNS.get(name, f"module paths of the role {name}")} for name in names
    }
    part["additionalProperties"] = False
    del part["propertyNames"]


def _described(part: Schema) -> None:
    """Descriptions in running lines, and as Markdown where they hold code."""
    description = part.get("description")
    if not isinstance(description, str):
        return
    plain = "\n\n".join(" ".join(paragraph.split()) for paragraph in description.replace("``", "`").split("\n\n"))
    part["description"] = plain
    if "`" in plain:
        part["markdownDescription"] = plain
