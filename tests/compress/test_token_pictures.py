"""What the report shows of tokens that left: the rows that tell most, what stands for each token, what is left."""

from __future__ import annotations

from typing import Any

import torch
from families import build

from calibrate.signature import Batch, Signature, TensorSpec
from compress.anatomy import find
from compress.embedded import digits_model, digits_rows
from compress.page.tokens import token_pictures
from compress.passes.contract import Context
from compress.passes.merge_tokens import MergeTokens
from compress.passes.prune_tokens import PruneTokens
from compress.passes.token_schedule import TokenPass
from compress.surgery import Surgery
from compress.tokens.pictures import longest

DIGITS = Signature((TensorSpec("pixels", torch.float32, ("batch", 1, 8, 8)),))


def told(step: TokenPass, lengths: list[int]) -> tuple[list[dict[str, Any]], list[Batch]]:
    model, signature, example = build("bert")
    tokens = example["input_ids"].shape[1]
    rows = {name: value[:1].repeat(len(lengths), 1) for name, value in example.items()}
    rows["input_ids"] = torch.randint(5, 50, rows["input_ids"].shape, generator=torch.Generator().manual_seed(0))
    rows["attention_mask"] = (torch.arange(tokens) < torch.tensor(lengths).unsqueeze(1)).long()
    batches = [
        {name: value[at : at + 2, : max(lengths[at : at + 2])] for name, value in rows.items()}
        for at in range(0, len(lengths), 2)
    ]
    context = Context(signature, find(model, signature, example), lambda: iter(batches), Surgery())
    step.run(model, context)
    return context.report["pictures"], batches


def test_the_longest_rows_of_text_are_shown_and_padding_is_in_no_group() -> None:
    lengths = [4, 9, 10, 12, 3, 6]
    found, batches = told(MergeTokens(keep={0: 9}), lengths)
    assert [one["real"] for one in found] == [12, 10]
    assert [one["ids"] for one in found] == batches[1]["input_ids"][[1, 0]].tolist()
    for one in found:
        (stage,) = one["stages"]
        assert all(group >= 0 for group in stage["groups"][: one["real"]]), "merged tokens are in a group"
        assert set(stage["groups"][one["real"] :]) <= {-1}
    mosaics = token_pictures(found, 1, {number: f"w{number}" for number in range(100)})
    assert len(mosaics) == 2
    for one, mosaic in zip(found, mosaics, strict=True):
        groups = one["stages"][0]["groups"][: one["real"]]
        assert mosaic.stages[0].says == f"{len(set(groups))} of {one['real']} words are left"
        assert [word.size for word in mosaic.stages[0].words[: one["real"]]] == [groups.count(group) for group in groups]


def test_pruned_words_are_gone_and_as_many_as_are_kept_stay() -> None:
    (first, _), _ = told(PruneTokens(keep={0: 7}, score="received"), [4, 9, 5, 12])
    groups = first["stages"][0]["groups"]
    assert len({group for group in groups if group >= 0}) == 7
    assert groups.count(-1) == len(groups) - 7


def test_without_a_mask_the_example_is_shown_as_patches() -> None:
    example = next(iter(digits_rows("calibration", 4).batches(4)))
    assert longest(iter([example]), example) is example
    model = digits_model().eval()
    context = Context(DIGITS, find(model, DIGITS, example), lambda: iter([example]), Surgery())
    PruneTokens(keep={1: 9}, score="received").run(model, context)
    mosaic = token_pictures(context.report["pictures"], 1, {})[0]
    assert [stage.heading for stage in mosaic.stages] == ["image", "block 1"]
    assert sum(not patch.gone for patch in mosaic.stages[1].patches) == 8
    assert mosaic.stages[1].says == "8 of 16 patches are left"
