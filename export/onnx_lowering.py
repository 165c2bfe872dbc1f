"""Writes ONNX nodes: values, constants, shapes and names. The ops themselves are in ``onnx_ops*``, the walk in ``onnx_walk``.

Nothing rewrites after the fact: constants are folded by running the torch op, equal nodes are made once, chains of
transposes and reshapes become one, and an ``expand`` is only written where its reader cannot broadcast.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor, fx

from calibrate.errors import UserError
from calibrate.signature import raw_path
from export.onnx_values import Carried, Dim, Held, axis_of, dim

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["LOWERINGS", "WIDE", "Dialect", "Lowering", "lowers"]

Lowered = TypeVar("Lowered", bound=Callable[..., Any])
Dialect = Literal["onnxruntime", "portable", "tensorrt"]
LOWERINGS: dict[str, Callable[..., Any]] = {}
"""ATen overload ("aten.linear.default") -> function(lowering, *args, **kwargs) that returns ``Held`` or a list of them."""

WIDE: set[str] = set()
"""Overloads whose lowering takes float32 values in a float16 graph (sums of squares, which would overflow)."""

_FEW = 64
"""Fewer numbers than these are not worth a node."""
_SHARED_BYTES = 4096
_ONNX_TYPES = {
    torch.float32: "FLOAT", torch.float64: "DOUBLE", torch.float16: "FLOAT16", torch.bfloat16: "BFLOAT16", torch.int64: "INT64",
    torch.int32: "INT32", torch.int16: "INT16", torch.int8: "INT8", torch.uint8: "UINT8", torch.bool: "BOOL",
}  # fmt: skip


def lowers(*names: str) -> Callable[[Lowered], Lowered]:
    """Registers a lowering for ATen overloads; ``name`` alone stands for ``name.default``."""

    def register(function: Lowered) -> Lowered:
        for name in names:
            package, _, op = name.rpartition("::")
            op = op if "." in op else f"{op}.default"
            LOWERINGS[f"{package or 'aten'}.{op}"] = function
        return function

    return register


@dataclass
class Lowering:
    """The state of one lowering; ``op`` adds a node.

    Attributes:
        compute: what float32 of the trace becomes (float16 for TensorRT by default); in a ``typed`` lowering, at a node that the
            trace has in 16 bits, those.
        typed: 16-bit floating point of the trace stays as it is.
        unpacked: weights that meet float inputs are made float when the file is opened.
        codes: site -> where and how its codes lie in the file (``export.onnx_file``).
        notes: plain sentences for the report.
    """

    dialect: Dialect
    opset: int
    compute: torch.dtype = torch.float32
    codes: dict[str, dict[str, Any]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    typed: bool = False
    unpacked: bool = False

    def __post_init__(self) -> None:
        import onnx_ir as ir

        self.ir = ir
        self.nodes: list[ir.Node] = []
        self.initializers: dict[str, ir.Value] = {}
        self.node: fx.Node | None = None
        self._around = self.compute
        self.symbols: dict[Any, tuple[Held, int, str]] = {}
        self.inputs: list[ir.Value] = []
        self._names: dict[str, int] = {}
        self._made: dict[Any, list[Held]] = {}
        self._constants: dict[Any, ir.Value] = {}
        self.domains: set[str] = set()
        self.shared: dict[Any, Held] = {}
        self.tables: set[int] = set()

    def enter(self, node: fx.Node) -> None:
        """Makes ``node`` the one that is lowered."""
        self.node = node
        if self.typed:
            traced = getattr(self._traced(), "dtype", None)
            self.compute = traced if traced in (torch.float16, torch.bfloat16) else self._around

    # -- names and places -------------------------------------------------------------------------------------------

    @property
    def path(self) -> str:
        """The module (path in the user's model) that the current node comes from."""
        stack = (self.node.meta.get("nn_module_stack") if self.node is not None else None) or {}
        for name, _ in reversed(list(stack.values())):
            if name and not name.startswith("L["):
                return raw_path(name) if name != "model" else ""
        return ""

    def unique(self, name: str) -> str:
        count = self._names.get(name, 0)
        self._names[name] = count + 1
        return name if not count else self.unique(f"{name}_{count}")

    def refuse(self, what: str, hint: str) -> UserError:
        return UserError(self.path, what, hint)

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    # -- values -----------------------------------------------------------------------------------------------------

    def narrow(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype in the file of a dtype in the trace."""
        if self.typed and dtype in (torch.float16, torch.bfloat16):
            return dtype
        return self.compute if dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16) else dtype

    def kind(self, dtype: torch.dtype) -> ir.DataType:
        """The ONNX element type."""
        found: ir.DataType = getattr(self.ir.DataType, _ONNX_TYPES[dtype])
        return found

    def of(self, held: Held) -> ir.Value:
        """The graph value; constants become initializers, ranges and carried weights become nodes."""
        if held.value is None:
            if held.const is not None:
                held.value = self._initializer(held)
            elif held.iota is not None:
                held.value = self._range(held).value
            elif held.carried is not None:
                from export.onnx_carried import dense

                held.value = self.cast(dense(self, held.carried, flipped=held.flipped), held.dtype).value
            elif held.dynamic is not None:
                codes, step, zero = held.dynamic
                held.value = self.op("DequantizeLinear", codes, step, zero, shape=held.shape, dtype=torch.float32).value
        assert held.value is not None
        return held.value

    def constant(self, data: Any, dtype: torch.dtype | None = None, name: str = "") -> Held:
        tensor = data if isinstance(data, Tensor) else torch.tensor(data, dtype=dtype)
        tensor = tensor if dtype is None else tensor.to(dtype)
        return Held(tuple(tensor.shape), tensor.dtype, const=tensor, name=name)

    def pinned(self, held: Held) -> Held:
        """A constant as a value of the graph: nothing is folded into it."""
        return Held(held.shape, held.dtype, value=self.of(held), name=held.name)

    def halved(self, held: Held) -> Held | None:
        """Constant float32 numbers that are float16 numbers, stored as such and widened by a Cast, which runtimes fold at load.

        None where they are not, where there are few of them, and in files for TensorRT.
        """
        numbers = held.const
        if self.dialect == "tensorrt" or numbers is None or numbers.numel() < _FEW or numbers.dtype != torch.float32:
            return None
        if held.exact or self.compute != torch.float32 or not torch.equal(numbers.half().float(), numbers):
            return None
        half = Held(held.shape, torch.float16, const=numbers.half(), name=held.name, exact=True)
        return self.cast(self.pinned(half), torch.float32)

    def ints(self, *values: int) -> Held:
        return self.constant(list(values), torch.int64)

    def scalar(self, value: float, like: Held) -> Held:
        return self.constant(value, like.dtype)

    def packed(self, array: Callable[[], np.ndarray[Any, Any]], onnx_type: str, shape: Sequence[int], name: str) -> Held:
        """An initializer of an element type that numpy has not (INT4, FLOAT8), or one whose bytes are made while writing."""
        name = self.unique(name)
        kind, sizes = getattr(self.ir.DataType, onnx_type), self.ir.Shape(shape)
        form: Any = self.ir.PackedTensor if onnx_type.endswith(("INT4", "INT2")) else self.ir.Tensor

        def made() -> Any:
            return form(array(), dtype=kind, shape=sizes, name=name)

        tensor = self.ir.LazyTensor(made, dtype=kind, shape=sizes, name=name)
        value = self.ir.Value(name=name, shape=self.ir.Shape(shape), type=self.ir.TensorType(kind), const_value=tensor)
        self.initializers[name] = value
        return Held(tuple(shape), torch.uint8 if onnx_type.startswith("U") else torch.int8, value=value, name=name)

    def _initializer(self, held: Held) -> ir.Value:
        tensor = held.const
        assert tensor is not None
        if held.name.endswith(".activation.factor") and (half := self.halved(held)) is not None:
            return self.of(half)
        held.dtype = held.dtype if held.exact else self.narrow(held.dtype)
        small = tensor.nbytes <= _SHARED_BYTES
        origin, tensor = tensor, _cast(tensor, held.dtype)
        identity = _array(tensor).tobytes() if small else (origin.data_ptr(), tuple(origin.stride()))
        key = (identity, tensor.dtype, tuple(tensor.shape))
        if key not in self._constants:
            name = self.unique(held.name or f"{self.path or 'model'}/constant")
            self._constants[key] = self._tensor(name, tensor)
        return self._constants[key]

    def _tensor(self, name: str, tensor: Tensor) -> ir.Value:
        ir = self.ir
        kind = self.kind(tensor.dtype)
        shape = ir.Shape(tuple(tensor.shape))
        data = tensor.detach()
        if data.is_contiguous():
            made: Any = ir.Tensor(_array(data), dtype=kind, shape=shape, name=name)
        else:

            def laid_out(data: Tensor = data) -> Any:
                return ir.Tensor(_array(data.contiguous()), dtype=kind, shape=shape, name=name)

            made = ir.LazyTensor(laid_out, dtype=kind, shape=shape, name=name)
        value = ir.Value(name=name, shape=shape, type=ir.TensorType(kind), const_value=made)
        self.initializers[name] = value
        return value

    def _range(self, held: Held) -> Held:
        assert held.iota is not None
        size = self.squeeze(self.size(held.shape[held.iota]))
        zero, one = self.constant(0, torch.int64), self.constant(1, torch.int64)
        made = self.op("Range", zero, size, one, shape=(held.shape[held.iota],), dtype=torch.int64)
        made = self.cast(made, held.dtype)
        return self.reshape(made, held.shape)

    # -- nodes ------------------------------------------------------------------------------------------------------

    def op(
        self, kind: str, *inputs: Held | None, shape: Sequence[Dim] | None = None, dtype: torch.dtype | None = None,
        domain: str = "", name: str = "", **attributes: Any,
    ) -> Held:  # fmt: skip
        """Adds a node with one output; shape and dtype default to those of the traced node."""
        return self.ops(kind, *inputs, outputs=[(shape, dtype)], domain=domain, name=name, **attributes)[0]

    def ops(
        self, kind: str, *inputs: Held | None, outputs: Sequence[tuple[Sequence[Dim] | None, torch.dtype | None]],
        domain: str = "", name: str = "", **attributes: Any,
    ) -> list[Held]:  # fmt: skip
        """Adds a node, or returns the outputs of an equal one."""
        values = [None if item is None else self.of(item) for item in inputs]
        while values and values[-1] is None:
            values.pop()
        key = (kind, domain, tuple(id(value) for value in values), repr(sorted(attributes.items())), len(outputs))
        if key in self._made:
            return self._made[key]
        ir = self.ir
        label = self.unique(f"{self.path}/{name or kind}" if self.path else name or kind)
        node = ir.Node(domain, kind, values, ir.convenience.convert_attributes(attributes), num_outputs=len(outputs), name=label)
        for index, output in enumerate(node.outputs):
            output.name = label if len(outputs) == 1 else f"{label}.{index}"
        self.nodes.append(node)
        self.domains.add(domain)
        held = []
        for value, (shape, dtype) in zip(node.outputs, outputs, strict=True):
            actual = tuple(self._traced().shape if shape is None else shape)
            made = dtype or self.narrow(self._traced().dtype)
            held.append(Held(tuple(dim(size) for size in actual), made, value=value))
        self._made[key] = held
        return held

    def _traced(self) -> Any:
        assert self.node is not None
        value = self.node.meta.get("val")
        return value[0] if isinstance(value, (tuple, list)) else value

    @property
    def shape(self) -> tuple[Dim, ...]:
        """The traced shape of the current node's (first) output."""
        return tuple(dim(size) for size in self._traced().shape)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in the file of the current node's (first) output."""
        return self.narrow(self._traced().dtype)

    def cast(self, held: Held, dtype: torch.dtype) -> Held:
        if held.dtype == dtype:
            return held
        if held.const is not None:
            return Held(held.shape, dtype, const=_cast(held.const, dtype), name=held.name, exact=True)
        if held.iota is not None and not dtype.is_floating_point and dtype != torch.bool:
            return Held(held.shape, dtype, iota=held.iota)
        return self.op("Cast", held, shape=held.shape, dtype=dtype, to=int(self.kind(dtype)))

    # -- shapes -----------------------------------------------------------------------------------------------------

    def size(self, expression: Dim) -> Held:
        """A size as an int64 tensor of one element; expressions are computed from the shapes of the inputs."""
        import sympy  # type: ignore[import-untyped]

        if isinstance(expression, int):
            return self.ints(expression)
        if isinstance(expression, sympy.Symbol):
            if expression not in self.symbols:
                raise self.refuse(f"the size {expression} depends on the values of a tensor", "Write the model without it.")
            held, axis, _ = self.symbols[expression]
            return self.op("Shape", held, shape=(1,), dtype=torch.int64, start=axis, end=axis + 1)
        kind = type(expression).__name__
        arguments = [dim(argument) for argument in expression.args]
        if kind == "Pow" and arguments[1] == -1:
            raise self.refuse(f"cannot write the size {expression}", "Make the dimension fixed.")
        if kind == "Pow":
            return self._chain("Mul", [arguments[0]] * arguments[1])
        table = {"Add": "Add", "Mul": "Mul", "FloorDiv": "Div", "CleanDiv": "Div", "Mod": "Mod", "PythonMod": "Mod",
                 "Max": "Max", "Min": "Min"}  # fmt: skip
        if kind not in table:
            raise self.refuse(f"cannot write the size {expression} ({kind})", "Make the dimension fixed.")
        return self._chain(table[kind], arguments)

    def _chain(self, kind: str, arguments: Sequence[Dim]) -> Held:
        total = self.size(arguments[0])
        for argument in arguments[1:]:
            total = self.op(kind, total, self.size(argument), shape=(1,), dtype=torch.int64)
        return total

    def sizes(self, shape: Sequence[Dim]) -> Held:
        """A shape as an int64 tensor."""
        if all(isinstance(size, int) for size in shape):
            return self.ints(*shape)
        return self.op("Concat", *(self.size(size) for size in shape), shape=(len(shape),), dtype=torch.int64, axis=0)

    def reshape(self, held: Held, shape: Sequence[Dim]) -> Held:
        """``held`` in another shape; a chain of reshapes becomes one."""
        shape = tuple(dim(size) for size in shape)
        if shape == held.shape:
            return held
        if held.const is not None:
            return Held(shape, held.dtype, const=held.const.reshape(shape), name=held.name)
        if (before := self._source(held, "Reshape")) is not None:
            return self.reshape(before, shape)
        made = self.op("Reshape", held, self._target(held, shape), shape=shape, dtype=held.dtype)
        made.source = held
        return made

    def _target(self, held: Held, shape: tuple[Dim, ...]) -> Held:
        """The second input of Reshape: 0 copies a size, -1 takes the rest; sizes are computed only where that fails."""
        unknown = [axis for axis, size in enumerate(shape) if not isinstance(size, int)]
        if len(unknown) <= 1:
            return self.ints(*(size if isinstance(size, int) else -1 for size in shape))
        copied = [axis for axis in unknown if axis < held.rank and held.shape[axis] == shape[axis]]
        rest = [axis for axis in unknown if axis not in copied]
        if len(rest) <= 1:
            return self.ints(*(0 if axis in copied else -1 if axis in rest else shape[axis] for axis in range(len(shape))))
        return self.sizes(shape)

    def _source(self, held: Held, kind: str) -> Held | None:
        """What ``held`` was made from, where a node of this kind made it."""
        node = held.value.producer() if held.value is not None else None
        return held.source if node is not None and node.op_type == kind else None

    def transpose(self, held: Held, order: Sequence[int]) -> Held:
        """A permutation; two in a row become one, and one that moves only axes of size 1 becomes a reshape."""
        order = [axis_of(axis, held.rank) for axis in order]
        if order == list(range(held.rank)):
            return held
        shape = tuple(held.shape[axis] for axis in order)
        if held.const is not None and held.rank == 2 and held.const.data_ptr() in self.tables:
            return self.op("Transpose", self.pinned(held), shape=shape, dtype=held.dtype, perm=list(order))
        if held.const is not None:
            return Held(shape, held.dtype, const=held.const.permute(order), name=held.name)
        if held.iota is not None:
            return Held(shape, held.dtype, iota=order.index(held.iota))
        if held.carried is not None and held.rank == 2:
            return Held(shape, held.dtype, carried=held.carried, flipped=not held.flipped)
        moved = [axis for axis in order if held.shape[axis] != 1]
        if moved == sorted(moved):
            return self.reshape(held, shape)
        if (before := self._source(held, "Transpose")) is not None:
            first = self.of(held).producer().attributes["perm"].as_ints()
            return self.transpose(before, [first[axis] for axis in order])
        made = self.op("Transpose", held, shape=shape, dtype=held.dtype, perm=list(order))
        made.source = held
        return made

    def squeeze(self, held: Held) -> Held:
        """One element as a zero-dimensional tensor."""
        return self.reshape(held, ())

    def full(self, held: Held, shape: Sequence[Dim] | None = None) -> Held:
        """``held`` with its traced shape written out (Expand) where it was left to broadcasting."""
        shape = self.shape if shape is None else tuple(shape)
        if held.shape == shape:
            return held
        if held.const is not None and all(isinstance(size, int) for size in shape):
            return Held(shape, held.dtype, const=held.const.expand(shape), name=held.name)
        return self.op("Expand", held, self.sizes(shape), shape=shape, dtype=held.dtype)

    def codes_storage(self, carried: Carried) -> str:
        """How ``export.onnx_carried`` stores codes of fewer than 8 bits for a DequantizeLinear."""
        native = (
            self.dialect == "tensorrt" or (carried.bits == 4 and self.opset >= 21) or (carried.bits == 2 and self.opset >= 25)
        )
        return "native" if native else "bits"


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast; float16 takes values beyond its range to its largest."""
    if dtype == torch.float16 and tensor.dtype.is_floating_point:
        return tensor.clamp(-30000.0, 30000.0).to(dtype) if bool((tensor.abs() > 65504).any()) else tensor.to(dtype)
    return tensor.to(dtype)


def _array(tensor: Tensor) -> np.ndarray[Any, Any]:
    """The numbers for numpy, which has no bfloat16: there its bits."""
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
