"""``fuse`` on small models of many families: the same function, fewer operations, and timm's own fused modes as the oracle."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from families import build
from torch import nn

from calibrate.fidelity import sqnr_db
from calibrate.signature import Signature, TensorSpec
from compress.anatomy import find
from compress.layers import Packed
from compress.passes.fuse import Fuse
from compress.rewrites.applying import LIMIT
from compress.rewrites.precision import difference, doubled, in_double

sys.path.insert(0, str(Path(__file__).parent / "passes"))
from trial import Trial, rebuilt, tried

pytest.importorskip("transformers", reason="transformers is not installed")

QKV = {"qkv": 2}
MATCHED: dict[str, dict[str, int]] = {
    "bert": QKV, "albert": {"qkv": 1}, "llama": {"rms_norm": 5, **QKV}, "dinov2": {"layer_scale": 4, **QKV},
}  # fmt: skip
"""How many places of each family each rule matches; the rules that are not named match none."""

MANY: dict[str, dict[str, int]] = {
    "bert_eager": QKV, "distilbert": QKV, "t5_encoder": {"rms_norm": 4, **QKV}, "gpt2": {},
    "sentence_bert": QKV, "roberta": QKV, "electra": QKV, "deberta_v2": QKV, "mpnet": QKV, "esm": QKV,
    "convbert": QKV, "mobilebert": QKV, "clip_text": QKV, "opt": QKV, "llama_eager": {"rms_norm": 5, **QKV},
    "qwen3": {"rms_norm": 5, **QKV}, "gemma": {"rms_norm": 4, **QKV}, "phi": QKV, "vit": QKV, "deit": QKV, "beit": QKV,
    "clip_vision": QKV, "swin": {"qkv": 4},
    "segformer_semantic": {"batch_norm": 1, "qkv": 4},
    "mobilevitv2": {"batch_norm": 25, "linear_chain": 2}, "timm_levit": {"batch_norm": 52},
    "timm_efficientformer": {"batch_norm": 33, "layer_scale": 16}, "timm_mobilevit": {"batch_norm": 32},
}  # fmt: skip


SCALED = {"bert": 2, "llama": 2}
SCALED_TOO = {
    "bert_eager": 2, "distilbert": 2, "sentence_bert": 2, "roberta": 2, "electra": 2, "mobilebert": 2, "clip_text": 2, "opt": 2,
    "llama_eager": 2, "gemma": 2, "phi": 2, "vit": 2, "deit": 2, "beit": 2, "dinov2": 2, "clip_vision": 2, "swin": 4,
    "segformer_semantic": 4,
}  # fmt: skip
"""Where the scale of the scores can go into the queries, which is done only where it is asked for."""


def fused(name: str, expected: dict[str, int], rules: list[str] | None = None) -> Trial:
    model, signature, example = build(name)
    trial = tried(Fuse(rules=rules), model, signature, [example])
    report = trial.context.report
    rules = report["rules"]
    assert {rule: found["matched"] for rule, found in rules.items() if found["matched"]} == expected
    assert all(found["difference"] <= LIMIT for found in rules.values() if found["matched"])
    assert "warnings" not in report or not expected
    assert trial.sqnr_db > 95, "in float32, with weights rounded once"
    # A scale that is folded leaves torch's graph as it was: its product is inside the attention. Two products that become one and
    # a split do too.
    packed = {module for module in trial.after.modules() if isinstance(module, Packed)}
    alone = sum(count for rule, count in expected.items() if rule not in ("attention_scale", "qkv"))
    assert report["operations_before"] - report["operations_after"] >= alone + sum(len(one.sizes) > 2 for one in packed)
    assert sqnr_db(trial.outputs(trial.after), trial.outputs(rebuilt(trial))) > 110
    return trial


@pytest.mark.parametrize("name", MATCHED)
def test_families_keep_their_function_with_fewer_operations(name: str) -> None:
    trial = fused(name, MATCHED[name])
    anatomy = find(trial.after, trial.signature, {key: tensor[:2] for key, tensor in trial.rows[0].items()})
    kept = [(block.heads, block.kv_heads, block.head_dim) for block in anatomy.blocks]
    assert kept == [(block.heads, block.kv_heads, block.head_dim) for block in trial.anatomy.blocks]
    assert anatomy.joins == trial.anatomy.joins
    assert anatomy.totals["flops"] == trial.anatomy.totals["flops"]


@pytest.mark.parametrize("name", SCALED)
def test_scales_of_scores_go_into_queries(name: str) -> None:
    fused(name, {"attention_scale": SCALED[name]}, ["attention_scale"])


@pytest.mark.slow
@pytest.mark.parametrize("name", SCALED_TOO)
def test_scales_of_scores_go_into_queries_of_many_more(name: str) -> None:
    fused(name, {"attention_scale": SCALED_TOO[name]}, ["attention_scale"])


@pytest.mark.slow
@pytest.mark.parametrize("name", MANY)
def test_many_more_families_keep_their_function(name: str) -> None:
    fused(name, MANY[name])


def timm_blocks() -> dict[str, tuple[nn.Module, str]]:
    """Modules of timm that have a fused mode of their own, and what switches it on."""
    build("timm_vit")  # lets timm import
    from timm.models import byobnet, fastvit, levit

    blocks: dict[str, tuple[nn.Module, str]] = {
        "mobileone": (fastvit.MobileOneBlock(6, 6, 3, num_conv_branches=2, use_act=True), "reparameterize"),
        "mobileone, stride 2": (fastvit.MobileOneBlock(6, 12, 3, stride=2, group_size=1), "reparameterize"),
        "large kernel": (fastvit.ReparamLargeKernelConv(6, 6, 7, 1, group_size=1, small_kernel=3), "reparameterize"),
        "repmixer": (fastvit.RepMixer(6, 3), "reparameterize"),
        "positions": (fastvit.RepConditionalPosEnc(6, 6), "reparameterize"),
        "repvgg": (byobnet.RepVggBlock(6, 6, 3), "reparameterize"),
        "levit": (levit.ConvNorm(6, 8, 3, padding=1), "fuse"),
    }
    return blocks


@pytest.mark.parametrize("name", ["mobileone", "mobileone, stride 2", "large kernel", "repmixer", "positions", "repvgg", "levit"])
def test_branches_are_what_timm_makes_of_them(name: str) -> None:
    pytest.importorskip("timm", reason="timm is not installed")
    from families import randomize

    block, switch = timm_blocks()[name]
    model = nn.Sequential(nn.Conv2d(3, 6, 1), block).eval()
    randomize(model)
    signature = Signature((TensorSpec("input", torch.float32, ("batch", 3, 9, 9)),), "tensor")
    rows = {"input": torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(0))}
    trial = tried(Fuse(), model, signature, [rows])
    theirs: Any = copy.deepcopy(model)
    made = getattr(theirs[1], switch)()
    if made is not None:
        theirs[1] = made
    with doubled(theirs), doubled(trial.after), torch.no_grad(), in_double():
        wide = rows["input"].double()
        assert difference(theirs(wide), trial.after(wide)) < 1e-6, "both round their kernel to float32 once"
        assert difference(model.double()(wide), trial.after(wide)) < 1e-6
        assert difference(theirs(wide) * (1 + 1e-4), trial.after(wide)) > 1e-6
    assert sum(isinstance(module, nn.Conv2d) for module in trial.after.modules()) == 2
    assert not any(isinstance(module, nn.BatchNorm2d) for module in trial.after.modules())


@pytest.mark.slow
@pytest.mark.parametrize(("name", "batch_norms"), [("timm_fastvit", 0), ("timm_levit", 0)])
def test_whole_models_are_what_timm_makes_of_them(name: str, batch_norms: int) -> None:
    pytest.importorskip("timm", reason="timm is not installed")
    model, signature, example = build(name)
    trial = tried(Fuse(), model, signature, [example])
    from timm.utils.model import reparameterize_model

    theirs = reparameterize_model(copy.deepcopy(model))
    assert sqnr_db(trial.outputs(theirs), trial.outputs(trial.after)) > 90
    assert sum("BatchNorm" in type(module).__name__ for module in trial.after.modules()) == batch_norms
    convolutions = [sum(isinstance(m, (nn.Conv2d, nn.Linear)) for m in each.modules()) for each in (theirs, trial.after)]
    assert convolutions[1] <= convolutions[0], "nothing that they merge is left"
