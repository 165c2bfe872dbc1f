"""Fused tokens: criteria, both directions, and what is refused."""

from __future__ import annotations

from compress.passes.fuse_tokens import FuseTokens

EXAMPLE = FuseTokens(reduce=3)
