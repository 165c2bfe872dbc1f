"""Gradients of random combinations of the outputs, against derivatives that are known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from calibrate.errors import UserError
from calibrate.signature import Batch
from compress.quantization.output_gradients import felt, felt_again, table_moment


class Reads(nn.Module):
    """A table, a layer on each position, and a mean over the positions that count, weighted by place."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(20, 6)
        self.layer = nn.Linear(6, 5)
        self.head = nn.Linear(5, outputs)
        self.register_buffer("place", torch.tensor([4.0, 1.0, 0.0, 0.5]))

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        held = self.layer(self.table(ids)) * (self.place * mask).unsqueeze(-1)
        given: Tensor = self.head(held.sum(1))
        return given


def call(model: nn.Module, batch: Batch) -> Tensor:
    given: Tensor = model(batch["ids"], batch["attention_mask"])
    return given


def rows(count: int = 24) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    mask = torch.ones(count, 4)
    mask[::2, 3] = 0
    return [{"ids": torch.randint(0, 20, (count, 4), generator=generator), "attention_mask": mask}]


def test_with_one_output_the_tables_moment_is_the_outer_product_of_its_derivative() -> None:
    model = Reads(1)
    slope = (model.head.weight @ model.layer.weight)[0].detach()
    places = model.get_buffer("place").expand(24, 4)[rows()[0]["attention_mask"] != 0]
    expected = torch.outer(slope, slope) * places.square().mean()
    found = table_moment(model, call, rows(), "table")
    assert torch.allclose(found.matrix, expected, rtol=1e-4, atol=1e-6 * float(expected.abs().max()))
    assert found.count == 4 * len(places)  # four probes


def test_with_many_outputs_it_comes_near_the_derivatives_square() -> None:
    model = Reads(3)
    slope = (model.head.weight @ model.layer.weight).detach()
    places = model.get_buffer("place").expand(400, 4)[rows(400)[0]["attention_mask"] != 0]
    expected = slope.t() @ slope * places.square().mean()
    found = table_moment(model, call, rows(400), "table").matrix
    assert float((found - expected).norm() / expected.norm()) < 0.15  # 50 pieces of four probes
    halved = table_moment(model, call, rows(8), "table").matrix
    assert float((halved - expected).norm() / expected.norm()) > 0.01  # so few are not exact: the bound above can fail


@pytest.mark.parametrize("path", ["layer"])
def test_what_is_felt_is_what_runs_and_padding_is_left_out(path: str) -> None:
    model = Reads(1)
    batch = rows()[0]
    counts = batch["attention_mask"] != 0
    found = felt(model, call, [batch], [path], positions=10_000)[path]
    assert torch.equal(found.inputs, model.table(batch["ids"])[counts].detach())
    expected = (model.get_buffer("place").expand(24, 4)[counts].unsqueeze(1) * model.head.weight.detach()).square()
    assert torch.allclose(found.slopes, expected, rtol=1e-4)
    few = felt(model, call, [batch], [path], positions=30)[path]
    assert few.inputs.shape[0] == few.slopes.shape[0] == 30
    assert torch.equal(few.inputs, felt(model, call, [batch], [path], positions=30)[path].inputs)


@pytest.mark.parametrize("positions", [30, 10_000])
def test_what_is_received_again_is_at_the_very_positions(positions: int) -> None:
    model = Reads(1)
    before = felt(model, call, rows(), ["layer", "head"], positions=positions)
    again = felt_again(model, call, rows(), before)
    assert all(torch.equal(again[path], one.inputs) for path, one in before.items())
    with torch.no_grad():
        model.table.weight *= 2
    again = felt_again(model, call, rows(), before)
    assert torch.equal(again["layer"], 2 * before["layer"].inputs)
    assert not any(module._forward_pre_hooks for module in model.modules())


class Chooses(Reads):
    """Gives the place of its largest number, which has no gradient."""

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return super().forward(ids, mask).argmax(-1, keepdim=True).float()


def test_outputs_without_a_gradient_are_refused() -> None:
    with pytest.raises(UserError, match="no gradient of the outputs reaches layer"):
        felt(Chooses(3), call, rows(), ["layer"], positions=8)


def test_nothing_is_left_behind() -> None:
    model = Reads(2)
    model.train()
    model.head.weight.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    felt(model, call, rows(), ["layer", "table"], positions=8)
    assert model.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert [parameter.requires_grad for parameter in model.parameters()] == [True, True, True, False, True]
    assert all(torch.equal(before[name], tensor) and tensor.grad is None for name, tensor in model.state_dict().items())


class Repeats(nn.Module):
    """One layer runs on the input and, a hundred times larger, on what it gave, as layers that share weights do."""

    def __init__(self, calls: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.calls = calls
        self.layer = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.calls - 1):
            x = 100 * self.layer(x)
        given: Tensor = self.layer(x)
        return given


@pytest.mark.parametrize("calls", [1, 2])
def test_every_call_of_a_layer_is_felt(calls: int) -> None:
    model = Repeats(calls)
    x = torch.randn(16, 6)
    found = felt(model, lambda model, batch: model(batch["x"]), [{"x": x}], ["layer"], positions=10_000)["layer"]
    assert found.inputs.shape == found.slopes.shape == (16 * calls, 6)
    later = 100 * model.layer(x).detach()
    assert float(found.inputs.max()) == pytest.approx(float((x if calls == 1 else later).max()), rel=1e-5)
    assert bool((found.slopes.sum(1) > 0).all())
    few = felt(model, lambda model, batch: model(batch["x"]), [{"x": x}], ["layer"], positions=8)["layer"]
    assert len(few.inputs) == 8
    again = felt_again(model, lambda model, batch: model(batch["x"]), [{"x": x}], {"layer": few})["layer"]
    assert torch.equal(again, few.inputs)
