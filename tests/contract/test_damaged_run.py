"""A run folder that is not whole, was changed, or belongs to a later version: ``validate`` and ``report`` say so in one line, and
change nothing."""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from compress import cli
from compress.recipe import read
from compress.run import apply

pytest.importorskip("onnxruntime", reason="needs the extra onnx")

RECIPE = """\
model: embedded:digits-vit
data: {format: embedded, calibration: {rows: 16}, evaluation: {rows: 0-15}}
passes: [quantize: {}]
export: [onnx: {openvino: false}]
measure: {repeats: 3, warmup: 0}
"""
ELSEWHERE = "data: {format: arrays, calibration: {path: gone.npz}, evaluation: {path: gone2.npz}}"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    (folder / "r.yaml").write_text(RECIPE)
    apply(read(folder / "r.yaml"), folder / "run")
    return folder / "run"


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[[str, Path, str], None]:
    """Checks the law: exit code 2, one line and a hint, no output, no file changed."""

    def check(command: str, folder: Path, says: str) -> None:
        before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        monkeypatch.setattr(sys, "argv", ["compress", command, str(folder), *(["--quiet"] if command == "validate" else [])])
        with pytest.raises(SystemExit) as left:
            cli.main()
        told = capsys.readouterr()
        assert left.value.code == 2, told.err
        assert re.fullmatch(r"\S[^\n]*: \S[^\n]*\n  \S[^\n]*\n", told.err), told.err
        assert re.search(says, told.err), told.err
        assert told.out == ""
        assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before

    return check


def edited(file: str, **changes: Any) -> Callable[[Path], None]:
    def change(run: Path) -> None:
        content = json.loads((run / file).read_text()) | changes
        (run / file).write_text(json.dumps(content))

    return change


def written(file: str, content: bytes) -> Callable[[Path], None]:
    return lambda run: (run / file).write_bytes(content) and None


def described(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """Changes what ``model.safetensors`` says of itself."""

    def rewrite(run: Path) -> None:
        path = run / "model.safetensors"
        with safe_open(path, framework="pt") as file:
            metadata = json.loads(file.metadata()["compress"])
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - not a dict
        metadata = change(metadata) or metadata
        save_file(tensors, path, metadata={"compress": json.dumps(metadata)})

    return rewrite


def retyped(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    """Changes the tensors of ``model.safetensors``."""

    def rewrite(run: Path) -> None:
        path = run / "model.safetensors"
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - not a dict
        change(tensors)
        save_file(tensors, path, metadata=metadata)

    return rewrite


def cut(file: str) -> Callable[[Path], None]:
    return lambda run: os.truncate(run / file, (run / file).stat().st_size // 2)


REPORTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "gone": (lambda run: (run / "report.json").unlink(), r"run: .*(no report.json|not the folder of a finished run)"),
    "empty": (written("report.json", b""), "report.json: is not a report that this version can read"),
    "no text": (written("report.json", b"\xff\xfe\0\0"), "report.json: is not a report that this version can read"),
    "a list": (written("report.json", b"[]"), "report.json: is not a report that this version can read"),
    "deep": (written("report.json", b"[" * 100_000), "report.json: is not a report that this version can read"),
    "of a later version": (edited("report.json", version=2), r"version: Input should be 1\n  A later version of this program"),
    "with a later field": (edited("report.json", later=1), r"later: Extra inputs .*\n  A later version of this program"),
    "of other types": (edited("report.json", rows=5), r"report.json: .*rows: .*\n  Run the recipe again"),
}
FOLDERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "manifest gone": (lambda run: (run / "manifest.json").unlink(), "run: is not the folder of a finished run"),
    "manifest cut": (cut("manifest.json"), "manifest.json: is not JSON"),
    "manifest empty": (written("manifest.json", b"{}"), "manifest.json: is not a manifest"),
    "manifest of a later version": (edited("manifest.json", version=9), "manifest.json: has version 9, this program reads"),
    "recipe gone": (lambda run: (run / "recipe.yaml").unlink(), "recipe.yaml: no such file"),
    "recipe damaged": (written("recipe.yaml", b"["), "recipe.yaml:1:2: not valid YAML"),
    "model gone": (lambda run: (run / "model.safetensors").unlink(), "model.safetensors: is gone"),
    "model cut": (cut("model.safetensors"), "model.safetensors: not a safetensors file"),
    "header of 2**62 bytes": (
        written("model.safetensors", struct.pack("<Q", 2**62) + b"{}"), "model.safetensors: not a safetensors file .*too large"
    ),
    "another program's": (
        lambda run: save_file({"x": torch.zeros(1)}, run / "model.safetensors"), "model.safetensors: was not written by compress"
    ),
    "model of a later version": (described(lambda told: told.update(version=2)), "model.safetensors: has version 2"),
    "no edits": (described(lambda told: {"version": 1}), "model.safetensors: does not say how its model is made"),
    "edits of other types": (described(lambda told: told.update(edits=5)), "does not say how its model is made"),
    "a function for a type": (
        described(lambda told: told["signature"]["inputs"][0].update(dtype="load")), "'load' is no type of elements"
    ),
    "edits of another model": (
        described(lambda told: told["edits"][0].update(path="no.such")), "model.safetensors: is not the file that the run wrote"
    ),
    "a tensor less": (retyped(lambda tensors: tensors.popitem()), "model.safetensors: is not the file that the run wrote: Miss"),
    "tensors of another type": (
        retyped(lambda tensors: tensors.update({name: value.half() for name, value in tensors.items() if "norm" in name})),
        "model.safetensors: is not the file that the run wrote, and cannot be used",
    ),
    "file gone": (lambda run: (run / "onnx/model.onnx").unlink(), "onnx/model.onnx: is gone"),
    "file cut": (cut("onnx/model.onnx"), "onnx/model.onnx: not a readable ONNX file"),
    "file empty": (written("onnx/model.onnx", b""), "onnx/model.onnx: is not the file that the run wrote, and cannot be used"),
    "float file cut": (cut("baseline/onnx/model.onnx"), "baseline/onnx/model.onnx: ONNX Runtime cannot open it"),
}  # fmt: skip
KEPT: dict[str, tuple[Callable[[Path], object], str]] = {
    "gone": (lambda run: (run / "kept.safetensors").unlink(), "kept.safetensors: the recipe's data cannot be reached"),
    "cut": (cut("kept.safetensors"), "kept.safetensors: is damaged"),
    "another program's": (
        lambda run: save_file({"x": torch.zeros(1)}, run / "kept.safetensors"), "kept.safetensors: is damaged"
    ),
}  # fmt: skip


@pytest.mark.parametrize("command", ["validate", "report"])
@pytest.mark.parametrize("case", list(REPORTS))
def test_a_report_that_cannot_be_read(command: str, case: str, run: Path, refused: Callable[[str, Path, str], None]) -> None:
    change, says = REPORTS[case]
    change(run)
    refused(command, run, says)


@pytest.mark.parametrize("case", list(FOLDERS))
def test_a_run_that_cannot_be_validated(case: str, run: Path, refused: Callable[[str, Path, str], None]) -> None:
    change, says = FOLDERS[case]
    change(run)
    refused("validate", run, says)


@pytest.mark.parametrize("case", list(KEPT))
def test_kept_rows_that_cannot_be_read(case: str, run: Path, refused: Callable[[str, Path, str], None]) -> None:
    text = (run / "recipe.yaml").read_text().split("\n")
    (run / "recipe.yaml").write_text("\n".join([text[0], ELSEWHERE, *text[2:]]))
    change, says = KEPT[case]
    change(run)
    refused("validate", run, says)


@pytest.mark.parametrize("command", ["validate", "report"])
def test_a_folder_without_a_run(command: str, tmp_path: Path, refused: Callable[[str, Path, str], None]) -> None:
    refused(command, tmp_path / "nowhere", r"nowhere: .*\n  Name ")
    (tmp_path / "thesis.txt").write_text("years of work")
    refused(command, tmp_path, r"^\S+: .*\n  Name ")
    refused(command, tmp_path / "thesis.txt", r"thesis.txt: .*\n  Name ")


def test_a_folder_of_the_same_files_is_no_mistake(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Control: an untouched copy is validated and reported."""
    for command in ("validate", "report"):
        monkeypatch.setattr(sys, "argv", ["compress", command, str(run)])
        with pytest.raises(SystemExit) as left:
            cli.main()
        assert not left.value.code
