"""Bridges of hybrids calibrated jointly, and symmetric or asymmetric inputs by what they cost."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn import functional as F
from trial import Trial, digits, rebuilt, tried

from calibrate.errors import UserError
from calibrate.grid import Grid
from calibrate.signature import Batch, Signature, TensorSpec
from compress.algorithms.range_search import Ranges, Reader, search_ranges
from compress.anatomy import Anatomy, find
from compress.depth.grafts import grafting
from compress.layers import QuantConv2d, QuantLinear
from compress.passes.fuse import Fuse
from compress.passes.quantize import Quantize
from compress.quantization.hessian_ranges import best_of
from compress.quantization.output_gradients import Felt, felt, felt_again
from export.to_tensorrt import TensorRTExporter

PIXELS = Signature((TensorSpec("pixels", torch.float32, ("batch", 3, 8, 8)),))
SITES = ["attention.*", "mlp.*", "conv"]
PLAIN: dict[str, Any] = {"smooth": False, "bias_correction": False, "range": "hessian", "sites": SITES, "range_rows": 16}
READS = ("layer.query", "layer.key", "layer.value")


class Layer(nn.Module):
    """A block of a transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(16) for _ in range(2))
        self.query, self.key, self.value, self.out = (nn.Linear(16, 16) for _ in range(4))
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norms[0](x)
        q, k, v = (made(normed).unflatten(-1, (2, 8)).transpose(1, 2) for made in (self.query, self.key, self.value))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(F.silu(self.up(self.norms[1](x))))


class Hybrid(nn.Module):
    """Convolutions (one of them depthwise) with BatchNorm, a transformer on their features, a convolution on what it gives."""

    def __init__(self, shift: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.stem_norm = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.deep, self.deep_norm = nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False), nn.BatchNorm2d(16)
        self.mix = nn.Conv2d(16, 16, 1)
        self.layer = Layer()
        self.back, self.head = nn.Conv2d(16, 16, 3, padding=1), nn.Linear(16, 6)
        self.shift = shift
        with torch.no_grad():
            self.mix.weight *= torch.logspace(-1, 1, 16)[:, None, None, None]  # channels differ, as those of hybrids do
            for norm in (self.stem_norm, self.deep_norm):
                assert norm.running_var is not None
                norm.running_var.uniform_(0.2, 2)

    def forward(self, pixels: Tensor) -> Tensor:
        x = F.silu(self.stem_norm(self.stem(pixels)))
        x = F.silu(self.deep_norm(self.deep(x)))
        if self.shift:
            x = self.shift + x.sigmoid()
        x = self.mix(x)
        tokens = self.layer(x.flatten(2).transpose(1, 2))
        x = self.back(tokens.transpose(1, 2).reshape(x.shape)).relu()
        given: Tensor = self.head(x.mean((2, 3)))
        return given


def pixels() -> list[Batch]:
    drawn = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    return [{"pixels": 3 * drawn[:8]}, {"pixels": drawn[8:]}]


@functools.cache
def hybrid(bits: int = 8, shift: float = 0.0, **more: Any) -> Trial:
    """Fewer bits of activations than recipes know make what a choice costs plain."""
    step = Quantize(**PLAIN, **more).model_copy(update={"activation_bits": bits})
    return tried(step, Hybrid(shift).eval(), PIXELS, pixels())


def error(trial: Trial, heard: dict[str, Felt]) -> float:
    """Written out: what query, key and value give after the convolution before them was rounded, against the float model."""
    before, given = trial.before, []
    with torch.no_grad(), grafting(trial.before, {"mix": trial.after.get_submodule("mix")}):
        received = felt_again(before, PIXELS.call, trial.rows, {READS[0]: heard[READS[0]]})[READS[0]]
    for path in READS:
        layer = trial.after.get_submodule(path)
        assert isinstance(layer, QuantLinear)
        off = F.linear(layer.input(received), layer.quantized_weight())
        off = off - F.linear(heard[path].inputs, before.get_submodule(path).get_parameter("weight"))
        given.append((off.square() * heard[path].slopes).double().sum())
    return float(torch.stack(given).sum().detach())


@pytest.mark.parametrize(("bits", "scheme"), [(4, True), (4, "best"), (8, "best")])
def test_a_bridge_calibrated_jointly_loses_no_more_than_one_calibrated_alone(bits: int, scheme: bool | str) -> None:
    alone, joint = (hybrid(bits, activation_symmetric=scheme, bridges=how) for how in ("alone", "joint"))
    into = next(one for one in joint.context.report["bridges"] if one["crossing"] == "into tokens")
    assert (into["before"], tuple(into["after"])) == (["mix"], READS)
    paths = ["mix", *READS]
    heard = felt(alone.before, PIXELS.call, alone.rows, paths, positions=1024, seed=alone.context.seed)
    errors = error(alone, heard), error(joint, heard)
    assert errors[1] <= errors[0]
    assert into["gain_db"] == pytest.approx(10 * math.log10(errors[0] / errors[1]), abs=1e-3)
    assert into["gain_db"] > (0.05 if bits == 4 else 0)  # what it searches it finds
    for path in ("mix", "deep", "layer.out"):  # what comes first in a bridge, or lies in none, is as it was
        as_alone = joint.after.get_submodule(path).state_dict()
        assert all(torch.equal(as_alone[name], one) for name, one in alone.after.get_submodule(path).state_dict().items())
    assert len({joint.context.report["sites"][path]["activation"]["scale"] for path in READS}) == 1  # of one tensor


def test_bridges_are_named_and_the_result_can_be_loaded() -> None:
    trial = hybrid(bridges="joint", activation_symmetric="best")
    said = trial.context.report["bridges"]
    assert [(one["crossing"], one["calibrated"]) for one in said] == [("into tokens", "jointly"), ("into features", "jointly")]
    assert (said[1]["before"], said[1]["after"]) == (["layer.down"], ["back"])
    assert torch.equal(trial.outputs(rebuilt(trial)), trial.outputs(trial.after))
    assert trial.sqnr_db > 25


def test_the_same_ranges_are_found_twice() -> None:
    first, again = (made(4, bridges="joint", activation_symmetric="best") for made in (hybrid, hybrid.__wrapped__))
    for name, tensor in first.after.state_dict().items():
        assert torch.equal(tensor, again.after.state_dict()[name]), name


def test_the_scheme_of_each_input_is_the_one_that_costs_less() -> None:
    chosen = hybrid(4, activation_symmetric="best").context.report["sites"]
    schemes = {path: site["activation"]["scheme"] for path, site in chosen.items()}
    gains = {path: site["activation"]["scheme_gain_db"] for path, site in chosen.items()}
    assert schemes["layer.down"] == schemes["mix"] == "asymmetric"  # after SiLU
    assert all(gain >= 0 for gain in gains.values())
    assert min(gains["layer.down"], gains["mix"]) > gains["layer.out"] + 1
    for path, scheme in schemes.items():
        layer = hybrid(4, activation_symmetric="best").after.get_submodule(path)
        assert isinstance(layer, (QuantLinear, QuantConv2d))
        assert layer.activation is not None
        assert layer.activation.symmetric == (scheme == "symmetric")


def test_values_on_a_symmetric_grid_need_no_zero_point() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, slopes = torch.randint(-7, 8, (6, 16), generator=generator).float(), torch.ones(64, 6)
    reader = Reader(weight, Grid(4), "minmax", slopes, F.linear)
    for low, high, symmetric in ((-7, 7, True), (0, 15, False)):
        x = torch.randint(low, high + 1, (64, 16), generator=generator) / high
        grids = {scheme: Grid(4, scheme, "tensor") for scheme in (True, False)}
        searches = {scheme: search_ranges(x, [reader], grid, low / high, 1.0) for scheme, grid in grids.items()}
        scheme, best = best_of(searches)
        assert scheme == symmetric
        assert best.after == min(one.after for one in searches.values()) < max(one.after for one in searches.values())


def test_of_two_schemes_that_cost_the_same_the_symmetric_one_is_taken() -> None:
    def of(after: float) -> Ranges:
        return Ranges(-1.0, 1.0, (), 2.0, after)

    assert best_of({True: of(1.0), False: of(1.0)})[0]
    assert not best_of({True: of(1.0), False: of(0.9)})[0]
    assert best_of({True: of(0.9), False: of(1.0)})[0]


@pytest.mark.parametrize("how", [{"activation_symmetric": "best"},
                                 {"activation_symmetric": False, "range": "mse", "range_rows": 64}], ids=str)  # fmt: skip
def test_a_range_far_from_zero_gives_a_zero_point_that_fits(how: dict[str, Any]) -> None:
    step = Quantize.model_validate(PLAIN | how)
    trial = tried(step, Hybrid(shift=5.0).eval(), PIXELS, pixels())
    layer = trial.after.get_submodule("mix")
    assert isinstance(layer, QuantConv2d)
    assert layer.activation is not None
    low, high = trial.context.report["sites"]["mix"]["activation"]["seen"]
    assert 5 <= low < high <= 6
    assert not -128 <= round(-128 - low / ((high - low) / 255)) <= 127  # of the range as it was seen
    assert layer.activation.zero_point.dtype == torch.int8
    assert float(layer.activation(torch.zeros(1))) == 0
    values = torch.linspace(low, trial.context.report["sites"]["mix"]["activation"]["range"][1], 100)
    assert float((layer.activation(values) - values).abs().max()) <= 0.501 * float(layer.activation.scale)
    assert trial.sqnr_db > 25


class Sometimes(nn.Module):
    """A layer runs on large batches only."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.often, self.seldom = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        given: Tensor = self.often(x)
        return self.seldom(given) if x.shape[0] > 8 else given


def test_a_layer_that_does_not_run_with_gradients_says_what_it_kept() -> None:
    signature = Signature((TensorSpec("x", torch.float32, ("batch", 8)),))
    rows = [{"x": torch.randn(16, 8, generator=torch.Generator().manual_seed(1))}]
    step = Quantize(**PLAIN | {"sites": ["often", "seldom"]}, batch_size=16)
    said = tried(step, Sometimes().eval(), signature, rows).context.report
    assert list(said["ranges_kept"]) == ["seldom"]
    assert said["ranges_kept"]["seldom"].startswith("minmax")
    assert {path: site["activation"]["method"] for path, site in said["sites"].items()} == {
        "often": "hessian",
        "seldom": "minmax",
    }
    assert said["sites"]["seldom"]["activation"]["range"] == said["sites"]["seldom"]["activation"]["seen"]


def test_layers_with_batch_norm_folded_in_are_calibrated_with_it() -> None:
    model, rows = Hybrid().eval(), pixels()
    fused = tried(Fuse(rules=["batch_norm"]), model, PIXELS, rows).after
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fused.modules())
    trial = tried(Quantize(**PLAIN, bridges="joint", activation_symmetric="best"), fused, PIXELS, rows)
    with torch.no_grad():
        wanted = model(rows[0]["pixels"])
        assert torch.allclose(fused(rows[0]["pixels"]), wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))
    assert trial.sqnr_db > 25
    layer = trial.after.get_submodule("deep")
    assert isinstance(layer, QuantConv2d)
    assert layer.bias is not None
    assert layer.quantized_weight.scale.shape == (16, 1)  # depthwise: one scale for each channel


def anatomy_of(model: nn.Module, signature: Signature, rows: list[Batch]) -> Anatomy:
    return find(model, signature, {name: tensor[:2] for name, tensor in rows[0].items()})


def test_tensorrt_refuses_what_may_get_zero_points_before_anything_runs() -> None:
    model = Hybrid().eval()
    anatomy = anatomy_of(model, PIXELS, pixels())
    for scheme, refused in (("best", True), (True, False)):
        layers = Quantize.model_validate(PLAIN | {"activation_symmetric": scheme}).preview(model, anatomy)
        reasons = TensorRTExporter().refuses(nn.Sequential(*layers.values()))
        assert any("activation codes are asymmetric" in reason for _, reason in reasons) == refused


def test_models_without_bridges_and_bridges_with_one_side_are_refused() -> None:
    model, signature, rows = digits()
    joint = {"range": "hessian", "bridges": "joint"}
    with pytest.raises(UserError, match="no convolution of this model"):
        Quantize.model_validate(joint).targets(model, anatomy_of(model, signature, rows))
    other = Hybrid().eval()
    with pytest.raises(UserError, match=r"no bridge has both sides rounded \(the first: mix to layer.query\)"):
        Quantize.model_validate(joint).targets(other, anatomy_of(other, PIXELS, pixels()))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"bridges": "joint"}, "bridges: joint goes by the error"),
        ({"activation_symmetric": "best"}, "activation_symmetric: best goes by the error"),
        ({"activation_symmetric": "best", "range": "hessian", "engine": "nncf"}, "NNCF has no"),
        ({"activation_symmetric": "worst"}, "activation_symmetric"),
    ],
    ids=str,
)
def test_what_would_say_nothing_is_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        Quantize.model_validate(options)
