"""Builds one TensorRT engine and ends: ``python tensorrt_builder.py job.json``.

Every build has a process of its own, because a failed build leaves the library in a state that spoils the next one in
the same process. This file imports the standard library and the builder's library alone, so that it starts in a
fraction of a second. The job is a JSON file; the answer is written to the path that it names:

* job: ``library`` (``tensorrt`` or ``tensorrt_rtx``), ``onnx``, ``engine``, ``answer`` (paths), ``profile`` (input
  name -> [minimum, optimum, maximum] shapes; empty for fixed shapes), ``compute_capabilities`` (``"8.6"`` ...),
  ``optimization_level`` (or null), ``parent`` (process id of who waits; when that is killed, so is this).
* answer: ``{"ok": true, "version", "seconds", "bytes", "peak_bytes", "warnings"}`` or ``{"ok": false, "stage", "node",
  "errors"}``.
"""

from __future__ import annotations

import ctypes
import errno
import importlib
import json
import os
import signal
import sys
import time
from typing import Any

__all__ = ["FULL", "build", "main"]

FULL = errno.ENOSPC
"""Exit code where the disk is full: an answer that says so would find no room."""


def build(job: dict[str, Any]) -> dict[str, Any]:
    """Runs one job in this process; the engine is written only when the whole build succeeded."""
    trt = importlib.import_module(job["library"])
    logger = _logger(trt)
    builder = trt.Builder(logger)
    typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)  # a version may know no other kind
    network = builder.create_network(0 if typed is None else 1 << int(typed))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(job["onnx"]):
        found = [parser.get_error(index) for index in range(parser.num_errors)]
        node = f"{found[0].node_name()} ({found[0].node_operator()})" if found else ""
        errors = [error.desc() for error in found] or logger.errors
        return {"ok": False, "stage": "parse", "node": node, "errors": errors}
    _decompose_attention(trt, network)
    config = _config(trt, builder, network, job)
    started = time.perf_counter()
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        return {"ok": False, "stage": "build", "node": "", "errors": logger.errors}
    with open(job["engine"], "wb") as file:
        file.write(engine)
    seconds = time.perf_counter() - started
    return {
        "ok": True,
        "version": trt.__version__,
        "seconds": seconds,
        "bytes": engine.nbytes,
        "peak_bytes": _peak_bytes(),
        "warnings": logger.warnings,
    }


def _peak_bytes() -> int:
    """Largest resident size of this process, or 0 where the system does not say: ``getrusage`` would count the parent's, which
    a new process begins with."""
    try:
        with open("/proc/self/status", encoding="ascii") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        return 0


def _config(trt: Any, builder: Any, network: Any, job: dict[str, Any]) -> Any:
    config = builder.create_builder_config()
    if job["optimization_level"] is not None:
        config.builder_optimization_level = job["optimization_level"]
    if job["compute_capabilities"]:
        config.num_compute_capabilities = len(job["compute_capabilities"])
        for index, name in enumerate(job["compute_capabilities"]):
            target = getattr(trt.ComputeCapability, "SM" + name.replace(".", ""))
            config.set_compute_capability(target, index)
    if job["profile"]:
        profile = builder.create_optimization_profile()
        for index in range(network.num_inputs):
            tensor = network.get_input(index)
            if tensor.name in job["profile"]:
                profile.set_shape(tensor.name, *job["profile"][tensor.name])
        config.add_optimization_profile(profile)
    return config


def _decompose_attention(trt: Any, network: Any) -> None:
    """Lets the builder split ``Attention`` layers for which it has no kernel; without this the build fails."""
    if not hasattr(trt, "IAttentionInputLayer"):
        return
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type == getattr(trt.LayerType, "ATTENTION_INPUT", None):
            layer.__class__ = trt.IAttentionInputLayer
            layer.attention.decomposable = True


def _logger(trt: Any) -> Any:
    class Logger(trt.ILogger):  # type: ignore[misc]
        """Keeps errors and warnings in place of printing them."""

        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []
            self.warnings: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.INTERNAL_ERROR, trt.ILogger.Severity.ERROR):
                self.errors.append(message)
            elif severity == trt.ILogger.Severity.WARNING and "Int64 binding" not in message:
                self.warnings.append(message)

    return Logger()


def _end_with(parent: int) -> None:
    """Asks the kernel (Linux) to end this process with the one that waits for it, even if that is killed."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG, prctl(2)
        if os.getppid() != parent:  # it was killed before that call
            os.kill(os.getpid(), signal.SIGKILL)


def main(path: str) -> int:
    with open(path, encoding="utf-8") as file:
        job = json.load(file)
    _end_with(job["parent"])
    try:
        try:
            answer = build(job)
        except Exception as error:
            if _full(error):
                raise
            answer = {"ok": False, "stage": "start", "node": "", "errors": [f"{type(error).__name__}: {error}"]}
        with open(job["answer"], "w", encoding="utf-8") as file:
            json.dump(answer, file)
    except OSError as error:
        if not _full(error):
            raise
        return FULL
    return 0 if answer["ok"] else 1


def _full(error: Exception) -> bool:
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
