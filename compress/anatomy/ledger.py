"""Which stored tensors belong to which site: parameters and bytes, each counted once."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

__all__ = ["Entry", "Ledger"]


@dataclass
class Entry:
    """What a site stores, and how much of that the site ``tied`` stores first."""

    parameters: int = 0
    bytes: int = 0
    tied: str | None = None
    tied_parameters: int = 0
    tied_bytes: int = 0


class Ledger:
    """Every parameter and saved buffer of a model, entered under the innermost site that holds it.

    A tensor that no site holds (class tokens, position tables, layer scales) gets an entry of its own name.
    """

    def __init__(self, model: nn.Module, sites: Iterable[str]) -> None:
        self.entries: dict[str, Entry] = {path: Entry() for path in sites}
        owner: dict[int, str] = {}
        tensors = {n: t for n, t in model.state_dict(keep_vars=True).items() if isinstance(t, torch.Tensor)}
        held = {name: self._holder(name) for name in tensors}
        # Those that a site holds first: a module with two names is listed under the one that it was called by.
        for name in sorted(tensors, key=lambda name: held[name] == name):
            tensor, path = tensors[name], held[name]
            if path == name and path not in self.entries and id(tensor) in owner:
                continue
            entry = self.entries.setdefault(path, Entry())
            count = tensor.numel() if isinstance(tensor, nn.Parameter) else 0
            size = tensor.numel() * tensor.element_size()
            entry.parameters, entry.bytes = entry.parameters + count, entry.bytes + size
            first = owner.setdefault(id(tensor), path)
            if first != path:
                entry.tied = first
                entry.tied_parameters, entry.tied_bytes = entry.tied_parameters + count, entry.tied_bytes + size
        self._quantized(model)

    def _holder(self, name: str) -> str:
        path = name
        while path:
            if path in self.entries:
                return path
            path = path.rpartition(".")[0]
        return name

    def _quantized(self, model: nn.Module) -> None:
        """A weight kept as codes counts the values that the codes stand for."""
        for path, module in model.named_modules():
            shape = getattr(getattr(module, "quantized_weight", None), "shape", None)
            if shape is not None and path in self.entries:
                self.entries[path].parameters += math.prod(shape)
