"""Local distillation: what was planted is recovered, nothing gets worse, padding does not count, the same seed gives the same."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import pytest
import torch
from families import build
from torch import Tensor, nn

import compress.distillation.listening as listening
from calibrate.signature import Batch
from compress.distillation.training import OUTPUT, Course, Lesson, Taught, distil

Rows = tuple[list[Batch], list[Batch]]


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 3 * width), nn.Linear(3 * width, width)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return x + self.down(torch.relu(self.up(self.drop(x)))), None


class Stack(nn.Module):
    """Four blocks and a tied head, which see the tokens one by one."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.head.weight = self.embed.weight
        self.blocks = nn.ModuleList(Residual(width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)[0]
        after: Tensor = self.head(x)
        return after


def call(model: nn.Module, batch: Batch) -> Tensor:
    found: Tensor = model(batch["x"])
    return found


def rows(count: int = 4, seed: int = 0) -> list[Batch]:
    generator = torch.Generator().manual_seed(seed)
    return [{"x": torch.randn(8, 5, 8, generator=generator)} for _ in range(count)]


@pytest.fixture
def split() -> Rows:
    return rows(12), rows(2, seed=1)


@pytest.fixture
def stack() -> Stack:
    torch.manual_seed(0)
    return Stack().eval()


def hurt(model: Stack, amount: float = 0.5) -> Stack:
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name in ("up", "down"):
            weight = other.blocks[2].get_submodule(name).get_parameter("weight")
            weight += amount * weight.std() * torch.randn(weight.shape, generator=generator)
    return other


RATES = {"blocks.2.up.weight": 3e-3, "blocks.2.down.weight": 3e-3}
BLOCKS = [f"blocks.{number}" for number in range(4)]


def taught(original: nn.Module, model: nn.Module, split: Rows, paths: Sequence[str] = ("blocks.2",), **course: int) -> Taught:
    lesson = Lesson(original, call, split, paths)
    return distil(model, call, lesson, RATES, BLOCKS, Course(**{"epochs": 25, **course}))  # type: ignore[arg-type]


def bytes_of(model: nn.Module) -> list[bytes]:
    return [tensor.detach().numpy().tobytes() for tensor in model.state_dict().values()]


def test_a_planted_fault_is_recovered(stack: Stack, split: Rows) -> None:
    model = hurt(stack)
    done = taught(stack, model, split)
    assert done.sqnr_db_before is not None
    assert done.sqnr_db_after is not None
    assert done.sqnr_db_after > done.sqnr_db_before + 15
    assert done.loss_after == pytest.approx(10 ** (-done.sqnr_db_after / 10), rel=1e-6), (
        "one place: the loss is noise over signal"
    )
    unseen = {"x": torch.randn(64, 5, 8, generator=torch.Generator().manual_seed(9))}
    with torch.no_grad():
        errors = [(call(stack, unseen) - call(other, unseen)).square().sum() for other in (hurt(stack), model)]
    assert errors[1] < errors[0] / 10, "and it holds for rows that nobody saw, at the end of the model too"


def test_no_step_changes_nothing(stack: Stack, split: Rows) -> None:
    model = hurt(stack)
    before, parameters = bytes_of(model), dict(model.named_parameters())
    for course in ({"steps": 0}, {"epochs": 0}):
        done = taught(stack, model, split, **course)
        assert (done.steps, done.best_step) == (0, 0)
        assert done.loss_after == done.loss_before
    assert bytes_of(model) == before
    assert all(model.get_parameter(name) is parameter for name, parameter in parameters.items())


def test_it_never_ends_worse_than_it_began(stack: Stack, split: Rows) -> None:
    model = hurt(stack, 0.01)
    before = bytes_of(model)
    lesson = Lesson(stack, call, split, ["blocks.2"])
    done = distil(model, call, lesson, dict.fromkeys(RATES, 10.0), BLOCKS, Course(epochs=3))
    assert done.best_step == 0
    assert done.loss_after == done.loss_before
    assert bytes_of(model) == before
    assert done.steps < 36, "it stops early"


def test_the_rows_judged_on_are_what_the_best_step_is_chosen_by(stack: Stack, split: Rows) -> None:
    model = hurt(stack)
    done = taught(stack, model, split, epochs=10)
    again = Lesson(stack, call, split, ["blocks.2"])
    now = distil(model, call, again, RATES, BLOCKS, Course(steps=0))
    assert now.loss_before == done.loss_after < done.loss_before


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(stack: Stack, split: Rows) -> None:
    found = []
    for seed in (1, 1, 2):
        model = hurt(stack)
        done = taught(stack, model, split, epochs=3, seed=seed)
        found.append((done, bytes_of(model)))
    assert found[0] == found[1]
    assert found[0][1] != found[2][1]


def test_nothing_else_is_touched(stack: Stack, split: Rows) -> None:
    model = hurt(stack)
    model.train()
    model.blocks[1].eval()
    model.blocks[0].requires_grad_(False)
    modes = [module.training for module in model.modules()]
    wants = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    before = copy.deepcopy(model.state_dict())
    torch.manual_seed(7)
    state = torch.get_rng_state()
    taught(stack, model, split, epochs=2)
    assert torch.equal(torch.get_rng_state(), state), "dropout is off, and chance is its own"
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == set(RATES)
    assert [module.training for module in model.modules()] == modes
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == wants
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module) for module in model.modules())


def test_an_interrupted_training_leaves_the_model_as_it_was(stack: Stack, split: Rows) -> None:
    model = hurt(stack)
    before = bytes_of(model)

    def stop(done: int, total: int, what: str) -> None:
        assert (total, what) == (120, "distillation")
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        distil(model, call, Lesson(stack, call, split, ["blocks.2"]), RATES, BLOCKS, Course(epochs=10), stop)
    assert bytes_of(model) == before
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_model_that_shares_the_parameters_keeps_its_own_and_tied_ones_stay_tied(stack: Stack, split: Rows) -> None:
    model = copy.deepcopy(stack, {id(parameter): parameter for parameter in stack.parameters()})
    assert model.head.weight is stack.head.weight
    before = bytes_of(stack)
    lesson = Lesson(hurt(stack), call, split, (), "features")
    done = distil(model, call, lesson, {"head.weight": 1e-3, "embed.weight": 1e-3}, BLOCKS, Course(epochs=4))
    assert done.best_step > 0
    assert not done.remembered, "the table comes before every block"
    assert bytes_of(stack) == before
    assert model.head.weight is model.embed.weight
    assert model.head.weight is not stack.head.weight


def test_what_runs_before_is_remembered_and_gives_the_same(stack: Stack, split: Rows, monkeypatch: pytest.MonkeyPatch) -> None:
    models, ran = [hurt(stack), hurt(stack)], [0, 0]
    for number, model in enumerate(models):
        model.blocks[0].up.register_forward_hook(lambda m, a, o, n=number: ran.__setitem__(n, ran[n] + 1))
    first = taught(stack, models[0], split, epochs=5)
    monkeypatch.setattr(listening, "done_before", lambda *_: [])
    second = taught(stack, models[1], split, epochs=5)
    assert (first.remembered, second.remembered) == (True, False)
    assert first.loss_after == pytest.approx(second.loss_after, rel=1e-5)
    assert ran[0] < 20 < 60 < ran[1]


class Telling(Stack):
    """What the first block gave reaches the last one beside the others."""

    def forward(self, x: Tensor) -> Tensor:
        first = x = self.blocks[0](self.embed(x))[0]
        for block in self.blocks[1:]:  # type: ignore[union-attr]
            x = block(x)[0]
        after: Tensor = self.head(x + first)
        return after


def test_a_model_that_hands_something_on_beside_the_blocks_is_run_whole(split: Rows) -> None:
    torch.manual_seed(0)
    model = Telling()
    lesson = Lesson(model, call, split, (), "features")
    assert not distil(hurt(model), call, lesson, RATES, BLOCKS, Course(steps=1)).remembered
    assert distil(hurt(model), call, Lesson(model, call, split, ["blocks.3"]), RATES, BLOCKS, Course(steps=1)).remembered


@pytest.mark.parametrize("output", ["features", "logits"])
def test_padded_positions_do_not_count(stack: Stack, split: Rows, output: str) -> None:
    found = []
    for junk in (0.0, 50.0):
        padded = tuple([{"x": pad(batch["x"], junk), "attention_mask": mask()} for batch in part] for part in split)
        model = hurt(stack)
        lesson = Lesson(stack, call, padded, ["blocks.2"], output)  # type: ignore[arg-type]
        found.append((distil(model, call, lesson, RATES, BLOCKS, Course(epochs=3)), bytes_of(model)))
    assert found[0] == found[1]


def pad(x: Tensor, value: float) -> Tensor:
    return torch.where(mask().bool()[:, :, None], x, value * torch.ones_like(x))


def mask() -> Tensor:
    return (torch.arange(5) < torch.arange(1, 9).clamp(max=5)[:, None]).long()


def test_logits_are_compared_by_divergence_over_their_last_axis(stack: Stack, split: Rows) -> None:
    """A constant that is added to all logits of a token, and is no difference of answers, costs nothing; one row alone learns."""
    lesson = Lesson(stack, call, split, (), "logits")
    with torch.no_grad():
        given = call(stack, lesson.fit[0])
    loss, error, positions = lesson.losses({OUTPUT: given + 3.0}, lesson.wanted[0][0], lesson.fit[0])[OUTPUT]
    assert positions == 40
    assert float(loss) == pytest.approx(0.0, abs=1e-4)
    assert float(error) > 1
    one = ([{"x": split[0][0]["x"][:1]}], [{"x": split[0][0]["x"][:1]}])
    assert distil(hurt(stack), call, Lesson(stack, call, one, (), "logits"), RATES, BLOCKS, Course(epochs=5)).best_step > 0


def test_little_memory_means_half_precision_then_fewer_rows(stack: Stack, split: Rows, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = (12 + 2) * 8 * 5 * 8 * 4
    full, half = (Lesson(stack, call, split, ["blocks.2"], most_bytes=size) for size in (whole, whole - 1))
    assert half.wanted[0][0]["blocks.2"].values.dtype == torch.float16
    error = half.wanted[0][0]["blocks.2"].tensor - full.wanted[0][0]["blocks.2"].tensor
    assert 0 < error.abs().max() < 2**-11 * full.wanted[0][0]["blocks.2"].tensor.abs().max()
    less = Lesson(stack, call, split, ["blocks.2"], most_bytes=whole // 4)
    assert (len(less.fit), len(less.held)) == (6, 2), "rows to judge on take a fourth, the last batches are there in part"
    done = distil(hurt(stack), call, less, RATES, BLOCKS, Course(epochs=10))
    assert (done.rows, done.held_rows) == (42, 14)
    assert "learns from 42 of 96 rows and is judged on 14 of 16" in less.left_out
    assert not full.left_out
    assert not half.left_out
    assert done.loss_after < done.loss_before
    monkeypatch.setattr(listening, "MOST_BYTES", 100)
    assert not distil(hurt(stack), call, less, RATES, BLOCKS, Course(steps=1)).remembered, "no room: computed again"


def test_rows_to_judge_on_leave_room_to_learn_from_wide_outputs(stack: Stack) -> None:
    """There is room for one batch of eight, and each of the two held-out ones would take all of it, as logits of a language
    model do."""
    halves = rows(2), rows(2, seed=1)
    lesson = Lesson(stack, call, halves, (), "features", most_bytes=8 * 5 * 8 * 2)
    done = distil(hurt(stack), call, lesson, RATES, BLOCKS, Course(epochs=3))
    assert (done.rows, done.held_rows) == (6, 2)
    assert done.steps == done.planned == 3
    assert done.loss_after < done.loss_before
    nothing = Lesson(stack, call, halves, (), "features", most_bytes=79)
    assert "learns from 0 of 16 rows and is judged on 0 of 16, so that nothing can be learnt" in nothing.left_out


def test_parameters_made_in_inference_mode_can_be_trained(stack: Stack, split: Rows) -> None:
    with torch.inference_mode():
        model = hurt(stack)
    assert model.blocks[2].up.weight.is_inference()
    assert taught(stack, model, split, epochs=5).best_step > 0


def test_what_does_not_run_is_an_error(stack: Stack, split: Rows) -> None:
    stack.unused = nn.Linear(1, 1)
    with pytest.raises(ValueError, match="unused does not run"):
        Lesson(stack, call, split, ["unused"])


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "swin", "timm_vit"])
def test_families_learn_a_block_from_their_own_blocks_on(name: str) -> None:
    from compress.anatomy import find

    pytest.importorskip("transformers", reason="transformers is not installed")
    model, signature, example = build(name)
    blocks = [block.path for block in find(model, signature, example).blocks]
    last = blocks[-1]
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    rates = {}
    with torch.no_grad():
        for path, parameter in other.get_submodule(last).named_parameters():
            if parameter.dim() == 2:
                parameter += 0.3 * parameter.std() * torch.randn(parameter.shape, generator=generator)
                rates[f"{last}.{path}"] = 1e-3
    lesson = Lesson(model, signature.call, ([example], [example]), {last: last})
    done = distil(other, signature.call, lesson, rates, blocks, Course(epochs=15))
    assert done.remembered
    assert done.loss_after < 0.7 * done.loss_before
