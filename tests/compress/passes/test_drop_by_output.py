"""``drop_layers`` by what the model gives without its parts, and the training of what is left."""

from __future__ import annotations

import copy
import functools
import itertools
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from sweeps import swept
from torch import Tensor, nn
from trial import Trial, digits, rebuilt, tried

from calibrate.fidelity import Fidelity
from calibrate.signature import Batch
from compress.depth.choice import find_candidates
from compress.depth.output_scores import OutputNoise, first_rows, least_noise
from compress.distillation.blocks import thinned
from compress.distillation.training import Lesson, distil
from compress.passes.drop_layers import DropLayers

SINK = {"attention": "attn.proj", "mlp": "mlp.fc2"}


def silent(model: nn.Module, block: int, part: str) -> None:
    """The planted sublayer: it adds zero to the stream."""
    with torch.no_grad():
        for name in ("weight", "bias"):
            model.get_parameter(f"blocks.{block}.{SINK[part]}.{name}").zero_()


def noise(model: nn.Module, after: nn.Module, trial: Trial) -> float:
    """Squared error over square, by hand; padded tokens do not count."""
    wanted, given = trial.outputs(model).double(), trial.outputs(after).double()
    if wanted.dim() == 3:
        valid = torch.cat([batch["attention_mask"] for batch in trial.rows]).bool()
        wanted, given = wanted[valid], given[valid]
    return float((wanted - given).square().sum() / wanted.square().sum())


def told(trial: Trial) -> dict[str, float]:
    return {entry["path"]: entry["noise"] for entry in trial.context.report["scores"]}


def gone(trial: Trial) -> list[tuple[int, str]]:
    return [(entry["block"], entry["part"]) for entry in trial.context.report["dropped"]]


def everything(step: dict[str, Any]) -> DropLayers:
    return DropLayers(**{"score": "output", "rows": 10_000, **step})


@pytest.mark.parametrize(
    ("part", "method"),
    swept(
        itertools.product(["attention", "mlp", "both", "block"], ["one_shot", "iterative", "search"]),
        [("attention", "one_shot"), ("mlp", "iterative"), ("both", "search"), ("block", "one_shot")],
    ),
)
def test_a_planted_part_goes_first_and_its_score_is_no_change(part: Any, method: Any) -> None:
    model, signature, rows = digits()
    planted = {"attention": [(2, "attention")], "mlp": [(1, "mlp")], "both": [(3, "mlp")]}
    for one in planted.get(part, [(2, "attention"), (2, "mlp")]):
        silent(model, *one)
    trial = tried(everything({"sublayers": part, "count": 1, "method": method}), model, signature, rows)
    key = {"attention": "blocks.2.attn.proj", "mlp": "blocks.1.mlp.fc2", "both": "blocks.3.mlp.fc2", "block": "blocks.2"}[part]
    assert told(trial)[key] == 0.0
    assert [path for path, value in told(trial).items() if value == 0.0] == [key]
    assert trial.context.report["dropped"][0]["path"] == key
    assert trial.context.report["without_them"]["noise"] == 0.0
    assert torch.equal(trial.outputs(trial.after), trial.outputs(model))


@pytest.mark.parametrize("part", ["attention", "mlp", "block"])
def test_a_score_is_what_the_removal_does(part: str) -> None:
    model, signature, rows = digits()
    trial = tried(everything({"sublayers": part, "count": 2, "repair": False}), model, signature, rows)
    option = "blocks" if part == "block" else part
    for number, score in enumerate(told(trial).values()):
        options: dict[str, Any] = {option: [number]}
        alone = tried(DropLayers(**options), model, signature, rows)
        assert score == pytest.approx(noise(model, alone.after, alone), rel=1e-4)
    assert trial.context.report["without_them"]["noise"] == pytest.approx(noise(model, trial.after, trial), rel=1e-4)
    best = sorted(range(4), key=list(told(trial).values()).__getitem__)[:2]
    assert [number for number, _ in gone(trial)] == best


@pytest.mark.parametrize("part", ["attention", "both"])
def test_a_search_finds_the_best_of_all_sets_and_greedy_follows_itself(part: Any) -> None:
    model, signature, rows = digits()
    anatomy = tried(DropLayers(mlp=[0]), model, signature, rows).anatomy
    candidates = find_candidates(model, anatomy, part)
    measure = OutputNoise(model, signature.call, rows, [block.path for block in anatomy.blocks])
    sets = [list(pair) for pair in itertools.combinations(candidates.these, 2)]
    every = measure.of(sets)
    found = least_noise(measure, candidates, 2, width=len(candidates.these))
    assert found.noise == min(every)
    assert set(found.parts) == set(sets[every.index(min(every))])
    greedy = least_noise(measure, candidates, 2, width=1)
    first = greedy.parts[0]
    assert greedy.after[0] == min(greedy.singly.values()) == greedy.singly[first.key]
    assert greedy.noise == min(value for pair, value in zip(sets, every, strict=True) if first in pair)
    assert found.noise <= greedy.noise


def test_what_is_remembered_changes_no_score() -> None:
    model, signature, rows = digits()
    anatomy = tried(DropLayers(mlp=[0]), model, signature, rows).anatomy
    sets = [[one] for one in find_candidates(model, anatomy, "both").these]
    paths = [block.path for block in anatomy.blocks]
    assert OutputNoise(model, signature.call, rows, paths).of(sets) == OutputNoise(model, signature.call, rows, []).of(sets)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_consecutive_takes_the_run_that_the_output_misses_least() -> None:
    model, signature, rows = digits()
    trial = tried(everything({"sublayers": "block", "count": 2, "method": "consecutive"}), model, signature, rows)
    by_hand = []
    for first in range(3):
        run = tried(DropLayers(blocks=[first, first + 1]), model, signature, rows)
        by_hand.append(noise(model, run.after, run))
    scores = trial.context.report["scores"]
    assert [entry["noise"] for entry in scores] == pytest.approx(by_hand, rel=1e-4)
    best = by_hand.index(min(by_hand))
    assert trial.context.report["blocks"] == [f"blocks.{best}", f"blocks.{best + 1}"]


def test_padding_does_not_count_and_rows_are_as_many_as_named() -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    from families import build

    model, signature, example = build("bert")
    step = everything({"count": 1, "repair": False})
    trial = tried(step, model, signature, [example])
    rubbish = {**example, "input_ids": torch.where(example["attention_mask"] == 0, 7, example["input_ids"])}
    again = tried(step, model, signature, [rubbish])
    assert list(told(again).values()) == pytest.approx(list(told(trial).values()), rel=1e-4)
    assert trial.context.report["without_them"]["rows"] == example["input_ids"].shape[0]
    batches: list[Batch] = [{"x": torch.arange(4)}, {"x": torch.arange(4, 8)}]
    assert [batch["x"].tolist() for batch in first_rows(batches, 6)] == [[0, 1, 2, 3], [4, 5]]
    assert [batch["x"].tolist() for batch in first_rows(batches, 2)] == [[0, 1]]


@pytest.mark.parametrize("name", swept(["gpt2", "swin", "distilbert"], ["swin"]))
def test_families_are_scored_as_they_are_without_the_part(name: str) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    from families import build

    model, signature, example = build(name)
    for part in ("block", "both"):
        trial = tried(everything({"sublayers": part, "count": 1, "repair": False}), model, signature, [example])
        assert trial.context.report["without_them"]["noise"] == pytest.approx(noise(model, trial.after, trial), rel=1e-3)


TAUGHT = {"attention": [1, 2], "repair": True}


def kept(trial: Trial) -> dict[str, Tensor]:
    return trial.after.state_dict()


def held_out(model: nn.Module, trial: Trial, after: nn.Module) -> float:
    """The level over the last fourth of the rows: those that are held out."""
    fidelity, start = Fidelity(classes=False), trial.context.rows
    wanted, given = trial.outputs(model), trial.outputs(after)
    start = len(wanted) - min(64, len(wanted) // 4)
    fidelity.update(wanted[start:], given[start:])
    return fidelity.sqnr_db


def test_no_epochs_change_nothing() -> None:
    model, signature, rows = digits()
    without, zero = (
        tried(DropLayers(**TAUGHT), model, signature, rows),
        tried(DropLayers(**TAUGHT, distill=0), model, signature, rows),
    )
    assert without.context.report == zero.context.report
    assert kept(without).keys() == kept(zero).keys()
    assert all(torch.equal(kept(without)[name], value) for name, value in kept(zero).items())


def test_training_brings_the_output_nearer_and_leaves_the_original_alone() -> None:
    model, signature, rows = digits()
    before = copy.deepcopy(model.state_dict())
    plain, taught = (
        tried(DropLayers(**TAUGHT), model, signature, rows),
        tried(DropLayers(**TAUGHT, distill=12), model, signature, rows),
    )
    report = taught.context.report["repair"]["distillation"]
    assert held_out(model, taught, taught.after) > held_out(model, plain, plain.after)
    assert taught.sqnr_db > plain.sqnr_db + 0.5
    assert report["sqnr_db_before"] == taught.context.report["repair"]["sqnr_db_after"]
    assert report["sqnr_db_after"] == pytest.approx(held_out(model, taught, taught.after), abs=0.01)
    assert report["training"]["parameters"] > 0
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    wants = {name: parameter.requires_grad for name, parameter in plain.after.named_parameters()}
    assert wants == {name: parameter.requires_grad for name, parameter in taught.after.named_parameters()}
    assert torch.equal(taught.outputs(rebuilt(taught)), taught.outputs(taught.after))
    outside = [name for name in kept(plain) if not name.startswith("blocks.")]
    assert outside
    assert all(torch.equal(kept(plain)[name], kept(taught)[name]) for name in outside)


@pytest.mark.parametrize("rate", [0.004, 3.0])
def test_training_never_ends_worse_on_held_out_rows(rate: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compress.distillation.blocks._RATE", rate)
    model, signature, rows = digits()
    plain, taught = (
        tried(DropLayers(**TAUGHT), model, signature, rows),
        tried(DropLayers(**TAUGHT, distill=1), model, signature, rows),
    )
    assert held_out(model, taught, taught.after) >= held_out(model, plain, plain.after)


def test_what_the_output_does_not_like_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    def spoilt(model: nn.Module, call: Any, lesson: Any, rates: dict[str, float], *args: Any, **kwargs: Any) -> Any:
        taught = distil(model, call, lesson, rates, *args, **kwargs)
        for path in rates:
            owner, _, name = path.rpartition(".")
            old = model.get_parameter(path)
            model.get_submodule(owner).register_parameter(name, nn.Parameter(-20 * old.detach()))
        return taught

    monkeypatch.setattr("compress.distillation.blocks.distil", spoilt)
    model, signature, rows = digits()
    plain, taught = (
        tried(DropLayers(**TAUGHT), model, signature, rows),
        tried(DropLayers(**TAUGHT, distill=1), model, signature, rows),
    )
    assert "undone" in taught.context.report["repair"]["distillation"]
    assert all(torch.equal(kept(plain)[name], value) for name, value in kept(taught).items())


@pytest.mark.parametrize("room", [0, 200_000])
def test_rows_that_there_is_no_room_for_are_told(room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compress.distillation.blocks.Lesson", functools.partial(Lesson, most_bytes=room))
    model, signature, rows = digits()
    report = tried(DropLayers(**TAUGHT, distill=1), model, signature, rows).context.report
    told = report["repair"]["distillation"]
    assert bool(told["training"]["rows"]) == bool(room)
    assert ("because" in told) == (not room)
    assert any(f"learns from {told['training']['rows']} of" in line for line in report["warnings"])


def test_only_blocks_that_learn_are_listened_at_so_that_what_runs_before_is_remembered() -> None:
    model, signature, rows = digits()
    last = tried(DropLayers(attention=[-1], repair=True, distill=1), model, signature, rows)
    assert last.context.report["repair"]["distillation"]["training"]["remembered"]


def test_the_same_seed_trains_the_same_bytes() -> None:
    model, signature, rows = digits()
    one, again = (tried(DropLayers(**TAUGHT, distill=2), model, signature, rows) for _ in range(2))
    assert one.context.report == again.context.report
    assert all(torch.equal(kept(one)[name], value) for name, value in kept(again).items())


def test_generation_with_a_cache_equals_generation_without_after_training() -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    from families import build

    from calibrate.fidelity import sqnr_db

    model, signature, example = build("llama")
    trial = tried(DropLayers(sublayers="block", count=1, score="output", distill=2), model, signature, [example])
    assert "distillation" in trial.context.report["repair"]
    ids = example["input_ids"][:1, :6]
    with torch.inference_mode():
        first = trial.after(ids, use_cache=True)
        following = trial.after(ids[:, :1], past_key_values=first.past_key_values, use_cache=True).logits[:, -1]
        whole = trial.after(torch.cat([ids, ids[:, :1]], 1), use_cache=False).logits[:, -1]
    assert sqnr_db(whole, following) > 90


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"count": 1, "method": "search"}, "score: output"),
        ({"count": 1, "repair": False, "distill": 1}, "repair: false"),
        ({"accuracy_driven": True, "distill": 1}, "accuracy_driven: true"),
        ({"count": 1, "distill": -1}, "greater than or equal to 0"),
        ({"blocks": [1], "score": "output"}, "score goes with count or ratio"),
        ({"mlp": [1], "method": "iterative"}, "method goes with count or ratio"),
        ({"attention": [1], "sublayers": "attention"}, "sublayers goes with count or ratio"),
        ({"attention": [1], "rows": 9}, "rows goes with count or ratio"),
        ({"count": 1, "rows": 64}, "rows goes with score: output"),
        ({"count": 1, "score": "random", "rows": 9}, "rows goes with score: output"),
        ({"accuracy_driven": True, "rows": 9}, "rows goes with count or ratio"),
    ],
    ids=str,
)
def test_options_that_contradict_each_other_are_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        DropLayers(**options)


def test_tokens_are_masked_in_the_rows_to_learn_from_never_the_first() -> None:
    mask = torch.tensor([[1] * 40, [0] * 10 + [1] * 30, [1] * 20 + [0] * 20])
    batch = {"input_ids": torch.arange(120).reshape(3, 40), "attention_mask": mask}
    one, again = (thinned([batch], torch.Generator().manual_seed(1))[0]["attention_mask"] for _ in range(2))
    assert torch.equal(one, again)
    assert one.dtype == mask.dtype
    assert bool((one <= mask).all())
    assert 0 < int((mask - one).sum()) < 0.6 * int(mask.sum())
    assert one[0, 0] == one[1, 10] == one[2, 0] == 1
    without: list[Batch] = [{"pixels": torch.zeros(2, 3)}]
    assert thinned(without, torch.Generator()) is without
