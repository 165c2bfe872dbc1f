"""What ``prune_width`` takes out, that it is what is missed least, that budgets hold, and what it refuses."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from sweeps import swept
from torch import Tensor, nn
from trial import Trial, digits, rebuilt, tried

from calibrate.errors import UserError
from calibrate.fidelity import sqnr_db
from calibrate.inventory import inventory
from calibrate.signature import Batch, Signature
from compress.anatomy import find
from compress.depth.repair import MOST_HELD
from compress.layers import Absent
from compress.passes.prune_width import PruneWidth
from compress.passes.quantize import Quantize
from compress.rehearsal import stand_in
from compress.surgery import Surgery

EXAMPLE = PruneWidth(macs=0.95, heads=False, blocks=[1], round_to=4, rows=16)
"""One place only, so that the shapes that are left do not hang on the scores."""
FAMILIES = ["bert", "gpt2", "opt", "llama", "qwen3", "phi", "vit", "timm_vit", "dinov2_swiglu", "swin", "pvt", "timm_mobilevit"]


def share(trial: Trial) -> float:
    before = trial.anatomy
    after = find(trial.after, trial.signature, {name: tensor[:2] for name, tensor in trial.rows[0].items()})
    return sum(block.flops for block in after.blocks) / sum(block.flops for block in before.blocks)


def family(name: str) -> tuple[nn.Module, Signature, list[Batch]]:
    from families import build

    try:
        model, signature, example = build(name)
    except ImportError as error:
        pytest.skip(str(error))
    return model, signature, [example, {key: value.roll(1, 0) for key, value in example.items()}]


def useless(model: nn.Module, heads: dict[int, list[int]], neurons: dict[int, list[int]]) -> None:
    """Makes units of the digits model that nothing reads."""
    with torch.no_grad():
        for block, numbers in heads.items():
            weight = model.get_parameter(f"blocks.{block}.attn.proj.weight")
            width = weight.shape[1] // model.get_submodule(f"blocks.{block}.attn").heads
            for head in numbers:
                weight[:, head * width : (head + 1) * width] = 0
        for block, numbers in neurons.items():
            model.get_parameter(f"blocks.{block}.mlp.fc2.weight")[:, numbers] = 0


@pytest.mark.parametrize("ratio", swept([0.9, 0.7, 0.5, 0.3], [0.9, 0.3]))
def test_the_budget_holds_and_is_used(ratio: float) -> None:
    model, signature, rows = digits()
    trial = tried(PruneWidth(macs=ratio, round_to=4, rows=8, repair=False), model, signature, rows)
    got = share(trial)
    assert got <= ratio
    assert got == pytest.approx(trial.context.report["kept_share"], abs=1e-9)
    assert ratio - got < 0.01, "what is left over is less than a step of neurons"
    for entry in trial.context.report["gone"]:
        assert entry["kind"] == "head" or entry["stay"] % 4 == 0 or entry["stay"] == entry["of"]


def test_all_of_it_changes_nothing() -> None:
    model, signature, rows = digits()
    for options in ({"macs": 1.0}, {"size_ratio": 1.0}):
        trial = tried(PruneWidth.model_validate(options), model, signature, rows)
        assert trial.context.edits == []
        assert torch.equal(trial.outputs(trial.after), trial.outputs(model))


def test_a_size_budget_counts_bytes() -> None:
    model, signature, rows = digits()
    trial = tried(PruneWidth(size_ratio=0.6, round_to=2, rows=8, repair=False), model, signature, rows)
    sizes = [sum(entry.bytes for entry in inventory(one).values()) for one in (model, trial.after)]
    assert 0.59 < sizes[1] / sizes[0] <= 0.6


def test_useless_units_go_first_and_nothing_is_lost() -> None:
    model, signature, rows = digits()
    heads, neurons = {0: [1], 2: [0]}, {1: list(range(40)), 3: list(range(20, 60))}
    useless(model, heads, neurons)
    kept = find(model, signature, {"pixels": rows[0]["pixels"][:2]})
    options: dict[str, Any] = {"round_to": 4, "repair": False}
    full = PruneWidth(macs=0.99, rows=8, **options)
    units = full._units(model, kept)[0]
    cost = sum(len((heads if one.kind == "head" else neurons).get(one.block, [])) * one.flops for one in units)
    ratio = 1 - cost / sum(block.flops for block in kept.blocks)
    trial = tried(PruneWidth(macs=ratio + 1e-9, rows=8, **options), model, signature, rows)
    assert trial.sqnr_db > 100
    for entry in trial.context.report["gone"]:
        expected = (heads if entry["kind"] == "head" else neurons).get(entry["block"], [])
        assert entry["of"] - entry["stay"] == len(expected)
        assert entry["score_gone"] == 0
    control = tried(PruneWidth(macs=ratio + 1e-9, score="random", **options), model, signature, rows)
    assert control.sqnr_db < 30


def test_trajectory_is_better_than_random_and_repair_helps() -> None:
    model, signature, rows = digits()
    options: dict[str, Any] = {"macs": 0.6, "round_to": 4}
    ours = tried(PruneWidth(**options, rows=32, repair=False), model, signature, rows)
    control = tried(PruneWidth(**options, score="random", repair=False), model, signature, rows)
    repaired = tried(PruneWidth(**options, rows=32), model, signature, rows)
    assert ours.sqnr_db > control.sqnr_db + 1
    told = repaired.context.report["repair"]
    assert told["sqnr_after_db"] > told["sqnr_before_db"] + 3
    assert repaired.sqnr_db > ours.sqnr_db + 3
    for site in told["sites"]:
        assert site["after"] <= site["before"]


def test_a_repair_that_makes_the_outputs_worse_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    from compress.width import repaired as width_repair
    from compress.width.repair import Repaired, repair

    def spoil(model: nn.Module, call: Any, path: str, *rest: Any) -> Repaired:
        told = repair(model, call, path, *rest)
        module = model.get_submodule(path)
        module.register_parameter("weight", nn.Parameter(torch.randn_like(module.get_parameter("weight"))))
        return told

    model, signature, rows = digits()
    plain = tried(PruneWidth(macs=0.7, rows=8, repair=False), model, signature, rows)
    monkeypatch.setattr(width_repair, "repair", spoil)
    spoiled = tried(PruneWidth(macs=0.7, rows=8), model, signature, rows)
    assert "undone" in spoiled.context.report["repair"]
    assert torch.equal(spoiled.outputs(spoiled.after), plain.outputs(plain.after))


@pytest.mark.parametrize("name", swept(FAMILIES, ["bert", "llama", "dinov2_swiglu"]))
def test_every_family(name: str) -> None:
    """GQA, fused and interleaved projections, gated and convolutional MLPs, windows."""
    model, signature, rows = family(name)
    trial = tried(PruneWidth(macs=0.7, round_to=4, rows=4), model, signature, rows)
    assert share(trial) <= 0.7
    gone = {entry["kind"] for entry in trial.context.report["gone"] if entry["stay"] < entry["of"]}
    assert gone
    assert trial.outputs(trial.after).isfinite().all()
    assert torch.equal(trial.outputs(rebuilt(trial)), trial.outputs(trial.after))


@pytest.mark.parametrize("name", swept(["bert", "llama", "timm_vit"], ["llama"]))
def test_a_rehearsal_has_the_size_of_the_run(name: str) -> None:
    model, signature, rows = family(name)
    step = PruneWidth(macs=0.6, round_to=4, rows=4, repair=False)
    trial = tried(step, model, signature, rows)
    rehearsed = stand_in(model)
    step.rehearse(rehearsed, trial.anatomy, Surgery())
    sizes = [sum(entry.bytes for entry in inventory(one).values()) for one in (model, trial.after, rehearsed)]
    assert abs(sizes[1] - sizes[2]) < 0.15 * (sizes[0] - sizes[1])
    assert sum(entry.bytes for entry in inventory(model).values()) == sizes[0]
    find(rehearsed, signature, rows[0])


def test_parts_and_blocks_can_be_spared() -> None:
    model, signature, rows = digits()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trial = tried(PruneWidth(macs=0.8, heads=False, skip=[-1], rows=8, repair=False), model, signature, rows)
    after = trial.after.state_dict()
    changed = {name.rpartition(".")[0] for name in before if before[name].shape != after[name].shape}
    assert changed
    assert all(".mlp." in path and not path.startswith("blocks.3.") for path in changed)
    only = tried(PruneWidth(macs=0.9, blocks=[0], rows=8, repair=False), model, signature, rows)
    assert {entry["block"] for entry in only.context.report["gone"]} == {0}


def test_a_block_can_lose_everything() -> None:
    model, signature, rows = digits()
    useless(model, {1: [0, 1, 2, 3]}, {1: list(range(256))})
    trial = tried(PruneWidth(macs=0.75, blocks=[1], rows=8, repair=False), model, signature, rows)
    left = [trial.after.get_submodule(f"blocks.1.{name}") for name in ("attn.proj", "mlp.fc2")]
    assert all(isinstance(layer, Absent) for layer in left)
    assert trial.sqnr_db > 100
    assert find(trial.after, signature, rows[0]).totals["flops"] < trial.anatomy.totals["flops"]


def test_quantize_follows() -> None:
    model, signature, rows = digits()
    trial = tried(PruneWidth(macs=0.7, rows=8), model, signature, rows)
    assert tried(Quantize(), trial.after, signature, rows).sqnr_db > 20


def test_seeds() -> None:
    model, signature, rows = digits()
    step = PruneWidth(macs=0.6, score="random", repair=False)
    first, again = (tried(step, model, signature, rows).context.report["gone"] for _ in range(2))
    assert first == again


@pytest.mark.parametrize("option", ["macs", "size_ratio"])
def test_a_budget_below_the_smallest_model_tells_it(option: str) -> None:
    model, signature, rows = digits()
    options: dict[str, Any] = {option: 0.3, "heads": False}
    with pytest.raises(UserError, match="is less than what stays in any case") as caught:
        tried(PruneWidth(**options), model, signature, rows)
    least = float(caught.value.hint.split()[2])
    assert least > 0.3
    tried(PruneWidth(**{**options, option: least, "repair": False, "rows": 4}), model, signature, rows)


def test_wrong_input() -> None:
    model, signature, rows = digits()
    for options in (
        {},
        {"macs": 0.5, "size_ratio": 0.5},
        {"macs": 0.5, "heads": False, "neurons": False},
        {"macs": 0},
        {"macs": 1.1},
    ):
        with pytest.raises(ValidationError):
            PruneWidth.model_validate(options)
    with pytest.raises(UserError, match="blocks: there is no block 4"):
        tried(PruneWidth(macs=0.5, blocks=[4]), model, signature, rows)
    with pytest.raises(UserError, match="no block is left"):
        tried(PruneWidth(macs=0.5, skip=[0, 1, 2, 3]), model, signature, rows)
    quantized = tried(Quantize(), model, signature, rows).after
    with pytest.raises(UserError, match="no block has heads or neurons that can go") as caught:
        tried(PruneWidth(macs=0.5), quantized, signature, rows)
    assert "quantized already" in caught.value.hint


def test_a_model_without_blocks_is_refused() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 2)

        def forward(self, pixels: Tensor) -> Tensor:
            found: Tensor = self.layer(pixels.flatten(1)[:, :8])
            return found

    _, signature, rows = digits()
    with pytest.raises(UserError, match="no blocks"):
        tried(PruneWidth(macs=0.5), Plain(), signature, rows)


def test_heads_that_share_keys_stay_whole_groups() -> None:
    model, signature, rows = family("llama")
    trial = tried(PruneWidth(macs=0.9, neurons=False, rows=4, repair=False), model, signature, rows)
    after = find(trial.after, signature, rows[0])
    assert {(block.heads, block.kv_heads) for block in after.blocks} <= {(4, 2), (2, 1)}
    assert any(block.heads == 2 for block in after.blocks)


def test_repair_leaves_the_given_model_alone() -> None:
    model, signature, rows = digits()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    step, copied = PruneWidth(macs=0.95, blocks=[0], rows=8), copy.deepcopy(model)
    shared = stand_in(copied)
    trial = tried(step, shared, signature, rows)
    assert trial.context.report["repair"]["sites"]
    assert all(torch.equal(tensor, copied.state_dict()[name]) for name, tensor in before.items())
    assert sqnr_db(trial.outputs(copied), trial.outputs(trial.after)) > 10


def test_training_after_the_repair_brings_the_output_nearer_and_no_epochs_change_nothing() -> None:
    model, signature, rows = digits()
    given = copy.deepcopy(model.state_dict())
    options: dict[str, Any] = {"macs": 0.5, "score": "magnitude"}
    plain, zero = (
        tried(PruneWidth(**options), model, signature, rows),
        tried(PruneWidth(**options, distill=0), model, signature, rows),
    )
    taught, again = (tried(PruneWidth(**options, distill=5), model, signature, rows) for _ in range(2))
    assert plain.context.report == zero.context.report
    assert torch.equal(plain.outputs(plain.after), zero.outputs(zero.after))
    told = taught.context.report["repair"]["distillation"]
    assert told["sqnr_db_after"] > told["sqnr_db_before"] == plain.context.report["repair"]["sqnr_after_db"]
    assert taught.sqnr_db > plain.sqnr_db + 1
    assert taught.context.report == again.context.report
    assert all(torch.equal(value, again.after.state_dict()[name]) for name, value in taught.after.state_dict().items())
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in given.items())
    assert torch.equal(taught.outputs(rebuilt(taught)), taught.outputs(taught.after))
    with pytest.raises(ValidationError, match="repair: false"):
        PruneWidth(macs=0.5, repair=False, distill=1)


@pytest.mark.parametrize("score", ["magnitude", "random"])
def test_rows_to_score_on_need_a_score_that_reads_rows(score: Any) -> None:
    assert PruneWidth(macs=0.5, score="trajectory", rows=8).rows == 8
    with pytest.raises(ValidationError, match=f"rows goes with score: trajectory\nTake rows out, or score: {score}"):
        PruneWidth(macs=0.5, score=score, rows=8)


def test_training_holds_out_no_more_rows_than_what_the_model_gives_for_them_has_room() -> None:
    model, signature, rows = digits()
    many = rows * (3 * MOST_HELD * 4 // sum(len(next(iter(batch.values()))) for batch in rows) + 1)
    trial = tried(PruneWidth(macs=0.9, score="magnitude", distill=1), model, signature, many)
    training = trial.context.report["repair"]["distillation"]["training"]
    assert training["held_rows"] == MOST_HELD < training["rows"]
