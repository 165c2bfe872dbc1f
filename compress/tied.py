"""Modules that are one, or hold one parameter, and what becomes of that when they are replaced."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn

from calibrate.grid import Grid
from compress.surgery import Surgery

__all__ = ["Ties"]


@dataclass
class Ties:
    """What was one before anything was replaced.

    Attributes:
        grids: the modules that will be quantized, by path, and the grid of each.
        holders: for each of them the other module paths that hold its weight.
        aliases: for each of them the other paths of the very same module.
        said: what became of each tie, for the report.
    """

    grids: Mapping[str, Grid]
    holders: Mapping[str, list[str]]
    aliases: Mapping[str, list[str]]
    done: set[str] = field(default_factory=set)
    said: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, model: nn.Module, grids: Mapping[str, Grid]) -> Ties:
        by_module: dict[int, list[str]] = {}
        by_weight: dict[int, list[str]] = {}
        for path, module in model.named_modules(remove_duplicate=False):
            by_module.setdefault(id(module), []).append(path)
            weight = module._parameters.get("weight")
            if weight is not None:
                by_weight.setdefault(id(weight), []).append(path)
        holders, aliases = {}, {}
        for path in grids:
            module = model.get_submodule(path)
            aliases[path] = [other for other in by_module[id(module)] if other != path]
            fellows = by_weight[id(module._parameters["weight"])]
            holders[path] = [other for other in fellows if other != path and other not in aliases[path]]
        return cls(grids, holders, aliases)

    def settle(self, model: nn.Module, surgery: Surgery, path: str) -> None:
        """Called after the module at ``path`` was replaced: what was one stays one, or ``said`` tells why not."""
        for alias in self.aliases[path]:
            surgery.share(model, alias, path)
        self.done.add(path)
        for other in self.holders[path]:
            if other not in self.grids:
                self.said.append(f"{path} and {other} held one weight: {other} keeps it in float")
            elif other in self.done and self.grids[other] == self.grids[path]:
                surgery.share(model, f"{path}.quantized_weight", f"{other}.quantized_weight")
                self.said.append(f"{path} and {other} share their codes")
            elif other in self.done:
                self.said.append(f"{path} and {other} held one weight: their grids differ, so each has its own codes")
