"""How many tokens each block hands on, and what that costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from calibrate.errors import UserError
from compress.anatomy import Anatomy, Block
from compress.layers.token_reducer import Method, prunes
from compress.tokens.layout import Layout

__all__ = ["Cost", "How", "Schedule", "block_costs", "check", "from_reduce", "shares"]


@dataclass(frozen=True)
class How:
    """How tokens are chosen and what is protected.

    Attributes:
        method: of ``TokenReducer``.
        prefix: tokens at the start that stay.
        options: of the method.
        votes: of ``zero_tprune``, by the number of the block.
        separators: ids whose tokens stay.
        proportional: whether attention counts merged tokens by their size.
        seed: of random choices.
    """

    method: Method
    prefix: int
    options: dict[str, Any]
    separators: tuple[int, ...] = ()
    proportional: bool = True
    votes: dict[int, int] | None = None
    seed: int = 0

    @property
    def merges(self) -> bool:
        return not prunes(self.method)


@dataclass(frozen=True)
class Schedule:
    """Tokens that blocks hand on, by the number of the block; those that are not named hand on what they get.

    ``enter``: tokens that the first block gets, if fewer than the model makes.
    """

    keep: Mapping[int, int]
    enter: int | None = None

    def after(self, layout: Layout) -> list[tuple[int, int]]:
        """Tokens that each block gets and hands on, in the order in which they run."""
        now = min(self.enter or layout.tokens, layout.tokens)
        found = []
        for number in layout.numbers:
            then = min(now, self.keep.get(number, now))
            found.append((now, then))
            now = then
        return found

    def json(self) -> dict[str, int]:
        """As the option ``keep`` takes it."""
        return {str(number): kept for number, kept in sorted(self.keep.items())}


@dataclass(frozen=True)
class Cost:
    """FLOPs of one block for one row: ``before`` of the layers before tokens leave, in which their number is linear,
    ``squared`` of the products of attention, ``behind`` of the layers after; ``tokens``: those it was counted with."""

    before: float
    squared: float
    behind: float
    tokens: int

    def at(self, given: int, handed_on: int) -> float:
        share = given / self.tokens
        return self.before * share + self.squared * share**2 + self.behind * handed_on / self.tokens


def block_costs(layout: Layout, place: str) -> list[Cost]:
    """What each block costs, in the order in which they run."""
    return [_cost(block, layout.tokens, place) for block in layout.blocks]


def _cost(block: Block, tokens: int, place: str) -> Cost:
    attention = sum(site.flops for site in block.sites if any(role.startswith("attention.") for role in site.roles))
    rest = sum(site.flops for site in block.sites) - attention
    if place == "block":
        return Cost(attention + rest, block.attention_flops, 0.0, tokens)
    return Cost(attention, block.attention_flops, rest, tokens)


def shares(layout: Layout, anatomy: Anatomy, schedule: Schedule, how: How, place: str) -> float:
    """FLOPs of the model with a schedule over those without, with the products that choosing and merging tokens takes."""
    costs = block_costs(layout, place)
    whole = sum(cost.at(layout.tokens, layout.tokens) for cost in costs)
    now = float(sum(cost.at(*counts) for cost, counts in zip(costs, schedule.after(layout), strict=True)))
    for block, (given, then) in zip(layout.blocks, schedule.after(layout), strict=True):
        if then < given:
            now += _choosing(layout, block, how, given, then)
    last = schedule.after(layout)[-1][1]
    if layout.reads_all and last < layout.tokens:
        now += 2 * layout.tokens * last * layout.width
    total = anatomy.totals["flops"]
    return (total - whole + now) / total


def _choosing(layout: Layout, block: Block, how: How, given: int, then: int) -> int:
    """FLOPs of the products with which one block chooses its tokens, and merges them; for one row."""
    heads, head_dim = block.heads or 1, block.head_dim or 1
    half = (given - how.prefix) // 2
    other = given - how.prefix - half
    received = 2 * given**2 if layout.masked else 0
    if how.method == "zero_tprune":
        votes = 1 + (how.votes or {}).get(block.index, 1)
        alike = round(how.options.get("similar", 0.0) * (given - then))
        return 2 * heads * given**2 * votes + (2 * half * other * head_dim if alike else 0)
    if how.method not in ("similarity", "criteria"):
        return received if how.method == "received" else 0
    gone = given - then
    known = bool(how.separators) + (layout.tokens if layout.reads_all else 0)
    if how.method == "similarity":
        return 2 * half * other * head_dim + 2 * then * gone * (layout.width + 2 + known)
    inner = heads * head_dim
    moved = 2 * then * gone * (layout.width + 2 + known + inner + 1 + given)
    return received + 2 * half * other * layout.width + moved


def check(where: str, schedule: Schedule, layout: Layout, protected: int, merges: bool) -> None:
    """Refuses what cannot be.

    Raises:
        UserError: a block that does not exist, more tokens than there are, fewer than are protected, more than a merge can take.
    """
    there = f"There are {len(layout.numbers)}: {layout.numbers[0]} to {layout.numbers[-1]}."
    for number in schedule.keep:
        if number not in layout.numbers:
            raise UserError(where, f"keep: there is no block {number} with tokens that can leave", there)
    least = max(protected + 1, 2)
    counts = [*schedule.keep.values(), *([schedule.enter] if schedule.enter else [])]
    for kept in counts:
        if kept < least:
            what = f"{kept} tokens are fewer than stay in any case, {least}"
            raise UserError(where, what, f"{protected} at the start are protected; keep {least} or more.")
        if kept > layout.tokens:
            raise UserError(
                where, f"keep: {kept} tokens are more than there are, {layout.tokens}", f"Keep {layout.tokens} or fewer."
            )
    for (given, then), number in zip(schedule.after(layout), layout.numbers, strict=True):
        wanted = schedule.keep.get(number)
        if wanted is not None and wanted > given:
            raise UserError(
                where, f"block {number} is to keep {wanted} of {given} tokens", "Numbers may not rise from block to block."
            )
        most = (given - protected) // 2
        if merges and given - then > most:
            what = f"block {number} is to merge {given - then} of {given} tokens, and at most {most} can go at once"
            raise UserError(where, what, f"Keep {given - most} or more there.")


def from_reduce(where: str, reduce: int | Sequence[int], layout: Layout, blocks: Sequence[int], how: How) -> Schedule:
    """Tokens that each block takes out, as ToMe's schedules: of one number for all as many as can go.

    Args:
        blocks: numbers of those that may take tokens out.

    Raises:
        UserError: more numbers than blocks, or more tokens than can go.
    """
    numbers = [number for number in layout.numbers if number in blocks]
    counts = [reduce] * len(numbers) if isinstance(reduce, int) else list(reduce)
    if len(counts) > len(numbers):
        what = f"reduce names {len(counts)} blocks, and tokens can leave {len(numbers)}"
        raise UserError(where, what, f"Give {len(numbers)} numbers or fewer, one for each block.")
    keep, now = {}, layout.tokens
    for number, count in zip(numbers, counts, strict=False):
        most = max((now - how.prefix) // 2 if how.merges else now - max(how.prefix + 1, 2), 0)
        if count > most and not isinstance(reduce, int):
            what = f"reduce: block {number} is to take out {count} of {now} tokens, and {most} can go"
            raise UserError(where, what, f"Write {most} or less there.")
        gone = min(count, most)
        if gone:
            now -= gone
            keep[number] = now
    return Schedule(keep)
