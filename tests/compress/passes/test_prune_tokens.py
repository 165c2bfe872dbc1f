"""Pruned tokens: which stay, what it equals at its limits, and what is refused."""

from __future__ import annotations

from compress.passes.prune_tokens import PruneTokens

EXAMPLE = PruneTokens(reduce=4, votes=2)
