"""Walks a traced graph and writes ONNX nodes: values, constants, shapes and names. The ops themselves are in ``onnx_ops*``.

Nothing here rewrites after the fact: constants are folded by running the torch op, equal nodes are made once, chains of
transposes and reshapes become one, and an ``expand`` is only written where its reader cannot broadcast.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from calibrate.errors import UserError
from calibrate.signature import Signature, raw_path

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["LOWERINGS", "WIDE", "Carried", "Dialect", "Dim", "Held", "Lowering", "axis_of", "dim", "functional", "lowers"]

Lowered = TypeVar("Lowered", bound=Callable[..., Any])
Dialect = Literal["onnxruntime", "portable", "tensorrt"]
Dim = Any
"""A size: an ``int``, or a sympy expression over the dynamic dimensions."""

LOWERINGS: dict[str, Callable[..., Any]] = {}
"""ATen overload ("aten.linear.default") -> function(lowering, *args, **kwargs) that returns ``Held`` or a list of them."""

WIDE: set[str] = set()
"""Overloads whose lowering takes float32 values in a float16 graph (sums of squares, which would overflow)."""

_FOLD_BYTES = 1 << 20
_SHARED_BYTES = 4096
_ONNX_TYPES = {
    torch.float32: "FLOAT", torch.float64: "DOUBLE", torch.float16: "FLOAT16", torch.bfloat16: "BFLOAT16", torch.int64: "INT64",
    torch.int32: "INT32", torch.int16: "INT16", torch.int8: "INT8", torch.uint8: "UINT8", torch.bool: "BOOL",
}  # fmt: skip
_FRESH = {"conv2d", "conv1d", "convolution", "batch_norm", "linear", "add", "mul", "sub", "div", "matmul", "bmm", "addmm",
          "embedding", "layer_norm", "relu_", "hardswish_", "silu_", "add_", "mul_", "div_"}  # fmt: skip
"""Operations whose result has memory of its own."""
_VIEWS = {"view", "reshape", "t", "transpose", "permute", "unsqueeze", "squeeze", "detach", "alias", "contiguous", "slice",
          "select", "numpy_T", "expand", "to", "dropout", "lift_fresh_copy", "flatten"}  # fmt: skip


def lowers(*names: str) -> Callable[[Lowered], Lowered]:
    """Registers a lowering for ATen overloads; ``name`` alone stands for ``name.default``."""

    def register(function: Lowered) -> Lowered:
        for name in names:
            package, _, op = name.rpartition("::")
            op = op if "." in op else f"{op}.default"
            LOWERINGS[f"{package or 'aten'}.{op}"] = function
        return function

    return register


@dataclass(frozen=True)
class Carried:
    """A weight that is stored as integer codes; ``path`` is the site (module path in the user's model)."""

    path: str
    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    bits: int
    shape: tuple[int, ...]

    @property
    def groups(self) -> int:
        return 1 if self.scale.numel() == 1 else self.scale.shape[1]

    @property
    def per_tensor(self) -> bool:
        return self.scale.numel() == 1

    @property
    def matrix(self) -> tuple[int, int]:
        return self.shape[0], int(np.prod(self.shape[1:], dtype=np.int64))


@dataclass(eq=False)
class Held:
    """A tensor during lowering: a value of the ONNX graph, a known constant, a carried weight or a counting range.

    ``shape`` is the shape that the value has in the file; where it is smaller than the traced one, readers broadcast.
    ``source`` is what a Transpose or Reshape was made from; ``exact`` keeps a constant's dtype in a float16 graph.
    ``flipped``: a carried weight [O, I] that the graph has turned to [I, O]. ``quantized``: codes, scale and zero point of
    a value that is their DequantizeLinear; ``dynamic``: the same, with the DequantizeLinear not yet written.
    """

    shape: tuple[Dim, ...]
    dtype: torch.dtype
    value: ir.Value | None = None
    const: Tensor | None = None
    name: str = ""
    carried: Carried | None = None
    iota: int | None = None
    source: Held | None = None
    exact: bool = False
    flipped: bool = False
    quantized: tuple[Held, Held, Held] | None = None
    dynamic: tuple[Held, Held, Held] | None = None

    @property
    def rank(self) -> int:
        return len(self.shape)


def axis_of(axis: int, rank: int) -> int:
    return axis + rank if axis < 0 else axis


def dim(size: Any) -> Dim:
    """An ``int`` where the size is known, else its sympy expression."""
    if isinstance(size, torch.SymInt):
        size = size.node.expr
    return int(size) if isinstance(size, int) or getattr(size, "is_Integer", False) else size


@dataclass
class Lowering:
    """The state of one lowering; ``op`` adds a node, ``run`` walks the program.

    Attributes:
        compute: what float32 of the trace becomes (float16 for TensorRT by default).
        codes: site -> where and how its codes lie in the file (``export.onnx_file``).
        notes: plain sentences for the report.
    """

    program: ExportedProgram
    signature: Signature
    dialect: Dialect
    opset: int
    compute: torch.dtype = torch.float32
    codes: dict[str, dict[str, Any]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        import onnx_ir as ir

        self.ir = ir
        self.env: dict[fx.Node, Any] = {}
        self.nodes: list[ir.Node] = []
        self.initializers: dict[str, ir.Value] = {}
        self.node: fx.Node | None = None
        self.symbols: dict[Any, tuple[Held, int, str]] = {}
        self.inputs: list[ir.Value] = []
        self._names: dict[str, int] = {}
        self._made: dict[Any, list[Held]] = {}
        self._constants: dict[Any, ir.Value] = {}
        self._domains: set[str] = set()
        self.shared: dict[Any, Held] = {}
        self.tables: set[int] = set()

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
        return self.compute if dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16) else dtype

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

    def ints(self, *values: int) -> Held:
        return self.constant(list(values), torch.int64)

    def scalar(self, value: float, like: Held) -> Held:
        return self.constant(value, like.dtype)

    def packed(self, array: Callable[[], np.ndarray[Any, Any]], onnx_type: str, shape: Sequence[int], name: str) -> Held:
        """An initializer of an element type that torch does not have (INT4), or one whose bytes are made while writing."""
        name = self.unique(name)
        kind, sizes = getattr(self.ir.DataType, onnx_type), self.ir.Shape(shape)
        form: Any = self.ir.Tensor if onnx_type == "UINT8" else self.ir.PackedTensor

        def made() -> Any:
            return form(array(), dtype=kind, shape=sizes, name=name)

        tensor = self.ir.LazyTensor(made, dtype=kind, shape=sizes, name=name)
        value = self.ir.Value(name=name, shape=self.ir.Shape(shape), type=self.ir.TensorType(kind), const_value=tensor)
        self.initializers[name] = value
        return Held(tuple(shape), torch.uint8 if onnx_type.startswith("U") else torch.int8, value=value, name=name)

    def _initializer(self, held: Held) -> ir.Value:
        tensor = held.const
        assert tensor is not None
        held.dtype = held.dtype if held.exact else self.narrow(held.dtype)
        small = tensor.nbytes <= _SHARED_BYTES
        origin, tensor = tensor, _cast(tensor, held.dtype)
        identity = tensor.numpy().tobytes() if small else (origin.data_ptr(), tuple(origin.stride()))
        key = (identity, tensor.dtype, tuple(tensor.shape))
        if key not in self._constants:
            name = self.unique(held.name or f"{self.path or 'model'}/constant")
            self._constants[key] = self._tensor(name, tensor)
        return self._constants[key]

    def _tensor(self, name: str, tensor: Tensor) -> ir.Value:
        ir = self.ir
        kind = getattr(ir.DataType, _ONNX_TYPES[tensor.dtype])
        shape = ir.Shape(tuple(tensor.shape))
        data = tensor.detach()
        if data.is_contiguous():
            made: Any = ir.Tensor(data.numpy(), dtype=kind, shape=shape, name=name)
        else:

            def laid_out(data: Tensor = data) -> Any:
                return ir.Tensor(data.contiguous().numpy(), dtype=kind, shape=shape, name=name)

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
        self._domains.add(domain)
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
        return self.op("Cast", held, shape=held.shape, dtype=dtype, to=int(getattr(self.ir.DataType, _ONNX_TYPES[dtype])))

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

    # -- the walk ---------------------------------------------------------------------------------------------------

    def run(self, output_name: str) -> ir.Model:
        """The ONNX model of the program; its one output is called ``output_name``."""
        ir = self.ir
        self._placeholders()
        self._tables()
        results = self._walk(self.program.graph)
        result = self._result(results)
        value = self.of(self._whole(result, self._output_node))
        value = self._named_output(value, result, output_name)
        used = self._live(value)
        nodes = [node for node in self.nodes if node in used]
        needed = {id(item) for node in nodes for item in node.inputs if item is not None} | {id(value)}
        initializers = [item for item in self.initializers.values() if id(item) in needed]
        imports = {"": self.opset} | {name: 1 for name in sorted(self._domains) if name and any(n.domain == name for n in nodes)}
        graph = ir.Graph(self.inputs, [value], nodes=nodes, initializers=initializers, opset_imports=imports, name="model")
        return ir.Model(graph, ir_version=_ir_version(self.opset))

    def _result(self, results: Any) -> Held:
        while isinstance(results, (list, tuple)):
            results = results[0]
        assert isinstance(results, Held)
        return results

    def _named_output(self, value: ir.Value, held: Held, name: str) -> ir.Value:
        traced = self._output_node.meta["val"]
        if value.producer() is None or held.dtype != traced.dtype:
            kind = int(getattr(self.ir.DataType, _ONNX_TYPES[traced.dtype]))
            attributes = {"to": kind} if held.dtype != traced.dtype else {}
            node = self.ir.Node("", "Cast" if attributes else "Identity", [value],
                                self.ir.convenience.convert_attributes(attributes), num_outputs=1, name="output")  # fmt: skip
            self.nodes.append(node)
            value = node.outputs[0]
        value.name = name
        value.shape, value.type = self._annotation(traced)
        return value

    def _annotation(self, traced: Tensor) -> tuple[Any, Any]:
        shape = self.ir.Shape([self._dim_name(dim(size)) for size in traced.shape])
        return shape, self.ir.TensorType(getattr(self.ir.DataType, _ONNX_TYPES[traced.dtype]))

    def _dim_name(self, size: Dim) -> int | str:
        if isinstance(size, int):
            return size
        return self.symbols[size][2] if size in self.symbols else str(size)

    def _live(self, output: ir.Value) -> set[Any]:
        """Nodes that the output depends on."""
        found: set[Any] = set()
        waiting = [output.producer()]
        while waiting:
            node = waiting.pop()
            if node is None or node in found:
                continue
            found.add(node)
            waiting.extend(item.producer() for item in node.inputs if item is not None)
        return found

    def _placeholders(self) -> None:
        state = {**self.program.state_dict, **self.program.constants}
        nodes = {node.name: node for node in self.program.graph.nodes if node.op == "placeholder"}
        specs = {spec.name: spec for spec in self.signature.inputs}
        for item in self.program.graph_signature.input_specs:
            node = nodes[item.arg.name]
            if item.kind is InputKind.USER_INPUT:
                if isinstance(node.meta.get("val"), Tensor):
                    self.env[node] = self._input(node, specs.get(node.name))
                continue
            tensor = state[item.target] if item.target in state else self.program.constants[item.target or ""]
            data = tensor.detach()
            self.env[node] = Held(tuple(data.shape), data.dtype, const=data, name=raw_path(item.target or node.name))

    def _input(self, node: fx.Node, spec: Any) -> Held:
        traced = node.meta["val"]
        for axis, size in enumerate(traced.shape):
            expression = dim(size)
            if not isinstance(expression, int) and expression not in self.symbols:
                label = spec.shape[axis] if spec is not None and isinstance(spec.shape[axis], str) else str(expression)
                self.symbols[expression] = (None, axis, label)  # type: ignore[assignment]
        shape, kind = self._annotation(traced)
        value = self.ir.Value(name=self.unique(node.name), shape=shape, type=kind)
        self.inputs.append(value)
        held = Held(tuple(dim(size) for size in traced.shape), traced.dtype, value=value)
        for axis, size in enumerate(held.shape):
            if not isinstance(size, int) and self.symbols[size][0] is None:
                self.symbols[size] = (held, axis, self.symbols[size][2])
        return self.cast(held, self.narrow(traced.dtype)) if traced.dtype.is_floating_point else held

    def _walk(self, graph: fx.Graph) -> Any:
        """Lowers every node that is used; returns the graph's result."""
        for node in graph.nodes:
            if node.op == "call_function":
                self.node = node
                self._call(node)
            elif node.op == "output":
                found: list[fx.Node] = []
                fx.node.map_arg(node.args[0], found.append)
                self._output_node = found[0]
                return fx.node.map_arg(node.args[0], lambda item: self._whole(self.env[item], item))
        return None

    def _call(self, node: fx.Node) -> None:
        name = str(node.target)
        if name in ("wrap_with_set_grad_enabled", "wrap_with_autocast"):
            self.env[node] = self._inline(node)
            return
        if node.target is operator.getitem:
            source: Any = node.args[0]
            self.env[node] = self.env[source][node.args[1]]
            return
        if name.startswith(("aten._assert", "aten.sym_", "aten._check")) or not _has_tensor(node.meta.get("val")):
            return
        if _complex(node.meta["val"]):
            raise self.refuse(f"{name} computes complex numbers, which ONNX runtimes do not", "Use a model without them.")
        arguments = [self._resolve(argument) for argument in node.args]
        keywords = {key: self._resolve(argument) for key, argument in node.kwargs.items()}
        folded = self._fold(node, arguments, keywords)
        name = functional(node)
        if folded is None:
            if name not in LOWERINGS:
                raise self.refuse(f"{name} has no ONNX form here", "Replace the operation, or ask for it to be added.")
            if self.compute == torch.float16 and name not in WIDE:
                arguments = [self._narrowed(argument) for argument in arguments]
            folded = LOWERINGS[name](self, *arguments, **keywords)
        self.env[node] = folded

    def _narrowed(self, argument: Any) -> Any:
        if isinstance(argument, Held) and argument.const is None and argument.carried is None:
            return self.cast(argument, self.narrow(argument.dtype))
        return [self._narrowed(item) for item in argument] if isinstance(argument, list) else argument

    def _inline(self, node: fx.Node) -> Any:
        """A traced ``no_grad`` or ``autocast`` region: its graph is walked in place."""
        at = next(
            index for index, argument in enumerate(node.args) if isinstance(argument, fx.Node) and argument.op == "get_attr"
        )
        graph = getattr(node.graph.owning_module, str(node.args[at].target)).graph  # type: ignore[union-attr]
        places = [item for item in graph.nodes if item.op == "placeholder"]
        for place, argument in zip(places, node.args[at + 1 :], strict=True):
            if isinstance(argument, fx.Node) and argument in self.env:
                self.env[place] = self.env[argument]
        return self._walk(graph)

    def _resolve(self, argument: Any) -> Any:
        if isinstance(argument, fx.Node):
            if argument in self.env:
                return self.env[argument]
            value = argument.meta.get("val")
            if isinstance(value, (torch.SymFloat, torch.SymBool)):
                expression = value.node.expr
                return float(expression) if expression.is_number else expression
            return dim(value) if isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool) else value
        if isinstance(argument, (list, tuple)):
            return [self._resolve(item) for item in argument]
        return dim(argument) if isinstance(argument, torch.SymInt) else argument

    def _whole(self, held: Any, node: fx.Node) -> Any:
        if not isinstance(held, Held):
            return held
        traced = node.meta["val"]
        return self.full(held, tuple(dim(size) for size in traced.shape)) if isinstance(traced, Tensor) else held

    def _fold(self, node: fx.Node, arguments: Sequence[Any], keywords: Mapping[str, Any]) -> Any:
        """The result as a constant, by running the torch op, where every input is known and the result is not large."""
        tensors = list(_tensors([*arguments, *keywords.values()]))
        if str(node.target).startswith("compress.") or any(item.const is None for item in tensors):
            return None
        if not _static([*arguments, *keywords.values()]):
            return None
        traced = node.meta["val"]
        values = [item for item in (traced if isinstance(traced, (list, tuple)) else [traced]) if isinstance(item, Tensor)]
        if not all(isinstance(dim(size), int) for item in values for size in item.shape):
            return None
        op = str(node.target).split(".")[1]
        given = sum(item.const.nbytes for item in tensors if item.const is not None)
        made = sum(item.numel() * item.element_size() for item in values)
        if op not in _VIEWS and made > max(_FOLD_BYTES, given):
            return None
        with torch.no_grad():
            given_values: Any = fx.node.map_arg(node.args, self._known)
            options: Any = fx.node.map_arg(node.kwargs, self._known)
            if op.endswith("_"):
                given_values = (given_values[0].clone(), *given_values[1:])
            result = node.target(*given_values, **{key: item for key, item in options.items() if key != "device"})  # type: ignore[operator]
        name = tensors[0].name if op in _VIEWS and tensors else f"{self.path}/{node.name}"
        if isinstance(result, (list, tuple)):
            return [Held(tuple(item.shape), item.dtype, const=item, name=name) for item in result]
        return Held(tuple(result.shape), result.dtype, const=result, name=name)

    def _known(self, node: fx.Node) -> Any:
        """The constant that a node stands for, in its traced shape."""
        if node not in self.env:
            return self._resolve(node)
        held, traced = self.env[node], node.meta["val"]
        return held.const.expand(traced.shape).to(traced.dtype)

    def _tables(self) -> None:
        """Finds codes and weights that are read as a table: they keep their [V, C] layout in the file, also where a product
        reads them too (a tied head)."""
        places = {"compress.embedding.default": 1, "aten.embedding.default": 0}
        for node in self.program.graph.nodes:
            place = places.get(str(node.target))
            if place is not None and (held := self.env.get(node.args[place])) is not None and held.const is not None:
                self.tables.add(held.const.data_ptr())

    def codes_storage(self, carried: Carried) -> str:
        """How ``export.onnx_carried`` stores codes of fewer than 8 bits for a DequantizeLinear."""
        native = self.dialect == "tensorrt" or (carried.bits == 4 and self.opset >= 21) or self.opset >= 25
        return "native" if native else "bits"


def _complex(value: Any) -> bool:
    items = value if isinstance(value, (list, tuple)) else [value]
    return any(isinstance(item, Tensor) and item.is_complex() for item in items)


def functional(node: fx.Node) -> str:
    """The overload's name, without the underscore of an in-place operation whose input nobody else can see: the result of
    an operation that is not a view, read only here. Other in-place operations keep their name, and have no lowering."""
    name = str(node.target)
    package, _, rest = name.partition(".")
    op, _, overload = rest.partition(".")
    if not op.endswith("_") or op.startswith("_") or not node.args or not isinstance(node.args[0], fx.Node):
        return name
    given = node.args[0]
    produced = str(given.target).split(".")[1] if "." in str(given.target) else ""
    if given.op == "call_function" and len(given.users) == 1 and produced in _FRESH:
        return f"{package}.{op[:-1]}.{overload}"
    return name


def _tensors(arguments: Iterable[Any]) -> Iterable[Held]:
    for argument in arguments:
        if isinstance(argument, Held):
            yield argument
        elif isinstance(argument, (list, tuple)):
            yield from _tensors(argument)


def _static(arguments: Iterable[Any]) -> bool:
    import sympy

    return all(_static(item) if isinstance(item, (list, tuple)) else not isinstance(item, sympy.Basic) for item in arguments)


def _has_tensor(value: Any) -> bool:
    return isinstance(value, Tensor) or (isinstance(value, (list, tuple)) and any(_has_tensor(item) for item in value))


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast; float16 takes values beyond its range to its largest."""
    if dtype == torch.float16 and tensor.dtype.is_floating_point:
        return tensor.clamp(-30000.0, 30000.0).to(dtype) if bool((tensor.abs() > 65504).any()) else tensor.to(dtype)
    return tensor.to(dtype)


def _ir_version(opset: int) -> int:
    """The oldest IR version that may carry the opset, so that older runtimes open the file."""
    return 8 if opset <= 18 else 9 if opset <= 20 else 10 if opset <= 22 else 11 if opset <= 23 else 12 if opset <= 24 else 13
