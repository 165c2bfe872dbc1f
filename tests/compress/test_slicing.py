"""Heads and neurons: found from gradients, taken out for good, and the result is the masked model's, in every family."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from families import build
from sweeps import swept
from torch import nn

from calibrate.errors import UserError
from calibrate.fidelity import sqnr_db
from compress.anatomy import find
from compress.layers import Absent
from compress.surgery import Surgery
from compress.width.permuting import reorder
from compress.width.slicing import slice_units
from compress.width.units import Units, Unseparable, find_units, masked

WHOLE = [
    "bert", "roberta", "distilbert", "deberta_v2", "modernbert", "clip_text", "gpt2", "opt", "llama", "qwen2", "qwen3", "gemma2",
    "phi", "gpt_neox", "gptj", "vit", "deit", "dinov2", "dinov2_swiglu", "clip_vision", "swin", "pvt", "segformer", "cvt",
    "timm_vit", "timm_vit_qknorm", "timm_deit_distilled", "timm_swin", "timm_mobilevit",
]  # fmt: skip
"""Families in which every block that has heads and neurons can lose any of them."""
PART = ["bart", "siglip_vision", "mobilevit", "timm_visformer"]
"""Families with other blocks beside: a decoder with two attentions, a pooling head, convolutions without bottleneck."""


def units_of(name: str) -> tuple[Any, Any, Any, list[Units | Unseparable]]:
    try:
        model, signature, example = build(name)
    except ImportError as error:
        pytest.skip(str(error))
    return model, signature, example, find_units(model, signature, find(model, signature, example), example)


@pytest.fixture(autouse=True)
def _no_gradients() -> Any:
    with torch.no_grad():
        yield


@pytest.mark.parametrize(
    "name",
    swept(
        WHOLE + PART,
        {"bert", "gpt2", "llama", "vit", "swin", "bart"},
    ),
)
def test_sliced_is_masked_and_replays(name: str) -> None:
    model, signature, example, found = units_of(name)
    units = [one for one in found if isinstance(one, Units)]
    assert {one.kind for one in units} == {"head", "neuron"}
    others = [one.reason for one in found if isinstance(one, Unseparable) and "has one head only" not in one.reason]
    assert bool(others) == (name in PART), others
    surgery, before = Surgery(), sum(p.numel() for p in model.parameters())
    for one in units:
        gone = [0] if one.kind == "head" else list(range(0, len(one), 3))
        slice_units(model, surgery, signature, example, one, gone)  # compares with the masked model itself
    assert sum(p.numel() for p in model.parameters()) < before
    out = signature.call(model, example)
    again, _, _ = build(name)
    Surgery().replay(again, surgery.edits)
    again.load_state_dict(model.state_dict(), assign=True)
    assert torch.equal(signature.call(again.eval(), example), out)


def test_finding_units_leaves_the_modes() -> None:
    model, signature, example = build("gpt2")
    model.train()
    next(iter(model.children())).eval()
    modes = [module.training for module in model.modules()]
    assert find_units(model, signature, find(model, signature, example), example)
    assert [module.training for module in model.modules()] == modes
    assert any(modes)
    assert not all(modes)


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "timm_vit"])
def test_masking_a_unit_is_zeroing_the_weights_that_read_it(name: str) -> None:
    model, signature, example, found = units_of(name)
    for one in found:
        assert isinstance(one, Units)
        gone = [len(one) - 1]
        with masked(model, one, gone):
            off = signature.call(model, example)
        assert sqnr_db(signature.call(model, example), off) < 80, "a mask that does nothing would pass every other test"
        weight = model.get_submodule(one.sink).weight
        kept = weight.detach().clone()
        columns = one.columns[gone].flatten()
        weight.data[(columns, slice(None)) if name == "gpt2" else (slice(None), columns)] = 0
        level = sqnr_db(signature.call(model, example), off)
        weight.data.copy_(kept)
        assert level > 100 or level == math.inf


def test_heads_that_share_keys_go_together() -> None:
    _, _, _, found = units_of("llama")
    heads = found[0]
    assert isinstance(heads, Units)
    assert (len(heads), heads.heads) == (2, 2)
    with_own = units_of("bert")[3][0]
    assert isinstance(with_own, Units)
    assert (len(with_own), with_own.heads) == (4, 1)


def test_interleaved_projections_are_read_from_gradients() -> None:
    """GPT-NeoX keeps query, key and value of a head together; GPT-2 keeps all queries together."""
    neox, gpt2 = units_of("gpt_neox")[3][0], units_of("gpt2")[3][0]
    assert isinstance(neox, Units)
    assert isinstance(gpt2, Units)
    (rows,) = neox.rows.values()
    assert rows[0].tolist() == list(range(24))
    (rows,) = gpt2.rows.values()
    assert rows[0].tolist() == [*range(8), *range(32, 40), *range(64, 72)]


def test_a_norm_over_all_heads_is_named() -> None:
    found = units_of("olmo2")[3]
    assert [one.reason for one in found if isinstance(one, Unseparable)] == [
        "all of them depend on the same rows (one norm over all heads, or keys and values that all share)"
    ] * 2


@pytest.mark.parametrize("fault", [RuntimeError, KeyboardInterrupt])
def test_a_model_is_left_as_it_was_whatever_goes_wrong(fault: type[BaseException], monkeypatch: pytest.MonkeyPatch) -> None:
    """Out of memory in the run that follows, or stopped by hand."""
    model, signature, example = build("gpt2")
    units = next(one for one in find_units(model, signature, find(model, signature, example), example) if isinstance(one, Units))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def left() -> bool:
        after = model.state_dict()
        return before.keys() == after.keys() and all(torch.equal(tensor, after[name]) for name, tensor in before.items())

    def fails(*_: Any, **__: Any) -> Any:
        assert not left()
        raise fault("no memory")

    surgery = Surgery()
    monkeypatch.setattr("compress.width.slicing._settle", fails)
    with pytest.raises(fault, match="no memory"):
        slice_units(model, surgery, signature, example, units, [0])
    assert left()
    assert not surgery.edits
    monkeypatch.setattr("compress.width.permuting.sqnr_db", fails)
    with pytest.raises(fault, match="no memory"):
        reorder(model, signature, example, units, list(range(len(units)))[::-1])
    assert left()


def test_a_model_that_cannot_follow_is_left_as_it_was() -> None:
    model, signature, example, found = units_of("bloom")  # its position biases count the heads of the configuration
    before = signature.call(model, example)
    heads = found[0]
    assert isinstance(heads, Units)
    surgery = Surgery()
    with pytest.raises(UserError, match="block 0 does not run"):
        slice_units(model, surgery, signature, example, heads, [0])
    assert surgery.edits == []
    assert torch.equal(signature.call(model, example), before)


@pytest.mark.parametrize("name", ["bert", "gpt2", "vit"])
def test_a_sublayer_without_units_keeps_its_bias(name: str) -> None:
    model, signature, example, found = units_of(name)
    surgery = Surgery()
    for one in found[:2]:
        assert isinstance(one, Units)
        bias = model.get_submodule(one.sink).bias.detach().clone()
        slice_units(model, surgery, signature, example, one, range(len(one)))
        left = model.get_submodule(one.sink)
        assert isinstance(left, Absent)
        assert torch.equal(left(torch.ones(1, 2, 1))[0, 1], bias)
    names = [type(module).__name__ for module in model.get_submodule(found[0].sink.split(".")[0]).modules()]
    assert names.count("Absent") >= 3
    again, _, _ = build(name)
    Surgery().replay(again, surgery.edits)
    again.load_state_dict(model.state_dict(), assign=True)
    assert torch.equal(signature.call(again.eval(), example), signature.call(model, example))


def test_flops_of_all_units_are_those_of_the_block() -> None:
    """Without norms and biases a block's FLOPs are its projections and products, and each belongs to one unit."""
    model, signature, example, found = units_of("llama")
    block = find(model, signature, example).blocks[0]
    mine = [one for one in found if isinstance(one, Units) and one.block == 0]
    matrices = sum(site.flops for site in block.sites if "norm" not in site.roles) + block.attention_flops
    assert math.isclose(sum(len(one) * one.flops for one in mine), matrices, rel_tol=1e-9)


def test_narrow_keeps_parameters_parameters() -> None:
    model, surgery = nn.Sequential(nn.Linear(4, 3)), Surgery()
    surgery.narrow(model, "0", "weight", 0, [2, 0])
    assert isinstance(model[0].weight, nn.Parameter)
    assert model[0].weight.shape == (2, 4)
    assert surgery.edits[0].json()["config"] == {"name": "weight", "axis": 0, "size": 2}
