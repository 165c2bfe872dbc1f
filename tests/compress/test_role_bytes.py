"""Bytes by role: they add up to the inventory, tied tensors count once, and layers are followed through passes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from calibrate.inventory import inventory
from calibrate.signature import Batch, Signature
from compress.anatomy import find
from compress.passes import Context
from compress.passes.drop_layers import DropLayers
from compress.passes.quantize import Quantize
from compress.role_bytes import Roles, bytes_by_role, holders_of
from compress.surgery import Surgery


def built(family: str) -> tuple[nn.Module, Signature, Batch]:
    families = pytest.importorskip("families")
    try:
        made: tuple[nn.Module, Signature, Batch] = families.build(family)
    except ImportError:
        pytest.skip("needs the extras hf and timm")
    return made


def stored(model: nn.Module) -> int:
    return sum(entry.bytes for entry in inventory(model).values())


def weights(model: nn.Module, *paths: str) -> int:
    """Bytes of whole modules."""
    return sum(tensor.nbytes for path in paths for tensor in model.get_submodule(path).state_dict().values())


FAMILIES = ["bert", "bert_mlm", "gpt2", "albert", "llama", "timm_vit", "timm_swin"]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_roles_add_up_to_the_inventory_before_and_after(family: str) -> None:
    model, signature, rows = built(family)
    anatomy = find(model, signature, rows)
    roles, total = Roles.of(model, anatomy), stored(model)
    before = roles.before
    assert sum(before.values()) == total
    assert before.get("other", 0) < 0.5 * stored(model)
    surgery = Surgery()
    context = Context(signature, anatomy, lambda: iter([rows]), surgery)
    model = Quantize(weights=8, activations="none").run(model, context)
    told = roles.after(model, surgery.edits)
    assert (sum(one.before for one in told), sum(one.after for one in told)) == (total, stored(model))
    assert stored(model) < total
    assert {one.role: one.before for one in told if one.before} == before
    for one in told:
        if one.role.startswith("mlp"):
            assert 0.2 * one.before < one.after < 0.6 * one.before, "its matrices were quantized, whatever they are called now"
        if one.role in ("norm", "other"):
            assert one.after == one.before


def test_roles_are_what_is_in_their_modules() -> None:
    model, signature, rows = built("bert")
    found = bytes_by_role(model, holders_of(find(model, signature, rows)))
    layers = [f"bert.encoder.layer.{number}" for number in (0, 1)]
    assert found["attention.query"] == weights(model, *(f"{layer}.attention.self.query" for layer in layers))
    assert found["mlp.down"] == weights(model, *(f"{layer}.output.dense" for layer in layers))
    tables = [f"bert.embeddings.{name}_embeddings" for name in ("word", "position", "token_type")]
    assert found["embedding"] == weights(model, *tables)
    assert found["other"] == sum(buffer.nbytes for buffer in model.buffers()), "position ids and the like have no role"


def test_a_tied_head_counts_with_its_table() -> None:
    model, signature, rows = built("bert_mlm")
    found = bytes_by_role(model, holders_of(find(model, signature, rows)))
    table: Any = model.get_submodule("bert.embeddings.word_embeddings").weight
    assert model.get_submodule("cls.predictions.decoder").weight is table
    assert found["embedding"] >= table.nbytes
    assert found["head"] < table.nbytes, "its weight is the table's: what is left is the bias and the transform"


def test_a_dropped_block_takes_its_bytes_with_it_and_the_others_keep_their_roles() -> None:
    model, signature, rows = built("bert")
    anatomy = find(model, signature, rows)
    roles = Roles.of(model, anatomy)
    with torch.no_grad():  # the blocks are told apart by their size
        first: Any = model.get_submodule("bert.encoder.layer.0.output.dense")
        first.bias = nn.Parameter(torch.zeros(32, dtype=torch.float64))
    surgery = Surgery()
    model = DropLayers(blocks=[0]).run(model, Context(signature, anatomy, lambda: iter([rows]), surgery))
    after = {one.role: one.after for one in roles.after(model, surgery.edits)}
    assert sum(after.values()) == stored(model)
    for role, held in roles.before.items():
        inside = role.startswith(("attention", "mlp"))
        assert after[role] == (held // 2 if inside else after["norm"] if role == "norm" else held), role
    assert after["norm"] < roles.before["norm"]
