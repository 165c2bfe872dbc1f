"""Norms of many families: what takes their factors, and which are no norms of positions."""

from __future__ import annotations

import pytest
import torch
from families import build
from sweeps import swept
from torch import nn

from calibrate.fidelity import sqnr_db
from compress.anatomy import find
from compress.layers import ChannelAffine
from compress.norms.joining import joinable
from compress.norms.merging import candidates, merge
from compress.norms.replacing import obstacles
from compress.surgery import Surgery


@pytest.mark.parametrize(("family", "into"), [("vit", True), ("bert", False), ("swin", True), ("llama", True)])
def test_factors_go_into_linear_readers_and_stay_where_the_norm_is_added(family: str, into: bool) -> None:
    """A model with random factors in the place of its first norms is the same function after they were folded."""
    model, signature, example = build(family)
    anatomy = find(model, signature, example)
    norms = [site.path for site in anatomy.sites if site.kind == "norm" and site.block is not None]
    norms = [path for path in norms if path not in obstacles(model, signature.call, example, norms)][:2]
    generator = torch.Generator().manual_seed(0)
    for path in norms:
        layer = ChannelAffine(int(model.get_submodule(path).get_parameter("weight").numel()))
        assert layer.weight is not None
        assert layer.bias is not None
        with torch.no_grad():
            layer.weight.uniform_(0.5, 2, generator=generator)
            layer.bias.normal_(generator=generator)
        Surgery().replace(model, path, layer)
    with torch.no_grad():
        before = signature.call(model, example)
    row = {name: tensor[:1] for name, tensor in example.items()}
    taken = {path: merge(model, Surgery(), path, signature.call, row, candidates(anatomy, path)) for path in norms}
    with torch.no_grad():
        assert sqnr_db(before, signature.call(model, example)) > 90
    if family == "llama":  # its projections have no bias that could take the constant
        assert not any(taken.values())
    else:
        assert all(bool(readers) is into for readers in taken.values())


def test_what_is_no_norm_of_positions_is_named() -> None:
    model, signature, example = build("mobilevit")
    norms = [site.path for site in find(model, signature, example).sites if site.kind == "norm"]
    batch_norms = {path for path in norms if isinstance(model.get_submodule(path), nn.BatchNorm2d)}
    assert batch_norms
    reasons = obstacles(model, signature.call, example, norms)
    assert batch_norms <= set(reasons)
    assert set(reasons) != set(norms)


@pytest.mark.parametrize(
    ("family", "says"),
    swept(
        [("vit", ""), ("bert", ""), ("llama", "its MLP has a gate"), ("mobilevit", "")],
        [("bert", ""), ("llama", "its MLP has a gate")],
    ),
)
def test_mlps_that_become_one_layer_are_tried(family: str, says: str) -> None:
    model, signature, example = build(family)
    anatomy = find(model, signature, example)
    blocks = [block for block in anatomy.blocks if any("mlp.up" in site.roles for site in block.sites)]
    found, reasons = joinable(model, anatomy, blocks)
    if says:
        assert not found
        assert all(says in reason for reason in reasons.values())
    else:
        assert set(found) == {block.path for block in blocks}
