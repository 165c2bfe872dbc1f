"""What is known about the tokens of a sequence that gets shorter on its way through the blocks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree

from compress.algorithms.token_moves import LEAST, Merge, merged, picked

__all__ = ["TokenStream"]

_MASKED = -1.0
"""Numbers below are those of masked keys in a mask that is added to scores."""


class TokenStream:
    """The tokens of one forward pass: which are real, how many each stands for, and where they come from.

    The blocks that shorten a sequence and those after them share one. It begins anew when an earlier block than the last one
    runs, and holds nothing between two forwards, also in copies.

    Shapes: B batch, T tokens now, S tokens at the start.

    Attributes:
        tokens: S, or 0 while nothing runs.
        valid: [B, T], False where padded; None: all are real.
        size: how many of the tokens at the start each stands for, [B, T]; None while all stand for themselves.
        held: [B, T], True where a token must stay; None: none but those at the start.
        origin: [B, T], the position at the start of each token; None where tokens were merged, or none went.
        source: [B, T, S], 1 where a token stands for one of the start; kept only if asked for.
        ids: [B, S], what the embedding was asked for.
    """

    def __init__(self) -> None:
        self.watch: list[Tensor] | None = None
        """Where it is a list, the source after each block that shortened the sequence is added to it."""
        self._empty()

    def _empty(self) -> None:
        self.tokens = 0
        self.now = 0
        self.number = -1
        self.causal = False
        self.traced = False
        self.valid: Tensor | None = None
        self.size: Tensor | None = None
        self.held: Tensor | None = None
        self.origin: Tensor | None = None
        self.source: Tensor | None = None
        self.ids: Tensor | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> TokenStream:
        copied = memo[id(self)] = TokenStream()
        return copied

    def enter(self, number: int, hidden: Tensor, masks: list[Tensor], causal: bool, traced: bool, separators: list[int]) -> None:
        """The block with this number begins; the first one reads the mask.

        Args:
            hidden: the tokens it gets, [B, T, C].
            masks: 4-D masks among its inputs.
            traced: whether it is kept which tokens of the start each stands for.
            separators: ids whose tokens must stay.
        """
        if number <= self.number or not self.tokens:
            ids = self.ids
            self._empty()
            self.tokens = self.now = hidden.shape[1]
            self.causal, self.traced = causal, traced or self.watch is not None
            self.valid = _valid(masks, hidden.shape[0])
            if ids is not None and separators:
                self.held = self._separators(ids, separators)
        self.number = number

    def leave(self) -> None:
        """The last block that knows of it is done."""
        self._empty()

    def _separators(self, ids: Tensor, separators: list[int]) -> Tensor:
        held = ids == separators[0]
        for one in separators[1:]:
            held = held | (ids == one)
        return held if self.valid is None else held & self.valid

    @property
    def shorter(self) -> bool:
        return self.now != self.tokens

    def bias(self, dtype: torch.dtype) -> Tensor | None:
        """What proportional attention adds to the scores of each key, [B, 1, 1, T]: the logarithm of its size."""
        if self.size is None:
            return None
        return self.size.clamp(min=1.0).log().to(dtype).unsqueeze(1).unsqueeze(2)

    def keep(self, index: Tensor) -> None:
        """Only the tokens at ``index`` [B, K] are left."""
        self.valid, self.size, self.held = (None if x is None else picked(x, index) for x in (self.valid, self.size, self.held))
        self.origin = index if self.origin is None else picked(self.origin, index)
        self.now = index.shape[1]
        if self.traced:
            number = torch.arange(self.tokens, device=index.device).reshape(1, 1, -1)
            self.source = (self.origin.unsqueeze(2) == number).to(torch.float32)

    def merge(self, hidden: Tensor, weight: Tensor, merge: Merge) -> Tensor:
        """Tokens were merged: what becomes of ``hidden`` [B, T, C], weighted by ``weight`` [B, T].

        All that is known of them is merged in the same product.
        """
        size = self.sizes(hidden.shape[0], hidden.device)
        columns = [hidden * weight.unsqueeze(-1), weight.unsqueeze(-1), size.unsqueeze(-1)]
        if self.held is not None:
            columns.append(self.held.to(hidden.dtype).unsqueeze(-1))
        if self.traced:
            source = self.source
            if source is None:
                source = torch.eye(self.tokens, device=size.device).unsqueeze(0).expand(size.shape[0], -1, -1)
            columns.append(source)
        sums = merged(torch.cat(columns, dim=2), merge)
        width = hidden.shape[2]
        self.size = sums[:, :, width + 1]
        if self.valid is not None:
            self.valid = self.size > 0
        if self.held is not None:
            self.held = sums[:, :, width + 2] > 0
        if self.traced:
            self.source = sums[:, :, -self.tokens :]
        self.now, self.origin = merge.left.shape[1], None
        return sums[:, :, :width] / sums[:, :, width : width + 1].clamp(min=LEAST)

    def sizes(self, rows: int, device: torch.device) -> Tensor:
        """How many tokens each stands for, [B, T]; padded ones stand for none."""
        if self.size is not None:
            return self.size
        if self.valid is not None:
            return self.valid.to(torch.float32)
        return torch.ones(rows, self.now, device=device)

    def noted(self) -> None:
        """One block has shortened the sequence; whoever watches hears of it."""
        if self.watch is not None and self.source is not None:
            self.watch.append(self.source.detach().clone())

    def masked(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The inputs of a block with masks that fit the tokens that are left."""
        if not self.shorter:
            return args, dict(kwargs)
        return tuple(_pytree.tree_map(self._mask, args)), dict(_pytree.tree_map(self._mask, dict(kwargs)))

    def _mask(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or value.dim() != 4 or value.shape[-1] != self.tokens:
            return value
        if self.causal:
            return self._cut(value)
        if self.valid is None:
            return value[:, :, :1, : self.now]
        allowed = self.valid.unsqueeze(1).unsqueeze(2)
        if value.dtype == torch.bool:
            return allowed
        return torch.zeros_like(allowed, dtype=value.dtype).masked_fill(~allowed, torch.finfo(value.dtype).min)

    def _cut(self, mask: Tensor) -> Tensor:
        """The rows and columns of a mask [B, 1, S, S] of the tokens that are left."""
        assert self.origin is not None
        square = mask.expand(self.origin.shape[0], -1, -1, -1)[:, 0]
        if mask.shape[2] == self.tokens:
            square = picked(square, self.origin)
        return picked(square.transpose(1, 2), self.origin).transpose(1, 2).unsqueeze(1)

    def restored(self, hidden: Tensor) -> Tensor:
        """As many tokens as at the start: each position gets the token that stands for it, one that went the mean of the real
        ones that are left.

        The mean of the result over real positions is so the mean of what is left, weighted by size.
        """
        if self.source is None:
            return hidden
        back = self.source.transpose(1, 2).to(hidden.dtype)
        weight = self.sizes(hidden.shape[0], hidden.device).to(hidden.dtype).unsqueeze(-1)
        mean = (hidden * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True).clamp(min=1.0)
        there = back.sum(2, keepdim=True)
        return back @ hidden + (1 - there) * mean


def _valid(masks: list[Tensor], rows: int) -> Tensor | None:
    """Which keys the last query may see, [B, S]."""
    if not masks:
        return None
    last = masks[0][:, 0, -1]
    return (last if last.dtype == torch.bool else last > _MASKED).expand(rows, -1)
