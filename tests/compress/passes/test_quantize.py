"""What ``quantize`` does to a model, what it refuses, and what it says."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from sweeps import swept
from torch import Tensor, nn
from trial import DIGITS, Trial, digits, rebuilt, tried

from calibrate.errors import UserError
from calibrate.fidelity import sqnr_db
from calibrate.grid import Grid
from calibrate.signature import Batch, Signature, TensorSpec
from compress.anatomy import find
from compress.layers import QuantConv2d, QuantEmbedding, QuantLinear, is_quantized
from compress.passes.contract import Context
from compress.passes.quantize import Quantize
from compress.surgery import Surgery

EXAMPLE = Quantize(weights=4, group_size=16, sites=["attention.*", "mlp.*", "patch_embed"], skip=["mlp.down"])


def on_digits(**options: Any) -> Trial:
    return tried(Quantize(**options), *digits())


def refused(step: Quantize, model: nn.Module, signature: Signature, rows: list[Batch]) -> UserError:
    with pytest.raises(UserError) as caught:
        tried(step, model, signature, rows)
    return caught.value


@pytest.mark.parametrize(
    ("options", "least"),
    [
        ({}, 27),
        ({"activations": "none"}, 35),
        ({"activations": "dynamic"}, 25),
        ({"activation_symmetric": False}, 28),
        ({"symmetric": False}, 27),
        ({"granularity": "tensor"}, 22),
        ({"weights": 4, "activations": "none", "group_size": 16}, 16),
        ({"range": "minmax", "smooth": False}, 22),
    ],
    ids=str,
)
def test_the_output_stays_close(options: dict[str, Any], least: float) -> None:
    assert on_digits(**options).sqnr_db > least


def test_more_bits_are_better() -> None:
    quality = [on_digits(weights=bits, group_size=16, activations="none").sqnr_db for bits in (2, 3, 4, 8)]
    assert quality == sorted(quality)
    assert quality[0] > 0


def test_default_targets_are_the_projections_inside_the_blocks() -> None:
    trial = on_digits()
    quantized = {path for path, module in trial.after.named_modules() if is_quantized(module)}
    assert quantized == {f"blocks.{i}.{name}" for i in range(4) for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")}
    assert isinstance(trial.after.get_submodule("head"), nn.Linear)


def test_roles_and_paths_choose_and_skip_takes_back() -> None:
    trial = on_digits(sites=["mlp.*", "head", "patch_embed"], skip=["blocks.0.*"], activations="none")
    quantized = {path for path, module in trial.after.named_modules() if is_quantized(module)}
    expected = {f"blocks.{i}.mlp.{name}" for i in (1, 2, 3) for name in ("fc1", "fc2")}
    assert quantized == expected | {"head", "patch_embed"}
    assert isinstance(trial.after.get_submodule("patch_embed"), QuantConv2d)
    assert trial.context.report["skipped"] == {f"blocks.0.mlp.{name}": "named under skip" for name in ("fc1", "fc2")}


def test_the_report_tells_bits_scales_and_clipping() -> None:
    trial = on_digits(range="percentile", percentile=99.0, smooth=False)
    says = trial.context.report["sites"]["blocks.2.mlp.fc2"]
    layer = trial.after.get_submodule("blocks.2.mlp.fc2")
    assert isinstance(layer, QuantLinear)
    assert layer.activation is not None
    assert says["bits"] == 8
    assert says["scale"][1] == float(layer.quantized_weight.scale.max())
    assert says["activation"]["scale"] == float(layer.activation.scale)
    assert 0 < says["activation"]["clipped_percent"] <= 1.001
    dense = trial.before.get_parameter("blocks.2.mlp.fc2.weight")
    assert says["weight_sqnr_db"] == pytest.approx(sqnr_db(dense, layer.weight), abs=1e-3)


def test_scales_are_float16_numbers() -> None:
    trial = on_digits()
    for module in trial.after.modules():
        if isinstance(module, QuantLinear):
            assert torch.equal(module.quantized_weight.scale, module.quantized_weight.scale.half().float())
            assert module.activation is not None
            assert torch.equal(module.activation.scale, module.activation.scale.half().float())


def test_edits_rebuild_the_model() -> None:
    for trial in (on_digits(), on_digits(weights=4, granularity="group", group_size=16, symmetric=False)):
        assert torch.equal(trial.outputs(rebuilt(trial)), trial.outputs(trial.after))


def inputs_of(trial: Trial, path: str) -> Tensor:
    """What the float model's module at ``path`` receives on all rows: [N, I]."""
    inputs: list[Tensor] = []
    handle = trial.before.get_submodule(path).register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    trial.outputs(trial.before)
    handle.remove()
    return torch.cat(inputs).flatten(0, 1)


def test_bias_correction_keeps_the_mean_of_a_layers_output() -> None:
    errors: list[Tensor] = []
    for correct in (False, True):
        options = {"weights": 4, "group_size": 64, "range": "minmax", "smooth": False, "sites": ["blocks.0.attn.qkv"]}
        trial = on_digits(**options, bias_correction=correct)
        path = "blocks.0.attn.qkv"
        x = inputs_of(trial, path)
        layer = trial.after.get_submodule(path)
        assert isinstance(layer, QuantLinear)
        rounded = nn.functional.linear(x, layer.weight, layer.bias)
        errors.append((trial.before.get_submodule(path)(x) - rounded).mean(0).abs())
    assert layer.bias is not None
    half_a_step = layer.bias.abs() * 2.0**-11  # biases are float16 numbers
    assert (errors[1] <= half_a_step + 1e-5).all()
    assert float(half_a_step.max()) < 1e-3 < float(errors[0].max())


def test_smoothing_changes_no_product_and_helps_where_channels_differ() -> None:
    model, signature, rows = digits()
    with torch.no_grad():  # an outlier channel of the hidden layer, as language models have
        fc1, fc2 = model.get_submodule("blocks.1.mlp.fc1"), model.get_submodule("blocks.1.mlp.fc2")
        fc1.weight[7] *= 60
        fc2.weight[:, 7] /= 60
    options: dict[str, Any] = {"sites": ["blocks.1.mlp.fc2"]}
    with_factors, without = (tried(Quantize(**options, smooth=on), model, signature, rows) for on in (True, False))
    layer = with_factors.after.get_submodule("blocks.1.mlp.fc2")
    assert isinstance(layer, QuantLinear)
    assert layer.activation is not None
    assert layer.activation.factor is not None
    assert sqnr_db(fc2.weight.detach(), layer.weight) > 35
    assert with_factors.sqnr_db > without.sqnr_db + 6
    assert torch.equal(with_factors.outputs(rebuilt(with_factors)), with_factors.outputs(with_factors.after))


def test_factors_are_folded_where_nothing_else_reads_the_tensor() -> None:
    trial = on_digits(smooth="balanced", smooth_below_db=-100)
    says = trial.context.report["sites"]
    folded = {path: site["activation"].get("folded_into") for path, site in says.items()}
    assert {path for path, into in folded.items() if into} >= {f"blocks.{i}.attn.qkv" for i in range(4)}
    assert {into for into in folded.values() if into} <= {
        f"blocks.{i}.{name}" for i in range(4) for name in ("norm1", "norm2", "attn.qkv")
    }
    assert not any("factor" in name for name in trial.after.state_dict())
    assert trial.sqnr_db > on_digits(smooth=False).sqnr_db
    assert torch.equal(trial.outputs(rebuilt(trial)), trial.outputs(trial.after))


@pytest.mark.parametrize(
    "options",
    [{"weights": 4, "group_size": 16, "activations": "none"}, {"weights": 2, "group_size": 16, "activations": "none"}],
    ids=str,
)
def test_gptq_is_better_than_the_nearest_codes(options: dict[str, Any]) -> None:
    nearest, unrefined, made = (
        on_digits(**options, **more) for more in ({}, {"rounding": "gptq", "refinements": 0}, {"rounding": "gptq"})
    )
    assert nearest.sqnr_db + 2 < unrefined.sqnr_db
    assert nearest.sqnr_db + 2 < made.sqnr_db
    says = made.context.report["sites"]["blocks.0.mlp.fc1"]
    assert says["rounding"] == "gptq"
    assert says["rounding_gain_db"] > 0
    assert torch.equal(made.outputs(rebuilt(made)), made.outputs(made.after))


def test_gptq_says_how_many_rows_it_needs() -> None:
    model, signature, rows = digits()
    few = [{"pixels": rows[0]["pixels"][:4]}]
    error = refused(Quantize(rounding="gptq"), model, signature, few)
    assert "blocks.0.attn.qkv needs 64 positions" not in error.what
    assert "needs 256 positions, and the 4 calibration rows have 68" in error.what
    assert "about 16 rows" in error.hint


def test_a_hessian_without_a_factor_stops_or_is_rounded_to_the_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    import compress.quantization.rounded_layers as module

    def failing(*arguments: Any, **options: Any) -> Any:
        raise module.NotPositiveDefinite("the Hessian has no Cholesky factor")

    monkeypatch.setattr(module, "gptq", failing)
    error = refused(Quantize(rounding="gptq"), *digits())
    assert "blocks.0.attn.qkv" in error.what
    assert "unfactorable: nearest" in error.hint
    says = on_digits(rounding="gptq", unfactorable="nearest").context.report["sites"]["blocks.0.attn.qkv"]
    assert says["rounding"] == "nearest"
    assert "Cholesky" in says["because"]


class Shared(nn.Module):
    """Queries, keys and values from separate layers, with an attention mask; token embedding tied to the head."""

    def __init__(self, width: int = 32, heads: int = 2, vocabulary: int = 40) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList([SharedBlock(width, heads) for _ in range(2)])
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x, attention_mask)
        logits: Tensor = self.head(x)
        return logits


class SharedBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        rows, tokens, width = x.shape
        q, k, v = (p(x).view(rows, tokens, self.heads, -1).transpose(1, 2) for p in (self.q, self.k, self.v))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None, :].bool())
        x = self.norm1(x + self.o(mixed.transpose(1, 2).reshape(rows, tokens, width)))
        y: Tensor = self.norm2(x + self.down(nn.functional.gelu(self.up(x))))
        return y


def shared(rows: int = 12, tokens: int = 10) -> tuple[nn.Module, Signature, list[Batch]]:
    torch.manual_seed(0)
    ids = torch.randint(1, 40, (rows, tokens))
    lengths = torch.randint(3, tokens + 1, (rows,))
    mask = (torch.arange(tokens) < lengths.unsqueeze(1)).long()
    mask[0] = 1
    specs = tuple(TensorSpec(name, torch.int64, ("batch", "tokens")) for name in ("ids", "attention_mask"))
    batch = {"ids": ids * mask, "attention_mask": mask}
    return Shared().eval(), Signature(specs), [{n: t[i : i + 4] for n, t in batch.items()} for i in range(0, rows, 4)]


def longer(rows: list[Batch], by: int = 6) -> list[Batch]:
    """The same rows with more padding, of a token that occurs nowhere else."""
    return [
        {
            "ids": nn.functional.pad(batch["ids"], (0, by), value=39),
            "attention_mask": nn.functional.pad(batch["attention_mask"], (0, by)),
        }
        for batch in rows
    ]


def scales(model: nn.Module) -> dict[str, float]:
    return {
        path: float(module.activation.scale)
        for path, module in model.named_modules()
        if isinstance(module, QuantLinear) and module.activation is not None
    }


def test_layers_that_read_one_tensor_share_its_scale() -> None:
    trial = tried(Quantize(), *shared())
    found = scales(trial.after)
    assert found["layers.1.q"] == found["layers.1.k"] == found["layers.1.v"] != found["layers.1.up"]
    assert trial.context.report["sites"]["layers.1.v"]["activation"]["same_tensor_as"] == "layers.1.q"


@pytest.mark.parametrize("method", ["minmax", "mse", "percentile"])
def test_padding_leaves_the_scales_as_they_are(method: str) -> None:
    model, signature, rows = shared()
    short, long = (
        scales(tried(Quantize(range=method), model, signature, data).after)  # type: ignore[arg-type]
        for data in (rows, longer(rows))
    )
    assert short.keys() == long.keys()
    assert all(math.isclose(short[path], long[path], rel_tol=2e-3) for path in short)
    unmasked = [{**batch, "attention_mask": torch.ones_like(batch["attention_mask"])} for batch in longer(rows)]
    control = scales(tried(Quantize(range=method), model, signature, unmasked).after)  # type: ignore[arg-type]
    assert any(not math.isclose(short[path], control[path], rel_tol=1e-2) for path in short)


def test_embeddings_are_quantized_by_row_when_asked() -> None:
    trial = tried(Quantize(activations="none", embeddings=8), *shared())
    table = trial.after.get_submodule("embed")
    assert isinstance(table, QuantEmbedding)
    assert table.quantized_weight.scale.shape == (40, 1)
    assert trial.sqnr_db > 30
    head = trial.after.get_submodule("head")
    assert isinstance(head, QuantLinear)
    assert head.quantized_weight is table.quantized_weight, "a tied head would be held twice, once in float"
    assert head.activation is None
    assert torch.equal(trial.outputs(rebuilt(trial)), trial.outputs(trial.after))


def test_rows_of_a_table_in_groups_are_closer_at_four_bits() -> None:
    whole, groups = (
        tried(Quantize(activations="none", embeddings=4, embedding_group_size=size), *shared()) for size in (None, 8)
    )
    assert groups.after.get_submodule("embed.quantized_weight").scale.shape == (40, 4)
    says = [trial.context.report["sites"]["embed"]["weight_sqnr_db"] for trial in (whole, groups)]
    assert says[1] > says[0] + 1


def test_group_scales_that_are_multiples_cost_little() -> None:
    free, stepped = (on_digits(weights=4, group_size=16, group_scales=how, activations="none") for how in ("free", "multiples"))
    assert stepped.sqnr_db > free.sqnr_db - 1.5
    with pytest.raises(ValidationError, match="fewer than 8 bits"):
        Quantize(group_scales="multiples")


@pytest.mark.parametrize("options", [{}, {"rounding": "gptq"}])
def test_a_reduced_range_keeps_pairs_of_products_in_16_bits(options: dict[str, Any]) -> None:
    """255 * 64 * 2 < 2**15: nothing that the kernels add in 16 bits can saturate. It costs at most the bit that it takes."""
    full, reduced = on_digits(**options), on_digits(**options, reduce_range=True)
    widest = [
        max(int(m.quantized_weight.integers().int().abs().max()) for m in trial.after.modules() if isinstance(m, QuantLinear))
        for trial in (full, reduced)
    ]
    assert widest[1] <= 64 < widest[0]
    assert reduced.sqnr_db >= full.sqnr_db - 6.1
    with pytest.raises(ValidationError, match="reduce_range says nothing"):
        Quantize(activations="none", reduce_range=True)


def test_a_reduced_range_reaches_groups_whose_scales_are_multiples() -> None:
    """Codes of -8 to 7 times at most 8: the largest scale of an output is 8 steps, and the others are whole numbers of them."""
    trial = on_digits(weights=4, group_size=16, group_scales="multiples", reduce_range=True)
    layers = [layer for layer in trial.after.modules() if isinstance(layer, QuantLinear)]
    times = [layer.quantized_weight.scale / layer.quantized_weight.scale.amax(1, keepdim=True) * 8 for layer in layers]
    assert layers
    assert all(float((number - number.round()).abs().max()) <= 1e-4 for number in times)


def test_a_tied_head_that_is_skipped_stays_float_and_is_told() -> None:
    trial = tried(Quantize(activations="none", embeddings=8, skip=["head"]), *shared())
    assert not isinstance(trial.after.get_submodule("head"), QuantLinear)
    assert any("head keeps it in float" in line for line in trial.context.report["ties"])


def test_a_tied_head_shares_the_codes() -> None:
    trial = tried(Quantize(sites=["attention.*", "head"], embeddings=8), *shared())
    table, head = trial.after.get_submodule("embed"), trial.after.get_submodule("head")
    assert isinstance(head, QuantLinear)
    assert head.quantized_weight is table.quantized_weight
    assert any("share their codes" in line for line in trial.context.report["ties"])
    assert torch.equal(trial.outputs(rebuilt(trial)), trial.outputs(trial.after))


def test_ties_on_different_grids_are_told() -> None:
    trial = tried(Quantize(sites=["head"], embeddings=4, activations="none"), *shared())
    assert trial.after.get_submodule("head.quantized_weight") is not trial.after.get_submodule("embed.quantized_weight")
    assert any("grids differ" in line for line in trial.context.report["ties"])


def test_no_second_copy_of_the_float_weights_is_left() -> None:
    trial = on_digits()
    left = [name for name, _ in trial.after.named_parameters() if ".attn." in name or ".mlp." in name]
    assert all(name.endswith("bias") for name in left)


@pytest.mark.parametrize(
    ("options", "what", "hint"),
    [
        (
            {"weights": 4, "group_size": 48},
            "group_size 48 does not divide the 64 inputs of blocks.0.attn.qkv",
            "Divisors near it: 32, 64.",
        ),
        ({"sites": ["blocks.*.mlp.fc3"]}, "'blocks.*.mlp.fc3'", "mlp.fc1"),
        ({"skip": ["attention.quary"]}, "'attention.quary'", "attention.query"),
        ({"sites": ["attention.gate"]}, "attention.gate", ""),
        ({"sites": ["mlp.up"], "skip": ["mlp.*"]}, "nothing to quantize", "named under skip"),
    ],
    ids=str,
)
def test_wrong_options_are_refused_with_the_way_out(options: dict[str, Any], what: str, hint: str) -> None:
    error = refused(Quantize(**options), *digits())
    assert error.where == "quantize"
    assert what in error.what
    assert hint in error.hint


def test_an_option_without_meaning_is_refused() -> None:
    with pytest.raises(ValidationError, match="group_size"):
        Quantize(group_size=32, granularity="channel")
    with pytest.raises(ValidationError, match="weights"):
        Quantize(weights=5)  # type: ignore[arg-type]


def test_a_layer_is_quantized_once() -> None:
    trial = on_digits(sites=["mlp.*"])
    anatomy = find(trial.after, DIGITS, {"pixels": trial.rows[0]["pixels"][:2]})
    context = Context(DIGITS, anatomy, lambda: iter(trial.rows), Surgery())
    with pytest.raises(UserError, match="quantized already"):
        Quantize(sites=["blocks.0.*"]).run(trial.after, context)
    Quantize(sites=["attention.*"]).run(trial.after, context)
    assert sum(is_quantized(module) for module in trial.after.modules()) == 16


def test_a_silent_layer_and_a_dead_input_are_named() -> None:
    model, signature, rows = digits()
    dead = copy.deepcopy(model)
    with torch.no_grad():
        dead.get_parameter("blocks.2.norm2.weight").zero_()
        dead.get_parameter("blocks.2.norm2.bias").zero_()
    error = refused(Quantize(), dead, signature, rows)
    assert "the input of blocks.2.mlp.fc1 is always 0" in error.what
    assert "skip: [blocks.2.mlp.fc1]" in error.hint


def test_a_broken_row_leaves_the_model_as_it_was() -> None:
    model, signature, rows = digits()
    rows[1]["pixels"][3] = float("nan")
    fresh = copy.deepcopy(model)
    anatomy = find(fresh, signature, {"pixels": rows[0]["pixels"][:2]})
    context = Context(signature, anatomy, lambda: iter(rows), Surgery())
    with pytest.raises(UserError, match="NaN in its input in batch"):
        Quantize().run(fresh, context)
    assert context.edits == []
    assert all(torch.equal(a, b) for a, b in zip(fresh.state_dict().values(), model.state_dict().values(), strict=True))


class Foreign(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


def test_a_class_that_computes_more_stays_float_with_the_reason() -> None:
    model, signature, rows = digits()
    old = model.get_submodule("blocks.1.mlp")
    foreign = Foreign(64, 256)
    foreign.load_state_dict(old.get_submodule("fc1").state_dict())
    old.add_module("fc1", foreign)
    trial = tried(Quantize(), model, signature, rows)
    assert "computes more" in trial.context.report["skipped"]["blocks.1.mlp.fc1"]
    assert trial.after.get_submodule("blocks.1.mlp.fc1").__class__ is Foreign


class Thin(nn.Linear):
    """A linear layer of another library: its forward is its own, what it computes is not."""

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.t() + self.bias


def test_a_class_that_computes_the_same_is_taken() -> None:
    model, signature, rows = digits()
    old = model.get_submodule("blocks.1.mlp")
    thin = Thin(64, 256)
    thin.load_state_dict(old.get_submodule("fc1").state_dict())
    old.add_module("fc1", thin)
    trial = tried(Quantize(), model, signature, rows)
    assert is_quantized(trial.after.get_submodule("blocks.1.mlp.fc1"))


def test_gpt2_is_the_same_model_with_linear_layers() -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    from families import build

    model, signature, example = build("gpt2")
    trial = tried(Quantize(activations="none"), model, signature, [example])
    kinds = {site.kind for site in trial.anatomy.sites if is_quantized(trial.after.get_submodule(site.path))}
    assert kinds == {"conv1d"}
    assert trial.sqnr_db > 30


@pytest.mark.parametrize("family", swept(["bert", "vit", "llama", "swin", "mobilevit", "distilbert"], ["llama", "swin"]))
def test_families_stay_close_at_8_bits(family: str) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    from families import FAMILIES, build

    if family not in FAMILIES:
        pytest.skip(f"no {family} among the families")
    model, signature, example = build(family)
    trial = tried(Quantize(granularity="channel"), model, signature, [example])
    assert trial.sqnr_db > 20


def test_weight_range_mse_is_never_worse() -> None:
    from compress.algorithms.rounding import codes_of, rounding_loss, scales_of

    weight = torch.randn(24, 64) * torch.randn(24, 1).exp()
    for bits in (2, 4, 8):
        for symmetric in (True, False):
            for grid in (Grid(bits, symmetric), Grid(bits, symmetric, "group", 16), Grid(bits, symmetric, "tensor")):
                losses = []
                for how in ("mse", "minmax"):
                    scale, zero_point = scales_of(weight, grid, how)  # type: ignore[arg-type]
                    codes = codes_of(weight, grid, scale, zero_point)
                    losses.append(rounding_loss(weight, codes, grid, scale, zero_point))
                assert losses[0] >= losses[1]


def test_single_sites_may_differ() -> None:
    overrides = {"mlp.*": 4, "blocks.0.mlp.fc1": "float", "blocks.1.attn.qkv": {"activations": "none"}, "blocks.*.fc2": 8}
    trial = on_digits(overrides=overrides)
    layers = {path: module for path, module in trial.after.named_modules() if isinstance(module, QuantLinear)}
    bits = {path: layer.quantized_weight.grid.bits for path, layer in layers.items()}
    assert bits.pop("blocks.2.mlp.fc1") == bits.pop("blocks.1.mlp.fc1") == bits.pop("blocks.3.mlp.fc1") == 4
    assert set(bits.values()) == {8}
    assert len(bits) == 12
    assert [path for path, layer in layers.items() if layer.activation is None] == ["blocks.1.attn.qkv"]
    assert trial.context.report["skipped"] == {"blocks.0.mlp.fc1": "float under overrides"}
    plain = on_digits(overrides={"*": 8})
    assert torch.equal(plain.outputs(plain.after), plain.outputs(on_digits().after))


def test_an_override_of_nothing_is_refused() -> None:
    assert "head names no site that is quantized" in str(refused(Quantize(overrides={"head": 4}), *digits()))
    assert "nope" in str(refused(Quantize(overrides={"nope": 4}), *digits()))
