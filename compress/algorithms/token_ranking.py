"""Which tokens matter: Zero-TPrune, and simpler scores.

Wang et al. 2024, "Zero-TPrune: Zero-Shot Token Pruning through Leveraging of the Attention Graph in Pre-Trained Transformers"
(arXiv 2305.17328), sec. 3. There is no published code. The scores that the head filter looks at are normalised to mean 1 here:
with scores that sum to 1 the paper's thresholds would reject every head.

Shapes: B batch, H heads, T tokens, D head width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress.algorithms.token_moves import ascending, best, picked

__all__ = [
    "LARGEST_VARIANCE",
    "LEAST_VARIANCE",
    "attention_from_first",
    "attention_received",
    "importance",
    "kept",
    "zero_tprune",
]

LEAST_VARIANCE = 0.01
LARGEST_VARIANCE = 0.7
"""Of a head's scores with mean 1: heads outside say nothing, or of a few tokens only (fig. 16 of the paper)."""

_FIRST, _NEVER = 1e4, -1e4
_TINY = 1e-9


def attention_received(attention: Tensor, valid: Tensor | None = None) -> Tensor:
    """What each token receives, averaged over heads and real queries, times the number of tokens: [B, H, T, T] -> [B, T]."""
    over_heads = attention.mean(1)
    if valid is None:
        return over_heads.sum(1)
    real = valid.to(attention.dtype)
    return (real.unsqueeze(1) @ over_heads).squeeze(1)


def attention_from_first(attention: Tensor) -> Tensor:
    """What the first token gives to each, averaged over heads, times the number of tokens: [B, H, T, T] -> [B, T]."""
    return attention[:, :, 0].mean(1) * attention.shape[-1]


def importance(attention: Tensor, start: Tensor, votes: int, real: Tensor | None = None) -> Tensor:
    """Weighted PageRank of the attention graph, joined over heads: [B, H, T, T] -> [B, T] with values of the order of one.

    A query votes for its keys with the attention it gives them, weighted by its own score (sec. 3.2, algorithm 1). Heads whose
    scores vary too little or too much are left out (variance-based head filter); if that leaves none, all count. The rest are
    joined by their root mean square, so that what matters in one head stands out (emphasising informative region).

    Args:
        attention: rows sum to 1.
        start: scores before the first vote, [B, T]; they sum to 1, and padded tokens have none.
        votes: how often tokens vote; fixed, so that the graph is static.
        real: [B, T], 1 where tokens count; None: all.
    """
    score = start.unsqueeze(1).unsqueeze(2).expand(-1, attention.shape[1], -1, -1)
    for _ in range(votes):
        score = score @ attention
    count = float(attention.shape[-1]) if real is None else real.sum(1).reshape(-1, 1, 1)
    score = score.squeeze(2) * count
    off = score - 1.0 if real is None else (score - 1.0) * real.unsqueeze(1)
    variance = off.square().sum(2, keepdim=True) / count
    passes = ((variance >= LEAST_VARIANCE) & (variance <= LARGEST_VARIANCE)).to(score.dtype)
    passes = torch.where(passes.sum(1, keepdim=True) > 0, passes, torch.ones_like(passes))
    return ((passes * score.square()).sum(1) / passes.sum(1)).sqrt()


def zero_tprune(
    attention: Tensor,
    keys: Tensor,
    keep: int,
    votes: int,
    similar: float,
    prefix: int = 1,
    valid: Tensor | None = None,
    held: Tensor | None = None,
) -> Tensor:
    """Positions of the tokens that stay, ascending: [B, H, T, T] and keys [B, H, T, D] -> [B, keep].

    Three stages (sec. 3.1). I': one vote ranks the tokens. S: they are split into a more and a less important half, and those of
    the less important half that are most similar to one of the other go. I: the rest vote again, and the least important go.

    Args:
        keep: tokens that stay, protected ones with them.
        votes: of the last stage.
        similar: share of what goes that goes for its similarity; at most half of the unprotected tokens can.
        prefix: tokens at the start that are protected.
        valid: [B, T]; False where padded: these go first.
        held: [B, T]; True where protected.
    """
    tokens = attention.shape[-1]
    real = None if valid is None else valid.to(attention.dtype)
    start = _start(attention, prefix, real)
    first = _bounded(importance(attention, start, 1, real), prefix, valid, held)
    half = (tokens - prefix) // 2
    dropped = min(round(similar * (tokens - keep)), half)
    gone = None
    if dropped:
        order = best(first, tokens)[:, prefix:]
        more, less = order[:, : tokens - prefix - half], order[:, tokens - prefix - half :]
        unit = keys.mean(1)
        unit = unit / unit.square().sum(-1, keepdim=True).clamp(min=1e-12).sqrt()
        cosine = (picked(unit, less) @ picked(unit, more).transpose(1, 2)).amax(2)
        if valid is not None:
            cosine = torch.where(picked(valid, less), cosine, torch.full_like(cosine, 4.0))
        if held is not None:
            cosine = torch.where(picked(held, less), torch.full_like(cosine, -4.0), cosine)
        which = picked(less, best(cosine, dropped))
        number = torch.arange(tokens, device=which.device).reshape(1, 1, -1)
        gone = (which.unsqueeze(2) == number).any(1)
        left = (~gone).to(attention.dtype)
        real = left if real is None else real * left
        attention = attention * left.reshape(-1, 1, 1, tokens)
        attention = attention / attention.sum(-1, keepdim=True).clamp(min=_TINY)
        start = start * left
        start = start / start.sum(1, keepdim=True)
    last = _bounded(importance(attention, start, votes, real), prefix, valid, held)
    if gone is not None:
        last = torch.where(gone, torch.full_like(last, _NEVER), last)
    return ascending(best(last, keep))


def kept(score: Tensor, keep: int, prefix: int = 1, valid: Tensor | None = None, held: Tensor | None = None) -> Tensor:
    """Positions of the ``keep`` highest scores [B, T] -> [B, keep], ascending; protected ones are among them, padded ones
    last."""
    return ascending(best(_bounded(score, prefix, valid, held), keep))


def _start(attention: Tensor, prefix: int, real: Tensor | None) -> Tensor:
    """Uniform, the first token with the square root of their number, if one is protected there; the sum is 1."""
    tokens = attention.shape[-1]
    weight = torch.ones(tokens, device=attention.device, dtype=attention.dtype)
    if prefix:
        number = torch.arange(tokens, device=attention.device)
        weight = torch.where(number == 0, torch.full_like(weight, tokens**0.5), weight)
    start = weight.unsqueeze(0) if real is None else weight * real
    start = start / start.sum(1, keepdim=True)
    return start.expand(attention.shape[0], -1)


def _bounded(score: Tensor, prefix: int, valid: Tensor | None, held: Tensor | None) -> Tensor:
    """Protected tokens first, padded ones last."""
    if valid is not None:
        score = torch.where(valid, score, torch.full_like(score, -1.0))
    if held is not None:
        score = torch.where(held, torch.full_like(score, _FIRST), score)
    if prefix:
        number = torch.arange(score.shape[1], device=score.device).unsqueeze(0)
        score = torch.where(number < prefix, torch.full_like(score, 2 * _FIRST), score)
    return score
