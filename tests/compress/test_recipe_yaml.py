"""The YAML reader below recipes: scalars of YAML 1.2, places, and everything that it refuses."""

from __future__ import annotations

import time

import pytest

from compress.yaml_positions import parse

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(9)
)


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("1e-3", 0.001),
        ("no", "no"),
        ("Yes", "Yes"),
        ("true", True),
        ("FALSE", False),
        ("~", None),
        ("null", None),
        ("", None),
        ("''", ""),
        ("0o17", 15),
        ("0x1F", 31),
        ("017", 17),
        ("-3", -3),
        ("+4", 4),
        (".5", 0.5),
        ("5.", 5.0),
        ("12:30", "12:30"),
        ("2020-01-01", "2020-01-01"),
        ("1_000", "1_000"),
        ("0-127", "0-127"),
        ("'8'", "8"),
        ('"8"', "8"),
        ("|-\n  8", "8"),
        ("[1, 'a', [b]]", [1, "a", ["b"]]),
        ("{b: {c: 1}}", {"b": {"c": 1}}),
    ],
)
def test_scalars_are_those_of_yaml_1_2(written: str, value: object) -> None:
    document = parse(f"a: {written}\n")
    assert document.faults == []
    assert document.root is not None
    data = document.root.data()
    assert isinstance(data, dict)
    assert data["a"] == value
    assert type(data["a"]) is type(value)


@pytest.mark.parametrize(
    ("text", "place", "what"),
    [
        ("", (1, 1), "empty"),
        ("# only a comment\n", (1, 1), "empty"),
        ("---\n...\n", (1, 1), "empty"),
        ("a: 1\na: 2\n", (2, 1), "'a' appears twice"),
        ("a: {b: 1, c: 2, b: 3}\n", (1, 17), "'b' appears twice"),
        ("a:\n\tb: 1\n", (2, 1), "tab"),
        ("a: [1,\n", (2, 1), "not valid YAML"),
        ("a: 'x\n", (2, 1), "not valid YAML"),
        ("a: b: c\n", (1, 5), "not valid YAML"),
        ("a: 1\n b: 2\n", (2, 3), "not valid YAML"),
        ("a: @x\n", (1, 4), "not valid YAML"),
        ("a: 1\n---\nb: 2\n", (2, 1), "a second document"),
        ("a: &x 1\nb: *x\n", (2, 4), "alias *x"),
        ("a: &x 1\n*x : 2\n", (2, 1), "alias *x"),
        ("a: !!python/object/apply:os.system [x]\n", (1, 4), "tag"),
        ("a: !own 1\n", (1, 4), "tag"),
        ("a: .inf\n", (1, 4), "not a finite number"),
        ("a: 1e999\n", (1, 4), "not a finite number"),
        (f"a: {'9' * 5000}\n", (1, 4), "not a finite number"),
        ("1.5: 2\n", (1, 1), "not text"),
        ("0x1: 2\n", (1, 1), "not text"),
        ("null: 2\n", (1, 1), "not text"),
        ("? [a]\n: b\n", (1, 3), "a key must be text"),
        ("[" * 100_000, (1, 25), "nested deeper"),
        ("- " * 1000, (1, 49), "nested deeper"),
        ("a: x\0y\n", (1, 5), "U+0000"),
        ("a: \ud800\n", (1, 4), "U+D800"),
        ('a: "\\ud800"\n', (1, 4), "U+D800"),
        ('a: "x\\0"\n', (1, 4), "U+0000"),
        ("%YAML 9.9\n---\na: 1\n", (1, 1), "not valid YAML"),
    ],
)
def test_refused_with_its_place(text: str, place: tuple[int, int], what: str) -> None:
    faults = parse(text).faults
    assert [(fault.line, fault.column) for fault in faults] == [place]
    assert what in faults[0].what
    assert faults[0].hint


def test_aliases_do_not_expand() -> None:
    started = time.perf_counter()
    document = parse(BOMB)
    assert time.perf_counter() - started < 5
    assert len(document.faults) == 81
    assert all("alias" in fault.what for fault in document.faults)


def test_whole_numbers_are_keys_and_the_same_number_twice_is_one_too_many() -> None:
    document = parse("keep: {0: 33, -1: 20}\n")
    assert not document.faults
    assert document.root is not None
    assert document.root.data() == {"keep": {"0": 33, "-1": 20}}
    (fault,) = parse("keep: {0: 33, '0': 20}\n").faults
    assert "'0' appears twice" in fault.what


def test_places_of_keys_and_values() -> None:
    document = parse("a:\n  - b: 1\n    c: [2, 3]\n  - x\n")
    assert document.place(["a"]) == (2, 3)
    assert document.place(["a"], key=True) == (1, 1)
    assert document.place(["a", 0, "c"], key=True) == (3, 5)
    assert document.place(["a", 0, "c", 1]) == (3, 12)
    assert document.place(["a", 1]) == (4, 5)
    assert document.place([]) == (1, 1)
    assert document.resolve(["a", "union-member", 0, "absent", "b"]) == ("a", 0, "b")
