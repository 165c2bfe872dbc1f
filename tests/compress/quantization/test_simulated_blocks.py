"""The parts of BCT and FQ-ViT as the benchmark simulates them: tables, blocks, softmax as powers of two, channel factors."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from simulated_blocks import (
    ALONE,
    Parts,
    blocked,
    channel_factors,
    covering,
    exponential_table,
    gelu_by_tables,
    gelu_table,
    log2_rounded,
    one_scale,
    table_softmax,
)

from calibrate.fidelity import sqnr_db
from calibrate.grid import Grid


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("shifts", [(-4, -4), (-5, -3)])
def test_the_table_is_gelu_between_two_grids_for_all_256_codes(shifts: tuple[int, int]) -> None:
    scale, given = (torch.tensor(2.0**shift) for shift in shifts)
    table = gelu_table(scale, given)
    grid = Grid(8, granularity="tensor", power_of_two=True)
    for code in range(-128, 128):
        value = F.gelu(torch.tensor([[code * float(scale)]]))
        assert int(table[code + 128]) == int(grid.quantize(value, given.reshape(1, 1), None))


def test_a_table_for_each_shift_reads_every_block_with_its_own() -> None:
    x = torch.cat([normal(4, 64) / 50, normal(4, 64) * 9], -1)
    found = gelu_by_tables(x)
    for part, given in zip(x.split(64, -1), found.split(64, -1), strict=True):
        assert sqnr_db(F.gelu(part), given) > 30
    scales = covering(x), covering(F.gelu(x))
    codes = (x / scales[0]).round().clamp(-128, 127).long() + 128
    one = gelu_table(*scales)[codes] * scales[1]
    assert sqnr_db(F.gelu(x[:, :64]), one[:, :64]) < 10


def test_blocks_are_rounded_apart() -> None:
    x = normal(5, 150) * torch.cat([torch.full((64,), 1e-3), torch.ones(86)])
    back = blocked(x)
    assert torch.equal(back, torch.cat([blocked(part) for part in x.split(64, -1)], -1))
    for part, given in zip(x.split(64, -1), back.split(64, -1), strict=True):
        assert bool(((part - given).abs().amax(-1) <= part.abs().amax(-1) / 128).all())
    assert sqnr_db(x[:, :64], back[:, :64]) > 35
    assert sqnr_db(x[:, :64], blocked(x, size=150)[:, :64]) < 10  # one scale for all loses the small block
    assert torch.equal(blocked(torch.zeros(2, 70)), torch.zeros(2, 70))


def test_softmax_by_a_table_hides_what_is_masked_and_is_close() -> None:
    assert bool((exponential_table().diff() <= 0).all())
    scores = normal(8, 20) * 2
    scores[:, 12:] = -torch.inf
    for hidden in (-torch.inf, torch.finfo(torch.float32).min):
        p = table_softmax(scores.masked_fill(scores.isinf(), hidden))
        assert torch.equal(p[:, 12:], torch.zeros(8, 8))
        assert bool((p >= 0).all())
        error = (p - scores.softmax(-1)).abs()
        assert float(error.max()) < 0.04  # half a step of 1/16 in numerator and denominator, and half of 1/256


def test_probabilities_become_powers_of_two_within_half_an_octave() -> None:
    p = (normal(50, 16) * 2).softmax(-1)
    rounded = log2_rounded(p)
    kept = rounded > 0
    assert bool((torch.frexp(rounded[kept]).mantissa == 0.5).all())
    ratio = rounded[kept] / p[kept]
    assert 2**-0.5 - 1e-6 <= float(ratio.min()) <= float(ratio.max()) <= 2**0.5 + 1e-6
    assert bool((p[~kept] < 2.0**-14).all())
    assert rounded.unique().numel() <= 16
    assert torch.equal(log2_rounded(torch.zeros(3)), torch.zeros(3))
    assert torch.equal(log2_rounded(torch.ones(3)), torch.ones(3))


def test_channel_factors_are_never_worse_than_one_scale() -> None:
    even = torch.rand(2000, 1, generator=torch.Generator().manual_seed(0)).repeat(1, 8) - 0.5
    uneven = even * torch.tensor([1.0, 1.0, 0.5, 0.5, 0.25, 0.25, 0.1, 0.02])
    for x in (even, uneven):
        scale, zero, factors = channel_factors(x)
        errors = [(one_scale(x, scale * each, zero) - x).square().sum(0) for each in (torch.full((8,), 8.0), factors)]
        assert bool((errors[1] <= errors[0]).all())
        assert set(factors.tolist()) <= {1.0, 2.0, 4.0, 8.0}
        assert bool((factors == 8).all()) == (x is even)
    assert float(errors[1].sum()) < 0.6 * float(errors[0].sum())


class Small(nn.Module):
    """What the mode replaces, once each."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.norm = nn.Embedding(20, 64), nn.LayerNorm(64)
        self.into, self.up, self.down = nn.Linear(64, 192), nn.Linear(64, 128), nn.Linear(128, 64)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.norm(self.table(ids))
        heads = self.into(x).unflatten(-1, (3, 2, 32)).permute(2, 0, 3, 1, 4)
        x = x + F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
        return self.down(F.gelu(self.up(x)))


def test_parts_are_on_where_they_are_named_and_nowhere_else() -> None:
    torch.manual_seed(0)
    model, ids = Small().eval(), torch.arange(18).reshape(2, 9)
    with torch.no_grad():
        wanted = model(ids)
        with Parts(()) as mode:
            assert sqnr_db(wanted, model(ids)) > 100
        seen = mode.noted
        assert dict(mode.calls) == {"embedding": 1, "layer_norm": 1, "linear": 3, "gelu": 1, "scaled_dot_product_attention": 1}
        assert set(seen) == {("gelu", 1), ("norm", 1)}
        for part in ALONE:
            with Parts((part,), 8, seen) as mode:
                assert 10 < sqnr_db(wanted, model(ids)) < 80, part
