"""What no file may hold: pickles, weights loaded as code, prints outside the command line, places of one machine."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = [path for package in ("calibrate", "compress", "export") for path in sorted((ROOT / package).rglob("*.py"))]
TEXTS = {".cfg", ".json", ".md", ".py", ".toml", ".txt", ".yaml", ".yml", ""}
MACHINE = re.compile(r"(?<![\w.~>$}/-])/(?:home|Users|root|work|mnt|media|private|scratch)/[\w.-]+", re.ASCII)
MAY_PRINT = {
    "compress/cli.py",
    "compress/embedded/train_digits.py",  # a script of its own, which trains the embedded model
    "export/tensorrt_job.py",  # the builder's own process: it answers on its standard output
    "export/tensorrt_builder.py",
}


def tracked() -> list[Path]:
    try:
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no git checkout: an unpacked archive has other files beside it")
    return [ROOT / line for line in listed.split("\0") if line and (ROOT / line).is_file()]


def imported_part(text: str) -> str:
    """A file without its ``if __name__ == "__main__":`` part, which is a command line of its own."""
    tree = ast.parse(text)
    body = [node for node in tree.body if not (isinstance(node, ast.If) and "__name__" in ast.unparse(node.test))]
    return ast.unparse(ast.Module(body, []))


def calls(text: str) -> list[tuple[str, ast.Call]]:
    return [(ast.unparse(node.func), node) for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)]


def unsafe(text: str) -> list[str]:
    """What loads or runs bytes as code."""
    found = []
    for node in ast.walk(ast.parse(text)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        found += [
            f"imports {name}" for name in names if name.partition(".")[0] in ("pickle", "dill", "cloudpickle", "joblib", "shelve")
        ]
    for called, node in calls(text):
        options = {word.arg: word.value for word in node.keywords}
        only = options.get("weights_only")
        if called in ("torch.load", "load_state_dict_from_url") and not (isinstance(only, ast.Constant) and only.value is True):
            found.append(f"{called} without weights_only=True")
        allow = options.get("allow_pickle")
        if allow is not None and not (isinstance(allow, ast.Constant) and allow.value is False):
            found.append(f"{called} with allow_pickle")
        if called in ("eval", "exec", "os.system", "yaml.load", "yaml.unsafe_load", "torch.save"):
            found.append(called)
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_nothing_loads_bytes_as_code(path: Path) -> None:
    assert unsafe(path.read_text("utf-8")) == []


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "from joblib import load",
        "torch.load(p)",
        "torch.load(p, weights_only=False)",
        "np.load(p, allow_pickle=True)",
        "eval(x)",
    ],
)
def test_an_unsafe_call_is_seen(text: str) -> None:
    assert unsafe(text)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_only_the_command_line_prints_and_exits(path: Path) -> None:
    if path.relative_to(ROOT).as_posix() in MAY_PRINT:
        return
    wrong = [
        called
        for called, _ in calls(imported_part(path.read_text("utf-8")))
        if called in ("print", "sys.exit", "exit", "quit", "os._exit")
    ]
    assert wrong == []


def test_no_text_names_a_place_of_one_machine() -> None:
    files = [path for path in tracked() if path.suffix in TEXTS]
    assert len(files) > 30
    wrong = []
    for path in files:
        try:
            text = path.read_text("utf-8")
        except UnicodeDecodeError:
            continue
        wrong += [f"{path.relative_to(ROOT)}: {found.group()}" for found in MACHINE.finditer(text)]
    assert wrong == []


def test_such_a_place_is_seen() -> None:
    home = "/" + "home/someone"
    assert MACHINE.search(f'path = "{home}/models"')
    assert MACHINE.search(f"({home})")
    assert not MACHINE.search("https://example.org" + home)
