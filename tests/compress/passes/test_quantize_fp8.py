"""``quantize: {weights: fp8}``: what it makes of a model, what it needs no help for, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from trial import digits, rebuilt, tried

from calibrate import float8
from compress.layers import QuantLinear
from compress.passes.quantize import Quantize


def test_weights_and_inputs_become_floats_of_eight_bits_and_edits_rebuild_them() -> None:
    trial = tried(Quantize(weights="fp8"), *digits())
    assert trial.sqnr_db > 25
    for path, says in trial.context.report["sites"].items():
        layer = trial.after.get_submodule(path)
        assert isinstance(layer, QuantLinear)
        held, activation = layer.quantized_weight, layer.activation
        assert activation is not None
        assert says["format"] == "fp8 e4m3"
        assert held.codes.numel() == trial.before.get_submodule(path).weight.numel()  # type: ignore[union-attr, operator]
        assert (
            float(float8.values(held.integers()).abs().amax(1).min()) >= 440
        )  # a scale makes its largest weight the largest number
        seen = max(map(abs, says["activation"]["seen"]))
        assert seen / 448 <= float(activation.scale) <= seen / 448 * (1 + 2**-9)
        assert says["activation"]["method"] == "minmax"
    again = rebuilt(trial)
    rows = trial.rows[0]
    with torch.no_grad():
        assert torch.equal(trial.signature.call(again, rows), trial.signature.call(trial.after, rows))


def test_channels_of_very_different_sizes_need_no_factors() -> None:
    """Where integers lose small channels beside a large one, numbers with exponents keep them."""
    model, signature, rows = digits()
    with torch.no_grad():
        for block in model.blocks:  # type: ignore[union-attr]
            block.norm2.weight[0] *= 200
            block.mlp.fc1.weight[:, 0] /= 200
    options: dict[str, Any] = {"sites": ["mlp.up"]}
    floats = tried(Quantize(weights="fp8", **options), model, signature, rows).sqnr_db
    integers = tried(Quantize(smooth=False, range="minmax", **options), model, signature, rows).sqnr_db
    assert floats > integers + 3


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"activations": "none"}, "Use activations: static"),
        ({"group_size": 16}, "one scale a channel or tensor"),
        ({"symmetric": False}, "no zero points"),
        ({"activation_symmetric": False}, "no zero points"),
        ({"smooth": "balanced"}, "small channels"),
        ({"rounding": "gptq"}, "rounding: gptq has no meaning"),
        ({"range": "percentile"}, "range: percentile has no meaning"),
        ({"weight_range": "mse"}, "weight_range: mse has no meaning"),
        ({"reduce_range": True}, "x86"),
        ({"mixed": {"candidates": [8, 4], "size_ratio": 0.3}}, "stands alone"),
        ({"overrides": {"mlp.down": 8}}, "fp8 or float"),
        ({"engine": "nncf"}, "NNCF has no weights of fp8"),
    ],
    ids=str,
)
def test_what_does_not_go_with_it_is_refused_with_the_way_out(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says) as caught:
        Quantize(weights="fp8", **options)
    assert "\n" in str(caught.value)


@pytest.mark.parametrize("option", [{"smooth": True}, {"range": "mse"}], ids=str)
def test_a_default_that_is_written_and_would_be_ignored_is_refused_too(option: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="Leave it out"):
        Quantize(weights="fp8", **option)


def test_what_it_takes_by_itself_may_be_said() -> None:
    step = Quantize(weights="fp8", range="minmax", smooth=False, granularity="tensor", overrides={"mlp.down": "float"})
    assert Quantize.model_validate(step.model_dump()) == step
