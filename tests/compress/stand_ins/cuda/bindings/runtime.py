"""The part of ``cuda.bindings.runtime`` that a generated program uses, on the host."""

from __future__ import annotations

import ctypes
from enum import Enum, IntEnum
from typing import Any

_memory: dict[int, Any] = {}


class cudaError_t(IntEnum):
    cudaSuccess = 0
    cudaErrorInvalidValue = 1


class cudaMemcpyKind(Enum):
    cudaMemcpyHostToDevice = 1
    cudaMemcpyDeviceToHost = 2


def cudaMalloc(size: int) -> tuple[cudaError_t, int]:
    block = ctypes.create_string_buffer(size)
    _memory[ctypes.addressof(block)] = block
    return cudaError_t.cudaSuccess, ctypes.addressof(block)


def cudaFree(address: int) -> tuple[cudaError_t]:
    return (cudaError_t.cudaSuccess if _memory.pop(address, None) is not None else cudaError_t.cudaErrorInvalidValue,)


def cudaMemcpy(target: int, source: int, count: int, kind: cudaMemcpyKind) -> tuple[cudaError_t]:
    device = target if kind is cudaMemcpyKind.cudaMemcpyHostToDevice else source
    if device not in _memory or count > len(_memory[device]):
        return (cudaError_t.cudaErrorInvalidValue,)
    ctypes.memmove(target, source, count)
    return (cudaError_t.cudaSuccess,)


def cudaStreamCreate() -> tuple[cudaError_t, int]:
    return cudaError_t.cudaSuccess, 7


def cudaStreamSynchronize(stream: int) -> tuple[cudaError_t]:
    return (cudaError_t.cudaSuccess if stream == 7 else cudaError_t.cudaErrorInvalidValue,)


cudaStreamDestroy = cudaStreamSynchronize
