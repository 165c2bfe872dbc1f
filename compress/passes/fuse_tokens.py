"""Fewer tokens: those that are alike, say little and are small become one."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from compress.passes.token_schedule import TokenPass
from compress.tokens.layout import Layout
from compress.tokens.schedule import How

__all__ = ["FuseTokens"]


class FuseTokens(TokenPass):
    """Fuse tokens that are alike, receive little attention and stand for few others, so that later blocks have fewer to work on.

    MCTF (Lee et al. 2024, arXiv 2403.10030): pairs are chosen by the product of three criteria (eq. 2 to 5), half of them from
    one half of the tokens to the other and half back (sec. 3.3), and weighted by attention and size. The block's own attention
    is that of the tokens before, pooled with them (one-step-ahead attention, sec. 3.4), and later attentions count a token by
    its size. The values are pooled behind their projection rather than before it: the same where the norm is after the join,
    nearly so elsewhere. No labels, no training (the paper's figures are after training); at most half of the tokens can go in
    one block. All class tokens are protected, the distillation token too, of text the separators too; padded tokens go first
    and weigh nothing.

    Refused is what ``merge_tokens`` refuses.
    """

    name: ClassVar[str] = "fuse_tokens"
    source: ClassVar[str] = "Lee et al. 2024, arXiv 2403.10030"

    similarity: float = Field(1.0, ge=0, le=100, description="Temperature of similarity; 0 leaves it out.")
    information: float = Field(
        20.0, ge=0, le=100, description="Temperature of the attention that tokens receive; 0 leaves it out."
    )
    size: float = Field(40.0, ge=0, le=100, description="Temperature of how many tokens each stands for; 0 leaves it out.")
    both_ways: bool = Field(True, description="Whether half of the pairs are taken from the other half of the tokens.")
    proportional: bool = Field(True, description="Whether attention counts a fused token by its size.")

    def how(self, layout: Layout, seed: int = 0) -> How:
        prefix = layout.prefix if self.protect is None else self.protect
        separators = layout.separators if self.separators is None else tuple(self.separators)
        options = {"temperatures": [self.similarity, self.information, self.size], "both_ways": self.both_ways}
        return How("criteria", prefix, options, separators, self.proportional)
