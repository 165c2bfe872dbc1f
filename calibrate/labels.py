"""Labels as a file has them to the class numbers of a model, or to scores."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from calibrate.errors import UserError

__all__ = ["class_labels", "score_labels"]


def score_labels(values: Sequence[Any], place: Callable[[int], str]) -> Tensor:
    """Labels as float32 scores [rows] (regression, similarity).

    Args:
        values: one a row, numbers or their text.
        place: where row i of ``values`` lies, for messages.

    Raises:
        UserError: a label is not a finite number.
    """
    scores = []
    for row, value in enumerate(values):
        try:
            score = float(value)
        except (TypeError, ValueError):
            score = math.nan
        if not math.isfinite(score):
            raise UserError(place(row), f"label {value!r} is not a number", "Scores are finite numbers such as 3.25.")
        scores.append(score)
    return torch.tensor(scores, dtype=torch.float32)


def class_labels(
    values: Sequence[Any],
    place: Callable[[int], str],
    *,
    classes: int | None,
    names: Sequence[str] | None,
    data_names: Sequence[str] | None = None,
) -> Tensor:
    """Labels as int64 class numbers [rows].

    Text is looked up among the model's class names; numbers are class numbers. Where the data names its own classes
    (``data_names``: folders, or the list in a parquet file) numbers count those, and are translated by name if the
    model knows all of them; if it knows none, the data's order is taken to be the model's.

    Args:
        values: one a row.
        place: where row i of ``values`` lies, for messages.
        classes: how many classes the model has, if known.
        names: the model's class names in order, if it has any.

    Raises:
        UserError: a label is no class of the model's; names the nearest.
    """
    translated = _translation(data_names, names, classes, place) if data_names is not None else None
    known = {_plain(name): number for number, name in enumerate(names or ())}
    found = []
    for row, value in enumerate(values):
        number = known.get(_plain(value)) if isinstance(value, str) else None
        if number is None:
            number = _number(value)
        if number is None:
            raise _unknown(place(row), value, names)
        if translated is not None:
            number = translated[number] if 0 <= number < len(translated) else -1
        if number < 0 or (classes is not None and number >= classes):
            what = f"label {value!r} is not a class" + (f": the model has {classes}" if classes is not None else "")
            raise UserError(place(row), what, "Classes are numbered from 0, in the model's order.")
        found.append(number)
    return torch.tensor(found, dtype=torch.int64)


def _translation(
    data_names: Sequence[str], names: Sequence[str] | None, classes: int | None, place: Callable[[int], str]
) -> list[int]:
    """The model's class number of each of the data's classes."""
    known = {_plain(name): number for number, name in enumerate(names or ())}
    matches = [known.get(_plain(name)) for name in data_names]
    if all(match is not None for match in matches):
        return [match for match in matches if match is not None]
    if any(match is not None for match in matches):
        stranger = data_names[matches.index(None)]
        raise _unknown(place(0).rpartition(":")[0] or place(0), stranger, names)
    if classes is not None and len(data_names) != classes:
        what = f"names {len(data_names)} classes, the model has {classes}, and no name is the same"
        hint = f"Call them as the model does: {', '.join(list(names)[:6])} ..." if names else "Give one folder for each class."
        raise UserError(place(0).rpartition(":")[0] or place(0), what, hint)
    return list(range(len(data_names)))


def _number(value: Any) -> int | None:
    if isinstance(value, bool):
        return int(value)
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return int(number) if math.isfinite(number) and number == int(number) else None


def _plain(name: Any) -> str:
    return str(name).strip().casefold()


def _unknown(where: str, value: Any, names: Sequence[str] | None) -> UserError:
    if not names:
        return UserError(where, f"label {value!r} is text, and the model does not name its classes", "Give class numbers from 0.")
    near = difflib.get_close_matches(str(value), [str(name) for name in names], n=3, cutoff=0.4)
    hint = f"Nearest: {', '.join(near)}." if near else f"The model's classes: {', '.join(list(names)[:12])}."
    return UserError(where, f"label {value!r} is not one of the model's classes", hint)
