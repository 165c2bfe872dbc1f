"""What counts as a massive activation: by the definition, row by row, at positions that count."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from calibrate.massive import MassiveEntries, massive


def state(rows: int = 3, tokens: int = 20, channels: int = 32) -> Tensor:
    return 0.1 * torch.randn(rows, tokens, channels, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("value", "scale", "found"), [(150.0, 1.0, True), (-150.0, 1.0, True), (99.0, 1.0, False),
                                                       (150.0, 10.0, False), (1500.0, 10.0, True)])  # fmt: skip
def test_large_and_a_thousand_times_the_median_are_both_needed(value: float, scale: float, found: bool) -> None:
    x = scale * state()
    x[1, 0, 7] = value
    assert massive(x).nonzero().tolist() == ([[1, 0, 7]] if found else [])


def test_every_row_is_a_hidden_state_of_its_own() -> None:
    x = torch.cat([state(1), 100 * state(1)])
    x[:, 0, 3] = 200
    assert massive(x).nonzero().tolist() == [[0, 0, 3]]
    assert torch.equal(massive(x), torch.cat([massive(row) for row in x.split(1)]))


def test_padding_is_not_looked_at() -> None:
    x = state()
    x[0, 19, 2] = 1e4
    x[2, 10:] = 5.0  # would raise the median
    x[2, 0, 2] = 150
    counts = torch.ones(3, 20, dtype=torch.bool)
    counts[:, 10:] = False
    assert massive(x, counts).nonzero().tolist() == [[2, 0, 2]]
    assert massive(x).nonzero().tolist() == [[0, 19, 2]]


def test_what_is_told_names_channels_positions_and_tokens() -> None:
    x = state()
    x[:2, 0, 7] = torch.tensor([300.0, -400.0])
    x[1, 5, 7] = 200
    ids = torch.arange(60).reshape(3, 20)
    entries = MassiveEntries()
    for piece, tokens in zip(x.split(2), ids.split(2), strict=True):
        entries.add(piece, massive(piece), None, tokens)
    told = entries.json()
    assert told["largest"] == 400
    assert told["median"] == pytest.approx(float(x[1].abs().median()))
    assert (told["entries"], told["rows"], told["channels"]) == (3, "2 of 3", [7])
    assert told["positions"] == [0, 5]
    assert sorted(told["tokens"]) == [0, 20, 25]
    assert entries.handful


def test_a_channel_that_is_large_everywhere_is_no_handful() -> None:
    x = state(channels=128)
    x[:, :, 7] = 300
    entries = MassiveEntries()
    entries.add(x, massive(x), None, None)
    assert entries.entries == 60
    assert not entries.handful
