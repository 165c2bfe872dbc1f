"""The recipe's ``data`` section to calibration, validation and evaluation rows that fit the model, and the metric they are
judged by."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from calibrate.data import Encoder, Rows, Table, select, twins
from calibrate.errors import UserError
from calibrate.labels import class_labels, score_labels
from calibrate.metrics import Metric, metric
from calibrate.signature import Batch
from compress.labelled import Validation

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
        """The same calibration batches each time. Padded text of like length comes together, without the columns in which a
        whole batch is padding: what is padding counts for nothing and only costs time. ``calibration_row`` says which row is
        which."""
        return _without_padding(self.calibration, self.batch_size, sort=True)

    def judge(self, source: Source, metric_name: str = "auto") -> Validation | None:
        """What passes may judge themselves by; None where the recipe names no validation rows.

        Raises:
            UserError: the rows have no labels, or not those that the metric needs.
        """
        rows = self.validation
        if rows is None:
            return None
        judged_by = metric_for(metric_name, source, rows)
        batches = functools.partial(_without_padding, rows, self.batch_size, sort=rows.group == 1)
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
    table, encoder = _READERS[spec.format](_Request(spec, split, part.path, recipe, source, tables if tables is not None else {}))
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


@dataclass(frozen=True)
class _Request:
    """What a reader of one format needs."""

    spec: DataSpec
    split: str
    path: Path
    recipe: Recipe
    source: Source
    tables: dict[tuple[object, ...], Table]

    def table(self, make: Callable[[Path, str], Table], *key: object) -> Table:
        """The table of the file, made once."""
        file = self.recipe.path(self.path)
        if not os.path.exists(file):  # never raises, however long the name
            near = _nearest_entry(file)
            sought = "" if file == self.path else f" (looked for at {file})"
            place = self.recipe.place("data", self.split, "path")
            raise UserError(place, f"there is no {self.path}{sought}", near)
        whole = (file.resolve(), *key)
        if whole not in self.tables:
            self.tables[whole] = make(file, str(self.path))
        return self.tables[whole]

    @property
    def columns(self) -> Mapping[str, str | int]:
        return self.spec.columns  # type: ignore[return-value]

    @property
    def names(self) -> tuple[str, ...]:
        return self.source.signature.names

    def no_fit(self, needs: str) -> UserError:
        what = f"format {self.spec.format} gives {needs}, {self.source.name} takes {', '.join(self.names)}"
        return UserError(self.recipe.place("data", "format"), what, "Use format: arrays, with one array for each input.")


def _text(request: _Request) -> tuple[Table, Encoder]:
    from calibrate.text import Delimited, JsonLines, WindowEncoder, Windows

    tokenizer, tokens = _tokenizer(request), _tokens(request)
    if request.source.task == "causal-lm" and request.path.suffix.lower() == ".txt":
        table = request.table(lambda file, name: Windows(file, name, tokenizer.ids, tokens), "windows", tokens)
        return table, WindowEncoder(request.names, tokenizer.fingerprint)
    cells, label = _text_columns(request)
    kinds = {".csv": "csv", ".tsv": "tsv", ".jsonl": "jsonl", ".json": "jsonl"}
    kind = kinds.get(request.path.suffix.lower())
    if kind is None:
        hint = "Text is .csv, .tsv or .jsonl; for causal language models also .txt."
        raise UserError(request.recipe.place("data"), f"{request.path} is of no known kind of text", hint)
    header = request.spec.header

    def make(file: Path, name: str) -> Table:
        return JsonLines(file, name, cells, label) if kind == "jsonl" else Delimited(file, name, cells, label, header)

    return request.table(make, tuple(cells), label, header), _text_encoder(request, len(cells))


def _parquet(request: _Request) -> tuple[Table, Encoder]:
    from calibrate.parquet import Parquet

    if "text" in request.columns or (request.source.tokenizer is not None and "image" not in request.columns):
        cells, label = _text_columns(request)
        table = request.table(lambda file, name: Parquet(file, name, cells, label), tuple(cells), label)
        return table, _text_encoder(request, len(cells))
    encoder = _image_encoder(request)
    image, wanted = request.columns.get("image", "image"), request.columns.get("label")

    def make(file: Path, name: str) -> Table:
        label = wanted if wanted is not None else ("label" if "label" in Parquet(file, name, [image]).names else None)
        return Parquet(file, name, [image], label)

    return request.table(make, image, wanted), encoder


def _images(request: _Request) -> tuple[Table, Encoder]:
    from calibrate.images import ImageFolder

    return request.table(ImageFolder, "folder"), _image_encoder(request)


def _arrays(request: _Request) -> tuple[Table, Encoder]:
    from calibrate.arrays import ArrayEncoder, Npz
    from calibrate.text import missing_column

    label = str(request.columns.get("label", "labels"))
    table = request.table(lambda file, name: Npz(file, name, request.names, label), label)
    assert isinstance(table, Npz)
    if "label" in request.columns and table.label_values() is None:
        raise missing_column(table.name, label, table.names)
    for spec in request.source.signature.inputs:
        shape, floating = table.shapes[spec.name], table.dtypes[spec.name].kind == "f"
        fits = len(shape) == len(spec.shape) and all(
            isinstance(wanted, str) or size == wanted for size, wanted in zip(shape[1:], spec.shape[1:], strict=False)
        )
        if not fits:
            what = f"array {spec.name} is {list(shape)}, the model takes {list(spec.shape)}"
            raise UserError(table.name, what, "The first dimension is the rows.")
        if floating and not spec.dtype.is_floating_point:
            what = f"array {spec.name} is {table.dtypes[spec.name]}, the model takes integers"
            raise UserError(table.name, what, "Save array.astype(numpy.int64).")
        if table.dtypes[spec.name].kind not in "fiub":
            what = f"array {spec.name} is {table.dtypes[spec.name]}, the model takes numbers"
            raise UserError(table.name, what, "Save array.astype(numpy.float32).")
    return table, ArrayEncoder({spec.name: spec.dtype for spec in request.source.signature.inputs})


_READERS: dict[str, Callable[[_Request], tuple[Table, Encoder]]] = {
    "text": _text,
    "parquet": _parquet,
    "images": _images,
    "arrays": _arrays,
}


def _text_columns(request: _Request) -> tuple[list[str | int], str | int | None]:
    columns = request.columns
    if "text" not in columns:
        hint = "Give columns: {text: name, label: name}, or positions from 0 with header: false."
        raise UserError(request.recipe.place("data"), "no column of text is named", hint)
    return [columns[key] for key in ("text", "pair") if key in columns], columns.get("label")


def _text_encoder(request: _Request, cells: int) -> Encoder:
    from calibrate.text import TextEncoder

    tokenizer, tokens = _tokenizer(request), _tokens(request)
    pairing = "none" if cells == 1 else "separate" if request.source.task == "sentence-embedding" else "joint"
    return TextEncoder(tokenizer, request.names, tokens, pairing, tokenizer.fingerprint)  # type: ignore[arg-type]


def _tokenizer(request: _Request) -> Any:
    if "input_ids" not in request.names:
        raise request.no_fit("token ids")
    if request.source.tokenizer is None:
        hint = "Put its tokenizer.json into the model's folder, or use format: arrays."
        raise UserError(request.recipe.place("data", "format"), f"{request.source.name} has no tokenizer", hint)
    return request.source.tokenizer


def _tokens(request: _Request) -> int:
    tokens, longest = request.spec.tokens, request.source.max_tokens
    if tokens is None:
        hint = f"Give tokens: 64, or up to {longest}." if longest else "Give tokens: 64, say."
        raise UserError(request.recipe.place("data"), "the length of text is not stated", hint)
    if longest is not None and tokens > longest:
        what = f"{tokens} tokens, {request.source.name} takes at most {longest}"
        raise UserError(request.recipe.place("data", "tokens"), what, f"Give tokens: {longest} or fewer.")
    return tokens


def _image_encoder(request: _Request) -> Encoder:
    from calibrate.images import ImageEncoder

    inputs = request.source.signature.inputs
    if len(inputs) != 1 or len(inputs[0].shape) != 4 or not inputs[0].dtype.is_floating_point:
        raise request.no_fit("images")
    shape, spec = inputs[0].shape, request.spec
    own = dict(request.source.preprocessing or {"from": "the recipe", "scale": 1 / 255, "interpolation": "bilinear"})
    sizes = [size for size in shape[2:] if isinstance(size, int)]
    size = own["size"] = _pair(spec.image_size) or (sizes if len(sizes) == 2 else own.get("size"))
    own["channels"] = spec.channels or (shape[1] if isinstance(shape[1], int) else own.get("channels", 3))
    said: dict[str, Any] = {"mean": spec.mean, "std": spec.std, "crop": spec.crop, "interpolation": spec.interpolation}
    said["resize"] = list(spec.resize) if isinstance(spec.resize, tuple) else spec.resize
    stated = {key: list(value) if isinstance(value, tuple) else value for key, value in said.items() if value is not None}
    own |= stated
    if stated:
        own["from"] = f"{own.get('from')}; the recipe: {', '.join(stated)}"
    for key in ("mean", "std"):
        if own.get(key) is None:
            hint = f"Give {key}: [0.5], say, for pixels in 0..1."
            raise UserError(
                request.recipe.place("data"), f"nothing states the {key} of the pixels for {request.source.name}", hint
            )
    if size is None:
        raise UserError(request.recipe.place("data"), "nothing states the size of the images", "Give image_size: 224, say.")
    if sizes and list(size) != sizes:
        what = f"image_size {list(size)}, {request.source.name} takes {sizes}"
        raise UserError(request.recipe.place("data", "image_size"), what, "Leave it out, or take the model's size.")
    return ImageEncoder(inputs[0].name, {"resize": list(size), "crop": False} | own)


def _pair(size: int | tuple[int, int] | None) -> list[int] | None:
    if size is None:
        return None
    return [size, size] if isinstance(size, int) else list(size)


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


def _without_padding(rows: Rows, size: int, *, sort: bool) -> Iterator[Batch]:
    """The rows in batches; padded text is trimmed and, with ``sort``, of like length together."""
    batches = rows.batches(size)
    if not rows.encoder.ragged:
        return batches
    return map(_trimmed, _of_like_length(batches, size) if sort else batches)


def _of_like_length(batches: Iterator[Batch], size: int, window: int = 8) -> Iterator[Batch]:
    """The same rows in batches of like length, sorted among ``window`` batches at a time, in an order that is not by length."""
    start = 0
    while held := list(islice(batches, window)):
        rows = {name: torch.cat([batch[name] for batch in held]) for name in held[0]}
        count = next(iter(rows.values())).shape[0]
        order = rows["attention_mask"].sum(1).argsort(stable=True) if "attention_mask" in rows else torch.arange(count)
        rows["calibration_row"] = torch.arange(start, start + count)
        parts = torch.split(order, size)
        for number in torch.randperm(len(parts), generator=torch.Generator().manual_seed(start)).tolist():
            yield {name: value[parts[number]] for name, value in rows.items()}
        start += count


def _trimmed(batch: Batch) -> Batch:
    """Tokenized text cut to its longest row: what is padding in every row counts for nothing and only costs time.

    Text padded at the left, and batches without ``attention_mask``, stay as they are.
    """
    mask = batch.get("attention_mask")
    if mask is None:
        return batch
    length = max(1, int(mask.amax(0).nonzero().max()) + 1) if bool(mask.any()) else mask.shape[1]
    return {name: value[:, :length] if value.shape[:2] == mask.shape else value for name, value in batch.items()}


def _example(rows: Rows) -> Batch:
    """Rows to trace and to draw time with: among the first 64, the most padded first, so that no mask is all ones."""
    ragged = rows.encoder.ragged
    batch = next(iter(rows.batches(min(len(rows), 64 if ragged else _EXAMPLE_ROWS))))
    order = torch.arange(next(iter(batch.values())).shape[0])
    if "attention_mask" in batch:
        order = batch["attention_mask"].sum(1).argsort(stable=True)
    order = order[:_EXAMPLE_ROWS]
    return {name: value[order] for name, value in batch.items()}


def _nearest_entry(file: Path) -> str:
    import difflib

    names = [entry.name for entry in file.parent.iterdir()] if os.path.isdir(file.parent) else []
    near = difflib.get_close_matches(file.name, names, n=3, cutoff=0.4)
    return f"Nearest: {', '.join(near)}." if near else f"{file.parent} {'has no such file' if names else 'does not exist'}."
