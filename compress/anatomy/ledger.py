"""Which stored tensors belong to which site: parameters and bytes, each counted once."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import nn

__all__ = ["Entry", "Ledger"]


@dataclass
class Entry:
    """What a site stores; ``tied`` is the site that stores the same weight first."""

    parameters: int = 0
    bytes: int = 0
    tied: str | None = None
    names: list[str] = field(default_factory=list)


class Ledger:
    """Every parameter and saved buffer of a model, entered under the innermost site that holds it.

    A tensor that no site holds (class tokens, position tables, layer scales) gets an entry of its own name.
    """

    def __init__(self, model: nn.Module, sites: Iterable[str]) -> None:
        self.entries: dict[str, Entry] = {path: Entry() for path in sites}
        owner: dict[int, str] = {}
        tensors = model.state_dict(keep_vars=True)
        for name, tensor in tensors.items():
            if not isinstance(tensor, torch.Tensor):
                continue
            path = self._holder(name)
            entry = self.entries.setdefault(path, Entry())
            first = owner.setdefault(id(tensor), path)
            if first != path:
                entry.tied = first
            entry.names.append(name)
            if isinstance(tensor, nn.Parameter):
                entry.parameters += tensor.numel()
            entry.bytes += tensor.numel() * tensor.element_size()
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
