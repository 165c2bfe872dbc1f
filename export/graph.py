"""Traces a model once for all exporters: ``torch.export`` with named inputs and named dynamic dimensions."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from io import StringIO
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from calibrate.errors import UserError
from calibrate.signature import Batch, Signature, raw_path

__all__ = ["Traceable", "Untraceable", "cast_layers", "is_float8", "weight_only"]


class Untraceable(UserError):
    """torch.export failed; ``reason`` is the first line of what it says."""

    def __init__(self, name: str, error: Exception, dynamic: frozenset[str]) -> None:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        self.reason = ": ".join([type(error).__name__, *lines[:1]])
        hint = "Its forward must not depend on the values of its inputs."
        if dynamic:
            hint += f" Or fix the dynamic dimensions ({', '.join(sorted(dynamic))}) of the exporter."
        super().__init__(name, f"torch.export cannot trace it: {self.reason}", hint)


@dataclass
class Traceable:
    """A model ready to be written: the module, what it takes and gives, and one real batch of inputs.

    ``example`` has at least two rows and, for text, ragged padding: an all-ones mask would be traced away.
    ``programs`` keeps the traced graph for each set of dynamic dimensions, so that exporters share it.
    ``name`` names the model in the file's metadata.
    """

    model: nn.Module
    signature: Signature
    example: Batch
    name: str = "model"
    programs: dict[tuple[tuple[str, ...], int], ExportedProgram] = field(default_factory=dict)

    def program(self, dynamic: frozenset[str] = frozenset(), batch: int | None = None) -> ExportedProgram:
        """The traced graph; ``dynamic`` names the dimensions of the signature that stay symbolic.

        Args:
            dynamic: names out of the signature's shapes, such as ``batch`` and ``tokens``.
            batch: rows of the traced example where ``batch`` is not dynamic (default: 1).
        """
        rows = 2 if "batch" in dynamic else (batch or 1)
        key = (tuple(sorted(dynamic)), rows)
        if key not in self.programs:
            self.programs[key] = self._trace(dynamic, rows)
        return self.programs[key]

    def inputs(self, rows: int) -> dict[str, Tensor]:
        """``rows`` rows of the example (repeated if there are fewer), in the order and dtypes of the signature.

        The rows are those with the most padding first, so that a mask is never all ones where the data can be ragged.
        """
        order = torch.arange(next(iter(self.example.values())).shape[0])
        if "attention_mask" in self.example:
            order = self.example["attention_mask"].sum(1).argsort()
        order = order.repeat(-(-rows // len(order)))[:rows]
        return {spec.name: self.example[spec.name][order].to(spec.dtype) for spec in self.signature.inputs}

    def reached(self) -> set[str]:
        """Names of the parameters and buffers (as in the user's model) that the output depends on.

        A layer whose result nothing reads (the pooler of an encoder used for its tokens) is in no file.
        """
        program = next(iter(self.programs.values()), None) or self.program()
        output = next(node for node in program.graph.nodes if node.op == "output")
        seen, waiting = set(), [output]
        while waiting:
            for node in waiting.pop().all_input_nodes:
                if node not in seen:
                    seen.add(node)
                    waiting.append(node)
        signature = program.graph_signature
        names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        return {raw_path(name) for placeholder, name in names.items() if placeholder in {node.name for node in seen}}

    def _trace(self, dynamic: frozenset[str], rows: int) -> ExportedProgram:
        dims = {name: torch.export.Dim(name) for name in dynamic}
        shapes = {
            spec.name: {axis: dims[size] for axis, size in enumerate(spec.shape) if isinstance(size, str) and size in dims}
            for spec in self.signature.inputs
        }
        bound = self.signature.bind(self.model.eval())

        def export(within: dict[str, dict[int, Any]]) -> ExportedProgram:
            return torch.export.export(bound, (), self.inputs(rows), dynamic_shapes=within, strict=False)

        # torch.export prints the graph so far when it fails: the message says enough.
        with torch.no_grad(), _plain_attention(), _no_stack_traces(), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            try:
                try:
                    return export(shapes)
                except torch._dynamo.exc.UserError as error:
                    bounded = _bounded(str(error), shapes)
                    if bounded is None:
                        raise
                    return export(bounded)
            except Exception as error:
                raise Untraceable(self.name, error, dynamic) from error


def weight_only(model: nn.Module) -> list[str]:
    """Paths of layers that multiply by a weight kept as codes while their inputs stay floating point; tables are none."""
    return [
        path
        for path, module in model.named_modules()
        if hasattr(module, "quantized_weight")
        and getattr(module, "activation", None) is None
        and not hasattr(module, "embedding_dim")
    ]


def cast_layers(model: nn.Module) -> dict[str, str]:
    """Layers that compute in 16 bits between float32, by path, with the type: the model itself says which floats are short."""
    return {path: module.cast_to for path, module in model.named_modules() if isinstance(getattr(module, "cast_to", None), str)}


def is_float8(module: nn.Module) -> bool:
    """Whether a layer's weight, and what meets it, are numbers of 8-bit floating point (``calibrate.float8``)."""
    return bool(getattr(getattr(getattr(module, "quantized_weight", None), "grid", None), "e4m3", False))


@contextmanager
def _plain_attention() -> Iterator[None]:
    """Without torch's fused encoder layer, which hides its parts."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


@contextmanager
def _no_stack_traces() -> Iterator[None]:
    """Without the line of Python that made each node, which takes a tenth of the time and is in no file."""
    config = getattr(fx, "config", None)
    enabled = getattr(config, "do_not_emit_stack_traces", None)
    if config is None or enabled is None:  # an older torch
        yield
        return
    config.do_not_emit_stack_traces = True
    try:
        yield
    finally:
        config.do_not_emit_stack_traces = enabled


def _bounded(message: str, shapes: dict[str, dict[int, Any]]) -> dict[str, dict[int, Any]] | None:
    """The dynamic shapes within the bounds that the trace asks for (a table of positions is only so long), or None where a
    dimension would not stay free."""
    from torch.export.dynamic_shapes import refine_dynamic_shapes_from_suggested_fixes

    try:
        fixes = message[: message.find("\n\n", message.index("Suggested fixes:"))]
        refined: Any = refine_dynamic_shapes_from_suggested_fixes(fixes, shapes)
    except Exception:
        return None
    sizes = [size for axes in refined.values() for size in axes.values()]
    return refined if all(isinstance(size, torch.export.Dim) for size in sizes) else None
