"""Repair of a projection: planted dependence is recovered, padding does not count, and nothing is applied that does not help."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from families import build
from torch import Tensor, nn

from calibrate.signature import Batch
from compress.layers import Absent
from compress.width.repair import held_out, outputs_at, repair


class Chain(nn.Module):
    """What the projection receives, and the projection."""

    def __init__(self, sink: nn.Module) -> None:
        super().__init__()
        self.body = nn.Linear(6, 8)
        self.sink = sink

    def forward(self, x: Tensor) -> Tensor:
        after: Tensor = self.sink(self.body(x))
        return after


def call(model: nn.Module, batch: Batch) -> Tensor:
    found: Tensor = model(batch["x"])
    return found


def rows(count: int = 4, seed: int = 0, **more: Tensor) -> list[Batch]:
    generator = torch.Generator().manual_seed(seed)
    return [{"x": torch.randn(8, 5, 6, generator=generator), **more} for _ in range(count)]


@pytest.fixture(autouse=True)
def _still() -> Any:
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def test_a_planted_dependence_is_recovered_exactly() -> None:
    original = Chain(nn.Linear(8, 3))
    hurt = copy.deepcopy(original)
    hurt.sink.weight.data[:, :3] = 0  # 8 inputs of the sink hang on 6 numbers: two are not needed
    told = repair(hurt, call, "sink", outputs_at(original, call, "sink"), rows(), rows(2, 1))
    assert told.before > 0.05
    assert told.after < 1e-5
    assert told.ridge is not None


def test_what_helps_nothing_is_not_applied() -> None:
    original = Chain(nn.Linear(8, 3))
    same = copy.deepcopy(original)
    weight = same.sink.weight
    told = repair(same, call, "sink", outputs_at(original, call, "sink"), rows(), rows(2, 1))
    assert told.ridge is None
    assert same.sink.weight is weight
    assert told.because


def test_noise_is_not_fitted() -> None:
    """The wanted outputs are noise on the rows to fit and what the projection gives on the others."""
    model = Chain(nn.Linear(8, 3))
    before = model.sink.weight.clone()
    true = outputs_at(copy.deepcopy(model), call, "sink")
    held = rows(2, 1)
    noise = torch.Generator().manual_seed(5)

    def wanted(batch: Batch) -> Tensor:
        given = true(batch)
        return given if any(batch is one for one in held) else torch.randn(given.shape, generator=noise)

    assert repair(model, call, "sink", wanted, rows(), held).ridge is None
    assert torch.equal(model.sink.weight, before)


def test_padded_positions_do_not_count() -> None:
    """Padding in which the wanted outputs are wild must not matter."""
    mask = torch.ones(8, 5)
    mask[:, 3:] = 0
    original, results = Chain(nn.Linear(8, 3)), []
    for wild in (0.0, 1e4):
        hurt = copy.deepcopy(original)
        hurt.sink.weight.data[:, :4] = 0
        true = outputs_at(original, call, "sink")

        def wanted(batch: Batch, wild: float = wild, true: Any = true) -> Tensor:
            found: Tensor = true(batch) + wild * (1 - mask).unsqueeze(-1)
            return found

        repair(hurt, call, "sink", wanted, rows(attention_mask=mask), rows(2, 1, attention_mask=mask))
        results.append(hurt.sink.weight.clone())
    assert torch.equal(*results)


def test_another_model_that_shares_the_weight_keeps_its_own() -> None:
    original = Chain(nn.Linear(8, 3))
    other = Chain(original.sink)
    before = original.sink.weight
    target = Chain(nn.Linear(8, 3))
    held: nn.Module = copy.copy(original.sink)
    held._parameters = dict(original.sink._parameters)
    other.sink = held
    assert repair(other, call, "sink", outputs_at(target, call, "sink"), rows(), rows(2, 1)).ridge is not None
    assert original.sink.weight is before


def test_an_absent_layer_gets_the_mean_as_its_bias() -> None:
    original, without = Chain(nn.Linear(8, 3)), Chain(Absent(3, bias=True))
    without.body.load_state_dict(original.body.state_dict())
    fit = rows()
    repair(without, call, "sink", outputs_at(original, call, "sink"), fit, rows(2, 1))
    mean = torch.cat([original(batch["x"]) for batch in fit]).mean((0, 1))
    assert torch.allclose(without.sink.bias, mean, atol=1e-6)


def test_what_cannot_be_repaired_is_said() -> None:
    model = Chain(Absent(3))
    told = repair(model, call, "sink", lambda batch: batch["x"], rows(), rows(1))
    assert told.ridge is None
    assert "no bias" in told.because


@pytest.mark.parametrize(("family", "path"), [("gpt2", "transformer.h.0.mlp.c_proj"), ("segformer", None)])
def test_other_layouts(family: str, path: str | None) -> None:
    """GPT-2 keeps [I, O]; a 1 x 1 convolution has its channels in the middle."""
    if path is None:
        original: nn.Module = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1))
        batches = [{"x": torch.randn(4, 3, 6, 6)} for _ in range(4)]
        ask, path = call, "1"
    else:
        original, signature, example = build(family)
        batches, ask = [example, example], signature.call
    hurt = copy.deepcopy(original)
    bias = hurt.get_submodule(path).bias
    bias.data += 1
    told = repair(hurt, ask, path, outputs_at(original, ask, path), batches[:-1], batches[-1:])
    assert told.after < 1e-3 * told.before


def test_rows_are_held_out_of_each_batch() -> None:
    fit, held = held_out(rows(3))
    assert [len(batch["x"]) for batch in fit] == [6, 6, 6]
    assert [len(batch["x"]) for batch in held] == [2, 2, 2]
    single = [{"x": torch.zeros(1, 1)} for _ in range(8)]
    fit, held = held_out(single)
    assert (len(fit), len(held)) == (6, 2)
