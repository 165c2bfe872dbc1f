"""Laws of the anatomy, and controls: names and order must not matter, and what only looks like a part must not be one."""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Callable, Mapping

import pytest
import torch
from families import TOKENS, VOCABULARY, _text, build, randomize
from sweeps import swept
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from calibrate.errors import UserError
from calibrate.grid import Grid
from calibrate.signature import Batch, Signature, TensorSpec
from compress.anatomy import Anatomy, find
from compress.inspection import render, to_json
from compress.layers import QuantConv2d, QuantEmbedding, QuantLinear
from compress.surgery import Surgery

PLAIN = {
    "table": "table", "blocks": "blocks", "query": "query", "key": "key", "value": "value", "out": "out", "up": "up",
    "gate": "gate", "down": "down", "norm1": "norm1", "norm2": "norm2", "head": "head", "attention": "attention",
}  # fmt: skip
OBSCURE = {name: f"z{index}" for index, name in enumerate(PLAIN)}
LYING = PLAIN | {"query": "value", "key": "down", "value": "out", "out": "query", "down": "gate", "gate": "key"}

Activation = Callable[[Tensor], Tensor]


class Plain(nn.Module):
    """A decoder block by block, written out, whose attributes have the given names; ``late`` computes it in another order."""

    def __init__(self, names: Mapping[str, str], late: bool = False, activation: Activation = F.gelu, gated: bool = True) -> None:
        super().__init__()
        self.names, self.late, self.activation, self.gated = dict(names), late, activation, gated
        self.put(self, "table", nn.Embedding(VOCABULARY, 32))
        self.put(self, "blocks", nn.ModuleList(self.block() for _ in range(2)))
        self.put(self, "head", nn.Linear(32, 3))

    def put(self, holder: nn.Module, name: str, module: nn.Module) -> None:
        setattr(holder, self.names[name], module)

    def get(self, holder: nn.Module, name: str) -> nn.Module:
        return getattr(holder, self.names[name])

    def block(self) -> nn.Module:
        block, attention = nn.Module(), nn.Module()
        for name, width in (("query", 32), ("key", 16), ("value", 16), ("out", 32)):
            self.put(attention, name, nn.Linear(32, width))
        self.put(block, "attention", attention)
        for name, module in (("up", nn.Linear(32, 48)), ("gate", nn.Linear(32, 48)), ("down", nn.Linear(48, 32))):
            if name != "gate" or self.gated:
                self.put(block, name, module)
        self.put(block, "norm1", nn.LayerNorm(32))
        self.put(block, "norm2", nn.LayerNorm(32))
        return block

    def attend(self, attention: nn.Module, x: Tensor) -> Tensor:
        made: dict[str, Tensor] = {}
        for name, heads in (("value", 2), ("query", 4), ("key", 2)) if self.late else (("query", 4), ("key", 2), ("value", 2)):
            made[name] = self.get(attention, name)(x).unflatten(-1, (heads, 8)).transpose(1, 2)
        key, value = (made[name].repeat_interleave(2, dim=1) for name in ("key", "value"))
        mixed = ((made["query"] @ key.transpose(-1, -2)) / 8**0.5).softmax(-1) @ value
        return self.get(attention, "out")(mixed.transpose(1, 2).flatten(2))

    def feed(self, block: nn.Module, x: Tensor) -> Tensor:
        if not self.gated:
            return self.get(block, "down")(self.activation(self.get(block, "up")(x)))
        if self.late:
            up = self.get(block, "up")(x)
            return self.get(block, "down")(up * self.activation(self.get(block, "gate")(x)))
        return self.get(block, "down")(self.activation(self.get(block, "gate")(x)) * self.get(block, "up")(x))

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.get(self, "table")(input_ids)
        for block in self.get(self, "blocks"):
            x = x + self.attend(self.get(block, "attention"), self.get(block, "norm1")(x))
            x = x + self.feed(block, self.get(block, "norm2")(x))
        return self.get(self, "head")(x.mean(1))


def text() -> tuple[Signature, Batch]:
    return _text("tensor", mask=False)


def anatomy_of(model: nn.Module, roles: Mapping[str, list[str]] | None = None) -> Anatomy:
    return find(model.eval(), *text(), roles)


def renamed(anatomy: Anatomy, names: Mapping[str, str]) -> dict[str, list[str]]:
    """Paths by role, with the attribute names put back to plain ones."""
    back = {given: plain for plain, given in names.items()}
    return {
        role: [".".join(back.get(part, part) for part in path.split(".")) for path in paths]
        for role, paths in anatomy.roles.items()
    }


@pytest.mark.parametrize("names", [OBSCURE, LYING], ids=["obscure", "lying"])
@pytest.mark.parametrize("late", [False, True])
def test_names_and_order_do_not_matter(names: Mapping[str, str], late: bool) -> None:
    plain = anatomy_of(Plain(PLAIN))
    other = anatomy_of(Plain(names, late))
    assert {r: sorted(p) for r, p in renamed(other, names).items()} == {r: sorted(p) for r, p in plain.roles.items()}
    assert [(b.heads, b.kv_heads, b.head_dim, b.flops, b.parameters) for b in other.blocks] == [
        (b.heads, b.kv_heads, b.head_dim, b.flops, b.parameters) for b in plain.blocks
    ]
    assert (other.joins, other.totals) == (plain.joins, plain.totals)


def test_plain_roles() -> None:
    """The oracle of the test above: what the plain names must be."""
    anatomy = anatomy_of(Plain(PLAIN))
    for part in ("query", "key", "value", "out"):
        assert anatomy.roles[f"attention.{part}"] == [f"blocks.{i}.attention.{part}" for i in range(2)]
    for part in ("up", "gate", "down"):
        assert anatomy.roles[f"mlp.{part}"] == [f"blocks.{i}.{part}" for i in range(2)]
    assert anatomy.roles["embedding"] == ["table"]
    assert anatomy.roles["head"] == ["head"]
    assert anatomy.roles["norm"] == [f"blocks.{i}.norm{n}" for i in range(2) for n in (1, 2)]
    assert [(b.heads, b.kv_heads, b.head_dim, b.container, b.position) for b in anatomy.blocks] == [
        (4, 2, 8, "blocks", 0), (4, 2, 8, "blocks", 1),
    ]  # fmt: skip
    assert anatomy.joins == 4
    assert not anatomy.unplaced


@pytest.mark.parametrize("name", swept(["bert", "llama", "swin", "mobilevitv2"], ["bert", "llama"]))
def test_class_names_do_not_matter(name: str) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    model, signature, example = build(name)
    before = find(model, signature, example).json()
    for module in model.modules():
        if type(module).__module__.startswith("transformers"):
            module.__class__ = type("Thing", (type(module),), {"__slots__": ()})
    assert find(model, signature, example).json() | {"model": before["model"]} == before


ACTIVATIONS: dict[str, Activation] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_written_out": lambda x: 0.5 * x * (1.0 + torch.tanh(0.7978845608 * (x + 0.044715 * torch.pow(x, 3.0)))),
    "gelu_by_erf": lambda x: x * 0.5 * (1.0 + torch.erf(x / 1.41421)),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "silu": F.silu,
    "relu": F.relu,
    "relu_in_place": lambda x: F.relu(x, inplace=True),
    "relu_squared": lambda x: F.relu(x).square(),
    "hardswish": F.hardswish,
    "mish": F.mish,
    "leaky_relu": F.leaky_relu,
    "tanh": torch.tanh,
}


@pytest.mark.parametrize(
    ("name", "gated"),
    swept(
        itertools.product(ACTIVATIONS, [False, True]),
        [*((name, False) for name in ACTIVATIONS), ("silu", True), ("gelu_written_out", True), ("relu_squared", True)],
    ),
)
def test_every_spelling_of_an_activation(name: str, gated: bool) -> None:
    roles = anatomy_of(Plain(PLAIN, activation=ACTIVATIONS[name], gated=gated)).roles
    assert roles["mlp.up"] == ["blocks.0.up", "blocks.1.up"]
    assert roles["mlp.down"] == ["blocks.0.down", "blocks.1.down"]
    assert roles.get("mlp.gate", []) == (["blocks.0.gate", "blocks.1.gate"] if gated else [])


def test_no_activation_is_no_mlp() -> None:
    """Control: two projections in a row, without a nonlinearity between them."""
    anatomy = anatomy_of(Plain(PLAIN, activation=lambda x: x * 2.0, gated=False))
    assert "mlp.up" not in anatomy.roles
    assert "mlp.down" not in anatomy.roles
    assert {"blocks.0.up", "blocks.1.down"} <= set(anatomy.unplaced)


class Around(nn.Module):
    """One hidden state with ``inner`` around the residual stream."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.table, self.inner, self.head = nn.Embedding(VOCABULARY, 32), inner, nn.Linear(32, 3)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.inner(self.table(input_ids)).mean(1))


class Squeeze(nn.Module):
    """Squeeze-and-excitation: projection, nonlinearity, projection - but it scales the stream, it does not join it."""

    def __init__(self) -> None:
        super().__init__()
        self.reduce, self.expand = nn.Linear(32, 8), nn.Linear(8, 32)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.expand(torch.relu(self.reduce(x.mean(1, keepdim=True)))))


class Router(nn.Module):
    """Experts chosen by a softmax of scores that no product of two states made."""

    def __init__(self) -> None:
        super().__init__()
        self.scores, self.experts = nn.Linear(32, 4), nn.ModuleList(nn.Linear(32, 32) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        weights = self.scores(x).softmax(-1)
        return x + sum(weights[..., i : i + 1] * expert(x) for i, expert in enumerate(self.experts))


@pytest.mark.parametrize("inner", [Squeeze, Router], ids=["squeeze", "router"])
def test_look_alikes(inner: type[nn.Module]) -> None:
    anatomy = anatomy_of(Around(inner()))
    assert not [role for role in anatomy.roles if role.startswith(("attention.", "mlp."))]
    assert not anatomy.blocks


class LinearAttention(nn.Module):
    """No softmax: keys and values are multiplied first."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(32, 32) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (4, 8)).transpose(1, 2) for layer in (self.a, self.b, self.c))
        mixed = F.elu(q) @ (F.elu(k).transpose(-1, -2) @ v)
        return x + self.d(mixed.transpose(1, 2).flatten(2))


class Einsum(nn.Module):
    """Attention in einsum, with heads in the third dimension and a bias parameter on the scores."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj, self.bias = nn.Linear(32, 96), nn.Linear(32, 32), nn.Parameter(torch.zeros(4, TOKENS, TOKENS))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        q, k, v = (part.unflatten(-1, (4, 8)) for part in (q, k, v))
        scores = torch.einsum("bihd,bjhd->bhij", q, k) * 8**-0.5 + self.bias
        return x + self.proj(torch.einsum("bhij,bjhd->bihd", torch.softmax(scores, -1), v).flatten(2))


@pytest.mark.parametrize(
    ("inner", "paths"),
    [(LinearAttention, "a b c d"), (Einsum, "qkv qkv qkv proj")], ids=["linear", "einsum"],
)  # fmt: skip
def test_spellings_of_attention(inner: type[nn.Module], paths: str) -> None:
    anatomy = anatomy_of(Around(inner()))
    roles = [anatomy.roles[f"attention.{part}"] for part in ("query", "key", "value", "out")]
    assert roles == [[f"inner.{path}"] for path in paths.split()]
    assert [(block.heads, block.kv_heads, block.head_dim) for block in anatomy.blocks] == [(4, 4, 8)]
    assert anatomy.joins == 1


def test_flops_and_bytes_of_a_linear_layer() -> None:
    anatomy = anatomy_of(Plain(PLAIN))
    site = anatomy.site("blocks.0.up")
    assert (site.kind, site.shape, site.parameters) == ("linear", (48, 32), 48 * 32 + 48)
    assert site.bytes == 4 * site.parameters
    assert site.flops == 2 * TOKENS * 32 * 48
    assert anatomy.blocks[0].attention_flops == 2 * 2 * 4 * TOKENS * TOKENS * 8


@pytest.mark.parametrize(
    "name",
    swept(
        ["bert_eager", "gpt2_eager", "albert", "vit_eager", "convnextv2", "mobilevit", "segformer"],
        ["gpt2_eager", "albert"],
    ),
)
def test_flops_are_those_that_pytorch_counts(name: str) -> None:
    """Oracle: PyTorch's own counter, which sees the kernels that ran. It does not count tables and elementwise steps."""
    pytest.importorskip("transformers", reason="transformers is not installed")
    model, signature, example = build(name)
    rows = next(iter(example.values())).shape[0]
    math = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
    with torch.no_grad(), math, FlopCounterMode(display=False) as counter:
        signature.call(model, example)
    assert find(model, signature, example).totals["flops"] == counter.get_total_flops() / rows


def test_the_model_is_left_alone() -> None:
    model = Plain(PLAIN).train()
    model.blocks[0].eval()
    modes = [module.training for module in model.modules()]
    before = copy.deepcopy(model.state_dict())
    first, second = find(model, *text()), find(model, *text())
    assert first.json() == second.json()
    assert modes == [module.training for module in model.modules()]
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch.backends.mha.get_fastpath_enabled()


def quantized(linear: nn.Linear, activation: dict[str, object] | None) -> QuantLinear:
    return QuantLinear(tuple(linear.weight.shape), Grid(4), activation, linear.bias is not None)


@pytest.mark.parametrize("activation", [None, {"kind": "dynamic"}, {"kind": "static"}], ids=str)
def test_compressed_layers_are_seen_through(activation: dict[str, object] | None) -> None:
    model = Plain(PLAIN)
    before = anatomy_of(model)
    surgery = Surgery()
    for site in before.select(["attention.*", "mlp.*", "head"]):
        surgery.replace(model, site.path, quantized(model.get_submodule(site.path), activation))
    surgery.replace(model, "table", QuantEmbedding((VOCABULARY, 32), Grid(8)))
    after = anatomy_of(model)
    assert after.roles == before.roles
    assert [(b.path, b.heads, b.kv_heads, b.flops) for b in after.blocks] == [
        (b.path, b.heads, b.kv_heads, b.flops) for b in before.blocks
    ]
    for old, new in zip(before.sites, after.sites, strict=True):
        assert (old.path, old.kind, old.shape, old.parameters) == (new.path, new.kind, new.shape, new.parameters)
    assert not after.unplaced
    up = after.site("blocks.0.up")
    assert 48 * 32 // 2 + 48 * 4 * 2 <= up.bytes <= 48 * 32 // 2 + 48 * 4 * 2 + 8


def test_compressed_convolution() -> None:
    class Patches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.mid, self.head = nn.Conv2d(3, 16, 4, 4), nn.Conv2d(16, 16, 3, padding=1), nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.relu(self.mid(torch.relu(self.conv(x)))).mean((2, 3)))

    signature = Signature((TensorSpec("x", torch.float32, ("batch", 3, 16, 16)),))
    example = {"x": torch.randn(2, 3, 16, 16)}
    model = Patches().eval()
    before = find(model, signature, example)
    assert {role: before.roles[role] for role in ("conv", "head")} == {"conv": ["conv", "mid"], "head": ["head"]}
    Surgery().replace(model, "conv", QuantConv2d((16, 3, 4, 4), Grid(8), None, True, stride=(4, 4)))
    after = find(model, signature, example)
    assert after.roles == before.roles
    assert after.totals["flops"] == before.totals["flops"] == 2 * 16 * 16 * 48 + 2 * 16 * 16 * 144 + 2 * 48


def test_tied_weights_count_once() -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    model, signature, example = build("gpt2")
    anatomy = find(model, signature, example)
    head, table = anatomy.site("lm_head"), anatomy.site("transformer.wte")
    assert (head.tied, head.tied_parameters, table.tied) == (table.path, VOCABULARY * 32, None)
    assert head.parameters == table.parameters == VOCABULARY * 32
    assert anatomy.totals["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert anatomy.site("transformer.h.0.attn.c_attn").kind == "conv1d"


def test_shared_layers_are_one_block_with_all_their_flops() -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    shared, single = (find(*build(name)) for name in ("albert", "bert"))
    assert len(shared.blocks) == 1
    assert shared.blocks[0].flops == sum(block.flops for block in single.blocks)


class Untraceable(Plain):
    def forward(self, input_ids: Tensor) -> Tensor:
        if input_ids.sum().item() > 0:
            input_ids = input_ids + 0
        return super().forward(input_ids)


NAMED = {
    "attention.query": ["blocks.*.query"], "attention.key": ["blocks.*.key"], "attention.value": ["blocks.*.value"],
    "attention.out": ["blocks.*.out"], "mlp.up": ["blocks.*.up"], "mlp.gate": ["blocks.*.gate"], "mlp.down": ["blocks.*.down"],
    "head": ["head"],
}  # fmt: skip


def test_what_cannot_be_traced() -> None:
    with pytest.raises(UserError, match=r"torch.export could not trace it: .*\n  Name its roles in the recipe") as caught:
        anatomy_of(Untraceable(PLAIN))
    assert str(caught.value).count("\n") == 1
    named, traced = anatomy_of(Untraceable(PLAIN), NAMED), anatomy_of(Plain(PLAIN))
    assert {role: sorted(paths) for role, paths in named.roles.items()} == {
        role: sorted(paths) for role, paths in traced.roles.items()
    }
    assert [(b.path, b.container, b.position, b.parameters) for b in named.blocks] == [
        (b.path, b.container, b.position, b.parameters) for b in traced.blocks
    ]
    assert named.totals["parameters"] == traced.totals["parameters"]


def test_named_roles_correct_what_was_found() -> None:
    anatomy = anatomy_of(Plain(PLAIN), {"linear": ["blocks.1.*.query"], "head": ["blocks.1.down"]})
    assert anatomy.roles["attention.query"] == ["blocks.0.attention.query"]
    assert anatomy.roles["head"] == ["blocks.1.down", "head"]
    assert anatomy.roles["mlp.down"] == ["blocks.0.down"]
    assert anatomy.roles["attention.key"] == ["blocks.0.attention.key", "blocks.1.attention.key"]


@pytest.mark.parametrize(
    ("roles", "message"),
    [
        ({"attention.querry": ["*"]}, "role 'attention.querry' matches nothing\n  Nearest: attention.query"),
        ({"mlp.up": ["blocks.0.upp"]}, "mlp.up: pattern 'blocks.0.upp' matches nothing\n  Nearest: blocks.0.up"),
    ],
)
def test_wrong_names_are_refused(roles: dict[str, list[str]], message: str) -> None:
    with pytest.raises(UserError) as caught:
        anatomy_of(Plain(PLAIN), roles)
    assert message in str(caught.value)


def test_select() -> None:
    anatomy = anatomy_of(Plain(PLAIN))
    paths = [site.path for site in anatomy.select(["mlp.down", "blocks.0.*"])]
    assert paths == sorted(paths, key=[site.path for site in anatomy.sites].index)
    assert len(paths) == len(set(paths)) == 7 + 2 + 1
    assert len(anatomy.select(["attention.*"])) == 8
    with pytest.raises(UserError, match=r"passes\[0\].targets: target 'atention.query' matches .*\n  Nearest: attention.query"):
        anatomy.select(["atention.query"], "passes[0].targets")
    with pytest.raises(UserError, match=r"has no 'conv'\n  Roles that were found: attention.query"):
        anatomy.select(["conv"])


def test_json_and_tree_say_the_same() -> None:
    from rich.console import Console

    model = Around(Squeeze())
    model.spare = nn.Linear(4, 4)
    anatomy = anatomy_of(model)
    told = json.loads(to_json(anatomy))
    assert set(told) >= {"model", "blocks", "embeddings", "head", "convolutions", "norms", "joins", "unplaced", "totals"}
    assert told["unplaced"] == ["inner.reduce", "inner.expand", "spare"]
    assert (told["embeddings"], told["head"]) == (["table"], ["head"])
    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(render(anatomy))
    shown = console.export_text()
    assert all(path in shown for path in told["unplaced"])
    block = json.loads(to_json(anatomy_of(Plain(PLAIN))))["blocks"][1]
    assert block["roles"]["mlp.down"] == ["blocks.1.down"]
    assert (block["index"], block["path"], block["container"], block["position"]) == (1, "blocks.1", "blocks", 1)
    assert (block["heads"], block["kv_heads"], block["head_dim"]) == (4, 2, 8)


def test_like_blocks_are_shown_once() -> None:
    from rich.console import Console

    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(render(anatomy_of(Plain(PLAIN))))
    shown = console.export_text()
    assert "blocks 0-1 blocks.0" in shown
    assert "4 heads (2 for keys and values) of 8" in shown
    assert "every layer has a role" in shown


def test_random_models_have_outputs_of_order_one() -> None:
    """The families would hide faults of exporters behind tiny outputs otherwise."""
    model = Plain(PLAIN)
    randomize(model)
    signature, example = text()
    assert 0.1 < float(signature.call(model, example).detach().std()) < 10.0
