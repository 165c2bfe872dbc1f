"""That sorting units changes nothing but their order, in every family, and what it does with those it cannot sort."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from nesting import nest
from pydantic import ValidationError
from sweeps import swept
from torch import nn
from trial import Trial, digits, tried

from calibrate.errors import UserError
from calibrate.inventory import inventory
from calibrate.signature import Batch, Signature
from compress.anatomy import find
from compress.passes.nest_widths import NestWidths
from compress.passes.quantize import Quantize
from compress.width import nested
from compress.width.permuting import reorder
from compress.width.units import Units, find_units

EXAMPLE = NestWidths(score="magnitude")
FAMILIES = [
    "bert", "modernbert", "gpt2", "opt", "llama", "qwen3", "gpt_neox", "vit", "dinov2_swiglu", "swin", "pvt", "timm_vit",
    "timm_mobilevit",
]  # fmt: skip


def family(name: str) -> tuple[nn.Module, Signature, list[Batch]]:
    from families import build

    try:
        model, signature, example = build(name)
    except ImportError as error:
        pytest.skip(str(error))
    return model, signature, [example]


def swapped(trial: Trial) -> set[str]:
    before, after = trial.before.state_dict(), trial.after.state_dict()
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


@pytest.mark.parametrize("name", swept(FAMILIES, ["bert", "gpt2", "llama", "vit", "swin"]))
def test_the_function_stays(name: str) -> None:
    """GQA, fused and interleaved projections, gated and convolutional MLPs, tables of position biases."""
    model, signature, rows = family(name)
    trial = tried(NestWidths(score="magnitude"), model, signature, rows)
    assert trial.sqnr_db > 110
    assert trial.context.report["sqnr_db"] > 110
    assert swapped(trial), "what is not moved is not sorted"
    assert {entry["kind"] for entry in trial.context.report["sorted"]} == {"head", "neuron"}
    assert inventory(trial.after) == inventory(model)
    assert trial.context.edits == []


@pytest.mark.parametrize("name", swept(["bert", "llama", "gpt2", "swin"], ["llama", "swin"]))
def test_the_recorded_order_leads_back_bit_for_bit(name: str) -> None:
    model, signature, rows = family(name)
    trial = tried(NestWidths(score="random"), model, signature, rows)
    told = trial.context.nested
    assert told is not None
    for one in reversed(told.units):
        back = sorted(range(len(one)), key=one.order.__getitem__)
        reorder(trial.after, signature, rows[0], one.units, back)
    assert swapped(trial) == set()


def test_units_stand_in_the_order_of_their_importance() -> None:
    """Units that nothing reads come last, the one that is read most first."""
    model, signature, rows = digits()
    with torch.no_grad():
        down = model.get_parameter("blocks.1.mlp.fc2.weight")
        down[:, [3, 70, 200]] = 0
        down[:, 9] *= 50
        model.get_parameter("blocks.2.attn.proj.weight")[:, 16:32] = 0
    for options in ({"score": "magnitude"}, {"rows": 16}):
        told = tried(NestWidths.model_validate(options), model, signature, rows).context.nested
        assert told is not None
        neurons = next(one for one in told.units if (one.block, one.kind) == (1, "neuron"))
        assert set(neurons.order[-3:]) == {3, 70, 200}
        assert neurons.importance[-3:] == (0.0, 0.0, 0.0)
        assert neurons.order[0] == 9
        heads = next(one for one in told.units if (one.block, one.kind) == (2, "head"))
        assert heads.order[-1] == 1
        assert all(later <= earlier for earlier, later in zip(neurons.importance, neurons.importance[1:], strict=False))


def test_the_record_rebuilds_the_units(tmp_path: Path) -> None:
    model, signature, rows = family("phi3")
    trial = nest(tmp_path, model, signature, rows)
    expected = find_units(trial.after, signature, find(trial.after, signature, rows[0]), rows[0])
    read = nested.read(tmp_path, whole=True)
    for one, found in zip(read.units, expected, strict=True):
        assert isinstance(found, Units)
        again = one.units
        assert (again.block, again.kind, again.sink, again.heads) == (found.block, found.kind, found.sink, found.heads)
        assert again.columns.equal(found.columns)
        assert again.rows.keys() == found.rows.keys()
        assert all(again.rows[path].equal(found.rows[path]) for path in found.rows)


def test_the_given_model_is_left_alone() -> None:
    from compress.rehearsal import stand_in

    model, signature, rows = digits()
    before, copied = copy.deepcopy(model.state_dict()), copy.deepcopy(model)
    shared = stand_in(copied)
    anatomy = find(shared, signature, rows[0])
    from compress.passes.contract import Context
    from compress.surgery import Surgery

    EXAMPLE.run(shared, Context(signature, anatomy, lambda: iter(rows), Surgery()))
    assert all(torch.equal(tensor, copied.state_dict()[name]) for name, tensor in before.items())


def test_a_permutation_that_changes_the_function_is_not_done() -> None:
    """Bloom counts its heads for their position biases: they cannot change places."""
    model, signature, rows = family("bloom")
    trial = tried(NestWidths(score="magnitude"), model, signature, rows)
    assert all("computes something else" in why for why in trial.context.report["skipped"].values())
    assert len(trial.context.report["skipped"]) == 2
    assert trial.sqnr_db > 110
    assert all("attention" not in name for name in swapped(trial))
    neurons = tried(NestWidths(score="magnitude", heads=False), model, signature, rows)
    assert neurons.context.report["skipped"] == {}


def test_what_cannot_be_told_apart_is_named() -> None:
    model, signature, rows = family("mixtral")
    trial = tried(NestWidths(score="magnitude"), model, signature, rows)
    assert set(trial.context.report["skipped"]) == {"model.layers.0 (neurons)", "model.layers.1 (neurons)"}
    assert trial.sqnr_db > 110
    with pytest.raises(UserError, match="no block has units that can be sorted") as caught:
        tried(NestWidths(score="magnitude", heads=False), model, signature, rows)
    assert "experts" in caught.value.hint


def test_quantized_models_are_refused() -> None:
    model, signature, rows = digits()
    quantized = tried(Quantize(), model, signature, rows).after
    with pytest.raises(UserError, match="no block has units that can be sorted") as caught:
        tried(NestWidths(), quantized, signature, rows)
    assert "quantized already" in caught.value.hint


def test_only_trajectory_scores_read_rows() -> None:
    assert NestWidths().calibrates
    assert not NestWidths(score="magnitude").calibrates
    with pytest.raises(ValidationError, match="rows goes with score: trajectory"):
        NestWidths(score="magnitude", rows=16)
