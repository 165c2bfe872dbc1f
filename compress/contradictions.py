"""What each key of a recipe allows but the keys together do not."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

from compress.yaml_positions import Document, Fault, Step

if TYPE_CHECKING:
    from compress.recipe import Recipe, Split

__all__ = ["contradictions"]

Found = Iterator[tuple[tuple[Step, ...], str, str]]

_COLUMNS = {
    "text": {"text", "pair", "label"},
    "parquet": {"image", "label", "text", "pair"},
    "arrays": {"label"},
    "images": set[str](),
    "embedded": set[str](),
}
_IMAGE_KEYS = ("image_size", "channels", "mean", "std", "resize", "crop", "interpolation")


def contradictions(recipe: Recipe, document: Document) -> list[Fault]:
    """Faults of a recipe whose keys are each in order."""
    found = [*_model(recipe), *_data(recipe), *_splits(recipe), *_passes(recipe), *_export(recipe), *_accept(recipe)]
    found += _undo(recipe)
    faults = []
    for path, what, hint in found:
        line, column = document.place(path, key=True)
        faults.append(Fault(line, column, what, hint))
    return faults


def _model(recipe: Recipe) -> Found:
    checkpoint = recipe.model.checkpoint
    if checkpoint is not None and not recipe.model.source.startswith("timm:"):
        yield (
            ("model", "checkpoint"),
            "checkpoint goes with a timm model only",
            "Remove it; other sources hold their weights.",
        )
    if checkpoint is not None and str(checkpoint) != "pretrained" and checkpoint.suffix != ".safetensors":
        hint = "Save the weights with `safetensors.torch.save_file`; pickled files are not read."
        yield ("model", "checkpoint"), f"{checkpoint} is not a safetensors file", hint


def _data(recipe: Recipe) -> Found:
    data, given = recipe.data, recipe.data.model_fields_set
    for column in data.columns:
        if column not in _COLUMNS[data.format]:
            known = ", ".join(sorted(_COLUMNS[data.format])) or "none"
            yield (
                ("data", "columns", column),
                f"format {data.format} has no column {column}",
                f"Columns there: {known}.",
            )
    if "tokens" in given and data.format not in ("text", "parquet"):
        yield ("data", "tokens"), f"tokens does not go with format {data.format}", "It is the padded length of text."
    if data.format == "text" and data.tokens is None:
        yield (
            ("data",),
            "tokens is missing",
            "Add `tokens:` with the length that text is padded and cut to, such as 64.",
        )
    splits = (data.calibration, data.validation, data.evaluation)
    paths = [split.path for split in splits if split is not None and split.path is not None]
    plain = bool(paths) and all(path.suffix == ".txt" for path in paths)
    if data.format == "text" and "text" not in data.columns and not plain:
        yield ("data",), "columns does not say where the text is", "Add `columns: {text: NAME, label: NAME}`."
    if "header" in given and data.format != "text":
        yield ("data", "header"), f"header does not go with format {data.format}", "It is for csv and tsv files."
    for key in _IMAGE_KEYS:
        if key in given and data.format not in ("images", "parquet"):
            yield ("data", key), f"{key} does not go with format {data.format}", "It is for images and parquet."
    lengths = {len(values) for values in (data.mean, data.std) if values is not None}
    if len(lengths) > 1 or (data.channels and lengths - {1, data.channels}):
        yield ("data", "mean"), "mean and std do not have the same number of channels", "Give one value a channel."


def _splits(recipe: Recipe) -> Found:
    data = recipe.data
    for name, split in (("calibration", data.calibration), ("validation", data.validation), ("evaluation", data.evaluation)):
        if split is None:
            continue
        if data.format == "embedded" and split.path is not None:
            yield (
                ("data", name, "path"),
                "embedded data has no path",
                "Remove it; calibration, validation and evaluation rows are kept apart.",
            )
        if data.format != "embedded" and split.path is None:
            yield ("data", name), f"{name} has no path", f"Add `{name}: {{path: FILE, rows: ...}}`."
        start, end = split.span
        if end is not None and end <= start:
            yield ("data", name, "rows"), f"rows {split.rows} ends before it begins", "Write first-last, such as 0-127."
        if split.shuffle is not None and not isinstance(split.rows, int):
            yield (
                ("data", name, "shuffle"),
                "shuffle goes with a count of rows only",
                "Remove it, or give rows as a count.",
            )
    for name, split in (("calibration", data.calibration), ("validation", data.validation)):
        if data.strict_splits and data.evaluation is not None and split is not None and _meet(recipe, split, data.evaluation):
            hint = "Give both as ranges that do not meet, such as rows: 0-127 and rows: 128-999, or use two files."
            yield ("data", "evaluation"), f"evaluation reads rows that {name} reads, and strict_splits is true", hint


def _meet(recipe: Recipe, first: Split, second: Split) -> bool:
    """Whether two splits of one file share a row for certain; what the seed draws is known when the rows are read."""
    if first.path is None or second.path is None:
        return False
    if os.path.realpath(recipe.path(first.path)) != os.path.realpath(recipe.path(second.path)):
        return False
    if any(one.seeded and other.rows != "all" for one, other in ((first, second), (second, first))):
        return False
    (start, end), (other_start, other_end) = first.span, second.span
    return (end is None or other_start < end) and (other_end is None or start < other_end)


def _passes(recipe: Recipe) -> Found:
    data = recipe.data
    path = "" if data.calibration.path is None else f"path: {data.calibration.path}, "
    nesting = [number for number, step in enumerate(recipe.passes) if step.nests]
    for number in nesting[1:]:
        yield ("passes", number), f"{recipe.passes[number].name} is listed twice", "A run keeps one sorted model; keep one."
    for number, step in enumerate(recipe.passes):
        if step.begins and number:
            what = f"{step.name} begins with a saved model, so what the passes before it do is lost"
            yield ("passes", number), what, "Put it first."
    for number, step in enumerate(recipe.passes):
        if step.validates and data.validation is None:
            what = f"{step.name} chooses by validation rows, and data names none"
            hint = f"Add to data: `validation: {{{path}rows: 512}}`: labelled rows that are not evaluated."
            yield ("passes", number), what, hint


def _export(recipe: Recipe) -> Found:
    seen: set[str] = set()
    for number, exporter in enumerate(recipe.export):
        if exporter.format in seen:
            yield ("export", number), f"{exporter.format} is listed twice", "A run writes one file a format; keep one."
        seen.add(exporter.format)


def _accept(recipe: Recipe) -> Found:
    formats = {exporter.format for exporter in recipe.export}
    for name in ("onnx", "openvino", "coreml", "tensorrt"):
        if name in recipe.accept.model_fields_set and {"openvino": "onnx"}.get(name, name) not in formats:
            yield (
                ("accept", name),
                f"accept has limits for {name}, which is not exported",
                "Add it to export, or remove them.",
            )
    if recipe.data.evaluation is None and recipe.accept.asks_for_rows():
        yield (
            ("accept",),
            "accept has limits that need evaluation rows",
            "Add `evaluation:` to data, or keep size_ratio only.",
        )


def _undo(recipe: Recipe) -> Found:
    if recipe.undo == "unpaid" and recipe.measure.when != "each_pass":
        yield ("undo",), "undo: unpaid has nothing to judge a pass by", "Add `measure: each_pass`."
    if recipe.measure.when == "each_pass" and recipe.data.evaluation is None:
        yield ("measure",), "measure: each_pass needs evaluation rows", "Add `evaluation:` to data."
