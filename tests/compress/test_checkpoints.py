"""What is read back from a checkpoint is the model that was written, and what goes on is what was read back."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from calibrate.fidelity import sqnr_db
from calibrate.signature import Signature, TensorSpec
from compress.checkpoints import Checkpoints
from compress.saved import restore, save
from compress.sources import load_model
from compress.surgery import Surgery

SIGNATURE = Signature((TensorSpec("ids", torch.int64, ("batch", 5)),), "tensor", "logits")


class Tied(nn.Module):
    """A table that is the head too, a weight stored in columns, a buffer that is in no file, and one that is a view."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.head = nn.Embedding(11, 6), nn.Linear(6, 11, bias=False)
        self.blocks = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.head.weight = self.table.weight
        self.blocks[0].weight = nn.Parameter(self.blocks[0].weight.detach().t())
        self.register_buffer("shift", torch.full((6,), 0.25), persistent=False)
        self.register_buffer("positions", torch.arange(5).expand(1, -1))
        self.eval().requires_grad_(False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids) + self.shift + self.positions[..., None] / 10
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        return self.head(x)  # type: ignore[no-any-return]


def checkpoints(folder: Path) -> Checkpoints:
    source: Any = SimpleNamespace(rebuild={"kind": "none"}, signature=SIGNATURE)
    return Checkpoints(folder, source, Tied)


IDS = torch.randint(0, 11, (4, 5), generator=torch.Generator().manual_seed(1))


def test_what_goes_on_and_what_is_restored_are_the_same(tmp_path: Path) -> None:
    kept = checkpoints(tmp_path)
    subject = kept.restore(0)
    subject.surgery.keep(subject.model, "blocks", [0, 2])
    expected = subject.model(IDS)
    kept.keep(subject, 1)
    again = kept.restore(1)
    assert again.surgery.edits == subject.surgery.edits
    assert sqnr_db(expected, subject.model(IDS)) > 120, "only the order of additions may have changed"
    assert torch.equal(again.model(IDS), subject.model(IDS))
    for model in (subject.model, again.model):
        assert model.head.weight is model.table.weight
        assert torch.equal(model.shift, torch.full((6,), 0.25))
    for name, tensor in again.model.state_dict().items():
        other = subject.model.state_dict()[name]
        assert torch.equal(tensor, other)
        assert tensor.stride() == other.stride()
        assert tensor.is_contiguous()
        assert tensor.data_ptr() % 64 == other.data_ptr() % 64, "kernels may add in another order at another alignment"


def test_a_checkpoint_holds_what_the_pass_left_and_not_the_float_model(tmp_path: Path) -> None:
    kept = checkpoints(tmp_path)
    subject = kept.restore(0)
    subject.model.blocks[1].weight += 1
    kept.keep(subject, 1)
    assert not torch.equal(kept.restore(1).model(IDS), Tied()(IDS))
    assert torch.equal(kept.restore(0).model(IDS), Tied()(IDS))


def test_only_the_checkpoint_that_is_needed_stays(tmp_path: Path) -> None:
    kept = checkpoints(tmp_path)
    subject = kept.restore(0)
    for number in (1, 2, 3):
        kept.keep(subject, number)
    (tmp_path / "pass-notes.json").write_text("{}")
    kept.forget(but=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pass-2", "pass-notes.json"]
    assert torch.equal(subject.model(IDS), kept.restore(2).model(IDS)), "the tensors outlive the file that they came from"


def test_views_of_one_memory_with_other_strides_are_not_tied(tmp_path: Path) -> None:
    class Square(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            first = torch.arange(9.0).reshape(3, 3)
            self.register_buffer("first", first)
            self.register_buffer("second", first.t())

    model = Square()
    save(model, [], {"kind": "none"}, SIGNATURE, tmp_path)
    other = Square()
    other.first.zero_()
    restore(other, tmp_path)
    assert torch.equal(other.second, model.second)


def test_the_file_is_the_same_bytes_each_time(tmp_path: Path) -> None:
    source = load_model("embedded:digits-vit", base=tmp_path)
    written = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        written.append(save(source.model, Surgery().edits, source.rebuild, source.signature, tmp_path / name).read_bytes())
    assert written[0] == written[1]
    header = int.from_bytes(written[0][:8], "little")
    assert written[0][8 : 8 + header].count(b"__metadata__") == 1


@pytest.mark.parametrize("missing", ["positions", "blocks.1.bias"])
def test_a_checkpoint_of_another_model_is_not_loaded(tmp_path: Path, missing: str) -> None:
    class Other(Tied):
        def __init__(self) -> None:
            super().__init__()
            holder, _, name = missing.rpartition(".")
            setattr(self.get_submodule(holder), name, None)

    save(Other(), [], {"kind": "none"}, SIGNATURE, tmp_path)
    with pytest.raises(RuntimeError, match=missing.rpartition(".")[2]):
        restore(Tied(), tmp_path)
