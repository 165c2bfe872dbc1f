"""Memory of tensors while a function runs."""

from __future__ import annotations

import torch

from calibrate.footprint import live_bytes

N = 1000


def test_what_is_freed_counts_no_longer() -> None:
    def chain() -> torch.Tensor:
        x = torch.ones(N)
        for _ in range(10):
            x = x + 1
        return x

    assert live_bytes(chain) == 2 * 4 * N


def test_what_is_held_adds_up() -> None:
    assert live_bytes(lambda: [torch.ones(N) for _ in range(10)]) == 10 * 4 * N


def test_views_and_given_tensors_cost_nothing() -> None:
    given = torch.ones(N)
    assert live_bytes(lambda: given.reshape(10, 100).t()) == 0
    assert live_bytes(lambda: given.add_(1)) == 0
