"""Where factors may be folded into the layer before, and where they may not."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent / "passes"))
from trial import digits

from calibrate.capture import shared_inputs
from calibrate.fidelity import sqnr_db
from calibrate.signature import Batch, Signature, TensorSpec
from compress.anatomy import Site, find
from compress.passes.contract import Context
from compress.quantization.folding import Fold, folds
from compress.surgery import Surgery


def found(model: nn.Module, signature: Signature, rows: list[Batch]) -> dict[str, Fold]:
    """Folds for every group of linear layers in blocks that read one tensor."""
    anatomy = find(model, signature, {name: tensor[:2] for name, tensor in rows[0].items()})
    context = Context(signature, anatomy, lambda: iter(rows), Surgery(), seed=1)
    sites = [site for site in anatomy.sites if site.kind == "linear" and site.block is not None]
    leaders = shared_inputs(model, context.call, rows[0], {site.path: None for site in sites})
    groups: dict[str, list[Site]] = {}
    for site in sites:
        groups.setdefault(leaders[site.path], []).append(site)
    return folds(model, context, list(groups.values()))


def family(name: str) -> tuple[nn.Module, Signature, list[Batch]]:
    pytest.importorskip("transformers", reason="transformers is not installed")
    from families import build

    model, signature, example = build(name)
    return model, signature, [example]


@pytest.mark.parametrize("name", ["digits", "vit", "llama", "opt"])
def test_folding_changes_the_layers_and_not_the_model(name: str) -> None:
    model, signature, rows = digits() if name == "digits" else family(name)
    places = found(model, signature, rows)
    assert len(places) >= 6
    changed = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    for place in places.values():
        place.apply(changed, torch.rand(place.channels, generator=generator) * 4 + 0.1)
    with torch.inference_mode():
        before, after = (signature.call(each, rows[0]) for each in (model, changed))
    assert sqnr_db(before, after) > 80
    for place in places.values():
        for path in (place.producer, *place.consumers):
            assert sqnr_db(model.get_submodule(path).weight, changed.get_submodule(path).weight) < 30  # type: ignore[arg-type]


def test_a_norm_in_front_of_layers_and_values_in_front_of_the_output_are_found() -> None:
    places = found(*digits())
    assert {places[f"blocks.{i}.attn.qkv"].producer for i in range(4)} == {f"blocks.{i}.norm1" for i in range(4)}
    assert {places[f"blocks.{i}.attn.proj"].producer for i in range(4)} == {f"blocks.{i}.attn.qkv" for i in range(4)}
    assert "blocks.0.mlp.fc2" not in places, "GELU lies between"


def test_a_norm_that_the_residual_reads_too_is_left_alone() -> None:
    places = found(*family("bert"))
    assert len(places) == 2
    assert all(place.producer.endswith("value") for place in places.values())


class Told(nn.Module):
    """A norm before a layer; ``also`` decides who else reads it."""

    def __init__(self, also: str) -> None:
        super().__init__()
        self.also = also
        self.embed = nn.Linear(6, 16)
        self.blocks = nn.ModuleList(
            [nn.ModuleDict({"norm": nn.LayerNorm(16), "up": nn.Linear(16, 32), "down": nn.Linear(32, 16)})]
        )
        self.other, self.head = nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            parts: Any = block
            y = parts["norm"](x)
            z = parts["down"](torch.relu(parts["up"](y)))
            x = x + z + (self.other(y) if self.also == "layer" else y if self.also == "residual" else 0)
        out: Tensor = self.head(x.mean(1))
        return out


@pytest.mark.parametrize("offset", [0.0, 3e3], ids=["plain", "an output that hardly moves"])
@pytest.mark.parametrize(("also", "folded"), [("nobody", True), ("layer", False), ("residual", False)])
def test_whoever_reads_the_tensor_too_stops_the_fold(also: str, folded: bool, offset: float) -> None:
    torch.manual_seed(0)
    model = Told(also).eval()
    with torch.no_grad():
        model.head.bias += offset
    signature = Signature((TensorSpec("x", torch.float32, ("batch", 5, 6)),))
    row = {"x": torch.randn(2, 5, 6)}
    anatomy = find(model, signature, row)
    context = Context(signature, anatomy, lambda: iter([row]), Surgery())
    weight = model.get_submodule("blocks.0.norm").weight
    group = [[site for site in anatomy.sites if site.path == "blocks.0.up"]]
    assert ("blocks.0.up" in folds(model, context, group)) is folded
    assert model.get_submodule("blocks.0.norm").weight is weight, "trying leaves the very parameters"


def test_a_copy_that_shares_the_parameters_keeps_its_values() -> None:
    model, signature, rows = digits()
    memo = {id(parameter): parameter for parameter in model.parameters()}
    twin = copy.deepcopy(model, memo)
    kept = {name: parameter.detach().clone() for name, parameter in twin.named_parameters()}
    for place in found(model, signature, rows).values():
        place.apply(model, torch.full((place.channels,), 3.0))
    assert all(torch.equal(parameter, kept[name]) for name, parameter in twin.named_parameters())
