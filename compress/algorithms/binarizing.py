"""The sum of scaled signs nearest to a weight, in whole numbers of one step a row.

Shapes: O outputs, I inputs, G groups, S inputs of a group, K bases.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from calibrate.bits import signs

__all__ = ["Binarized", "binarized", "nearest", "rebinarized"]

_LEAST = 2.0**-24
"""Of a scale: the smallest float16 number. A row of zeros has it."""
_NARROW, _WIDE = 7, 63
"""The largest whole number: one that INT4 holds where a row has one set of them; else one of which two, times inputs of 8 bits,
have a sum of 16 bits: processors without VNNI add pairs so, and what is larger saturates there."""


@dataclass(frozen=True)
class Binarized:
    """``scale * (shift + sum_k multiples_k planes_k)``.

    Attributes:
        planes: int8 [K, O, I], -1 or 1.
        multiples: int8 [O, G, K]; None: one plane, as it is.
        shift: int8 [O, G] or None.
        scale: float32 [O, 1], float16 numbers.
    """

    planes: Tensor
    multiples: Tensor | None
    shift: Tensor | None
    scale: Tensor

    @property
    def values(self) -> Tensor:
        """float32 [O, I]."""
        planes, outputs, inputs = self.planes.shape
        times = torch.ones(outputs, 1, 1) if self.multiples is None else self.multiples.float()
        groups = times.shape[1]
        blocks = self.planes.reshape(planes, outputs, groups, -1).float()
        whole = torch.einsum("kogs,ogk->ogs", blocks, times.to(blocks))
        whole = whole if self.shift is None else whole + self.shift.float().unsqueeze(-1)
        return whole.reshape(outputs, inputs) * self.scale


def binarized(
    weight: Tensor,
    bases: int = 1,
    group_size: int | None = None,
    shift: bool = False,
    scale: Literal["row", "tensor"] = "row",
    rounds: int = 10,
) -> Binarized:
    """The signs and factors nearest to ``weight`` in squares that are found.

    One base: the signs of ``W - mean`` (or of W), and the mean of their sizes, which is the best factor for them (Rastegari et
    al. 2016, arXiv 1603.05279, sec. 3.1; the mean as in BiPFT: Xing et al. 2024). More: each base is that of what the ones before
    leave (Guo et al. 2017, arXiv 1706.02021, sec. 3). Then factors (and mean) for the signs, by least squares, and signs for them
    take turns, ``rounds`` times; neither makes the error larger. The sign of 0 is +1.

    The factors of a row then become whole multiples of one step, so that the weight is an integer of 8 bits with one scale a row
    (of 4 bits where there are no groups and no shift), and the signs are chosen once more for them.

    Args:
        weight: [O, I].
        group_size: inputs that share factors; None: all of a row.
        shift: whether the mean is carried too.
        scale: one step for each row, or one factor for the whole weight (one base, no groups, no shift).
    """
    rows = weight.detach().float()
    outputs, inputs = rows.shape
    blocks = rows.reshape(outputs, -1, group_size or inputs)
    mean = blocks.mean(-1) if shift else None
    if bases == 1 and group_size is None and not shift:
        size = rows.abs().mean(1, keepdim=True) if scale == "row" else rows.abs().mean().expand(outputs, 1)
        return Binarized(signs(rows).unsqueeze(0), None, None, _storable(size))
    planes, factors, mean = _greedy(blocks, bases, mean)
    for _ in range(rounds if bases > 1 or shift else 0):
        factors, mean = _least_squares(blocks, planes, factors, mean)
        planes = _planes(blocks, factors, mean)
    return _stepped(blocks, factors, mean)


def rebinarized(weight: Tensor, found: Binarized, scale: Tensor) -> Binarized:
    """The signs nearest to another weight [O, I] at other scales [O, 1], with the whole numbers of ``found``."""
    step = _storable(scale.detach())
    if found.multiples is None:
        return Binarized(signs(weight.detach()).unsqueeze(0), None, None, step)
    blocks = (weight.detach() / step).reshape(*found.multiples.shape[:2], -1)
    more = None if found.shift is None else found.shift.float()
    planes = _planes(blocks, found.multiples.float(), more).flatten(2)
    return Binarized(planes, found.multiples, found.shift, step)


def nearest(scaled: Tensor, multiples: Tensor | None, shift: Tensor | None) -> Tensor:
    """For numbers [O, I], in steps of their rows, the integer each is nearest to of those that signs can make: float [O, I].

    Args:
        multiples: int8 [O, G, K] or None; shift: int8 [O, G] or None.
    """
    if multiples is None:
        return torch.where(scaled >= 0, 1.0, -1.0)
    blocks = scaled.reshape(*multiples.shape[:2], -1)
    times, more = multiples.to(scaled.dtype), None if shift is None else shift.to(scaled.dtype)
    return _sum(_planes(blocks, times, more), times, more).reshape(scaled.shape)


def _greedy(blocks: Tensor, bases: int, mean: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Signs [K, O, G, S], factors [O, G, K] and the mean, base after base."""
    left = blocks if mean is None else blocks - mean.unsqueeze(-1)
    planes, factors = [], []
    for _ in range(bases):
        planes.append(signs(left))
        factors.append(left.abs().mean(-1))
        left = left - factors[-1].unsqueeze(-1) * planes[-1]
    return torch.stack(planes), torch.stack(factors, -1), mean


def _least_squares(blocks: Tensor, planes: Tensor, factors: Tensor, mean: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The factors (and mean) with the least squared error for the signs; those of before where signs do not tell them apart."""
    terms = planes.double().movedim(0, -1)
    if mean is not None:
        terms = torch.cat([terms, torch.ones_like(terms[..., :1])], -1)
    before = factors.double() if mean is None else torch.cat([factors, mean.unsqueeze(-1)], -1).double()
    left = blocks.double() - (terms * before.unsqueeze(-2)).sum(-1)
    normal = terms.transpose(-1, -2) @ terms
    change = torch.linalg.pinv(normal, hermitian=True) @ (terms * left.unsqueeze(-1)).sum(-2).unsqueeze(-1)
    found = (before + change.squeeze(-1)).to(factors.dtype)
    bases = factors.shape[-1]
    return found[..., :bases].abs(), None if mean is None else found[..., bases]


def _planes(blocks: Tensor, factors: Tensor, mean: Tensor | None) -> Tensor:
    """The signs [K, O, G, S] whose sum is nearest to each number; of two that are as near, the first tried, +1 before -1."""
    bases = factors.shape[-1]
    best = planes = None
    for choice in range(2**bases):
        chosen = [1 - 2 * ((choice >> place) & 1) for place in range(bases)]
        level = sum(sign * factors[..., place] for place, sign in enumerate(chosen))
        off = (blocks - (level if mean is None else level + mean).unsqueeze(-1)).abs()  # type: ignore[union-attr]
        made = torch.tensor(chosen, dtype=torch.int8, device=blocks.device).reshape(bases, *[1] * blocks.dim())
        if best is None or planes is None:
            best, planes = off, made.expand(bases, *blocks.shape).clone()
            continue
        nearer = off < best
        best, planes = torch.where(nearer, off, best), torch.where(nearer, made, planes)
    assert planes is not None
    return planes


def _sum(planes: Tensor, factors: Tensor, mean: Tensor | None) -> Tensor:
    whole = sum(planes[place] * factors[..., place].unsqueeze(-1) for place in range(planes.shape[0]))
    made: Tensor = whole if mean is None else whole + mean.unsqueeze(-1)  # type: ignore[assignment]
    return made


def _stepped(blocks: Tensor, factors: Tensor, mean: Tensor | None) -> Binarized:
    """The weight in whole numbers: of those up to the bound, for each row the steps with the least error."""
    outputs, groups, _ = blocks.shape
    bound = _NARROW if groups == 1 and mean is None else _WIDE
    total = factors.sum(-1) + (0.0 if mean is None else mean.abs())
    largest = total.amax(1, keepdim=True)
    least = torch.full((outputs,), torch.inf, device=blocks.device)
    scale = torch.full_like(largest, _LEAST)
    times, more = torch.ones_like(factors), None if mean is None else torch.zeros_like(mean)
    for most in range(1, bound + 1) if bound == _NARROW else [bound - 2]:  # sums of four rounded numbers are at most 2 larger
        step = _storable(largest / most)
        tried = (factors / step.unsqueeze(-1)).round()
        moved = None if mean is None else (mean / step).round()
        made = _sum(_planes(blocks / step.unsqueeze(-1), tried, moved), tried, moved) * step.unsqueeze(-1)
        error = (made - blocks).square().sum((1, 2))
        fits = (tried.sum(-1) + (0.0 if moved is None else moved.abs()) <= bound).all(1)
        better = (error < least) & fits
        least, scale = torch.where(better, error, least), torch.where(better.unsqueeze(1), step, scale)
        times = torch.where(better.reshape(-1, 1, 1), tried, times)
        more = None if more is None or moved is None else torch.where(better.unsqueeze(1), moved, more)
    planes = _planes(blocks / scale.unsqueeze(-1), times, more).flatten(2)
    return Binarized(planes, times.to(torch.int8), None if more is None else more.to(torch.int8), scale)


def _storable(scale: Tensor) -> Tensor:
    """Positive float16 numbers, in float32."""
    return scale.clamp(_LEAST, 65504.0).half().float()
