"""The distances of a trajectory: 0 for equal, padding does not count, and probes whose squared change is the distance."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from compress.algorithms.trajectory import (
    divergence,
    divergence_probe,
    manifold_distance,
    manifold_probe,
    relative_error,
    relative_probe,
)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


VALID = torch.tensor([[True] * 5, [True, True, True, False, False]])
DISTANCES = [manifold_distance, divergence, relative_error]


@pytest.mark.parametrize("distance", DISTANCES)
def test_equal_is_zero_and_other_is_not(distance: Callable[..., Tensor]) -> None:
    x, other = drawn(2, 5, 4), drawn(2, 5, 4, seed=1)
    assert distance(x, x, VALID).abs().max() < 1e-14
    assert distance(x, other, VALID).min() > 1e-3


@pytest.mark.parametrize("distance", DISTANCES)
def test_rows_do_not_see_each_other(distance: Callable[..., Tensor]) -> None:
    x, other = drawn(2, 5, 4), drawn(2, 5, 4, seed=1)
    whole = distance(x, other, None)
    apart = torch.cat([distance(x[row : row + 1], other[row : row + 1], None) for row in range(2)])
    assert torch.allclose(whole, apart, rtol=1e-12)


@pytest.mark.parametrize("distance", [manifold_distance, divergence])
def test_padding_does_not_count(distance: Callable[..., Tensor]) -> None:
    x, other = drawn(2, 5, 4), drawn(2, 5, 4, seed=1)
    wild = other.clone()
    wild[1, 3:] = 1e3
    assert torch.equal(distance(x, other, VALID), distance(x, wild, VALID))
    assert distance(x, other, VALID)[1] == pytest.approx(float(distance(x[1:, :3], other[1:, :3], None)))
    assert not torch.equal(distance(x, other, None), distance(x, wild, None))


def test_the_manifold_knows_neither_scale_nor_rotation() -> None:
    x = drawn(2, 5, 4)
    rotation = torch.linalg.qr(drawn(4, 4, seed=2))[0]
    assert manifold_distance(x, 3 * x @ rotation).max() < 1e-14


def test_divergence_is_torchs() -> None:
    x, other = drawn(6, 4), drawn(6, 4, seed=1)
    expected = torch.nn.functional.kl_div(other.log_softmax(-1), x.log_softmax(-1), log_target=True, reduction="none").sum(-1)
    assert torch.allclose(divergence(x, other), expected)


@pytest.mark.parametrize(
    ("distance", "probe", "square"),
    [(manifold_distance, manifold_probe, True), (divergence, divergence_probe, False), (relative_error, relative_probe, False)],
)
@pytest.mark.parametrize("valid", [None, VALID])
def test_a_probe_changes_by_the_distance_in_the_mean(
    distance: Callable[..., Tensor], probe: Callable[..., Tensor], square: bool, valid: Tensor | None
) -> None:
    """Over 2000 drawings of signs the mean square is within a tenth: its deviation is at most sqrt(2 / 2000), 3 %."""
    x, small = drawn(2, 5, 4), 1e-3 * drawn(2, 5, 4, seed=1)
    expected = distance(x, x + small, valid)
    generator, total = torch.Generator().manual_seed(3), torch.zeros(2, dtype=torch.float64)
    for _ in range(2000):
        shape = (2, 5, 5) if square else (2, 5, 4)
        signs = (2 * torch.randint(0, 2, shape, generator=generator) - 1).double()
        at = x.clone().requires_grad_()
        gradient = torch.autograd.grad(probe(at, valid, signs), at)[0]
        total += (gradient * small).sum((1, 2)).square() / 2000
    assert torch.allclose(total, expected, rtol=0.1)
