"""Fewer tokens: those that matter least leave on the way."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, PositiveInt, model_validator

from compress.passes.token_schedule import TokenPass
from compress.tokens.layout import Layout
from compress.tokens.schedule import How

__all__ = ["PruneTokens"]

_VOTES = (30, 5, 1)
"""Of Zero-TPrune in the first, the middle and the last third of the blocks."""


class PruneTokens(TokenPass):
    """Let the tokens that matter least leave on the way through the blocks, so that later blocks have fewer to work on.

    ``zero_tprune`` (Wang et al. 2024, arXiv 2305.17328) lets tokens vote by their attention: weighted PageRank over the attention
    graph, joined over the heads whose scores vary enough, after tokens that are like more important ones are gone. ``received``
    ranks by the attention that a token receives, ``first_token`` by what the class token gives it; ``random`` is a control. No
    labels, no training; the number that stays is fixed, so shapes are static. The class tokens stay, of text the separators too;
    padded tokens go first. A head that averages tokens averages those that are left.

    Tokens can leave encoders whose blocks see all tokens alike: that is tried, not looked up. Models with windows, stages,
    relative positions or one output a token are refused with the reason.
    """

    name: ClassVar[str] = "prune_tokens"
    source: ClassVar[str] = "Wang et al. 2024, arXiv 2305.17328"

    score: Literal["zero_tprune", "received", "first_token", "random"] = Field(
        "zero_tprune", description="What a token's importance is; received and first_token cost less, random is a control."
    )
    votes: PositiveInt | None = Field(
        None, le=100, description="Votes of zero_tprune; null: 30 in the first third of the blocks, 5 in the middle, then 1."
    )
    similar: float = Field(
        0.3, ge=0, le=1, description="With zero_tprune: share of what goes that goes because another token is like it."
    )

    @model_validator(mode="after")
    def _of_its_score(self) -> PruneTokens:
        for option in ("votes", "similar"):
            if self.score != "zero_tprune" and option in self.chosen:
                raise ValueError(f"{option} goes with score: zero_tprune\nTake {option} out.")
        return self

    def how(self, layout: Layout, seed: int = 0) -> How:
        options = {"similar": self.similar} if self.score == "zero_tprune" else {}
        count = len(layout.numbers)
        votes = {number: self.votes or _VOTES[3 * place // count] for place, number in enumerate(layout.numbers)}
        prefix = layout.prefix if self.protect is None else self.protect
        separators = layout.separators if self.separators is None else tuple(self.separators)
        return How(self.score, prefix, options, separators, votes=votes if self.score == "zero_tprune" else None, seed=seed)
