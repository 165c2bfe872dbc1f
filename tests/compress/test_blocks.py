"""The SQNR of each block, against hooks set by hand; and where it falls when a block is harmed, dropped or shortened."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from calibrate.fidelity import sqnr_db
from calibrate.signature import Batch, Signature, TensorSpec
from compress import blocks
from compress.anatomy import Anatomy, find
from compress.blocks import compare, keep_outputs
from compress.passes import Context
from compress.passes.drop_layers import DropLayers
from compress.passes.quantize import Quantize
from compress.report import BlockFidelity
from compress.surgery import Edit, Surgery
from compress.whereabouts import Whereabouts

FAMILIES = ("bert", "vit", "gpt2", "timm_vit")


class Subject:
    """A small model of a family with four rows, its blocks, and the file of its float outputs."""

    def __init__(self, family: str, folder: Path) -> None:
        families = pytest.importorskip("families")
        try:
            self.model, self.signature, self.rows = families.build(family)
        except ImportError:
            pytest.skip("needs the extras hf and timm")
        self.before = copy.deepcopy(self.model)
        self.anatomy: Anatomy = find(self.model, self.signature, self.rows)
        self.paths = [block.path for block in self.anatomy.blocks]
        assert len(self.paths) == 2
        self.file = keep_outputs(self.model, self.signature.call, self.paths, [self.rows], folder / "blocks.safetensors")
        self.surgery = Surgery()

    def run(self, step: Any) -> None:
        anatomy = find(self.model, self.signature, self.rows)
        context = Context(self.signature, anatomy, lambda: iter([self.rows]), self.surgery)
        self.model = step.run(self.model, context)

    def compared(self) -> list[BlockFidelity]:
        return compare(self.model, self.signature.call, self.surgery.edits, [self.rows], self.file)

    def heard(self, model: nn.Module, path: str) -> Tensor:
        """What a block gives, at the positions that are no padding: by a hook of our own."""
        given: list[Tensor] = []

        def hook(module: nn.Module, args: Any, output: Any) -> None:
            given.append((output if isinstance(output, Tensor) else output[0]).clone())

        handle = model.get_submodule(path).register_forward_hook(hook)
        with torch.no_grad():
            self.signature.call(model, self.rows)
        handle.remove()
        mask = self.rows.get("attention_mask")
        return given[0] if mask is None else given[0][mask.bool()]


@pytest.fixture(params=FAMILIES)
def subject(request: pytest.FixtureRequest, tmp_path: Path) -> Subject:
    return Subject(request.param, tmp_path)


@pytest.fixture
def bert(tmp_path: Path) -> Subject:
    return Subject("bert", tmp_path)


def test_the_model_itself_is_equal_and_no_hook_is_left(subject: Subject) -> None:
    assert [(one.sqnr_db, one.gone, one.rows, one.note) for one in subject.compared()] == [(None, False, 4, "")] * 2
    assert not any(module._forward_hooks for module in subject.model.modules())


def test_it_is_what_hooks_set_by_hand_say(subject: Subject) -> None:
    subject.run(Quantize(weights=8, activations="static"))
    for one in subject.compared():
        expected = sqnr_db(subject.heard(subject.before, one.path), subject.heard(subject.model, one.path))
        assert one.sqnr_db == pytest.approx(expected, abs=1e-3)
        assert 5 < expected < 80


def test_padding_does_not_count(bert: Subject) -> None:
    """Noise at padded positions alone, before the blocks, must not be seen; the same noise elsewhere must."""
    padded = bert.rows["attention_mask"] == 0
    assert padded.any()

    def noisy(where: Tensor) -> Callable[..., Any]:
        return lambda module, args, output: output + where.unsqueeze(-1) * 3.0

    embeddings = bert.model.get_submodule("bert.embeddings")
    handle = embeddings.register_forward_hook(noisy(padded))
    assert all(one.sqnr_db is None or one.sqnr_db > 100 for one in bert.compared())
    handle.remove()
    embeddings.register_forward_hook(noisy(~padded))
    assert all(one.sqnr_db is not None and one.sqnr_db < 30 for one in bert.compared())


@pytest.mark.parametrize("harmed", [0, 1])
def test_a_harmed_block_shows_where_it_is_and_not_before(subject: Subject, harmed: int) -> None:
    with torch.no_grad():
        for parameter in subject.model.get_submodule(subject.paths[harmed]).parameters():
            parameter += 0.05 * torch.randn(parameter.shape)
    levels = [one.sqnr_db for one in subject.compared()]
    assert levels[:harmed] == [None] * harmed
    assert all(level is not None and level < 40 for level in levels[harmed:])


def test_a_dropped_block_is_gone_and_the_others_are_followed(subject: Subject) -> None:
    subject.run(DropLayers(blocks=[0]))
    gone, kept = subject.compared()
    assert (gone.path, gone.gone, gone.sqnr_db, gone.rows) == (subject.paths[0], True, None, 0)
    assert (kept.path, kept.gone, kept.rows) == (subject.paths[1], False, 4)
    moved = subject.heard(subject.model, subject.paths[0])
    assert kept.sqnr_db == pytest.approx(sqnr_db(subject.heard(subject.before, subject.paths[1]), moved), abs=1e-3)


def test_a_shortened_sequence_is_said(bert: Subject) -> None:
    bert.model.get_submodule(bert.paths[1]).register_forward_hook(lambda module, args, output: output[:, :9])
    bert.signature = Signature(bert.signature.inputs, "tensor")
    bert.model = _FirstHidden(bert.model)
    bert.file = keep_outputs(
        _FirstHidden(bert.before), bert.signature.call, [f"inner.{path}" for path in bert.paths], [bert.rows], bert.file
    )
    same, short = bert.compared()
    assert (same.sqnr_db, same.note) == (None, "")
    assert (short.sqnr_db, short.rows) == (None, 0)
    assert short.note == "its output is [4, 9, 32] instead of [4, 16, 32]"


class _FirstHidden(nn.Module):
    """The encoder's output without what comes after it."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, **inputs: Tensor) -> Tensor:
        hidden: Tensor = self.inner.bert.encoder(self.inner.bert.embeddings(inputs["input_ids"]))[0]  # type: ignore[union-attr]
        return hidden


def test_an_output_that_is_not_finite_is_the_lowest_level(bert: Subject) -> None:
    with torch.no_grad():
        next(bert.model.get_submodule(bert.paths[1]).parameters()).fill_(float("nan"))
    assert [one.sqnr_db for one in bert.compared()] == [None, -999.0]


class Toy(nn.Module):
    """Blocks that add to their input in place, give tuples, and are one module under two paths."""

    def __init__(self) -> None:
        super().__init__()
        first, second = Adder(8), Adder(8)
        self.layers = nn.ModuleList([first, second, first])

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        for layer in self.layers:
            x = layer(x)[0]
        return x


class Adder(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: Tensor) -> tuple[Tensor, str]:
        x += self.linear(x)
        return x, "not a tensor"


TOY = Signature((TensorSpec("x", torch.float32, ("batch", 8)),))


def test_in_place_additions_tuples_and_shared_modules(tmp_path: Path) -> None:
    model, rows = Toy().eval(), {"x": torch.randn(10, 8)}
    paths = ["layers.0", "layers.1", "layers.2"]
    path = keep_outputs(model, TOY.call, paths, [rows], tmp_path / "kept.safetensors")
    assert [one.sqnr_db for one in compare(model, TOY.call, [], [rows], path)] == [None] * 3
    with torch.no_grad():
        model.layers[1].linear.weight += 0.1
    first, second, third = compare(model, TOY.call, [], [rows], path)
    assert first.sqnr_db is None, "the first call of the shared module came before the harm"
    assert second.sqnr_db is not None
    assert third.sqnr_db is not None, "its second call came after it"


def test_rows_and_bytes_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Toy().eval()
    seen: list[int] = []

    def batches() -> Any:
        for number in range(100):
            seen.append(number)
            yield {"x": torch.randn(7, 8)}

    def rows_of(path: Path) -> int:
        return compare(model, TOY.call, [], ({"x": torch.zeros(7, 8)} for _ in range(3)), path)[0].rows

    path = keep_outputs(model, TOY.call, ["layers.0", "layers.1"], batches(), tmp_path / "kept.safetensors")
    assert rows_of(path) == blocks.MOST_ROWS
    assert len(seen) <= 4, "rows that are not kept are not asked for"
    monkeypatch.setattr(blocks, "MOST_BYTES", 5 * 3 * 8 * 4)  # five rows: the first block runs twice
    assert rows_of(keep_outputs(model, TOY.call, ["layers.0", "layers.1"], batches(), path)) == 5
    monkeypatch.setattr(blocks, "MOST_BYTES", 1)
    assert rows_of(keep_outputs(model, TOY.call, ["layers.0", "layers.1"], batches(), path)) == 1


def test_a_model_without_blocks_has_no_figures(tmp_path: Path) -> None:
    rows: Batch = {"x": torch.randn(2, 8)}
    path = keep_outputs(Toy(), TOY.call, [], [rows], tmp_path / "kept.safetensors")
    assert compare(Toy(), TOY.call, [], [rows], path) == []


def keep(path: str, *indices: int) -> Edit:
    return Edit("keep", path, config={"indices": list(indices)})


def test_paths_are_followed_through_one_renumbering_after_another() -> None:
    stage = nn.Sequential()
    stage.add_module("first", nn.ModuleList([nn.Linear(1, 1) for _ in range(3)]))
    stage.add_module("second", nn.ModuleList([nn.Linear(1, 1) for _ in range(3)]))
    model = nn.ModuleDict({"stages": stage})
    where = Whereabouts.of(model, ["stages.first.1", "stages.second.2", "stages.second.2.weight", "stages"])
    assert where.after("stages.second.2", []) == "stages.second.2"
    edits = [keep("stages.second", 0, 2), keep("stages", 1)]
    assert where.after("stages.second.2", edits) == "stages.0.1"
    assert where.after("stages.second.2.weight", edits) == "stages.0.1.weight"
    assert where.after("stages.first.1", edits) is None
    assert where.after("stages", edits) == "stages"
    assert where.after("stages.second.2", [*edits, keep("stages.0", 0)]) is None
    assert where.after("stages.second.2", [keep("stages.second", 2, 0)]) == "stages.second.0", "the order is the edit's"
