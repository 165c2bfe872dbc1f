"""Runs a TensorRT engine on a GPU, or, where that cannot be, the exact Q/DQ file that it was built from."""

from __future__ import annotations

import ctypes
import ctypes.util
import importlib
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from calibrate.errors import UserError
from calibrate.signature import Batch
from export.contract import Runner

__all__ = ["EngineRunner", "ProxyRunner", "gpu_name"]


@cache
def gpu_name() -> str | None:
    """The first NVIDIA GPU that the driver offers, or None; needs no CUDA build of torch."""
    name = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        driver = ctypes.CDLL(name)
    except OSError:
        return None
    count, found = ctypes.c_int(), ctypes.create_string_buffer(256)
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)) or not count.value:
        return None
    device = ctypes.c_int()
    if driver.cuDeviceGet(ctypes.byref(device), 0) or driver.cuDeviceGetName(found, 256, device):
        return None
    return found.value.decode(errors="replace")


_WRONG_FOR_FLOATS = ["ReluQuantRewrite"]
"""Rewrites of ONNX Runtime that are wrong before a QuantizeLinear to 8-bit floating point: a Relu there is taken out, as if the
zero point were the smallest number (1.31)."""


class ProxyRunner(Runner):
    """The Q/DQ file in ONNX Runtime on the CPU, node by node as it is written.

    ONNX Runtime would otherwise replace Q/DQ pairs by integer kernels of its own (and round the inputs of weight-only
    layers to 8 bits on the way): that is switched off, so that what runs is the arithmetic of the file. Its time says
    nothing about a GPU.
    """

    how = "proxy"
    measurable = False

    def __init__(self, onnx: Path, runtime: str, threads: int) -> None:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        options.add_session_config_entry("session.disable_quant_qdq", "1")
        providers = ["CPUExecutionProvider"]
        self.session: Any = ort.InferenceSession(str(onnx), options, providers=providers, disabled_optimizers=_WRONG_FOR_FLOATS)
        self.runtime = f"onnxruntime {ort.__version__} CPU (proxy for {runtime})"
        first = self.session.get_inputs()[0].shape[0]
        self.rows = first if isinstance(first, int) else None

    def __call__(self, batch: Batch) -> Tensor:
        feeds = {item.name: batch[item.name].numpy().astype(_numpy(item.type)) for item in self.session.get_inputs()}
        output: np.ndarray[Any, Any] = self.session.run(None, feeds)[0]
        return torch.from_numpy(output.astype(np.float32))

    def close(self) -> None:
        self.session = None


class EngineRunner(Runner):
    """The engine itself on the first GPU, through torch's CUDA memory and the library's own execution context.

    A batch larger than the engine's profile is run in pieces. The time of a call includes the copies to the device and
    back.
    """

    def __init__(self, engine: bytes, library: str, name: str) -> None:
        """
        Args:
            engine: the plan.
            library: Python module, ``tensorrt`` or ``tensorrt_rtx``.
            name: the library's name for reports.

        Raises:
            RuntimeError: the library cannot load the plan on this device, with its own words.
        """
        trt: Any = importlib.import_module(library)
        self._said: list[str] = []
        self._runtime: Any = trt.Runtime(_logger(trt, self._said))
        self._engine: Any = self._runtime.deserialize_cuda_engine(engine)
        self._context: Any = self._engine and self._engine.create_execution_context()
        if self._context is None:
            raise RuntimeError(self._said[0] if self._said else "the engine cannot be loaded")
        tensors = [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]
        given = trt.TensorIOMode.INPUT
        self._inputs = [tensor for tensor in tensors if self._engine.get_tensor_mode(tensor) == given]
        self._output = next(tensor for tensor in tensors if tensor not in self._inputs)
        self._dtypes = {tensor: _TORCH[self._engine.get_tensor_dtype(tensor).name] for tensor in tensors}
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        first = self._inputs[0]
        fixed = int(self._engine.get_tensor_shape(first)[0])
        self.rows = fixed if fixed >= 0 else None
        self._most = fixed if fixed >= 0 else int(self._engine.get_tensor_profile_shape(first, 0)[2][0])
        self.runtime = f"{name} {trt.__version__} on {torch.cuda.get_device_name()}"

    def __call__(self, batch: Batch) -> Tensor:
        total = batch[self._inputs[0]].shape[0]
        pieces = [
            self._run({name: batch[name][start : start + self._most] for name in self._inputs})
            for start in range(0, total, self._most)
        ]
        return torch.cat(pieces)

    def close(self) -> None:
        self._context = self._engine = self._runtime = None

    def _run(self, batch: Batch) -> Tensor:
        with torch.cuda.stream(self._stream):
            given = {name: batch[name].to("cuda", self._dtypes[name]).contiguous() for name in self._inputs}
            for name, value in given.items():
                if not self._context.set_input_shape(name, tuple(value.shape)):
                    raise UserError(name, f"shape {list(value.shape)} is outside the engine's profile")
                self._context.set_tensor_address(name, value.data_ptr())
            shape = tuple(self._context.get_tensor_shape(self._output))
            output = torch.empty(shape, dtype=self._dtypes[self._output], device="cuda")
            self._context.set_tensor_address(self._output, output.data_ptr())
            if not self._context.execute_async_v3(self._stream.cuda_stream):
                raise RuntimeError(self._said[-1] if self._said else "the engine did not run")
            self._stream.synchronize()
            return output.to("cpu", torch.float32)


_TORCH = {
    "FLOAT": torch.float32,
    "HALF": torch.float16,
    "BF16": torch.bfloat16,
    "INT8": torch.int8,
    "UINT8": torch.uint8,
    "INT32": torch.int32,
    "INT64": torch.int64,
    "BOOL": torch.bool,
}


def _numpy(kind: str) -> type[np.generic]:
    """The numpy type of an ONNX Runtime input such as ``tensor(int64)``."""
    names = {"float": np.float32, "float16": np.float16, "double": np.float64, "bool": np.bool_}
    name = kind.removeprefix("tensor(").removesuffix(")")
    return names.get(name) or np.dtype(name).type


def _logger(trt: Any, said: list[str]) -> Any:
    class Logger(trt.ILogger):  # type: ignore[misc]
        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.INTERNAL_ERROR, trt.ILogger.Severity.ERROR):
                said.append(message)

    return Logger()
