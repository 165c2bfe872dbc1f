"""Pictures of the tokens that were left: images as mosaics of their patches, text as words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from compress.tokens.pictures import grid

__all__ = ["Mosaic", "Patch", "Stage", "Word", "token_pictures"]


@dataclass(frozen=True)
class Patch:
    """A rectangle of one colour; ``gone``: its token is no longer there."""

    x: float
    y: float
    width: float
    height: float
    colour: str
    gone: bool = False


@dataclass(frozen=True)
class Word:
    """A token of text: ``size`` is how many tokens its group has, 0 where it is gone; ``group`` its number."""

    text: str
    size: int
    group: int


@dataclass(frozen=True)
class Stage:
    """What was left after one block; of an image ``patches``, of text ``words``."""

    heading: str
    says: str
    patches: tuple[Patch, ...] = ()
    words: tuple[Word, ...] = ()


@dataclass(frozen=True)
class Mosaic:
    """One row of the data at every block that took tokens out; ``ratio``: height over width of an image."""

    stages: tuple[Stage, ...]
    ratio: float = 1.0


def token_pictures(told: Sequence[Mapping[str, Any]], protected: int, words: Mapping[int, str]) -> tuple[Mosaic, ...]:
    """What a pass reported under ``pictures``, as shapes; rows that are neither images nor text are left out.

    Args:
        protected: tokens at the start that are no patches.
        words: of token ids.
    """
    found = []
    for one in told:
        mosaic = _image(one, protected) if "pixels" in one else _text(one, words) if "ids" in one else None
        if mosaic is not None:
            found.append(mosaic)
    return tuple(found)


def _image(told: Mapping[str, Any], protected: int) -> Mosaic | None:
    height, width, stages = int(told["height"]), int(told["width"]), told["stages"]
    pixels = [tuple(int(told["pixels"][at + k : at + k + 2], 16) for k in (0, 2, 4)) for at in range(0, 6 * height * width, 6)]
    if not stages:
        return None
    patches = len(stages[0]["groups"]) - protected
    rows, columns = grid(patches, height, width)
    if not rows:
        return None
    whole = tuple(Patch(x, y, 1, 1, _hex(pixels[y * width + x])) for y in range(height) for x in range(width))
    drawn = [Stage("image", f"the image, {rows} by {columns} patches", whole)]
    means = [_mean(pixels, height, width, rows, columns, number) for number in range(patches)]
    for stage in stages:
        groups = stage["groups"][protected:]
        shapes = []
        for number, group in enumerate(groups):
            like = [means[other] for other, same in enumerate(groups) if same == group]
            colour = _hex(tuple(sum(channel) // len(like) for channel in zip(*like, strict=True)))
            x, y = number % columns * width / columns, number // columns * height / rows
            shapes.append(Patch(x, y, width / columns, height / rows, colour, group < 0))
        left = len(set(groups) - {-1})
        drawn.append(Stage(f"block {stage['block']}", f"{left} of {patches} patches are left", tuple(shapes)))
    return Mosaic(tuple(drawn), height / width)


def _mean(pixels: Sequence[tuple[int, ...]], height: int, width: int, rows: int, columns: int, number: int) -> tuple[int, ...]:
    top, left = number // columns * height // rows, number % columns * width // columns
    bottom = max((number // columns + 1) * height // rows, top + 1)
    right = max((number % columns + 1) * width // columns, left + 1)
    inside = [pixels[y * width + x] for y in range(top, min(bottom, height)) for x in range(left, min(right, width))]
    return tuple(sum(channel) // len(inside) for channel in zip(*inside, strict=True))


def _hex(colour: tuple[int, ...]) -> str:
    return "#" + "".join(f"{value:02x}" for value in colour)


def _text(told: Mapping[str, Any], words: Mapping[int, str]) -> Mosaic:
    names = [words.get(number, str(number)) for number in told["ids"]]
    drawn = []
    for stage in told["stages"]:
        groups = stage["groups"]
        shown = tuple(
            Word(name, 0 if group < 0 else groups.count(group), group)
            for name, group in zip(names, groups, strict=True)
            if name != "[PAD]" and name != "<pad>"
        )
        left = len(set(groups) - {-1})
        real = int(told.get("real", len(groups)))
        drawn.append(Stage(f"block {stage['block']}", f"{left} of {real} words are left", words=shown))
    return Mosaic(tuple(drawn))
