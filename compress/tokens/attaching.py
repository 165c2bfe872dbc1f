"""Puts the layers on a model that take its tokens out, and tries whether it then runs."""

from __future__ import annotations

import torch
from torch import nn

from calibrate.errors import UserError
from calibrate.modes import evaluating
from compress.anatomy import Anatomy
from compress.layers import TokenIds, TokenReducer
from compress.layers.token_reducer import Place
from compress.rehearsal import stand_in
from compress.surgery import Surgery
from compress.tokens.layout import Layout
from compress.tokens.schedule import How, Schedule

__all__ = ["attach", "place_of", "touched"]


def touched(layout: Layout, schedule: Schedule, how: How) -> dict[int, int | None]:
    """By number: the blocks that something is put on, and how many tokens they hand on (None: what they get)."""
    keep = {number: kept for number, kept in schedule.keep.items() if _shortens(layout, schedule, number)}
    if not keep and not schedule.enter:
        return {}
    first = layout.numbers[0] if schedule.enter else next(number for number in layout.numbers if number in keep)
    return {number: keep.get(number) for number in layout.numbers[layout.numbers.index(first) :]}


def _shortens(layout: Layout, schedule: Schedule, number: int) -> bool:
    given, then = schedule.after(layout)[layout.numbers.index(number)]
    return then < given


def attach(model: nn.Module, surgery: Surgery, layout: Layout, schedule: Schedule, how: How, place: Place) -> None:
    """Records and does it; ``schedule`` has been checked."""
    stations = touched(layout, schedule, how)
    if how.separators and stations:
        surgery.attach(model, layout.ids, TokenIds())
    last = list(stations)[-1] if stations else -1
    blocks = {block.index: block for block in layout.blocks}
    for place_in_order, (number, kept) in enumerate(stations.items()):
        options = dict(how.options)
        if how.votes and kept is not None:
            options["votes"] = how.votes[number]
        reducer = TokenReducer(
            layout.numbers.index(number),
            kept,
            how.method,
            prefix=how.prefix,
            place=place,
            proportional=how.proportional and how.merges,
            masked=layout.masked,
            causal=layout.causal,
            traced=layout.reads_all,
            restores=layout.reads_all and number == last,
            last=number == last,
            enter=schedule.enter if not place_in_order else None,
            separators=list(how.separators),
            seed=how.seed * 1009 + number,
            **options,
        )
        surgery.attach(model, blocks[number].path, reducer)


def place_of(where: str, model: nn.Module, anatomy: Anatomy, layout: Layout, how: How) -> Place:
    """Where tokens leave so that the model runs: where the attention joins the stream, or after the block.

    Every block loses one token in the trial.

    Raises:
        UserError: it runs with neither.
    """
    signature, example = anatomy.traced
    least = max(how.prefix + 1, 2)
    keep = {number: max(layout.tokens - count, least) for count, number in enumerate(layout.numbers, start=1)}
    failure = ""
    places: tuple[Place, ...] = ("attention", "block")
    for place in places:
        trial = stand_in(model)
        attach(trial, Surgery(), layout, Schedule(keep), how, place)
        try:
            with torch.no_grad(), evaluating(trial):
                output = signature.call(trial, example)
        except Exception as error:  # whatever a foreign forward raises when there are fewer tokens
            failure = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
            continue
        if bool(output.isfinite().all()):
            return place
        failure = "its outputs are not finite"
    raise UserError(where, f"the model does not run with fewer tokens: {failure}", "Tokens cannot leave this model.")
