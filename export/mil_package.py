"""Reads a saved Core ML package: its description, its program as plain operations, and the tensors of its weights."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from calibrate.errors import MissingRuntime, UserError

__all__ = ["MilType", "Op", "Package", "Stored", "coremltools", "package_files", "quiet", "unpack_bits"]

Array = np.ndarray[Any, Any]

MODEL = "Data/com.apple.CoreML/model.mlmodel"
WEIGHTS = "Data/com.apple.CoreML/weights/weight.bin"
_SENTINEL = 0xDEADBEEF

# Element types of a MIL program: number in the file -> name. Numbers from the public MIL.proto of coremltools.
DTYPES = {
    1: "bool", 2: "string", 10: "float16", 11: "float32", 12: "float64", 21: "int8", 22: "int16", 23: "int32",
    24: "int64", 25: "int4", 31: "uint8", 32: "uint16", 33: "uint32", 34: "uint64", 35: "uint4", 36: "uint2", 37: "uint1",
    38: "uint6", 39: "uint3",
}  # fmt: skip
BITS = {"int4": 4, "uint4": 4, "uint2": 2, "uint1": 1, "uint6": 6, "uint3": 3}


@contextmanager
def quiet() -> Iterator[None]:
    """Silences coremltools (log lines at import, warnings) without touching the streams of the process."""
    logger = logging.getLogger("coremltools")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def coremltools() -> Any:
    """The library, imported silently.

    Raises:
        MissingRuntime: it is not installed.
    """
    with quiet(), _without_sklearn():
        try:
            import coremltools as library
        except ImportError as error:
            hint = "pip install 'transformer-compress[coreml]'"
            raise MissingRuntime("", f"Core ML needs coremltools ({error})", hint) from None
    return library


@contextmanager
def _without_sklearn() -> Iterator[None]:
    """coremltools imports scikit-learn only to find that a version after 1.5 is of no use to it; that takes a second."""
    try:
        useless = tuple(map(int, metadata.version("scikit-learn").split(".")[:2])) > (1, 5)
    except (metadata.PackageNotFoundError, ValueError):
        useless = False
    hidden = useless and not {"sklearn", "coremltools"} & set(sys.modules)
    if hidden:
        sys.modules["sklearn"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        if hidden:
            del sys.modules["sklearn"]


@dataclass(frozen=True)
class MilType:
    """Element type and shape of a value; a size that is not known before the run is None."""

    dtype: str
    shape: tuple[int | None, ...] = ()

    def admits(self, shape: tuple[int, ...]) -> bool:
        return len(shape) == len(self.shape) and all(a is None or a == b for a, b in zip(self.shape, shape, strict=True))


@dataclass(frozen=True)
class Stored:
    """A constant of the program: its type, and where its elements are (``offset`` into the weight file, or inline)."""

    type: MilType
    package: Package = field(repr=False, compare=False)
    message: Any = field(repr=False, compare=False)
    offset: int | None = None

    @property
    def size(self) -> int:
        return int(np.prod([size or 0 for size in self.type.shape], dtype=np.int64))

    @property
    def value(self) -> Any:
        """The elements as a numpy array of the stated shape (sub-byte types as one int8/uint8 each), or a string."""
        if self.offset is not None:
            raw = self.package.blob(self.offset)[1]
        else:
            tensor = self.message.immediateValue.tensor
            kind = tensor.WhichOneof("value")
            if kind == "strings":
                return str(tensor.strings.values[0])
            values = getattr(tensor, kind).values if kind else b""
            if kind != "bytes":
                return np.array(values, dtype=_numpy(self.type.dtype)).reshape(self.type.shape)
            raw = np.frombuffer(values, np.uint8)
        if self.type.dtype in BITS:
            elements = unpack_bits(raw, BITS[self.type.dtype], self.size, signed=self.type.dtype[0] == "i")
        else:
            elements = raw.view(_numpy(self.type.dtype))[: self.size]
        return elements.reshape(self.type.shape)


@dataclass(frozen=True)
class Op:
    """One operation: its type, its first output's name, arguments (names of values, or constants), typed outputs."""

    kind: str
    name: str
    inputs: dict[str, tuple[str | Stored, ...]]
    outputs: tuple[tuple[str, MilType], ...]


class Package:
    """A saved ``.mlpackage`` (an ML program with one function).

    Raises:
        UserError: the folder is not a Core ML package, or one of another kind.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        coremltools()
        from coremltools.proto import Model_pb2

        file = self.path / MODEL
        if not file.is_file():
            raise UserError(str(path), "not a Core ML package", f"There is no {MODEL} in it.")
        self.spec = Model_pb2.Model()
        try:
            self.spec.ParseFromString(file.read_bytes())
        except Exception as error:
            raise UserError(str(path), f"its model file cannot be read ({error})", "Write the package again.") from None
        if self.spec.WhichOneof("Type") != "mlProgram" or "main" not in self.spec.mlProgram.functions:
            raise UserError(str(path), "the package holds no ML program", "Write it with the coreml exporter.")
        self.function = self.spec.mlProgram.functions["main"]
        self.block = self.function.block_specializations[self.function.opset]

    @property
    def metadata(self) -> dict[str, str]:
        return dict(self.spec.description.metadata.userDefined)

    @cached_property
    def inputs(self) -> dict[str, MilType]:
        return {value.name: _type(value.type) for value in self.function.inputs}

    def takes(self, name: str) -> str:
        """The shapes that an input may have, in words."""
        ranges, listed = self._flexible.get(name, ([], []))
        if listed:
            return " or ".join(str(shape) for shape in listed)
        if ranges:
            return str([low if low == high else f"{low}..{high}" for low, high in ranges]).replace("'", "")
        return str(list(self.inputs[name].shape))

    def admits(self, name: str, shape: tuple[int, ...]) -> bool:
        """Whether an input may have this shape: a range or a list of shapes stands in the description, not in the program."""
        ranges, listed = self._flexible.get(name, ([], []))
        if listed:
            return list(shape) in listed
        if ranges:
            return len(ranges) == len(shape) and all(
                low <= size and (high < 0 or size <= high) for size, (low, high) in zip(shape, ranges, strict=True)
            )
        return self.inputs[name].admits(shape)

    @cached_property
    def _flexible(self) -> dict[str, tuple[list[tuple[int, int]], list[list[int]]]]:
        found = {}
        for feature in self.spec.description.input:
            array = feature.type.multiArrayType
            ranges = [(int(size.lowerBound), int(size.upperBound)) for size in array.shapeRange.sizeRanges]
            found[feature.name] = (ranges, [list(entry.shape) for entry in array.enumeratedShapes.shapes])
        return found

    @property
    def outputs(self) -> list[str]:
        return list(self.block.outputs)

    @cached_property
    def ops(self) -> list[Op]:
        return [self._op(message) for message in self.block.operations]

    @cached_property
    def _weights(self) -> Array:
        file = self.path / WEIGHTS
        return np.memmap(file, dtype=np.uint8, mode="r") if file.is_file() else np.zeros(0, np.uint8)

    def blob(self, offset: int) -> tuple[str, Array]:
        """Element type and bytes of one tensor of the weight file.

        Its record is 64 bytes: a marker, the type (numbered apart from the program's), size and place of the data.

        Raises:
            UserError: the file is cut short, or there is no tensor at this place.
        """
        record = self._weights[offset : offset + 64]
        if len(record) < 64 or int(record[:4].view(np.uint32)[0]) != _SENTINEL:
            raise UserError(str(self.path), f"no tensor at byte {offset} of weight.bin", "Write the package again.")
        kind = int(record[4:8].view(np.uint32)[0])
        size, start = (int(value) for value in record[8:24].view(np.uint64))
        if start + size > len(self._weights):
            raise UserError(str(self.path), "weight.bin is cut short", "Write the package again.")
        return str(kind), self._weights[start : start + size]

    def _stored(self, message: Any) -> Stored:
        offset = int(message.blobFileValue.offset) if message.WhichOneof("value") == "blobFileValue" else None
        return Stored(_type(message.type), self, message, offset)

    def _op(self, message: Any) -> Op:
        inputs: dict[str, tuple[str | Stored, ...]] = {}
        for name, argument in message.inputs.items():
            inputs[name] = tuple(
                binding.name if binding.WhichOneof("binding") == "name" else self._stored(binding.value)
                for binding in argument.arguments
            )
        for (
            name,
            value,
        ) in message.attributes.items():  # the value of a const, and the arguments of iOS 16's constexpr ops
            if name != "name" and name not in inputs:
                inputs[name] = (self._stored(value),)
        if message.blocks:
            raise UserError(str(self.path), f"op {message.type} has nested blocks", "Control flow is not supported.")
        outputs = tuple((value.name, _type(value.type)) for value in message.outputs)
        return Op(message.type, outputs[0][0], inputs, outputs)


def package_files(path: Path) -> list[Path]:
    """All files of a package, sorted."""
    return sorted(file for file in Path(path).rglob("*") if file.is_file())


def unpack_bits(raw: Array, bits: int, count: int, signed: bool = False) -> Array:
    """``count`` elements of ``bits`` bits each (uint8, or int8 when signed), the first in the lowest bits of a byte."""
    if 8 % bits == 0:
        shifts = np.arange(8 // bits, dtype=np.uint8) * bits
        values = ((raw[:, None] >> shifts) & (2**bits - 1)).reshape(-1)[:count]
    else:
        stream = np.unpackbits(raw, bitorder="little")[: count * bits].reshape(count, bits)
        values = (stream << np.arange(bits, dtype=np.uint8)).sum(1, dtype=np.uint8)
    if not signed:
        return np.asarray(values, np.uint8)
    sign = 2 ** (bits - 1)
    return np.asarray((values.astype(np.int8) ^ sign) - np.int8(sign))


def _type(message: Any) -> MilType:
    if message.WhichOneof("type") != "tensorType":
        return MilType("other")
    tensor = message.tensorType
    shape = tuple(int(size.constant.size) if size.WhichOneof("dimension") == "constant" else None for size in tensor.dimensions)
    return MilType(DTYPES.get(tensor.dataType, str(tensor.dataType)), shape)


def _numpy(dtype: str) -> Any:
    return np.dtype(dtype if dtype not in BITS else ("int8" if dtype[0] == "i" else "uint8"))
