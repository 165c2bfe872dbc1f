"""What the Core ML tests share: small models, quantized copies of them, MIL programs written by hand, and SQNR."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from calibrate.grid import Grid
from calibrate.signature import Batch, Signature, TensorSpec
from compress.layers.quantized import QuantConv2d, QuantEmbedding, QuantLinear
from export.graph import Traceable

FAMILIES = Path(__file__).parents[1] / "compress" / "families.py"


def family(name: str) -> tuple[nn.Module, Signature, Batch]:
    """A small random transformer of the shared zoo."""
    spec = importlib.util.spec_from_file_location("families", FAMILIES)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    built: tuple[nn.Module, Signature, Batch] = module.build(name)
    return built


def sqnr(reference: Tensor, other: Tensor) -> float:
    """In dB; infinite when equal."""
    noise = float(((reference.double() - other.double()) ** 2).sum())
    return math.inf if noise == 0 else 10 * math.log10(float((reference.double() ** 2).sum()) / noise)


def quantized(
    model: nn.Module, grid: Grid, activation: dict[str, Any] | None = None, kinds: tuple[type, ...] = (nn.Linear,)
) -> nn.Module:
    """Replaces layers by quantized ones with the ranges of their own weights; static activations cover [-4, 4]."""
    for path, module in list(model.named_modules()):
        if isinstance(module, kinds):
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, _layer(module, grid, activation).eval())
    return model


def _layer(module: nn.Module, grid: Grid, activation: dict[str, Any] | None) -> nn.Module:
    weight: Tensor = module.weight.detach().float()  # type: ignore[union-attr, operator]
    blocks = grid.blocks(weight)
    scale, shift = grid.parameters(blocks.amin(-1), blocks.amax(-1))
    shape, bias = tuple(weight.shape), getattr(module, "bias", None)
    layer: Any
    if isinstance(module, nn.Embedding):
        layer = QuantEmbedding(shape, grid, padding_idx=module.padding_idx)
    elif isinstance(module, nn.Conv2d):
        geometry = (module.stride, module.padding, module.dilation, module.groups)
        layer = QuantConv2d(shape, grid, activation, bias is not None, *geometry)
    else:
        layer = QuantLinear(shape, grid, activation, bias is not None)
    layer.quantized_weight.store(grid.quantize(weight, scale, shift), scale, shift)
    if bias is not None:
        layer.bias.data = bias.detach().float()
    if activation and activation["kind"] == "static" and not isinstance(module, nn.Embedding):
        layer.activation.scale.fill_(8 / 255)
        layer.activation.zero_point.fill_(0 if activation["symmetric"] else 5)
    return layer


class Mixed(nn.Module):
    """An embedding, a convolution over its width, and two linear layers: every kind of layer that carries codes."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 32)
        self.conv = nn.Conv2d(1, 8, (3, 4), stride=(1, 4), padding=(1, 0))
        self.up = nn.Linear(64, 32)
        self.head = nn.Linear(32, 8)
        self.twin = self.up if tied else nn.Linear(64, 32)

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden = self.table(input_ids).unsqueeze(1)
        hidden = torch.relu(self.conv(hidden)).permute(0, 2, 1, 3).flatten(2)
        return self.head(self.up(hidden) + self.twin(hidden))


IDS = TensorSpec("input_ids", torch.int64, ("batch", "tokens"))


def mixed(tied: bool = False) -> tuple[nn.Module, Signature, Batch]:
    torch.manual_seed(3)
    model = Mixed(tied).eval()
    return model, Signature((IDS,), output_name="scores"), {"input_ids": torch.randint(0, 50, (4, 6))}


def trace(model: nn.Module, signature: Signature, example: Batch, name: str = "small") -> Traceable:
    return Traceable(model, signature, example, name)


def saved(path: Path, inputs: dict[str, tuple[tuple[int, ...], str]], body: Callable[..., Any]) -> Path:
    """A package of a MIL program written by hand: ``body`` takes the inputs and returns variables."""
    import coremltools as ct
    from coremltools.converters.mil.mil import Builder as mb
    from coremltools.converters.mil.mil import types

    from export.mil_package import quiet

    kinds = {"float32": types.fp32, "float16": types.fp16, "int32": types.int32}
    specs = [mb.TensorSpec(shape=shape, dtype=kinds[kind]) for shape, kind in inputs.values()]
    arguments = ", ".join(inputs)
    function = eval(f"lambda {arguments}: body({arguments})", {"body": body})
    with quiet():
        program = mb.program(input_specs=specs, opset_version=ct.target.iOS18)(function)
        ct.convert(
            program,
            source="milinternal",
            convert_to="mlprogram",
            minimum_deployment_target=ct.target.iOS18,
            compute_precision=ct.precision.FLOAT32,
            pass_pipeline=ct.PassPipeline.EMPTY,
            skip_model_load=True,
            package_dir=str(path),
        )
    return path
