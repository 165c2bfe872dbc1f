"""What a model is made of, by name, and what changed between two moments."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

__all__ = ["Difference", "Entry", "difference", "inventory"]


@dataclass(frozen=True)
class Entry:
    """One stored tensor: ``kind``, ``dtype`` as torch prints it without the prefix (``int8``), shape and bytes."""

    kind: Literal["parameter", "buffer"]
    dtype: str
    shape: tuple[int, ...]
    bytes: int


@dataclass(frozen=True)
class Difference:
    """From one inventory to the next: entries only in the later one, only in the earlier one, and in both but unlike.

    It is true when there is any. Tensors whose values alone changed are not seen: an inventory holds no values.
    """

    added: Mapping[str, Entry]
    removed: Mapping[str, Entry]
    changed: Mapping[str, tuple[Entry, Entry]]
    bytes_before: int
    bytes_after: int

    def __bool__(self) -> bool:
        return bool(self.added or self.removed or self.changed)

    def __len__(self) -> int:
        """How many tensors were added, removed or changed."""
        return len(self.added) + len(self.removed) + len(self.changed)


def inventory(model: nn.Module) -> dict[str, Entry]:
    """Every parameter and buffer by its dotted path, each once: a tied tensor appears under its first path only.

    Two tensors are tied when they are one object, or start at the same place of one storage with the same shape.
    Buffers that are not saved with the model (``persistent=False``) count too: they are in memory.
    """
    found: dict[str, Entry] = {}
    seen: set[tuple[int | str, ...]] = set()
    for kind, tensors in (("parameter", model.named_parameters()), ("buffer", model.named_buffers())):
        for path, tensor in tensors:
            place = _place(tensor)
            if place in seen:
                continue
            seen.add(place)
            found[path] = Entry(
                "parameter" if kind == "parameter" else "buffer",
                str(tensor.dtype).removeprefix("torch."),
                tuple(tensor.shape),
                tensor.numel() * tensor.element_size(),
            )
    return found


def difference(before: Mapping[str, Entry], after: Mapping[str, Entry]) -> Difference:
    """What changed from one inventory to another."""
    return Difference(
        added={path: entry for path, entry in after.items() if path not in before},
        removed={path: entry for path, entry in before.items() if path not in after},
        changed={path: (before[path], after[path]) for path in after if path in before and before[path] != after[path]},
        bytes_before=sum(entry.bytes for entry in before.values()),
        bytes_after=sum(entry.bytes for entry in after.values()),
    )


def _place(tensor: Tensor) -> tuple[int | str, ...]:
    """Where a tensor lies; tensors without memory (meta, empty) are told apart by their identity."""
    if tensor.device.type == "meta" or not tensor.numel():
        return ("object", id(tensor))
    return (str(tensor.device), tensor.data_ptr(), *tensor.shape)
