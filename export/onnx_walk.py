"""Walks a traced program node by node and has each lowered; what is known before the file runs is folded on the way."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from calibrate.signature import Signature, raw_path
from export.onnx_lowering import LOWERINGS, WIDE, Lowering
from export.onnx_values import Dim, Held, dim

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["Walk", "functional"]

_FOLD_BYTES = 1 << 20
_FRESH = {"conv2d", "conv1d", "convolution", "batch_norm", "linear", "add", "mul", "sub", "div", "matmul", "bmm", "addmm",
          "embedding", "layer_norm", "relu_", "hardswish_", "silu_", "add_", "mul_", "div_"}  # fmt: skip
"""Operations whose result has memory of its own."""
_VIEWS = {"view", "reshape", "t", "transpose", "permute", "unsqueeze", "squeeze", "detach", "alias", "contiguous", "slice",
          "select", "numpy_T", "expand", "to", "dropout", "lift_fresh_copy", "flatten"}  # fmt: skip


@dataclass
class Walk:
    """One program on its way into an ONNX model; ``run`` goes it.

    Attributes:
        into: takes the nodes.
        env: what each traced node has become.
    """

    into: Lowering
    program: ExportedProgram
    signature: Signature
    env: dict[fx.Node, Any] = field(default_factory=dict)

    def run(self, output_name: str) -> ir.Model:
        """The ONNX model of the program; its one output is called ``output_name``."""
        ir = self.into.ir
        self._placeholders()
        self._tables()
        results = self._walk(self.program.graph)
        result = self._result(results)
        value = self.into.of(self._whole(result, self._output_node))
        value = self._named_output(value, result, output_name)
        used = self._live(value)
        nodes = [node for node in self.into.nodes if node in used]
        needed = {id(item) for node in nodes for item in node.inputs if item is not None} | {id(value)}
        initializers = [item for item in self.into.initializers.values() if id(item) in needed]
        imports = {"": self.into.opset} | {
            name: 1 for name in sorted(self.into.domains) if name and any(n.domain == name for n in nodes)
        }
        graph = ir.Graph(self.into.inputs, [value], nodes=nodes, initializers=initializers, opset_imports=imports, name="model")
        return ir.Model(graph, ir_version=_ir_version(self.into.opset))

    def _result(self, results: Any) -> Held:
        while isinstance(results, (list, tuple)):
            results = results[0]
        assert isinstance(results, Held)
        return results

    def _named_output(self, value: ir.Value, held: Held, name: str) -> ir.Value:
        traced = self._output_node.meta["val"]
        if value.producer() is None or held.dtype != traced.dtype:
            kind = int(self.into.kind(traced.dtype))
            attributes = {"to": kind} if held.dtype != traced.dtype else {}
            given = self.into.ir.convenience.convert_attributes(attributes)
            node = self.into.ir.Node("", "Cast" if attributes else "Identity", [value], given, num_outputs=1, name="output")
            self.into.nodes.append(node)
            value = node.outputs[0]
        value.name = name
        value.shape, value.type = self._annotation(traced)
        return value

    def _annotation(self, traced: Tensor) -> tuple[Any, Any]:
        shape = self.into.ir.Shape([self._dim_name(dim(size)) for size in traced.shape])
        return shape, self.into.ir.TensorType(self.into.kind(traced.dtype))

    def _dim_name(self, size: Dim) -> int | str:
        if isinstance(size, int):
            return size
        return self.into.symbols[size][2] if size in self.into.symbols else str(size)

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
            if not isinstance(expression, int) and expression not in self.into.symbols:
                label = spec.shape[axis] if spec is not None and isinstance(spec.shape[axis], str) else str(expression)
                self.into.symbols[expression] = (None, axis, label)  # type: ignore[assignment]
        shape, kind = self._annotation(traced)
        value = self.into.ir.Value(name=self.into.unique(node.name), shape=shape, type=kind)
        self.into.inputs.append(value)
        held = Held(tuple(dim(size) for size in traced.shape), traced.dtype, value=value)
        for axis, size in enumerate(held.shape):
            if not isinstance(size, int) and self.into.symbols[size][0] is None:
                self.into.symbols[size] = (held, axis, self.into.symbols[size][2])
        return self.into.cast(held, self.into.narrow(traced.dtype)) if traced.dtype.is_floating_point else held

    def _walk(self, graph: fx.Graph) -> Any:
        """Lowers every node that is used; returns the graph's result."""
        for node in graph.nodes:
            if node.op == "call_function":
                self.into.enter(node)
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
            raise self.into.refuse(f"{name} computes complex numbers, which ONNX runtimes do not", "Use a model without them.")
        arguments = [self._resolve(argument) for argument in node.args]
        keywords = {key: self._resolve(argument) for key, argument in node.kwargs.items()}
        folded = self._fold(node, arguments, keywords)
        name = functional(node)
        if folded is None:
            if name not in LOWERINGS:
                raise self.into.refuse(f"{name} has no ONNX form here", "Replace the operation, or ask for it to be added.")
            if self.into.compute == torch.float16 and name not in WIDE:
                arguments = [self._narrowed(argument) for argument in arguments]
            folded = LOWERINGS[name](self.into, *arguments, **keywords)
        self.env[node] = folded

    def _narrowed(self, argument: Any) -> Any:
        if isinstance(argument, Held) and argument.const is None and argument.carried is None:
            return self.into.cast(argument, self.into.narrow(argument.dtype))
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
        return self.into.full(held, tuple(dim(size) for size in traced.shape)) if isinstance(traced, Tensor) else held

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
        name = tensors[0].name if op in _VIEWS and tensors else f"{self.into.path}/{node.name}"
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
                self.into.tables.add(held.const.data_ptr())


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
    import sympy  # type: ignore[import-untyped]

    return all(_static(item) if isinstance(item, (list, tuple)) else not isinstance(item, sympy.Basic) for item in arguments)


def _has_tensor(value: Any) -> bool:
    return isinstance(value, Tensor) or (isinstance(value, (list, tuple)) and any(_has_tensor(item) for item in value))


def _ir_version(opset: int) -> int:
    """The oldest IR version that may carry the opset, so that older runtimes open the file."""
    return 8 if opset <= 18 else 9 if opset <= 20 else 10 if opset <= 22 else 11 if opset <= 23 else 12 if opset <= 24 else 13
