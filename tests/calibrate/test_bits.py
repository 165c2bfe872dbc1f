"""One-bit weights: the layout of the bits, the integers they stand for, and the product that a device with bits computes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some

from calibrate import ops
from calibrate.bits import integers, pack_signs, plane_bytes, popcount, signs, unpack_signs, words, xnor_product


def _random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_layout_is_eight_to_a_byte_the_first_in_the_lowest_bit() -> None:
    plane = torch.tensor([[1, -1, -1, 1, -1, -1, -1, 1, -1, 1]])
    assert pack_signs(plane).tolist() == [0b10001001, 0b00000010]
    two = torch.stack([plane, -plane])
    assert pack_signs(two).tolist() == [0b10001001, 0b00000010, 0b01110110, 0b00000001], "planes do not share a byte"


def test_the_sign_of_zero_is_plus_one() -> None:
    assert signs(torch.tensor([-2.0, -0.0, 0.0, 3.0])).tolist() == [-1, 1, 1, 1]
    assert torch.equal(words(torch.tensor([[0.0, -1.0]])), words(torch.tensor([[1.0, -1.0]])))


@given(some.integers(1, 3), some.integers(1, 5), some.integers(1, 70), some.integers(0, 10))
@settings(max_examples=30, deadline=None)
def test_packing_is_undone_by_unpacking(planes: int, outputs: int, inputs: int, seed: int) -> None:
    plane = signs(_random(planes, outputs, inputs, seed=seed))
    packed = pack_signs(plane)
    assert packed.dtype == torch.uint8
    assert packed.numel() == planes * plane_bytes((outputs, inputs))
    assert torch.equal(unpack_signs(packed, (outputs, inputs)), plane)


def test_integers_are_the_sum_that_the_layout_says() -> None:
    planes = signs(_random(2, 3, 8))
    multiples = torch.tensor([[[5, 2], [4, 1]], [[1, 1], [3, 0]], [[90, 30], [7, 5]]], dtype=torch.int8)
    shift = torch.tensor([[0, 1], [-2, 3], [4, -5]], dtype=torch.int8)
    found = integers(pack_signs(planes), multiples, shift, (3, 8))
    for row in range(3):
        for column in range(8):
            group = column // 4
            terms = multiples[row, group].int() * planes[:, row, column].int()
            assert found[row, column] == int(terms.sum()) + int(shift[row, group])
    scale = torch.tensor([[0.5], [0.25], [2.0]])
    assert torch.equal(ops.binary(pack_signs(planes), multiples, shift, scale, [3, 8]), found.float() * scale)


@pytest.mark.parametrize("inputs", [1, 8, 63, 64, 65, 200, 384])
def test_xnor_and_popcount_give_the_product_of_the_signs_exactly(inputs: int) -> None:
    left, right = _random(5, inputs, seed=1), _random(7, inputs, seed=2)
    left[0], right[0] = 1.0, -1.0  # the extremes: -inputs, and words with the sign bit set
    found = xnor_product(words(left), words(right), inputs)
    wanted = signs(left).double() @ signs(right).double().t()
    assert torch.equal(found.double(), wanted)
    assert found[0, 0] == -inputs


def test_a_product_without_the_sign_of_zero_would_differ() -> None:
    left, right = torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 1.0]])
    assert int(xnor_product(words(left), words(right), 2)) == 2
    assert float(torch.sign(left) @ right.t()) == 1.0


def test_popcount_counts_the_bits_of_every_word() -> None:
    given_words = torch.tensor([0, 1, -1, 0x5555555555555555, -(1 << 63), (1 << 63) - 1])
    assert popcount(given_words).tolist() == [0, 1, 64, 32, 1, 63]
    random = torch.randint(-(1 << 62), 1 << 62, (200,), generator=torch.Generator().manual_seed(3))
    assert popcount(random).tolist() == [(number & (1 << 64) - 1).bit_count() for number in random.tolist()]
