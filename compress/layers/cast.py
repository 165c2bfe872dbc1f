"""Layers that hold their weight in 16 bits and compute in it, between tensors of float32."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["CastConv2d", "CastEmbedding", "CastLinear", "Short", "Stored"]

Short = Literal["float16", "bfloat16"]


class Stored(nn.Module):
    """A weight in 16 bits; a module of its own, so that layers can share it."""

    def __init__(self, shape: tuple[int, ...], dtype: Short) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.zeros(shape, dtype=getattr(torch, dtype)), requires_grad=False)


class _Cast(nn.Module):
    """What the layers share: ``stored`` and an optional ``bias``, both of the type ``cast_to``.

    The input is cast to it and the output back to the input's own type: what is between such layers does not know of them.
    """

    bias: nn.Parameter | None

    def __init__(self, shape: tuple[int, ...], dtype: Short, bias: bool = False) -> None:
        super().__init__()
        self.shape, self.cast_to = tuple(shape), dtype
        self.stored = Stored(self.shape, dtype)
        made = nn.Parameter(torch.zeros(shape[0], dtype=getattr(torch, dtype)), requires_grad=False) if bias else None
        self.register_parameter("bias", made)

    @property
    def weight(self) -> Tensor:
        """The weight as float32, for code that looks at ``layer.weight`` or at its type."""
        return self.stored.values.float()

    def config(self) -> dict[str, Any]:
        """What rebuilds the layer without its tensors, as JSON."""
        return {"shape": list(self.shape), "dtype": self.cast_to, "bias": self.bias is not None}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> _Cast:
        return cls(**{**config, "shape": tuple(config["shape"])})

    def extra_repr(self) -> str:
        return f"{list(self.shape)}, {self.cast_to}, bias={self.bias is not None}"


class CastLinear(_Cast):
    """``linear(x, weight, bias)`` in 16 bits, with the weight [O, I]."""

    @property
    def in_features(self) -> int:
        return self.shape[1]

    @property
    def out_features(self) -> int:
        return self.shape[0]

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.to(self.stored.values.dtype), self.stored.values, self.bias).to(x.dtype)


class CastConv2d(_Cast):
    """A 2-D convolution in 16 bits with the weight [O, I/groups, kh, kw]."""

    def __init__(
        self,
        shape: tuple[int, ...],
        dtype: Short,
        bias: bool = False,
        stride: tuple[int, int] = (1, 1),
        padding: tuple[int, int] | str = (0, 0),
        dilation: tuple[int, int] = (1, 1),
        groups: int = 1,
    ) -> None:
        super().__init__(shape, dtype, bias)
        self.stride, self.dilation, self.groups = tuple(stride), tuple(dilation), groups
        self.padding = padding if isinstance(padding, str) else tuple(padding)

    @property
    def kernel_size(self) -> tuple[int, ...]:
        return self.shape[2:]

    def config(self) -> dict[str, Any]:
        geometry = {"stride": self.stride, "padding": self.padding, "dilation": self.dilation, "groups": self.groups}
        return super().config() | geometry

    def forward(self, x: Tensor) -> Tensor:
        short = x.to(self.stored.values.dtype)
        made = F.conv2d(short, self.stored.values, self.bias, self.stride, self.padding, self.dilation, self.groups)
        return made.to(x.dtype)


class CastEmbedding(_Cast):
    """A table [V, C] in 16 bits; the rows that are looked up become float32."""

    def __init__(self, shape: tuple[int, ...], dtype: Short, bias: bool = False, padding_idx: int | None = None) -> None:
        super().__init__(shape, dtype, False)
        self.padding_idx = padding_idx

    @property
    def num_embeddings(self) -> int:
        return self.shape[0]

    @property
    def embedding_dim(self) -> int:
        return self.shape[1]

    def config(self) -> dict[str, Any]:
        return super().config() | {"padding_idx": self.padding_idx}

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.stored.values).float()
