"""``fuse``: each rule where it holds and where it does not, judged by the function and by the operators that are left."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from trial import Trial, digits, rebuilt, tried

from calibrate.errors import UserError
from calibrate.signature import Batch, Signature, TensorSpec
from compress.anatomy import find
from compress.layers.plain import PlainNorm
from compress.passes.contract import Context
from compress.passes.fuse import Fuse
from compress.passes.quantize import Quantize
from compress.rewrites.applying import LIMIT, RULES
from compress.surgery import Surgery

EXAMPLE = Fuse(rules=["layer_norm"])

Setting = dict[str, Any]


def drawn(model: nn.Module) -> nn.Module:
    """Weights, biases and running statistics that nothing forgives."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in (*model.parameters(), *(b for b in model.buffers() if b.is_floating_point())):
            tensor.copy_(torch.rand(tensor.shape, generator=generator) * 1.5 + 0.3)
            if tensor.dim() > 1:
                tensor.sub_(1.0).div_(tensor[0].numel() ** 0.5)
    return model.eval()


def fused(model: nn.Module, *shape: int, rules: list[str] | None = None) -> Trial:
    """The pass on a model that takes one tensor."""
    name = "input" if isinstance(model, nn.Sequential) else "x"
    signature = Signature((TensorSpec(name, torch.float32, ("batch", *shape)),), "tensor")
    rows: Batch = {name: torch.randn(4, *shape, generator=torch.Generator().manual_seed(1))}
    trial = tried(Fuse(rules=rules), drawn(model), signature, [rows])
    assert torch.equal(trial.outputs(rebuilt(trial)), trial.outputs(trial.after))
    return trial


def told(trial: Trial, rule: str) -> Setting:
    found: Setting = trial.context.report["rules"][rule]
    if found["matched"]:
        assert found["difference"] <= LIMIT
    return found


def count(model: nn.Module, kind: type[nn.Module]) -> int:
    return sum(isinstance(module, kind) for module in model.modules())


class Attention(nn.Module):
    """Grouped heads, one bias missing, and a scale that is an attribute."""

    def __init__(self, normed: bool = False, states: str = "scale") -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(16, 16), nn.Linear(16, 8, bias=False), nn.Linear(16, 8)
        self.out = nn.Linear(16, 16)
        self.norm = nn.LayerNorm(4) if normed else None
        self.states = states
        if states in ("scale", "decoy"):
            self.scale = 0.5

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (-1, 4)).transpose(1, 2) for y in (self.q(x), self.k(x), self.v(x)))
        q = q if self.norm is None else self.norm(q)
        k, v = (y.repeat_interleave(2, 1) for y in (k, v))
        scale = self.scale if self.states == "scale" else 0.5
        mixed = F.scaled_dot_product_attention(q, k, v, scale=scale)
        projected: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return x + projected


def test_projections_of_one_tensor_become_one_product() -> None:
    trial = fused(Attention(), 5, 16)
    assert told(trial, "qkv")["sites"] == ["q"]
    linear = trial.after.get_submodule("q.packed.linear")
    assert tuple(linear.weight.shape) == (32, 16)
    assert torch.equal(linear.bias[16:24], torch.zeros(8)), "keys have no bias"
    assert trial.after.get_submodule("v.packed") is trial.after.get_submodule("q.packed")
    assert count(trial.before, nn.Linear) - count(trial.after, nn.Linear) == 2
    calls = []
    handle = linear.register_forward_hook(lambda *_: calls.append(1))
    trial.outputs(trial.after)
    handle.remove()
    assert len(calls) == 1, "one product for the three"
    anatomy = find(trial.after, trial.signature, {"x": trial.rows[0]["x"][:2]})
    assert anatomy.site("q.packed.linear").roles == ("attention.query", "attention.key", "attention.value")
    assert (anatomy.blocks[0].heads, anatomy.blocks[0].kv_heads, anatomy.blocks[0].head_dim) == (4, 2, 4)


def test_a_part_is_never_of_an_older_tensor() -> None:
    parts = fused(Attention(), 5, 16).after
    x = torch.randn(2, 5, 16)
    weight, bias = (parts.get_submodule("q.packed.linear").get_parameter(name) for name in ("weight", "bias"))
    with torch.no_grad():
        for name, rows in (("v", slice(24, 32)), ("q", slice(0, 16)), ("q", slice(0, 16)), ("k", slice(16, 24))):
            assert torch.allclose(parts.get_submodule(name)(x), F.linear(x, weight[rows], bias[rows]), atol=1e-6)
            x.add_(1.0)
            assert torch.allclose(parts.get_submodule(name)(x), F.linear(x, weight[rows], bias[rows]), atol=1e-6)
        assert copy.deepcopy(parts).get_submodule("q.packed")._last.held is None  # type: ignore[union-attr]


def test_keys_and_values_of_another_tensor_are_packed_without_the_queries() -> None:
    class Cross(Attention):
        def forward(self, x: Tensor) -> Tensor:
            other = x.flip(1)
            q, k, v = (y.unflatten(-1, (-1, 4)).transpose(1, 2) for y in (self.q(x), self.k(other), self.v(other)))
            mixed = F.scaled_dot_product_attention(q, *(y.repeat_interleave(2, 1) for y in (k, v)))
            projected: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
            return projected

    trial = fused(Cross(), 5, 16)
    assert told(trial, "qkv")["sites"] == ["k"]
    assert "no other projection" in told(trial, "qkv")["left"]["q"]


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Attention(), None),
        (Attention(normed=True), "normalised or biased"),
        (Attention(states="nowhere"), "no attribute"),
        (Attention(states="decoy"), "does not read its scale"),
    ],
)
def test_the_scale_goes_into_the_queries_where_the_code_lets_it(model: nn.Module, reason: str | None) -> None:
    if reason is None:
        assert told(fused(model, 5, 16, rules=["attention_scale"]), "attention_scale")["matched"] == 1
        assert "attention_scale" not in fused(model, 5, 16).context.report["rules"], "only where it is asked for"
        return
    with pytest.raises(UserError) as caught:
        fused(model, 5, 16, rules=["attention_scale"])
    assert reason in caught.value.hint


class Convolutions(nn.Module):
    """``order``: which of convolution and norm comes first; ``also``: who else reads what lies between."""

    def __init__(self, order: str = "after", padding: int = 1, groups: int = 2, also: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=padding, groups=groups, bias=False)
        self.bn, self.order, self.also = nn.BatchNorm2d(4), order, also

    def forward(self, x: Tensor) -> Tensor:
        first, second = (self.conv, self.bn) if self.order == "after" else (self.bn, self.conv)
        between = first(x)
        made: Tensor = second(between)
        return made + between if self.also else made


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Convolutions(), None),
        (Convolutions(groups=1), None),
        (Convolutions("before", padding=0), None),
        (Convolutions("before", padding=1), "pads"),
        (Convolutions(also=True), "read by more than the norm"),
    ],
)
def test_a_batch_norm_goes_into_its_convolution(model: nn.Module, reason: str | None) -> None:
    trial = fused(model, 4, 6, 6)
    found = told(trial, "batch_norm")
    assert found["matched"] == (reason is None) == (count(trial.after, nn.BatchNorm2d) == 0)
    assert trial.context.report["operations_after"] == trial.context.report["operations_before"] - (reason is None)
    assert reason is None or reason in found["left"]["bn"]


def test_a_batch_norm_after_a_linear_layer_and_the_activation_inside_its_module() -> None:
    class Active(nn.BatchNorm2d):
        def __init__(self, channels: int) -> None:
            super().__init__(channels)
            self.act = nn.GELU()

        def forward(self, x: Tensor) -> Tensor:
            active: Tensor = self.act(super().forward(x))
            return active

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.active = nn.Conv2d(3, 8, 1), Active(8)
            self.up, self.bn = nn.Linear(8, 12, bias=False), nn.BatchNorm1d(12)

        def forward(self, x: Tensor) -> Tensor:
            up = self.up(self.active(self.stem(x)).flatten(2).transpose(1, 2))
            normed: Tensor = self.bn(up.flatten(0, 1)).reshape_as(up)
            return normed.relu()

    trial = fused(Model(), 3, 4, 4)
    assert told(trial, "batch_norm")["sites"] == ["active", "bn"]
    assert not any("running_mean" in name for name in trial.after.state_dict())
    assert isinstance(trial.after.get_submodule("active.act"), nn.GELU)


class Normed(nn.Module):
    def __init__(self, norm: nn.Module, also: str = "") -> None:
        super().__init__()
        self.first, self.norm, self.also = nn.Linear(8, 8), norm, also
        self.a, self.b = nn.Linear(8, 12, bias=False), nn.Linear(8, 12)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.first(x))
        if self.also == "pad":
            y = F.pad(y, (0, 0, 0, 1))
        read: Tensor = self.a(y[:, 0]) + self.b(y.mean(1)) if self.also != "pad" else self.a(y).sum(1)
        return read + y.sum((1, 2), keepdim=False)[:, None] if self.also == "sum" else read


@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize(("also", "reason"), [("", None), ("sum", "sum reads it too"), ("pad", "pad reads it too")])
def test_a_norm_gives_its_weights_to_all_that_read_it_or_to_none(kind: str, also: str, reason: str | None) -> None:
    norm: nn.Module = nn.LayerNorm(8) if kind == "layer" else nn.RMSNorm(8, eps=1e-5)
    model = Normed(norm, also)
    if reason is None:
        trial = fused(model, 5, 8, rules=[f"{kind}_norm"])
        assert told(trial, f"{kind}_norm")["sites"] == ["norm"]
        assert isinstance(trial.after.get_submodule("norm"), PlainNorm)
        assert (trial.after.get_submodule("a").bias is not None) == (kind == "layer"), "the shift becomes a bias"
    else:
        with pytest.raises(UserError) as caught:
            fused(model, 5, 8, rules=[f"{kind}_norm"])
        assert reason in str(caught.value).replace("constant_pad_nd", "pad")


def test_a_module_that_only_looks_like_a_norm_is_left() -> None:
    class Doubled(nn.LayerNorm):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) ** 2

    with pytest.raises(UserError, match="computes more than a norm"):
        fused(Normed(Doubled(8)), 5, 8, rules=["layer_norm"])


def test_a_layer_scale_goes_into_the_layer_before_it_and_one_in_the_code_is_left() -> None:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gamma = nn.Parameter(torch.ones(8))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.gamma

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.ls, self.b = nn.Linear(8, 8), Scale(), nn.Linear(8, 8, bias=False)
            self.own = nn.Parameter(torch.ones(8))

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.ls(self.a(x))
            joined: Tensor = x + self.own * self.b(x)
            return joined

    trial = fused(Model(), 5, 8)
    assert told(trial, "layer_scale")["sites"] == ["ls"]
    assert "multiplies by it itself" in told(trial, "layer_scale")["left"]["own"]
    assert trial.context.report["operations_after"] == trial.context.report["operations_before"] - 1


@pytest.mark.parametrize(("middle", "matched"), [(16, 1), (8, 1), (3, 0)])
def test_linear_layers_in_a_row_become_one_where_that_is_no_dearer(middle: int, matched: int) -> None:
    model = nn.Sequential(nn.Linear(8, middle), nn.Dropout(), nn.Linear(middle, 8, bias=False), nn.GELU())
    found = told(fused(model, 5, 8), "linear_chain")
    assert found["matched"] == matched
    assert matched or "costs more than two" in found["left"]["2"]


def test_kernels_of_one_pixel_in_a_row_become_one_and_a_nonlinearity_parts_them() -> None:
    points = nn.Sequential(nn.Conv2d(4, 8, 1), nn.Conv2d(8, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1))
    trial = fused(points, 4, 3, 3)
    assert told(trial, "linear_chain")["sites"] == ["1"]
    assert count(trial.after, nn.Conv2d) == 2


class Branched(nn.Module):
    """Kernels of 3 and 1 with norms, the value with a norm, and a scaled difference, as the papers have them."""

    def __init__(self, groups: int, stride: int = 1, follows: str = "act", leaks: bool = False) -> None:
        super().__init__()
        self.three = nn.Sequential(nn.Conv2d(4, 4, 3, stride, 1, groups=groups, bias=False), nn.BatchNorm2d(4))
        self.one = nn.Sequential(nn.Conv2d(4, 4, 1, stride, groups=groups), nn.BatchNorm2d(4))
        self.skip = nn.BatchNorm2d(4) if stride == 1 else None
        self.act, self.gamma = nn.GELU(), nn.Parameter(torch.ones(4, 1, 1))
        self.follows, self.leaks = follows, leaks

    def forward(self, x: Tensor) -> Tensor:
        one = self.one(x)
        total = 0 + self.three(x) + one
        if self.skip is not None:
            total = total + self.skip(x)
            total = x + self.gamma * (total - x)
        if self.leaks:
            total = total * one.sigmoid()
        active: Tensor = self.act(total) if self.follows == "act" else total.relu() if self.follows == "code" else total
        return active


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize(("stride", "follows"), [(1, "act"), (2, "act"), (1, "")])
def test_branches_become_one_convolution(groups: int, stride: int, follows: str) -> None:
    trial = fused(nn.Sequential(nn.Conv2d(3, 4, 1), Branched(groups, stride, follows)), 3, 7, 7)
    assert told(trial, "branches")["sites"] == ["1"]
    merged = trial.after.get_submodule("1.merged")
    assert isinstance(merged, nn.Conv2d)
    assert (tuple(merged.weight.shape), merged.groups) == ((4, 4 // groups, 3, 3), groups)
    assert count(trial.after, nn.Conv2d) == 2
    assert count(trial.after, nn.BatchNorm2d) == 0


@pytest.mark.parametrize(
    ("branched", "reason"),
    [(Branched(1, follows="code"), "code of its own"), (Branched(1, leaks=True), "read by more than the sum")],
)
def test_branches_that_something_else_reads_or_that_code_goes_on_from_are_left(branched: nn.Module, reason: str) -> None:
    found = told(fused(nn.Sequential(branched), 4, 7, 7), "branches")
    assert found["matched"] == 0
    assert reason in " ".join(found["left"].values())


def test_dropout_goes_and_duplicates_become_one() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    drawn(model)
    model[3].load_state_dict(model[0].state_dict())
    signature = Signature((TensorSpec("input", torch.float32, ("batch", 8)),), "tensor")
    trial = tried(Fuse(rules=["dropout", "duplicates"]), model, signature, [{"input": torch.randn(4, 8)}])
    assert told(trial, "dropout")["sites"] == ["1"], "ReLU gives other numbers back"
    assert told(trial, "duplicates")["sites"] == ["3"]
    assert trial.after.get_submodule("3") is trial.after.get_submodule("0")
    assert torch.equal(trial.outputs(trial.after), trial.outputs(model))


def test_a_rule_that_moves_the_output_is_taken_back_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from compress.rewrites import batch_norm

    true = batch_norm.folded_out

    def wrong(module: nn.Module, factor: Tensor, shift: Tensor | None) -> dict[str, Tensor]:
        return {name: tensor * (1 + 1e-7) for name, tensor in true(module, factor, shift).items()}

    monkeypatch.setattr(batch_norm, "folded_out", wrong)
    model = drawn(Convolutions())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    signature = Signature((TensorSpec("x", torch.float32, ("batch", 4, 6, 6)),), "tensor")
    rows: Batch = {"x": torch.randn(2, 4, 6, 6)}
    context = Context(signature, find(model, signature, rows), lambda: iter([rows]), Surgery())
    with pytest.raises(UserError, match=r"batch_norm moved the output by [0-9.]+e-0[678]"):
        Fuse().run(model, context)
    assert context.edits == []
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype for name in before)


@pytest.mark.parametrize(
    ("rules", "says"), [(["qkv"], "qkv matches nothing.*one layer already"), (["batchnorm"], "Nearest: batch_norm")]
)
def test_a_rule_that_matches_nothing_is_refused_before_anything_runs(rules: list[str], says: str) -> None:
    model, signature, rows = digits()
    anatomy = find(model, signature, {name: tensor[:2] for name, tensor in rows[0].items()})
    with pytest.raises(UserError, match=r"(?s)" + says):
        Fuse(rules=rules).targets(model, anatomy)


def test_by_default_a_model_with_nothing_to_fuse_stays_and_says_so() -> None:
    trial = tried(Fuse(), *digits())
    assert trial.context.edits == []
    assert trial.context.report["warnings"] == ["no rule matched: the model is as it was"]
    assert torch.equal(trial.outputs(trial.before), trial.outputs(trial.after))


def test_quantized_layers_are_left_and_named_and_the_rest_is_rewritten_around_them() -> None:
    model, signature, rows = digits()
    quantized = tried(Quantize(weights=8, activations="static", sites=["blocks.0.*", "blocks.1.mlp.*"]), model, signature, rows)
    trial = tried(Fuse(rules=["layer_norm"]), quantized.after, signature, rows)
    found = told(trial, "layer_norm")
    assert "blocks.0.norm1" in found["left"]
    assert "compressed already" in found["left"]["blocks.0.norm1"]
    assert found["sites"] == ["blocks.1.norm1", *(f"blocks.{i}.norm{n}" for i in (2, 3) for n in (1, 2)), "norm"]
    assert trial.sqnr_db > 30


def test_a_fused_model_can_be_quantized_as_any_other() -> None:
    model, signature, rows = digits()
    fused_first = tried(EXAMPLE, model, signature, rows)
    trial = tried(Quantize(weights=8, activations="static"), fused_first.after, signature, rows)
    assert len(trial.context.report["sites"]) == 16
    assert trial.sqnr_db > 25


def test_every_rule_says_its_algebra() -> None:
    assert all(len(type(rule).__doc__ or "") > 100 for rule in RULES)
    assert len({rule.name for rule in RULES}) == len(RULES)
