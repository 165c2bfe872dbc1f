"""Reads what a TensorRT-RTX engine says about itself: its kernels, its constants, and whether given codes are in it.

An engine cannot be opened without a GPU, but the plan holds a readable listing of the compiled graph. Its format is not
documented and may change with any version: it serves reports and checks, and where nothing is found that is said.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np

__all__ = ["Listing", "builder_of", "holds", "read_listing"]

_TYPES = {"float": "float32", "half": "float16", "bf16": "bfloat16", "fp8_e4m3": "float8_e4m3"}
_BOOKKEEPING = frozenset({"shape_call", "copy", "memset", "assert", "signal", "wait"})
_CONSTANT = re.compile(rb"^  tensor=\{ [^\n]*?const_payload_size=(\d+) [^\n]*? type=(\w+) \}", re.MULTILINE)
_MAIN = re.compile(rb"\nmain \{\n(.*?)\n\}", re.DOTALL)
_OPERATION = re.compile(r"^  (\w+)=\{ name=(.*)$", re.MULTILINE)
_LAYER = re.compile(r"\[ONNX Layer: ([^\]]*)\]")


@dataclass(frozen=True)
class Listing:
    """What the plan's listing tells.

    Attributes:
        kernels: launches of one inference, shape arithmetic and copies left out.
        fully_connected: matrix products among them (merged ones count once).
        convolutions: convolutions among them.
        constant_bytes: bytes of constants by element type, padding included.
        fused: for each kernel that does the work of several layers of the ONNX file, their names.
        targets: compute capabilities of the code in the plan, as the plan names them (``sm80``).
    """

    kernels: int
    fully_connected: int
    convolutions: int
    constant_bytes: dict[str, int] = field(default_factory=dict)
    fused: tuple[tuple[str, ...], ...] = ()
    targets: tuple[str, ...] = ()


def read_listing(engine: bytes) -> Listing | None:
    """The listing of a plan, or None where there is none that this reader understands."""
    operations: list[tuple[str, str, bool]] = []
    targets: list[str] = []
    for header, text in _sections(engine):
        inside_fusion = "runtime-fusion" in header
        found = re.search(r"accelerators=\{([^}]*)\}", header)
        if found and not inside_fusion:
            targets += [name for name in found.group(1).split() if name not in targets]
        operations += [(kind, rest, inside_fusion) for kind, rest in _OPERATION.findall(text)]
    constants: dict[str, int] = {}
    for size, kind in _CONSTANT.findall(engine):
        name = _TYPES.get(kind.decode(), kind.decode())
        constants[name] = constants.get(name, 0) + int(size)
    launched = [(kind, rest) for kind, rest, inside in operations if not inside and kind not in _BOOKKEEPING]
    if not launched and not constants:
        return None
    kinds = [kind for kind, _, _ in operations]
    layers = [tuple(_LAYER.findall(rest)) for _, rest in launched]
    return Listing(
        kernels=len(launched),
        fully_connected=kinds.count("fully_connected"),
        convolutions=kinds.count("corrltn"),
        constant_bytes=constants,
        fused=tuple(names for names in layers if len(names) > 1),
        targets=tuple(targets),
    )


def builder_of(engine: bytes) -> tuple[str, str]:
    """(``tensorrt-rtx`` or ``tensorrt``, version) that made a plan, from its first bytes; the version may be empty."""
    if engine[:4] == b"vtrt":
        return "tensorrt-rtx", ".".join(str(number) for number in engine[24:28])
    return "tensorrt", ""


def holds(engine: bytes, codes: np.ndarray[Any, Any], bits: int) -> bool:
    """Whether a weight's integer codes lie in the plan unchanged, in one of the orders that the builder writes.

    Args:
        engine: the whole plan.
        codes: int8, the weight in any shape; matrices are tried as they are and transposed, convolution weights
            [O, I, kh, kw] also with the channels last (and padded to a multiple of 4).
        bits: 8, or 4 for two codes a byte.

    A matrix that was merged with others (query, key and value in one product) is found row by row, at equal distances.
    """
    return any(_find(engine, matrix, bits) for matrix in _orders(codes))


def _orders(codes: np.ndarray[Any, Any]) -> Iterator[np.ndarray[Any, Any]]:
    if codes.ndim == 4:
        last = codes.transpose(0, 2, 3, 1)
        yield last.reshape(len(codes), -1)
        yield np.pad(last, [(0, 0)] * 3 + [(0, -last.shape[3] % 4)]).reshape(len(codes), -1)
    matrix = codes.reshape(len(codes), -1) if codes.ndim > 1 else codes.reshape(1, -1)
    yield matrix
    yield matrix.T


def _find(engine: bytes, matrix: np.ndarray[Any, Any], bits: int) -> bool:
    whole = _packed(matrix.reshape(1, -1), bits)
    if whole is not None and engine.find(whole.tobytes()) >= 0:
        return True
    rows = _packed(matrix, bits)
    if rows is None:
        return False
    first, second, span = rows[0].tobytes(), rows[min(1, len(rows) - 1)].tobytes(), 64 * rows.shape[1]
    plan = np.frombuffer(engine, np.uint8)
    start = engine.find(first)
    for _ in range(16):  # a row may also occur elsewhere by chance
        if start < 0:
            return False
        step = engine.find(second, start + len(first), start + span) - start
        end = start + step * (len(rows) - 1) + rows.shape[1]
        if step > 0 and end <= len(plan):
            window = np.lib.stride_tricks.as_strided(plan[start:], rows.shape, (step, 1), writeable=False)
            if np.array_equal(window, rows):
                return True
        start = engine.find(first, start + 1)
    return False


def _packed(matrix: np.ndarray[Any, Any], bits: int) -> np.ndarray[Any, Any] | None:
    """Rows of codes as bytes [rows, bytes]; None where a 4-bit row does not fill whole bytes."""
    values = np.ascontiguousarray(matrix).view(np.uint8)
    if bits == 8:
        return values
    if values.shape[1] % 2:
        return None
    low, high = values[:, ::2] & 15, values[:, 1::2] & 15
    return np.ascontiguousarray(low | (high << 4))


def _sections(engine: bytes) -> Iterator[tuple[str, str]]:
    """(header, main block) of each compiled graph in the plan."""
    starts = [found.start() for found in re.finditer(rb"header \{\n", engine)]
    for start, end in pairwise([*starts, len(engine)]):
        close = engine.find(b"\n}\n", start, end)
        block = _MAIN.search(engine, close, end)
        if close > 0 and block:
            yield engine[start:close].decode("latin1"), block.group(1).decode("latin1")
