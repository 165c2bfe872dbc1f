"""A model run in float64 and put back: the very same tensors, ties and caches after it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from calibrate.signature import Signature, TensorSpec
from compress.rehearsal import stand_in
from compress.rewrites.precision import difference, doubled, in_double, output

SIGNATURE = Signature((TensorSpec("x", torch.float32, ("batch", 6)),), "tensor")
ROWS = {"x": torch.randn(3, 6, generator=torch.Generator().manual_seed(0))}


class Keeps(nn.Module):
    """Computes in float32 by name, ties two weights, and keeps a tensor for later calls that ``eval`` forgets."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
        self.b.weight = self.a.weight
        self.register_buffer("factor", torch.full((6,), 1 / 3))
        self.kept: dict[str, Tensor] = {}

    def train(self, mode: bool = True) -> Keeps:
        super().train(mode)
        if self.kept:
            self.kept = {}
        return self

    def forward(self, x: Tensor) -> Tensor:
        if "bias" not in self.kept:
            self.kept["bias"] = (self.a.bias * self.factor).detach()  # type: ignore[operator]
        wide = self.b(self.a(x)).to(torch.float32).float()
        made: Tensor = wide.softmax(-1, dtype=torch.float32).to(x.dtype) @ torch.eye(6, dtype=x.dtype) + self.kept["bias"]
        return made


def test_it_is_float64_all_the_way_and_float32_again_after() -> None:
    model = Keeps().eval()
    model(ROWS["x"])
    twin, tensors = stand_in(model), dict(model.state_dict(keep_vars=True))
    with doubled(model):
        wide = output(model, SIGNATURE, ROWS)
        assert all(tensor.dtype == torch.float64 for tensor in model.state_dict().values())
        assert model.b.weight is model.a.weight
        assert all(tensor.dtype == torch.float32 for tensor in twin.state_dict().values()), "a copy that shares them keeps them"
    exact = copy.deepcopy(model).double()
    exact.kept = {}
    with in_double(), torch.no_grad():
        assert difference(exact(ROWS["x"].double()), wide) == 0.0
    assert difference(exact(ROWS["x"].double()).double(), wide) > 1e-9, "float32 by name is seen"
    assert all(value is tensors[name] for name, value in model.state_dict(keep_vars=True).items())
    assert model.kept["bias"].dtype == torch.float32
    assert model(ROWS["x"]).dtype == torch.float32
    assert torch.get_default_dtype() == torch.float32


def test_what_came_in_meanwhile_has_the_models_type() -> None:
    model = Keeps().eval()
    with doubled(model):
        model.a = nn.Linear(6, 6).double()
        model.b.weight = nn.Parameter(torch.zeros(6, 6, dtype=torch.float64))
    assert all(tensor.dtype == torch.float32 for tensor in model.state_dict().values())


@pytest.mark.parametrize(
    ("after", "expected"),
    [([1.0, 2.0, 4.0], 0.0), ([1.0, 2.0, 4.4], 0.1), ([1.0, 2.0, float("nan")], float("inf")), ([1.0, 2.0], float("inf"))],
)
def test_a_difference_is_relative_to_the_largest_value(after: list[float], expected: float) -> None:
    assert difference(torch.tensor([1.0, 2.0, 4.0]), torch.tensor(after)) == pytest.approx(expected, rel=1e-5)
