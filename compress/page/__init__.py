"""``report.html``: one self-contained page that shows what a run gained, what it cost and where it hurts."""

from __future__ import annotations

from compress.page.folder import Found, read
from compress.page.rendering import render, write

__all__ = ["Found", "read", "render", "write"]
