"""One scale and zero point in the place of many: the same codes, the same values."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from calibrate.grid import Grid
from compress.algorithms.reparameterization import Reparameterization, reparameterization


def channels(seed: int = 0) -> Tensor:
    """[N, C] float64 with wide and narrow channels, some far from zero, one constant."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(400, 24, generator=generator, dtype=torch.float64)
    x = x * torch.logspace(-1, 1.5, 24, dtype=torch.float64) + 20 * torch.randn(24, generator=generator, dtype=torch.float64)
    x[:, 3] = 7.0
    return x


def made(x: Tensor, bits: int) -> tuple[Grid, Reparameterization]:
    grid = Grid(bits, False, "tensor")
    return grid, reparameterization(x.amin(0), x.amax(0), grid)


def per_channel(x: Tensor, grid: Grid, moved: Reparameterization) -> Tensor:
    return ((x / moved.scales).round() + moved.zero_points).clamp(grid.low, grid.high)


def per_tensor(x: Tensor, grid: Grid, moved: Reparameterization) -> Tensor:
    return (((x * moved.factor + moved.shift) / moved.scale).round() + moved.zero_point).clamp(grid.low, grid.high)


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_codes_of_the_tensor_are_those_of_the_channels(bits: int) -> None:
    x = channels()
    grid, moved = made(x, bits)
    ours, theirs = per_tensor(x, grid, moved), per_channel(x, grid, moved)
    ties = ((x / moved.scales) % 1 - 0.5).abs() < 1e-9  # a value halfway between two codes may go either way
    assert torch.equal(ours[~ties], theirs[~ties])
    assert float(ties.double().mean()) < 0.01
    assert grid.low <= moved.zero_point <= grid.high


def test_a_mean_zero_point_that_is_no_integer_gives_other_codes() -> None:
    x = channels()
    grid, moved = made(x, 4)
    mean = moved.zero_points.clamp(grid.low, grid.high).mean()
    shift = (moved.zero_points - mean) * moved.scale
    theirs = (((x * moved.factor + shift) / moved.scale).round() + mean.round()).clamp(grid.low, grid.high)
    assert (theirs != per_channel(x, grid, moved)).double().mean() > 0.05


@pytest.mark.parametrize("bits", [4, 8])
def test_every_value_of_calibration_is_within_half_a_step_of_its_own_channel(bits: int) -> None:
    x = channels()
    grid, moved = made(x, bits)
    back = ((per_tensor(x, grid, moved) - moved.zero_point) * moved.scale - moved.shift) / moved.factor
    assert ((back - x).abs() <= moved.scales * (1 + 1e-9)).all()  # half a step, and half a step where a zero point was rounded
    whole = Grid(bits, False, "tensor").parameters(x.amin().float(), x.amax().float())[0]
    assert float((back - x).square().mean()) < float(whole) ** 2 / 12 / 4


def test_a_channel_that_hardly_moves_is_given_room() -> None:
    x = channels()
    _, moved = made(x, 8)
    assert float(moved.scales[3]) >= 0.2 * float(moved.scales.median())
    assert moved.factor.isfinite().all()
