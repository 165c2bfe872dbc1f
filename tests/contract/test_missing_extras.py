"""A library that is not installed is said before any work begins, with the command that installs it, and exit code 3.

For real: each command runs in a process whose path holds every installed package but the one that it lacks.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from sweeps import swept

from compress.sources import settle_torchvision

settle_torchvision()

REPOSITORY = Path(__file__).resolve().parents[2]
INSTALLED = Path(torch.__file__).parents[1]
EXTRAS = ["onnx", "onnx_ir", "onnxruntime", "openvino", "coremltools", "tensorrt", "tensorrt_rtx", "transformers", "timm"]
EXTRAS += ["pyarrow", "pil", "pillow", "ot"]
DATA = "data: {format: embedded, calibration: {rows: 16}, evaluation: {rows: 0-15}}\n"


def recipe(export: str = "onnx", model: str = "embedded:digits-vit", data: str = DATA) -> str:
    return f"model: {model}\n{data}passes: [quantize: {{}}]\nexport: [{export}]\nmeasure: {{repeats: 3, warmup: 0}}\n"


FUSED = recipe().replace("quantize: {}", "fuse_models: {with: embedded:digits-vit}")


def rows(kind: str) -> str:
    return recipe(model="hf:vit", data=f"data: {{format: {kind}, calibration: {{path: a}}, evaluation: {{path: b}}}}\n")


CASES: dict[str, tuple[list[str], str, str, str]] = {
    "onnxruntime": (["onnxruntime"], recipe(), "export.onnx: onnxruntime is not installed", "onnx"),
    "onnx": (["onnx", "onnx_ir"], recipe(), "export.onnx: onnx, onnx_ir are not installed", "onnx"),
    "openvino": (["openvino"], recipe("onnx: {openvino: true}"), "export.onnx: openvino is not installed", "openvino"),
    "coremltools": (["coremltools"], recipe("coreml"), "export.coreml: coremltools is not installed", "coreml"),
    "tensorrt_rtx": (
        ["tensorrt", "tensorrt_rtx"], recipe("tensorrt"), "export.tensorrt: TensorRT-RTX is not installed", "tensorrt-rtx"
    ),
    "tensorrt": (
        ["tensorrt", "tensorrt_rtx"],
        recipe("tensorrt: {builder: tensorrt}"),
        "export.tensorrt: TensorRT is not installed",
        "tensorrt",
    ),
    "onnx for the builder": (["onnx"], recipe("tensorrt"), "export.tensorrt: onnx is not installed, which", "tensorrt-rtx"),
    "transformers": (["transformers"], recipe(model="hf:vit"), "1:8: model: transformers is not installed", "hf"),
    "timm": (["timm"], recipe(model="timm:test_vit"), "1:8: model: timm is not installed", "timm"),
    "POT": (["ot"], FUSED, "3:23: fuse_models: POT is not installed", "fusion"),
    "pyarrow": (["pyarrow"], rows("parquet"), "2:7: data: pyarrow is not installed", "hf"),
    "PIL": (["pil", "pillow"], rows("images"), "1:8: model: PIL is not installed", "hf"),
}  # fmt: skip
OFTEN = ["onnxruntime", "tensorrt_rtx", "transformers", "POT", "PIL"]
"""A library of each kind: a runtime, one of two names, of models, of a pass, of data."""
CONTROL = "nothing"


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> dict[str, tuple[int, str, str]]:
    """Exit code, output and complaint of each case that is asked for, all from one program; the last is a control that lacks
    nothing."""
    mine = [item for item in request.session.items if getattr(item, "module", None) is request.module]
    asked = {item.callspec.params["case"] for item in mine if hasattr(item, "callspec")}
    cases = {name: case for name, case in CASES.items() if name in asked}
    if not hasattr(os, "fork"):
        pytest.skip("needs fork")
    folder = tmp_path_factory.mktemp("extras")
    if importlib.util.find_spec("transformers"):
        from transformers import ViTConfig, ViTForImageClassification

        small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
        ViTForImageClassification(ViTConfig(**small, image_size=16, patch_size=4)).save_pretrained(folder / "vit")
    for name in ("a", "b"):
        (folder / name / "LABEL_0").mkdir(parents=True)
        (folder / name / "LABEL_0" / "0.png").write_bytes(bytes(np.arange(9, dtype=np.uint8)))
    jobs = []
    for number, (without, text, *_) in enumerate([*cases.values(), (["nothing"], recipe(), "", "")]):
        (folder / f"{number}.yaml").write_text(text)
        jobs.append({
            "without": without,
            "arguments": ["apply", str(folder / f"{number}.yaml"), "--out", str(folder / f"out-{number}"), "--quiet"],
        })  # fmt: skip
    told = {"installed": str(INSTALLED), "repository": str(REPOSITORY), "extras": EXTRAS, "jobs": jobs}
    (folder / "jobs.json").write_text(json.dumps(told))
    program = Path(__file__).with_name("missing_extras.py")
    environment = {**os.environ, "PYTHONPATH": "", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-S", str(program), str(folder / "jobs.json")], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    for number in range(len(cases)):
        assert not (folder / f"out-{number}").exists(), "nothing was begun"
    found = {name: json.loads((folder / f"answer-{number}.json").read_text()) for number, name in enumerate([*cases, CONTROL])}
    return {name: tuple(answer) for name, answer in found.items()}


@pytest.mark.parametrize("case", swept(CASES, OFTEN))
def test_what_is_absent_is_named_with_the_command_that_installs_it(case: str, answers: dict[str, tuple[int, str, str]]) -> None:
    code, printed, told = answers[case]
    _, _, says, extra = CASES[case]
    assert code == (3 if "export." in says else 2), told  # 3: a runtime that the recipe exports to
    assert printed == ""
    assert told.partition(".yaml:")[2 if says[0].isdigit() else 0].startswith(says), told
    assert told.rstrip("\n").split("\n")[1:] == [f"  pip install 'transformer-compress[{extra}]'"], told


def test_with_everything_installed_the_same_program_carries_the_recipe_out(answers: dict[str, tuple[int, str, str]]) -> None:
    """Control: what is refused above is refused for what is absent, not for how the program is started."""
    pytest.importorskip("onnxruntime", reason="needs the extra onnx")
    code, printed, told = answers[CONTROL]
    assert (code, told) == (0, "")
    assert "onnx" in printed
