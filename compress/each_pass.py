"""``measure: each_pass``: writes, runs and weighs the files after every pass, and decides whether the pass is taken back."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from compress import manifest
from compress.checks import placed
from compress.judgement import Judge
from compress.promise import Promise
from compress.report import Row, StepRecord
from compress.worth import Standing, measured, paid, says
from export.contract import Artifact
from export.graph import Traceable

if TYPE_CHECKING:
    from compress.recipe import Recipe

__all__ = ["EachPass", "linked", "with_final_paths"]


@dataclass
class EachPass:
    """The files after each pass, by number of the pass from 1, in sub-folders of ``folder``; number 0 are the float files.

    The files of the last pass that stands become the run's own: nothing is written twice.
    """

    recipe: Recipe
    judge: Judge
    folder: Path
    compressed: dict[int, Row] = field(default_factory=dict)
    """The row of the torch model whose outputs the judge holds, by number of the pass after which it was run."""
    _latest: dict[int, Standing] = field(default_factory=dict)

    def path(self, number: int) -> Path:
        """The folder of the files after a pass."""
        return self.folder / f"files-{number}"

    def weighed(
        self, record: StepRecord, number: int, stands: int, source: Traceable, compressed: Callable[[], Row]
    ) -> StepRecord:
        """Writes and judges the files after pass ``number`` and compares them with those of pass ``stands``.

        Args:
            record: of the pass; comes back with what was found, and whether the pass is to be taken back.
            source: the model after the pass.
            compressed: runs that model on the evaluation rows, for the judge.
        """
        self.compressed = {number: compressed()}
        artifacts = self._written(source, self.path(number))
        rows, worth, after = measured(self.judge, self.recipe.export, self._standing(stands), artifacts, Promise.of(source))
        verdict = paid(worth)
        undone = verdict is False and self.recipe.undo == "unpaid"
        if not undone:
            self._latest = {number: after}
        told = {"rows": rows, "worth": worth, "paid": verdict, "undone": undone, "says": says(worth, verdict, undone)}
        return record.model_copy(update=told)

    def forget(self, *, but: int) -> None:
        """Removes all files but those of one pass."""
        for folder in self.folder.glob("files-*"):
            if folder != self.path(but):
                shutil.rmtree(folder)

    def _standing(self, number: int) -> Standing:
        if number not in self._latest:
            self._latest = {number: Standing(self._found(number) if number else self.judge.floats)}
        return self._latest[number]

    def _found(self, number: int) -> dict[str, Artifact]:
        """The files of a pass as they lie there."""
        paths = {exporter.format: self.path(number) / exporter.filename for exporter in self.recipe.export}
        return {format: Artifact(format, path, manifest.size_bytes(path)) for format, path in paths.items()}

    def _written(self, source: Traceable, folder: Path) -> dict[str, Artifact]:
        artifacts = {}
        for number, exporter in enumerate(self.recipe.export):
            path = folder / exporter.filename
            path.parent.mkdir(parents=True, exist_ok=True)
            with placed(self.recipe, "export", number, exporter.format):
                artifacts[exporter.format] = exporter.write(source, path)
        return artifacts


def with_final_paths(steps: Sequence[StepRecord], stands: int, recipe: Recipe) -> list[StepRecord]:
    """The records with the paths that the files of pass ``stands`` have in the end; those of other passes are gone."""
    names = {exporter.format: exporter.filename for exporter in recipe.export}
    made = []
    for number, step in enumerate(steps, 1):
        rows = [row.model_copy(update={"path": names[row.format] if number == stands else ""}) for row in step.rows]
        made.append(step.model_copy(update={"rows": rows}))
    return made


def linked(path: Path, name: Path) -> None:
    """Gives a file, or the files of a folder, a second name; where the file system has no such thing, it is copied."""
    unfinished = name.with_name(f".{name.name}.part")
    if name.is_file() and name.samefile(path):  # renaming one name of a file to another of its names leaves both
        return
    if unfinished.is_dir():
        shutil.rmtree(unfinished)
    unfinished.unlink(missing_ok=True)
    if path.is_dir():
        shutil.copytree(path, unfinished, copy_function=_link)
    else:
        _link(str(path), str(unfinished))
    os.replace(unfinished, name)


def _link(path: str, name: str) -> None:
    try:
        os.link(path, name)
    except OSError:
        shutil.copyfile(path, name)
