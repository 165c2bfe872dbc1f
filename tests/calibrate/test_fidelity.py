"""Fidelity: laws of SQNR, streaming equals whole, and controls that a wrong answer must fail."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from calibrate.fidelity import Estimate, Fidelity, agreement, cosine, max_error, sqnr_db, wilson


def test_equal_outputs_have_infinite_sqnr() -> None:
    x = torch.randn(5, 7)
    assert sqnr_db(x, x.clone()) == math.inf
    assert sqnr_db(torch.zeros(3), torch.zeros(3)) == math.inf


def test_a_doubled_output_passes_cosine_and_agreement_and_fails_sqnr() -> None:
    x = torch.randn(50, 7)
    assert cosine(x, 2 * x) == pytest.approx(1)
    assert agreement(x, 2 * x) == 1
    assert sqnr_db(x, 2 * x) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_outputs_that_are_not_finite_fail_every_figure(bad: float) -> None:
    x = torch.randn(4, 3)
    other = x.clone()
    other[1, 2] = bad
    assert sqnr_db(x, other) == -math.inf
    fidelity = Fidelity()
    fidelity.update(x, other)
    assert fidelity.sqnr_db == -math.inf
    assert not math.isfinite(fidelity.max_error)
    assert fidelity.agreement is not None
    assert fidelity.agreement <= 0.75


@given(scale=st.floats(0.01, 100), noise=st.floats(1e-4, 0.5))
def test_sqnr_ignores_scale_and_falls_by_twenty_db_a_decade(scale: float, noise: float) -> None:
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    error = torch.randn(64, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    level = sqnr_db(x, x + noise * error)
    assert sqnr_db(scale * x, scale * (x + noise * error)) == pytest.approx(level, abs=1e-6)
    assert sqnr_db(x, x + noise / 10 * error) == pytest.approx(level + 20, abs=1e-6)


@pytest.mark.parametrize("sizes", [[30], [7, 23], [1] * 30, [0, 30]])
def test_batches_give_what_the_whole_gives(sizes: list[int]) -> None:
    x, y = torch.randn(30, 5), torch.randn(30, 5)
    fidelity = Fidelity()
    for a, b in zip(x.split(sizes), y.split(sizes), strict=True):
        fidelity.update(a, b)
    assert fidelity.sqnr_db == pytest.approx(sqnr_db(x, y))
    assert fidelity.max_error == pytest.approx(max_error(x, y))
    assert fidelity.cosine == pytest.approx(cosine(x, y))
    assert fidelity.agreement == agreement(x, y)
    assert fidelity.rows == 30


def test_padded_positions_do_not_count() -> None:
    x = torch.randn(2, 4, 3)
    y = x.clone()
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]])
    y[mask == 0] = 99.0
    fidelity = Fidelity()
    fidelity.update(x, y, mask)
    assert fidelity.sqnr_db == math.inf
    assert fidelity.rows == 4
    fidelity.update(x, y)
    assert fidelity.sqnr_db < 0


def test_agreement_is_undefined_for_single_scores_and_where_there_are_no_classes() -> None:
    assert agreement(torch.randn(5, 1), torch.randn(5, 1)) is None
    assert agreement(torch.randn(5), torch.randn(5)) is None
    embedding = Fidelity(classes=False)
    embedding.update(torch.randn(5, 8), torch.randn(5, 8))
    assert embedding.agreement is None
    assert embedding.agreement_estimate is None
    assert Fidelity().agreement is None


def test_agreement_has_an_interval() -> None:
    x = torch.eye(10)
    y = x.clone()
    y[0] = y[0].roll(1)
    fidelity = Fidelity()
    fidelity.update(x, y)
    found = fidelity.agreement_estimate
    assert isinstance(found, Estimate)
    assert found.value == pytest.approx(0.9)
    assert 0.55 < found.low < 0.9 < found.high < 1
    assert str(found).startswith("0.9000 [")


def test_shapes_must_be_the_same() -> None:
    with pytest.raises(ValueError, match="shape"):
        Fidelity().update(torch.zeros(2, 3), torch.zeros(2, 1))


def test_wilson_is_that_of_scipy() -> None:
    from scipy.stats import binomtest

    for hits, rows in [(0, 10), (10, 10), (3, 10), (874, 1000), (1, 1)]:
        expected = binomtest(hits, rows).proportion_ci(method="wilson")
        assert wilson(hits, rows) == pytest.approx((expected.low, expected.high), abs=1e-9)
