"""Layers that act on the forward of a module that stays as it is: what ``Surgery.attach`` puts on, and how it is found again."""

from __future__ import annotations

from typing import Any, Protocol, TypeVar

from torch import nn
from torch.utils.hooks import RemovableHandle

__all__ = ["Attached", "attached_to"]

Layer = TypeVar("Layer")


class Attached(Protocol):
    """Acts through one hook before and one after the module's forward; copies of the module carry copies of it."""

    def config(self) -> dict[str, Any]:
        """What makes it again, as JSON."""
        ...

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Attached: ...

    def attach(self, model: nn.Module, path: str) -> list[RemovableHandle]:
        """From now on it acts on the module at ``path``; removing the handles ends it."""
        ...


def attached_to(module: nn.Module, kind: type[Layer]) -> Layer | None:
    """What of a kind is attached to a module."""
    hooks = (getattr(hook, "__self__", None) for hook in module._forward_pre_hooks.values())
    return next((owner for owner in hooks if isinstance(owner, kind)), None)
