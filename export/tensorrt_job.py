"""Runs the engine builder in a process of its own and turns its errors into a line and a way out."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calibrate.errors import MissingRuntime, UserError

__all__ = ["LIBRARIES", "Built", "build_engine", "hint_for", "product"]

LIBRARIES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
"""Builder name -> Python module."""

_HINTS = (
    (
        r"shiftIsAllZeros|Non-zero zero point|input type of UINT8",
        "TensorRT takes symmetric codes only: set `symmetric: true` for weights and activations.",
    ),
    (
        r"HW-specific datatypes: .*fp8",
        "FP8 needs compute capability 8.9 or later: take earlier ones out of compute_capabilities.",
    ),
    (
        r"HW-specific datatypes",
        "The data types named need a newer GPU: take the oldest out of compute_capabilities.",
    ),
    (
        r"Turing \(SM75\): FP32 GEMM",
        "Compute capability 7.5 has no float32 products: set `precision: float16`, or take 7.5 out.",
    ),
    (
        r"operand\.h.*CHECK\(is_constant\(\)\)",
        "Group scales under quantized activations have no kernel: scale by channel, or leave activations float.",
    ),
    (
        r"type mismatch between matmul operand scales",
        "Some scales are too small for float16, which compute capability 7.5 asks for: take 7.5 out.",
    ),
    (
        r"odd tensor volume",
        "INT4 codes are packed in pairs: leave this layer at 8 bits.",
    ),
    (
        r"single blocking dimension",
        "Take a group_size of 2 or more that divides the inputs.",
    ),
    (
        r"only allowed before DQ|validateQuantizedTypes",
        "TensorRT takes integer weights only directly before DequantizeLinear.",
    ),
    (
        r"must have same input types",
        "The graph mixes float16 and float32 here, a defect of this exporter; `precision: float32` avoids it.",
    ),
    (
        r"Attention operation was not supported",
        "Lower the opset below 23, so that attention is written as matrix products.",
    ),
    (
        r"cosCache has batch size",
        "Lower the opset below 23, so that rotary embeddings are written as products.",
    ),
    (
        r"cudaError 35|CUDA driver version is insufficient|CHECK\(status == CUDA_SUCCESS\)",
        "This option needs an NVIDIA driver at build time; name compute capabilities such as 8.6 instead.",
    ),
    (r"libnvinfer_lean", "Version-compatible engines need the lean runtime, which is not installed."),
    (r"out of memory|OutOfMemory|bad_alloc", "The build needs more memory than the machine has."),
    (r"profile", "Give every dynamic dimension a range under `profile:`, minimum <= optimum <= maximum."),
)


@dataclass(frozen=True)
class Built:
    """What the builder said: its version, the time inside its process, its warnings, and the peak memory of its process."""

    version: str
    seconds: float
    warnings: tuple[str, ...]
    peak_bytes: int = 0


def product(builder: str) -> str:
    """The builder's name as people write it."""
    return {"tensorrt": "TensorRT", "tensorrt-rtx": "TensorRT-RTX"}[builder]


def hint_for(message: str) -> str:
    """The way out of a builder's error, empty where none is known."""
    return next((hint for pattern, hint in _HINTS if re.search(pattern, message)), "")


def build_engine(
    builder: str,
    onnx: Path,
    engine: Path,
    *,
    profile: Mapping[str, Sequence[Sequence[int]]],
    compute_capabilities: Sequence[str] = (),
    optimization_level: int | None = None,
) -> Built:
    """Builds ``engine`` from the Q/DQ file ``onnx``, in a new process; a failed build leaves no file.

    Args:
        builder: ``tensorrt`` or ``tensorrt-rtx``.
        profile: input name -> [minimum, optimum, maximum] shapes; empty when all shapes are fixed.
        compute_capabilities: such as "8.6"; empty for the builder's default.

    Raises:
        UserError: the builder refuses the model or its options; its first error line, the node, and the way out.
        OSError: there is no room for the engine.
    """
    answer_path = engine.with_name(engine.name + ".answer.json")
    job_path = engine.with_name(engine.name + ".job.json")
    job = {
        "library": LIBRARIES[builder],
        "onnx": str(onnx),
        "engine": str(engine),
        "answer": str(answer_path),
        "profile": {name: [list(shape) for shape in shapes] for name, shapes in profile.items()},
        "compute_capabilities": list(compute_capabilities),
        "optimization_level": optimization_level,
        "parent": os.getpid(),
    }
    job_path.write_text(json.dumps(job))
    script = Path(__file__).with_name("tensorrt_builder.py")
    # -P keeps the script's folder off the path: it holds modules with everyday names.
    command = [sys.executable, "-P", str(script), str(job_path)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", env=_quiet())
        if done.returncode == errno.ENOSPC:
            engine.unlink(missing_ok=True)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(engine))
        answer = json.loads(answer_path.read_text()) if answer_path.is_file() else _ended(done.returncode, done.stderr)
    finally:
        for path in (job_path, answer_path):
            path.unlink(missing_ok=True)
    if answer["ok"]:
        return Built(answer["version"], answer["seconds"], tuple(answer["warnings"]), answer["peak_bytes"])
    engine.unlink(missing_ok=True)
    raise _refused(builder, answer)


def _quiet() -> dict[str, str]:
    """This process's environment, for a child that leaves no compiled files behind."""
    return {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}


def _ended(code: int, stderr: str) -> dict[str, Any]:
    """The answer of a process that gave none: it crashed inside the library."""
    last = next((line for line in reversed(stderr.splitlines()) if line.strip()), "it said nothing")
    how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    return {"ok": False, "stage": "end", "node": "", "errors": [f"the builder's process ended with {how}: {last}"]}


def _refused(builder: str, answer: Mapping[str, Any]) -> UserError:
    errors = [line.strip() for text in answer["errors"] for line in text.splitlines() if line.strip()]
    telling = [line for line in errors if not line.startswith("Invalid Node")] or errors or ["it gave no reason"]
    first = _plain(telling[0])
    if answer["stage"] == "start" and re.match(r"(ModuleNotFound|Import)Error", first):
        install = f"pip install 'transformer-compress[{builder}]'"
        return MissingRuntime("export.tensorrt", f"{product(builder)} cannot be loaded: {first}", install)
    if answer["stage"] == "start" and "ComputeCapability" in first:
        hint = "Take one that this version of the builder knows, or leave compute_capabilities empty."
        return UserError("export.tensorrt.compute_capabilities", f"{product(builder)}: {first}", hint)
    place = answer["node"] or "export.tensorrt"
    # What follows the first line is often a consequence of it: a failed parse is followed by a CUDA error without a GPU.
    hint = next((known for known in map(hint_for, telling) if known), "")
    hint = hint or "The builder refuses this graph; leave the layer in float, or write another format."
    return UserError(place, f"{product(builder)} cannot build this model: {first}", hint)


def _plain(line: str) -> str:
    """The builder's sentence without the place in its own source code."""
    line = re.sub(r"^I?\w+::\w+: Error Code \d+: ", "", line.strip())
    line = re.sub(r"\s*In \w+ at /_src/\S+\)?$", "", line)
    line = re.sub(r"^(\w+) \(\[[\w.]+:\d+: \w+\] ", r"\1: ", line)
    return line.removeprefix("Assertion failed: ").strip()
