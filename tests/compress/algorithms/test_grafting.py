"""Grafted weights: nothing at first, and the formula after."""

from __future__ import annotations

import torch

from compress.algorithms.grafting import grafted, started


def test_at_first_the_weight_is_what_it_was() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, other = torch.randn(2, 5, 7, generator=generator)
    base, coefficients = started(5, 7, 3, generator), started(5, 7, 3, generator)
    assert torch.equal(grafted(weight, base, coefficients, other), weight)
    assert not torch.equal(base[1], coefficients[1])


def test_what_is_drawn_is_as_large_as_the_inputs_allow() -> None:
    zeros, drawn = started(4, 100, 50, torch.Generator().manual_seed(0))
    assert (zeros.shape, drawn.shape) == ((4, 50), (50, 100))
    assert not zeros.any()
    assert 0.099 < drawn.abs().max() <= 0.1
    assert abs(drawn.mean()) < 0.003
    again = started(4, 100, 50, torch.Generator().manual_seed(0))
    assert torch.equal(again[1], drawn)


def test_each_entry_is_the_formula() -> None:
    generator = torch.Generator().manual_seed(1)
    weight, other = torch.randn(2, 3, 4, generator=generator, dtype=torch.float64)
    b, c1 = torch.randn(2, 3, 2, generator=generator, dtype=torch.float64)
    a, c2 = torch.randn(2, 2, 4, generator=generator, dtype=torch.float64)
    merged = grafted(weight, (b, a), (c1, c2), other)
    for row in range(3):
        for column in range(4):
            added = sum(b[row, r] * a[r, column] for r in range(2))
            scale = sum(c1[row, r] * c2[r, column] for r in range(2))
            torch.testing.assert_close(merged[row, column], weight[row, column] + added + scale * other[row, column])
