"""Sublayers and blocks of many families: what goes with them, and cached generation after they are gone."""

from __future__ import annotations

import copy
import itertools
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, build
from sweeps import swept
from torch import nn

from calibrate.fidelity import sqnr_db
from compress.anatomy import find
from compress.depth.sublayers import find_sublayers
from compress.layers import Absent
from compress.passes.drop_layers import DropLayers

sys.path.insert(0, str(Path(__file__).parent / "passes"))
from trial import rebuilt, tried

pytest.importorskip("transformers", reason="transformers is not installed")

NORMS = {
    "bert": ([], []),
    "gpt2": (["ln_1"], []),
    "llama": (["input_layernorm"], []),
    "opt": (["self_attn_layer_norm"], []),
    "qwen3": (["input_layernorm", "q_norm", "k_norm"], []),
    "gptj": ([], []),
    "gemma2": (["input_layernorm"], ["post_attention_layernorm"]),
    "olmo2": (["q_norm", "k_norm"], ["post_attention_layernorm"]),
    "dinov2": (["norm1"], ["layer_scale1"]),
    "swinv2": ([], ["layernorm_before"]),
    "timm_vit": (["norm1"], []),
}


@pytest.mark.parametrize("name", swept(NORMS, ["bert", "llama", "qwen3", "gemma2", "timm_vit"]))
def test_the_norms_that_only_a_sublayer_reads_go_with_it_and_it_adds_zero(name: str) -> None:
    model, signature, example = build(name)
    trial = tried(DropLayers(attention=[0], mlp=[1]), model, signature, [example])
    own = find_sublayers(model, trial.anatomy, trial.anatomy.blocks[:1], "attention")[0]
    before, after = NORMS[name]
    assert [path.rpartition(".")[2] for path in own.norms] == before
    assert [path.rpartition(".")[2] for path in own.after] == after
    assert all(isinstance(trial.after.get_submodule(path), Absent) for path in (*own.norms, *own.after))
    expected = copy.deepcopy(model)
    for sublayer in (own, find_sublayers(model, trial.anatomy, trial.anatomy.blocks[1:2], "mlp")[0]):
        place = (*sublayer.after, sublayer.sink)[0] if not sublayer.after else sublayer.after[-1]
        expected.get_submodule(place).register_forward_hook(lambda module, args, output: torch.zeros_like(output))
    assert torch.equal(trial.outputs(trial.after), trial.outputs(expected))
    assert torch.equal(trial.outputs(rebuilt(trial)), trial.outputs(trial.after))


@pytest.mark.parametrize("name", ["timm_cait", "beit"])
def test_where_a_parameter_scales_the_output_no_constant_can_stay_and_it_is_told(name: str) -> None:
    model, signature, example = build(name)
    trial = tried(DropLayers(sublayers="attention", count=1), model, signature, [example])
    assert trial.context.report["repair"]["constants"] == []
    assert len(trial.context.report["repair"]["no_place"]) == 1


DECODERS = ["gpt2", "llama", "qwen2", "opt", "gemma2"]


def deeper(name: str) -> Any:
    """A decoder with four blocks."""
    import transformers

    model, signature, example = build(name)
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = 4
    if getattr(config, "layer_types", None):
        config.layer_types = (list(config.layer_types) * 2)[:4]
    torch.manual_seed(0)
    made = getattr(transformers, type(model).__name__)(config)
    from families import randomize

    randomize(made)
    return made.eval(), signature, example


def generated(model: nn.Module, ids: torch.Tensor, cached: bool) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.inference_mode():
        found = model.generate(  # type: ignore[operator]
            ids,
            attention_mask=torch.ones_like(ids),
            use_cache=cached,
            max_new_tokens=6,
            min_new_tokens=6,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=None,
            output_logits=True,
            return_dict_in_generate=True,
        )
    return found.sequences, torch.stack(found.logits)


OPTIONS: list[dict[str, Any]] = [
    {"blocks": [0, 2]},
    {"attention": [0, 3]},
    {"sublayers": "block", "count": 2, "method": "iterative"},
    {"sublayers": "both", "count": 4},
]
OFTEN = [*(("llama", options) for options in OPTIONS), ("gpt2", OPTIONS[0]), ("gemma2", OPTIONS[1])]


@pytest.mark.parametrize(("name", "options"), swept(itertools.product(DECODERS, OPTIONS), OFTEN), ids=str)
def test_cached_generation_equals_uncached(name: str, options: dict[str, Any]) -> None:
    model, signature, example = deeper(name)
    trial = tried(DropLayers(**options), model, signature, [example])
    ids = example["input_ids"][:1, :5]
    (with_cache, logits), (without, expected) = (generated(trial.after, ids, cached) for cached in (True, False))
    assert sqnr_db(expected, logits) > 80
    assert torch.equal(with_cache, without)
    blocks = trial.after.config.num_hidden_layers  # type: ignore[union-attr]
    assert blocks == 4 - len(trial.context.report["blocks"])
    with torch.inference_mode():
        cache = trial.after(ids, use_cache=True).past_key_values
    assert cache.get_seq_length() == 5
    assert [cache.get_seq_length(layer) for layer in range(blocks)] == [5] * blocks


def test_a_wrong_position_breaks_cached_generation() -> None:
    model, signature, example = deeper("llama")
    trial = tried(DropLayers(blocks=[0]), model, signature, [example])
    for module in trial.after.get_submodule("model.layers.1").modules():
        if "layer_idx" in vars(module):
            module.layer_idx = 0  # type: ignore[assignment]
    ids = example["input_ids"][:1, :5]
    (_, logits), (_, expected) = (generated(trial.after, ids, cached) for cached in (True, False))
    assert sqnr_db(expected, logits) < 40


def test_every_family_tells_why_a_sublayer_cannot_be_chosen() -> None:
    assert set(NORMS) <= set(FAMILIES)
    model, signature, example = build("timm_levit")
    anatomy = find(model, signature, {name: tensor[:2] for name, tensor in example.items()})
    found = find_sublayers(model, anatomy, anatomy.blocks, "attention")
    assert found
    assert all(one.obstacle or one.unfit or one.constant or one.after for one in found)
