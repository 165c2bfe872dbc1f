"""Second moments against a product of the whole, and whatever the cut into batches."""

from __future__ import annotations

import pytest
import torch

from calibrate.fidelity import sqnr_db
from calibrate.second_moment import SecondMoment


@pytest.mark.parametrize("cuts", [[300], [1, 299], [100, 100, 100], [7] * 42 + [6]])
def test_any_cut_gives_the_moments_of_the_whole(cuts: list[int]) -> None:
    x = torch.randn(300, 9, generator=torch.Generator().manual_seed(0)) * 3 + 1
    moment = SecondMoment()
    for piece in x.split(cuts):
        moment.update(piece)
    assert moment.count == 300
    assert sqnr_db((x.double().t() @ x.double() / 300).float(), moment.matrix) > 110
    assert sqnr_db(x.mean(0), moment.mean) > 110
    assert sqnr_db(moment.matrix, moment.matrix.t()) > 110
