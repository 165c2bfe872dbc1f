"""The model after each pass, on disk: what an interrupted run goes on from, and what a pass is taken back to."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from compress.saved import reload, restore, save
from compress.surgery import Surgery

if TYPE_CHECKING:
    from compress.sources import Source

__all__ = ["Checkpoints", "Subject"]


@dataclass
class Subject:
    """A model on its way through the passes, and the edits made to it so far."""

    model: nn.Module
    surgery: Surgery


@dataclass
class Checkpoints:
    """Checkpoints in ``folder``, by number of the pass, from 1; number 0 is the float model and needs no file.

    ``fresh`` loads the float model; it is asked once for each ``restore``.
    """

    folder: Path
    source: Source
    fresh: Callable[[], nn.Module]

    def path(self, number: int) -> Path:
        """The folder of a checkpoint."""
        return self.folder / f"pass-{number}"

    def keep(self, subject: Subject, number: int) -> None:
        """Writes the model as it is after pass ``number``, and goes on with the tensors as they are in the file.

        So does a run that is resumed from there: what follows sees the same values at the same alignment, without views, and
        gives the same bytes.
        """
        folder = self.path(number)
        folder.mkdir()
        save(subject.model, subject.surgery.edits, self.source.rebuild, self.source.signature, folder)
        reload(subject.model, folder)

    def restore(self, number: int) -> Subject:
        """The model as it was after pass ``number``, from the float model, the recorded edits and the tensors of the file."""
        model = self.fresh()
        return Subject(model, restore(model, self.path(number)) if number else Surgery())

    def forget(self, *, but: int) -> None:
        """Removes all checkpoints but one (0: all)."""
        for folder in self.folder.glob("pass-*"):
            if folder != self.path(but) and folder.is_dir():
                shutil.rmtree(folder)
