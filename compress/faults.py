"""Turns what pydantic refuses into faults with a place in the file, the nearest known name and what is allowed."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from pydantic_core import ErrorDetails

from calibrate.errors import UserError
from compress.yaml_positions import Document, Fault, Node, Scalar, Step

__all__ = ["RecipeError", "allowed", "alternatives", "explain", "mistyped", "nearest"]

JsonSchema = Mapping[str, Any]

_SHOWN = 20
_ANY_HINT = "`compress schema` and recipes/README.md tell what may stand there."
_LIKE_BOOLEAN = {"yes": "true", "on": "true", "y": "true", "no": "false", "off": "false", "n": "false"}

_MOST_KEYS = 16
"""That a message names of a mapping."""


class RecipeError(UserError):
    """All faults of one recipe, in the order of the file."""

    def __init__(self, file: str, faults: Iterable[Fault]) -> None:
        self.faults = tuple(sorted(fault if fault.hint else replace(fault, hint=_ANY_HINT) for fault in faults))
        self.file = file
        first = self.faults[0]
        super().__init__(f"{file}:{first.line}:{first.column}", first.what, first.hint)

    def __str__(self) -> str:
        told = [
            str(UserError(f"{self.file}:{fault.line}:{fault.column}", fault.what, fault.hint)) for fault in self.faults[:_SHOWN]
        ]
        if len(self.faults) > _SHOWN:
            told.append(str(UserError(self.file, f"and {len(self.faults) - _SHOWN} more faults", "Correct these first.")))
        return "\n".join(told)


def mistyped(document: Document, schema: JsonSchema) -> list[Fault]:
    """Scalars whose type the schema does not have at their place: pydantic alone would read ``"8"`` as an integer."""
    faults: list[Fault] = []

    def walk(node: Node, path: tuple[Step, ...], options: list[JsonSchema]) -> None:
        content = node.content
        if isinstance(content, dict | list):
            children = content.items() if isinstance(content, dict) else enumerate(content)
            for step, child in children:
                walk(child, (*path, step), [deeper for one in options for deeper in _opened(_child(one, step), schema)])
        elif options and not any(_has_type(one, content) for one in _not_like_text(options, content)):
            faults.append(_refused(path, node, schema))

    if document.root is not None:
        walk(document.root, (), [schema])
    return faults


def _not_like_text(options: list[JsonSchema], value: Scalar) -> list[JsonSchema]:
    """The alternatives without those words that ``value`` is none of, where a number or truth value may stand too: pydantic
    would make one of the text."""
    if not isinstance(value, str) or not any(one.get("type") in ("boolean", "integer", "number") for one in options):
        return options
    return [one for one in options if value in one.get("enum", [one.get("const", value)])]


def _has_type(schema: JsonSchema, value: Scalar) -> bool:
    if "const" in schema or "enum" in schema:
        return any(type(one) is type(value) for one in schema.get("enum", [schema.get("const")]))
    kinds = {
        type(None): ("null",),
        bool: ("boolean",),
        int: ("integer", "number"),
        float: ("number",),
        str: ("string",),
    }
    return "type" not in schema or schema["type"] in kinds[type(value)]


def _refused(path: tuple[Step, ...], node: Node | None, schema: JsonSchema, message: str = "") -> Fault:
    line, column = (node.line, node.column) if node is not None else (1, 1)
    what = f"{_name(path)} is {_shown(node)}, must be {allowed(schema, path) or message}"
    return Fault(line, column, what, _way_out(node, schema, path))


def explain(errors: Sequence[ErrorDetails], document: Document, schema: JsonSchema) -> list[Fault]:
    """One fault for each place that pydantic complains about; the members of a union become one."""
    groups: dict[tuple[Step, ...], list[ErrorDetails]] = {}
    for error in errors:
        path = document.resolve(error["loc"])
        if error["type"] == "missing":
            path = (*path, error["loc"][-1])
        groups.setdefault(path, []).append(error)
    kept = {path: group for path, group in groups.items() if not _holds_deeper(path, groups)}
    return [_fault(path, group, document, schema) for path, group in kept.items()]


def _holds_deeper(path: tuple[Step, ...], groups: Mapping[tuple[Step, ...], list[ErrorDetails]]) -> bool:
    """Whether a deeper place of the same union says it better: in ``[1, x]`` it is the item."""
    if any(error["type"] in ("extra_forbidden", "missing", "fault", "value_error") for error in groups[path]):
        return False
    return any(len(other) > len(path) and other[: len(path)] == path for other in groups)


def _fault(path: tuple[Step, ...], group: list[ErrorDetails], document: Document, schema: JsonSchema) -> Fault:
    error = next((error for error in group if error["type"] in ("fault", "value_error", "assertion_error")), group[0])
    context, above = error.get("ctx", {}), path[:-1]
    if error["type"] == "missing":
        line, column = document.place(above, key=True)
        return Fault(line, column, f"{_name(path)} is missing", _describe_key(schema, path))
    if error["type"] == "extra_forbidden":
        line, column = document.place(path, key=True)
        known = sorted({key for found in alternatives(schema, above) for key in found.get("properties", {})})
        return Fault(line, column, f"unknown key {_cut(str(path[-1]))!r}", nearest(str(path[-1]), known))
    if error["type"] == "fault":
        line, column = document.place((*path, context["key"]) if "key" in context else path, key="key" in context)
        hint = nearest(context["given"], context["known"]) if "known" in context else context.get("hint", "")
        subject = f"{_name(path)} " if context.get("subject") else ""
        return Fault(line, column, subject + str(context["what"]), hint)
    line, column = document.place(path, key=path != document.resolve(path))
    if error["type"] in ("value_error", "assertion_error"):
        message = error["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
        what, _, hint = message.partition("\n")
        return Fault(line, column, f"{_name(path)}: {what}" if path else what, hint.strip() or _note(schema, path))
    if "[key]" in error["loc"]:
        known = [str(name) for found in alternatives(schema, above) for name in found.get("propertyNames", {}).get("enum", [])]
        line, column = document.place(path, key=True)
        return Fault(line, column, f"unknown key {_cut(str(path[-1]))!r}", nearest(str(path[-1]), known))
    return _refused(path, document.node(path), schema, error["msg"].lower())


def nearest(given: str, known: Sequence[str]) -> str:
    """A hint that names the nearest known name and the others."""
    folded = {name.casefold(): name for name in known}
    near = difflib.get_close_matches(given.casefold(), folded, n=1, cutoff=0.5)
    listed = f"Known here: {', '.join(known)}." if known else "Nothing is known here."
    return f"Did you mean {folded[near[0]]}? {listed}" if near else listed


def alternatives(schema: JsonSchema, path: Sequence[Step]) -> list[JsonSchema]:
    """The sub-schemas (references followed, unions opened) that apply at a path into the document."""
    found = _opened(schema, schema)
    for step in path:
        found = [deeper for one in found for deeper in _opened(_child(one, step), schema)]
    return found


def _child(schema: JsonSchema, step: Step) -> JsonSchema | None:
    if isinstance(step, int):
        items = schema.get("prefixItems", [])
        child = items[step] if step < len(items) else schema.get("items")
    else:
        child = schema.get("properties", {}).get(step, schema.get("additionalProperties"))
    return child if isinstance(child, Mapping) else None


def _opened(schema: JsonSchema | None, root: JsonSchema) -> list[JsonSchema]:
    if schema is None:
        return []
    if "$ref" in schema:
        return _opened(root["$defs"][schema["$ref"].rpartition("/")[2]], root)
    for union in ("anyOf", "oneOf"):
        if union in schema:
            return [member for one in schema[union] for member in _opened(one, root)]
    return [schema]


def allowed(schema: JsonSchema, path: Sequence[Step]) -> str:
    """What may stand at a path, in words; empty where nothing is known."""
    options = alternatives(schema, path)
    words = [_word(one, schema) for one in options if one.get("type") != "object"]
    mappings = [one for one in options if one.get("type") == "object"]
    if mappings:
        keys = list(dict.fromkeys(key for one in mappings for key in one.get("properties", {})))
        words.append(_mapping(keys))
    said = list(dict.fromkeys(word for word in words if word))
    return (", or " if any(" or " in word for word in said) else " or ").join(said)


def _mapping(keys: Sequence[str]) -> str:
    """In words; of many keys the first."""
    if not keys:
        return "a mapping"
    rest = len(keys) - _MOST_KEYS
    return f"a mapping with {', '.join(keys)}" if rest < 2 else f"a mapping with {', '.join(keys[:_MOST_KEYS])} and {rest} more"


def _word(schema: JsonSchema, root: JsonSchema) -> str:
    if "const" in schema or "enum" in schema:
        values = schema.get("enum", [schema.get("const")])
        return _joined([_plain(value) for value in values])
    kind = schema.get("type")
    if kind == "boolean":
        return "true or false"
    if kind in ("integer", "number"):
        return ("an integer" if kind == "integer" else "a number") + _bounds(schema)
    if kind == "string":
        examples = schema.get("examples", [])
        return f"text such as {_joined([str(example) for example in examples])}" if examples else "text"
    if kind == "array":
        return _list_word(schema, root)
    if kind == "object":
        return _mapping(list(schema.get("properties", {})))
    return ""


def _list_word(schema: JsonSchema, root: JsonSchema) -> str:
    prefix = schema.get("prefixItems")
    if prefix:
        return f"a list of {len(prefix)} values"
    items = schema.get("items")
    inner = [word for one in _opened(items, root) if (word := _word(one, root))] if isinstance(items, Mapping) else []
    some = "a list that is not empty" if schema.get("minItems") else "a list"
    simple = [] if any(word.startswith("a mapping") for word in inner) else inner
    return f"{some}, each {' or '.join(dict.fromkeys(simple))}" if simple and len(inner) < 4 else some


def _bounds(schema: JsonSchema) -> str:
    low, high = schema.get("minimum"), schema.get("maximum")
    above, below = schema.get("exclusiveMinimum"), schema.get("exclusiveMaximum")
    if low is not None and high is not None:
        return f" from {low:g} to {high:g}" if isinstance(high, float) else f" from {low} to {high}"
    parts = [
        f"{word} {bound:g}"
        for word, bound in (("at least", low), ("above", above), ("at most", high), ("below", below))
        if bound is not None
    ]
    return f" {' and '.join(parts)}" if parts else ""


def _way_out(node: Node | None, schema: JsonSchema, path: Sequence[Step]) -> str:
    content = node.content if node is not None else None
    options = alternatives(schema, path)
    if isinstance(content, str):
        if content.startswith("~"):
            return "Write the whole path: ~ is not expanded."
        kinds = {one.get("type") for one in options}
        if "boolean" in kinds and content.lower() in _LIKE_BOOLEAN:
            return f"Write {_LIKE_BOOLEAN[content.lower()]}."
        if kinds & {"integer", "number", "boolean"} and _reads_as_number(content):
            return "Take it out of the quotes, and leave out units and thousands separators."
        names = [str(value) for one in options for value in one.get("enum", [one.get("const", "")])]
        if near := difflib.get_close_matches(content, [name for name in names if name], n=1, cutoff=0.5):
            return f"Did you mean {near[0]}?"
    return _note(schema, path)


def _reads_as_number(text: str) -> bool:
    return any(character.isdigit() for character in text) or text.lower() in ("true", "false")


def _note(schema: JsonSchema, path: Sequence[Step]) -> str:
    """The description of the field at a path, or of the field that an item of a list belongs to."""
    while path and isinstance(path[-1], int):
        path = path[:-1]
    for holder in alternatives(schema, path[:-1]):
        field = _child(holder, path[-1]) if path else None
        if field and "description" in field:
            return f"{_name(path)}: {_first_sentence(str(field['description']))}"
    return ""


def _describe_key(schema: JsonSchema, path: Sequence[Step]) -> str:
    may_be = allowed(schema, path)
    return f"Add `{path[-1]}:`" + (f" with {may_be}." if may_be else ".")


def _first_sentence(text: str) -> str:
    return " ".join(text.split("\n\n")[0].split())


def _name(path: Sequence[Step]) -> str:
    """The nearest key, with the index of a list item: ``batch_sizes[1]``."""
    name = ""
    for step in path:
        name = f"{name}[{step}]" if isinstance(step, int) else step
    return name or "the recipe"


def _shown(node: Node | None) -> str:
    content = node.content if node is not None else None
    if isinstance(content, dict):
        return "a mapping"
    if isinstance(content, list):
        return "a list" if content else "an empty list"
    if isinstance(content, str):
        return repr(_cut(content))
    return "empty" if content is None else _plain(content)


def _cut(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."


def _plain(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return "null" if value is None else str(value)[:60]


def _joined(words: Sequence[str]) -> str:
    return " or ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else "".join(words)
