"""Model cards, and small programs that run the written files, next to each file of a run folder."""

from compress.cards.writing import write

__all__ = ["write"]
