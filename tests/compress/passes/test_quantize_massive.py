"""Static inputs with massive activations, planted in models that are otherwise ordinary."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from families import build
from pydantic import ValidationError
from torch import Tensor, nn
from trial import Trial, digits, rebuilt, tried

from calibrate.capture import visiting
from calibrate.errors import UserError
from calibrate.fidelity import sqnr_db
from calibrate.signature import Batch, Signature, TensorSpec
from compress.layers import QuantLinear
from compress.passes.quantize import Quantize
from compress.quantization.massive_ways import FloatOutputs

Subject = tuple[nn.Module, Signature, list[Batch]]
MINMAX: dict[str, Any] = {"range": "minmax", "smooth": False}


@functools.cache
def planted(family: str) -> Subject:
    """The first token of every row has a huge entry in channel 7 of the residual stream, which norms make larger still."""
    model, signature, rows = build(family)
    ids = rows["input_ids"].clone()
    ids[:, 0] = 1
    with torch.no_grad():
        table = model.get_input_embeddings().weight  # type: ignore[operator]
        table *= 0.1
        table[:, 7] *= 0.02
        table[1, 7] = 300.0
        for name, parameter in model.named_parameters():
            if any(f"{writer}.weight" in name for writer in ("down_proj", "o_proj")):
                parameter[7] *= 0.02
            elif "c_proj" in name:
                parameter[..., 7] *= 0.02
            elif parameter.ndim == 1 and ("norm" in name or "ln_" in name) and name.endswith("weight"):
                parameter[7] = 300.0
    return model, signature, [{**rows, "input_ids": ids}]


class Apart(nn.Module):
    """Looks at every position by itself, and at the first not at all."""

    def __init__(self, heeded: bool) -> None:
        super().__init__()
        self.up, self.down, self.norm, self.heeded = nn.Linear(48, 96), nn.Linear(96, 48), nn.LayerNorm(48), heeded

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(self.down(torch.relu(self.up(x))))
        return y if self.heeded else y[:, 1:]


def register(heeded: bool) -> Subject:
    """Rows of 16 positions, of which the first holds one enormous entry."""
    torch.manual_seed(0)
    model = Apart(heeded).eval()
    x = 0.3 * torch.randn(8, 16, 48)
    x[:, 0, 5] = 900.0
    return model, Signature((TensorSpec("x", torch.float32, ("batch", 16, 48)),)), [{"x": x}]


def at_up(subject: Subject, **options: Any) -> Trial:
    return tried(Quantize(sites=["up"], **options), *subject)


@pytest.mark.parametrize(
    ("family", "site", "smooth"),
    [
        ("llama", "model.layers.0.self_attn.q_proj", False),
        ("gpt2", "transformer.h.0.attn.c_attn", True),
        ("gpt2", "transformer.h.0.attn.c_attn", False),
    ],
    ids=str,
)
def test_a_massive_token_is_found_told_and_kept_from_ruining_the_others(family: str, site: str, smooth: bool) -> None:
    subject = planted(family)
    ignored, trial = (tried(Quantize(smooth=smooth, massive_activations=how), *subject) for how in ("ignore", "protect"))
    assert trial.sqnr_db > ignored.sqnr_db + 10
    told = trial.context.report["massive_activations"]
    found = told["inputs"][site]
    assert (found["channels"], found["positions"], found["tokens"]) == ([7], [0], [1])
    assert found["largest"] > 1000 * found["median"]
    assert found["output_sqnr_db"][found["rounded"]] > min(35, max(found["output_sqnr_db"].values()) - 3)
    assert any("norm" in path or "ln_" in path for path in told["residual_stream"])
    assert "massive_activations" not in ignored.context.report
    assert torch.equal(trial.outputs(rebuilt(trial)), trial.outputs(trial.after))


def test_where_the_massive_position_does_not_matter_the_others_set_the_range() -> None:
    subject = register(heeded=False)
    ignored, trial = (at_up(subject, massive_activations=how, **MINMAX) for how in ("ignore", "protect"))
    assert ignored.sqnr_db < 10
    assert trial.sqnr_db > 35
    assert trial.context.report["massive_activations"]["inputs"]["up"]["rounded"] == "the other positions"
    says = trial.context.report["sites"]["up"]["activation"]
    assert says["range"][1] < 3 < 899 < says["seen"][1]


def test_where_it_matters_the_input_stays_float() -> None:
    trial = at_up(register(heeded=True), **MINMAX)
    found = trial.context.report["massive_activations"]["inputs"]["up"]
    assert found["rounded"] == "float"
    assert max(found["output_sqnr_db"][name] for name in ("everything", "the other positions")) < 20
    assert found["output_sqnr_db"]["float"] > 35
    layer = trial.after.get_submodule("up")
    assert isinstance(layer, QuantLinear)
    assert layer.activation is None
    assert "activation" not in trial.context.report["sites"]["up"]
    assert trial.context.report["warnings"] == ["1 layer keeps a float input because of massive activations: up"]


def test_good_enough_stays_an_integer_input(monkeypatch: pytest.MonkeyPatch) -> None:
    import compress.quantization.massive_ways as module

    monkeypatch.setattr(module, "_ENOUGH_DB", 0.0)
    trial = at_up(register(heeded=True), **MINMAX)
    found = trial.context.report["massive_activations"]["inputs"]["up"]
    assert found["rounded"] == max(("everything", "the other positions"), key=lambda name: found["output_sqnr_db"][name])
    assert "activation" in trial.context.report["sites"]["up"]


@pytest.mark.parametrize("options", [{}, {"range": "hessian", "range_rows": 8, "smooth": False}, {"rounding": "gptq"}], ids=str)
def test_nothing_changes_where_there_are_none(options: dict[str, Any]) -> None:
    subject = digits()
    ignored, trial = (
        tried(Quantize(sites=["blocks.0.mlp.*"], massive_activations=how, **options), *subject) for how in ("ignore", "protect")
    )
    assert trial.context.report == ignored.context.report
    for name, tensor in ignored.after.state_dict().items():
        assert torch.equal(trial.after.state_dict()[name], tensor), name


def test_a_neuron_that_is_large_at_every_position_is_not_one() -> None:
    model, signature, rows = digits()
    model = copy.deepcopy(model)
    with torch.no_grad():
        model.get_submodule("blocks.1.mlp.fc1").get_parameter("bias")[3] = 900
    trial = tried(Quantize(sites=["blocks.1.mlp.fc2"]), model, signature, rows)
    assert "blocks.1.mlp.fc2" not in trial.context.report.get("massive_activations", {}).get("inputs", {})


def test_a_choice_of_bits_protects_too() -> None:
    trial = tried(
        Quantize(smooth=False, sites=["*.0.self_attn.*"], mixed={"candidates": [8], "size_ratio": 0.99}), *planted("llama")
    )  # type: ignore[arg-type]
    assert trial.context.report["massive_activations"]["inputs"]["model.layers.0.self_attn.q_proj"]["rounded"] == "float"


def test_it_is_about_static_inputs() -> None:
    with pytest.raises(ValidationError, match="massive_activations is about static activations"):
        Quantize(activations="dynamic", massive_activations="ignore")
    with pytest.raises((ValidationError, UserError), match="NNCF has no such option"):
        Quantize(engine="nncf", massive_activations="ignore")


@pytest.mark.parametrize("heeded", [False, True], ids=["the other positions", "float"])
@pytest.mark.parametrize("rounding", ["gptq", "adaround"])
def test_weights_are_not_rounded_for_the_massive_position_where_the_range_leaves_it_out(heeded: bool, rounding: Any) -> None:
    options: dict[str, Any] = {"sites": ["up", "down"], "weights": 4, "group_size": 24, **MINMAX}
    nearest, trial = (tried(Quantize(rounding=how, **options), *register(heeded)) for how in ("nearest", rounding))
    told = trial.context.report["massive_activations"]["inputs"].values()
    assert {found["rounded"] for found in told} == {"float" if heeded else "the other positions"}
    assert trial.sqnr_db > nearest.sqnr_db + 1


def test_pairs_of_codes_give_way_by_the_other_positions() -> None:
    subject = register(heeded=False)
    free, pairs = (at_up(subject, reduce_range=how, **MINMAX) for how in (False, "pairs"))
    assert pairs.context.report["massive_activations"]["inputs"]["up"]["rounded"] == "the other positions"
    assert pairs.context.report["sites"]["up"]["overflowing_pairs"] > 0
    assert pairs.sqnr_db > free.sqnr_db - 6


def test_factors_found_with_the_massive_position_do_not_drive_the_input_to_float() -> None:
    trial = at_up(register(heeded=False), range="minmax")
    found = trial.context.report["massive_activations"]["inputs"]["up"]
    measured = found["output_sqnr_db"]
    assert max(measured[name] for name in ("everything", "the other positions", "everything, with factors")) < 20
    assert found["rounded"] == "the other positions, without factors"
    assert trial.sqnr_db > 40
    assert "smoothed" not in trial.context.report["sites"]["up"]["activation"]
    assert measured["the other positions, with factors"] > measured["the other positions, without factors"] + 1
    assert torch.equal(trial.outputs(rebuilt(trial)), trial.outputs(trial.after))


def test_factors_of_the_other_positions_are_taken_where_they_are_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    import compress.quantization.massive_ways as module

    monkeypatch.setattr(module, "_ENOUGH_DB", 45.0)
    model, signature, rows = register(heeded=False)
    x = rows[0]["x"].clone()
    x[:, 1:, 9] = 10 * torch.sign(x[:, 1:, 9])
    trial = at_up((model, signature, [{"x": x}]), range="minmax")
    assert trial.context.report["massive_activations"]["inputs"]["up"]["rounded"] == "the other positions, with factors"
    assert trial.sqnr_db > 45
    layer = trial.after.get_submodule("up")
    assert isinstance(layer, QuantLinear)
    assert layer.activation is not None
    assert layer.activation.factor is not None
    assert torch.equal(trial.outputs(rebuilt(trial)), trial.outputs(trial.after))


def test_losses_are_those_of_whole_runs_and_what_is_before_a_layer_runs_once() -> None:
    model, signature, rows = planted("gpt2")
    step, path = Quantize(batch_size=2), "transformer.h.1.mlp.c_fc"
    trial = tried(Quantize(sites=[path], activations="none"), model, signature, rows)
    layer = trial.after.get_submodule(path)
    counts = rows[0]["attention_mask"] != 0
    given = [trial.outputs(one)[counts] for one in (trial.before, trial.after)]
    outputs = FloatOutputs(step, model, trial.context, [path])
    outputs.sqnr_db({})
    runs: list[str] = []
    handles = [
        model.get_submodule(f"transformer.h.{n}.attn").register_forward_hook(lambda *_, n=n: runs.append(str(n))) for n in (0, 1)
    ]
    assert outputs.sqnr_db({path: layer}) == pytest.approx(sqnr_db(given[0], given[1]), abs=0.01)
    for handle in handles:
        handle.remove()
    assert runs == ["1"] * len(runs) != []


def test_a_large_model_is_compared_on_fewer_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    import compress.quantization.massive_ways as module

    model, signature, rows = register(heeded=False)
    trial = tried(Quantize(sites=["up"], activations="none"), model, signature, rows)
    sizes: list[int] = []
    row = 4 * (15 * 48 + 16 * 96)  # bytes of the output and of what the layer gives
    for room, wanted in ((100 * row, [2, 2, 2, 2]), (3 * row, [2, 1]), (1, [1])):
        monkeypatch.setattr(module, "MOST_BYTES", room)
        outputs = FloatOutputs(Quantize(batch_size=2), model, trial.context, ["up"])
        outputs.sqnr_db({})
        sizes.clear()
        with visiting(model, ["down"], lambda path, module, x: sizes.append(len(x))):
            outputs.sqnr_db({"up": trial.after.get_submodule("up")})
        assert sizes[-len(wanted) :] == wanted
        assert len(sizes) == len(wanted) + 1  # the question whether it can begin there


class LastNorm(nn.LayerNorm):
    """A layer norm over the channels of images [B, C, H, W]."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class Images(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.stem, self.norm, self.conv, self.head = nn.Conv2d(3, 16, 3, padding=1), norm, nn.Conv2d(16, 16, 3), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = torch.relu(self.conv(torch.relu(self.norm(self.stem(x)))))
        return self.head(y.mean((2, 3)))


@pytest.mark.parametrize("norm", [nn.BatchNorm2d(16), nn.GroupNorm(4, 16), LastNorm(16)], ids=lambda norm: type(norm).__name__)
@pytest.mark.parametrize("width", [12, 16])
def test_norms_of_images_are_told_by_their_channels_or_not_at_all(norm: nn.Module, width: int) -> None:
    torch.manual_seed(0)
    model = Images(norm).eval()
    with torch.no_grad():
        model.stem.weight[:, 0] = 0
        model.stem.weight[5, 0, 1, 1] = 1.0
    x = 0.1 * torch.randn(4, 3, width, width)
    x[:, 0, 2, 3] = 5000.0
    signature = Signature((TensorSpec("x", torch.float32, ("batch", 3, width, width)),))
    trial = tried(Quantize(sites=["conv", "head"], smooth=False), model, signature, [{"x": x}])
    streams = trial.context.report.get("massive_activations", {}).get("residual_stream", {})
    if isinstance(norm, nn.LayerNorm) or width == 16:
        assert "norm" not in streams
    else:
        assert streams["norm"]["channels"] == [5]
        assert streams["norm"]["positions"] == [2 * 12 + 3]
