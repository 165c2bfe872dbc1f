"""What a written file takes and gives, read from the file itself."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from export.tensorrt_contents import qdq_path

if TYPE_CHECKING:
    from compress.report import Row
    from export.contract import Exporter

__all__ = ["Interface", "Port", "interface"]


@dataclass(frozen=True)
class Port:
    """One input, or the output, of a file.

    Attributes:
        dtype: ``float32``, ``int64`` ...
        shape: sizes; a ``str`` is a size that may vary.
        takes: the shapes in words, where the file allows several.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]
    takes: str = ""

    @property
    def written(self) -> str:
        """The shape as comments and tables say it: ``[batch, 64]``."""
        return self.takes or f"[{', '.join(map(str, self.shape))}]"


@dataclass(frozen=True)
class Interface:
    """Inputs and the output of a file, and how many rows it takes at once (``least`` to ``most``; None: any number)."""

    inputs: tuple[Port, ...]
    output: Port
    least: int = 1
    most: int | None = None

    @property
    def fixed(self) -> bool:
        """Whether the file takes one number of rows and no other."""
        return self.most == self.least


def interface(exporter: Exporter, row: Row, path: Path) -> Interface:
    """What the file ``path`` of an exporter takes and gives; ``row`` is its line of the report."""
    if exporter.format == "coreml":
        return _coreml(path)
    if exporter.format == "onnx":
        return _onnx(path)
    found = _onnx(qdq_path(path))
    low, _, high = row.details.get("profile", {}).get("batch", (found.least, 0, found.most))
    return Interface(found.inputs, found.output, low, high)


def _onnx(path: Path) -> Interface:
    import onnx

    graph = onnx.load(str(path), load_external_data=False).graph
    inputs, output = tuple(_value(value) for value in graph.input), _value(graph.output[0])
    rows = inputs[0].shape[0]
    return Interface(inputs, output, rows, rows) if isinstance(rows, int) else Interface(inputs, output)


def _value(value: Any) -> Port:
    import onnx

    kind = value.type.tensor_type
    dtype = str(onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type))
    shape = tuple(size.dim_param if size.HasField("dim_param") else size.dim_value for size in kind.shape.dim)
    return Port(value.name, dtype, shape)


def _coreml(path: Path) -> Interface:
    from export.mil_package import Package

    package = Package(path)
    described = {feature.name: feature.type.multiArrayType for feature in package.spec.description.input}
    inputs = tuple(
        Port(name, kind.dtype, _sizes(kind.shape, described[name].shape), package.takes(name) if None in kind.shape else "")
        for name, kind in package.inputs.items()
    )
    name = package.outputs[0]
    kind = next(kind for op in package.ops for output, kind in op.outputs if output == name)
    # A package that allows several numbers of rows is given its usual one.
    rows = int(described[inputs[0].name].shape[0])
    return Interface(inputs, Port(name, kind.dtype, _sizes(kind.shape, ())), rows, rows)


def _sizes(shape: tuple[int | None, ...], usual: Any) -> tuple[int | str, ...]:
    """Sizes, with those that may vary by their usual value, or as ``?``."""
    given = [int(size) for size in usual]
    return tuple(size if size is not None else given[axis] if axis < len(given) else "?" for axis, size in enumerate(shape))
