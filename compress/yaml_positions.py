"""Reads YAML text into plain values and remembers where every key and value stands; never builds objects."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml
from yaml.events import (
    AliasEvent,
    DocumentStartEvent,
    Event,
    MappingEndEvent,
    MappingStartEvent,
    ScalarEvent,
    SequenceEndEvent,
    SequenceStartEvent,
)
from yaml.reader import ReaderError

__all__ = ["Document", "Fault", "Node", "Scalar", "Step", "parse"]

Scalar = None | bool | int | float | str
Step = str | int
"""One step of a path into the document: a key or a list index."""

MAX_DEPTH = 24
MAX_DIGITS = 300
MAX_VALUES = 5000

_NULL = re.compile(r"|~|null|Null|NULL")
_BOOL = re.compile(r"true|True|TRUE|false|False|FALSE")
_INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_NUMBER = re.compile(r"-?(0|[1-9][0-9]*)")  # a key as it is, such as the number of a block
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]")
_NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")


@dataclass(frozen=True, order=True)
class Fault:
    """One mistake in a file; lines and columns count from 1."""

    line: int
    column: int
    what: str = field(compare=False)
    hint: str = field(default="", compare=False)


@dataclass
class Node:
    """A value and the place where it begins. ``keys`` has the place of each key of a mapping."""

    line: int
    column: int
    content: Scalar | dict[str, Node] | list[Node] = None
    keys: dict[str, tuple[int, int]] = field(default_factory=dict)
    depth: int = 0

    def data(self) -> object:
        """The plain value: what ``json`` can write."""
        if isinstance(self.content, dict):
            return {key: node.data() for key, node in self.content.items()}
        if isinstance(self.content, list):
            return [node.data() for node in self.content]
        return self.content


@dataclass
class Document:
    """A parsed file: its values with their places, and the mistakes found so far.

    ``root`` is None where the text is not YAML or has no content; then there is at least one fault.
    """

    root: Node | None
    faults: list[Fault]

    def resolve(self, path: Sequence[Step]) -> tuple[Step, ...]:
        """``path`` without the steps that do not exist in the document."""
        node, steps = self.root, []
        for step in path:
            child = _child(node, step)
            if child is not None:
                node = child
                steps.append(step)
        return tuple(steps)

    def node(self, path: Sequence[Step]) -> Node | None:
        """The value at ``path``; steps that do not exist are passed over."""
        node = self.root
        for step in self.resolve(path):
            node = _child(node, step)
        return node

    def place(self, path: Sequence[Step], *, key: bool = False) -> tuple[int, int]:
        """Line and column of the value at ``path``, or of its key."""
        *above, last = self.resolve(path) or (None,)
        holder = self.node([step for step in above if step is not None])
        if key and isinstance(last, str) and holder is not None and last in holder.keys:
            return holder.keys[last]
        node = self.node(path)
        return (node.line, node.column) if node is not None else (1, 1)


def _child(node: Node | None, step: Step) -> Node | None:
    if node is None:
        return None
    if isinstance(node.content, dict) and isinstance(step, str):
        return node.content.get(step)
    if isinstance(node.content, list) and isinstance(step, int) and 0 <= step < len(node.content):
        return node.content[step]
    return None


def parse(text: str) -> Document:
    """The document of a YAML text.

    Scalars follow the YAML 1.2 core schema: ``no`` and ``12:30`` are text, ``1e-3`` is a number. Refused, with the
    place: syntax errors, duplicate keys, keys that are not text, aliases, tags, more than one document, control
    characters, infinite numbers, nesting deeper than 24, and more than 5000 values.
    """
    document = Document(None, [])
    try:
        _build(text, document)
    except yaml.MarkedYAMLError as error:
        document.root = None
        document.faults.append(_syntax_fault(error, text))
    except ReaderError as error:
        document.root = None
        document.faults.append(_character_fault(error, text))
    if document.root is None and not document.faults:
        document.faults.append(Fault(1, 1, "the file is empty", "Begin with `model:`; `compress recipes` lists examples."))
    return document


def _build(text: str, document: Document) -> None:
    """Walks the parser's events with a stack of open collections; recursion would let a file overflow it."""
    open_nodes: list[Node] = []
    pending: list[str | None] = []
    documents = values = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        line, column = _place(event.start_mark)
        if isinstance(event, DocumentStartEvent):
            documents += 1
            if documents > 1:
                hint = "Keep one recipe a file; remove the line `---`."
                document.faults.append(Fault(line, column, "a second document begins", hint))
                return
        if isinstance(event, MappingEndEvent | SequenceEndEvent):
            open_nodes.pop()
            pending.pop()
        if not isinstance(event, AliasEvent | ScalarEvent | MappingStartEvent | SequenceStartEvent):
            continue
        holder = open_nodes[-1] if open_nodes else None
        if holder is not None and isinstance(holder.content, dict) and pending[-1] is None:
            pending[-1] = _key(event, holder, document)
            if not isinstance(event, MappingStartEvent | SequenceStartEvent):
                continue
            document.faults.append(Fault(line, column, "a key must be text", "Write `key: value`."))
            document.root = None
            return
        node, values = _value(event, document), values + 1
        if values > MAX_VALUES:
            document.faults.append(Fault(line, column, f"more than {MAX_VALUES} values", "No recipe needs that."))
            document.root = None
            return
        if holder is None:
            document.root = node
        elif isinstance(holder.content, dict):
            holder.content.setdefault(str(pending[-1]), node)
            pending[-1] = None
        elif isinstance(holder.content, list):
            holder.content.append(node)
        if isinstance(event, MappingStartEvent | SequenceStartEvent):
            open_nodes.append(node)
            pending.append(None)
            if len(open_nodes) > MAX_DEPTH:
                document.faults.append(Fault(line, column, f"nested deeper than {MAX_DEPTH} levels", "No recipe needs that."))
                document.root = None
                return
    if document.root is not None and document.root.content is None:
        document.root = None


def _key(event: Event, holder: Node, document: Document) -> str:
    line, column = _place(event.start_mark)
    if isinstance(event, AliasEvent):
        document.faults.append(Fault(line, column, f"alias *{_short(event.anchor)} is not allowed", "Write the key out."))
        return f"*{event.anchor}"
    if not isinstance(event, ScalarEvent):
        return ""
    key = _text(event, document)
    if event.implicit[0] and not isinstance(_scalar(key), str) and not _NUMBER.fullmatch(key):
        hint = f"Put it in quotes if it is meant as text: '{_short(key)}'."
        document.faults.append(Fault(line, column, f"the key {_short(key) or '(empty)'} is not text", hint))
    if key in holder.keys:
        first, _ = holder.keys[key]
        document.faults.append(Fault(line, column, f"{_short(key)!r} appears twice", f"The first is on line {first}; keep one."))
    else:
        holder.keys[key] = (line, column)
    return key


def _value(event: Event, document: Document) -> Node:
    line, column = _place(event.start_mark)
    node = Node(line, column)
    if isinstance(event, AliasEvent):
        hint = "Write the value out; recipes have no anchors and aliases."
        document.faults.append(Fault(line, column, f"alias *{_short(event.anchor)} is not allowed", hint))
        return node
    tag = getattr(event, "tag", None)
    if tag not in (None, "!"):
        hint = "Remove it; put the value in quotes if it is meant as text."
        document.faults.append(Fault(line, column, f"the tag {_short(tag)} is not allowed", hint))
    if isinstance(event, MappingStartEvent):
        node.content = {}
    elif isinstance(event, SequenceStartEvent):
        node.content = []
    elif isinstance(event, ScalarEvent) and event.implicit[0]:
        if _NOT_FINITE.fullmatch(event.value) or (_FLOAT.fullmatch(event.value) and _too_large(event.value)):
            document.faults.append(Fault(line, column, f"{event.value[:40]} is not a finite number", "Write a plain number."))
        else:
            node.content = _scalar(event.value)
    elif isinstance(event, ScalarEvent):
        node.content = _text(event, document)
    return node


def _text(event: ScalarEvent, document: Document) -> str:
    """The text of a scalar; escapes can write characters that no name and no path can have."""
    text = str(event.value)
    if found := _CONTROL.search(text):
        line, column = _place(event.start_mark)
        what = f"character U+{ord(found.group()):04X} is not allowed in a recipe"
        document.faults.append(Fault(line, column, what, "Remove it."))
        return _CONTROL.sub("", text)
    return text


def _short(text: str | None) -> str:
    return str(text) if len(str(text)) <= 60 else f"{str(text)[:57]}..."


def _place(mark: Any) -> tuple[int, int]:
    """Line and column from 1 of a mark of the parser, which counts from 0 and is missing in a few errors."""
    return (mark.line + 1, mark.column + 1) if mark is not None else (1, 1)


def _too_large(text: str) -> bool:
    return len(text) > MAX_DIGITS or abs(float(text)) == float("inf")


def _scalar(text: str) -> Scalar:
    if _NULL.fullmatch(text):
        return None
    if _BOOL.fullmatch(text):
        return text.lower() == "true"
    if _INT.fullmatch(text) and len(text) <= MAX_DIGITS:
        return int(text, 0) if text[:2] in ("0o", "0x") else int(text)
    if _FLOAT.fullmatch(text) and not _too_large(text):
        return float(text)
    return text


def _syntax_fault(error: yaml.MarkedYAMLError, text: str) -> Fault:
    line, column = _place(error.problem_mark or error.context_mark)
    what = f"not valid YAML: {error.problem or error.context or 'syntax error'}"
    lines = text.split("\n")
    if "\\t" in what or "\t" in (lines[line - 1][:column] if line <= len(lines) else ""):
        return Fault(line, column, "a tab stands where YAML wants spaces", "Indent with spaces.")
    context = f"{error.context} on line {error.context_mark.line + 1}" if error.context and error.context_mark else ""
    return Fault(line, column, what, f"Seen {context}." if context else "Check indentation, quotes and brackets there.")


def _character_fault(error: ReaderError, text: str) -> Fault:
    before = text[: error.position]
    line, column = before.count("\n") + 1, len(before) - (before.rfind("\n") + 1) + 1
    return Fault(line, column, f"character U+{int(error.character):04X} is not allowed in YAML", "Remove it.")
