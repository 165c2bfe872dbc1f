"""That a prefix of a sorted model is what it should be, which widths are chosen, and what is refused."""

from __future__ import annotations

import json
import shutil
import tempfile
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from nesting import extract, keep, nest, seal
from pydantic import ValidationError
from sweeps import swept
from torch import nn
from trial import Trial, digits, rebuilt, tried

from calibrate.errors import UserError
from calibrate.fidelity import sqnr_db
from calibrate.inventory import inventory
from calibrate.signature import Batch, Signature
from compress.anatomy import find
from compress.passes.contract import Context
from compress.passes.drop_layers import DropLayers
from compress.passes.extract_width import ExtractWidth
from compress.passes.nest_widths import NestWidths
from compress.passes.quantize import Quantize
from compress.rehearsal import stand_in
from compress.surgery import Surgery
from compress.width import extraction, nested
from compress.width.extraction import name_of
from compress.width.prefixes import kept_share
from compress.width.units import masked

_KEPT = tempfile.TemporaryDirectory()
nest(Path(_KEPT.name) / "run", *digits())
EXAMPLE = ExtractWidth(run_folder=Path(_KEPT.name) / "run", widths=(0.5, 0.5, 0.5, 0.5))
FAMILIES = ["bert", "vit", "gpt2", "llama", "qwen3", "opt", "swin", "timm_mobilevit"]


@pytest.fixture(scope="module")
def sorted_digits(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Trial]:
    folder = tmp_path_factory.mktemp("nested") / "run"
    return folder, nest(folder, *digits(), score="trajectory", rows=32)


def family(name: str) -> tuple[nn.Module, Signature, list[Batch]]:
    from families import build

    try:
        model, signature, example = build(name)
    except ImportError as error:
        pytest.skip(str(error))
    return model, signature, [example]


def flops(trial: Trial) -> int:
    example = {name: tensor[:2] for name, tensor in trial.rows[0].items()}
    return sum(block.flops for block in find(trial.after, trial.signature, example).blocks)


@pytest.mark.parametrize("name", swept(FAMILIES, ["bert", "qwen3", "swin"]))
def test_extracted_is_the_masked_prefix(name: str, tmp_path: Path) -> None:
    before = nest(tmp_path, *family(name))
    step = ExtractWidth(run_folder=tmp_path, width=0.5, heads=0.5, round_to=4)
    read = nested.read(tmp_path)
    if any(one.kind == "head" and len(one) < 2 for one in read.units):
        step = step.model_copy(update={"heads": None})
    trial = tried(step, before.before, before.signature, before.rows)
    with ExitStack() as stack:
        for one, stay in zip(read.units, step.kept(read), strict=True):
            stack.enter_context(masked(before.after, one.units, range(stay, len(one))))
        expected = before.outputs(before.after)
    assert sqnr_db(expected, trial.outputs(trial.after)) > 80
    assert before.sqnr_db > 110
    assert sqnr_db(expected, before.outputs(before.before)) < 60, "a mask that does nothing would pass"
    assert torch.equal(trial.outputs(rebuilt(trial)), trial.outputs(trial.after))
    for one in read.units:
        bias = getattr(before.after.get_submodule(one.sink), "bias", None)
        assert bias is None or torch.equal(trial.after.get_submodule(one.sink).get_parameter("bias"), bias)
    rehearsed = stand_in(before.before)
    step.rehearse(rehearsed, before.anatomy, Surgery())
    assert inventory(rehearsed) == inventory(trial.after)


def test_all_of_it_is_the_sorted_model(sorted_digits: tuple[Path, Trial]) -> None:
    folder, before = sorted_digits
    for options in ({"width": 1}, {"widths": (1, 1, 1, 1)}, {"macs": 1}, {"size_ratio": 1}, {"heads": 1}):
        trial = extract(folder, before, **options)
        mine, theirs = trial.after.state_dict(), before.after.state_dict()
        assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
        assert mine.keys() == theirs.keys()
        assert trial.context.edits == []
        assert trial.context.report["kept_share"] == 1
        assert trial.sqnr_db > 110


def test_smaller_models_are_in_larger_ones(sorted_digits: tuple[Path, Trial]) -> None:
    folder, before = sorted_digits
    widths = [0.125, 0.25, 0.5, 0.75, 1]
    trials = [extract(folder, before, width=width, heads=max(0.25, width)) for width in widths]
    costs = [flops(trial) for trial in trials]
    assert all(smaller < larger for smaller, larger in pairwise(costs))
    for smaller, larger in pairwise(trials):
        for name, weight in smaller.after.state_dict().items():
            whole = larger.after.state_dict()[name]
            if "qkv" in name:  # query, key and value one after the other
                whole, weight = whole.unflatten(0, (3, -1)), weight.unflatten(0, (3, -1))
            assert torch.equal(whole[tuple(slice(size) for size in weight.shape)], weight), name
    told = nested.read(folder)
    kept = [ExtractWidth(run_folder=folder, macs=macs, round_to=4).kept(told) for macs in (0.3, 0.5, 0.7, 0.9)]
    assert [sum(one) for one in kept] == sorted(sum(one) for one in kept)


@pytest.mark.parametrize("option", ["macs", "size_ratio"])
@pytest.mark.parametrize("heads", [None, 1.0])
def test_budgets_hold_and_are_used(sorted_digits: tuple[Path, Trial], option: str, heads: float | None) -> None:
    folder, before = sorted_digits
    ratio = 0.7 if heads else 0.4
    trial = extract(folder, before, **{option: ratio}, heads=heads, round_to=4)
    if option == "macs":
        got = flops(trial) / sum(block.flops for block in before.anatomy.blocks)
        assert got == pytest.approx(trial.context.report["kept_share"], abs=1e-9)
    else:
        sizes = [sum(entry.bytes for entry in inventory(one).values()) for one in (before.before, trial.after)]
        got = sizes[1] / sizes[0]
        assert got == pytest.approx(trial.context.report["kept_bytes_share"], abs=1e-3)
    assert ratio - 0.02 < got <= ratio
    cut = {entry["kind"] for entry in trial.context.report["gone"] if entry["stay"] < entry["of"]}
    assert cut == ({"neuron"} if heads else {"head", "neuron"})
    stay = {entry["stay"] for entry in trial.context.report["gone"] if entry["kind"] == "neuron"}
    assert len(stay) > 1, "a budget mixes widths"


def test_the_first_units_are_the_right_ones(sorted_digits: tuple[Path, Trial], tmp_path: Path) -> None:
    folder, before = sorted_digits
    nest(tmp_path / "random", *digits(), score="random")
    for options in ({"width": 0.25}, {"macs": 0.5}):
        ours = extract(folder, before, **options)
        control = extract(tmp_path / "random", before, **options)
        repaired = extract(folder, before, **options, repair=True)
        assert ours.sqnr_db > control.sqnr_db + 2
        assert repaired.sqnr_db > ours.sqnr_db + 3
        assert repaired.context.report["repair"]["sqnr_after_db"] > repaired.context.report["repair"]["sqnr_before_db"]


def test_widths_are_given_by_block(sorted_digits: tuple[Path, Trial]) -> None:
    folder, before = sorted_digits
    trial = extract(folder, before, widths=(1, 0.5, 0.3, 0.0625), heads=(1, 0.5, 0.75, 0.25))
    stay = {(entry["block"], entry["kind"]): entry["stay"] for entry in trial.context.report["gone"]}
    assert [stay[block, "neuron"] for block in range(4)] == [256, 128, 80, 16]
    assert [stay[block, "head"] for block in range(4)] == [4, 2, 3, 1]


def test_passes_before_are_taken_over_and_others_may_follow(tmp_path: Path) -> None:
    model, signature, rows = digits()
    dropped = tried(DropLayers(sublayers="attention", count=1), model, signature, rows)
    example = {name: tensor[:2] for name, tensor in rows[0].items()}
    anatomy = find(dropped.after, signature, example)
    context = Context(signature, anatomy, lambda: iter(rows), Surgery(dropped.context.edits), fingerprint="f")
    after = NestWidths(score="magnitude").run(dropped.after, context)
    keep(Trial(model, after, signature, anatomy, context, rows), tmp_path)
    trial = tried(ExtractWidth(run_folder=tmp_path, width=0.5), model, signature, rows)
    assert len(trial.context.edits) > len(dropped.context.edits)
    assert torch.equal(trial.outputs(rebuilt(trial)), trial.outputs(trial.after))
    assert tried(Quantize(), trial.after, signature, rows).sqnr_db > 20


@pytest.mark.parametrize(
    ("options", "what", "hint"),
    [
        ({"width": 0.06}, "width 0.06 leaves less than 16 neurons of the 256 in block 0", "0.0625 or more"),
        ({"width": 0.003, "round_to": 1}, "less than one neuron of the 256", "Ask for 0.004 or more."),
        ({"heads": 0.2}, "less than one head of the 4", "Ask for 0.25 or more."),
        ({"widths": (1, 0.5)}, "widths has 2 numbers, and 4 blocks", "Give 4, first block first"),
        ({"heads": (1, 0.5)}, "heads has 2 numbers, and 4 blocks", "Give 4"),
        ({"macs": 0.05}, "macs 0.05 is less than what stays in any case", "Ask for 0.1303 or more."),
        ({"size_ratio": 0.3, "heads": 1}, "size_ratio 0.3 is less", "or let heads go too"),
    ],
)
def test_too_little_is_refused_with_the_least(
    sorted_digits: tuple[Path, Trial], options: dict[str, Any], what: str, hint: str
) -> None:
    folder, before = sorted_digits
    with pytest.raises(UserError) as caught:
        extract(folder, before, **options)
    assert what in caught.value.what
    assert hint in caught.value.hint
    least = caught.value.hint.split()[2].rstrip(".,")
    option = next(iter(options))
    if not isinstance(options[option], tuple):
        extract(folder, before, **{**options, option: float(least)})


def test_options() -> None:
    folder = Path("runs/mine")
    for options in ({}, {"width": 0.5, "macs": 0.5}, {"width": 0}, {"width": 1.01}, {"widths": (0.5, -1)}, {"heads": 0}):
        with pytest.raises(ValidationError):
            ExtractWidth.model_validate({"run_folder": folder, **options})
    assert not ExtractWidth(run_folder=folder, width=0.5).calibrates
    assert ExtractWidth(run_folder=folder, width=0.5, repair=True).calibrates


def test_heads_that_were_not_sorted_are_refused(tmp_path: Path) -> None:
    before = nest(tmp_path, *digits(), heads=False)
    with pytest.raises(UserError, match=r"heads 0\.5: the run sorted no heads") as caught:
        extract(tmp_path, before, heads=0.5)
    assert "nest_widths: {heads: true}" in caught.value.hint
    assert extract(tmp_path, before, macs=0.6).context.report["kept_share"] <= 0.6


def test_query_heads_that_share_keys_stay_together(tmp_path: Path) -> None:
    before = nest(tmp_path, *family("llama"))
    trial = extract(tmp_path, before, heads=0.5)
    blocks = find(trial.after, trial.signature, trial.rows[0]).blocks
    assert {(block.heads, block.kv_heads) for block in blocks} == {(2, 1)}


def damaged(folder: Path, copy: Path) -> Path:
    return Path(shutil.copytree(folder, copy))


def test_damaged_files_are_refused(sorted_digits: tuple[Path, Trial], tmp_path: Path) -> None:
    folder, before = sorted_digits

    def refused(name: str, what: str, change: Any, sealed: bool = True) -> None:
        run = damaged(folder, tmp_path / name)
        change(run)
        if sealed:
            seal(run)
        with pytest.raises(UserError, match=what):
            extract(run, before, width=0.5)

    def rewritten(**changes: Any) -> Any:
        def change(run: Path) -> None:
            path = run / "nested/widths.json"
            path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

        return change

    def cut(name: str, size: int) -> Any:
        def change(run: Path) -> None:
            path = run / "nested" / name
            content = path.read_bytes()[:size]
            path.unlink()
            path.write_bytes(content)

        return change

    units = json.loads((folder / "nested/widths.json").read_text())["units"]
    refused("cut", "is not JSON", cut("widths.json", 1000))
    refused("list", "is damaged", lambda run: (run / "nested/widths.json").write_text("[1]"))
    refused("version", "has version 2, this program reads version 1", rewritten(version=2))
    refused("keys", "is damaged: units", rewritten(units=[]))
    refused("order", "do not name every unit once", rewritten(units=[{**units[0], "order": [0, 0, 1, 2]}]))
    refused("rising", "does not descend", rewritten(units=[{**units[0], "importance": [1, 2, 3, 4]}]))
    refused("edited", "its hash differs", rewritten(score="magnitude"), sealed=False)
    refused("model", "its hash differs", cut("model.safetensors", 5000))
    refused("gone", "there is no such file", lambda run: (run / "nested/model.safetensors").unlink())
    for number, sink in enumerate(("blocks.0.attn.proj", "no.such.place", "blocks.0")):
        refused(f"sink {number}", "does not describe the model beside it", rewritten(units=[{**units[1], "sink": sink}]))
    shifted = {**units[1], "rows": {"blocks.0.mlp.fc1": {"first": [300], "stride": [1]}}}
    refused("rows", "block 0 does not run", rewritten(units=[shifted]))


def test_runs_that_sorted_nothing_are_refused(tmp_path: Path, sorted_digits: tuple[Path, Trial]) -> None:
    _, before = sorted_digits
    with pytest.raises(UserError, match="is not the folder of a finished run"):
        extract(tmp_path / "none", before, width=0.5)
    (tmp_path / "nested").mkdir()
    seal(tmp_path)
    with pytest.raises(UserError, match="holds no sorted model") as caught:
        extract(tmp_path, before, width=0.5)
    assert "- nest_widths" in caught.value.hint


def test_another_model_is_refused(sorted_digits: tuple[Path, Trial], tmp_path: Path) -> None:
    folder, before = sorted_digits
    model, signature, rows = family("vit")
    with pytest.raises(UserError, match="holds another model than that of this recipe"):
        tried(ExtractWidth(run_folder=folder, width=0.5), model, signature, rows)
    anatomy = before.anatomy
    context = Context(before.signature, anatomy, lambda: iter([]), Surgery(), fingerprint="other")
    with pytest.raises(UserError, match="made from another model"):
        ExtractWidth(run_folder=folder, width=0.5).run(before.before, context)
    after_another = Surgery()
    after_another.set(stand_in(before.before), "", "note", 1)
    with pytest.raises(UserError, match="comes after a pass that changed the model"):
        ExtractWidth(run_folder=folder, width=0.5).rehearse(stand_in(before.before), anatomy, after_another)


def test_kept_share_is_that_of_the_units(sorted_digits: tuple[Path, Trial]) -> None:
    told = nested.read(sorted_digits[0])
    everything = [len(one) for one in told.units]
    assert kept_share(told, everything, macs=True) == kept_share(told, everything, macs=False) == 1
    assert kept_share(told, [0] * len(everything), macs=True) < 0.1


def test_other_options_have_another_name() -> None:
    long = {"widths": tuple(0.01 * number for number in range(1, 40))}
    asked: list[dict[str, Any]] = [
        {"width": 0.5}, {"width": 0.5, "round_to": 1}, {"width": 0.5, "round_to": 8}, {"width": 0.5, "repair": True},
        long, {"widths": long["widths"][::-1]}, {**long, "round_to": 8}, {**long, "repair": True},
    ]  # fmt: skip
    names = [name_of("n" * length, options) for options in asked for length in (5, 70)]
    assert len(set(names)) == len(names)
    assert all(len(name) <= 80 for name in names)
    assert name_of("nested", {"width": 0.5, "round_to": 8}) == "nested-w0.5-r8"


@pytest.mark.parametrize(
    ("options", "hint"),
    [
        ({"width": 2.0}, "A width is a share"),
        ({"width": 0.5, "round_to": 0}, "a multiple of a whole number, at least 1 and at most 1024"),
        ({"macs": 7.0}, "A budget is a share"),
    ],
    ids=str,
)
def test_the_way_out_is_that_of_the_option(options: dict[str, Any], hint: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        extraction._step(str(tmp_path), options)
    assert hint in caught.value.hint
