"""Which tokens are alike: bipartite soft matching, and its form with several criteria in both directions.

Bolya et al. 2023, "Token Merging: Your ViT But Faster" (arXiv 2210.09461), sec. 3; Lee et al. 2024, "Multi-criteria Token Fusion"
(arXiv 2403.10030), sec. 3.2 and 3.3. Tokens are split into two halves; each of the first half proposes to its most similar one
of the second, and the best proposals are taken. Protected tokens at the start are in neither half.

Padded tokens (not ``valid``) are put into the half that goes and go first, whatever they are like; tokens that are ``held`` are
put into the half that stays, and nothing is merged into them.

Shapes: B batch, T tokens, P tokens at the start that are protected, N = (T - P) // 2 tokens of the half that may go, C channels,
H heads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress.algorithms.token_moves import Merge, ascending, best, picked

__all__ = ["criteria", "fusion", "most_merged", "soft_matching", "split"]

_FIRST, _NEVER = 4.0, -4.0
"""Scores of what goes first and of what never does; similarities lie between -1 and 1."""


def most_merged(tokens: int, prefix: int) -> int:
    """Most tokens that one matching can take out."""
    return max((tokens - prefix) // 2, 0)


def split(
    tokens: int,
    prefix: int,
    like: Tensor,
    valid: Tensor | None = None,
    held: Tensor | None = None,
    both_ways: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Positions of the protected tokens [B, P], of the half that may go [B, N] and of the half that takes in [B, T - P - N].

    Without padding and held tokens every second one goes, as in the paper. With them the half that may go is filled with padded
    tokens first, then with every second real one from the start; where tokens go from both halves, each gets half of the padded
    ones.

    Args:
        like: any tensor [B, ...] on the device.
    """
    count, rows = most_merged(tokens, prefix), like.shape[0]
    every = torch.arange(tokens, device=like.device)
    start, rest = every[:prefix].unsqueeze(0).expand(rows, -1), every[prefix:]
    if valid is None and held is None:
        going, taking = rest[1::2][:count], rest[0::2]
        return start, going.unsqueeze(0).expand(rows, -1), taking.unsqueeze(0).expand(rows, -1)
    second = ((rest - prefix) % 2).to(torch.float32) * 2.0
    wanted = (torch.zeros_like(second) if both_ways else second).unsqueeze(0).expand(rows, -1)
    if held is not None:
        wanted = torch.where(held[:, prefix:], torch.full_like(wanted, _NEVER), wanted)
    if valid is not None:
        wanted = torch.where(valid[:, prefix:], wanted, torch.full_like(wanted, _FIRST))
    order = best(wanted, tokens - prefix) + prefix
    if both_ways:
        return start, ascending(order[:, 1::2][:, :count]), ascending(order[:, 0::2])
    return start, ascending(order[:, :count]), ascending(order[:, count:])


def soft_matching(metric: Tensor, remove: int, prefix: int = 1, valid: Tensor | None = None, held: Tensor | None = None) -> Merge:
    """The ``remove`` tokens that are most similar to one of the other half, and which that is.

    Args:
        metric: [B, T, C]; cosines of it are compared (keys, averaged over heads).
        prefix: tokens at the start that are protected.
        valid: [B, T]; False where padded.
        held: [B, T]; True where protected.

    Raises:
        ValueError: more than half would go.
    """
    tokens = metric.shape[1]
    if remove > most_merged(tokens, prefix):
        raise ValueError(f"{remove} of {tokens} tokens: at most {most_merged(tokens, prefix)} can be merged at once")
    start, going, taking = split(tokens, prefix, metric, valid, held)
    unit = _unit(metric)
    scores = picked(unit, going) @ picked(unit, taking).transpose(1, 2)
    return _matched(_barred(scores, going, taking, valid, held), remove, start, going, taking)


def criteria(
    tokens: Tensor,
    received: Tensor,
    size: Tensor,
    going: Tensor,
    taking: Tensor,
    temperatures: tuple[float, float, float],
) -> Tensor:
    """Similarity, little information and small size at once, [B, N, M] (Lee et al., eq. 2 to 5).

    Args:
        tokens: [B, T, C].
        received: attention that each token receives, [B, T].
        size: tokens that each stands for, [B, T].
        temperatures: of similarity, information and size; 0 leaves one out.
    """
    unit = _unit(tokens)
    alike = (picked(unit, going) @ picked(unit, taking).transpose(1, 2) + 1) / 2
    similarity, information, sizes = temperatures
    product = torch.ones_like(alike)
    if similarity:
        product = product * alike.clamp(min=0.0) ** (1 / similarity)
    for value, temperature in ((received, information), (size, sizes)):
        if temperature:
            inverse = 1 / value.clamp(min=1e-6)
            inverse = inverse / inverse.amax(1, keepdim=True)
            one, other = (picked(inverse, index) for index in (going, taking))
            product = product * (one.unsqueeze(2) * other.unsqueeze(1)) ** (1 / temperature)
    return product


def fusion(
    scores: Tensor,
    remove: int,
    halves: tuple[Tensor, Tensor, Tensor],
    both_ways: bool = True,
    valid: Tensor | None = None,
    held: Tensor | None = None,
) -> Merge:
    """Half of the tokens from the first half into the second, then the others back (Lee et al., sec. 3.3).

    What one of the second half has taken in goes with it.

    Args:
        scores: [B, N, M] of the first half for the second.
        halves: positions as ``split`` gives them.
    """
    start, going, taking = halves
    first = remove // 2 if both_ways else 0
    if not first:
        return _matched(_barred(scores, going, taking, valid, held), remove, start, going, taking)
    most, into = _barred(scores, going, taking, valid, held).max(dim=2)
    order = best(most, most.shape[1])
    gone, left = order[:, :first], ascending(order[:, first:])
    one, remaining = picked(into, gone), picked(going, left)
    back = _barred(picked(scores, left).transpose(1, 2), taking, remaining, valid, held)
    most, into = back.max(dim=2)
    order = best(most, most.shape[1])
    second, stays = order[:, : remove - first], ascending(order[:, remove - first :])
    prefix, half = start.shape[1], left.shape[1]
    two = picked(into, second) + prefix
    # Where each of the second half is in the end: at its own place, or in the one that took it in.
    number = torch.arange(taking.shape[1], device=start.device).reshape(1, 1, -1)
    place = torch.arange(stays.shape[1], device=start.device).reshape(1, -1, 1) + prefix + half
    ends = ((stays.unsqueeze(2) == number) * place).sum(1) + ((second.unsqueeze(2) == number) * two.unsqueeze(2)).sum(1)
    return Merge(
        torch.cat([start, remaining, picked(taking, stays)], dim=1),
        torch.cat([picked(going, gone), picked(taking, second)], dim=1),
        torch.cat([picked(ends, one), two], dim=1),
    )


def _below(scores: Tensor) -> Tensor:
    return torch.full_like(scores, _NEVER / 2)


def _barred(scores: Tensor, going: Tensor, taking: Tensor, valid: Tensor | None, held: Tensor | None) -> Tensor:
    """Scores with nothing merged into held tokens, held ones never gone, and padded ones first."""
    if held is not None:
        barred = picked(held, going).unsqueeze(2) | picked(held, taking).unsqueeze(1)
        scores = torch.where(barred, torch.full_like(scores, _NEVER), scores)
    if valid is not None:
        real = picked(valid, taking).unsqueeze(1)
        scores = torch.where(real, scores, torch.minimum(scores, _below(scores)))
        scores = torch.where(picked(valid, going).unsqueeze(2), scores, torch.full_like(scores, _FIRST))
    return scores


def _matched(scores: Tensor, remove: int, start: Tensor, going: Tensor, taking: Tensor) -> Merge:
    most, into = scores.max(dim=2)
    order = best(most, most.shape[1])
    gone, stays = order[:, :remove], order[:, remove:]
    left = [start, picked(going, ascending(stays)), taking] if stays.shape[1] else [start, taking]
    return Merge(torch.cat(left, dim=1), picked(going, gone), picked(into, gone) + start.shape[1] + stays.shape[1])


def _unit(x: Tensor) -> Tensor:
    return x / x.square().sum(-1, keepdim=True).clamp(min=1e-12).sqrt()
