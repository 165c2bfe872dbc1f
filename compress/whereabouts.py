"""Where the modules of the float model are after passes took others out of a list and renumbered it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from compress.surgery import Edit

__all__ = ["Whereabouts"]


@dataclass(frozen=True)
class Whereabouts:
    """Paths of the float model and, for each piece of a path, its place among its fellows (children of a list are numbered by
    place, whatever they were called).

    Attributes:
        places: path -> the place of each of its pieces; -1 for a piece that is no module (a parameter's own name).
    """

    places: Mapping[str, Sequence[int]]

    @classmethod
    def of(cls, model: nn.Module, paths: Iterable[str]) -> Whereabouts:
        """Notes where the paths are in a model that no pass has changed."""
        return cls({path: _places(model, path) for path in paths})

    def after(self, path: str, edits: Iterable[Edit]) -> str | None:
        """The path of the same module after the edits; None where one of them took it, or what holds it, out of a list."""
        names, places = path.split("."), list(self.places[path])
        for edit in edits:
            holder = edit.path.split(".")
            depth = len(holder)
            if edit.verb != "keep" or names[:depth] != holder or depth >= len(names):
                continue
            kept: list[int] = (edit.config or {})["indices"]
            if places[depth] not in kept:
                return None
            places[depth] = kept.index(places[depth])
            names[depth] = str(places[depth])
        return ".".join(names)


def _places(model: nn.Module, path: str) -> list[int]:
    places, holder = [], model
    for name in path.split("."):
        child = holder._modules.get(name)
        places.append(-1 if child is None else list(holder._modules).index(name))
        holder = nn.Module() if child is None else child
    return places
