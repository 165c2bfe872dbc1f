"""Runs a written ONNX file: in ONNX Runtime on the CPU, and in OpenVINO."""

from __future__ import annotations

import os
import re
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from calibrate.errors import MissingRuntime, UserError
from calibrate.signature import Batch
from export.contract import Runner

__all__ = ["OnnxRunner", "OpenVinoRunner", "executed_ops", "optimized"]


def _onnxruntime() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingRuntime("", "running ONNX files needs onnxruntime", "pip install 'transformer-compress[onnx]'") from error
    return onnxruntime


class OnnxRunner(Runner):
    """ONNX Runtime on the CPU with its default options; only the number of threads is set.

    Raises:
        UserError: the file cannot be opened.
    """

    def __init__(self, path: Path, threads: int, model: bytes | None = None) -> None:
        runtime = _onnxruntime()
        options = runtime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        if model is None and not path.is_file():
            raise UserError(str(path), "no such file", "Run the export again.")
        try:
            self.session = runtime.InferenceSession(model or str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise UserError(str(path), f"ONNX Runtime cannot open it: {str(error).splitlines()[0]}", "Export again.") from error
        self.runtime = f"onnxruntime {runtime.__version__} CPU"
        self.inputs = {item.name: item for item in self.session.get_inputs()}
        first = next(iter(self.inputs.values())).shape
        self.rows = first[0] if first and isinstance(first[0], int) else None

    def __call__(self, batch: Batch) -> Tensor:
        feeds = {name: _array(batch[name], item.type) for name, item in self.inputs.items()}
        (output,) = self.session.run(None, feeds)
        return torch.from_numpy(output).float()

    def close(self) -> None:
        del self.session


_DTYPES = {"tensor(int64)": torch.int64, "tensor(int32)": torch.int32, "tensor(float)": torch.float32,
           "tensor(float16)": torch.float16, "tensor(bool)": torch.bool, "tensor(uint8)": torch.uint8}  # fmt: skip


def _array(tensor: Tensor, kind: str) -> np.ndarray[Any, Any]:
    array: np.ndarray[Any, Any] = tensor.detach().to(_DTYPES.get(kind, tensor.dtype)).contiguous().numpy()
    return array


class OpenVinoRunner(Runner):
    """OpenVINO on the CPU; the graph is compiled once for each shape of the inputs (fixed shapes are its fast path).

    Raises:
        UserError: OpenVINO cannot read the file.
    """

    def __init__(self, path: Path, threads: int, precision_hint: str = "f32") -> None:
        try:
            import openvino
        except ImportError as error:
            raise MissingRuntime("", "OpenVINO is not installed", "pip install 'transformer-compress[openvino]'") from error
        self._core = openvino.Core()
        self._config = {
            "INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": precision_hint,
            "NUM_STREAMS": 1,
        }  # fmt: skip
        try:
            self._model = self._core.read_model(str(path))
        except Exception as error:
            raise UserError(
                str(path), f"OpenVINO cannot read it: {str(error).splitlines()[0]}", "Use dialect: portable."
            ) from error
        version = re.match(r"[\d.]+", openvino.get_version())
        self.runtime = f"openvino {version.group(0).rstrip('.') if version else '?'} CPU {precision_hint}"
        self._types = {item.get_any_name(): item.get_element_type().get_type_name() for item in self._model.inputs}
        lengths = self._model.inputs[0].get_partial_shape()
        self.rows = None if lengths[0].is_dynamic else lengths[0].get_length()
        self._requests: dict[Any, Any] = {}

    def __call__(self, batch: Batch) -> Tensor:
        kinds = {"i64": torch.int64, "i32": torch.int32, "f32": torch.float32, "f16": torch.float16, "boolean": torch.bool}
        feeds = {name: batch[name].detach().to(kinds[kind]).contiguous().numpy() for name, kind in self._types.items()}
        request = self._request({name: array.shape for name, array in feeds.items()})
        result = request.infer(feeds, share_inputs=True)
        return torch.from_numpy(np.array(result[0])).float()

    def _request(self, shapes: dict[str, tuple[int, ...]]) -> Any:
        key = tuple(sorted(shapes.items()))
        if key not in self._requests:
            model = self._model
            if model.is_dynamic():
                model = model.clone()
                model.reshape({name: list(shape) for name, shape in shapes.items()})
            self._requests[key] = self._core.compile_model(model, "CPU", self._config).create_infer_request()
        return self._requests[key]

    def close(self) -> None:
        self._requests.clear()


def optimized(path: Path) -> Any:
    """The graph (``onnx_ir.Model``) that ONNX Runtime runs, after its own rewrites at the default level."""
    import onnx_ir as ir

    runtime = _onnxruntime()
    with tempfile.TemporaryDirectory() as folder:
        target = os.path.join(folder, "optimized.onnx")
        options = runtime.SessionOptions()
        options.optimized_model_filepath = target
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "optimized.data")
        options.add_session_config_entry("session.optimized_model_external_initializers_min_size_in_bytes", "1024")
        runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        return ir.load(target)


def executed_ops(path: Path) -> dict[str, int]:
    """How many nodes of each type ONNX Runtime runs for a file ("Gelu", "com.microsoft::MatMulIntegerToFloat" ...)."""
    counted = Counter(f"{node.domain}::{node.op_type}" if node.domain else node.op_type for node in optimized(path).graph)
    return dict(sorted(counted.items()))
