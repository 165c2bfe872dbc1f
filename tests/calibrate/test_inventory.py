"""Inventories: bytes are conserved, identity changes nothing, tied tensors count once."""

from __future__ import annotations

import torch
from torch import nn

from calibrate.inventory import Entry, difference, inventory


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4), nn.Linear(4, 2, dtype=torch.float16))


def test_bytes_are_conserved() -> None:
    model = _model()
    tensors = [*model.parameters(), *model.buffers()]
    found = inventory(model)
    stored = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    assert sum(entry.bytes for entry in found.values()) == stored
    assert found["0.weight"] == Entry("parameter", "float32", (4, 8), 128)
    assert found["2.weight"] == Entry("parameter", "float16", (2, 4), 16)
    assert found["1.num_batches_tracked"] == Entry("buffer", "int64", (), 8)


def test_identity_is_an_empty_difference() -> None:
    found = inventory(_model())
    same = difference(found, inventory(_model()))
    assert not same
    assert len(same) == 0
    assert same.bytes_before == same.bytes_after == sum(entry.bytes for entry in found.values())


def test_what_is_added_removed_and_changed_accounts_for_every_byte() -> None:
    model = _model()
    before = inventory(model)
    model[0] = nn.Linear(8, 4, bias=False)
    model[2] = nn.Linear(4, 2)
    model.register_buffer("scale", torch.ones(3))
    found = difference(before, inventory(model))
    assert set(found.removed) == {"0.bias"}
    assert set(found.added) == {"scale"}
    assert set(found.changed) == {"2.weight", "2.bias"}
    assert len(found) == 4
    moved = sum(entry.bytes for entry in found.added.values()) - sum(entry.bytes for entry in found.removed.values())
    grown = sum(new.bytes - old.bytes for old, new in found.changed.values())
    assert found.bytes_after - found.bytes_before == moved + grown
    back = difference(inventory(model), before)
    assert (set(back.removed), set(back.added)) == (set(found.added), set(found.removed))


def test_tied_tensors_count_once_and_equal_ones_twice() -> None:
    tied = nn.ModuleDict({"embedding": nn.Embedding(6, 4), "head": nn.Linear(4, 6, bias=False)})
    tied["head"].weight = tied["embedding"].weight
    assert set(inventory(tied)) == {"embedding.weight"}
    tied["head"].weight = nn.Parameter(tied["embedding"].weight.detach().clone())
    assert set(inventory(tied)) == {"embedding.weight", "head.weight"}
    tied["head"].weight = nn.Parameter(tied["embedding"].weight.detach())  # another object on the same memory
    assert set(inventory(tied)) == {"embedding.weight"}


def test_a_buffer_that_shares_a_parameters_memory_counts_once() -> None:
    model = nn.Linear(4, 4)
    model.register_buffer("copy", model.weight.detach())
    assert "copy" not in inventory(model)


def test_empty_and_meta_tensors_are_kept_apart() -> None:
    model = nn.Module()
    model.register_buffer("first", torch.empty(0))
    model.register_buffer("second", torch.empty(0))
    model.register_buffer("third", torch.empty(4, device="meta"))
    model.register_buffer("fourth", torch.empty(4, device="meta"))
    assert set(inventory(model)) == {"first", "second", "third", "fourth"}
