"""Text files: every format gives the same rows; lines that cannot be read are named."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from calibrate.data import Rows, Table
from calibrate.errors import UserError
from calibrate.signature import Batch
from calibrate.text import Delimited, JsonLines, TextEncoder, WindowEncoder, Windows

ROWS = [("plain words", "0"), ('with, comma and "quotes"', "1"), ("ünïcode – dash", "0"), ("two\nlines", "1")]


def letters(texts: Sequence[str], pairs: Sequence[str] | None = None, *, tokens: int) -> tuple[Batch, list[bool]]:
    """A tokenizer for tests: one token a letter, a pair joined by 1."""
    joined = texts if pairs is None else [f"{a}\x01{b}" for a, b in zip(texts, pairs, strict=True)]
    ids = torch.zeros(len(joined), tokens, dtype=torch.int64)
    for row, text in enumerate(joined):
        codes = [ord(letter) for letter in text][:tokens]
        ids[row, : len(codes)] = torch.tensor(codes)
    return {"input_ids": ids, "attention_mask": (ids > 0).long()}, [len(text) > tokens for text in joined]


def ids_of(text: str) -> list[int]:
    return [ord(letter) for letter in text]


def written(folder: Path, kind: str, header: bool = True) -> Path:
    path = folder / f"rows.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps({"id": 3, "text": a, "label": b}) + "\n" for a, b in ROWS))
        return path
    rows = [(a, b) if kind == "csv" else (a.replace("\n", " "), b) for a, b in ROWS]
    with path.open("w", newline="") as file:
        if kind == "csv":
            csv.writer(file).writerows([("text", "label"), *rows] if header else rows)
        else:
            file.write("".join(f"{a}\t{b}\n" for a, b in ([("text", "label")] if header else []) + rows))
    return path


def opened(path: Path, cells: Sequence[str | int], label: str | int | None, header: bool = True) -> Table:
    if path.suffix == ".jsonl":
        return JsonLines(path, path.name, cells, label)
    return Delimited(path, path.name, cells, label, header)


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl"])
def test_every_format_gives_back_what_was_written(tmp_path: Path, kind: str) -> None:
    table = opened(written(tmp_path, kind), ["text"], "label")
    expected = [(a.replace("\n", " ") if kind == "tsv" else a,) for a, _ in ROWS]
    assert len(table) == 4
    assert list(table.items(range(4))) == expected
    assert list(table.items([1, 3])) == [expected[1], expected[3]]
    assert list(table.label_values() or []) == ["0", "1", "0", "1"]


@pytest.mark.parametrize("kind", ["csv", "tsv"])
def test_positions_without_header(tmp_path: Path, kind: str) -> None:
    table = opened(written(tmp_path, kind, header=False), [0], 1, header=False)
    assert len(table) == 4
    assert next(table.items([0])) == ("plain words",)


def test_a_byte_order_mark_and_empty_lines_are_no_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes("\ufefftext,label\r\n\r\nhello,1\r\n\r\n".encode())
    table = Delimited(path, "a.csv", ["text"], "label")
    assert list(table.items([0])) == [("hello",)]
    assert table.place(0) == "a.csv:3"


def test_tabs_keep_quotes_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    path.write_text('"quoted\t1\nun"closed\t0\n')
    table = Delimited(path, "a.tsv", [0], 1, header=False)
    assert list(table.items([0, 1])) == [('"quoted',), ('un"closed',)]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.csv", "text,lable\nx,1\n", r"a.csv:1: there is no column 'label'\n  Nearest: lable"),
        ("a.csv", "a film,1\nx,1\n", r"a.csv:1: there is no column 'text'\n  The first line looks like a row .*header: false"),
        ("a.csv", "text,label\nx,1\ny\n", r"a.csv:3: has 1 cells, the first line has 2"),
        ("a.csv", "text,label\nx,y,1\n", r"a.csv:2: has 3 cells"),
        ("a.csv", 'text,label\n"x,1\n', r"a.csv:2: is not valid csv"),
        ("a.csv", "text,label\n", r"a.csv: has no rows"),
        ("a.csv", "", r"a.csv: has no rows"),
        ("a.tsv", "text,label\n", r"a.tsv:1: there is no column 'text'"),
        ("a.jsonl", '{"text": "x", "label": 1}\n{"text": 1}\n', r"a.jsonl:2: there is no column 'label'"),
        ("a.jsonl", '{"text": "x", "label": 1}\n{"text\n', r"a.jsonl:2: is not JSON"),
        ("a.jsonl", "[1]\n", r"a.jsonl:1: is not a JSON object"),
        ("a.jsonl", '{"text": 3, "label": 1}\n', r"a.jsonl:1: text is int, not text"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, name: str, content: str, says: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=says):
        opened(tmp_path / name, ["text"], "label")


def test_bytes_that_are_no_utf8_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_bytes(b"good\t1\nb\xe4d\t0\n")
    with pytest.raises(UserError, match=r"a.tsv:2: is not UTF-8"):
        Delimited(tmp_path / "a.tsv", "a.tsv", [0], 1, header=False)


def test_a_file_without_header_is_not_read_as_one_with(tmp_path: Path) -> None:
    path = written(tmp_path, "tsv", header=False)
    with pytest.raises(UserError, match=r"looks like a row.*\n  Give header: false"):
        Delimited(path, "a.tsv", [0], 1, header=True)
    with pytest.raises(UserError, match="read without header"):
        Delimited(path, "a.tsv", ["text"], None, header=False)
    with pytest.raises(UserError, match="has 2 columns, there is no column 2"):
        Delimited(path, "a.tsv", [2], None, header=False)


def test_truncated_rows_are_counted(tmp_path: Path) -> None:
    table = opened(written(tmp_path, "csv"), ["text"], "label")
    encoder = TextEncoder(letters, ["input_ids", "attention_mask"], 12)
    rows = Rows(table, encoder, range(4))
    for _ in range(2):
        batches = list(rows.batches(3))
    assert [tuple(batch["input_ids"].shape) for batch in batches] == [(3, 12), (1, 12)]
    assert rows.describe()["truncated"] == {"rows": 2, "of": 4}
    assert rows.describe()["preprocessing"]["tokens"] == 12


def test_pairs_are_one_input_or_two(tmp_path: Path) -> None:
    path = tmp_path / "pairs.csv"
    path.write_text("ab,cd,5.0\nef,gh,0.5\n")
    table = Delimited(path, "pairs.csv", [0, 1], 2, header=False)
    joint = next(Rows(table, TextEncoder(letters, ["input_ids"], 6, "joint"), range(2)).batches(2))["input_ids"]
    assert joint[0].tolist() == [*map(ord, "ab\x01cd"), 0]
    rows = Rows(table, TextEncoder(letters, ["input_ids"], 3, "separate"), range(2))
    separate = next(rows.batches(2))["input_ids"]
    assert rows.group == 2
    assert ["".join(map(chr, row[:2])) for row in separate.tolist()] == ["ab", "cd", "ef", "gh"]


def test_running_text_is_cut_in_windows(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("abcdefgh\nij\n")
    table = Windows(path, "a.txt", ids_of, 5)
    assert len(table) == 2
    batch = next(Rows(table, WindowEncoder(["input_ids", "attention_mask"]), range(2)).batches(2))
    assert "".join(map(chr, batch["input_ids"].reshape(-1).tolist())) == "abcdefgh\ni"
    assert batch["attention_mask"].min() == 1
    assert table.describe() == {"windows": {"tokens": 5, "tokens_dropped_at_the_end": 2}}
    with pytest.raises(UserError, match="has 12 tokens, a row needs 64"):
        Windows(path, "a.txt", ids_of, 64)


def test_long_running_text_is_tokenized_in_pieces_that_end_with_a_line(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("".join(f"{number:07d}\n" for number in range(300_000)))
    sizes: list[int] = []

    def counting(text: str) -> list[int]:
        assert text.endswith("\n")
        sizes.append(len(text))
        return [0] * (len(text) // 8)

    assert len(Windows(path, "a.txt", counting, 100)) == 3000
    assert len(sizes) > 1
    assert max(sizes) < 1.1 * 2**20
