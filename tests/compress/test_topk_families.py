"""Hard attention in every family, without a table of them."""

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
from compress.passes.topk_attention import TopkAttention
from compress.surgery import Surgery


@pytest.mark.parametrize(
    "name",
    swept(
        ["bert", "bert_eager", "gpt2", "llama", "opt", "vit", "swin", "mobilevit", "timm_vit", "timm_swin"],
        ["bert_eager", "llama", "swin"],
    ),
)
def test_families(name: str) -> None:
    """In every block, with the same parts found after; the identity where k reaches, another function where it does not."""
    try:
        model, signature, example = build(name)
    except ImportError as error:
        pytest.skip(str(error))
    anatomy = find(model, signature, example)
    before = run(model, signature, example)
    wide, few = copy.deepcopy(model), copy.deepcopy(model)
    context = Context(signature, anatomy, lambda: iter([example]), Surgery())
    TopkAttention(k=1000).run(wide, Context(signature, anatomy, lambda: iter([example]), Surgery()))
    TopkAttention(k=2).run(few, context)
    assert context.report["hard"] == [block.path for block in anatomy.blocks]
    assert torch.equal(run(wide, signature, example), before)
    after = run(few, signature, example)
    assert not torch.equal(after, before)
    assert find(few, signature, example).roles == anatomy.roles
    again = copy.deepcopy(model)
    Surgery().replay(again, context.edits)
    assert torch.equal(run(again, signature, example), after)
    assert torch.equal(run(copy.deepcopy(again), signature, example), after), "copies attend alike"


def run(model: nn.Module, signature: Signature, batch: Batch) -> Tensor:
    with torch.inference_mode():
        return signature.call(model, batch)


@pytest.mark.parametrize(
    ("name", "says"),
    swept(
        [
            ("bart", "2 attentions, or softmaxes like theirs, run in it"),
            ("siglip_vision", "runs neither torch's scaled_dot_product_attention nor a softmax over scores"),
            ("timm_efficientformer", "it has no attention"),
        ],
        [("bart", "2 attentions, or softmaxes like theirs, run in it")],
    ),
)
def test_other_attention_is_left_and_named(name: str, says: str) -> None:
    try:
        model, signature, example = build(name)
    except ImportError as error:
        pytest.skip(str(error))
    anatomy = find(model, signature, example)
    skips = TopkAttention(k=2).skips(model, anatomy)
    assert any(says in reason for reason in skips.values())
    number = next(block.index for block in anatomy.blocks if block.path in skips)
    with pytest.raises(UserError, match=f"Take {number} off blocks"):
        TopkAttention(k=2, blocks=[number]).targets(model, anatomy)


def test_a_model_without_softmax_is_refused() -> None:
    try:
        model, signature, example = build("fnet")
    except ImportError as error:
        pytest.skip(str(error))
    with pytest.raises(UserError, match="no block has an attention that can be made hard"):
        TopkAttention(k=2).targets(model, find(model, signature, example))
