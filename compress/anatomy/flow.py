"""A traced graph made walkable: what each value is made from, in which module, and which weight an operation carries."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from calibrate.signature import raw_path

__all__ = ["Flow", "Step", "Weight", "members"]

LAYOUT = frozenset(
    {
        "view",
        "reshape",
        "_unsafe_view",
        "permute",
        "transpose",
        "t",
        "mT",
        "numpy_T",
        "contiguous",
        "clone",
        "to",
        "_to_copy",
        "type_as",
        "slice",
        "select",
        "split",
        "split_with_sizes",
        "chunk",
        "unbind",
        "getitem",
        "squeeze",
        "unsqueeze",
        "expand",
        "expand_as",
        "repeat",
        "flatten",
        "unflatten",
        "alias",
        "detach",
        "lift",
        "lift_fresh_copy",
        "roll",
        "flip",
        "dropout",
        "feature_dropout",
        "cat",
        "concat",
        "stack",
        "pad",
        "constant_pad_nd",
        "index",
        "narrow",
        "movedim",
        "moveaxis",
        "swapaxes",
        "native_dropout",
        "float",
        "dequantize",
        "quantize_dequantize",
        "quantize_dequantize_dynamic",
        "im2col",
        "col2im",
        "avg_pool2d",
        "max_pool2d",
        "adaptive_avg_pool2d",
    }
)
"""Operations that move, copy or pick values (or average neighbours); what they give is still the same hidden state."""

NORMS = frozenset(
    {
        "layer_norm",
        "native_layer_norm",
        "batch_norm",
        "_native_batch_norm_legit",
        "_native_batch_norm_legit_no_training",
        "cudnn_batch_norm",
        "native_batch_norm",
        "group_norm",
        "native_group_norm",
        "rms_norm",
        "_fused_rms_norm",
        "instance_norm",
    }
)
ROOTS = frozenset({"rsqrt", "sqrt", "norm", "linalg_vector_norm", "var", "var_mean", "std", "std_mean"})
"""What a norm spelled out in primitives must contain."""

CONVOLUTIONS = frozenset({"conv1d", "conv2d", "conv3d", "convolution"})
_REGIONS = frozenset({"wrap_with_autocast", "wrap_with_set_grad_enabled"})
PRODUCTS = frozenset({"matmul", "mm", "bmm", "baddbmm", "addmm", "einsum", "grouped_mm", "_grouped_mm", "grouped_mm_fallback"})
"""Products of two tensors; the grouped ones multiply each token by the matrix of its expert."""
UNPACKED = frozenset({"dequantize", "binary"})
"""Operations that give a weight from its codes, or from its bits."""


@dataclass(frozen=True)
class Weight:
    """The weight that an operation carries.

    ``path`` is the module in the user's model that owns it, or the parameter itself where no module of its own does
    (``whole`` is False). ``kind`` is that of a ``Site``. ``groups`` is 1 but for convolutions. ``pointwise``: it mixes
    channels only (a linear layer, or a convolution whose kernel is 1 wide).
    """

    path: str
    kind: str
    shape: tuple[int, ...]
    whole: bool = True
    groups: int = 1
    pointwise: bool = True


@dataclass(eq=False)
class Step:
    """One node. ``inputs`` and ``users`` are indices of steps; ``live`` says that it depends on the model's inputs.

    ``options`` are the arguments that the node gives by name.
    """

    index: int
    op: str
    arguments: tuple[Any, ...]
    inputs: list[int]
    shape: tuple[int, ...]
    path: str
    tensor: str | None = None
    live: bool = False
    users: list[int] = field(default_factory=list)
    options: Mapping[str, Any] = field(default_factory=dict)


def members(bits: int) -> Iterator[int]:
    """The numbers in a set that is kept as the bits of an integer, in rising order."""
    while bits:
        lowest = bits & -bits
        yield lowest.bit_length() - 1
        bits ^= lowest


class Flow:
    """The traced graph of a model.

    ``projections`` are the operations with a weight from a parameter (linear layers, convolutions, products with a
    parameter), ``tables`` the embeddings, ``products`` the products of two computed values, ``norms`` the last steps of
    normalisations with the path of the module that holds their weight.
    """

    def __init__(self, program: ExportedProgram, model: nn.Module, rows: int) -> None:
        self.model, self.rows = model, rows
        self.steps: list[Step] = []
        self._read(program)
        self._reach()
        self.projections: dict[int, Weight] = {}
        self.tables: dict[int, Weight] = {}
        self.products: set[int] = set()
        for step in self.steps:
            self._classify(step)
        self.norms = self._norms()
        self.projection_bits = sum(1 << index for index in self.projections)
        self.norm_modules = frozenset(self.norms.values())

    def _read(self, program: ExportedProgram) -> None:
        signature = program.graph_signature
        names: dict[str, str] = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        given = set(signature.user_inputs)
        index: dict[Any, int] = {}
        for node in program.graph.nodes:
            step = self._append(node, index, program.graph_module)
            if step and node.op == "placeholder":
                step.tensor = raw_path(names[node.name]) if node.name in names else None
                step.live = node.name in given
        for step in self.steps:
            for source in step.inputs:
                self.steps[source].users.append(step.index)

    def _append(self, node: Any, index: dict[Any, int], module: nn.Module) -> Step | None:
        """The step of a node. A region (autocast, no_grad) is read as if its nodes stood in its place."""
        op = _op_name(node.target) if node.op == "call_function" else node.op
        if op in _REGIONS:
            self._inline(node, index, module)
            return None
        if op == "getitem" and (node.args[0], node.args[1]) in index:
            index[node] = index[node.args[0], node.args[1]]
            return None
        inputs = list(dict.fromkeys(index[source] for source in node.all_input_nodes if source in index))
        stack = list((node.meta.get("nn_module_stack") or {}).values())
        path = raw_path("" if not stack or stack[-1][0] == "model" else _plain_path(stack[-1][0]))
        arguments = tuple(_replace(argument, index) for argument in node.args)
        step = Step(len(self.steps), op.rstrip("_"), arguments, inputs, _shape(node.meta.get("val")), path)
        step.live = any(self.steps[source].live for source in inputs)
        step.options = {name: _replace(argument, index) for name, argument in node.kwargs.items()}
        self.steps.append(step)
        index[node] = step.index
        if op.endswith("_") and not op.endswith("__") and inputs:
            self._written(node, step.index, index)
        return step

    def _inline(self, node: Any, index: dict[Any, int], module: nn.Module) -> None:
        place = next(i for i, argument in enumerate(node.args) if getattr(argument, "op", "") == "get_attr")
        region = getattr(module, node.args[place].target)
        given = list(node.args[place + 1 :])
        for inner in region.graph.nodes:
            if inner.op == "placeholder":
                index[inner] = index[given.pop(0)]
            elif inner.op == "output":
                for position, returned in enumerate(inner.args[0]):
                    index[node, position] = index[returned]
            else:
                self._append(inner, index, region)

    def _written(self, node: Any, written: int, index: dict[Any, int]) -> None:
        """An operation in place changed its first argument, and what that is a view of: later readers see the new value."""
        target = node.args[0]
        while isinstance(target, torch.fx.Node):
            index[target] = written
            views = target.op == "call_function" and _op_name(target.target) in ("view", "slice", "select", "transpose")
            target = target.args[0] if views else None

    def _reach(self) -> None:
        """Sets of all steps before and after each step, as bits of integers."""
        self.before, self.after = [0] * len(self.steps), [0] * len(self.steps)
        for step in self.steps:
            for source in step.inputs:
                self.before[step.index] |= self.before[source] | 1 << source
        for step in reversed(self.steps):
            for user in step.users:
                self.after[step.index] |= self.after[user] | 1 << user

    def _classify(self, step: Step) -> None:
        if step.op == "embedding":
            # aten.embedding(weight, ids) and compress.embedding(ids, codes, ...): the one that is a stored tensor.
            weight = self._weight(step, self._stored(step.arguments[:2]))
            if weight:
                self.tables[step.index] = weight
        elif step.op == "linear" or step.op in CONVOLUTIONS:
            weight = self._weight(step, step.arguments[1])
            if weight:
                self.projections[step.index] = weight
            else:
                self.products.add(step.index)
        elif step.op in PRODUCTS:
            operands = self.operands(step.index)
            # A product with a weight on its right, [.., I] x [I, O]: GPT-2's layers, and parameters that no layer owns.
            weight = self._weight(step, operands[1]) if len(operands) == 2 else None
            if weight:
                self.projections[step.index] = weight
            elif len(operands) == 2:
                self.products.add(step.index)

    def operands(self, index: int) -> list[int]:
        """The two factors of a product, in order."""
        step = self.steps[index]
        factors: Any = step.arguments[:2]
        if step.op in ("baddbmm", "addmm"):
            factors = step.arguments[1:3]
        elif step.op == "einsum":
            factors = step.arguments[1]
        return [factor.index for factor in factors if isinstance(factor, _Value)]

    def data(self, index: int) -> int:
        """The step that a projection reads."""
        step = self.steps[index]
        source = self.operands(index)[0] if step.op in PRODUCTS else step.arguments[0].index
        return int(source)

    def given(self, index: int, position: int) -> int | None:
        """The step that a step takes as its argument at a position, if that is a value."""
        arguments = self.steps[index].arguments
        argument = arguments[position] if position < len(arguments) else None
        return argument.index if isinstance(argument, _Value) else None

    def _stored(self, arguments: Iterable[Any]) -> Any:
        return next((a for a in arguments if isinstance(a, _Value) and not self.steps[a.index].live), None)

    def _weight(self, step: Step, source: Any) -> Weight | None:
        """The weight at the end of a chain of layout operations (or the op that unpacks codes), if it is one."""
        start = source.index if isinstance(source, _Value) else source
        if start is None or self.steps[start].live:
            return None
        origin = self._largest(start)
        if origin is None:
            return None
        name, carried = str(self.steps[origin].tensor), self.steps[start].op in UNPACKED or step.op == "embedding"
        shape = self.steps[start].shape
        if step.op == "embedding" and len(shape) < 2:
            shape = tuple(step.arguments[-1]) if isinstance(step.arguments[-1], (list, tuple)) else shape
        if len(shape) < 2 or (not carried and not self._is_parameter(name)):
            return None
        path, whole = self._owner(name, step.path)
        turned = step.op in PRODUCTS and start != origin and self.steps[origin].shape == shape[::-1] and len(shape) == 2
        kind = self._kind(step, direct=start == origin, turned=turned) if whole else "other"
        pointwise = step.op not in CONVOLUTIONS or all(size == 1 for size in shape[2:])
        return Weight(path, kind, shape[::-1] if turned else shape, whole, _groups(step), pointwise)

    def _largest(self, start: int) -> int | None:
        """The largest stored tensor that a value is computed from, unless a projection or a product lies between."""
        between = self.before[start] | 1 << start
        best: int | None = None
        for index in members(between):
            step = self.steps[index]
            if step.op in PRODUCTS or step.op in CONVOLUTIONS or step.op in ("linear", "embedding"):
                return None
            if step.tensor and (best is None or math.prod(step.shape) > math.prod(self.steps[best].shape)):
                best = index
        return best

    def _is_parameter(self, name: str) -> bool:
        module, _, attribute = name.rpartition(".")
        return attribute in self.model.get_submodule(module)._parameters

    def _owner(self, name: str, called: str) -> tuple[str, bool]:
        """The module that stands for a stored tensor: the one that was called with it, else the one that holds it."""
        holder, _, attribute = name.rpartition(".")
        tensor = getattr(self.model.get_submodule(holder), attribute)
        caller = self.model.get_submodule(called)
        for own, held in caller._parameters.items():
            if held is tensor:
                return (called, True) if own == "weight" else (f"{called}.{own}".lstrip("."), False)
        layer = re.sub(r"\.(quantized_weight|stored|parametrizations\.weight)$", "", holder)
        return (layer, True) if attribute == "weight" or layer != holder else (name, False)

    def _kind(self, step: Step, direct: bool, turned: bool) -> str:
        if turned and step.op != "einsum":
            return "linear"
        if step.op in PRODUCTS:
            return "conv1d" if direct and step.op in ("addmm", "matmul", "mm") else "other"
        kinds = {"linear": "linear", "embedding": "embedding", "conv2d": "conv2d"}
        if step.op == "convolution" and len(step.shape) == 4:
            return "conv2d"
        return kinds.get(step.op, "other")

    def _norms(self) -> dict[int, str]:
        """The last step of each norm, and the module that holds its weight ("" where it has none)."""
        found: dict[int, str] = {}
        primitive: dict[str, bool] = {}
        for step in self.steps:
            if step.op in NORMS:
                stored = [a.index for a in step.arguments[1:] if isinstance(a, _Value)]
                names = [str(self.steps[index].tensor) for index in stored if self.steps[index].tensor]
                found[step.index] = self._norm_owner(names[0], step.path) if names else ""
            elif step.op in ROOTS and step.live:
                primitive.setdefault(step.path, self._holds_vectors_only(step.path))
        last: dict[tuple[str, int], int] = {}
        for step in self.steps:
            if primitive.get(step.path) and step.live and any(self.steps[user].path != step.path for user in step.users):
                last[step.path, step.index] = step.index
        return found | {index: path for (path, _), index in last.items() if index not in found}

    def _norm_owner(self, name: str, called: str) -> str:
        owner, _ = self._owner(name, called)
        return name.rpartition(".")[0] if owner == name else owner

    def _holds_vectors_only(self, path: str) -> bool:
        module = self.model.get_submodule(path)
        own = [parameter for parameter in module._parameters.values() if parameter is not None]
        return bool(own) and not list(module.children()) and all(parameter.ndim == 1 for parameter in own)

    def is_layout(self, index: int) -> bool:
        """Whether the step only moves values, or scales them by numbers that do not depend on the inputs."""
        step = self.steps[index]
        if step.path in self.norm_modules:
            return False
        if step.op in ("mul", "div"):
            return sum(self.steps[source].live for source in step.inputs) < 2
        return step.op in LAYOUT

    def backward(self, start: int, stop: Callable[[int], bool]) -> list[int]:
        """The nearest steps before ``start`` (itself included) at which ``stop`` holds, in order of the graph."""
        return self._nearest(start, stop, forward=False)

    def forward(self, start: int, stop: Callable[[int], bool]) -> list[int]:
        """The nearest steps after ``start`` at which ``stop`` holds, in order of the graph."""
        reached = {hit for user in self.steps[start].users for hit in self._nearest(user, stop, forward=True)}
        return sorted(reached)

    def backward_projections(self, start: int, ends: set[int]) -> list[int]:
        """The nearest projections before ``start``; ``ends`` and products of two computed values are not crossed.

        A grouped convolution is looked through where another projection lies right before it: it is a filter after a
        projection (MViT, PVTv2), not the projection itself.
        """

        def stop(index: int) -> bool:
            product = index in self.products and all(self.steps[factor].live for factor in self.operands(index))
            return index in ends or product or index in self.projections

        reached = [index for index in self.backward(start, stop) if index in self.projections and index not in ends]
        found: set[int] = set()
        for index in reached:
            beneath = self.backward_projections(self.data(index), ends) if self.projections[index].groups > 1 else []
            found.update(beneath or [index])
        return sorted(found)

    def _nearest(self, start: int, stop: Callable[[int], bool], forward: bool) -> list[int]:
        found, seen, queue = [], {start}, [start]
        while queue:
            index = queue.pop()
            if stop(index):
                found.append(index)
                continue
            step = self.steps[index]
            onward = step.users if forward else self.sources(index)
            for other in onward:
                if other not in seen:
                    seen.add(other)
                    queue.append(other)
        return sorted(found)

    def sources(self, index: int) -> list[int]:
        """What a step is computed from: only what depends on the inputs, where anything does."""
        step = self.steps[index]
        return [source for source in step.inputs if self.steps[source].live] or step.inputs

    def numel(self, index: int) -> int:
        return math.prod(self.steps[index].shape)


@dataclass(frozen=True)
class _Value:
    index: int


def _replace(argument: Any, index: dict[Any, int]) -> Any:
    if isinstance(argument, torch.fx.Node):
        return _Value(index[argument]) if argument in index else None
    if isinstance(argument, (list, tuple)):
        return [_replace(item, index) for item in argument]
    return argument


def _plain_path(path: str) -> str:
    """A module path as the model has it: without numbers of calls, entries of a slice of a list as entries of the list."""
    path = re.sub(r"@\d+", "", path)
    return re.sub(
        r"slice\((None|\d+), [^,]+, (None|\d+)\)\.(\d+)",
        lambda found: str(int(found[1].replace("None", "0")) + int(found[3]) * int(found[2].replace("None", "1"))),
        path,
    )


def _op_name(target: Any) -> str:
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name.split("::")[-1]
    return str(getattr(target, "_name", None) or getattr(target, "__name__", target))


def _shape(value: Any) -> tuple[int, ...]:
    if isinstance(value, Tensor):
        return tuple(int(size) for size in value.shape)
    return ()


def _groups(step: Step) -> int:
    if step.op in CONVOLUTIONS:
        groups = step.arguments[8 if step.op == "convolution" else 6 :]
        return int(groups[0]) if groups else 1
    return 1
