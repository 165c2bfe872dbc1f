"""Ranges, table codes and scales that are chosen by what they do to outputs."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from families import VOCABULARY, build
from pydantic import ValidationError
from sweeps import swept
from torch import Tensor, nn
from trial import Trial, digits, rebuilt, tried

from calibrate.errors import UserError
from calibrate.signature import Batch, Signature, TensorSpec
from compress.anatomy import find
from compress.layers import QuantEmbedding, QuantLinear
from compress.passes.quantize import Quantize
from compress.quantization import calibrated_inputs

PLAIN: dict[str, Any] = {"smooth": False, "bias_correction": False}


def with_outlier() -> tuple[nn.Module, Signature, list[Batch]]:
    """The digits model with one neuron that is enormous and that nothing reads."""
    model, signature, rows = digits()
    model = copy.deepcopy(model)
    with torch.no_grad():
        for block in model.blocks:  # type: ignore[union-attr]
            block.get_submodule("mlp.fc1").get_parameter("bias")[3] = 300
            block.get_submodule("mlp.fc2").get_parameter("weight")[:, 3] = 0
    return model, signature, rows


def test_gradients_find_what_min_max_loses_and_say_so() -> None:
    subject = with_outlier()
    levels = {how: tried(Quantize(range=how, **PLAIN), *subject) for how in ("minmax", "hessian")}
    assert levels["hessian"].sqnr_db > levels["minmax"].sqnr_db + 6
    for site in levels["hessian"].context.report["sites"].values():
        assert site["activation"]["search_gain_db"] >= 0
        assert site["activation"]["method"] == "hessian"
    down = levels["hessian"].context.report["sites"]["blocks.1.mlp.fc2"]["activation"]
    assert down["range"][1] < 0.2 * down["seen"][1]


MORE: list[dict[str, Any]] = [
    {"activation_symmetric": False},
    {"smooth": "balanced", "rounding": "gptq"},
    {"weights": 4, "group_size": 16, "group_scales": "multiples"},
    {"reduce_range": "pairs"},
]


@pytest.mark.parametrize("more", swept(MORE, MORE[1:3]), ids=str)
def test_searched_ranges_go_with_every_other_option(more: dict[str, Any]) -> None:
    sites = ["patch_embed", "blocks.0.*"]
    found = tried(Quantize(range="hessian", range_rows=16, sites=sites, **more), *digits())
    usual = tried(Quantize(sites=sites, **more), *digits())
    assert found.sqnr_db > usual.sqnr_db - 1.5
    assert torch.equal(found.outputs(rebuilt(found)), found.outputs(found.after))
    scales = {path: float(layer.activation.scale) for path, layer in found.after.named_modules()
              if isinstance(layer, QuantLinear) and layer.activation is not None}  # fmt: skip
    assert len({scales[path] for path in scales if path.startswith("blocks.0.attn.q")}) <= 1


def test_searched_ranges_are_the_same_twice() -> None:
    first, again = (tried(Quantize(range="hessian", range_rows=16, sites=["blocks.0.*"]), *digits()) for _ in range(2))
    for name, tensor in first.after.state_dict().items():
        assert torch.equal(tensor, again.after.state_dict()[name]), name


def test_fitted_scales_are_better_than_those_of_gptq() -> None:
    options: dict[str, Any] = {"weights": 2, "group_size": 16, "activations": "none", "rounding": "gptq"}
    usual, fitted = tried(Quantize(**options), *digits()), tried(Quantize(**options, scale_rounds=2), *digits())
    assert fitted.sqnr_db > usual.sqnr_db + 0.5
    for path, site in fitted.context.report["sites"].items():
        assert site["rounding_gain_db"] >= usual.context.report["sites"][path]["rounding_gain_db"] or "blocks.0" not in path
    layer = fitted.after.get_submodule("blocks.0.mlp.fc1")
    assert isinstance(layer, QuantLinear)
    assert torch.equal(layer.quantized_weight.scale, layer.quantized_weight.scale.half().float())


@functools.cache
def on_text(name: str, **options: Any) -> Trial:
    model, signature, example = build(name)
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(5, VOCABULARY - 1, example["input_ids"].shape, generator=generator) for _ in range(8)]
    rows = [{**example, "input_ids": one * example.get("attention_mask", torch.ones(1, dtype=torch.long))} for one in ids]
    return tried(Quantize(activations="none", embeddings=2, sites=["embedding"], **options), model, signature, rows)


def tables(trial: Trial) -> dict[str, torch.Tensor]:
    layers = {path: layer for path, layer in trial.after.named_modules() if isinstance(layer, QuantEmbedding)}
    return {path: layer.quantized_weight.integers() for path, layer in layers.items()}


def test_rows_of_a_table_are_rounded_by_what_the_outputs_lose() -> None:
    nearest, found = on_text("bert"), on_text("bert", embedding_rounding="gptq")
    path = "bert.embeddings.word_embeddings"
    assert found.sqnr_db > nearest.sqnr_db + 1
    assert found.context.report["sites"][path]["rounding"] == "gptq"
    assert found.context.report["sites"][path]["rounding_gain_db"] > 1
    assert not torch.equal(tables(found)[path], tables(nearest)[path])
    assert torch.equal(found.outputs(rebuilt(found)), found.outputs(found.after))


@pytest.mark.parametrize(("bound", "used"), [(3, 3), (10_000, 32)])
def test_rows_with_gradients_for_a_table_are_bounded_and_told(monkeypatch: pytest.MonkeyPatch, bound: int, used: int) -> None:
    monkeypatch.setattr(calibrated_inputs, "TABLE_ROWS", bound)
    trial = on_text.__wrapped__("bert", embedding_rounding="gptq")
    assert sum(len(batch["input_ids"]) for batch in trial.rows) == 32
    assert trial.context.report["table_gradient_rows"] == used


def test_a_table_that_the_head_shares_keeps_its_nearest_codes() -> None:
    nearest, found = on_text("bert_mlm"), on_text("bert_mlm", embedding_rounding="gptq")
    path = "bert.embeddings.word_embeddings"
    assert found.context.report["sites"][path]["rounding"] == "nearest"
    assert "head" in found.context.report["sites"][path]["because"]
    assert torch.equal(tables(found)[path], tables(nearest)[path])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"range": "hessian", "activations": "none"}, "range: hessian searches"),
        ({"range": "hessian", "activations": "dynamic"}, "range: hessian searches"),
        ({"range_rows": 8}, "range_rows says nothing"),
        ({"embedding_rounding": "gptq"}, "embedding_rounding: gptq is for tables"),
        ({"embedding_rounding": "gptq", "embeddings": 8}, "embedding_rounding: gptq is for tables"),
        ({"scale_rounds": 1}, "scale_rounds says nothing"),
        ({"scale_rounds": 1, "rounding": "gptq", "granularity": "tensor"}, "channels or groups"),
        ({"scale_rounds": 1, "rounding": "gptq", "weights": 4, "group_scales": "multiples"}, "multiples of one step"),
        ({"range": "hessian", "engine": "nncf"}, "NNCF has no hessian"),
    ],
    ids=str,
)
def test_what_would_say_nothing_is_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        Quantize.model_validate(options)


def test_gradients_that_cannot_pass_are_refused_before_anything_runs() -> None:
    model, signature, rows = digits()
    begun = tried(Quantize(sites=["blocks.3.*"], range_rows=64), model, signature, rows).after
    step = Quantize(range="hessian", sites=["blocks.0.*"])
    with pytest.raises(UserError, match=r"do not pass blocks\.3.*rounded already"):
        step.targets(begun, find(begun, signature, {name: tensor[:2] for name, tensor in rows[0].items()}))


def test_rounding_tables_by_the_outputs_reads_rows() -> None:
    options: dict[str, Any] = {"activations": "none", "embeddings": 4}
    assert not Quantize(**options).calibrates
    assert Quantize(**options, embedding_rounding="gptq").calibrates


def test_six_bits_can_be_simulated_and_no_recipe_asks_for_them() -> None:
    """As the benchmark of simulated bits does: between four and eight, and never more than 64 codes."""
    step = Quantize(granularity="channel", smooth=False)
    levels = {}
    for bits in (4, 6, 8):
        trial = tried(step.model_copy(update={"weights": bits, "activation_bits": bits}), *digits())
        levels[bits] = trial.sqnr_db
        layer = trial.after.get_submodule("blocks.0.mlp.fc1")
        assert isinstance(layer, QuantLinear)
        assert len(layer.quantized_weight.integers().unique()) <= 2**bits
    assert levels[4] + 6 < levels[6] < levels[8] - 6
    with pytest.raises(ValidationError):
        Quantize.model_validate({"weights": 6})
    with pytest.raises(ValidationError):
        Quantize.model_validate({"activation_bits": 6})


class Strides(nn.Module):
    """Three convolutions of two strides read one tensor; what they give is projected and pooled."""

    def __init__(self, strides: tuple[int, int]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.query = nn.Conv2d(3, 8, 3, stride=strides[0], padding=1)
        self.key = nn.Conv2d(3, 8, 3, stride=strides[1], padding=1)
        self.value = nn.Conv2d(3, 8, 3, stride=strides[1], padding=1, padding_mode="reflect")
        self.head = nn.Linear(24, 5)

    def forward(self, pixels: Tensor) -> Tensor:
        pooled = [made(pixels).relu().mean((2, 3)) for made in (self.query, self.key, self.value)]
        given: Tensor = self.head(torch.cat(pooled, -1))
        return given


@pytest.mark.parametrize("strides", [(1, 1), (1, 2), (2, 1)])
def test_convolutions_of_any_stride_share_the_range_of_their_tensor(strides: tuple[int, int]) -> None:
    signature = Signature((TensorSpec("pixels", torch.float32, ("batch", 3, 32, 32)),))
    rows: list[Batch] = [{"pixels": torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(1))}] * 2
    step = Quantize(range="hessian", sites=["query", "key", "value"], **PLAIN)
    found = tried(step, Strides(strides), signature, rows)
    assert found.sqnr_db > 30
    sites = found.context.report["sites"]
    assert set(sites) == {"query", "key"}
    assert "reflect" in found.context.report["skipped"]["value"]  # other padding than zeros is carried by no quantized layer
    assert sites["query"]["activation"]["scale"] == sites["key"]["activation"]["scale"]
    assert sites["key"]["activation"]["method"] == "hessian"
