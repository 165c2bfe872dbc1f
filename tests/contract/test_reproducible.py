"""The same recipe gives the same bytes: in another process, another folder, with another order of sets and dictionaries."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

RECIPE = """\
model: embedded:digits-vit
data: {{format: embedded, calibration: {{rows: 32}}, evaluation: {{rows: 0-19}}}}
passes:
  - quantize: {{weights: 8, activations: static}}
export: [{formats}]
measure: {{repeats: 3, warmup: 1}}
"""
LIBRARIES = {"onnx": "onnxruntime", "coreml": "coremltools", "tensorrt": "tensorrt_rtx"}
FORMATS = [name for name, library in LIBRARIES.items() if importlib.util.find_spec(library)]
FILES = {
    "onnx": ["onnx/model.onnx"],
    "coreml": ["coreml/model.mlpackage"],
    "tensorrt": ["tensorrt/model.engine", "tensorrt/model.qdq.onnx"],
}


@pytest.fixture(scope="module")
def twice(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The run folders of one recipe, carried out by two processes that share nothing."""
    if not FORMATS:
        pytest.skip("needs one of the extras onnx, coreml, tensorrt-rtx")
    folders, processes = [], []
    for number in (1, 2):
        home = tmp_path_factory.mktemp("somewhere" * number)
        (home / "digits.yaml").write_text(RECIPE.format(formats=", ".join(FORMATS)))
        command = [sys.executable, "-m", "compress.cli", "apply", "digits.yaml", "--out", f"out{number}", "--quiet"]
        told = {**os.environ, "PYTHONHASHSEED": str(number), "OMP_NUM_THREADS": "1"}
        processes.append(
            subprocess.Popen(command, cwd=home, env=told, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        )
        folders.append(home / f"out{number}")
    for process in processes:
        said = process.communicate()[1]
        assert process.returncode == 0, said
    return folders


def content(path: Path) -> dict[str, bytes]:
    """The bytes of a file, or of every file in a folder."""
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    assert files, f"there is no {path.name}"
    return {file.relative_to(path.parent).as_posix(): file.read_bytes() for file in files}


@pytest.mark.parametrize("name", ["recipe.yaml", "model.safetensors", "kept.safetensors"])
def test_the_model_and_the_kept_rows_are_the_same_bytes(twice: list[Path], name: str) -> None:
    first, second = (content(folder / name) for folder in twice)
    assert first == second


@pytest.mark.parametrize("name", LIBRARIES)
def test_the_files_are_the_same_bytes(twice: list[Path], name: str) -> None:
    if name not in FORMATS:
        pytest.skip(f"needs {LIBRARIES[name]}")
    for file in FILES[name]:
        for part in (file, f"baseline/{file}"):
            first, second = (content(folder / part) for folder in twice)
            assert first == second, part
