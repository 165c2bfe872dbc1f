"""Fewer tokens in every family that allows it, found by running it, and why the others are refused."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from families import build
from sweeps import swept
from torch import Tensor, nn

from calibrate.errors import UserError
from calibrate.fidelity import sqnr_db
from calibrate.signature import Batch, Signature
from compress.anatomy import Anatomy, find
from compress.passes.contract import Context
from compress.passes.fuse_tokens import FuseTokens
from compress.passes.merge_tokens import MergeTokens
from compress.passes.prune_tokens import PruneTokens
from compress.passes.token_schedule import TokenPass
from compress.surgery import Edit, Surgery
from compress.tokens.layout import find_layout

KEEP = {0: 11, 1: 7}
PASSES = {
    "zero_tprune": PruneTokens(keep=KEEP, votes=3),
    "received": PruneTokens(keep=KEEP, score="received"),
    "merge": MergeTokens(keep=KEEP),
    "fuse": FuseTokens(keep=KEEP),
}


@functools.cache
def built(name: str) -> tuple[nn.Module, Signature, Batch, Anatomy]:
    try:
        model, signature, example = build(name)
    except ImportError as error:
        pytest.skip(str(error))
    return model, signature, example, find(model, signature, example)


def run(model: nn.Module, signature: Signature, batch: Batch) -> Tensor:
    with torch.inference_mode():
        return signature.call(model, batch)


def ran(step: TokenPass, name: str) -> tuple[nn.Module, Context]:
    model, signature, example, anatomy = built(name)
    context = Context(signature, anatomy, lambda: iter([example]), Surgery())
    return step.run(copy.deepcopy(model), context), context


@pytest.mark.parametrize("step", PASSES)
@pytest.mark.parametrize(
    "name",
    swept(
        ["vit", "vit_eager", "deit", "clip_vision", "bert", "bert_eager", "distilbert", "sentence_bert"], ["vit", "deit", "bert"]
    ),
)
def test_families(name: str, step: str) -> None:
    """As many tokens as asked reach the last MLP, and a row alone gives what it gives among others; edits replay."""
    model, signature, example, anatomy = built(name)
    after, context = ran(PASSES[step], name)
    seen: list[int] = []
    last = after.get_submodule(anatomy.blocks[-1].roles["mlp.down"][0])
    handle = last.register_forward_hook(lambda module, inputs, output: seen.append(output.shape[1]))
    given = run(after, signature, example)
    handle.remove()
    assert seen == [7]
    whole = run(model, signature, example)
    assert given.shape == whole.shape
    assert not torch.equal(given, whole)
    alone = [run(after, signature, {key: value[row : row + 1] for key, value in example.items()}) for row in range(len(whole))]
    assert sqnr_db(given, torch.cat(alone)) > 100
    fresh = copy.deepcopy(model)
    Surgery().replay(fresh, [Edit(**edit.json()) for edit in context.edits])
    assert torch.equal(run(fresh, signature, example), given)
    assert torch.equal(run(copy.deepcopy(fresh), signature, example), given), "copies hand on as many"


@pytest.mark.parametrize(
    ("name", "step"),
    swept(
        [("vit", "zero_tprune"), ("vit", "fuse"), ("sentence_bert", "merge")],
        [("vit", "zero_tprune"), ("sentence_bert", "merge")],
    ),
)
def test_flops_are_those_of_the_traced_graph(name: str, step: str) -> None:
    _, signature, example, anatomy = built(name)
    after, context = ran(PASSES[step], name)
    counted = find(after, signature, example).totals["flops"] / anatomy.totals["flops"]
    assert context.report["flops_share"] == pytest.approx(counted, rel=1e-9)
    assert counted < 0.9


@pytest.mark.parametrize("step", [PruneTokens(keep={0: 8}, score="received"), MergeTokens(keep={0: 9}), FuseTokens(keep={0: 9})])
@pytest.mark.parametrize("name", ["bert", "sentence_bert"])
def test_padding_goes_first_and_costs_nothing(name: str, step: TokenPass) -> None:
    """Rows with no more real tokens than are kept give what they gave; what stands behind their end changes nothing."""
    model, signature, example, _ = built(name)
    after, _ = ran(step, name)
    short = {key: value[2:3].repeat(2, 1) for key, value in example.items()}
    assert int(short["attention_mask"][0].sum()) == 8
    assert sqnr_db(run(model, signature, short), run(after, signature, short)) > 100
    other = {key: value.clone() for key, value in example.items()}
    other["input_ids"] = torch.where(example["attention_mask"] > 0, example["input_ids"], 7)
    assert sqnr_db(run(after, signature, example), run(after, signature, other)) > 100
    control = run(after, signature, {**other, "attention_mask": torch.ones_like(other["attention_mask"])})
    assert sqnr_db(run(after, signature, example), control) < 60


@pytest.mark.parametrize("method", ["prune", "merge"])
def test_a_mean_over_tokens_weighs_them_by_size(method: str) -> None:
    """The last block gives every position its token: equal to the mean of what is left, weighted by size."""
    _, signature, example, anatomy = built("sentence_bert")
    step: TokenPass = PruneTokens(keep={0: 9}, score="received") if method == "prune" else MergeTokens(keep={0: 9})
    after, _ = ran(step, "sentence_bert")
    heard: list[Tensor] = []
    sizes: list[Tensor] = []
    path = anatomy.blocks[-1].path
    norm = after.get_submodule(anatomy.blocks[-1].path + ".output")
    handle = norm.register_forward_hook(lambda module, inputs, output: heard.append(output))
    from compress.layers import TokenReducer
    from compress.layers.attached import attached_to

    reducer = attached_to(after.get_submodule(path), TokenReducer)
    assert reducer is not None
    stream = reducer.stream
    other = norm.register_forward_hook(lambda module, inputs, output: sizes.append(stream.sizes(4, output.device)))
    given = run(after, signature, example)
    handle.remove()
    other.remove()
    assert heard[0].shape[1] == 9
    mean = (heard[0] * sizes[0].unsqueeze(-1)).sum(1) / sizes[0].sum(1, keepdim=True)
    assert sqnr_db(given, mean / mean.norm(dim=1, keepdim=True)) > 100
    plain = heard[0].mean(1)
    assert sqnr_db(given, plain / plain.norm(dim=1, keepdim=True)) < 40, "an unweighted mean is something else"


def test_separators_that_all_rows_end_with_are_found_and_stay() -> None:
    model, signature, example, _ = built("bert")
    ended = {key: value.clone() for key, value in example.items()}
    ends = ended["attention_mask"].sum(1) - 1
    ended["input_ids"][torch.arange(4), ends] = 3
    ended["input_ids"][0, 5] = 3
    anatomy = find(model, signature, ended)
    layout = find_layout("test", model, anatomy)
    assert layout.separators == (3,)
    step = PruneTokens(keep={0: 5}, score="received")
    context = Context(signature, anatomy, lambda: iter([ended]), Surgery())
    after = step.run(copy.deepcopy(model), context)
    assert context.report["separators"] == [3]
    from compress.layers import TokenReducer
    from compress.layers.attached import attached_to

    reducer = attached_to(after.get_submodule(anatomy.blocks[0].path), TokenReducer)
    assert reducer is not None
    reducer.stream.watch = []
    run(after, signature, ended)
    left = reducer.stream.watch[0].sum(1)
    assert (left[torch.arange(4), ends] == 1).all()
    assert left[0, 5] == 1
    assert (left.sum(1) == 5).all()


def test_a_text_tower_keeps_the_token_that_its_head_reads() -> None:
    """A causal tower whose head reads the last token: pruned, with the masks of what is left; merged it cannot be."""
    model, signature, example, _ = built("clip_text")
    ended = {key: value.clone() for key, value in example.items()}
    ended["input_ids"][torch.arange(4), ended["attention_mask"].sum(1) - 1] = 2
    anatomy = find(model, signature, ended)
    step = PruneTokens(keep={0: 12, 1: 9}, score="received")
    context = Context(signature, anatomy, lambda: iter([ended]), Surgery())
    after = step.run(copy.deepcopy(model), context)
    given = run(after, signature, ended)
    assert given.shape == run(model, signature, ended).shape
    short = {key: value[2:3].repeat(2, 1) for key, value in ended.items()}
    assert sqnr_db(run(model, signature, short), run(after, signature, short)) > 100
    with pytest.raises(UserError, match="see only those before them"):
        MergeTokens(reduce=2).targets(model, anatomy)


def test_the_distillation_token_is_protected() -> None:
    for name in ("deit", "timm_deit_distilled"):
        model, _, _, anatomy = built(name)
        assert find_layout("test", model, anatomy).prefix == 2


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("swin", "not rows of tokens|windows|hierarchy"),
        pytest.param("timm_swin", "not rows of tokens", marks=pytest.mark.slow),
        pytest.param("timm_pit", "a stage of a hierarchy", marks=pytest.mark.slow),
        ("beit", "in another order|for each position"),
        pytest.param("timm_eva", "in another order", marks=pytest.mark.slow),
        pytest.param("t5_encoder", "in another order", marks=pytest.mark.slow),
        ("modernbert", "rotary or relative positions"),
        pytest.param("mpnet", "rotary or relative positions", marks=pytest.mark.slow),
        ("albert", "runs 2 times"),
        pytest.param("fnet", "no block with attention", marks=pytest.mark.slow),
        ("torch_encoder", "cannot be observed"),
        ("llama", "rotary or relative positions"),
        pytest.param("gpt2", "rotary or relative positions|see only those before", marks=pytest.mark.slow),
    ],
)
def test_models_that_need_every_position_are_refused(name: str, says: str) -> None:
    model, _, _, anatomy = built(name)
    for step in (PruneTokens(reduce=2), MergeTokens(reduce=2)):
        with pytest.raises(UserError, match=says) as caught:
            step.targets(model, anatomy)
        assert caught.value.hint


def test_one_output_a_token_can_be_merged_and_not_pruned() -> None:
    model, signature, example, anatomy = built("bert_mlm")
    with pytest.raises(UserError, match="one output for each token") as caught:
        PruneTokens(reduce=2).targets(model, anatomy)
    assert "merge_tokens" in caught.value.hint
    after, _ = ran(MergeTokens(keep={0: 12}), "bert_mlm")
    assert run(after, signature, example).shape == run(model, signature, example).shape
