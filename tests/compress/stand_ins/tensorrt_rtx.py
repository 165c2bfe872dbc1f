"""The part of ``tensorrt_rtx`` that a generated program uses, on the host: the engine is the Q/DQ graph in ONNX Runtime."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping
from enum import Enum
from typing import Any

import numpy as np


class DataType(Enum):
    FLOAT = np.float32


def nptype(kind: DataType) -> Any:
    return kind.value


class Logger:
    WARNING = 1

    def __init__(self, severity: int) -> None: ...


class Runtime:
    def __init__(self, logger: Logger) -> None: ...

    def deserialize_cuda_engine(self, plan: bytes) -> Engine | None:
        return Engine() if plan.startswith(b"ptrt") or len(plan) > 1000 else None


class Engine:
    def create_execution_context(self) -> Context:
        return Context()

    def get_tensor_dtype(self, name: str) -> DataType:
        return DataType.FLOAT


class Context:
    """Refuses what a real context refuses: unset shapes and addresses, and numbers of rows outside the profile."""

    def __init__(self) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.add_session_config_entry("session.disable_quant_qdq", "1")
        self.session = onnxruntime.InferenceSession(os.environ["STAND_IN_GRAPH"], options, providers=["CPUExecutionProvider"])
        self.least, self.most = map(int, os.environ["STAND_IN_PROFILE"].split("-"))
        self.types = {item.name: item.type for item in self.session.get_inputs()}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert self.least <= shape[0] <= self.most, f"{shape[0]} rows are outside the profile"
        self.shapes[name] = tuple(shape)
        return name in self.types

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = int(address)
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        assert self.shapes.keys() == self.types.keys(), "every input has a shape before the output's is asked"
        return tuple(self._outputs(zeros=True).shape)

    def execute_async_v3(self, stream: int) -> bool:
        output = np.ascontiguousarray(self._outputs(zeros=False))
        (name,) = self.addresses.keys() - self.types.keys()
        ctypes.memmove(self.addresses[name], output.ctypes.data, output.nbytes)
        return True

    def _outputs(self, zeros: bool) -> Any:
        feeds: Mapping[str, Any] = {
            name: np.zeros(self.shapes[name], _numpy(kind)) if zeros else self._read(name, _numpy(kind))
            for name, kind in self.types.items()
        }
        return self.session.run(None, feeds)[0]

    def _read(self, name: str, dtype: np.dtype[Any]) -> Any:
        value = np.empty(self.shapes[name], dtype)
        ctypes.memmove(value.ctypes.data, self.addresses[name], value.nbytes)
        return value


def _numpy(kind: str) -> np.dtype[Any]:
    name = kind.removeprefix("tensor(").removesuffix(")")
    return np.dtype({"float": "float32"}.get(name, name))
