"""``smooth: repq``: what leaves norms has a scale and a zero point for each channel, in files that know one of each."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from families import build
from pydantic import ValidationError
from torch import nn
from trial import Trial, digits, rebuilt, tried

from calibrate.fidelity import sqnr_db
from calibrate.signature import Batch, Signature
from compress.anatomy import Site, find
from compress.layers import QuantLinear
from compress.passes.contract import Context
from compress.passes.quantize import Quantize
from compress.quantization.folding import Fold, folds
from compress.surgery import Surgery

Subject = tuple[nn.Module, Signature, list[Batch]]
NORMS = {f"blocks.{i}.norm{j}" for i in range(4) for j in (1, 2)}


@functools.cache
def uneven() -> Subject:
    """The digits model, in whose norms one channel is wide and one lies far from zero; the layers after them make up for it."""
    model, signature, rows = digits()
    model = copy.deepcopy(model)
    with torch.no_grad():
        for block in model.blocks:  # type: ignore[union-attr]
            for norm, reader in (("norm1", "attn.qkv"), ("norm2", "mlp.fc1")):
                made, layer = block.get_submodule(norm), block.get_submodule(reader)
                layer.bias -= 40 * layer.weight[:, 7]
                made.bias[7] += 40
                made.weight[11] *= 30
                made.bias[11] *= 30
                layer.weight[:, 11] /= 30
    return model, signature, rows


def run(smooth: Any, subject: Subject, **options: Any) -> Trial:
    return tried(Quantize(smooth=smooth, activation_symmetric=False, **options), *subject)


def folded(model: nn.Module, signature: Signature, rows: list[Batch]) -> dict[str, Fold]:
    anatomy = find(model, signature, {name: tensor[:2] for name, tensor in rows[0].items()})
    context = Context(signature, anatomy, lambda: iter(rows), Surgery(), seed=1)
    groups: list[list[Site]] = [[site] for site in anatomy.sites if site.kind == "linear" and site.block is not None]
    return folds(model, context, groups, shifted=True)


def test_it_moves_into_norms_and_costs_nothing_when_the_model_runs() -> None:
    trial = run("repq", digits())
    told = trial.context.report["reparameterized"]
    assert set(told["norms"].values()) == NORMS
    assert set(told["left"]) == {f"blocks.{i}.{name}" for i in range(4) for name in ("attn.proj", "mlp.fc2")}
    assert not any("factor" in name for name in trial.after.state_dict() if "qkv" in name or "fc1" in name)
    assert trial.sqnr_db > run(False, digits()).sqnr_db
    assert torch.equal(trial.outputs(rebuilt(trial)), trial.outputs(trial.after))


def test_offsets_and_widths_of_channels_cost_a_tenth_at_most() -> None:
    noise = {smooth: 10 ** (-run(smooth, uneven()).sqnr_db / 10) for smooth in ("repq", True, False)}
    assert noise["repq"] * 10 < noise[False]
    assert noise["repq"] < noise[True]


def test_the_scale_and_zero_point_in_the_layer_are_those_that_were_made() -> None:
    trial = run("repq", uneven())
    layer = trial.after.get_submodule("blocks.1.mlp.fc1")
    assert isinstance(layer, QuantLinear)
    assert layer.activation is not None
    says = trial.context.report["sites"]["blocks.1.mlp.fc1"]["activation"]
    assert says["folded_into"] == "blocks.1.norm2"
    assert says["scale"] == float(layer.activation.scale) == float(layer.activation.scale.half())
    assert says["channel_zero_points"][0] < -128  # beyond the codes: no zero is in that channel
    assert -128 <= says["zero_point"] <= 127
    assert trial.after.get_submodule("blocks.1.norm2").bias[7].abs() < 20  # type: ignore[union-attr,operator]


def test_a_fold_with_a_shift_is_exact_in_float64() -> None:
    model, signature, rows = uneven()
    places = folded(model, signature, rows)
    assert {place.producer for place in places.values()} == NORMS
    wide, x = copy.deepcopy(model).double(), rows[0]["pixels"].double()
    with torch.no_grad():
        before = wide(x)
        generator = torch.Generator().manual_seed(0)
        for place in places.values():
            factor = torch.rand(place.channels, generator=generator, dtype=torch.float64) * 4 + 0.1
            place.apply(wide, factor, 9 * torch.randn(place.channels, generator=generator, dtype=torch.float64))
        assert sqnr_db(before, wide(x)) > 200


def test_where_a_bias_is_missing_or_somebody_else_reads_it_stays_as_it_is() -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    model, signature, rows = build("llama")
    assert folded(model, signature, [rows]) == {}
    model, signature, rows = build("bert")  # its norms end in the residual stream, which the next ones read too
    assert folded(model, signature, [rows]) == {}


def test_layers_that_read_one_norm_take_one_shift() -> None:
    model, signature, rows = build("vit")
    trial = tried(Quantize(smooth="repq", activation_symmetric=False), model, signature, [rows])
    told = trial.context.report["reparameterized"]["norms"]
    assert len(told) == len(set(told.values())) >= 4
    assert trial.sqnr_db > 20


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, "activation_symmetric: false"),
        ({"activations": "dynamic", "activation_symmetric": False}, "zero points"),
        ({"range": "hessian", "activation_symmetric": False}, "range: hessian would search again"),
        ({"engine": "nncf", "activation_symmetric": False}, "NNCF has no repq factors"),
    ],
    ids=str,
)
def test_what_does_not_go_together_is_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        Quantize(smooth="repq", **options)
