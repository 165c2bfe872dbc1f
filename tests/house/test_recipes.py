"""Every recipe in the repository validates, and ``recipes/README.md`` says what is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from compress.exporters import EXPORTERS
from compress.passes import PASSES
from compress.recipe import read
from compress.shipped import readme, shipped_recipes

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted([*(ROOT / "recipes").rglob("*.yaml"), *(ROOT / "tests" / "benchmarks" / "recipes").rglob("*.yaml")])


def test_there_are_recipes() -> None:
    assert len(RECIPES) > 17
    assert {path.stem for path in (ROOT / "recipes").glob("*.yaml")} >= {"quickstart"}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_it_validates(path: Path) -> None:
    recipe = read(path)
    assert recipe.name == path.stem
    assert recipe.export, "a recipe writes something"


def test_every_pass_and_every_exporter_is_in_a_recipe() -> None:
    recipes = [read(path) for path in RECIPES]
    assert {step.name for recipe in recipes for step in recipe.passes} >= {entry.name for entry in PASSES}
    assert {exporter.format for recipe in recipes for exporter in recipe.export} >= {entry.format for entry in EXPORTERS}


@pytest.mark.parametrize("shipped", shipped_recipes(), ids=lambda shipped: shipped.name)
def test_it_says_what_it_is_for_and_what_to_change(shipped: object) -> None:
    comment = str(getattr(shipped, "comment", ""))
    assert len(comment.split("\n")[0]) <= 110
    assert "Change:" in comment or getattr(shipped, "name", "") == "quickstart"
    if "was measured" in comment:
        assert re.search(r"\d+ rows", comment), "a figure says on how many rows"


def test_the_readme_is_what_the_recipes_and_passes_say() -> None:
    told = (ROOT / "recipes" / "README.md").read_text("utf-8")
    assert told == readme(), "run: compress recipes --markdown > recipes/README.md"
