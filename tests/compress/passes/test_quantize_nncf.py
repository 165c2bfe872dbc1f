"""``quantize`` with ``engine: nncf``: our layers give what NNCF's own model gives, and what is left out is told."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from sweeps import swept
from test_quantize import shared
from torch import Tensor, nn
from trial import Trial, digits, rebuilt, tried

from calibrate.errors import MissingRuntime, UserError
from calibrate.fidelity import sqnr_db
from calibrate.signature import Batch, Signature, TensorSpec
from compress.anatomy import find
from compress.layers import QuantEmbedding, QuantLinear, is_quantized
from compress.passes.quantize import Quantize
from compress.quantization import nncf_layers
from compress.quantization.nncf_engine import NncfResult, _quiet

pytest.importorskip("nncf", reason="needs the extra nncf")

INPUTS = ["attention.*", "mlp.*"]


class Theirs:
    """Keeps what NNCF gave back, and runs its own models."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.results: list[NncfResult] = []
        for name in ("nncf_quantized", "nncf_weights"):
            monkeypatch.setattr(nncf_layers, name, self._kept(getattr(nncf_layers, name)))

    def _kept(self, function: Any) -> Any:
        def call(*args: Any, **options: Any) -> NncfResult:
            self.results.append(function(*args, **options))
            return self.results[-1]

        return call

    def outputs(self, trial: Trial) -> Tensor:
        (model,) = self.results[-1].models
        with torch.inference_mode(), _quiet():
            return torch.cat([model(**{name: batch[name] for name in trial.signature.names}) for batch in trial.rows])


@pytest.fixture
def theirs(monkeypatch: pytest.MonkeyPatch) -> Theirs:
    return Theirs(monkeypatch)


def on_text(**options: Any) -> Trial:
    return tried(Quantize(engine="nncf", **options), *shared())


def few_digits() -> tuple[nn.Module, Signature, list[Batch]]:
    model, signature, rows = digits()
    return model, signature, rows[:1]


def alike(trial: Trial, theirs: Theirs) -> Tensor:
    """SQNR of each row of our model against NNCF's, in dB, at most 150."""
    ours, expected = trial.outputs(trial.after), theirs.outputs(trial)
    pairs = zip(expected, ours, strict=True)
    return torch.tensor([150.0 if torch.equal(e, o) else min(sqnr_db(e, o), 150.0) for e, o in pairs])


@pytest.mark.parametrize(
    "options",
    swept(
        [
            {},
            {"activation_symmetric": False, "alpha": 0.5, "range": "minmax"},
            {"smooth": False, "granularity": "tensor", "range": "percentile", "percentile": 99.0},
            {"embeddings": 8, "bias_correction": False},
        ],
        [{}, {"smooth": False, "granularity": "tensor", "range": "percentile", "percentile": 99.0}],
    ),
    ids=str,
)
def test_our_model_is_nncfs_own(options: dict[str, Any], theirs: Theirs) -> None:
    """A row in which no number falls on the other side of a code is equal to float accuracy; such rows are the most."""
    trial = on_text(**options)
    found = alike(trial, theirs)
    assert found.quantile(0.25) > 90
    assert sqnr_db(theirs.outputs(trial), trial.outputs(trial.after)) > 60
    assert 15 < trial.sqnr_db < 60, "it is quantized"


def test_on_a_trained_transformer_factors_go_into_norms(theirs: Theirs) -> None:
    trial = tried(Quantize(engine="nncf"), *few_digits())
    says = trial.context.report["sites"]
    assert says["blocks.0.attn.qkv"]["activation"]["folded_into"] == "blocks.0.norm1"
    assert says["blocks.0.mlp.fc2"]["activation"]["smoothed"]
    assert alike(trial, theirs).median() > 90
    assert trial.sqnr_db > 35


def test_a_model_without_the_factors_or_biases_is_another(theirs: Theirs) -> None:
    trial = on_text()
    for module in trial.after.modules():
        if isinstance(module, QuantLinear) and module.activation is not None and module.activation.factor is not None:
            module.activation.factor.fill_(1.0)
    assert alike(trial, theirs).max() < 40
    trial = on_text()
    for path, module in trial.after.named_modules():
        if isinstance(module, QuantLinear) and module.bias is not None:
            module.bias = trial.before.get_submodule(path).bias
    assert alike(trial, theirs).max() < 90


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"symmetric": False},
        {"weights": 4, "group_size": 16, "symmetric": False},
        {"weights": 4, "group_size": 16, "scale_estimation": True},
        {"weights": 4, "granularity": "channel"},
    ],
    ids=str,
)
def test_compressed_weights_are_nncfs_own(options: dict[str, Any], theirs: Theirs) -> None:
    """NNCF multiplies codes by scales in float16 and widens the product: 2**-12 at most of each weight."""
    trial = on_text(activations="none", **options)
    assert sqnr_db(theirs.outputs(trial), trial.outputs(trial.after)) > 60
    assert trial.sqnr_db < 60


def test_a_tied_head_shares_the_codes_of_weights_alone_and_stays_float_otherwise() -> None:
    alone = on_text(activations="none", embeddings=8).after
    assert alone.head.quantized_weight is alone.embed.quantized_weight
    trial = on_text(embeddings=8, sites=[*INPUTS, "head"])
    assert isinstance(trial.after.embed, QuantEmbedding)
    assert isinstance(trial.after.head, nn.Linear)
    assert "embed" in trial.context.report["skipped"]["head"]


def test_what_nncf_would_round_besides_is_told_by_name() -> None:
    skipped = on_text().context.report["skipped"]
    products = {name: reason for name, reason in skipped.items() if "scaled_dot_product_attention" in name}
    assert len(products) == 2
    assert all("NNCF would round its inputs" in reason for reason in products.values())


class Twice(nn.Module):
    """One linear layer that runs twice, and one that runs once."""

    def __init__(self) -> None:
        super().__init__()
        self.again, self.once = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.once(self.again(self.again(x).relu()))
        return y


def test_a_layer_that_runs_twice_stays_float_and_is_told() -> None:
    torch.manual_seed(0)
    signature = Signature((TensorSpec("x", torch.float32, ("batch", 16)),))
    trial = tried(Quantize(engine="nncf", sites=["again", "once"]), Twice().eval(), signature, [{"x": torch.randn(8, 16)}])
    assert [path for path, module in trial.after.named_modules() if is_quantized(module)] == ["once"]
    assert "runs 2 times" in trial.context.report["skipped"]["again"]


def test_codes_of_four_bits_of_a_convolution_are_refused_by_name() -> None:
    step = Quantize(engine="nncf", weights=4, group_size=16, activations="none", sites=["patch_embed", "mlp.*"])
    model, signature, rows = digits()
    anatomy = find(model, signature, {"pixels": rows[0]["pixels"][:2]})
    assert "patch_embed" in step.skips(model, anatomy)
    assert "patch_embed" not in step.preview(model, anatomy)


def test_it_is_deterministic_and_can_be_replayed() -> None:
    first, second = on_text(embeddings=8), on_text(embeddings=8)
    for name, tensor in first.after.state_dict().items():
        assert torch.equal(tensor, second.after.state_dict()[name]), name
    assert torch.equal(first.outputs(rebuilt(first)), first.outputs(first.after))


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"weights": 2}, "weights"),
        ({"weights": 4}, "activations"),
        ({"activations": "dynamic"}, "activations"),
        ({"rounding": "gptq"}, "rounding"),
        ({"smooth": "balanced"}, "smooth"),
        ({"smooth_below_db": 20}, "smooth_below_db"),
        ({"range": "entropy"}, "range"),
        ({"symmetric": False}, "symmetric"),
        ({"group_size": 32}, "granularity"),
        ({"embeddings": 4}, "embeddings"),
        ({"scale_estimation": True}, "scale_estimation"),
        ({"activations": "none", "granularity": "tensor"}, "granularity"),
        ({"activations": "none", "scale_estimation": True}, "scale_estimation"),
        ({"engine": "own", "alpha": 0.5}, "alpha"),
        ({"overrides": {"mlp.down": "float"}}, "overrides"),
    ],
    ids=str,
)
def test_an_option_that_it_lacks_is_named(options: dict[str, Any], name: str) -> None:
    with pytest.raises(ValidationError, match=name):
        Quantize(**{"engine": "nncf", **options})


def test_without_nncf_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    model, signature, rows = shared()
    anatomy = find(model, signature, rows[0])
    absent = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "nncf" else absent(name, *rest))
    with pytest.raises(MissingRuntime, match=r"transformer-compress\[nncf\]"):
        Quantize(engine="nncf").targets(model, anatomy)


def test_what_nncf_cannot_handle_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import nncf

    def fails(*args: object, **options: object) -> None:
        raise RuntimeError("no such graph\nand a long trace")

    monkeypatch.setattr(nncf, "quantize", fails)
    with pytest.raises(UserError, match="NNCF cannot handle the model: no such graph") as caught:
        on_text()
    assert "long trace" not in str(caught.value)
