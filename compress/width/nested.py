"""What a model whose heads and neurons are sorted by importance says of them: ``nested/widths.json`` of a run folder.

Beside it lies the sorted model, ``nested/model.safetensors``. Every width is a prefix of it, so that a smaller model is cut out
without scoring anything again.
"""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from torch import Tensor

from calibrate.errors import UserError
from compress import manifest
from compress.width.units import Units
from export.disk import renamed

__all__ = ["FOLDER", "Layout", "Nested", "SortedUnits", "keep", "layout_of", "read", "rounded"]

FOLDER = "nested"
"""Sub-folder of the run folder."""
_MODEL, _WIDTHS = "model.safetensors", "widths.json"
_AGAIN = "Run the recipe again."
_NEEDED = "Put `- nest_widths` into the passes of its recipe, run that, and name its folder."


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Layout(_Record):
    """Channels of a layer by unit: entry k of unit u is ``first[k] + u * stride[k]``."""

    first: tuple[int, ...] = Field(min_length=1)
    stride: tuple[int, ...]

    @model_validator(mode="after")
    def _whole(self) -> Layout:
        if len(self.first) != len(self.stride) or min(*self.first, *self.stride, 0) < 0:
            raise ValueError("first and stride do not describe channels")
        return self

    def channels(self, units: int) -> Tensor:
        """[units, k]."""
        return torch.tensor(self.first) + torch.arange(units).unsqueeze(1) * torch.tensor(self.stride)


class SortedUnits(_Record):
    """The heads, or the neurons, of one block, the most important first; see ``compress.width.units.Units``.

    Attributes:
        flops, size_bytes: what one unit costs.
        order: the number that the unit at each place had before.
        importance: of the unit at each place; descending.
    """

    block: int = Field(ge=0)
    kind: Literal["head", "neuron"]
    sink: str
    columns: Layout
    rows: dict[str, Layout]
    heads: int = Field(ge=0)
    flops: float = Field(gt=0)
    size_bytes: float = Field(gt=0)
    order: tuple[int, ...] = Field(min_length=1)
    importance: tuple[float, ...]

    @model_validator(mode="after")
    def _whole(self) -> SortedUnits:
        if sorted(self.order) != list(range(len(self.order))) or len(self.importance) != len(self.order):
            raise ValueError("order and importance do not name every unit once")
        if min(self.importance) < 0 or any(later > earlier for earlier, later in pairwise(self.importance)):
            raise ValueError("importance does not descend")
        return self

    def __len__(self) -> int:
        return len(self.order)

    @property
    def units(self) -> Units:
        """The same for those that slice."""
        rows = {path: layout.channels(len(self)) for path, layout in self.rows.items()}
        return Units(self.block, self.kind, self.sink, self.columns.channels(len(self)), rows, self.heads, self.flops)


class Nested(_Record):
    """What ``widths.json`` holds.

    Attributes:
        model_sha256: of the model beside it; empty until it is written.
        fingerprint: of the float model that the run began with.
        score: how importance was found.
        blocks_flops: of all blocks for one row.
        model_bytes: of the model in memory.
        skipped: what is not sorted, by path, with the reason.
    """

    version: Literal[1] = 1
    model_sha256: str = ""
    fingerprint: str
    score: str
    blocks_flops: float = Field(gt=0)
    model_bytes: float = Field(gt=0)
    units: tuple[SortedUnits, ...] = Field(min_length=1)
    skipped: dict[str, str]


def layout_of(channels: Tensor) -> Layout | None:
    """The layout of [units, k] channels; None where they are not evenly spaced."""
    stride = channels[1] - channels[0] if len(channels) > 1 else torch.zeros_like(channels[0])
    if bool((stride < 0).any()):
        return None
    found = Layout(first=tuple(channels[0].tolist()), stride=tuple(stride.tolist()))
    return found if found.channels(len(channels)).equal(channels) else None


def rounded(importance: Tensor) -> tuple[float, ...]:
    """Six digits, which keep the order."""
    return tuple(float(f"{value:.6g}") if math.isfinite(value) else 0.0 for value in importance.clamp(min=0).tolist())


def keep(checkpoint: Path, told: Nested, folder: Path) -> None:
    """Keeps a saved model and what is told of it in the folder ``nested`` of a run folder; it takes no room twice."""
    from compress.each_pass import linked

    folder.mkdir()
    linked(checkpoint / _MODEL, folder / _MODEL)
    sealed = told.model_copy(update={"model_sha256": manifest.digest(folder / _MODEL)})
    with renamed(folder / _WIDTHS) as unfinished:
        unfinished.write_text(json.dumps(sealed.model_dump(mode="json"), sort_keys=True, allow_nan=False) + "\n")


def read(run: Path, *, whole: bool = False) -> Nested:
    """What the sorted model in a run folder says of its widths.

    Args:
        whole: whether the files must also have the hashes that the run recorded.

    Raises:
        UserError: no run folder, its recipe sorts nothing, or the file is damaged.
    """
    if not (run / "manifest.json").is_file():
        raise UserError(str(run), "is not the folder of a finished run", "Name one, such as runs/my.")
    path = run / FOLDER / _WIDTHS
    if not path.is_file():
        raise UserError(str(run), "holds no sorted model", _NEEDED)
    try:
        content: Any = json.loads(path.read_bytes())
        if isinstance(content, dict) and content.get("version") not in (None, 1):
            raise UserError(str(path), f"has version {content['version']}, this program reads version 1", "Update the package.")
        found = Nested.model_validate(content)
    except OSError as error:
        raise UserError(str(path), f"cannot be read: {error.strerror}", "Change its permissions.") from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(step) for step in first["loc"])
        raise UserError(str(path), f"is damaged: {place}: {first['msg']}", _AGAIN) from None
    except (ValueError, RecursionError):
        raise UserError(str(path), "is damaged: it is not JSON", _AGAIN) from None
    if whole:
        _check(run, found)
    return found


def _check(run: Path, found: Nested) -> None:
    files = manifest.read(run)["files"]
    for name in (_WIDTHS, _MODEL):
        path = run / FOLDER / name
        if not path.is_file():
            raise UserError(str(path), "there is no such file", _AGAIN)
        digest = manifest.digest(path)
        recorded = files.get(f"{FOLDER}/{name}", {}).get("sha256")
        if digest != recorded or (name == _MODEL and digest != found.model_sha256):
            raise UserError(str(path), "is not the file that the run wrote (its hash differs)", _AGAIN)
