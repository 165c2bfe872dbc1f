"""Fewer tokens: those that are alike become one."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from compress.passes.token_schedule import TokenPass
from compress.tokens.layout import Layout
from compress.tokens.schedule import How

__all__ = ["MergeTokens"]


class MergeTokens(TokenPass):
    """Merge the tokens that are most alike, so that later blocks have fewer to work on.

    ToMe (Bolya et al. 2023, arXiv 2210.09461): in each block every second token proposes to the one of the others whose key is
    most like its own (sec. 3, bipartite soft matching), and the best pairs become their mean, weighted by how many tokens each
    stands for. Later attentions count a token as often as it stands for others (proportional attention, eq. 1). No labels, no
    training; at most half of the tokens can go in one block. The class tokens are in no pair, of text the separators too;
    padded tokens go first and weigh nothing. A head that reads all tokens gets every position back, with the token that stands
    for it.

    Tokens can be merged in encoders whose blocks see all tokens alike: that is tried, not looked up. Models with windows, stages,
    relative positions or a causal mask are refused with the reason.
    """

    name: ClassVar[str] = "merge_tokens"
    source: ClassVar[str] = "Bolya et al. 2023, arXiv 2210.09461"

    proportional: bool = Field(
        True,
        description="Whether attention counts a merged token by its size; the paper leaves it off for models trained by masking.",
    )

    def how(self, layout: Layout, seed: int = 0) -> How:
        prefix = layout.prefix if self.protect is None else self.protect
        separators = layout.separators if self.separators is None else tuple(self.separators)
        return How("similarity", prefix, {}, separators, self.proportional)
