"""Pruned tokens: which stay, what it equals at its limits, what composes with it, and what is refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from trial import DIGITS, digits, tried

from calibrate.errors import UserError
from calibrate.fidelity import sqnr_db
from compress.anatomy import find
from compress.checks import check_lengths
from compress.passes.contract import Context
from compress.passes.drop_layers import DropLayers
from compress.passes.merge_tokens import MergeTokens
from compress.passes.prune_tokens import PruneTokens
from compress.passes.quantize import Quantize
from compress.recipe import read
from compress.surgery import Surgery

EXAMPLE = PruneTokens(reduce=4, votes=2)


def test_all_tokens_are_the_identity() -> None:
    """Nothing is put on a model whose tokens all stay."""
    done = tried(PruneTokens(keep={1: 17}), *digits())
    assert done.context.edits == []
    assert torch.equal(done.outputs(done.before), done.outputs(done.after))


def test_between_blocks_and_before_the_mlp_is_the_same_function() -> None:
    """The MLP works token by token: what leaves before it, or after the block, leaves the same."""
    model, signature, rows = digits()
    found = []
    for place in ("attention", "block"):
        after = copy.deepcopy(model)
        context = Context(signature, find(model, signature, rows[0]), lambda: iter(rows), Surgery())
        PruneTokens(keep={1: 9}, score="received").run(after, context)
        (edit, *_) = [edit for edit in context.edits if edit.config and edit.config["keep"] == 9]
        placed = [type(one)(one.verb, one.path, one.layer, {**(one.config or {}), "place": place}) for one in context.edits]
        fresh = copy.deepcopy(model)
        Surgery().replay(fresh, placed)
        found.append(torch.cat([DIGITS.call(fresh, batch) for batch in rows]))
        assert edit.path == "blocks.1"
    assert sqnr_db(*found) > 100


def test_what_is_planned_is_what_is_done() -> None:
    done = tried(PruneTokens(share=0.7, blocks=[0, 2]), *digits())
    assert done.context.report["keep"] == {"0": 12, "2": 8}
    assert [one["handed_on"] for one in done.context.report["tokens"]] == [12, 12, 8, 8]
    assert 0 < done.context.report["flops_share"] < 1


def test_a_search_keeps_to_the_flops_and_beats_an_even_schedule() -> None:
    done = tried(PruneTokens(flops=0.75, score="received", rows=48), *digits())
    told = done.context.report
    assert told["flops_share"] <= 0.75
    losses = [one["kl"] for one in told["search"]["tried"]]
    assert told["search"]["loss"]["kl"] == min(losses)
    assert len(losses) > 3
    keep = {int(number): kept for number, kept in told["keep"].items()}
    again = tried(PruneTokens(keep=keep, score="received"), *digits())
    assert torch.equal(again.outputs(again.after), done.outputs(done.after)), "the numbers that it tells give the same"


@pytest.mark.parametrize("first", ["tokens", "quantize"])
def test_with_quantize_in_either_order(first: str) -> None:
    model, signature, rows = digits()
    steps: list[Any] = [PruneTokens(keep={1: 10}, score="received"), Quantize(weights=8, activations="static")]
    alone = tried(steps[0], model, signature, rows)
    for step in steps if first == "tokens" else steps[::-1]:
        done = tried(step, model, signature, rows)
        model = done.after
    assert sqnr_db(alone.outputs(alone.after), done.outputs(model)) > 12
    assert sum("attention.query" in site.roles for site in find(model, signature, rows[0]).sites) == 4


@pytest.mark.parametrize("first", ["tokens", "layers"])
def test_with_dropped_attention_in_either_order(first: str) -> None:
    model, signature, rows = digits()
    steps: list[Any] = [PruneTokens(keep={1: 10}, score="received"), DropLayers(attention=[3])]
    for step in steps if first == "tokens" else steps[::-1]:
        model = tried(step, model, signature, rows).after
    seen: list[int] = []
    handle = model.get_submodule("blocks.3").register_forward_hook(lambda module, inputs, output: seen.append(output.shape[1]))
    DIGITS.call(model, rows[0])
    handle.remove()
    assert seen == [10]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"keep": {1: 1}}, "fewer than stay in any case"),
        ({"keep": {9: 5}}, "no block 9"),
        ({"keep": {1: 40}}, "more than there are"),
        ({"keep": {1: 8, 2: 12}}, "is to keep 12 of 8"),
        ({"reduce": [1, 1, 1, 1, 1]}, "names 5 blocks"),
        ({"reduce": [0, 30]}, "to take out 30 of 17"),
        ({"flops": 0.01}, "less than what stays in any case"),
        ({"share": 0.5, "blocks": [7]}, "no block 7"),
        ({"keep": {1: 8}, "separators": [3]}, "separators"),
        ({"keep": {1: 8}, "enter": 12}, "gets no mask"),
        ({"keep": {1: 8}, "protect": 9}, "fewer than stay in any case"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_runs(options: dict[str, Any], says: str) -> None:
    model, signature, rows = digits()
    with pytest.raises(UserError, match=says) as caught:
        PruneTokens(**options).targets(model, find(model, signature, rows[0]))
    assert caught.value.hint


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"keep": {1: 8}, "flops": 0.5},
        {"reduce": [-1]},
        {"reduce": 3, "rows": 9},
        {"reduce": 2, "score": "random", "votes": 3},
    ],
)
def test_options_that_contradict_each_other_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="\n"):
        PruneTokens(**options)


def test_a_second_pass_over_tokens_is_refused() -> None:
    model, signature, rows = digits()
    after = tried(PruneTokens(keep={1: 10}), model, signature, rows).after
    with pytest.raises(UserError, match="reduced already"):
        MergeTokens(reduce=1).targets(after, find(after, signature, rows[0]))


@pytest.mark.parametrize("step", ["prune_tokens: {keep: {0: 33}}", "merge_tokens: {reduce: 4}", "fuse_tokens: {share: 0.8}"])
def test_a_file_whose_length_is_to_be_free_is_refused_with_what_to_write(step: str, tmp_path: Path) -> None:
    path = tmp_path / "free.yaml"
    path.write_text(
        "model: hf:some/encoder\ndata: {format: text, tokens: 64, columns: {text: 0}, calibration: {path: rows.tsv}}\n"
        f"passes:\n  - {step}\nexport:\n  - coreml\n  - onnx: {{dynamic: [batch, tokens]}}\n"
    )
    recipe = read(path)
    with pytest.raises(UserError, match="leaves the number of tokens free") as caught:
        check_lengths(recipe, recipe.passes[0])
    assert caught.value.where.endswith("free.yaml:7:21: onnx")
    assert "dynamic: [batch]" in caught.value.hint
    path.write_text(path.read_text().replace(", tokens]", "]"))
    recipe = read(path)
    check_lengths(recipe, recipe.passes[0])
