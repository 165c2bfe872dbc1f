"""Whatever is done to a recipe, reading it ends in a recipe or in faults with a place; never in a traceback."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from compress.recipe import RecipeError, parse_recipe
from compress.shipped import recipes_folder
from compress.yaml_positions import parse

TEXTS = [path.read_text() for path in sorted(recipes_folder().glob("*.yaml"))]
PIECES = [
    "\t",
    ":",
    "- ",
    "[",
    "]",
    "{",
    "}",
    "'",
    '"',
    "#",
    "&a",
    "*a",
    "!x",
    "|",
    ">",
    "%",
    "\n",
    "  ",
    "0",
    "-",
    "~",
    "\0",
    "é",
    "\ufeff",
]
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.sampled_from(["", "all", "0-9", "hf:x", "x.py:f", "onnx", "quantize", "accuracy", "8", "~/x", "\0"])
    | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["weights", "path", "rows", "start", "count", "text", "onnx", ""]), inner, max_size=3)
    ),
    max_leaves=6,
)


def lawful(text: str) -> None:
    error = refusal(text)
    if error is None:
        return
    breaks = sum(text.count(character) for character in "\n\r\x85\u2028\u2029")
    assert error.faults
    assert list(error.faults) == sorted(error.faults)
    for fault in error.faults:
        assert 1 <= fault.line <= breaks + 1
        assert fault.column >= 1
        assert fault.what
        assert "\n" not in fault.what + fault.hint
    assert str(error).startswith("r.yaml:")
    assert error.exit_code == 2


def refusal(text: str) -> RecipeError | None:
    try:
        assert parse_recipe(text, where="r.yaml", base=Path("folder")).text == text
    except RecipeError as error:
        return error
    return None


@st.composite
def edited(draw: st.DrawFn) -> str:
    text = draw(st.sampled_from(TEXTS))
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(text)))
        end = min(len(text), start + draw(st.integers(0, 12)))
        text = text[:start] + draw(st.sampled_from(["", *PIECES]) | st.text(max_size=3)) + text[end:]
    return text


@st.composite
def restructured(draw: st.DrawFn) -> str:
    document = parse(draw(st.sampled_from(TEXTS)))
    assert document.root is not None
    data: Any = document.root.data()
    for _ in range(draw(st.integers(1, 3))):
        holder = data
        while isinstance(holder, dict | list) and holder:
            step = draw(st.sampled_from(sorted(holder) if isinstance(holder, dict) else list(range(len(holder)))))
            inner = holder[step]
            if isinstance(inner, dict | list) and inner and draw(st.booleans()):
                holder = inner
                continue
            if draw(st.integers(0, 4)):
                holder[step] = draw(VALUES)
            else:
                del holder[step]
            break
    return json.dumps(data, indent=1)


@settings(max_examples=400)
@given(edited())
def test_any_edit_of_the_text(text: str) -> None:
    lawful(text)


@settings(max_examples=300)
@given(restructured())
def test_any_value_anywhere(text: str) -> None:
    lawful(text)


@settings(max_examples=150)
@given(st.text(max_size=60) | st.text(alphabet="".join(PIECES) + "ab", max_size=60))
def test_any_text(text: str) -> None:
    lawful(text)
