"""Attention made linear by hash codes: where it can be, what it learns from, and what it costs."""
