"""How many of a sorted model's units stay: the same share of every block, a share for each, or what a budget leaves."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from calibrate.errors import UserError
from compress.width.nested import Nested, SortedUnits
from compress.width.search import Group, TooSmall, choose

__all__ = ["by_budget", "by_shares", "kept_share"]

_WHERE = "extract_width"


def by_shares(nested: Nested, widths: float | Sequence[float], heads: float | Sequence[float], round_to: int) -> list[int]:
    """Units that stay of each of ``nested.units``, so many of its first ones.

    Args:
        widths: share of the neurons, of all blocks that have sorted ones or of each in turn. What stays is the nearest multiple
            of ``round_to``, or all.
        heads: the same for heads, to the nearest one.

    Raises:
        UserError: as many shares as there are no blocks, less than the least that can stay, or nothing of the kind is sorted.
    """
    shares = {"neuron": _spread(nested, "neuron", widths), "head": _spread(nested, "head", heads)}
    return [_nearest(one, shares[one.kind][one.block], round_to) for one in nested.units]


def by_budget(
    nested: Nested, *, macs: float | None, size_ratio: float | None, heads: float | Sequence[float] | None, round_to: int
) -> list[int]:
    """Units that stay of each of ``nested.units`` under a budget, chosen by their importance for what they cost.

    Args:
        macs: share of the blocks' multiply-accumulates that stays; or
        size_ratio: share of the model's bytes.
        heads: share of the heads that stays; None: heads go as neurons do.

    Raises:
        UserError: the budget is below what stays in any case.
    """
    option, ratio = ("macs", macs) if macs is not None else ("size_ratio", size_ratio)
    assert ratio is not None
    fixed = by_shares(nested, 1.0, 1.0 if heads is None else heads, round_to)
    free = [number for number, one in enumerate(nested.units) if one.kind == "neuron" or heads is None]
    costs = [one.flops if macs is not None else one.size_bytes for one in nested.units]
    whole = nested.blocks_flops if macs is not None else nested.model_bytes
    loose = whole - sum(len(one) * cost for one, cost in zip(nested.units, costs, strict=True))
    loose += sum(fixed[number] * costs[number] for number in range(len(fixed)) if number not in free)
    groups = []
    for number in free:
        one = nested.units[number]
        step = _step(one, round_to)
        groups.append(Group(torch.tensor(one.importance, dtype=torch.float64), costs[number], step, least=step))
    try:
        gone = choose(groups, loose, ratio * whole)
    except TooSmall as error:
        what = f"{option} {ratio:g} is less than what stays in any case, {error.least / whole:.4f}"
        hint = f"Ask for {math.ceil(error.least / whole * 1e4) / 1e4:g} or more"
        raise UserError(_WHERE, what, f"{hint}{', or let heads go too' if heads is not None else ''}.") from None
    for number, numbers in zip(free, gone, strict=True):
        fixed[number] = len(nested.units[number]) - len(numbers)
    return fixed


def kept_share(nested: Nested, kept: Sequence[int], *, macs: bool) -> float:
    """Share of the blocks' FLOPs, or of the model's bytes, that is left."""
    whole = nested.blocks_flops if macs else nested.model_bytes
    gone = [(len(one) - stay) * (one.flops if macs else one.size_bytes) for one, stay in zip(nested.units, kept, strict=True)]
    return 1 - sum(gone) / whole


def _spread(nested: Nested, kind: str, shares: float | Sequence[float]) -> dict[int, float]:
    """The share of each block that has sorted units of the kind."""
    option = "heads" if kind == "head" else "width" if isinstance(shares, (int, float)) else "widths"
    blocks = [one.block for one in nested.units if one.kind == kind]
    if isinstance(shares, (int, float)):
        if not blocks and shares != 1:
            why = next((f"{path}: {reason}." for path, reason in nested.skipped.items() if kind in path), None)
            hint = why or f"Run the recipe again with nest_widths: {{heads: true}}, or leave {option} out."
            raise UserError(_WHERE, f"{option} {shares:g}: the run sorted no {kind}s", hint)
        return dict.fromkeys(blocks, float(shares))
    if len(shares) != len(blocks):
        what = f"{option} has {len(shares)} numbers, and {len(blocks)} blocks have sorted {kind}s"
        raise UserError(_WHERE, what, f"Give {len(blocks)}, first block first (blocks {', '.join(map(str, blocks))}).")
    return dict(zip(blocks, map(float, shares), strict=True))


def _nearest(units: SortedUnits, share: float, round_to: int) -> int:
    count, step = len(units), _step(units, round_to)
    if share * count < step * (1 - 1e-9):
        least = math.ceil(step / count * 1e4) / 1e4
        noun = f"{step} {units.kind}s" if step > 1 else f"one {'group of heads' if units.heads > 1 else units.kind}"
        option = "heads" if units.kind == "head" else "width"
        what = f"{option} {share:g} leaves less than {noun} of the {count} in block {units.block}"
        finer = f", or a round_to below {step}" if step > 1 else ""
        raise UserError(_WHERE, what, f"Ask for {least:g} or more{finer}.")
    return count if share == 1 else min(count, math.floor(share * count / step + 0.5) * step)


def _step(units: SortedUnits, round_to: int) -> int:
    return min(round_to, len(units)) if units.kind == "neuron" else 1
