"""The recipe's ``data`` section to calibration, validation and evaluation rows that fit the model, and the metric they are
judged by."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from calibrate.data import Rows, Table, select, twins
from calibrate.errors import UserError
from calibrate.labels import class_labels, score_labels
from calibrate.metrics import Metric, metric
from calibrate.signature import Batch
from compress.data_formats import Request, table_and_encoder
from compress.labelled import Validation
from compress.padding import without_padding

if TYPE_CHECKING:
    from compress.recipe import DataSpec, Recipe, Split
    from compress.sources import Source

__all__ = ["Data", "build_rows", "load_data", "metric_for"]

_EXAMPLE_ROWS = 4
_BATCH = 16


@dataclass
class Data:
    """What a run uses of its data.

    Attributes:
        example: a few real rows, the most padded ones first where text is ragged.
        evaluation: None where the recipe gives none.
        metric: None where there are no labels; then agreement and SQNR against float judge alone.
        batch_size: data rows a batch.
        duplicates: evaluation rows whose content is also a calibration row.
        validation: by which passes may judge themselves; None where the recipe gives none.
        validation_duplicates: evaluation rows whose content is also a validation row.
        warnings: what a reader of the figures has to know.
    """

    calibration: Rows
    evaluation: Rows | None
    metric: Metric | None
    metric_name: str
    example: Batch
    batch_size: int = _BATCH
    duplicates: int = 0
    validation: Rows | None = None
    validation_duplicates: int = 0
    warnings: tuple[str, ...] = ()

    def calibration_batches(self) -> Iterator[Batch]:
        """The same calibration batches each time, rows of the whole table in each (``Rows.mixed``). Padded text of like length
        comes together, without the columns in which a whole batch is padding: what is padding counts for nothing and only costs
        time. ``calibration_row`` says which row is which."""
        return without_padding(self.calibration, self.batch_size, sort=True, mixed=True)

    def judge(self, source: Source, metric_name: str = "auto") -> Validation | None:
        """What passes may judge themselves by; None where the recipe names no validation rows.

        Raises:
            UserError: the rows have no labels, or not those that the metric needs.
        """
        rows = self.validation
        if rows is None:
            return None
        judged_by = metric_for(metric_name, source, rows)
        batches = functools.partial(without_padding, rows, self.batch_size, sort=rows.group == 1)
        return Validation.of(rows, source.task, judged_by, source.signature.call, batches)

    def describe(self) -> dict[str, Any]:
        """What reports and the manifest say of the data, as JSON."""
        return {
            "calibration": self.calibration.describe(),
            "evaluation": None if self.evaluation is None else self.evaluation.describe(),
            "rows_in_both_by_content": self.duplicates,
            "metric": self.metric_name,
            **({} if self.validation is None else self._validation()),
        }

    def _validation(self) -> dict[str, Any]:
        assert self.validation is not None
        return {
            "validation": self.validation.describe(),
            "rows_in_validation_and_evaluation_by_content": self.validation_duplicates,
        }


def load_data(recipe: Recipe, source: Source, *, evaluation: bool = True) -> Data:
    """The rows that a recipe asks for, as inputs of its model.

    Args:
        evaluation: False leaves the evaluation rows out (nothing will be judged).

    Raises:
        UserError: a file, column, label or row that is not as the recipe says; validation rows without labels; with
            ``strict_splits``, calibration or validation rows that are evaluated too.
    """
    spec = recipe.data
    tables: dict[tuple[object, ...], Table] = {}
    calibration = build_rows(spec, "calibration", source, recipe, tables)
    validation = None if spec.validation is None else build_rows(spec, "validation", source, recipe, tables)
    rows, both, seen = None, 0, 0
    warnings: tuple[str, ...] = ()
    if evaluation and spec.evaluation is not None:
        rows = build_rows(spec, "evaluation", source, recipe, tables)
        both, warnings = _apart(recipe, calibration, rows, "calibration")
        if validation is not None:
            seen, more = _apart(recipe, validation, rows, "validation")
            warnings += more
    judged_by = metric_for(spec.metric, source, rows)
    made = Data(
        calibration=calibration,
        evaluation=rows,
        metric=judged_by,
        metric_name=judged_by.name if judged_by else "agreement",
        example=_example(calibration),
        duplicates=both,
        validation=validation,
        validation_duplicates=seen,
        warnings=warnings,
    )
    made.judge(source, spec.metric)
    return made


def build_rows(
    spec: DataSpec, split: str, source: Source, recipe: Recipe, tables: dict[tuple[object, ...], Table] | None = None
) -> Rows:
    """The rows of ``split`` (``calibration``, ``validation`` or ``evaluation``) as inputs of the model.

    Args:
        tables: tables already made, by what they were made from; a file is scanned once for all splits.
    """
    part: Split | None = getattr(spec, split)
    if part is None:
        raise UserError(recipe.place("data"), f"there is no {split}", "Name its path and rows.")
    where = f"data.{split}"
    last = split == "evaluation"
    if spec.format == "embedded":
        from compress.embedded import digits_rows

        if source.signature.names != ("pixels",):
            hint = "Use format: images, parquet, text or arrays for other models."
            raise UserError(recipe.place("data", "format"), f"the embedded digits do not fit {source.name}", hint)
        return digits_rows("test" if last else split, part.selection, recipe.seed)
    if part.path is None:
        raise UserError(recipe.place("data", split), f"{split} names no path", "Give path: a file or folder.")
    request = Request(spec, split, part.path, recipe, source, tables if tables is not None else {})
    table, encoder = table_and_encoder(request)
    behind = _drawn_before(recipe, part) if split == "validation" else 0
    indices = select(len(table), part.selection, seed=recipe.seed, where=f"{where}.rows", from_end=last, behind=behind)
    labels = _labels(table, indices, source, spec)
    rows = Rows(table, encoder, indices, labels, _chosen(part, recipe.seed))
    rows.check()
    return rows


def _drawn_before(recipe: Recipe, part: Split) -> int:
    """How many rows of the same file the seed draws for calibration: validation rows are drawn behind them."""
    other = recipe.data.calibration
    if other.path is None or part.path is None or not (other.seeded and isinstance(other.rows, int)):
        return 0
    same = os.path.realpath(recipe.path(other.path)) == os.path.realpath(recipe.path(part.path))
    return other.rows if same else 0


def _apart(recipe: Recipe, seen: Rows, evaluation: Rows, split: str) -> tuple[int, tuple[str, ...]]:
    """How many evaluation rows passes see as rows of ``split`` too, and the warning of it.

    Raises:
        UserError: there are some, and ``strict_splits`` is true.
    """
    shared = twins(seen, evaluation)
    if not shared:
        return 0, ()
    what = f"{len(shared)} of the {len(evaluation)} evaluation rows"
    first = f"the first is {evaluation.table.place(shared[0])}"
    if recipe.data.strict_splits:
        hint = "Give each its own rows, such as rows: 0-127 and rows: 128-999, or its own file; or take strict_splits out."
        raise UserError(recipe.place("data", "evaluation"), f"{what} are also {split} rows ({first})", hint)
    return len(shared), (f"{what} were also {split} rows: {first}; figures on rows that passes have seen flatter them",)


def metric_for(name: str, source: Source, rows: Rows | None) -> Metric | None:
    """The metric of that name; for ``auto`` that of the task. None for ``agreement``, and for ``auto`` without labels.

    Raises:
        UserError: the metric needs labels and the rows have none.
    """
    labelled = rows is not None and rows.labels is not None
    if name == "auto":
        name = _usual(source, rows)
    if name == "agreement":
        return None
    chosen = metric(name)
    if chosen.needs_labels and rows is not None and not labelled:
        hint = "Name the label column under data.columns, or give metric: agreement."
        raise UserError("data.metric", f"{name} needs labels, and {rows.table.name} has none", hint)
    if name in ("spearman", "pearson") and source.task == "sentence-embedding" and rows is not None and rows.group != 2:
        raise UserError(
            "data.metric", f"{name} of embeddings needs pairs of sentences", "Name the column pair under data.columns."
        )
    return chosen


def _usual(source: Source, rows: Rows | None) -> str:
    """The metric that ``auto`` stands for."""
    if source.task == "causal-lm":
        return "perplexity"
    if rows is None or rows.labels is None:
        return "agreement"
    if source.task in ("image-classification", "text-classification"):
        return "spearman" if rows.labels.is_floating_point() else "accuracy"
    return "spearman" if source.task == "sentence-embedding" and rows.group == 2 else "agreement"


def _labels(table: Table, indices: list[int], source: Source, spec: DataSpec) -> Tensor | None:
    values = table.label_values()
    if values is None:
        return None
    chosen = [values[index] for index in indices]

    def place(row: int) -> str:
        return table.place(indices[row])

    classifies = source.task in ("image-classification", "text-classification") and source.classes != 1
    if not classifies or spec.metric in ("spearman", "pearson"):
        return score_labels(chosen, place)
    names = [source.labels[number] for number in sorted(source.labels)] if source.labels else None
    data_names = getattr(table, "class_names", None)
    return class_labels(chosen, place, classes=source.classes, names=names, data_names=data_names)


def _chosen(part: Split, seed: int) -> str:
    selection = part.selection
    if isinstance(selection, tuple):
        return f"{selection[0]}-{selection[1] - 1}"
    return "all" if selection == "all" else f"{selection} by seed {seed}"


def _example(rows: Rows) -> Batch:
    """Rows to trace and to draw time with: among the first 64, the most padded first, so that no mask is all ones."""
    ragged = rows.encoder.ragged
    batch = next(iter(rows.batches(min(len(rows), 64 if ragged else _EXAMPLE_ROWS))))
    order = torch.arange(next(iter(batch.values())).shape[0])
    if "attention_mask" in batch:
        order = batch["attention_mask"].sum(1).argsort(stable=True)
    order = order[:_EXAMPLE_ROWS]
    return {name: value[order] for name, value in batch.items()}
