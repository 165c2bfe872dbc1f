"""What ``drop_layers`` takes out, what stays, and what it refuses."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import nn
from trial import digits, rebuilt, tried

from calibrate.errors import UserError
from calibrate.fidelity import sqnr_db
from compress.layers import Absent
from compress.passes.drop_layers import DropLayers
from compress.passes.quantize import Quantize

EXAMPLE = DropLayers(blocks=[1], attention=[2], mlp=[-1])
ZERO = {"attention": "attn.proj", "mlp": "mlp.fc2"}


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_a_dropped_block_is_gone_and_the_rest_is_untouched() -> None:
    model, signature, rows = digits()
    trial = tried(DropLayers(blocks=[1, -1]), model, signature, rows)
    expected = copy.deepcopy(model)
    blocks = list(expected.get_submodule("blocks").children())
    expected.add_module("blocks", nn.ModuleList([blocks[0], blocks[2]]))
    assert torch.equal(trial.outputs(trial.after), trial.outputs(expected))
    assert count(trial.after) == count(model) - 2 * count(blocks[1])
    assert trial.context.report["blocks"] == ["blocks.1", "blocks.3"]


@pytest.mark.parametrize("part", ["attention", "mlp"])
def test_a_dropped_sublayer_adds_zero(part: str) -> None:
    model, signature, rows = digits()
    options: dict[str, Any] = {part: [0, 2]}
    trial = tried(DropLayers(**options), model, signature, rows)
    expected = copy.deepcopy(model)
    with torch.no_grad():
        for number in (0, 2):
            for name in ("weight", "bias"):
                expected.get_parameter(f"blocks.{number}.{ZERO[part]}.{name}").zero_()
    assert torch.equal(trial.outputs(trial.after), trial.outputs(expected))
    assert sqnr_db(trial.outputs(model), trial.outputs(trial.after)) < 30
    inside = [site for site in trial.anatomy.sites if site.block in (0, 2) and site.roles[0].startswith(part)]
    assert len(inside) == 4
    assert count(trial.after) == count(model) - sum(site.parameters for site in inside)


def test_what_computed_a_dropped_sublayers_input_is_dead_in_a_trace() -> None:
    model, signature, rows = digits()
    trial = tried(DropLayers(attention=[1], mlp=[1]), model, signature, rows)
    batch = torch.export.Dim("batch")
    bound, inputs = signature.bind(trial.after), {"pixels": rows[0]["pixels"]}
    program = torch.export.export(bound, (), inputs, dynamic_shapes={"pixels": {0: batch}}, strict=False)
    program = program.run_decompositions({})
    used = {
        program.graph_signature.inputs_to_parameters[node.name]
        for node in program.graph.nodes
        if node.op == "placeholder" and node.users and node.name in program.graph_signature.inputs_to_parameters
    }
    assert any(name.startswith("model.blocks.0.") for name in used)
    assert not any(name.startswith("model.blocks.1.") for name in used)


def test_edits_rebuild_the_model_and_other_passes_follow() -> None:
    model, signature, rows = digits()
    trial = tried(EXAMPLE, model, signature, rows)
    assert torch.equal(trial.outputs(rebuilt(trial)), trial.outputs(trial.after))
    quantized = tried(Quantize(), trial.after, signature, rows)
    assert quantized.sqnr_db > 20
    assert isinstance(quantized.after.get_submodule("blocks.1.attn.proj"), Absent)


@pytest.mark.parametrize(
    ("options", "what", "hint"),
    [
        ({"blocks": [4]}, "there is no block 4", "There are 4: 0 to 3."),
        ({"attention": [-5]}, "there is no block -5", "There are 4: 0 to 3."),
        ({"blocks": [0, 1, 2, 3]}, "all 4 blocks of blocks", "Keep at least one."),
        ({"blocks": [0], "mlp": [-4]}, "block 0 is taken out whole", "Take 0 off mlp."),
    ],
    ids=str,
)
def test_what_cannot_be_dropped_is_refused(options: dict[str, Any], what: str, hint: str) -> None:
    with pytest.raises(UserError) as caught:
        tried(DropLayers(**options), *digits())
    assert caught.value.where == "drop_layers"
    assert what in caught.value.what
    assert hint in caught.value.hint


def test_quantized_sublayers_and_blocks_are_dropped_too() -> None:
    model, signature, rows = digits()
    quantized = tried(Quantize(), model, signature, rows)
    trial = tried(EXAMPLE, quantized.after, signature, rows)
    for path in ("blocks.1.attn.proj", "blocks.2.mlp.fc2"):
        gone = trial.after.get_submodule(path)
        assert isinstance(gone, Absent)
        assert gone.out_features == model.get_submodule("blocks.1.attn.proj").out_features
    assert torch.equal(trial.outputs(rebuilt(trial)), trial.outputs(trial.after))
    other_way = tried(Quantize(), tried(EXAMPLE, model, signature, rows).after, signature, rows)
    assert sqnr_db(other_way.outputs(other_way.after), trial.outputs(trial.after)) > 15


def test_dropping_nothing_is_refused() -> None:
    with pytest.raises(ValidationError, match="at least one"):
        DropLayers()


def family(name: str) -> Any:
    pytest.importorskip("transformers", reason="transformers is not installed")
    from families import build

    return build(name)


@pytest.mark.parametrize("name", ["bert", "vit", "gpt2", "llama", "opt", "distilbert"])
def test_families_lose_a_block_and_count_right(name: str) -> None:
    model, signature, example = family(name)
    trial = tried(DropLayers(blocks=[0]), model, signature, [example])
    block = trial.anatomy.blocks[0]
    assert block.container is not None
    assert len(trial.after.get_submodule(block.container)) == len(model.get_submodule(block.container)) - 1  # type: ignore[arg-type]
    assert trial.after.config.num_hidden_layers == model.config.num_hidden_layers - 1  # type: ignore[union-attr]
    numbers = [vars(module)["layer_idx"] for module in trial.after.modules() if "layer_idx" in vars(module)]
    assert set(numbers) <= {0}
    assert trial.outputs(trial.after).isfinite().all()
    assert torch.equal(trial.outputs(rebuilt(trial)), trial.outputs(trial.after))


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_families_lose_sublayers_as_if_their_output_were_zero(name: str) -> None:
    model, signature, example = family(name)
    trial = tried(DropLayers(attention=[0], mlp=[1]), model, signature, [example])
    expected = copy.deepcopy(model)
    for block, role in ((0, "attention.out"), (1, "mlp.down")):
        path = trial.anatomy.blocks[block].roles[role][0]
        expected.get_submodule(path).register_forward_hook(lambda module, args, output: torch.zeros_like(output))
    assert torch.equal(trial.outputs(trial.after), trial.outputs(expected))
    assert not torch.equal(trial.outputs(trial.after), trial.outputs(model))


def test_cached_generation_equals_uncached_after_dropping() -> None:
    model, signature, example = family("llama")
    trial = tried(DropLayers(blocks=[0], attention=[1]), model, signature, [example])
    ids = example["input_ids"][:1, :6]
    with torch.inference_mode():
        first = trial.after(ids, use_cache=True)
        following = trial.after(ids[:, :1], past_key_values=first.past_key_values, use_cache=True).logits[:, -1]
        whole = trial.after(torch.cat([ids, ids[:, :1]], 1), use_cache=False).logits[:, -1]
    assert sqnr_db(whole, following) > 90
