"""``fuse_layers`` on small models of many families: exact where nothing is learnt, nearer where something is, generation with a
cache."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from families import build
from sweeps import swept
from test_depth_families import deeper, generated
from torch import nn

from calibrate.fidelity import sqnr_db
from calibrate.signature import Batch, Signature
from compress.passes.drop_layers import DropLayers
from compress.passes.fuse_layers import FuseLayers

sys.path.insert(0, str(Path(__file__).parent / "passes"))
from trial import Trial, rebuilt, tried

pytest.importorskip("transformers", reason="transformers is not installed")

QUICK: dict[str, Any] = {"epochs": 3, "rank": 8, "rate": 1e-3}


def rounds(trial: Trial) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = trial.context.report["rounds"]
    return found


def four(name: str) -> tuple[nn.Module, Signature, Batch]:
    """A model of the family with four blocks in one list."""
    if name in ("gpt2", "llama", "qwen3", "gemma2", "bert", "vit"):
        made: tuple[nn.Module, Signature, Batch] = deeper(name)
        return made
    return build(name)


FAMILIES = ["bert", "vit", "gpt2", "llama", "qwen3", "gemma2", "swin", "timm_vit"]


@pytest.mark.parametrize("name", swept(FAMILIES, ["bert", "llama"]))
def test_what_is_not_trained_is_plain_dropping_exactly(name: str) -> None:
    model, signature, example = four(name)
    trial = tried(FuseLayers(count=1, epochs=0), model, signature, [example] * 3)
    gone = [block.index for block in trial.anatomy.blocks if block.path in trial.context.report["blocks"]]
    dropped = tried(DropLayers(blocks=gone), model, signature, [example])
    assert torch.equal(
        trial.outputs(trial.after), dropped.outputs(dropped.after)[:4].repeat(3, *[1] * (trial.outputs(model).dim() - 1))
    )
    assert [edit.json() for edit in trial.context.edits] == [edit.json() for edit in dropped.context.edits]
    (told,) = rounds(trial)
    assert not told["kept"]
    assert told["training"]["loss_after"] == told["training"]["loss_before"]
    parted = [example] * 3
    held = {key: value[1:] for key, value in parted[-1].items()}
    with torch.inference_mode():
        level = judged(signature.call(model, held), signature.call(dropped.after, held), held)
    assert told["output_sqnr_db_dropped"] == pytest.approx(level, abs=1e-3), "with the grafts in place, before the first step"


def judged(wanted: torch.Tensor, given: torch.Tensor, batch: Batch) -> float:
    mask = batch.get("attention_mask")
    if mask is not None and wanted.dim() == 3:
        wanted, given = wanted[mask.bool()], given[mask.bool()]
    return sqnr_db(wanted, given)


@pytest.mark.parametrize("name", swept(FAMILIES, ["gpt2", "swin"]))
def test_families_learn_from_the_block_that_goes(name: str) -> None:
    model, signature, example = four(name)
    trial = tried(FuseLayers(count=1, **{**QUICK, "rate": 3e-3, "epochs": 6}), model, signature, [example] * 4)
    (told,) = rounds(trial)
    assert told["not_injected"] == {}
    assert told["injected"] >= 4 * (len(told["group"]) - 1)
    assert told["kept"], told
    assert told["training"]["loss_after"] < told["training"]["loss_before"]
    assert told["output_sqnr_db_fused"] > told["output_sqnr_db_dropped"] + 0.1
    assert trial.context.report["output_sqnr_db"] == pytest.approx(told["output_sqnr_db_fused"], abs=1e-3), "folded as unfolded"
    assert torch.equal(trial.outputs(rebuilt(trial)), trial.outputs(trial.after))
    assert not any(type(module).__name__ == "Graft" for module in trial.after.modules())


@pytest.mark.parametrize("name", swept(["gpt2", "llama", "gemma2"], ["gemma2"]))
def test_cached_generation_equals_uncached(name: str) -> None:
    model, signature, example = deeper(name)
    trial = tried(FuseLayers(blocks=[0, 2], **{**QUICK, "epochs": 2}), model, signature, [example] * 3)
    assert any(told["kept"] for told in rounds(trial))
    ids = example["input_ids"][:1, :5]
    (with_cache, logits), (without, expected) = (generated(trial.after, ids, cached) for cached in (True, False))
    assert sqnr_db(expected, logits) > 80
    assert torch.equal(with_cache, without)
    assert trial.after.config.num_hidden_layers == 2  # type: ignore[union-attr]
