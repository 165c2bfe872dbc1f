"""Hash attention in the families that have it, without a table of them, and why others have not."""

from __future__ import annotations

import copy

import pytest
import torch
from families import build
from sweeps import swept
from torch import Tensor, nn

from calibrate.errors import UserError
from calibrate.signature import Batch, Signature
from compress.anatomy import find
from compress.passes.contract import Context
from compress.passes.hash_attention import HashAttention
from compress.surgery import Surgery

STEP = HashAttention(bits=3, anchors=5, steps=1)


def built(name: str) -> tuple[nn.Module, Signature, Batch]:
    try:
        return build(name)
    except ImportError as error:
        pytest.skip(str(error))


def run(model: nn.Module, signature: Signature, batch: Batch) -> Tensor:
    with torch.inference_mode():
        return signature.call(model, batch)


@pytest.mark.parametrize("name", swept(["bert", "distilbert", "timm_vit"], ["bert", "timm_vit"]))
def test_families(name: str) -> None:
    """In every block; the same parts are found after, edits replay, and copies attend alike."""
    model, signature, example = built(name)
    anatomy = find(model, signature, example)
    before = run(model, signature, example)
    after = copy.deepcopy(model)
    context = Context(signature, anatomy, lambda: iter([example]), Surgery())
    STEP.run(after, context)
    assert context.report["hashed"] == [block.path for block in anatomy.blocks]
    found = run(after, signature, example)
    assert not torch.equal(found, before)
    assert find(after, signature, example).roles == anatomy.roles
    again = copy.deepcopy(model)
    Surgery().replay(again, context.edits)
    again.load_state_dict(after.state_dict())
    assert torch.equal(run(again, signature, example), found)
    assert torch.equal(run(copy.deepcopy(again), signature, example), found)


def test_what_is_padded_changes_nothing() -> None:
    model, signature, example = built("bert")
    context = Context(signature, find(model, signature, example), lambda: iter([example]), Surgery())
    STEP.run(model, context)
    masked = example["attention_mask"] == 0
    assert masked.any()
    other = {**example, "input_ids": torch.where(masked, 7, example["input_ids"])}
    assert not torch.equal(other["input_ids"], example["input_ids"])
    assert torch.equal(run(model, signature, other), run(model, signature, example))


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("bert_eager", "is written out as a softmax over all scores"),
        ("gpt2", "differs from query to query"),
        ("swin", "differs from query to query"),
        ("albert", "2 attentions run in it"),
    ],
)
def test_other_attention_is_refused_by_name(name: str, says: str) -> None:
    model, signature, example = built(name)
    with pytest.raises(UserError, match=says):
        STEP.targets(model, find(model, signature, example))


def test_blocks_with_local_attention_are_left_and_named() -> None:
    model, signature, example = built("modernbert")
    skips = STEP.skips(model, find(model, signature, example))
    assert list(skips) == ["model.layers.1"]
    assert "differs from query to query" in skips["model.layers.1"]
