"""Hash codes against a literal reading of the paper, exact identities, and codes of chance."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from calibrate.fidelity import sqnr_db
from compress.algorithms.hash_codes import FLOOR, HashCodes, blend, row_weights, sign, softmax_rows, through
from compress.algorithms.hash_learning import Maps, draw, fit_of, greedy, learn, refine

HEADS, WIDTH = 2, 8


def maps(rows: int = 24, tokens: int = 12, seed: int = 0, ragged: bool = False) -> Maps:
    """Tokens of a few topics; queries look for keys of theirs, and keys are larger the later they come."""
    generator = torch.Generator().manual_seed(seed)
    topics = 3 * torch.randn(HEADS, 4, WIDTH, generator=torch.Generator().manual_seed(99))
    which = torch.randint(4, (rows, HEADS, tokens), generator=generator)
    heads = torch.arange(HEADS)[None, :, None]
    base = topics[heads, which]
    queries = base + torch.randn(base.shape, generator=generator) + 1
    keys = base + torch.randn(base.shape, generator=generator) + torch.arange(tokens)[:, None] / 8
    allowed = torch.ones(rows, tokens, dtype=torch.bool)
    if ragged:
        allowed = torch.arange(tokens) < torch.randint(4, tokens + 1, (rows, 1), generator=generator)
    bias = torch.zeros(rows, 1, tokens, 1).masked_fill(~allowed[:, None, :, None], torch.finfo(torch.float32).min)
    return Maps(queries, keys, bias if ragged else None, allowed, allowed, WIDTH**-0.5)


def drawn(bits: int = 6, anchors: int = 7, shared: bool = False, seed: int = 0) -> HashCodes:
    return draw(maps(), bits, anchors, torch.Generator().manual_seed(seed), shared)


def double(codes: HashCodes) -> HashCodes:
    return codes.but(**{name: tensor.double() for name, tensor in codes.tensors().items()})


def values(of: Maps) -> Tensor:
    return torch.randn(*of.keys.shape[:3], 5, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


@pytest.mark.parametrize("shared", [False, True])
def test_codes_are_signs_of_projected_kernels(shared: bool) -> None:
    """Eq. 3 of EcoFormer, one token at a time."""
    codes, given = double(drawn(shared=shared)), maps(2, 3)
    for side, x in enumerate((given.queries.double(), given.keys.double())):
        found = codes.codes(x, side)
        assert set(found.unique().tolist()) == {-1.0, 1.0}
        for row, head, token in torch.cartesian_prod(*(torch.arange(size) for size in x.shape[:3])).tolist():
            moved = x[row, head, token] - codes.centre[side, head]
            unit = moved / moved.norm()
            apart = torch.stack([(unit - anchor).square().sum() for anchor in codes.anchors[head]])
            kernel = torch.exp(-apart / (2 * codes.width[head] ** 2))
            own = 0 if shared else side
            wanted = [1.0 if float(line @ kernel - off) >= 0 else -1.0 for line, off in zip(
                codes.projection[own, head], codes.shift[own, head], strict=True
            )]  # fmt: skip
            assert found[row, head, token].tolist() == wanted


def test_the_sign_of_nothing_is_one_and_its_gradient_that_of_clamping() -> None:
    x = torch.tensor([-2.0, -0.5, -0.0, 0.0, 0.5, 2.0], requires_grad=True)
    assert sign(x).tolist() == through(x).tolist() == [-1, -1, 1, 1, 1, 1]
    through(x).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [0, 1, 1, 1, 1, 0]


@pytest.mark.parametrize("ragged", [False, True])
def test_the_linear_form_equals_the_matrix_and_its_rows_are_means(ragged: bool) -> None:
    given, codes = maps(4, ragged=ragged), double(drawn())
    query, key = (codes.codes(x.double(), side) for side, x in enumerate((given.queries, given.keys)))
    logits = codes.key_logits(given.keys.double(), None if given.bias is None else given.bias.double())
    matrix, value = row_weights(query, key, codes.weights, logits), values(given)
    assert float(matrix.min()) >= 0
    assert torch.allclose(matrix.sum(-1), torch.ones((), dtype=torch.float64), rtol=1e-12)
    assert sqnr_db(matrix @ value, blend(query, key, codes.weights, logits, value)) > 250
    ones = torch.ones_like(value)
    assert sqnr_db(ones, blend(query, key, codes.weights, logits, ones)) > 250
    # What the authors' code does: its constant is added to the numerator once for the query's own token.
    gate = torch.exp(logits - logits.amax(-2, keepdim=True))
    gate = gate / gate.sum(-2, keepdim=True)
    weighed = query * codes.weights.unsqueeze(1)
    official = (ones + weighed @ ((gate * key).transpose(-1, -2) @ ones)) / (1 + weighed @ (gate * key).sum(-2).unsqueeze(-1))
    own = (gate * ones + weighed @ ((gate * key).transpose(-1, -2) @ ones)) / (1 + weighed @ (gate * key).sum(-2).unsqueeze(-1))
    assert sqnr_db(ones, official) > 250
    assert sqnr_db(ones, own) < 20


def test_the_gate_is_what_the_mean_query_gives_each_key() -> None:
    """Without codes a row is the softmax of the mean query, exactly; centres alone say so."""
    given, codes = maps(3), drawn()
    none = double(codes.but(weights=torch.zeros_like(codes.weights)))
    query, key = (none.codes(x.double(), side) for side, x in enumerate((given.queries, given.keys)))
    rows = row_weights(query, key, none.weights, none.key_logits(given.keys.double()))
    mean = none.centre[0].expand(3, -1, -1).unsqueeze(2)
    wanted = softmax_rows(mean, given.keys.double(), given.scale).expand_as(rows)
    assert sqnr_db(wanted, rows) > 120, "the gate is stored in float32"


def test_no_weight_of_a_key_is_below_the_floor() -> None:
    codes = drawn(bits=5)
    assert torch.allclose(codes.weights.sum(-1), torch.full((HEADS,), 1 - FLOOR))
    agree, against = torch.ones(1, HEADS, 1, 5), -torch.ones(1, HEADS, 1, 5)
    least = 1 + (agree * codes.weights.unsqueeze(1)) @ against.transpose(-1, -2)
    assert torch.allclose(least, torch.full_like(least, FLOOR))


def test_padded_keys_have_no_weight_whatever_they_hold() -> None:
    given, codes = maps(6, ragged=True), drawn()
    value = values(given).float()
    assert given.bias is not None

    def out(keys: Tensor, held: Tensor) -> Tensor:
        query, key = codes.codes(given.queries, 0), codes.codes(keys, 1)
        return blend(query, key, codes.weights, codes.key_logits(keys, given.bias), held)

    padded = ~given.allowed[:, None, :, None]
    other = out(torch.where(padded, 7.0, given.keys), torch.where(padded, 1e6, value))
    assert torch.equal(other, out(given.keys, value))
    row = 0
    count = int(given.allowed[row].sum())
    short = [x[row : row + 1, :, :count] for x in (given.queries, given.keys, value)]
    query, key = codes.codes(short[0], 0), codes.codes(short[1], 1)
    alone = blend(query, key, codes.weights, codes.key_logits(short[1]), short[2])
    assert sqnr_db(alone, out(given.keys, value)[row : row + 1, :, :count]) > 100


def test_a_rotation_of_queries_keys_and_anchors_leaves_the_codes() -> None:
    codes, given = double(drawn()), maps(4)
    turn = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(3), dtype=torch.float64))[0]
    turned = codes.but(centre=codes.centre @ turn, anchors=codes.anchors @ turn, gate=codes.gate @ turn)
    for side, x in enumerate((given.queries.double(), given.keys.double())):
        assert torch.equal(turned.codes(x @ turn, side), codes.codes(x, side))
        assert not torch.equal(codes.codes(x @ turn, side), codes.codes(x, side))
    assert sqnr_db(codes.key_logits(given.keys.double()), turned.key_logits(given.keys.double() @ turn)) > 250


@pytest.mark.parametrize("shared", [False, True])
def test_learnt_codes_are_nearer_than_those_of_chance_on_rows_that_were_not_learnt_from(shared: bool) -> None:
    found = learn(maps(ragged=True), maps(seed=1, ragged=True), 6, 8, 3, 50, torch.Generator().manual_seed(0), shared)
    kl = {name: float(fit.divergence.mean()) for name, fit in found.stages.items()}
    correlation = {name: float(fit.correlation.mean()) for name, fit in found.stages.items()}
    assert kl["learnt"] < 0.8 * min(kl["random"], kl["keys_only"])
    assert correlation["learnt"] > max(correlation["random"], correlation["keys_only"])
    assert kl["learnt"] <= kl["greedy"]


def test_bits_that_are_learnt_one_by_one_beat_chance_and_never_lose_by_the_refinement() -> None:
    given, held = maps(), maps(seed=1)
    ahead = []
    for seed in range(3):
        chance = draw(given, 4, 8, torch.Generator().manual_seed(seed))
        found = greedy(chance, given, 3)
        ahead.append(float(fit_of(chance, held).divergence.mean() - fit_of(found, held).divergence.mean()))
        refined = refine(found, given, held, 30, torch.Generator().manual_seed(seed))
        assert float(fit_of(refined, held).divergence.mean()) <= float(fit_of(found, held).divergence.mean())
    assert sum(ahead) > 0


def test_more_bits_are_nearer_on_average() -> None:
    """Of chance, so that nothing but their number differs; the mean over seeds."""
    alike = torch.randn(8, HEADS, 24, WIDTH, generator=torch.Generator().manual_seed(4))
    every = torch.ones(8, 24, dtype=torch.bool)
    given = Maps(alike, alike, None, every, every, WIDTH**-0.5)
    levels = []
    for bits in (2, 8, 32):
        fits = [fit_of(draw(given, bits, 12, torch.Generator().manual_seed(seed), shared=True), given) for seed in range(4)]
        levels.append(sum(float(fit.correlation.mean()) for fit in fits))
    assert levels[0] < levels[1] < levels[2]


def test_the_same_generator_gives_the_same_codes() -> None:
    one, two, other = (learn(maps(), maps(seed=1), 4, 6, 3, 5, torch.Generator().manual_seed(seed)).codes for seed in (1, 1, 2))
    assert all(torch.equal(first, second) for first, second in zip(one.tensors().values(), two.tensors().values(), strict=True))
    assert not torch.equal(one.projection, other.projection)


def test_too_few_tokens_for_the_anchors_are_refused() -> None:
    with pytest.raises(ValueError, match="12 queries and 12 keys for 13 anchors"):
        learn(maps(1), maps(1), 2, 13, 2, 0, torch.Generator())


def test_the_fit_is_that_of_the_written_out_sums() -> None:
    given, codes = maps(5, ragged=True), drawn()
    query, key = codes.codes(given.queries, 0), codes.codes(given.keys, 1)
    hashed = row_weights(query, key, codes.weights, codes.key_logits(given.keys, given.bias)).double()
    soft = softmax_rows(given.queries, given.keys, given.scale, given.bias).double()
    fit = fit_of(codes, given, step=2)
    for head in range(HEADS):
        kls, pairs = [], []
        for row in range(5):
            count = int(given.allowed[row].sum())
            p, q = soft[row, head, :count, :count], hashed[row, head, :count, :count]
            kls += F.kl_div(q.log(), p, reduction="none").sum(-1).tolist()
            pairs.append(torch.stack([p.flatten(), q.flatten()]))
        assert math.isclose(float(fit.divergence[head]), sum(kls) / len(kls), rel_tol=1e-4)
        assert math.isclose(float(fit.correlation[head]), float(torch.corrcoef(torch.cat(pairs, 1))[0, 1]), rel_tol=1e-4)
