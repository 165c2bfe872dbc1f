"""npz files: read row by row, whatever their compression; nothing is unpickled."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch

from calibrate.arrays import ArrayEncoder, Npz
from calibrate.data import Rows
from calibrate.errors import UserError


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("indices", [[0], [2, 3, 7], list(range(9)), [8]])
def test_rows_come_back(tmp_path: Path, save: object, indices: list[int]) -> None:
    x, ids = np.random.default_rng(0).normal(size=(9, 3, 2)), np.arange(18, dtype=np.int32).reshape(9, 2)
    save(tmp_path / "a.npz", x=x, ids=ids, labels=np.arange(9) % 3)  # type: ignore[operator]
    table = Npz(tmp_path / "a.npz", "a.npz", ["x", "ids"])
    rows = Rows(table, ArrayEncoder({"x": torch.float32, "ids": torch.int64}), indices)
    batches = list(rows.batches(2))
    assert torch.equal(torch.cat([batch["x"] for batch in batches]), torch.from_numpy(x[indices]).float())
    assert torch.equal(torch.cat([batch["ids"] for batch in batches]), torch.from_numpy(ids[indices]).long())
    assert list(table.label_values() or []) == [0, 1, 2] * 3


def test_labels_may_be_absent_or_called_otherwise(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.zeros((4, 2)), y=np.arange(4))
    assert Npz(tmp_path / "a.npz", "a.npz", ["x"]).label_values() is None
    assert Npz(tmp_path / "a.npz", "a.npz", ["x"], "y").label_values() == [0, 1, 2, 3]


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.zeros((4000, 1000), np.float32))  # 16 MB
    table = Npz(tmp_path / "a.npz", "a.npz", ["x"])
    rows = Rows(table, ArrayEncoder({"x": torch.float32}), range(0, 4000, 40))
    tracemalloc.start()
    for _ in rows.batches(4):
        pass
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2e6


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_is_refused_with_its_number(tmp_path: Path, bad: float) -> None:
    x = np.zeros((6, 2, 3), np.float32)
    x[4, 1, 2] = bad
    np.savez(tmp_path / "a.npz", x=x, n=np.arange(6))
    rows = Rows(Npz(tmp_path / "a.npz", "a.npz", ["n", "x"]), ArrayEncoder({"n": torch.int64, "x": torch.float32}), range(1, 6))
    with pytest.raises(UserError, match=r"^a.npz: row 4: the array x holds NaN or infinity"):
        list(rows.batches(8))
    assert len(list(Rows(rows.table, rows.encoder, [0, 1, 2, 3, 5]).batches(2))) == 3


def test_errors(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    np.savez(path, x=np.zeros((4, 2)), short=np.zeros((3, 2)), scalar=np.zeros(()), fortran=np.zeros((4, 3), order="F"))
    with pytest.raises(UserError, match="no column 'xx'\n  Nearest: x"):
        Npz(path, "a.npz", ["xx"])
    with pytest.raises(UserError, match="different numbers of rows: x 4, short 3"):
        Npz(path, "a.npz", ["x", "short"])
    with pytest.raises(UserError, match="different numbers of rows"):
        Npz(path, "a.npz", ["scalar"])
    with pytest.raises(UserError, match="column by column"):
        Npz(path, "a.npz", ["fortran"])
    np.savez(path, x=np.array([{"a": 1}], dtype=object))
    with pytest.raises(UserError, match="pickled objects"):
        Npz(path, "a.npz", ["x"])
    np.savez(path, x=np.zeros((0, 2)))
    with pytest.raises(UserError, match="has no rows"):
        Npz(path, "a.npz", ["x"])
    path.write_bytes(b"PK nothing")
    with pytest.raises(UserError, match="is not an npz file"):
        Npz(path, "a.npz", ["x"])
