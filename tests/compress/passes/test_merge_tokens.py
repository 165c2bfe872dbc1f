"""Merged tokens: what they become, what it equals at its limits, and what is refused."""

from __future__ import annotations

from compress.passes.merge_tokens import MergeTokens

EXAMPLE = MergeTokens(reduce=3)
