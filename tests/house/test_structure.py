"""The plan of the house: which way imports run, what files are called, what ``__all__`` says."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("calibrate", "export", "compress")
"""From the bottom up: a package imports only itself and those before it."""
FORBIDDEN = {"utils", "helpers", "common", "base", "core", "misc", "manager", "handler", "factory"}
FILES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
OPTIONAL = {
    "coremltools",
    "nncf",
    "onnx",
    "onnx_ir",
    "onnxruntime",
    "onnxscript",
    "ot",
    "openvino",
    "PIL",
    "pyarrow",
    "scipy",
    "sklearn",
    "tensorrt",
    "tensorrt_rtx",
    "timm",
    "torchvision",
    "transformers",
}
"""Libraries of the extras: imported in the function that needs them."""


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports(tree: ast.AST, *, runtime: bool = False) -> Iterator[tuple[str, int]]:
    """Every module that a file imports, also inside functions; with ``runtime`` not those for type checkers only."""
    for node in ast.iter_child_nodes(tree):
        if runtime and isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute"
            module = node.module or ""
            yield module, node.lineno
            yield from ((f"{module}.{alias.name}", node.lineno) for alias in node.names)
        elif isinstance(node, ast.Call) and _imports_by_name(node):
            yield str(ast.literal_eval(node.args[0])), node.lineno
        yield from imports(node, runtime=runtime)


def _imports_by_name(node: ast.Call) -> bool:
    by_name = ast.unparse(node.func) in ("importlib.import_module", "import_module", "__import__")
    return by_name and bool(node.args) and isinstance(node.args[0], ast.Constant)


def arrows(path: Path, text: str) -> list[str]:
    """Imports of a file that run against the arrows."""
    package = path.parts[0]
    above = PACKAGES[PACKAGES.index(package) + 1 :]
    wrong = [(module, line) for module, line in imports(ast.parse(text)) if module.partition(".")[0] in above]
    if path.parts[:2] == ("compress", "passes"):
        wrong += [(module, line) for module, line in imports(ast.parse(text)) if module.partition(".")[0] == "export"]
    if path.parts[:2] == ("compress", "algorithms"):
        torch_modules = ("torch.nn", "torch.nn.Module")
        wrong += [(module, line) for module, line in imports(ast.parse(text)) if module in torch_modules]
    return [f"{path.as_posix()}:{line} imports {module}" for module, line in wrong]


def test_there_is_a_house() -> None:
    assert len(FILES) > 20


@pytest.mark.parametrize("path", FILES, ids=name)
def test_imports_run_one_way(path: Path) -> None:
    assert arrows(path.relative_to(ROOT), path.read_text("utf-8")) == []


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("calibrate/x.py", "import export.graph"),
        ("calibrate/x.py", "def f():\n    from compress import run"),
        ("export/x.py", "if TYPE_CHECKING:\n    from compress.passes import Pass"),
        ("export/x.py", "import importlib\nimportlib.import_module('compress.run')"),
        ("compress/passes/x.py", "from export.contract import Exporter"),
    ],
)
def test_a_wrong_import_is_seen(path: str, text: str) -> None:
    assert arrows(Path(path), text)


@pytest.mark.parametrize("path", FILES, ids=name)
def test_libraries_of_the_extras_are_imported_where_they_are_needed(path: Path) -> None:
    tree = ast.parse(path.read_text("utf-8"))
    at_top = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    top = {module.partition(".")[0] for node in at_top for module, _ in imports(ast.Module([node], []))}
    assert top & OPTIONAL == set()


def test_no_file_is_a_bag() -> None:
    everything = [
        path for path in ROOT.rglob("*.py") if not {".git", "build", ".venv", "runs"} & set(path.relative_to(ROOT).parts)
    ]
    assert len(everything) > 30
    assert [name(path) for path in everything if FORBIDDEN & {path.stem, *path.relative_to(ROOT).parts[:-1]}] == []


@pytest.mark.parametrize("path", FILES, ids=name)
def test_all_is_exact(path: Path) -> None:
    """``__all__`` lists the public functions and classes of a file: all of them, nothing else, in order."""
    tree = ast.parse(path.read_text("utf-8"))
    defined, assigned, listed = public(tree)
    if listed is None:
        assert not defined, f"{name(path)} has no __all__ and defines {sorted(defined)}"
        return
    assert len(listed) == len(set(listed))
    assert defined - set(listed) == set(), "public, and not in __all__"
    assert set(listed) - defined - assigned == set(), "in __all__, and not there"


def public(tree: ast.Module) -> tuple[set[str], set[str], list[str] | None]:
    """Public functions and classes; all other names of the module; ``__all__``."""
    defined, others = set(), set()
    listed: list[str] | None = None
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            others |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef) and not node.name.startswith("_"):
            defined.add(node.name)
        targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        for target in targets:
            if isinstance(target, ast.Name):
                others.add(target.id)
                if target.id == "__all__" and isinstance(node, ast.Assign):
                    listed = list(ast.literal_eval(node.value))
    return defined, others, listed


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("__all__ = ['f']\ndef f(): ...\ndef g(): ...", True),
        ("__all__ = ['f', 'g']\ndef f(): ...", True),
        ("__all__ = ['f']\ndef f(): ...\ndef _g(): ...", False),
    ],
)
def test_a_wrong_all_is_seen(text: str, wrong: bool) -> None:
    defined, others, listed = public(ast.parse(text))
    assert listed is not None
    assert bool(defined - set(listed) or set(listed) - defined - others) == wrong


def test_every_package_folder_is_installed() -> None:
    import tomllib

    installed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    folders = {path.parent.relative_to(ROOT).as_posix().replace("/", ".") for path in FILES}
    assert folders - installed == set()
