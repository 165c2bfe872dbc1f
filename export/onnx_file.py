"""Writes an ONNX model without a second copy of its weights, and reads back what a file holds."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import torch

from calibrate.bits import integers
from calibrate.errors import MissingRuntime, UserError
from calibrate.grid import offset, unpack
from export.contract import Contents

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["CODES", "LIMIT_BYTES", "contents", "made_bytes", "read", "write", "written_bytes"]

CODES = "compress.codes"
"""Key of the model's metadata: site -> where its codes lie. Each entry has

``initializer`` (name), ``bits``, ``shape`` (of the weight), ``order`` ("OI": as the weight, "IO": transposed), ``storage``
("int8", "int4", "int2", "bits": code + 2**(bits-1) in bytes, the first in the lowest bits, or "planes" of single bits, with
the initializers ``multiples`` and ``shift``: ``calibrate.bits``, or "e4m3": ``calibrate.float8``) and, where several sites
share an initializer, ``start`` and ``stop`` on its outputs.
"""

LIMIT_BYTES = 2**31 - 2**26
"""A protobuf message must stay below 2 GiB: models with more weight bytes than this get external data."""

_ALIGNMENT = 4096
_MATRIX_INPUT = {"MatMul": (0, 1), "Gemm": (0, 1), "Conv": (1,), "ConvTranspose": (1,), "Gather": (0,), "Einsum": (0, 1, 2)}


# -- writing --------------------------------------------------------------------------------------------------------


def write(model: ir.Model, path: Path, limit: int = LIMIT_BYTES) -> list[Path]:
    """Writes ``model`` and returns its files: ``path``, and ``path`` + ".data" where the weights exceed ``limit`` bytes.

    Tensors are written one after the other, straight from the memory of the torch model; each file is renamed into place.
    """
    graph = model.graph
    tensors = [value.const_value for value in graph.initializers.values()]
    names = list(graph.initializers)
    external = sum(tensor.nbytes for tensor in tensors) > limit
    path.parent.mkdir(parents=True, exist_ok=True)
    partial, data = path.with_name(f"{path.name}.partial"), path.with_name(f"{path.name}.data")
    partial_data = data.with_name(f"{data.name}.partial")
    try:
        headers = _external(partial_data, data.name, names, tensors) if external else [
            _header(name, tensor) for name, tensor in zip(names, tensors, strict=True)
        ]  # fmt: skip
        with partial.open("wb") as file:
            _message(file, model, headers, [None if external and _outside(tensor) else tensor for tensor in tensors])
        if external:
            partial_data.replace(data)
        else:
            data.unlink(missing_ok=True)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
        partial_data.unlink(missing_ok=True)
    return [path, data] if external else [path]


def written_bytes(model: ir.Model, name: str = "model.onnx", limit: int = LIMIT_BYTES) -> int:
    """Bytes of the files that ``write`` would make under that name; no tensor is read."""
    tensors = {label: value.const_value for label, value in model.graph.initializers.items()}
    external = sum(tensor.nbytes for tensor in tensors.values()) > limit
    inside = outside = 0
    for label, tensor in tensors.items():
        assert tensor is not None
        place = None
        if external and _outside(tensor):
            outside += -outside % _ALIGNMENT
            place = {"location": f"{name}.data", "offset": str(outside), "length": str(tensor.nbytes)}
            outside += tensor.nbytes
        size = len(_header(label, tensor, place)) + (0 if place else 1 + len(_varint(tensor.nbytes)) + tensor.nbytes)
        inside += 1 + len(_varint(size)) + size
    proto = _small(model)
    graph = len(proto.graph.SerializeToString()) + inside
    proto.ClearField("graph")
    return len(proto.SerializeToString()) + 1 + len(_varint(graph)) + graph + outside


def made_bytes(model: ir.Model, module: torch.nn.Module) -> int:
    """Memory that writing takes beyond that of the torch module: initializers that lie elsewhere, and the largest of those that
    are made while they are written."""
    import onnx_ir as ir

    places = {tensor.data_ptr() for tensor in (*module.parameters(), *module.buffers())}
    copies = largest = 0
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if isinstance(tensor, ir.Tensor):
            copies += 0 if tensor.numpy().ctypes.data in places else tensor.nbytes
        elif tensor is not None:
            largest = max(largest, tensor.nbytes)
    return copies + 2 * largest


def _message(file: IO[bytes], model: ir.Model, headers: list[bytes], tensors: list[Any]) -> None:
    """A ModelProto written by hand: fields of a message may come in any order, so the graph is its small part (nodes, inputs,
    outputs) followed by one field per initializer (onnx.proto: GraphProto.initializer = 5, TensorProto.raw_data = 9)."""
    proto = _small(model)
    graph = proto.graph.SerializeToString(deterministic=True)
    proto.ClearField("graph")
    rest = proto.SerializeToString(deterministic=True)
    sizes = [len(header) + (0 if tensor is None else 1 + len(_varint(tensor.nbytes)) + tensor.nbytes)
             for header, tensor in zip(headers, tensors, strict=True)]  # fmt: skip
    total = len(graph) + sum(1 + len(_varint(size)) + size for size in sizes)
    file.write(rest)
    file.write(b"\x3a" + _varint(total) + graph)
    for header, tensor, size in zip(headers, tensors, sizes, strict=True):
        file.write(b"\x2a" + _varint(size) + header)
        if tensor is not None:
            file.write(b"\x4a" + _varint(tensor.nbytes))
            file.write(_raw(tensor))


def _small(model: ir.Model) -> Any:
    """The ModelProto without its initializers."""
    import onnx_ir as ir

    held = dict(model.graph.initializers)
    model.graph.initializers.clear()
    try:
        return ir.to_proto(model)
    finally:
        for value in held.values():
            model.graph.register_initializer(value)


def _header(name: str, tensor: Any, location: Mapping[str, str] | None = None) -> bytes:
    """A TensorProto without its bytes."""
    import onnx

    proto = onnx.TensorProto(name=name, data_type=int(tensor.dtype), dims=list(tensor.shape.numpy()))
    for key, value in (location or {}).items():
        proto.external_data.add(key=key, value=value)
    if location:
        proto.data_location = onnx.TensorProto.EXTERNAL
    made: bytes = proto.SerializeToString(deterministic=True)
    return made


def _outside(tensor: Any) -> bool:
    """Whether external data holds the tensor: shapes and other small constants stay in the model, as runtimes need."""
    return bool(tensor.nbytes >= 1024)


def _external(path: Path, name: str, names: list[str], tensors: list[Any]) -> list[bytes]:
    headers = []
    with path.open("wb") as file:
        for label, tensor in zip(names, tensors, strict=True):
            if not _outside(tensor):
                headers.append(_header(label, tensor))
                continue
            file.write(b"\0" * (-file.tell() % _ALIGNMENT))
            place = {"location": name, "offset": str(file.tell()), "length": str(tensor.nbytes)}
            file.write(_raw(tensor))
            headers.append(_header(label, tensor, place))
    return headers


def _raw(tensor: Any) -> Any:
    """The tensor's bytes as ONNX stores them, without a copy where its memory already is in that order."""
    import onnx_ir as ir

    tensor = tensor.raw() if isinstance(tensor.raw, Callable) else tensor  # type: ignore[arg-type]
    data = getattr(tensor, "raw", None)
    if isinstance(tensor, (ir.Tensor, ir.PackedTensor)) and isinstance(data, np.ndarray) and data.flags.c_contiguous:
        return data.reshape(-1).view(np.uint8).data
    return tensor.tobytes()


def _varint(value: int) -> bytes:
    parts = bytearray()
    while value > 127:
        parts.append(value & 127 | 128)
        value >>= 7
    parts.append(value)
    return bytes(parts)


# -- reading --------------------------------------------------------------------------------------------------------


def read(path: Path) -> ir.Model:
    """The model in a file; external data is mapped, not read.

    Raises:
        UserError: the file is absent or is not ONNX.
    """
    try:
        import onnx_ir as ir
    except ImportError as error:
        raise MissingRuntime("", "reading ONNX needs onnx and onnx-ir", "pip install 'transformer-compress[onnx]'") from error
    if not path.is_file():
        raise UserError(str(path), "no such file", "Run the export again.")
    try:
        return ir.load(path)
    except Exception as error:
        raise UserError(str(path), f"not a readable ONNX file ({type(error).__name__})", "Run the export again.") from error


def contents(path: Path) -> Contents:
    """What a file stores: weight bytes by element type, the codes of each quantized layer, matrices in floating point."""
    model = read(path)
    held = {name: value.const_value for name, value in model.graph.initializers.items()}
    sizes: Counter[str] = Counter()
    for tensor in held.values():
        sizes[_type_name(tensor.dtype.name)] += tensor.nbytes
    places = json.loads(model.metadata_props.get(CODES, "{}"))
    codes = {site: _codes(held, place) for site, place in places.items() if place["initializer"] in held}
    return Contents(dict(sorted(sizes.items())), codes, tuple(sorted(set(_float_matrices(model, places)))))


def _type_name(name: str) -> str:
    return {"FLOAT": "float32", "DOUBLE": "float64", "FLOAT8E4M3FN": "float8_e4m3"}.get(name, name.lower())


def _codes(held: Mapping[str, Any], place: Mapping[str, Any]) -> np.ndarray[Any, Any]:
    """Signed codes in the weight's own shape, from where and how they lie in the file."""
    shape, tensor = tuple(place["shape"]), held[place["initializer"]]
    if place["storage"] == "planes":
        return _from_planes(held, place)
    outputs, inputs = shape[0], math.prod(shape[1:])
    start, stop = place.get("start", 0), place.get("stop", outputs)
    if place["storage"] == "bits":
        bits = place["bits"]
        packed = offset(torch.from_numpy(np.array(tensor.numpy()).reshape(-1)), bits)
        flat = unpack(packed, bits, [packed.numel() * 8 // bits])
        array = flat.numpy()[: place.get("rows", outputs) * inputs]
    elif place["storage"] == "e4m3":
        array = np.array(tensor.numpy()).view(np.int8)
    else:
        array = np.array(tensor.numpy()).astype(np.int8)
    matrix = array.reshape(inputs, -1).T if place["order"] == "IO" else array.reshape(-1, inputs)
    return np.ascontiguousarray(matrix[start:stop]).reshape(shape)


def _from_planes(held: Mapping[str, Any], place: Mapping[str, Any]) -> np.ndarray[Any, Any]:
    """What planes of bits stand for."""

    def read(key: str) -> torch.Tensor | None:
        return torch.from_numpy(np.array(held[place[key]].numpy()).squeeze(-1)) if key in place else None

    planes, multiples = torch.from_numpy(np.array(held[place["initializer"]].numpy()).reshape(-1)), read("multiples")
    times = None if multiples is None else multiples.permute(1, 2, 0)
    return integers(planes, times, read("shift"), place["shape"]).numpy()


def _float_matrices(model: ir.Model, places: Mapping[str, Any]) -> Iterator[str]:
    """Module paths (names of tensors where there is none) of float matrices that products, convolutions and tables read."""
    for node in model.graph:
        for index in _MATRIX_INPUT.get(node.op_type, ()):
            value = node.inputs[index] if index < len(node.inputs) else None
            tensor = value.const_value if value is not None and value.is_initializer() else None
            if tensor is None or value is None or len(tensor.shape) < 2 or not tensor.dtype.is_floating_point():
                continue
            site, _, kind = (value.name or "").rpartition(".")
            if not (kind in ("scale", "zero_point") and site in places):
                yield site if kind == "weight" else value.name or ""
