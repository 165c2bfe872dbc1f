"""Least squares from streamed sums: against torch's own solver, whatever the batches; the ridge pulls to the old weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compress.algorithms.least_squares import Moments, solve


def planted(rows: int = 200) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 7, generator=generator, dtype=torch.float64) * torch.logspace(-1, 1, 7, dtype=torch.float64)
    weights = torch.randn(8, 3, generator=generator, dtype=torch.float64)
    return x, weights, x @ weights[:7] + weights[7]


def gathered(x: Tensor, y: Tensor, offset: bool = True, step: int = 50) -> Moments:
    moments = Moments(x.shape[1], y.shape[1], offset)
    for at in range(0, len(x), step):
        moments.add(x[at : at + step], y[at : at + step])
    return moments


def test_exact_dependence_is_recovered() -> None:
    x, weights, y = planted()
    found = solve(gathered(x, y), torch.zeros_like(weights), 1e-12)
    assert (found - weights).abs().max() < 1e-8


def test_it_is_torchs_solution_with_noise() -> None:
    x, weights, y = planted()
    y = y + torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = torch.linalg.lstsq(torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1), y).solution
    assert (solve(gathered(x, y), torch.zeros_like(weights), 1e-13) - expected).abs().max() < 1e-8


def test_batches_do_not_matter() -> None:
    x, _, y = planted()
    one, many = gathered(x, y, step=200), gathered(x, y, step=13)
    assert (one.gram - many.gram).abs().max() <= 1e-12 * one.gram.abs().max()
    assert one.count == many.count == 200


def test_the_error_is_that_of_the_outputs() -> None:
    x, weights, y = planted()
    wrong = weights + 0.1
    expected = (x @ wrong[:7] + wrong[7] - y).square().sum() / y.square().sum()
    assert gathered(x, y).error(wrong) == pytest.approx(float(expected), rel=1e-9)
    assert gathered(x, y).error(weights) < 1e-12


def test_a_ridge_pulls_to_the_old_weights() -> None:
    x, weights, y = planted()
    old = torch.zeros_like(weights)
    sizes = [float(solve(gathered(x, y), old, ridge)[:7].norm()) for ridge in (1e-6, 1e-2, 1.0, 1e3)]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] < 0.05 * sizes[0]


def test_without_inputs_the_offset_is_the_mean() -> None:
    y = torch.randn(40, 3, dtype=torch.float64)
    found = solve(gathered(torch.zeros(40, 0, dtype=torch.float64), y), torch.zeros(1, 3, dtype=torch.float64), 1.0)
    assert torch.allclose(found[0], y.mean(0))


def test_fewer_positions_than_inputs_still_give_numbers() -> None:
    x, weights, y = planted(3)
    found = solve(gathered(x, y), torch.zeros_like(weights), 1e-4)
    assert found.isfinite().all()
    assert gathered(x, y).error(found) < 0.01
