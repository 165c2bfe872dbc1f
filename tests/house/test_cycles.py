"""No import runs in a circle: whichever module of the package is imported first, it can be."""

from __future__ import annotations

import ast
import concurrent.futures
import graphlib
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


TEXTS = {
    module_name(path): (path.read_text("utf-8"), path.name == "__init__.py")
    for package in ("calibrate", "export", "compress")
    for path in sorted((ROOT / package).rglob("*.py"))
}


def statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """What runs when a module is imported: nothing inside functions, nothing for type checkers only."""
    for node in body:
        yield node
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        checked = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for part in ("orelse",) if checked else ("body", "orelse", "finalbody"):
            yield from statements(getattr(node, part, []))
        for handler in getattr(node, "handlers", []):
            yield from statements(handler.body)


def edges(name: str, texts: Mapping[str, tuple[str, bool]]) -> set[str]:
    """The modules that a module needs when it is imported: with each one the packages that it lies in, but for its own."""
    text, _ = texts[name]
    wanted: set[str] = set()
    for node in statements(ast.parse(text).body):
        if isinstance(node, ast.Import):
            wanted |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            wanted |= {one if one in texts else node.module or "" for one in inside}
    packages = {one[:at] for one in wanted for at, sign in enumerate(one) if sign == "."}
    mine = {name[:at] for at, sign in enumerate(name) if sign == "."}
    return ((packages - mine) | wanted) & set(texts) - {name}


def circle(texts: Mapping[str, tuple[str, bool]]) -> list[str]:
    """Modules that import one another in a circle; empty when none do."""
    try:
        graphlib.TopologicalSorter({name: edges(name, texts) for name in texts}).prepare()
    except graphlib.CycleError as error:
        return list(error.args[1])
    return []


def test_no_import_runs_in_a_circle() -> None:
    assert len(TEXTS) > 150
    assert circle(TEXTS) == []


@pytest.mark.parametrize(
    "texts",
    [
        {"p": "", "p.a": "from p.b import x", "p.b": "import p.a"},
        {"p": "", "p.a": "from p import b", "p.b": "class C:\n    from p.a import x"},
        {"p": "", "p.a": "from p.q.c import x", "p.q": "from p.q.d import y", "p.q.c": "", "p.q.d": "import p.a"},
    ],
    ids=["two modules", "inside a class", "by way of a package"],
)
def test_a_circle_is_seen(texts: dict[str, str]) -> None:
    assert circle({name: (text, True) for name, text in texts.items()})


@pytest.mark.parametrize(
    "text",
    ["if TYPE_CHECKING:\n    from p.a import x", "def f():\n    from p.a import x"],
    ids=["for types", "inside a function"],
)
def test_what_is_imported_later_is_no_circle(text: str) -> None:
    assert circle({"p": ("", True), "p.a": ("import p.b", False), "p.b": (text, False)}) == []


ALONE = """
import gc, importlib, sys
gc.disable()
brought = {}
for name in sys.argv[1:]:
    if name in brought.get(name.rpartition(".")[0], ()):
        continue
    for known in [known for known in sys.modules if known.partition(".")[0] == "compress"]:
        del sys.modules[known]
    try:
        importlib.import_module(name)
    except ImportError as error:
        print(name, error)
    else:
        brought[name] = set(sys.modules)
"""
"""Imports one module after the other, each as if nothing of the package had been imported before; not those that come with
their own package, which is imported before them anyway."""


def imported_alone(names: list[str]) -> str:
    done = subprocess.run(
        [sys.executable, "-c", ALONE, *names], cwd=ROOT, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_each_module_can_be_the_first() -> None:
    names = [name for name in TEXTS if name.partition(".")[0] == "compress"]
    half = len(names) // 2
    with concurrent.futures.ThreadPoolExecutor(2) as threads:
        said = list(threads.map(imported_alone, [names[:half], names[half:]]))
    assert said == ["", ""]


def test_a_module_that_cannot_be_the_first_is_told() -> None:
    assert imported_alone(["compress.report", "compress.no_such_module"]).startswith("compress.no_such_module")
