"""Rounding by descent: AdaRound, blocks that are reconstructed, and pairs of products that fit 16 bits."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from pydantic import ValidationError
from sweeps import swept
from trial import Trial, digits, rebuilt, tried

from calibrate.errors import UserError
from calibrate.fidelity import sqnr_db
from compress.layers import QuantConv2d, QuantLinear
from compress.passes.quantize import Quantize
from compress.quantization.reconstruction import Learnable
from export.graph import Traceable
from export.saturation import at_risk
from export.to_onnx import OnnxExporter

LOW = {"weights": 2, "group_size": 16, "activations": "none"}


@functools.cache
def made(rounding: str, **options: Any) -> Trial:
    return tried(Quantize(**LOW, rounding=rounding, **options), *digits())


def codes(trial: Trial) -> dict[str, torch.Tensor]:
    layers = {path: layer for path, layer in trial.after.named_modules() if isinstance(layer, QuantLinear)}
    return {path: layer.quantized_weight.integers() for path, layer in layers.items()}


def test_adaround_is_better_than_the_nearest_codes() -> None:
    nearest, by_descent = made("nearest"), made("adaround")
    assert by_descent.sqnr_db > nearest.sqnr_db + 4
    says = by_descent.context.report["sites"]["blocks.0.mlp.fc1"]
    assert says["rounding"] == "adaround"
    assert says["rounding_gain_db"] > 0


def test_reconstruction_is_better_than_gptq_and_moves_codes_by_one() -> None:
    begun, found = made("gptq"), made("reconstruct")
    assert found.sqnr_db > begun.sqnr_db + 2
    told = found.context.report["blocks"]
    assert set(told) == {f"blocks.{number}" for number in range(4)}
    for block in told.values():
        assert block["sqnr_db_after"] >= block["sqnr_db_before"]
        assert block["held_rows"] > 0
        assert block["steps"] == 200
    first = {path: (codes(found)[path].int() - codes(begun)[path].int()).abs() for path in codes(found) if "blocks.0" in path}
    assert max(int(moved.max()) for moved in first.values()) == 1
    assert torch.equal(found.outputs(rebuilt(found)), found.outputs(found.after))


def test_reconstruction_is_the_same_twice_and_keeps_the_float_parts() -> None:
    first, again = (tried(Quantize(**LOW, rounding="reconstruct", rounding_steps=20), *digits()) for _ in range(2))
    for name, tensor in first.after.state_dict().items():
        assert torch.equal(tensor, again.after.state_dict()[name]), name
    for name in ("norm.weight", "head.weight", "blocks.1.norm1.weight"):
        assert torch.equal(first.after.state_dict()[name], first.before.state_dict()[name])
    assert not any(parameter.requires_grad for layer in first.after.modules() if isinstance(layer, QuantLinear)
                   for parameter in layer.parameters())  # fmt: skip


def test_what_held_out_rows_do_not_confirm_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """With targets that have nothing to do with the block nothing learnt is kept, or the check would be none."""
    import compress.quantization.reconstruction as module

    monkeypatch.setattr(module, "_TRAVEL", 1e4)
    monkeypatch.setattr(module, "_BIAS_RATE", 1e6)
    wild = tried(Quantize(**LOW, rounding="reconstruct", rounding_steps=5), *digits())
    assert all(block["best_step"] == 0 for block in wild.context.report["blocks"].values())
    begun = codes(made("gptq"))
    assert all(torch.equal(one, begun[path]) for path, one in codes(wild).items())


def test_a_block_with_static_inputs_learns_too() -> None:
    options: dict[str, Any] = {"weights": 2, "granularity": "channel", "sites": ["blocks.0.*"]}
    found = tried(Quantize(**options, rounding="reconstruct", rounding_steps=60), *digits())
    told = found.context.report["blocks"]["blocks.0"]
    assert told["sqnr_db_after"] > told["sqnr_db_before"] + 0.5
    assert all(layer.activation is not None for layer in found.after.modules() if isinstance(layer, QuantLinear))


@pytest.mark.parametrize("inputs", ["static", "dynamic", "none"])
def test_before_it_learns_a_layer_computes_what_it_is(inputs: str) -> None:
    """Linear layers and a convolution, with and without factors."""
    options: dict[str, Any] = {"activations": inputs, "weights": 4, "group_size": 16, "sites": ["patch_embed", "blocks.0.*"]}
    trial = tried(Quantize(**options, smooth_below_db=100), *digits())
    generator = torch.Generator().manual_seed(0)
    kinds = set()
    for layer in [one for one in trial.after.modules() if isinstance(one, (QuantLinear, QuantConv2d))]:
        shape = (3, 5, layer.quantized_weight.shape[1]) if isinstance(layer, QuantLinear) else (3, 1, 8, 8)
        x = torch.randn(shape, generator=generator)
        assert sqnr_db(layer(x), Learnable(layer, None)(x)) > 100
        kinds.add(type(layer))
    assert kinds == {QuantLinear, QuantConv2d}


def test_too_few_rows_are_refused_by_name() -> None:
    model, signature, rows = digits()
    for rounding in ("adaround", "reconstruct"):
        with pytest.raises(UserError, match=f"rounding: {rounding} at .* needs 256 positions"):
            tried(Quantize(rounding=rounding), model, signature, [{"pixels": rows[0]["pixels"][:4]}])


def test_steps_without_a_descent_are_refused() -> None:
    with pytest.raises(ValidationError, match="rounding_steps says nothing with rounding: gptq"):
        Quantize.model_validate({"rounding": "gptq", "rounding_steps": 100})
    assert Quantize.model_validate({"rounding": "gptq", "rounding_steps": 200}).rounding_steps == 200  # the default, written out


def test_mixed_bits_are_not_reconstructed() -> None:
    with pytest.raises(ValidationError, match="rounds blocks together"):
        Quantize.model_validate({"mixed": {"size_ratio": 0.5}, "rounding": "reconstruct"})


@pytest.mark.parametrize(
    ("rounding", "bits"), swept([("nearest", 8), ("gptq", 8), ("reconstruct", 8), ("nearest", 4)], [("gptq", 8), ("nearest", 4)])
)
def test_pairs_cannot_saturate_and_cost_less_than_seven_bits(rounding: str, bits: int) -> None:
    """Weights of the layers behind the activation all point the same way."""
    model, signature, rows = digits()
    model = copy.deepcopy(model)
    with torch.no_grad():
        for block in model.blocks:  # type: ignore[union-attr]
            block.get_submodule("mlp.fc2").get_parameter("weight").abs_()
    more: dict[str, Any] = {"rounding": rounding, "smooth": False, "sites": ["mlp.*"]}
    more |= {"weights": 4, "group_size": 16, "group_scales": "multiples"} if bits == 4 else {}
    more |= {"rounding_steps": 3} if rounding == "reconstruct" else {}
    levels = {}
    for how in (False, True, "pairs"):
        trial = tried(Quantize(reduce_range=how, **more), model, signature, rows)
        assert bool(at_risk(trial.after)) == (how is False)
        levels[how] = trial.sqnr_db
    assert levels["pairs"] > levels[True] - 0.2
    assert levels["pairs"] > 15


def test_a_file_computes_what_the_model_does_without_vnni_too(tmp_path: Path) -> None:
    model, signature, rows = digits()
    trial = tried(Quantize(reduce_range="pairs", activation_symmetric=False), model, signature, rows)
    path = tmp_path / "model.onnx"
    OnnxExporter().write(Traceable(trial.after, signature, {"pixels": rows[0]["pixels"][:2]}, "digits"), path)
    session = onnxruntime.InferenceSession(str(path))
    given = [session.run(None, {"pixels": np.asarray(batch["pixels"])})[0] for batch in rows]
    assert sqnr_db(trial.outputs(trial.after), torch.from_numpy(np.concatenate(given))) > 40


def test_biases_and_factors_lie_in_the_file_as_float16(tmp_path: Path) -> None:
    model, signature, rows = digits()
    trial = tried(Quantize(smooth="balanced", smooth_below_db=100), model, signature, rows)
    layers = [layer for layer in trial.after.modules() if isinstance(layer, QuantLinear)]
    assert all(layer.bias is not None and torch.equal(layer.bias, layer.bias.half().float()) for layer in layers)
    path = tmp_path / "model.onnx"
    OnnxExporter().write(Traceable(trial.after, signature, {"pixels": rows[0]["pixels"][:2]}, "digits"), path)
    kinds = {tensor.name: tensor.data_type for tensor in onnx.load(str(path)).graph.initializer}
    short = [name for name in kinds if name.endswith((".activation.factor", "fc1.bias", "qkv.bias"))]
    assert any(name.endswith(".factor") for name in short)
    assert {kinds[name] for name in short} == {onnx.TensorProto.FLOAT16}
