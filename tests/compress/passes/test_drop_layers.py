"""What ``drop_layers`` takes out, what stays, and what it refuses."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from sweeps import swept
from torch import nn
from trial import digits, rebuilt, tried

from calibrate.errors import UserError
from calibrate.fidelity import sqnr_db
from compress.layers import Absent
from compress.passes.drop_layers import DropLayers
from compress.passes.quantize import Quantize
from compress.surgery import Surgery

EXAMPLE = DropLayers(blocks=[1], attention=[2], mlp=[-1])
NORM = {"attention": "norm1", "mlp": "norm2"}
ZERO = {"attention": "attn.proj", "mlp": "mlp.fc2"}


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_a_dropped_block_is_gone_and_the_rest_is_untouched() -> None:
    model, signature, rows = digits()
    trial = tried(DropLayers(blocks=[1, -1]), model, signature, rows)
    expected = copy.deepcopy(model)
    blocks = list(expected.get_submodule("blocks").children())
    expected.add_module("blocks", nn.ModuleList([blocks[0], blocks[2]]))
    assert torch.equal(trial.outputs(trial.after), trial.outputs(expected))
    assert count(trial.after) == count(model) - 2 * count(blocks[1])
    assert trial.context.report["blocks"] == ["blocks.1", "blocks.3"]


@pytest.mark.parametrize("part", ["attention", "mlp"])
def test_a_dropped_sublayer_adds_zero(part: str) -> None:
    model, signature, rows = digits()
    options: dict[str, Any] = {part: [0, 2]}
    trial = tried(DropLayers(**options), model, signature, rows)
    expected = copy.deepcopy(model)
    with torch.no_grad():
        for number in (0, 2):
            for name in ("weight", "bias"):
                expected.get_parameter(f"blocks.{number}.{ZERO[part]}.{name}").zero_()
    assert torch.equal(trial.outputs(trial.after), trial.outputs(expected))
    assert sqnr_db(trial.outputs(model), trial.outputs(trial.after)) < 30
    inside = [site for site in trial.anatomy.sites if site.block in (0, 2) and site.roles[0].startswith(part)]
    assert len(inside) == 4
    norms = [f"blocks.{number}.{NORM[part]}" for number in (0, 2)]
    assert trial.context.report["norms"] == norms
    gone = sum(site.parameters for site in inside) + sum(count(model.get_submodule(path)) for path in norms)
    assert count(trial.after) == count(model) - gone


def test_what_computed_a_dropped_sublayers_input_is_dead_in_a_trace() -> None:
    model, signature, rows = digits()
    trial = tried(DropLayers(attention=[1], mlp=[1]), model, signature, rows)
    batch = torch.export.Dim("batch")
    bound, inputs = signature.bind(trial.after), {"pixels": rows[0]["pixels"]}
    program = torch.export.export(bound, (), inputs, dynamic_shapes={"pixels": {0: batch}}, strict=False)
    program = program.run_decompositions({})
    used = {
        program.graph_signature.inputs_to_parameters[node.name]
        for node in program.graph.nodes
        if node.op == "placeholder" and node.users and node.name in program.graph_signature.inputs_to_parameters
    }
    assert any(name.startswith("model.blocks.0.") for name in used)
    assert not any(name.startswith("model.blocks.1.") for name in used)


def test_edits_rebuild_the_model_and_other_passes_follow() -> None:
    model, signature, rows = digits()
    trial = tried(EXAMPLE, model, signature, rows)
    assert torch.equal(trial.outputs(rebuilt(trial)), trial.outputs(trial.after))
    quantized = tried(Quantize(), trial.after, signature, rows)
    assert quantized.sqnr_db > 20
    assert isinstance(quantized.after.get_submodule("blocks.1.attn.proj"), Absent)


@pytest.mark.parametrize(
    ("options", "what", "hint"),
    [
        ({"blocks": [4]}, "there is no block 4", "There are 4: 0 to 3."),
        ({"attention": [-5]}, "there is no block -5", "There are 4: 0 to 3."),
        ({"blocks": [0, 1, 2, 3]}, "all 4 blocks of blocks", "Keep at least one."),
        ({"blocks": [0], "mlp": [-4]}, "block 0 is taken out whole", "Take 0 off mlp."),
    ],
    ids=str,
)
def test_what_cannot_be_dropped_is_refused(options: dict[str, Any], what: str, hint: str) -> None:
    with pytest.raises(UserError) as caught:
        tried(DropLayers(**options), *digits())
    assert caught.value.where == "drop_layers"
    assert what in caught.value.what
    assert hint in caught.value.hint


def test_quantized_sublayers_and_blocks_are_dropped_too() -> None:
    model, signature, rows = digits()
    quantized = tried(Quantize(), model, signature, rows)
    trial = tried(EXAMPLE, quantized.after, signature, rows)
    for path in ("blocks.1.attn.proj", "blocks.2.mlp.fc2"):
        gone = trial.after.get_submodule(path)
        assert isinstance(gone, Absent)
        assert gone.out_features == model.get_submodule("blocks.1.attn.proj").out_features
    assert torch.equal(trial.outputs(rebuilt(trial)), trial.outputs(trial.after))
    other_way = tried(Quantize(), tried(EXAMPLE, model, signature, rows).after, signature, rows)
    assert sqnr_db(other_way.outputs(other_way.after), trial.outputs(trial.after)) > 15


def test_dropping_nothing_is_refused() -> None:
    with pytest.raises(ValidationError, match="at least one"):
        DropLayers()


def family(name: str) -> Any:
    pytest.importorskip("transformers", reason="transformers is not installed")
    from families import build

    return build(name)


@pytest.mark.parametrize("name", swept(["bert", "vit", "gpt2", "llama", "opt", "distilbert"], ["bert", "vit", "llama"]))
def test_families_lose_a_block_and_count_right(name: str) -> None:
    model, signature, example = family(name)
    trial = tried(DropLayers(blocks=[0]), model, signature, [example])
    block = trial.anatomy.blocks[0]
    assert block.container is not None
    assert len(trial.after.get_submodule(block.container)) == len(model.get_submodule(block.container)) - 1  # type: ignore[arg-type]
    assert trial.after.config.num_hidden_layers == model.config.num_hidden_layers - 1  # type: ignore[union-attr]
    numbers = [vars(module)["layer_idx"] for module in trial.after.modules() if "layer_idx" in vars(module)]
    assert set(numbers) <= {0}
    assert trial.outputs(trial.after).isfinite().all()
    assert torch.equal(trial.outputs(rebuilt(trial)), trial.outputs(trial.after))


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_families_lose_sublayers_as_if_their_output_were_zero(name: str) -> None:
    model, signature, example = family(name)
    trial = tried(DropLayers(attention=[0], mlp=[1]), model, signature, [example])
    expected = copy.deepcopy(model)
    for block, role in ((0, "attention.out"), (1, "mlp.down")):
        path = trial.anatomy.blocks[block].roles[role][0]
        expected.get_submodule(path).register_forward_hook(lambda module, args, output: torch.zeros_like(output))
    assert torch.equal(trial.outputs(trial.after), trial.outputs(expected))
    assert not torch.equal(trial.outputs(trial.after), trial.outputs(model))


def test_cached_generation_equals_uncached_after_dropping() -> None:
    model, signature, example = family("llama")
    trial = tried(DropLayers(blocks=[0], attention=[1]), model, signature, [example])
    ids = example["input_ids"][:1, :6]
    with torch.inference_mode():
        first = trial.after(ids, use_cache=True)
        following = trial.after(ids[:, :1], past_key_values=first.past_key_values, use_cache=True).logits[:, -1]
        whole = trial.after(torch.cat([ids, ids[:, :1]], 1), use_cache=False).logits[:, -1]
    assert sqnr_db(whole, following) > 90


def sink(model: nn.Module, block: int, part: str) -> nn.Linear:
    found = model.get_submodule(f"blocks.{block}.{ZERO[part]}")
    assert isinstance(found, nn.Linear)
    return found


def scores(trial: Any) -> dict[str, float]:
    return {entry["path"]: entry["similarity"] for entry in trial.context.report["scores"]}


def by_hand(model: nn.Module, rows: list[Any], part: str) -> list[float]:
    """Similarities of a pre-norm model whose parts are called norm1, attn, norm2 and mlp."""
    found: dict[str, list[torch.Tensor]] = {}

    def note(name: str) -> Any:
        return lambda module, args, output: found.setdefault(name, []).append((args[0], output))

    copied = copy.deepcopy(model)
    norm, last = ("norm1", "attn.proj") if part == "attention" else ("norm2", "mlp.fc2")
    for number in range(4):
        copied.get_submodule(f"blocks.{number}.{norm}").register_forward_hook(note(f"norm{number}"))
        copied.get_submodule(f"blocks.{number}.{last}").register_forward_hook(note(f"last{number}"))
    with torch.inference_mode():
        for batch in rows:
            copied(batch["pixels"])
    similar = []
    for number in range(4):
        before = torch.cat([args for args, _ in found[f"norm{number}"]])  # type: ignore[misc]
        added = torch.cat([output for _, output in found[f"last{number}"]])  # type: ignore[misc]
        similar.append(float(torch.cosine_similarity(before.double(), (before + added).double(), dim=-1).mean()))
    return similar


@pytest.mark.parametrize("part", ["attention", "mlp"])
def test_the_most_similar_go_and_every_score_is_told(part: Any) -> None:
    model, signature, rows = digits()
    trial = tried(DropLayers(sublayers=part, count=2, repair=False), model, signature, rows)
    expected = by_hand(model, rows, part)
    assert list(scores(trial).values()) == pytest.approx(expected, abs=1e-6)
    order = sorted(range(4), key=lambda number: -expected[number])[:2]
    assert [entry["block"] for entry in trial.context.report["dropped"]] == order
    same = tried(DropLayers(**{part: order}), model, signature, rows)
    assert torch.equal(trial.outputs(trial.after), same.outputs(same.after))


@pytest.mark.parametrize("method", ["one_shot", "iterative"])
@pytest.mark.parametrize("part", ["attention", "mlp", "both"])
def test_what_adds_nothing_has_similarity_one_goes_first_and_changes_nothing(part: Any, method: Any) -> None:
    model, signature, rows = digits()
    dead = {"attention": (2, "attention"), "mlp": (1, "mlp"), "both": (1, "mlp")}[part]
    with torch.no_grad():
        sink(model, *dead).weight.zero_()
        sink(model, *dead).bias.zero_()
    trial = tried(DropLayers(sublayers=part, count=1, method=method), model, signature, rows)
    assert scores(trial)[f"blocks.{dead[0]}.{ZERO[dead[1]]}"] == 1
    assert trial.context.report["dropped"][0]["block"] == dead[0]
    assert torch.equal(trial.outputs(trial.after), trial.outputs(model))


def test_blocks_are_chosen_by_what_they_do_to_the_stream() -> None:
    model, signature, rows = digits()
    with torch.no_grad():
        for part in ("attention", "mlp"):
            sink(model, 2, part).weight.zero_()
            sink(model, 2, part).bias.zero_()
    trial = tried(DropLayers(sublayers="block", count=1), model, signature, rows)
    assert scores(trial)["blocks.2"] == 1
    assert trial.context.report["blocks"] == ["blocks.2"]
    assert torch.equal(trial.outputs(trial.after), trial.outputs(model))


@pytest.mark.parametrize("count_", [1, 2, 3])
def test_consecutive_measures_the_run_that_it_takes_out(count_: int) -> None:
    model, signature, rows = digits()
    trial = tried(DropLayers(sublayers="block", count=count_, method="consecutive"), model, signature, rows)
    streams: list[torch.Tensor] = []
    copied = copy.deepcopy(model)
    copied.get_submodule("blocks.0").register_forward_pre_hook(lambda module, args: streams.append(args[0]))
    for number in range(4):
        copied.get_submodule(f"blocks.{number}").register_forward_hook(lambda module, args, output: streams.append(output))
    with torch.inference_mode():
        copied(torch.cat([batch["pixels"] for batch in rows]))
    gaps = [
        float(torch.cosine_similarity(streams[start].double(), streams[start + count_].double(), dim=-1).mean())
        for start in range(4 - count_ + 1)
    ]
    told = trial.context.report["scores"]
    assert [entry["similarity"] for entry in told] == pytest.approx(gaps, abs=1e-6)
    best = gaps.index(max(gaps))
    assert trial.context.report["blocks"] == [f"blocks.{number}" for number in range(best, best + count_)]


@pytest.mark.parametrize("part", ["attention", "mlp", "both", "block"])
def test_one_round_of_iterative_is_one_shot(part: Any) -> None:
    one, again = (tried(DropLayers(sublayers=part, count=1, method=method), *digits()) for method in ("one_shot", "iterative"))
    assert one.context.report == again.context.report
    assert torch.equal(one.outputs(one.after), again.outputs(again.after))


def test_iterative_measures_again_after_each_removal() -> None:
    model, signature, rows = digits()
    trial = tried(DropLayers(sublayers="block", count=2, method="iterative", repair=False), model, signature, rows)
    first, second = trial.context.report["dropped"]
    after_one = tried(DropLayers(blocks=[first["block"]]), model, signature, rows)
    left = tried(DropLayers(sublayers="block", count=1, repair=False), after_one.after, signature, rows)
    number = left.context.report["dropped"][0]["block"]
    assert second["block"] == [block for block in range(4) if block != first["block"]][number]
    assert second["similarity"] == pytest.approx(left.context.report["dropped"][0]["similarity"], abs=1e-9)
    assert torch.equal(trial.outputs(trial.after), left.outputs(left.after))
    assert torch.equal(trial.outputs(rebuilt(trial)), trial.outputs(trial.after))


def test_scores_do_not_depend_on_batches_and_padding_does_not_count() -> None:
    model, signature, example = family("bert")
    pieces = [{name: tensor[row : row + 1] for name, tensor in example.items()} for row in range(4)]
    step = DropLayers(sublayers="both", count=1, repair=False)
    whole, cut = tried(step, model, signature, [example]), tried(step, model, signature, pieces)
    assert list(scores(whole).values()) == pytest.approx(list(scores(cut).values()), abs=1e-6)
    rubbish = {**example, "input_ids": torch.where(example["attention_mask"] == 0, 7, example["input_ids"])}
    padded = tried(step, model, signature, [rubbish])
    assert list(scores(padded).values()) == pytest.approx(list(scores(whole).values()), abs=1e-6)
    counted = tried(step, model, signature, [{**rubbish, "attention_mask": torch.ones_like(rubbish["attention_mask"])}])
    assert list(scores(counted).values()) != pytest.approx(list(scores(whole).values()), abs=1e-4)


def test_random_is_seeded_and_another_choice() -> None:
    model, signature, rows = digits()
    step = DropLayers(sublayers="both", count=3, score="random")
    one, again = tried(step, model, signature, rows), tried(step, model, signature, rows)
    assert one.context.report == again.context.report
    chosen = [entry["path"] for entry in one.context.report["dropped"]]
    best = tried(DropLayers(sublayers="both", count=3), model, signature, rows).context.report["dropped"]
    assert chosen != [entry["path"] for entry in best]
    assert not DropLayers(count=1, score="random", repair=False).calibrates


def test_a_constant_stays_where_it_helps_on_held_out_rows() -> None:
    model, signature, rows = digits()
    with torch.no_grad():
        sink(model, 1, "mlp").bias += 3 * torch.randn(
            sink(model, 1, "mlp").bias.shape, generator=torch.Generator().manual_seed(0)
        )
    step = DropLayers(mlp=[1], repair=True)
    plain, repaired = tried(DropLayers(mlp=[1]), model, signature, rows), tried(step, model, signature, rows)
    told = repaired.context.report["repair"]
    assert told["constants"] == ["blocks.1.mlp.fc2"]
    assert told["sqnr_db_after"] > told["sqnr_db_before"] + 3
    assert repaired.sqnr_db > plain.sqnr_db + 3
    assert all(int(path.split(".")[1]) > 1 for path in told["refitted"])
    assert torch.equal(repaired.outputs(rebuilt(repaired)), repaired.outputs(repaired.after))


def test_a_constant_that_does_not_help_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model, signature, rows = digits()
    plain = tried(DropLayers(mlp=[1]), model, signature, rows)
    monkeypatch.setattr("compress.algorithms.similarity.Sums.mean", property(lambda self: self.added * 100))
    monkeypatch.setattr("compress.depth.removal.refit", lambda *args: [])
    trial = tried(DropLayers(mlp=[1], repair=True), model, signature, rows)
    told = trial.context.report["repair"]
    assert told["constants"] == []
    assert told["not_better"] == ["blocks.1.mlp.fc2"]
    assert told["refitted"] or told["sqnr_db_after"] == told["sqnr_db_before"]
    assert torch.equal(trial.outputs(trial.after), trial.outputs(plain.after))


@pytest.mark.parametrize("options", [{"attention": [1]}, {"mlp": [0, 2]}, {"blocks": [1]}], ids=str)
def test_the_projections_behind_make_up_for_what_is_gone(options: dict[str, Any]) -> None:
    model, signature, rows = digits()
    plain, repaired = (tried(DropLayers(**options, repair=repair), model, signature, rows) for repair in (False, True))
    told = repaired.context.report["repair"]
    assert told["refitted"]
    assert told["sqnr_db_after"] > told["sqnr_db_before"] + 1
    assert repaired.sqnr_db > plain.sqnr_db + 1
    assert torch.equal(repaired.outputs(rebuilt(repaired)), repaired.outputs(repaired.after))


def test_a_refit_that_does_not_help_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model, signature, rows = digits()
    plain = tried(DropLayers(blocks=[1]), model, signature, rows)

    def spoil(model: nn.Module, call: Any, path: str, *rest: Any) -> Any:
        module = model.get_submodule(path)
        module.weight = nn.Parameter(module.weight * -3)  # type: ignore[operator,arg-type]
        return type("Done", (), {"ridge": 1.0})

    monkeypatch.setattr("compress.depth.refit.repair", spoil)
    trial = tried(DropLayers(blocks=[1], repair=True), model, signature, rows)
    assert trial.context.report["repair"]["refitted"] == []
    assert torch.equal(trial.outputs(trial.after), trial.outputs(plain.after))


def test_a_ratio_of_zero_changes_nothing() -> None:
    model, signature, rows = digits()
    trial = tried(DropLayers(ratio=0.0), model, signature, rows)
    assert trial.context.edits == []
    assert torch.equal(trial.outputs(trial.after), trial.outputs(model))
    assert DropLayers(ratio=0.0).targets(model, trial.anatomy) == []
    assert len(tried(DropLayers(ratio=0.5), model, signature, rows).context.report["dropped"]) == 2


@pytest.mark.parametrize(
    "options",
    [
        {"sublayers": "block", "count": 2},
        {"sublayers": "block", "count": 2, "method": "consecutive"},
        {"sublayers": "attention", "count": 3, "method": "iterative"},
        {"sublayers": "both", "count": 4},
        {"sublayers": "mlp", "ratio": 0.5, "repair": False},
        {"sublayers": "mlp", "count": 2, "score": "random", "repair": False},
    ],
    ids=str,
)
def test_a_rehearsal_takes_out_as_much_as_the_run(options: dict[str, Any]) -> None:
    model, signature, rows = digits()
    step = DropLayers(**options)
    trial = tried(step, model, signature, rows)
    rehearsed = copy.deepcopy(model)
    step.rehearse(rehearsed, trial.anatomy, Surgery())
    if options["sublayers"] != "both":
        assert count(rehearsed) == count(trial.after)
    assert count(rehearsed) < count(model)
    names = {target.path for target in step.targets(model, trial.anatomy)}
    assert {entry["path"] for entry in trial.context.report["dropped"]} <= names
    wanted = len(trial.context.report["dropped"])
    assert all(f"of {len(names)}: {wanted} of these" in target.action for target in step.targets(model, trial.anatomy))


@pytest.mark.parametrize(
    ("options", "what", "hint"),
    [
        ({"sublayers": "attention", "count": 5}, "5 attention sublayers are to go, and 4 can", "Choose 1 to 4."),
        ({"sublayers": "both", "count": 9}, "9 sublayers are to go, and 8 can", "Choose 1 to 8."),
        ({"sublayers": "block", "count": 4}, "4 blocks are to go, and 3 can", "a list keeps at least one block"),
        ({"sublayers": "block", "ratio": 1.0}, "4 blocks are to go, and 3 can", "a list keeps at least one block"),
    ],
    ids=str,
)
def test_more_than_there_is_is_refused_before_data_are_read(options: dict[str, Any], what: str, hint: str) -> None:
    model, _, _ = digits()
    anatomy = tried(DropLayers(mlp=[0]), *digits()).anatomy
    with pytest.raises(UserError) as caught:
        DropLayers(**options).targets(model, anatomy)
    assert what in caught.value.what
    assert hint in caught.value.hint


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"count": 0}, "greater than 0"),
        ({"count": 1, "mlp": [0]}, "exclude each other"),
        ({"count": 1, "ratio": 0.5}, "both say how many"),
        ({"count": 1, "method": "consecutive"}, "neighbouring blocks"),
        ({"sublayers": "block"}, "at least one"),
    ],
    ids=str,
)
def test_options_that_contradict_each_other_are_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        DropLayers(**options)


def test_blocks_that_share_their_weights_are_named() -> None:
    model, signature, example = family("albert")
    for kind in ("attention", "block"):
        with pytest.raises(UserError, match="can be taken out") as caught:
            tried(DropLayers(sublayers=kind, count=1), model, signature, [example])
        assert "runs 2 times with the same weights" in caught.value.hint
        assert "albert_layers.0" in caught.value.hint


def test_a_model_without_such_a_part_says_so() -> None:
    model, signature, example = family("convnextv2")
    with pytest.raises(UserError, match="attention"):
        tried(DropLayers(sublayers="attention", count=1), model, signature, [example])
