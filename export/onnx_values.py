"""What a traced tensor is while it is lowered to ONNX, and the sizes of its shape."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["Carried", "Dim", "Held", "axis_of", "dim"]

Dim = Any
"""A size: an ``int``, or a sympy expression over the dynamic dimensions."""


@dataclass(frozen=True)
class Carried:
    """A weight that is stored as integer codes; ``path`` is the site (module path in the user's model).

    ``binary``: the codes are planes of bits, ``bits`` of them, with whole numbers [O, G, K] and [O, G] (``calibrate.bits``).
    """

    path: str
    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    bits: int
    shape: tuple[int, ...]
    binary: bool = False
    multiples: Tensor | None = None
    shift: Tensor | None = None

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
