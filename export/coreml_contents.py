"""What a saved Core ML package stores, read back from disk: codes of each site, bytes by element type, float weights."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from calibrate.errors import UserError
from export.contract import Contents
from export.mil_package import BITS, Op, Package, Stored, unpack_bits

__all__ = ["CODES", "PARAMETERS", "codes_of", "infinite", "read_contents"]

CODES = "compress.codes"
"""Key of the package's metadata: weight operation -> module paths in the user's model, as JSON."""
PARAMETERS = "compress.parameters"
"""Key of the package's metadata: float weight constant -> parameter path in the user's model, as JSON."""

_FLOATS = ("float16", "float32", "float64")


def read_contents(path: Path) -> Contents:
    """Codes, bytes and float matrix weights of a saved package.

    Raises:
        UserError: the package was not written by this exporter, or is damaged.
    """
    package = Package(path)
    if CODES not in package.metadata:
        raise UserError(str(path), "the package does not say where its codes are", "Write it with the coreml exporter.")
    constants = {op.name: _constant(op) for op in package.ops if op.kind == "const"}
    ops = {op.name: op for op in package.ops}
    codes: dict[str, np.ndarray[Any, Any]] = {}
    for name, sites in json.loads(package.metadata[CODES]).items():
        if name not in ops:
            raise UserError(str(path), f"the weight {name} of {', '.join(sites)} is not in the program", "Write it again.")
        for site in sites:
            codes[site] = codes_of(ops[name], constants, ops)
    return Contents(_bytes_by_dtype(package), codes, tuple(_float_layers(package, constants)))


def _constant(op: Op) -> Stored:
    stored = op.inputs["val"][0]
    assert isinstance(stored, Stored)
    return stored


def codes_of(op: Op, constants: Mapping[str, Stored], ops: Mapping[str, Op]) -> np.ndarray[Any, Any]:
    """Signed codes (int8) in the weight's shape of the operation that makes a dense weight.

    Where its table is made of whole numbers and a scale, the code is the whole number that the index stands for.
    """

    def argument(of: Op, name: str) -> Any:
        given = of.inputs[name][0]
        return given if isinstance(given, Stored) else constants.get(given, given)

    shape = op.outputs[0][1].shape
    if op.kind == "constexpr_blockwise_shift_scale":
        return np.array(argument(op, "data").value, np.int8)
    if op.kind == "constexpr_affine_dequantize":
        return np.array(argument(op, "quantized_data").value, np.int8)
    if op.kind == "constexpr_lut_to_dense":
        indices, lut = argument(op, "indices"), argument(op, "lut")
        if isinstance(lut, str):
            return _looked_up(indices.value, np.array(argument(ops[lut], "data").value, np.int8))
        if BITS.get(indices.type.dtype) == 1:
            return np.asarray(indices.value.astype(np.int8) * 2 - 1, np.int8)
        levels = int(lut.size) if "shape" in op.inputs else 2 ** BITS.get(indices.type.dtype, 8)
        values = indices.value
        if "shape" in op.inputs:
            sizes = [int(size or 0) for size in shape]
            values = unpack_bits(values.reshape(-1), levels.bit_length() - 1, int(np.prod(sizes))).reshape(sizes)
        return np.asarray(values.astype(np.int16) - levels // 2, np.int8)
    raise UserError(op.name, f"{op.kind} holds no codes", "Write the package again.")


def _looked_up(indices: np.ndarray[Any, Any], tables: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Entries of tables [blocks ..., levels, 1] by indices, each block of them with its own table."""
    places = []
    for axis, (size, blocks) in enumerate(zip(indices.shape, tables.shape[:-2], strict=True)):
        sizes = [1] * indices.ndim
        sizes[axis] = size
        places.append((np.arange(size) // (size // blocks)).reshape(sizes))
    return np.asarray(tables[..., 0][(*places, indices.astype(np.int64))], np.int8)


def _all_stored(package: Package) -> Iterator[Stored]:
    for op in package.ops:
        for parts in op.inputs.values():
            yield from (part for part in parts if isinstance(part, Stored))


def _bytes_by_dtype(package: Package) -> dict[str, int]:
    seen: dict[int, tuple[str, int]] = {}
    for stored in _all_stored(package):
        if stored.offset is not None:
            seen[stored.offset] = (stored.type.dtype, len(package.blob(stored.offset)[1]))
    counted: dict[str, int] = {}
    for dtype, size in seen.values():
        counted[dtype] = counted.get(dtype, 0) + size
    return dict(sorted(counted.items()))


def _float_layers(package: Package, constants: Mapping[str, Stored]) -> list[str]:
    """Float constants with two dimensions or more that an operation multiplies by or looks up."""
    paths = json.loads(package.metadata.get(PARAMETERS, "{}"))
    arguments = {
        "linear": ("weight",),
        "conv": ("weight",),
        "matmul": ("x", "y"),
        "gather": ("x",),
        "conv_transpose": ("weight",),
    }
    found: dict[str, None] = {}
    for op in package.ops:
        for name in arguments.get(op.kind, ()):
            given = op.inputs[name][0]
            stored = constants.get(given) if isinstance(given, str) else None
            if stored is not None and stored.type.dtype in _FLOATS and sum(size != 1 for size in stored.type.shape) >= 2:
                found[str(paths.get(given, given))] = None
    return list(found)


def infinite(package: Package) -> list[str]:
    """Names of operations with a float constant that is not finite or stands for infinity (beyond 1e30)."""
    found = []
    for op in package.ops:
        for parts in op.inputs.values():
            for stored in parts:
                if isinstance(stored, Stored) and stored.type.dtype in _FLOATS:
                    values = np.asarray(stored.value, np.float32) if stored.size else np.zeros(1, np.float32)
                    if not np.isfinite(values).all() or np.abs(values).max(initial=0.0) > 1.001e30:
                        found.append(op.name)
    return found
