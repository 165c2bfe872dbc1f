"""The formats of the recipe's ``data`` section: what each reads, as a table, and what makes inputs of the model from its rows."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calibrate.data import Encoder, Table
from calibrate.errors import UserError

if TYPE_CHECKING:
    from compress.recipe import DataSpec, Recipe
    from compress.sources import Source

__all__ = ["Request", "table_and_encoder"]


@dataclass(frozen=True)
class Request:
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


def table_and_encoder(request: Request) -> tuple[Table, Encoder]:
    """The rows of the file that the recipe names, and the encoder that makes inputs of the model from them.

    Raises:
        UserError: the file is not there, not of the format, or does not fit the model.
    """
    return _READERS[request.spec.format](request)


def _text(request: Request) -> tuple[Table, Encoder]:
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


def _parquet(request: Request) -> tuple[Table, Encoder]:
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


def _images(request: Request) -> tuple[Table, Encoder]:
    from calibrate.images import ImageFolder

    return request.table(ImageFolder, "folder"), _image_encoder(request)


def _arrays(request: Request) -> tuple[Table, Encoder]:
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


def _text_columns(request: Request) -> tuple[list[str | int], str | int | None]:
    columns = request.columns
    if "text" not in columns:
        hint = "Give columns: {text: name, label: name}, or positions from 0 with header: false."
        raise UserError(request.recipe.place("data"), "no column of text is named", hint)
    return [columns[key] for key in ("text", "pair") if key in columns], columns.get("label")


def _text_encoder(request: Request, cells: int) -> Encoder:
    from calibrate.text import TextEncoder

    tokenizer, tokens = _tokenizer(request), _tokens(request)
    pairing = "none" if cells == 1 else "separate" if request.source.task == "sentence-embedding" else "joint"
    return TextEncoder(tokenizer, request.names, tokens, pairing, tokenizer.fingerprint)  # type: ignore[arg-type]


def _tokenizer(request: Request) -> Any:
    if "input_ids" not in request.names:
        raise request.no_fit("token ids")
    if request.source.tokenizer is None:
        hint = "Put its tokenizer.json into the model's folder, or use format: arrays."
        raise UserError(request.recipe.place("data", "format"), f"{request.source.name} has no tokenizer", hint)
    return request.source.tokenizer


def _tokens(request: Request) -> int:
    tokens, longest = request.spec.tokens, request.source.max_tokens
    if tokens is None:
        hint = f"Give tokens: 64, or up to {longest}." if longest else "Give tokens: 64, say."
        raise UserError(request.recipe.place("data"), "the length of text is not stated", hint)
    if longest is not None and tokens > longest:
        what = f"{tokens} tokens, {request.source.name} takes at most {longest}"
        raise UserError(request.recipe.place("data", "tokens"), what, f"Give tokens: {longest} or fewer.")
    return tokens


def _image_encoder(request: Request) -> Encoder:
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


def _nearest_entry(file: Path) -> str:
    import difflib

    names = [entry.name for entry in file.parent.iterdir()] if os.path.isdir(file.parent) else []
    near = difflib.get_close_matches(file.name, names, n=3, cutoff=0.4)
    return f"Nearest: {', '.join(near)}." if near else f"{file.parent} {'has no such file' if names else 'does not exist'}."


_READERS: dict[str, Callable[[Request], tuple[Table, Encoder]]] = {
    "text": _text,
    "parquet": _parquet,
    "images": _images,
    "arrays": _arrays,
}
