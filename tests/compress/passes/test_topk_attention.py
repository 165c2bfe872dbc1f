"""Hard attention: what counts, what it equals at its limits, which families have it, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn import functional as F
from trial import DIGITS, digits, judge, rebuilt, tried

from calibrate.errors import UserError
from calibrate.fidelity import sqnr_db
from calibrate.signature import Signature, TensorSpec
from compress.layers import TopKAttention
from compress.layers.attached import attached_to
from compress.passes.drop_layers import DropLayers
from compress.passes.prune_width import PruneWidth
from compress.passes.quantize import Quantize
from compress.passes.topk_attention import TopkAttention

EXAMPLE = TopkAttention(k=3, blocks=[1, -1])


class Attention(nn.Module):
    """Attention alone, as torch has it; queries, keys and values are its inputs."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, **options: Any) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, mask, **options)


class Written(nn.Module):
    """The same, written out."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
        return F.softmax(scores if mask is None else scores + mask, dim=-1) @ value


def operands(keys: int = 9, queries: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = ((2, 3, queries, 8), (2, 3, keys, 8), (2, 3, keys, 5))
    query, key, value = (torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes)
    return query, key, value


def expected(query: Tensor, key: Tensor, value: Tensor, k: int, mask: Tensor | None = None) -> Tensor:
    """One query at a time: sort, keep the first k, weigh."""
    made = torch.zeros(*query.shape[:-1], value.shape[-1], dtype=query.dtype)
    for b, h, t in torch.cartesian_prod(*(torch.arange(size) for size in query.shape[:3])).tolist():
        scores = [(float(query[b, h, t] @ one) / query.shape[-1] ** 0.5, s) for s, one in enumerate(key[b, h])]
        if mask is not None:
            scores = [(score, s) for score, s in scores if mask[b, t, s]]
        best = sorted(scores, reverse=True)[:k]
        weights = torch.tensor([score for score, _ in best], dtype=query.dtype).softmax(0)
        made[b, h, t] = sum(weight * value[b, h, s] for weight, (_, s) in zip(weights, best, strict=True))
    return made


def hard(module: nn.Module, k: int) -> nn.Module:
    TopKAttention(k).attach(module, "")
    return module


@pytest.mark.parametrize("module", [Attention, Written])
@pytest.mark.parametrize("k", [1, 2, 5])
def test_the_softmax_runs_over_the_k_largest_scores(module: type[nn.Module], k: int) -> None:
    given = operands()
    found, wanted = hard(module(), k)(*given), expected(*given, k)
    assert sqnr_db(wanted, found) > 250
    assert sqnr_db(wanted, module()(*given)) < 30, "soft attention is something else"


def test_with_one_key_it_gives_the_value_of_the_best() -> None:
    query, key, value = operands()
    best = (query @ key.transpose(-1, -2)).argmax(-1)
    wanted = value.gather(2, best.unsqueeze(-1).expand(-1, -1, -1, value.shape[-1]))
    assert torch.equal(hard(Attention(), 1)(query, key, value), wanted)


@pytest.mark.parametrize("module", [Attention, Written])
@pytest.mark.parametrize("k", [9, 10, 1000])
def test_with_all_keys_it_is_soft_attention_bit_for_bit(module: type[nn.Module], k: int) -> None:
    given = operands()
    assert torch.equal(hard(module(), k)(*given), module()(*given))


@pytest.mark.parametrize("added", [float("-inf"), torch.finfo(torch.float64).min])
@pytest.mark.parametrize("k", [1, 3, 5])
def test_padded_keys_are_never_chosen_also_where_fewer_than_k_are_left(added: float, k: int) -> None:
    query, key, value = operands()
    valid = torch.arange(9) < torch.tensor([4, 7]).unsqueeze(1)  # [B, S]
    allowed = valid[:, None, :].expand(-1, query.shape[2], -1)
    key = torch.where(valid[:, None, :, None], key, 100 * key.abs())  # what is padded would score best
    wanted = expected(query, key, value, k, allowed)
    numbers = torch.zeros(2, 1, 1, 9, dtype=torch.float64).masked_fill(~valid[:, None, None, :], added)
    for module, mask in ((Attention(), valid[:, None, None, :]), (Attention(), numbers), (Written(), numbers)):
        assert sqnr_db(wanted, hard(module, k)(query, key, value, mask)) > 250
    other = torch.where(valid[:, None, :, None], value, 1e6)
    assert torch.equal(hard(Attention(), k)(query, key, other, numbers), hard(Attention(), k)(query, key, value, numbers))


def test_causal_grouped_and_scaled_attention_keep_their_meaning() -> None:
    query, key, value = operands(keys=6)
    causal = torch.ones(6, 6, dtype=torch.bool).tril().expand(2, -1, -1)
    assert sqnr_db(expected(query, key, value, 2, causal), hard(Attention(), 2)(query, key, value, is_causal=True)) > 250
    one, other = key[:, :1], value[:, :1]
    wanted = hard(Attention(), 2)(query, one.expand(-1, 3, -1, -1), other.expand(-1, 3, -1, -1))
    assert torch.equal(hard(Attention(), 2)(query, one, other, enable_gqa=True), wanted)
    assert torch.equal(hard(Attention(), 1)(query, key, value, scale=3.0), hard(Attention(), 1)(query, key, value))
    sharp = hard(Attention(), 2)(query * 3 * 8**0.5, key, value)
    assert sqnr_db(sharp, hard(Attention(), 2)(query, key, value, scale=3.0)) > 250


def test_a_failing_forward_leaves_nothing_switched() -> None:
    class Fails(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("no")

    given = operands()
    with pytest.raises(RuntimeError, match="no"):
        hard(Fails(), 1)(given[0])
    assert sqnr_db(Attention()(*given), expected(*given, 9)) > 250


def test_it_goes_with_the_other_passes() -> None:
    model, signature, rows = digits()
    trial = tried(EXAMPLE, model, signature, rows)
    assert trial.context.report["hard"] == ["blocks.1", "blocks.3"]
    assert trial.sqnr_db > 5
    assert torch.equal(trial.outputs(rebuilt(trial)), trial.outputs(trial.after))
    assert tried(Quantize(), trial.after, signature, rows).sqnr_db > 20
    dropped = tried(DropLayers(attention=[1]), trial.after, signature, rows)
    assert attached_to(dropped.after.get_submodule("blocks.3"), TopKAttention) is not None
    narrow = tried(PruneWidth(macs=0.8, repair=False), trial.after, signature, rows)
    assert narrow.sqnr_db > 0


def test_with_validation_rows_blocks_are_kept_only_where_the_loss_allows() -> None:
    model, signature, rows = digits()
    every = TopkAttention(k=16, accuracy_driven=True)
    alone = tried(every, model, signature, rows, validation=judge(64))
    start = judge(64).loss(model)
    told = alone.context.report["accuracy_driven"]
    assert [one["block"] for one in told["tried"]] == [3, 2, 1, 0]
    assert judge(64).loss(alone.after) <= start * (1 + 1e-6)
    assert told["end"]["loss"] == pytest.approx(judge(64).loss(alone.after))
    assert alone.context.report["hard"] == [f"blocks.{one['block']}" for one in reversed(told["tried"]) if one["taken"]]
    loose = tried(TopkAttention(k=1, accuracy_driven=True, tolerance=10), model, signature, rows, validation=judge(64))
    strict = tried(TopkAttention(k=1, accuracy_driven=True), model, signature, rows, validation=judge(64))
    assert len(loose.context.report["hard"]) > len(strict.context.report["hard"])
    bounded = tried(
        TopkAttention(k=1, accuracy_driven=True, tolerance=10, evaluations=4), model, signature, rows, validation=judge(64)
    )
    assert bounded.context.report["accuracy_driven"]["evaluations"] == {"used": 4, "allowed": 4}
    assert [one["block"] for one in bounded.context.report["accuracy_driven"]["untried"]] == [0]


def test_a_pass_without_its_validation_rows_says_so() -> None:
    with pytest.raises(UserError, match=r"there are no validation rows to choose by\n  Name some under data.validation"):
        tried(TopkAttention(k=1, accuracy_driven=True), *digits())


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(x)))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"k": 2, "blocks": [4]}, r"there is no block 4\n  There are 4: 0 to 3"),
        ({"k": 2, "blocks": [-5]}, "there is no block -5"),
    ],
    ids=str,
)
def test_blocks_that_are_not_there_are_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        tried(TopkAttention(**options), *digits())


def test_models_without_such_attention_are_refused_by_name() -> None:
    plain = Signature((TensorSpec("x", torch.float32, ("batch", 4, 8)),))
    with pytest.raises(UserError, match="no block has an attention that can be made hard"):
        tried(TopkAttention(k=2), Plain(), plain, [{"x": torch.randn(4, 4, 8)}])
    model, signature, rows = digits()
    first = tried(TopkAttention(k=2, blocks=[1]), model, signature, rows)
    with pytest.raises(UserError, match=r"blocks.1: its 2 largest scores count already\n  Take 1 off blocks"):
        tried(TopkAttention(k=3, blocks=[1]), first.after, signature, rows)
    others = tried(TopkAttention(k=3), first.after, signature, rows)
    assert others.context.report["skipped"] == {"blocks.1": "its 2 largest scores count already"}


@pytest.mark.parametrize(
    "options",
    [{}, {"k": 0}, {"k": 2, "tolerance": 0.1}, {"k": 2, "evaluations": 9}, {"k": 2, "accuracy_driven": True, "evaluations": 3}],
    ids=str,
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        TopkAttention(**options)


def test_the_traced_graph_selects_with_a_static_k() -> None:
    model, signature, rows = digits()
    trial = tried(TopkAttention(k=5), model, signature, rows)
    batch = torch.export.Dim("batch")
    program = torch.export.export(
        DIGITS.bind(trial.after), (), {"pixels": rows[0]["pixels"]}, dynamic_shapes={"pixels": {0: batch}}, strict=False
    )
    selections = [node for node in program.graph.nodes if node.target is torch.ops.aten.topk.default]
    assert [node.args[1] for node in selections] == [5] * 4
    with torch.inference_mode():
        pixels = rows[1]["pixels"]
        assert sqnr_db(trial.after(pixels), program.module()(pixels=pixels)) > 100
