"""From a float module to the quantized layer that stands in for it, or the reason why there is none.

Shapes: O outputs, I inputs, V vocabulary, C channels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from calibrate.grid import Grid
from compress.layers.quantized import QuantConv2d, QuantEmbedding, QuantLinear, is_quantized

__all__ = ["QuantizedLayer", "is_conv1d", "matrix_shape", "obstacle", "outputs_of", "quantized_layer", "weight_of"]

QuantizedLayer = QuantLinear | QuantConv2d | QuantEmbedding


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is GPT-2's ``Conv1D``: a linear layer whose weight is [I, O]. Known by name, as its library is optional."""
    return type(module).__name__ == "Conv1D"


def outputs_of(module: nn.Module) -> int:
    """Outputs of a float projection: linear layer, ``Conv1D`` or convolution."""
    return int(module.get_parameter("weight").shape[1 if is_conv1d(module) else 0])


def weight_of(module: nn.Module, kind: str) -> Tensor:
    """The weight as [O, I], [O, I/groups, kh, kw] or [V, C]; a Conv1D's [I, O] comes transposed, not copied."""
    weight = module.get_parameter("weight").detach()
    return weight.t() if kind == "conv1d" else weight


def matrix_shape(module: nn.Module, kind: str) -> tuple[int, int]:
    """The weight seen as a matrix: (O, I); of a quantized layer too, which keeps a Conv1D's as [O, I]."""
    if is_quantized(module):
        codes: Any = module.quantized_weight
        shape = torch.Size(codes.shape)
    else:
        shape = weight_of(module, kind).shape
    return shape[0], shape[1:].numel()


def obstacle(model: nn.Module, path: str, kind: str) -> str | None:
    """Why the module at ``path`` cannot be replaced by a quantized layer, or None."""
    if path not in dict(model.named_modules(remove_duplicate=False)):
        return "it is a parameter of its own, not a layer"
    module = model.get_submodule(path)
    if is_quantized(module):
        return None
    if kind not in ("linear", "conv1d", "conv2d", "embedding"):
        return f"a {type(module).__name__} is no linear layer, 2-D convolution or embedding"
    if not isinstance(getattr(module, "weight", None), nn.Parameter):
        return f"a {type(module).__name__} has no parameter called weight"
    if isinstance(model.get_submodule(path.rpartition(".")[0]), nn.MultiheadAttention):
        return "torch.nn.MultiheadAttention reads its parameters itself and never calls it"
    if not module.get_parameter("weight").is_floating_point():
        return "its weight is not floating point"
    if kind == "conv2d" and getattr(module, "padding_mode", "zeros") != "zeros":
        return f"padding mode {module.padding_mode!r}: only zeros can be carried"
    if kind == "embedding" and getattr(module, "max_norm", None) is not None:
        return "max_norm changes the table while it is read"
    if not _is_plain(module, kind):
        return f"a {type(module).__name__} computes more than its weight and bias say"
    return None


def quantized_layer(module: nn.Module, kind: str, grid: Grid, activation: dict[str, Any] | None) -> QuantizedLayer:
    """A quantized layer of the module's geometry, its codes still zero; ``activation``: of ``ActivationGrid``."""
    shape = tuple(weight_of(module, kind).shape)
    bias = getattr(module, "bias", None) is not None
    if kind == "embedding":
        return QuantEmbedding(shape, grid, padding_idx=getattr(module, "padding_idx", None))
    if kind == "conv2d":
        conv: Any = module
        return QuantConv2d(shape, grid, activation, bias, conv.stride, conv.padding, conv.dilation, conv.groups)
    return QuantLinear(shape, grid, activation, bias)


def _is_plain(module: nn.Module, kind: str) -> bool:
    """Whether ``forward`` is the standard one, by identity or, for a class of another library, by trying it."""
    standard = {"linear": nn.Linear, "conv2d": nn.Conv2d, "embedding": nn.Embedding}.get(kind)
    if standard is not None and vars(standard)["forward"] is getattr(type(module), "forward", None):
        return True
    weight, bias = weight_of(module, kind).float(), getattr(module, "bias", None)
    try:
        with torch.inference_mode():
            given, expected = _trial(module, kind, weight, bias)
    except Exception:  # whatever a foreign forward raises on a plain tensor, it is not the standard forward
        return False
    if given.shape != expected.shape:
        return False
    return float((given - expected).norm()) <= 1e-4 * float(expected.norm())


def _trial(module: nn.Module, kind: str, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """What the module gives for a small input, and what its weight and bias say that it should give."""
    dtype, device = module.get_parameter("weight").dtype, weight.device
    if kind == "embedding":
        ids = torch.arange(min(4, weight.shape[0]), device=device).unsqueeze(0)
        return module(ids).float(), F.embedding(ids, weight)
    generator = torch.Generator().manual_seed(0)
    if kind == "conv2d":
        conv: Any = module
        x = torch.randn(1, conv.in_channels, 32, 32, generator=generator).to(device)
        expected = F.conv2d(x, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)
        return module(x.to(dtype)).float(), expected
    x = torch.randn(1, 3, weight.shape[1], generator=generator).to(device)
    return module(x.to(dtype)).float(), F.linear(x, weight, bias)
