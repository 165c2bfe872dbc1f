"""Passes of other packages: found through their entry point, refused where they are none."""

from __future__ import annotations

import re
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any, ClassVar

import pytest

from calibrate.errors import UserError
from compress.passes import PASSES, Pass, known_passes
from compress.recipe import RecipeError, parse_recipe

TEXT = """\
model: embedded:digits-vit
data: {format: embedded}
passes:
  - clip_weights: {width: 3}
  - clip_weights
export: []
"""


def readme_example() -> type[Pass]:
    """The class that the README shows, run as it stands there."""
    text = (Path(__file__).resolve().parents[2] / "compress" / "passes" / "README.md").read_text("utf-8")
    block = re.search(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert block is not None
    names: dict[str, Any] = {}
    exec(block.group(1), names)
    shown: type[Pass] = names["ClipWeights"]
    return shown


class Clash(readme_example()):  # type: ignore[misc]
    """A pass under a name that is taken."""

    name: ClassVar[str] = "quantize"


def offer(monkeypatch: pytest.MonkeyPatch, loaded: Any) -> None:
    class Point(EntryPoint):
        def load(self) -> Any:
            if isinstance(loaded, Exception):
                raise loaded
            return loaded

    point = Point("clip_weights", "theirs:ClipWeights", "compress.passes")
    monkeypatch.setattr("importlib.metadata.entry_points", lambda **_: (point,))


def test_the_pass_of_the_readme_is_known_and_read(monkeypatch: pytest.MonkeyPatch) -> None:
    offer(monkeypatch, readme_example())
    assert set(known_passes()) == {"clip_weights", *(entry.name for entry in PASSES)}
    first, second = parse_recipe(TEXT).passes
    assert first.model_dump()["width"] == 3.0
    assert second.model_dump() == readme_example()().model_dump()


def test_its_options_are_checked_with_their_place(monkeypatch: pytest.MonkeyPatch) -> None:
    offer(monkeypatch, readme_example())
    with pytest.raises(RecipeError, match=r"recipe\.yaml:4:27: width is 0, must be"):
        parse_recipe(TEXT.replace("width: 3", "width: 0"))
    with pytest.raises(RecipeError, match=r"recipe\.yaml:4:20: unknown key 'with'"):
        parse_recipe(TEXT.replace("width: 3", "with: 3"))


def test_without_it_the_name_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"recipe\.yaml:4:5: 'clip_weights' is not the name of a pass"):
        parse_recipe(TEXT)


@pytest.mark.parametrize(
    ("loaded", "what"),
    [(ImportError("gone"), "cannot be loaded: gone"), (int, "is not a Pass"), (Clash, "the name quantize is taken")],
)
def test_what_is_no_pass_is_refused_by_name(loaded: Any, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    offer(monkeypatch, loaded)
    with pytest.raises(UserError, match=f"entry point theirs:ClipWeights: {what}"):
        known_passes()


def test_a_user_error_of_a_pass_becomes_a_fault_with_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    class Picky(readme_example()):  # type: ignore[misc]
        """A pass that raises the error of its own side."""

        name: ClassVar[str] = "clip_weights"

        def model_post_init(self, context: Any) -> None:
            raise UserError("", "not today", "Come back tomorrow.")

    offer(monkeypatch, Picky)
    with pytest.raises(RecipeError, match=r"recipe\.yaml:4:5: not today\n  Come back tomorrow\."):
        parse_recipe(TEXT)
