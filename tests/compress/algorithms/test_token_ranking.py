"""Laws of weighted PageRank, of its stages, and of what is protected and padded."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from compress.algorithms.token_moves import ascending, best, picked
from compress.algorithms.token_ranking import (
    LARGEST_VARIANCE,
    LEAST_VARIANCE,
    attention_from_first,
    attention_received,
    importance,
    kept,
    zero_tprune,
)

ROWS, HEADS, TOKENS, WIDTH = 3, 4, 17, 8


def attention(seed: int = 0, tokens: int = TOKENS, sharp: float = 1.0, valid: Tensor | None = None) -> Tensor:
    scores = sharp * torch.randn(ROWS, HEADS, tokens, tokens, generator=torch.Generator().manual_seed(seed))
    if valid is not None:
        scores = scores.masked_fill(~valid[:, None, None, :], torch.finfo(torch.float32).min)
    return scores.softmax(-1)


def keys(seed: int = 1, tokens: int = TOKENS) -> Tensor:
    return torch.randn(ROWS, HEADS, tokens, WIDTH, generator=torch.Generator().manual_seed(seed))


def uniform(tokens: int = TOKENS) -> Tensor:
    return torch.full((ROWS, tokens), 1 / tokens)


def test_votes_converge_to_the_left_eigenvector() -> None:
    weights = attention()[:, :1]
    found = importance(weights, uniform(), 100)
    for row in range(ROWS):
        values, vectors = np.linalg.eig(weights[row, 0].double().numpy().T)
        leading = np.abs(vectors[:, np.argmax(values.real)].real)
        wanted = torch.tensor(leading / leading.sum() * TOKENS)
        assert torch.allclose(found[row].double(), wanted, atol=1e-5)
    assert not torch.allclose(importance(weights, uniform(), 1), found, atol=1e-2), "one vote is not yet there"


def test_the_sum_of_a_heads_scores_is_conserved_and_uniform_attention_ranks_nothing() -> None:
    for votes in (1, 5, 30):
        assert torch.allclose(
            importance(attention()[:, :1], uniform(), votes).sum(1), torch.full((ROWS,), float(TOKENS)), rtol=1e-5
        )
    flat = torch.full((ROWS, HEADS, TOKENS, TOKENS), 1 / TOKENS)
    assert torch.allclose(importance(flat, uniform(), 7), torch.ones(ROWS, TOKENS), atol=1e-5)


def test_heads_that_vary_too_little_or_too_much_do_not_vote_unless_none_is_left() -> None:
    weights = attention(sharp=1.0)[:, :1]
    assert LEAST_VARIANCE < float(importance(weights, uniform(), 1)[0].var(unbiased=False)) < LARGEST_VARIANCE
    flat = torch.full_like(weights, 1 / TOKENS)
    one = torch.zeros_like(weights)
    one[..., 5] = 1.0
    alone = importance(weights, uniform(), 3)
    assert torch.equal(importance(torch.cat([weights, flat, one], 1), uniform(), 3), alone)
    assert not torch.equal(importance(torch.cat([weights, attention(4)[:, :1]], 1), uniform(), 3), alone), "a varying head counts"
    assert float(importance(one, uniform(), 1)[0, 5]) == pytest.approx(TOKENS, rel=1e-5), "alone, it is heard"


def test_scores_follow_their_tokens() -> None:
    order = torch.randperm(TOKENS, generator=torch.Generator().manual_seed(3))
    weights = attention()
    moved = weights[:, :, order][:, :, :, order]
    assert torch.allclose(importance(moved, uniform(), 5), importance(weights, uniform(), 5)[:, order], atol=1e-5)


def test_a_token_that_receives_more_ranks_higher() -> None:
    weights = attention()
    more = weights.clone()
    more[..., 7] *= 4
    more = more / more.sum(-1, keepdim=True)
    for rank in (lambda a: importance(a, uniform(), 5), attention_received, attention_from_first):
        before, after = rank(weights)[:, 7], rank(more)[:, 7]
        assert (after > before).all()


def test_as_many_stay_as_asked_in_order_with_the_protected_ones() -> None:
    for keep in (2, 9, TOKENS - 1):
        index = zero_tprune(attention(), keys(), keep, 3, 0.3)
        assert index.shape == (ROWS, keep)
        assert (index[:, 0] == 0).all()
        assert (index.diff(dim=1) > 0).all()
    two = zero_tprune(attention(), keys(), 5, 3, 0.3, prefix=2)
    assert (two[:, :2] == torch.tensor([0, 1])).all()
    held = torch.zeros(ROWS, TOKENS, dtype=torch.bool)
    held[:, 11] = True
    assert (zero_tprune(attention(), keys(), 4, 3, 0.5, held=held) == 11).any(1).all()
    assert torch.equal(zero_tprune(attention(), keys(), TOKENS, 3, 0.3), torch.arange(TOKENS).expand(ROWS, -1))


def test_of_two_like_tokens_the_less_important_one_goes_first() -> None:
    """A token that nobody needs is copied from an important one: similarity takes it out, whatever else there is."""
    weights, vectors = attention(), keys()
    ranks = importance(weights, uniform(), 1)
    ranks[:, 0] = 1e3
    order = ranks.argsort(1)
    for row in range(ROWS):
        low, high = int(order[row, 2]), int(order[row, -2])
        vectors[row, :, low] = vectors[row, :, high]
    gone = zero_tprune(weights, vectors, TOKENS - 1, 3, similar=1.0)
    for row in range(ROWS):
        assert int(order[row, 2]) not in gone[row].tolist()
        assert int(order[row, -2]) in gone[row].tolist()


def test_padded_tokens_go_first_and_do_not_vote() -> None:
    lengths = torch.tensor([17, 9, 5])
    valid = torch.arange(TOKENS) < lengths.unsqueeze(1)
    weights, vectors = attention(valid=valid), keys()
    index = zero_tprune(weights, vectors, 9, 5, 0.4, valid=valid)
    assert index[1].tolist() == list(range(9)), "all real ones stay where they are no more than are kept"
    assert set(range(5)) <= set(index[2].tolist())
    other = torch.where(valid[:, None, :, None], weights, attention(9, valid=valid))
    assert torch.equal(zero_tprune(other, vectors, 9, 5, 0.4, valid=valid), index), "what padded queries look at changes nothing"
    received = attention_received(weights, valid)
    assert torch.allclose(attention_received(other, valid), received)
    assert not torch.allclose(attention_received(other), attention_received(weights)), "the control sees them"
    assert kept(received, 9, valid=valid)[1].tolist() == list(range(9))


def test_a_row_alone_gives_what_it_gives_among_others() -> None:
    weights, vectors = attention(), keys()
    together = zero_tprune(weights, vectors, 8, 5, 0.3)
    alone = [zero_tprune(weights[row : row + 1], vectors[row : row + 1], 8, 5, 0.3) for row in range(ROWS)]
    assert torch.equal(torch.cat(alone), together)


def test_of_equal_scores_the_earlier_tokens_stay() -> None:
    score = torch.ones(2, 9)
    score[1, 6] = 2
    assert best(score, 4).tolist() == [[0, 1, 2, 3], [6, 0, 1, 2]]
    assert kept(score, 4, prefix=0).tolist() == [[0, 1, 2, 3], [0, 1, 2, 6]]
    noisy = score + torch.randn(2, 9, generator=torch.Generator().manual_seed(0)) * 1e-7
    assert torch.equal(best(noisy, 4), best(score, 4)), "what a runtime rounds differently does not decide"


def test_picking_takes_each_rows_own_tokens() -> None:
    x = torch.randn(2, 6, 3)
    index = torch.tensor([[5, 0], [2, 2]])
    assert torch.equal(picked(x, index), torch.stack([x[0, [5, 0]], x[1, [2, 2]]]))
    assert picked(x[..., 0] > 0, index).dtype == torch.bool
    assert ascending(index).tolist() == [[0, 5], [2, 2]]
