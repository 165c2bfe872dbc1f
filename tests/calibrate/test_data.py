"""Rows: what is chosen, what is batched, what makes a fingerprint, and rows that are used twice."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from calibrate.data import Rows, from_tensors, overlap, select, twins
from calibrate.errors import UserError
from calibrate.labels import class_labels, score_labels


def numbered(count: int, offset: int = 0) -> Rows:
    return from_tensors({"x": torch.arange(offset, offset + count).float().unsqueeze(1)}, torch.arange(count))


def part(rows: Rows, indices: list[int]) -> Rows:
    assert rows.labels is not None
    return Rows(rows.table, rows.encoder, indices, rows.labels[indices])


def place(row: int) -> str:
    return f"dev.tsv:{row + 1}"


def gathered(rows: Rows, size: int) -> Tensor:
    return torch.cat([batch["x"] for batch in rows.batches(size)])


@given(total=st.integers(1, 60), size=st.integers(1, 70))
def test_batches_are_the_rows_in_order_whatever_their_size(total: int, size: int) -> None:
    rows = numbered(total)
    assert torch.equal(gathered(rows, size).reshape(-1), torch.arange(total).float())
    assert [len(batch["x"]) for batch in rows.batches(size)][:-1] == [size] * ((total - 1) // size)


def test_rows_can_be_read_again_and_at_the_same_time() -> None:
    rows = numbered(10)
    first, second = rows.batches(3), rows.batches(4)
    assert next(first)["x"].reshape(-1).tolist() == [0, 1, 2]
    assert next(second)["x"].reshape(-1).tolist() == [0, 1, 2, 3]
    assert next(first)["x"].reshape(-1).tolist() == [3, 4, 5]


@given(total=st.integers(2, 200), seed=st.integers(0, 5), data=st.data())
def test_counts_are_drawn_by_seed_without_repetition_and_from_two_ends(total: int, seed: int, data: st.DataObject) -> None:
    first = data.draw(st.integers(1, total - 1))
    chosen = select(total, first, seed=seed)
    assert chosen == sorted(set(chosen)) == select(total, first, seed=seed)
    others = select(total, total - first, seed=seed, from_end=True)
    assert sorted(chosen + others) == list(range(total))


def test_selections() -> None:
    assert select(5, "all") == select(5, None) == [0, 1, 2, 3, 4]
    assert select(5, (1, 3)) == [1, 2]
    assert select(100, 10, seed=0) != select(100, 10, seed=1)


@pytest.mark.parametrize("wrong", [0, -1, 6, (0, 6), (3, 3), (4, 2), (-1, 2), "some", True])
def test_selections_that_do_not_exist_are_refused(wrong: object) -> None:
    with pytest.raises(UserError, match=r"data\.calibration\.rows: .*\n  G|A range"):
        select(5, wrong, where="data.calibration.rows")  # type: ignore[arg-type]


def test_the_fingerprint_is_that_of_content_labels_and_preprocessing() -> None:
    rows = numbered(5)
    assert rows.fingerprint == numbered(5).fingerprint
    assert rows.fingerprint != numbered(5, offset=1).fingerprint
    assert rows.fingerprint != numbered(4).fingerprint
    assert rows.labels is not None
    relabelled = from_tensors({"x": torch.arange(5.0).unsqueeze(1)}, rows.labels.flip(0))
    assert rows.fingerprint != relabelled.fingerprint
    renamed = from_tensors({"y": torch.arange(5.0).unsqueeze(1)}, rows.labels)
    assert rows.fingerprint != renamed.fingerprint
    assert rows.identities() == relabelled.identities()
    assert rows.describe()["rows"] == 5


def test_groups_keep_pairs_together() -> None:
    rows = from_tensors({"x": torch.arange(12.0).reshape(6, 2)}, torch.zeros(3), group=2)
    assert len(rows) == 3
    assert [len(batch["x"]) for batch in rows.batches(2)] == [4, 2]
    assert torch.equal(gathered(rows, 2), torch.arange(12.0).reshape(6, 2))


def test_overlap_counts_rows_with_the_same_content() -> None:
    assert overlap(numbered(10), numbered(10, offset=7)) == 3
    assert overlap(numbered(10), numbered(10, offset=10)) == 0


def test_twins_are_found_by_number_and_by_content() -> None:
    rows = numbered(10)
    assert twins(part(rows, [0, 1, 2]), part(rows, [3, 4])) == []
    assert twins(part(rows, [0, 1, 2]), part(rows, [2, 3, 4, 5])) == [2]
    assert twins(numbered(10), numbered(40, offset=8)) == [0, 1], "the same content in another table"


def test_labels_are_numbers_or_names() -> None:
    names = ["negative", "positive"]
    assert class_labels(["1", "0"], place, classes=2, names=names).tolist() == [1, 0]
    assert class_labels([1, 0], place, classes=2, names=None).tolist() == [1, 0]
    assert class_labels([1.0, 0.0], place, classes=None, names=None).tolist() == [1, 0]
    assert class_labels(["Positive", " negative"], place, classes=2, names=names).tolist() == [1, 0]
    assert class_labels(["7", "3"], place, classes=2, names=["3", "7"]).tolist() == [1, 0]


def test_the_datas_own_class_names_are_translated_to_the_models() -> None:
    names = ["cat", "dog", "owl"]
    assert class_labels([0, 1], place, classes=3, names=names, data_names=["dog", "cat"]).tolist() == [1, 0]
    assert class_labels([0, 1], place, classes=2, names=["LABEL_0", "LABEL_1"], data_names=["a", "b"]).tolist() == [0, 1]
    with pytest.raises(UserError, match="'dgo' is not one of the model's classes\n  Nearest: dog"):
        class_labels([0], place, classes=3, names=names, data_names=["dgo", "cat"])
    with pytest.raises(UserError, match="names 2 classes, the model has 3"):
        class_labels([0], place, classes=3, names=names, data_names=["x", "y"])


def test_labels_that_are_none_name_their_row() -> None:
    with pytest.raises(UserError, match=r"dev.tsv:2: label 'positve' is not one.*\n  Nearest: positive"):
        class_labels(["0", "positve"], place, classes=2, names=["negative", "positive"])
    with pytest.raises(UserError, match=r"dev.tsv:1: label '2' is not a class: the model has 2"):
        class_labels(["2"], place, classes=2, names=None)
    with pytest.raises(UserError, match=r"dev.tsv:1: label -1"):
        class_labels([-1], place, classes=None, names=None)
    with pytest.raises(UserError, match="does not name its classes"):
        class_labels(["good"], place, classes=2, names=None)
    with pytest.raises(UserError, match=r"label 0.5"):
        class_labels([0.5], place, classes=2, names=["a", "b"])


def test_scores_are_finite_numbers() -> None:
    assert score_labels(["0.5", 3], place).tolist() == [0.5, 3.0]
    for wrong in ("x", "nan", "inf", None, ""):
        with pytest.raises(UserError, match=r"dev.tsv:2: label .* is not a number"):
            score_labels([1.0, wrong], place)
