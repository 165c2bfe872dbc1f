"""``find`` for the tests: a pure function of a model's structure and values, asked thousands of times for the same few models.

What it found is remembered by the content of everything that it is given: each attribute of each module, each tensor with its
values and strides, what is shared with what, the signature, the shapes of the example and the roles. A model that differs in
anything is traced anew; so is one that cannot be written down (of a class made inside a function), or that has a class from a
file which a test wrote: the next test may write another under the same name.
"""

from __future__ import annotations

import functools
import hashlib
import io
import pickle
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from calibrate.signature import Batch, Signature
from compress.anatomy import Anatomy

__all__ = ["content", "remembered"]

_REPOSITORY = Path(__file__).resolve().parents[1]
_LIMIT = 20_000_000
"""Numbers in a model beyond which writing it down is no cheaper than tracing it."""


class _Content(pickle.Pickler):
    """Writes down objects with tensors as their layout and a digest of their values."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.seen: dict[tuple[str, int], int] = {}

    def persistent_id(self, obj: Any) -> Any:
        if not isinstance(obj, Tensor):
            return None
        kind = (type(obj).__name__, str(obj.dtype), str(obj.device), str(obj.layout), tuple(obj.shape), obj.requires_grad)
        kind = (*kind, self._number("tensor", id(obj)))
        if obj.is_meta or obj.layout != torch.strided:
            return kind
        storage = self._number("storage", obj.untyped_storage().data_ptr())
        values = obj.detach().contiguous().reshape(-1).view(torch.uint8) if obj.numel() else torch.empty(0, dtype=torch.uint8)
        return (*kind, obj.stride(), obj.storage_offset(), storage, hashlib.sha256(values.numpy()).hexdigest())

    def _number(self, kind: str, identity: int) -> int:
        """The same for the same, in the order in which they are met."""
        return self.seen.setdefault((kind, identity), len(self.seen))


def content(*objects: Any) -> bytes | None:
    """A digest of everything that the objects hold; None where they cannot be written down."""
    written = io.BytesIO()
    try:
        _Content(written).dump(objects)
    except Exception:  # whatever a foreign object raises when it is pickled
        return None
    return hashlib.sha256(written.getbuffer()).digest()


def _lasts(model: nn.Module) -> bool:
    small = sum(parameter.numel() for parameter in model.parameters()) <= _LIMIT
    return small and all(_lasting(type(module)) for module in model.modules())


@functools.cache
def _lasting(kind: type) -> bool:
    """Whether a class comes from this repository or from an installed package."""
    file = getattr(sys.modules.get(kind.__module__), "__file__", None)
    return file is not None and ("site-packages" in file or Path(file).resolve().is_relative_to(_REPOSITORY))


def remembered(find: Callable[..., Anatomy]) -> Callable[..., Anatomy]:
    """The same function, which does not trace again what it has traced."""
    known: dict[bytes, Anatomy] = {}

    @functools.wraps(find)
    def found(model: nn.Module, signature: Signature, example: Batch, roles: Any = None) -> Anatomy:
        shapes = {name: (tuple(tensor.shape[1:]), tensor.dtype) for name, tensor in example.items()}  # a trace sees no values
        key = content(model, signature, shapes, roles) if _lasts(model) else None
        if key is None or key not in known:
            anatomy = find(model, signature, example, roles)
            if key is not None:
                known[key] = anatomy
            return anatomy
        rows = {name: tensor[:2] for name, tensor in example.items()}
        return replace(known[key], signature=signature, example=rows)

    return found
