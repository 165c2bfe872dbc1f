"""What changes, or only hears, the torch functions that run in the forward of a module."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

__all__ = ["Redirecting"]


class Redirecting(ABC):
    """Attached to a module, it is given every torch function that is called in the module's forward."""

    def __init__(self) -> None:
        super().__init__()
        self._open: list[_Mode] = []

    @abstractmethod
    def redirect(self, func: Any, args: Any, kwargs: Any) -> Any:
        """What the call ``func(*args, **kwargs)`` gives there."""

    def attach(self, model: nn.Module, path: str) -> list[RemovableHandle]:
        """From now on it acts on the module at ``path``; removing the handles ends it. It acts on copies of the module too."""
        module = model.get_submodule(path)
        return [
            module.register_forward_pre_hook(self._before),
            module.register_forward_hook(self._after, always_call=True),
        ]

    def _before(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        self._open.append(_Mode(self))
        self._open[-1].__enter__()  # type: ignore[no-untyped-call]

    def _after(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if self._open:
            self._open.pop().__exit__(None, None, None)  # type: ignore[no-untyped-call]


class _Mode(TorchFunctionMode):
    def __init__(self, owner: Redirecting) -> None:
        super().__init__()
        self.owner = owner

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.owner.redirect(func, args, kwargs or {})
