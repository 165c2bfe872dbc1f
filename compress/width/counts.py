"""How many heads and neurons stay, block by block: as the option ``stay`` of ``prune_width`` counts them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from calibrate.errors import UserError
from compress.width.units import Units

__all__ = ["Counts", "counted", "numbered"]

Counts = dict[str, list[int | None]]
"""Under ``heads`` and ``neurons`` a number for each block; None where no unit can go."""


def counted(
    stay: Mapping[Literal["heads", "neurons"], Sequence[int | None]], units: Sequence[Units], blocks: int, where: str
) -> list[int]:
    """How many of each of ``units`` go; all stay of a kind that is not named.

    Raises:
        UserError: there are other numbers of blocks or units; ``where`` names the pass.
    """
    there = {(one.block, f"{one.kind}s"): len(one) for one in units}
    gone = dict.fromkeys(there, 0)
    for name, numbers in stay.items():
        if len(numbers) != blocks:
            what = f"stay: {len(numbers)} numbers of {name} for {blocks} blocks"
            raise UserError(where, what, "Give one a block, null where none can go.")
        for block, number in enumerate(numbers):
            if number is None:
                continue
            have = there.get((block, name))
            if have is None:
                raise UserError(where, f"stay: no {name} can go from block {block}", f"Write null for it among {name}.")
            if number > have:
                raise UserError(where, f"stay: block {block} has {have} {name}, not {number}", f"Write {have} or less.")
            gone[block, name] = have - number
    return list(gone.values())


def numbered(units: Sequence[Units], gone: Sequence[Sequence[int]], blocks: int) -> Counts:
    """How many units of each block stay."""
    stay: Counts = {}
    for one, numbers in zip(units, gone, strict=True):
        stay.setdefault(f"{one.kind}s", [None] * blocks)[one.block] = len(one) - len(numbers)
    return stay
