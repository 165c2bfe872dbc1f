"""Steps that are orthogonal: their singular values, their size, and which weights take them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from compress.distillation.muon import Muon, matrices, orthogonal


def drawn(rows: int, columns: int, spread: float, seed: int = 0) -> Tensor:
    """A matrix whose singular values fall from 1 to 1 / spread."""
    generator = torch.Generator().manual_seed(seed)
    least = min(rows, columns)
    left = torch.linalg.qr(torch.randn(rows, least, generator=generator))[0]
    right = torch.linalg.qr(torch.randn(columns, least, generator=generator))[0]
    made: Tensor = left @ torch.diag(torch.logspace(0, -torch.log10(torch.tensor(spread)).item(), least)) @ right.T
    return made


@pytest.mark.parametrize("shape", [(48, 48), (96, 32), (32, 96)])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_singular_values_come_near_to_one(shape: tuple[int, int], scale: float) -> None:
    values = torch.linalg.svdvals(orthogonal(drawn(*shape, spread=20) * scale))
    assert float(values.max()) < 1.25
    assert float(values.min()) > 0.65


def test_directions_stay_and_turn_with_the_matrix() -> None:
    matrix, turn = drawn(48, 32, spread=10), drawn(48, 48, spread=1.0, seed=1)
    assert torch.allclose(orthogonal(turn @ matrix), turn @ orthogonal(matrix), atol=1e-4)
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    along = left.T @ orthogonal(matrix) @ right.T
    assert torch.allclose(along, torch.diag(torch.diagonal(along)), atol=1e-4), "the same left and right vectors"


def test_a_gradient_of_zeros_moves_nothing() -> None:
    assert orthogonal(torch.zeros(8, 4)).equal(torch.zeros(8, 4))


@pytest.mark.parametrize("shape", [(64, 64), (256, 64)])
def test_a_step_is_as_large_as_one_of_adam(shape: tuple[int, int]) -> None:
    weight = nn.Parameter(torch.zeros(shape))
    weight.grad = drawn(*shape, spread=5)
    Muon([weight], lr=0.01).step()
    assert float(weight.detach().square().mean().sqrt()) == pytest.approx(0.01 * 0.2, rel=0.25)


def test_directions_in_which_little_changes_are_learnt_as_fast() -> None:
    """Least squares with curvatures from 1 to 1 / 1600: what descent along the gradient leaves for the end."""
    target, inputs = drawn(32, 32, spread=1.0), drawn(32, 32, spread=40, seed=2)
    left = {}
    for name in ("muon", "gradient"):
        weight = nn.Parameter(torch.zeros(32, 32))
        makes: torch.optim.Optimizer = Muon([weight], lr=0.02) if name == "muon" else torch.optim.SGD([weight], lr=0.5)
        for _ in range(60):
            makes.zero_grad()
            ((weight - target) @ inputs).square().sum().backward()  # type: ignore[no-untyped-call]
            makes.step()
        left[name] = float((weight.detach() - target).square().sum() / target.square().sum())
    assert left["muon"] < 0.3 * left["gradient"]


def test_projections_are_taken_once_and_tables_and_classifiers_are_not() -> None:
    model = nn.ModuleDict(
        {"table": nn.Embedding(64, 32), "up": nn.Linear(32, 64), "tied": nn.Linear(32, 64), "head": nn.Linear(64, 10),
         "norm": nn.LayerNorm(32), "reads": nn.Linear(32, 64, bias=False)}
    )  # fmt: skip
    model["tied"].weight = model["up"].weight
    model["reads"].weight = model["table"].weight
    assert [id(one) for one in matrices(model)] == [id(model["up"].weight)]
