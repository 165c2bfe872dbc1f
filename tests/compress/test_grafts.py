"""Grafts stand in for layers, and influences tell which block is missed least."""

from __future__ import annotations

import copy

import pytest
import torch
from families import build
from torch import Tensor, nn

from compress.algorithms.similarity import cosines
from compress.anatomy import Block, find
from compress.depth.grafts import Graft, grafting, influences, neighbours, pairs, passing
from compress.depth.sublayers import shorten
from compress.surgery import Surgery
from compress.width.restart import first_tensor


class Conv1D(nn.Module):
    """As GPT-2's: a weight [I, O]."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs) / inputs**0.5)
        self.bias = nn.Parameter(torch.randn(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), self.weight).reshape(*x.shape[:-1], -1)


LAYERS = {
    "linear": lambda: nn.Linear(6, 10),
    "without bias": lambda: nn.Linear(6, 10, bias=False),
    "conv1d": lambda: Conv1D(6, 10),
}


def made(kind: str, rank: int = 3) -> tuple[nn.Module, nn.Module, Graft]:
    torch.manual_seed(0)
    own, other = LAYERS[kind](), LAYERS[kind]()
    return own, other, Graft(own, other, rank, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", LAYERS)
def test_at_first_a_graft_gives_the_very_same_numbers(kind: str) -> None:
    own, _, graft = made(kind)
    x = torch.randn(2, 5, 6)
    assert torch.equal(graft(x), own(x))
    assert graft.weight.shape == own.get_parameter("weight").shape
    assert not {id(parameter) for parameter in graft.parameters()} & {id(parameter) for parameter in own.parameters()}


@pytest.mark.parametrize("kind", LAYERS)
def test_folded_gives_what_unfolded_gave(kind: str) -> None:
    own, other, graft = made(kind)
    with torch.no_grad():
        for parameter in graft.parameters():
            parameter += 0.3 * torch.randn(parameter.shape)
    x = torch.randn(2, 5, 6)
    before, unfolded = own(x), graft(x)
    shares = copy.copy(own)
    shares._parameters = dict(own._parameters)
    layer = graft.fold()
    assert layer is own
    assert torch.equal(layer(x), unfolded)
    assert not torch.equal(layer(x), before)
    assert torch.equal(shares(x), before), "who shares the old parameters keeps them"
    assert all(parameter.requires_grad for parameter in own.parameters())
    assert [name for name, _ in own.named_parameters()] == [name for name, _ in other.named_parameters()]


@pytest.mark.parametrize("kind", LAYERS)
def test_everything_that_is_learnt_gets_a_gradient_and_nothing_else_does(kind: str) -> None:
    own, other, graft = made(kind)
    graft(torch.randn(4, 6)).square().sum().backward()
    zeros = {"base_out", "coefficient_out"} | (set() if kind == "without bias" else {"coefficient_bias"})
    assert {name for name, parameter in graft.named_parameters() if parameter.grad.any()} == zeros  # type: ignore[union-attr]
    assert all(parameter.grad is None for layer in (own, other) for parameter in layer.parameters())


def test_the_rank_is_at_most_the_smaller_side() -> None:
    assert made("linear", rank=128)[2].get_parameter("base_in").shape == (6, 6)


def blocks(*counts: int) -> list[Block]:
    return [
        Block(number, f"{stage}.{number}", str(stage), number, None, None, None, ())
        for stage, count in enumerate(counts)
        for number in range(count)
    ]


@pytest.mark.parametrize(
    ("at", "size", "expected"),
    [
        (0, 3, [0, 1, 2]),
        (1, 3, [0, 1, 2]),
        (4, 3, [3, 4, 5]),
        (5, 3, [3, 4, 5]),
        (2, 4, [0, 1, 2, 3]),
        (3, 99, [0, 1, 2, 3, 4, 5]),
    ],
)
def test_a_group_lies_around_its_block_and_within_the_list(at: int, size: int, expected: list[int]) -> None:
    every = blocks(6, 2)
    assert [block.position for block in neighbours(every[at], every, size)] == expected
    assert neighbours(every[6], every, size) == every[6:]


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "gemma2", "vit", "timm_vit", "swin"])
def test_without_a_block_is_what_the_shorter_model_gives(name: str) -> None:
    model, signature, example = build(name)
    found = find(model, signature, example).blocks
    if name in ("swin",):
        found = [block for block in found if block.container == found[0].container]  # type: ignore[assignment]
    block = found[0]
    with torch.no_grad():
        with passing(model.get_submodule(block.path)):
            passed = signature.call(model, example)
        whole = signature.call(model, example)
        shorten(model, Surgery(), str(block.container), [block.position])
        assert torch.equal(signature.call(model, example), passed)
    assert not torch.equal(passed, whole)
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("name", ["bert", "llama", "timm_vit"])
def test_influences_are_cosines_of_what_the_last_block_gives_at_tokens_that_count(name: str) -> None:
    model, signature, example = build(name)
    paths = [block.path for block in find(model, signature, example).blocks]
    halves = [{key: value[part] for key, value in example.items()} for part in (slice(0, 2), slice(2, 4))]
    found = influences(model, signature.call, halves, paths)
    mask = example.get("attention_mask")
    for path in paths:
        seen = []
        handle = model.get_submodule(paths[-1]).register_forward_hook(lambda m, a, o, s=seen: s.append(first_tensor(o).clone()))
        with torch.no_grad():
            signature.call(model, example)
            with passing(model.get_submodule(path)):
                signature.call(model, example)
        handle.remove()
        with_it, without = (x if mask is None else x[mask.bool()] for x in seen)
        expected = cosines(with_it.reshape(-1, with_it.shape[-1]), without.reshape(-1, without.shape[-1])).mean()
        assert found[path] == pytest.approx(float(expected), abs=1e-6)
        assert found[path] < 0.99


def test_nothing_hangs_on_a_block_that_adds_nothing() -> None:
    model, signature, example = build("llama")
    with torch.no_grad():
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            model.get_submodule(f"model.layers.0.{name}").get_parameter("weight").zero_()
    found = influences(model, signature.call, [example], ["model.layers.0", "model.layers.1"])
    assert found["model.layers.0"] == 1.0
    assert found["model.layers.1"] < 0.9


def test_layers_without_a_namesake_of_their_shape_are_left_and_named() -> None:
    model, signature, example = build("llama")
    first, second = find(model, signature, example).blocks
    path = f"{first.path}.mlp.up_proj"
    narrow = copy.deepcopy(model)
    narrow.get_submodule(f"{second.path}.mlp").up_proj = nn.Linear(model.get_submodule(path).in_features, 3, bias=False)  # type: ignore[arg-type]
    found = {pair.own: pair.obstacle for pair in pairs(narrow, second, second.path, {first.path: first})}
    assert "its weight is [" in found.pop(path)
    assert set(found.values()) == {""}
    assert len(found) == 6
    tied = copy.deepcopy(model)
    tied.get_submodule(f"{second.path}.mlp").gate_proj.weight = tied.get_submodule(f"{first.path}.mlp").gate_proj.weight  # type: ignore[assignment]
    found = {pair.own: pair.obstacle for pair in pairs(tied, second, second.path, {first.path: first})}
    assert found[f"{first.path}.mlp.gate_proj"] == "its weight is tied"


def test_grafts_are_gone_after() -> None:
    model = build("llama")[0]
    path = "model.layers.0.mlp.up_proj"
    own = model.get_submodule(path)

    def interrupted() -> None:
        with grafting(model, {path: Graft(own, own, 2, torch.Generator())}):
            assert isinstance(model.get_submodule(path), Graft)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert model.get_submodule(path) is own
