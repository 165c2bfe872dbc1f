"""Laws of merging: sizes, means, protected and padded tokens, and a plain computation of the papers' equations as the oracle."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compress.algorithms.token_matching import criteria, fusion, most_merged, soft_matching, split
from compress.algorithms.token_moves import Merge, assigned, merged, mixed

ROWS, TOKENS, WIDTH = 3, 18, 8


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def plain_tome(x: Tensor, metric: Tensor, size: Tensor, remove: int) -> tuple[Tensor, Tensor]:
    """One row, token by token, as the paper tells it; the class token is the first."""
    sources = list(range(2, len(x), 2))
    targets = list(range(1, len(x), 2))
    unit = metric / metric.norm(dim=-1, keepdim=True)
    proposals = []
    for source in sources:
        likeness = [float(unit[source] @ unit[target]) for target in targets]
        proposals.append((max(likeness), source, targets[likeness.index(max(likeness))]))
    taken = sorted(proposals, reverse=True)[:remove]
    sums, sizes = x * size.unsqueeze(-1), size.clone()
    for _, source, target in taken:
        sums[target] += sums[source]
        sizes[target] += sizes[source]
    gone = {source for _, source, _ in taken}
    left = [0, *(source for source in sources if source not in gone), *targets]
    return sums[left] / sizes[left].unsqueeze(-1), sizes[left]


@pytest.mark.parametrize("remove", [1, 5, 8])
def test_it_is_what_the_paper_says(remove: int) -> None:
    x, metric, size = drawn(ROWS, TOKENS, WIDTH), drawn(ROWS, TOKENS, 4, seed=1), drawn(ROWS, TOKENS, seed=2).abs() + 1
    merge = soft_matching(metric, remove)
    found, sizes = mixed(x, size, merge), merged(size.unsqueeze(-1), merge).squeeze(-1)
    for row in range(ROWS):
        wanted, wanted_sizes = plain_tome(x[row], metric[row], size[row], remove)
        assert torch.allclose(found[row], wanted, rtol=1e-12)
        assert torch.allclose(sizes[row], wanted_sizes, rtol=1e-12)


def test_sums_and_sizes_are_conserved_and_the_class_token_is_untouched() -> None:
    x, size = drawn(ROWS, TOKENS, WIDTH), torch.ones(ROWS, TOKENS, dtype=torch.float64)
    for remove in (1, 4, 8):
        merge = soft_matching(x, remove)
        sizes = merged(size.unsqueeze(-1), merge).squeeze(-1)
        assert torch.equal(sizes.sum(1), torch.full((ROWS,), float(TOKENS), dtype=torch.float64))
        made = mixed(x, size, merge)
        assert made.shape[1] == TOKENS - remove
        assert torch.allclose((made * sizes.unsqueeze(-1)).sum(1), x.sum(1), atol=1e-12)
        assert torch.equal(made[:, 0], x[:, 0])


def test_more_than_half_cannot_go_at_once() -> None:
    assert most_merged(18, 1) == 8
    assert most_merged(2, 2) == 0
    with pytest.raises(ValueError, match="at most 8"):
        soft_matching(drawn(1, 18, 4), 9)


def test_equal_tokens_merge_first_and_keep_their_value() -> None:
    x = drawn(ROWS, TOKENS, WIDTH)
    for source, target in ((4, 9), (10, 3)):
        x[:, source] = x[:, target]
    merge = soft_matching(x, 2)
    assert [sorted(row) for row in merge.gone.tolist()] == [[4, 10]] * ROWS
    made = mixed(x, torch.ones(ROWS, TOKENS, dtype=torch.float64), merge)
    left = [position for position in range(TOKENS) if position not in (4, 10)]
    for token in x[0, left]:
        assert ((made[0] - token).abs().amax(1) < 1e-12).any()


def test_of_equal_pairs_the_earlier_one_goes() -> None:
    x = drawn(1, 1, WIDTH).expand(2, TOKENS, -1).contiguous()
    assert soft_matching(x, 3).gone.tolist() == [[2, 4, 6]] * 2
    noisy = x + 1e-8 * drawn(2, TOKENS, WIDTH, seed=4)
    assert soft_matching(noisy, 3).gone.tolist() == [[2, 4, 6]] * 2


@pytest.mark.parametrize("prefix", [0, 1, 2, 5])
def test_tokens_at_the_start_are_in_no_pair(prefix: int) -> None:
    x = drawn(ROWS, TOKENS, WIDTH)
    merge = soft_matching(x, 4, prefix)
    assert set(range(prefix)).isdisjoint(merge.gone.flatten().tolist())
    assert prefix <= int(merge.into.min())
    assert torch.equal(merged(x, merge)[:, :prefix], x[:, :prefix])


def test_padded_tokens_go_first_weigh_nothing_and_take_nothing_in() -> None:
    valid = torch.arange(TOKENS) < torch.tensor([18, 11, 4]).unsqueeze(1)
    x = drawn(ROWS, TOKENS, WIDTH)
    size = valid.double()
    merge = soft_matching(x, 7, 1, valid)
    sizes = merged(size.unsqueeze(-1), merge).squeeze(-1)
    assert torch.equal(sizes.sum(1), valid.sum(1).double())
    assert (sizes[1] > 0).sum() == 11, "seven padded ones went, and no real one"
    assert (sizes[2] > 0).sum() == 4
    made = mixed(x, size, merge)
    other = torch.where(valid.unsqueeze(-1), x, 1e3 * drawn(ROWS, TOKENS, WIDTH, seed=5))
    again = soft_matching(other, 7, 1, valid)
    real = sizes > 0
    assert torch.equal(mixed(other, size, again)[real], made[real]), "what padding holds changes nothing"
    whole = soft_matching(x[:1], 7, 1)
    assert sorted(map(tuple, mixed(x[:1], size[:1], whole)[0].tolist())) == sorted(map(tuple, made[0].tolist()))


def test_held_tokens_neither_go_nor_take_in() -> None:
    held = torch.zeros(ROWS, TOKENS, dtype=torch.bool)
    held[:, [6, 11]] = True
    x = drawn(ROWS, TOKENS, WIDTH)
    for merge in (soft_matching(x, 7, 1, None, held), fused(x, 7, held=held)):
        ones = torch.ones(ROWS, TOKENS, dtype=torch.float64)
        left, sizes = mixed(x, ones, merge), merged(ones.unsqueeze(-1), merge).squeeze(-1)
        for row in range(ROWS):
            for position in (6, 11):
                where = (left[row] == x[row, position]).all(1).nonzero()
                assert len(where) == 1
                assert float(sizes[row, where[0, 0]]) == 1


def fused(x: Tensor, remove: int, valid: Tensor | None = None, held: Tensor | None = None, both: bool = True) -> Merge:
    size = torch.ones(ROWS, x.shape[1], dtype=x.dtype) if valid is None else valid.to(x.dtype)
    halves = split(x.shape[1], 1, x, valid, held, both)
    scores = criteria(x, drawn(ROWS, x.shape[1], seed=7).abs() + 0.1, size, halves[1], halves[2], (1.0, 20.0, 40.0))
    return fusion(scores, remove, halves, both, valid, held)


def test_with_similarity_alone_and_one_way_fusion_is_soft_matching() -> None:
    x, size = drawn(ROWS, TOKENS, WIDTH), torch.ones(ROWS, TOKENS, dtype=torch.float64)
    halves = split(TOKENS, 1, x)
    scores = criteria(x, size, size, halves[1], halves[2], (1.0, 0.0, 0.0))
    one = fusion(scores, 5, halves, both_ways=False)
    assert torch.equal(merged(x, one), merged(x, soft_matching(x, 5)))


def test_criteria_are_the_papers_products() -> None:
    x = drawn(1, 6, WIDTH)
    received, size = drawn(1, 6, seed=1).abs() + 0.1, drawn(1, 6, seed=2).abs() + 1
    going, taking = torch.tensor([[2, 4]]), torch.tensor([[1, 3, 5]])
    found = criteria(x, received, size, going, taking, (2.0, 20.0, 40.0))
    u, z = (1 / value / (1 / value).max() for value in (received[0], size[0]))
    for i, a in enumerate((2, 4)):
        for j, b in enumerate((1, 3, 5)):
            cosine = torch.cosine_similarity(x[0, a], x[0, b], dim=0)
            wanted = ((cosine + 1) / 2) ** (1 / 2) * (u[a] * u[b]) ** (1 / 20) * (z[a] * z[b]) ** (1 / 40)
            assert float(found[0, i, j]) == pytest.approx(float(wanted), rel=1e-9)


@pytest.mark.parametrize(("tokens", "remove"), [(18, 8), (18, 7), (9, 3), (5, 1), (4, 1), (3, 1)])
def test_both_ways_take_as_many_out_also_of_short_sequences(tokens: int, remove: int) -> None:
    x, sizes = drawn(ROWS, tokens, WIDTH), torch.ones(ROWS, tokens, dtype=torch.float64)
    merge = fused(x, remove)
    sizes = merged(sizes.unsqueeze(-1), merge).squeeze(-1)
    assert sizes.shape[1] == tokens - remove
    assert torch.equal(sizes.sum(1), torch.full((ROWS,), float(tokens), dtype=torch.float64))
    assert (sizes[:, 0] == 1).all(), "the class token is in no pair"
    assert (merge.gone[:, : remove // 2] % 2 == 0).all(), "first from every second token to the others"
    assert (merge.gone[:, remove // 2 :] % 2 == (remove > 1)).all(), "then back"


def test_fusion_of_padded_rows() -> None:
    valid = torch.arange(TOKENS) < torch.tensor([18, 11, 4]).unsqueeze(1)
    sizes = merged(valid.double().unsqueeze(-1), fused(drawn(ROWS, TOKENS, WIDTH), 7, valid)).squeeze(-1)
    assert torch.equal(sizes.sum(1), valid.sum(1).double()), "no real token went into padding"
    assert (sizes[1] > 0).sum() >= 8
    assert (sizes[2] > 0).sum() == 4


@pytest.mark.parametrize("both", [True, False])
def test_each_token_is_found_again_in_what_it_became(both: bool) -> None:
    """Also one that went into a token that went on: sums over what is assigned are the sums of the merge."""
    x = drawn(ROWS, TOKENS, WIDTH)
    for seed in range(5):
        merge = fused(drawn(ROWS, TOKENS, WIDTH, seed=seed), 8, both=both)
        there = torch.nn.functional.one_hot(assigned(merge, TOKENS), TOKENS - 8).double()
        assert torch.allclose(there.transpose(1, 2) @ x, merged(x, merge), atol=1e-12)
