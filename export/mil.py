"""Runs a saved Core ML program op by op with torch, on any machine.

Core ML itself runs only on Apple's systems. This interpreter reads the saved package, not the model that it was made
from, so it answers whether the file computes what it should. A float16 program is computed in float32 and every result is
rounded to float16; an Apple device accumulates differently, so results agree within a tolerance, not bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from calibrate.errors import UserError
from export.mil_args import Args
from export.mil_ops import EXACT, KERNELS
from export.mil_package import MilType, Op, Package, Stored

__all__ = ["Program", "UnknownOp"]

# Integers other than bytes are computed in int64; floats in float32.
_RUN = {
    **dict.fromkeys(("float16", "float32"), torch.float32),
    **dict.fromkeys(("int8", "int4"), torch.int8),
    **dict.fromkeys(("uint8", "uint6", "uint4", "uint3", "uint2", "uint1"), torch.uint8),
    **dict.fromkeys(("int16", "uint16", "int32", "uint32", "int64"), torch.int64),
    "bool": torch.bool,
}


class UnknownOp(UserError):
    """The program has an operation that the interpreter does not know."""


@dataclass(frozen=True)
class _Step:
    op: Op
    constants: Args
    names: dict[str, tuple[str | Tensor, ...]]
    variadic: frozenset[str]
    last: tuple[str, ...]


class Program:
    """The main function of a saved package, ready to be run.

    Constants and compressed weights are decoded when it is loaded, and what depends on constants only is computed then.

    Raises:
        UnknownOp: the program has an operation without a kernel (names the operation).
        UserError: the folder is not a Core ML package.
    """

    def __init__(self, path: Path) -> None:
        self.package = Package(path)
        self.types: dict[str, MilType] = dict(self.package.inputs)
        self.constants: dict[str, Any] = {}
        self._steps: list[_Step] = []
        unknown = sorted({op.kind for op in self.package.ops} - {"const", *KERNELS})
        if unknown:
            raise UnknownOp(str(path), f"the interpreter does not know the operations {', '.join(unknown)}", _ADD)
        with torch.inference_mode():
            self._load()

    @property
    def kinds(self) -> dict[str, int]:
        """How many operations of each type the program has, constants apart."""
        counted: dict[str, int] = {}
        for op in self.package.ops:
            if op.kind != "const":
                counted[op.kind] = counted.get(op.kind, 0) + 1
        return dict(sorted(counted.items()))

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Outputs by name (floats as float32) for one set of inputs by name.

        Raises:
            UserError: an input is missing or its shape is not what the program takes.
            AssertionError: an operation gave another type or shape than the program states: our defect.
        """
        values: dict[str, Any] = {}
        for name, kind in self.package.inputs.items():
            if name not in inputs:
                raise UserError(str(self.package.path), f"input {name!r} is missing", f"It takes {', '.join(self.types)}.")
            if not self.package.admits(name, tuple(inputs[name].shape)):
                what = f"input {name!r} is {list(inputs[name].shape)}, the program takes {self.package.takes(name)}"
                raise UserError(str(self.package.path), what, "Give the shape it was written for, or write it again.")
            values[name] = _rounded(inputs[name].to(_RUN[kind.dtype]), kind)
        with torch.inference_mode():
            for step in self._steps:
                args = Args(step.constants)
                for name, parts in step.names.items():
                    found = [values[part] if isinstance(part, str) else part for part in parts]
                    args[name] = found if name in step.variadic else found[0]
                self._store(step.op, _run(step.op, args), values)
                for name in step.last:
                    del values[name]
        return {name: values[name] if name in values else self.constants[name] for name in self.package.outputs}

    def _load(self) -> None:
        uses: dict[str, int] = {}
        steps: list[tuple[Op, Args, dict[str, tuple[str | Tensor, ...]], frozenset[str]]] = []
        for op in self.package.ops:
            for name, kind in op.outputs:
                self.types[name] = kind
            if op.kind == "const":
                self.constants[op.name] = _decode(op.inputs["val"][0], op.outputs[0][1])
                continue
            constants, names = self._bind(op)
            variadic = frozenset(name for name in op.inputs if name in ("values", "ref_tensors"))
            if not names:
                self._store(op, _run(op, constants), self.constants)
                continue
            for parts in names.values():
                uses.update((part, len(steps)) for part in parts if isinstance(part, str))
            steps.append((op, constants, names, variadic))
        outputs = set(self.package.outputs)
        for index, (op, constants, names, variadic) in enumerate(steps):
            last = tuple(name for name, use in uses.items() if use == index and name not in outputs)
            self._steps.append(_Step(op, constants, names, variadic, last))
        self._forget_consumed(outputs)

    def _bind(self, op: Op) -> tuple[Args, dict[str, tuple[str | Tensor, ...]]]:
        """Arguments that are known now, and those that wait for the run."""
        known = Args()
        waiting: dict[str, tuple[str | Tensor, ...]] = {}
        for name, parts in op.inputs.items():
            found = [_decode(part, part.type) if isinstance(part, Stored) else self.constants.get(part, part) for part in parts]
            pending = any(isinstance(a, str) and a is b for a, b in zip(found, parts, strict=True))
            if pending:
                waiting[name] = tuple(found)
            else:
                known[name] = found if name in ("values", "ref_tensors") else found[0]
        return known, waiting

    def _forget_consumed(self, outputs: set[str]) -> None:
        """The codes of weights are not needed once the weights are dense; steps hold what they use."""
        self.constants = {name: value for name, value in self.constants.items() if name in outputs}

    def _store(self, op: Op, results: tuple[Any, ...], values: dict[str, Any]) -> None:
        if len(results) != len(op.outputs):
            raise AssertionError(f"{op.kind} {op.name}: {len(results)} results, the program states {len(op.outputs)}")
        for (name, kind), result in zip(op.outputs, results, strict=True):
            result = result.to(torch.int64) if result.dtype in (torch.int32, torch.int16) else result
            if not kind.admits(tuple(result.shape)) or result.dtype != _RUN.get(kind.dtype):
                stated = f"{kind.dtype} {list(kind.shape)}"
                raise AssertionError(f"{op.kind} {op.name}: {result.dtype} {list(result.shape)}, stated is {stated}")
            values[name] = result if op.kind in EXACT else _rounded(result, kind)


_ADD = "Add a kernel to export/mil_ops.py."


def _run(op: Op, args: Args) -> tuple[Any, ...]:
    result = KERNELS[op.kind](args)
    return tuple(result) if isinstance(result, tuple | list) else (result,)


def _rounded(value: Tensor, kind: MilType) -> Tensor:
    return value.half().float() if kind.dtype == "float16" else value


def _decode(stored: Any, kind: MilType) -> Any:
    value = stored.value
    if isinstance(value, str):
        return value
    array = np.asarray(value)
    if array.dtype in (np.uint16, np.uint32):
        array = array.astype(np.int64)
    return torch.from_numpy(np.array(array, copy=True)).to(_RUN[kind.dtype])
