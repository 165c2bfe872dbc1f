"""GPTQ and its refinement against round-to-nearest, a literal reading of the paper, and every assignment of a tiny weight."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from calibrate.grid import Bits, Grid
from compress.algorithms.gptq import NotPositiveDefinite, gptq, output_error, refined
from compress.algorithms.rounding import WeightRange, codes_of, scales_of

GRIDS = [
    Grid(8), Grid(4), Grid(2), Grid(4, False), Grid(4, True, "tensor"), Grid(4, True, "group", 8), Grid(4, False, "group", 16),
    Grid(2, False, "group", 8), Grid(3, False, "group", 8),
]  # fmt: skip
each_grid = pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: f"{grid.bits}-{grid.granularity}-{grid.symmetric}")


def problem(outputs: int = 12, inputs: int = 32, rows: int = 200, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight, and the second moments of inputs that are strongly correlated and of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(rows, inputs, generator=generator) @ torch.randn(inputs, inputs, generator=generator)
    x = mixed * torch.randn(inputs, generator=generator).exp()
    return torch.randn(outputs, inputs, generator=generator), x.t() @ x / rows


def loss(weight: Tensor, codes: Tensor, hessian: Tensor, grid: Grid, scale: Tensor, zero_point: Tensor | None) -> Tensor:
    return output_error(weight, grid.dequantize(codes, scale, zero_point), hessian)


@each_grid
@pytest.mark.parametrize("order", [True, False])
@pytest.mark.parametrize("seed", [0, 1])
def test_no_row_is_worse_than_the_nearest_codes_and_the_whole_is_much_better(grid: Grid, order: bool, seed: int) -> None:
    weight, hessian = problem(seed=seed)
    parameters = scales_of(weight, grid, "minmax")
    nearest = codes_of(weight, grid, *parameters)
    made = gptq(weight, hessian, grid, *parameters, order=order)
    before, after = (loss(weight, codes, hessian, grid, *parameters) for codes in (nearest, made))
    assert (after <= before).all()
    assert after.sum() < (0.75 if order else 0.9) * before.sum()


@each_grid
def test_codes_lie_on_the_grid_and_do_not_depend_on_the_hessians_size_or_on_chance(grid: Grid) -> None:
    weight, hessian = problem()
    parameters = scales_of(weight, grid, "minmax")
    made = gptq(weight, hessian, grid, *parameters)
    assert made.dtype == torch.int8
    assert grid.low <= int(made.min()) <= int(made.max()) <= grid.high
    assert torch.equal(made, gptq(weight, hessian, grid, *parameters))
    assert torch.equal(made, gptq(weight, 1024 * hessian, grid, *parameters))


@each_grid
def test_a_diagonal_hessian_gives_the_nearest_codes(grid: Grid) -> None:
    weight, hessian = problem()
    parameters = scales_of(weight, grid, "minmax")
    diagonal = torch.diag(hessian.diagonal())
    nearest = codes_of(weight, grid, *parameters)
    assert torch.equal(gptq(weight, diagonal, grid, *parameters), nearest)
    assert torch.equal(refined(weight, nearest, diagonal, grid, *parameters, 3), nearest)


def test_inputs_that_never_occurred_are_rounded_to_the_nearest() -> None:
    weight, hessian = problem()
    dead = [3, 17, 31]
    hessian[dead], hessian[:, dead] = 0, 0
    grid = Grid(4)
    parameters = scales_of(weight, grid, "minmax")
    nearest = codes_of(weight, grid, *parameters)
    made = refined(weight, gptq(weight, hessian, grid, *parameters), hessian, grid, *parameters, 2)
    assert torch.equal(made[:, dead], nearest[:, dead])
    assert not torch.equal(made, nearest)


def literal(weight: Tensor, hessian: Tensor, scale: Tensor, damping: float) -> Tensor:
    """Optimal brain quantization in a fixed order, with a fresh inverse for what is left: no Cholesky factor, no blocks."""
    left = weight.double().clone()
    moments = hessian.double() + damping * hessian.double().diagonal().mean() * torch.eye(len(hessian))
    codes = torch.zeros_like(left)
    for column in range(left.shape[1]):
        inverse = torch.linalg.inv(moments[column:, column:])
        codes[:, column] = (left[:, column] / scale[:, 0]).round().clamp(-8, 7)
        error = (left[:, column] - codes[:, column] * scale[:, 0]) / inverse[0, 0]
        left[:, column:] -= error.unsqueeze(1) * inverse[0]
    return codes


def test_it_is_the_algorithm_of_the_paper() -> None:
    weight, hessian = problem(outputs=40, inputs=24)
    grid = Grid(4)
    scale, _ = scales_of(weight, grid, "minmax")
    expected = literal(weight, hessian, scale, 0.01)
    made = gptq(weight, hessian, grid, scale, None, damping=0.01, order=False).double()
    kept = loss(weight, expected.to(torch.int8), hessian, grid, scale, None) <= loss(
        weight, codes_of(weight, grid, scale, None), hessian, grid, scale, None
    )
    assert kept.sum() > 20
    assert torch.equal(made[kept], expected[kept])


def test_more_columns_than_are_handed_on_together_change_nothing() -> None:
    weight, hessian = problem(outputs=6, inputs=160, rows=800)
    grid = Grid(4)
    scale, _ = scales_of(weight, grid, "minmax")
    expected = literal(weight, hessian, scale, 0.01)
    made = gptq(weight, hessian, grid, scale, None, order=False).double()
    assert (made == expected).float().mean() > 0.99


@each_grid
def test_refinement_never_grows_a_rows_error(grid: Grid) -> None:
    weight, hessian = problem(seed=3)
    parameters = scales_of(weight, grid, "minmax")
    for codes in (codes_of(weight, grid, *parameters), gptq(weight, hessian, grid, *parameters)):
        errors = [loss(weight, codes, hessian, grid, *parameters)]
        errors += [
            loss(weight, refined(weight, codes, hessian, grid, *parameters, sweeps), hessian, grid, *parameters)
            for sweeps in (1, 2, 4)
        ]
        for before, after in itertools.pairwise(errors):
            assert (after <= before * (1 + 1e-5)).all()
    assert torch.equal(refined(weight, codes, hessian, grid, *parameters, 0), codes)


def test_a_tiny_weight_comes_near_the_best_of_all_assignments() -> None:
    grid = Grid(2)
    worse, nearest_worse = [], []
    for seed in range(20):
        weight, hessian = problem(outputs=1, inputs=5, rows=50, seed=seed)
        scale, _ = scales_of(weight, grid, "minmax")
        every = torch.tensor(list(itertools.product(range(grid.low, grid.high + 1), repeat=5)), dtype=torch.int8)
        wide = scale.expand(len(every), 1)
        best = float(loss(weight.expand(len(every), 5), every, hessian, grid, wide, None).min())
        made = refined(weight, gptq(weight, hessian, grid, scale, None), hessian, grid, scale, None, 4)
        found = float(loss(weight, made, hessian, grid, scale, None))
        nearest = float(loss(weight, codes_of(weight, grid, scale, None), hessian, grid, scale, None))
        assert best <= found * (1 + 1e-4)
        worse.append(found / best)
        nearest_worse.append(nearest / best)
    assert sorted(worse)[10] < 1.3 < sorted(nearest_worse)[10]


def test_a_hessian_that_is_none_is_refused() -> None:
    weight, hessian = problem()
    grid = Grid(4)
    parameters = scales_of(weight, grid, "minmax")
    hessian[0, 1] = hessian[1, 0] = 10 * float(hessian.diagonal().max())
    with pytest.raises(NotPositiveDefinite, match="Cholesky"):
        gptq(weight, hessian, grid, *parameters)


@pytest.mark.parametrize("how", ["minmax", "mse"])
@pytest.mark.parametrize("group", [None, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_each_bit_more_costs_the_output_less(how: WeightRange, group: int | None, symmetric: bool) -> None:
    """A step is halved by each bit: 6 dB where steps are small beside the weights. A symmetric grid of few bits wastes a code:
    from 3 codes at 2 bits to 7 it gains more."""
    weight, hessian = problem()
    errors = []
    choices: tuple[Bits, ...] = (2, 3, 4)
    for bits in choices:
        grid = Grid(bits, symmetric, "group" if group else "channel", group)
        parameters = scales_of(weight, grid, how)
        codes = refined(weight, gptq(weight, hessian, grid, *parameters), hessian, grid, *parameters, 2)
        errors.append(float(loss(weight, codes, hessian, grid, *parameters).sum()))
    assert errors[0] > 2 * errors[1] > 4 * errors[2]
