"""The arguments of a MIL operation, by their names in the program."""

from __future__ import annotations

from typing import Any

from torch import Tensor

__all__ = ["Args"]


class Args(dict[str, Any]):
    """Tensors, lists of tensors and strings; what the program leaves out is absent."""

    def has(self, name: str) -> bool:
        return self.get(name) is not None

    def tensor(self, name: str) -> Tensor:
        value: Tensor = self[name]
        return value

    def optional(self, name: str) -> Tensor | None:
        return self.get(name)

    def tensors(self, name: str) -> list[Tensor]:
        return list(self[name])

    def ints(self, name: str) -> list[int]:
        value = self[name]
        return [int(item) for item in (value.reshape(-1).tolist() if isinstance(value, Tensor) else [value])]

    def whole(self, name: str, default: int = 0) -> int:
        return self.ints(name)[0] if self.has(name) else default

    def number(self, name: str, default: float) -> float:
        return float(self[name]) if self.has(name) else default

    def flag(self, name: str, default: bool = False) -> bool:
        return bool(self[name]) if self.has(name) else default

    def text(self, name: str, default: str = "") -> str:
        return str(self.get(name, default))
