"""Layers whose weights are integer codes and whose inputs may be rounded to a grid."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from calibrate import ops
from calibrate.grid import Grid, pack, unpack

__all__ = ["ActivationGrid", "Codes", "QuantConv2d", "QuantEmbedding", "QuantLinear", "is_quantized"]


class Codes(nn.Module):
    """A weight of the given shape, stored as packed integer codes with scales [O, G] or [1, 1] (``calibrate.grid``)."""

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None

    def __init__(self, shape: tuple[int, ...], grid: Grid) -> None:
        super().__init__()
        self.shape, self.grid = tuple(shape), grid
        count = 1
        for size in shape:
            count *= size
        rows = 1 if grid.granularity == "tensor" else shape[0]
        groups = count // shape[0] // grid.group_size if grid.group_size else 1
        stored = torch.int8 if grid.bits == 8 else torch.uint8
        self.register_buffer("codes", torch.zeros(-(-count * grid.bits // 8), dtype=stored))
        self.register_buffer("scale", torch.ones(rows, groups))
        self.register_buffer("zero_point", None if grid.symmetric else torch.zeros(rows, groups, dtype=torch.int8))

    def store(self, codes: Tensor, scale: Tensor, zero_point: Tensor | None) -> Codes:
        """Keeps signed codes (int8, the weight's shape) and their scales; returns itself."""
        self.codes, self.scale = pack(codes, self.grid.bits), scale.detach().float().reshape(self.scale.shape)
        if self.zero_point is not None and zero_point is not None:
            self.zero_point = zero_point.reshape(self.zero_point.shape)
        return self

    def integers(self) -> Tensor:
        """Signed codes (int8) in the weight's shape; the bits of floating point numbers where the grid is of those."""
        return unpack(self.codes, self.grid.bits, self.shape)

    def forward(self) -> Tensor:
        if self.grid.e4m3:
            numbers: Tensor = ops.dequantize_e4m3(self.codes, self.scale, list(self.shape))
            return numbers
        values: Tensor = ops.dequantize(self.codes, self.scale, self.zero_point, self.grid.bits, list(self.shape))
        return values

    def extra_repr(self) -> str:
        return f"{list(self.shape)}, bits={self.grid.bits}, {self.grid.granularity}, symmetric={self.grid.symmetric}"


class ActivationGrid(nn.Module):
    """Rounds its input to a per-tensor grid: a static one (``scale``, ``zero_point``), or one made from each tensor.

    With ``channels`` every channel C of the input [..., C] is multiplied by its own ``factor`` first; the layer's weight
    has been divided by it. ``e4m3``: the static grid is of 8-bit floating point numbers.
    """

    scale: Tensor
    zero_point: Tensor
    factor: Tensor | None

    def __init__(
        self,
        kind: Literal["static", "dynamic"],
        bits: int = 8,
        symmetric: bool = True,
        channels: int | None = None,
        e4m3: bool = False,
    ) -> None:
        super().__init__()
        self.kind, self.bits, self.symmetric, self.e4m3 = kind, bits, symmetric, e4m3
        self.register_buffer("factor", None if channels is None else torch.ones(channels))
        if kind == "static":
            self.register_buffer("scale", torch.ones(()))
            self.register_buffer("zero_point", torch.zeros((), dtype=torch.int8))

    def config(self) -> dict[str, Any]:
        """What rebuilds it, as JSON."""
        made: dict[str, Any] = {"kind": self.kind, "bits": self.bits, "symmetric": self.symmetric}
        made |= {"e4m3": True} if self.e4m3 else {}
        return made if self.factor is None else made | {"channels": self.factor.numel()}

    def forward(self, x: Tensor) -> Tensor:
        if self.factor is not None:
            x = x * self.factor
        if self.kind == "dynamic":
            rounded: Tensor = ops.quantize_dequantize_dynamic(x, self.bits)
        elif self.e4m3:
            rounded = ops.quantize_dequantize_e4m3(x, self.scale)
        else:
            rounded = ops.quantize_dequantize(x, self.scale, self.zero_point, self.bits)
        return rounded

    def extra_repr(self) -> str:
        return f"{self.kind}, bits={self.bits}, symmetric={self.symmetric}"


class _Quantized(nn.Module):
    """What the quantized layers share: ``quantized_weight``, an optional ``activation`` grid, an optional ``bias``."""

    quantized_weight: Codes
    activation: ActivationGrid | None
    bias: Tensor | None

    def __init__(self, shape: tuple[int, ...], grid: Grid, activation: dict[str, Any] | None, bias: bool) -> None:
        super().__init__()
        self.quantized_weight = Codes(shape, grid)
        self.activation = ActivationGrid(**activation) if activation else None
        self.bias = nn.Parameter(torch.zeros(shape[0]), requires_grad=False) if bias else None

    @property
    def weight(self) -> Tensor:
        """The dense weight that meets the layer's own input, for code that looks at ``layer.weight``."""
        dense: Tensor = self.quantized_weight()
        factor = None if self.activation is None else self.activation.factor
        return dense if factor is None else dense * factor

    def input(self, x: Tensor) -> Tensor:
        return x if self.activation is None else self.activation(x)

    def config(self) -> dict[str, Any]:
        """What rebuilds the layer without its tensors, as JSON: ``cls(**config)`` after ``grid`` is made a ``Grid``."""
        activation = self.activation
        return {
            "shape": list(self.quantized_weight.shape),
            "grid": vars(self.quantized_weight.grid),
            "activation": activation and activation.config(),
            "bias": self.bias is not None,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> _Quantized:
        return cls(**{**config, "shape": tuple(config["shape"]), "grid": Grid(**config["grid"])})


class QuantLinear(_Quantized):
    """``linear(input(x), weight, bias)`` with the weight [O, I] from its codes."""

    @property
    def in_features(self) -> int:
        return self.quantized_weight.shape[1]

    @property
    def out_features(self) -> int:
        return self.quantized_weight.shape[0]

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.input(x), self.quantized_weight(), self.bias)


class QuantConv2d(_Quantized):
    """A 2-D convolution with the weight [O, I/groups, kh, kw] from its codes."""

    def __init__(
        self,
        shape: tuple[int, ...],
        grid: Grid,
        activation: dict[str, Any] | None,
        bias: bool,
        stride: tuple[int, int] = (1, 1),
        padding: tuple[int, int] | str = (0, 0),
        dilation: tuple[int, int] = (1, 1),
        groups: int = 1,
    ) -> None:
        super().__init__(shape, grid, activation, bias)
        self.stride, self.dilation, self.groups = tuple(stride), tuple(dilation), groups
        self.padding = padding if isinstance(padding, str) else tuple(padding)

    @property
    def kernel_size(self) -> tuple[int, ...]:
        return self.quantized_weight.shape[2:]

    def config(self) -> dict[str, Any]:
        geometry = {"stride": self.stride, "padding": self.padding, "dilation": self.dilation, "groups": self.groups}
        return super().config() | geometry

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(self.input(x), self.quantized_weight(), self.bias, self.stride, self.padding, self.dilation, self.groups)


class QuantEmbedding(_Quantized):
    """A table [V, C] of codes: rows are gathered as codes and dequantized after."""

    def __init__(
        self,
        shape: tuple[int, ...],
        grid: Grid,
        activation: None = None,
        bias: bool = False,
        padding_idx: int | None = None,
    ) -> None:
        super().__init__(shape, grid, None, False)
        self.padding_idx = padding_idx

    @property
    def num_embeddings(self) -> int:
        return self.quantized_weight.shape[0]

    @property
    def embedding_dim(self) -> int:
        return self.quantized_weight.shape[1]

    def config(self) -> dict[str, Any]:
        return super().config() | {"padding_idx": self.padding_idx}

    def forward(self, ids: Tensor) -> Tensor:
        table = self.quantized_weight
        values: Tensor = ops.embedding(ids, table.codes, table.scale, table.zero_point, table.grid.bits, list(table.shape))
        return values


def is_quantized(module: nn.Module) -> bool:
    """Whether a module's weight already is integer codes."""
    return isinstance(module, _Quantized)
