"""Traces a model once for all exporters: ``torch.export`` with named inputs and named dynamic dimensions."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from calibrate.signature import Batch, Signature

__all__ = ["Traceable"]


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

    def _trace(self, dynamic: frozenset[str], rows: int) -> ExportedProgram:
        dims = {name: torch.export.Dim(name) for name in dynamic}
        shapes = {
            spec.name: {axis: dims[size] for axis, size in enumerate(spec.shape) if isinstance(size, str) and size in dims}
            for spec in self.signature.inputs
        }
        bound = self.signature.bind(self.model.eval())
        with torch.no_grad():
            try:
                return torch.export.export(bound, (), self.inputs(rows), dynamic_shapes=shapes, strict=False)
            except torch._dynamo.exc.UserError as error:
                bounded = _bounded(str(error), shapes)
                if bounded is None:
                    raise
                return torch.export.export(bound, (), self.inputs(rows), dynamic_shapes=bounded, strict=False)


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
