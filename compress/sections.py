"""The sections of a recipe: every key below the first level, with its type, bounds, default and description."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema

__all__ = [
    "Accept",
    "Columns",
    "DataSpec",
    "Format",
    "Limits",
    "Measure",
    "MeasureWhen",
    "ModelSource",
    "ModelSpec",
    "Role",
    "RowSpan",
    "Section",
    "Split",
    "Task",
]

Task = Literal["auto", "image-classification", "text-classification", "sentence-embedding", "causal-lm", "features"]
Format = Literal["embedded", "images", "parquet", "text", "arrays"]
Columns = Literal["text", "pair", "label", "image"]
Runtime = Literal["onnx", "openvino", "coreml", "tensorrt"]
Limit = Literal["metric_drop", "sqnr_db", "agreement", "latency_ratio", "size_ratio"]
Role = Literal[
    "attention.query",
    "attention.key",
    "attention.value",
    "attention.out",
    "mlp.up",
    "mlp.gate",
    "mlp.down",
    "norm",
    "embedding",
    "head",
    "conv",
    "linear",
]

_SOURCE = r"^(hf:.+|timm:.+|embedded:.+|.*\.py:[A-Za-z_][A-Za-z0-9_]*)$"
_SPAN = r"^[0-9]+-[0-9]+$"

Count = Annotated[int, Field(ge=1, le=2**31 - 1, strict=True)]
Size = Annotated[int, Field(ge=1, le=16384, strict=True)]
Index = Annotated[int, Field(ge=0, le=2**31 - 1, strict=True)]
ModelSource = Annotated[
    str,
    Field(
        pattern=_SOURCE,
        examples=["hf:path/or/hub-id", "timm:name", "file.py:function", "embedded:digits-vit"],
        description="where the model comes from: hf: a Hugging Face folder or hub id; timm: a name of timm; "
        "file.py:function: a function of yours that returns a module and example inputs (runs only with --trust); "
        "embedded: a small model that ships with the package",
    ),
]


def _written(path: object) -> object:
    if isinstance(path, str) and path.startswith("~"):
        raise ValueError(f"{path} begins with ~\nWrite the whole path; ~ is not expanded.")
    if path == "":
        raise ValueError("a path is empty\nName a file or a folder.")
    return path


FilePath = Annotated[
    Path,
    BeforeValidator(_written),
    WithJsonSchema({"type": "string", "pattern": "^[^~]", "examples": ["path/to/file"]}),
]


class Section(BaseModel):
    """A part of a recipe: frozen, strict, no unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ModelSpec(Section):
    """The model: where it comes from and, where that is not plain, what it does and what its parts are."""

    source: ModelSource
    task: Task = Field("auto", description="what the model does; auto reads it from the model's own config")
    checkpoint: FilePath | None = Field(
        None, description="safetensors file with the weights of a timm model, or pretrained to fetch timm's own"
    )
    roles: dict[Role, tuple[str, ...]] = Field(
        {}, description="module paths (with * and ?) of parts that the anatomy does not find or finds wrongly, by role"
    )


class RowSpan(Section):
    """A run of rows of a file."""

    start: Index = Field(0, description="first row, from 0")
    count: Count = Field(description="how many rows")


class Split(Section):
    """Rows of one file, for calibration, validation or evaluation."""

    path: FilePath | None = Field(
        None, description="file or folder, relative to the recipe; none for embedded data, which has its own splits"
    )
    rows: Annotated[str, Field(pattern=_SPAN, examples=["0-127"])] | Literal["all"] | Count | RowSpan = Field(
        "all",
        description="which rows: all; a count, chosen by the seed; a range such as 0-127 (both ends belong to it); "
        "or start and count",
    )
    shuffle: bool | None = Field(
        None, description="whether a count of rows is chosen by the seed (the default) or taken from the beginning"
    )

    @property
    def seeded(self) -> bool:
        """Whether the seed chooses the rows."""
        return isinstance(self.rows, int) and self.shuffle is not False

    @property
    def span(self) -> tuple[int, int | None]:
        """First row and one past the last (None: the end of the file); what a seeded choice is taken from."""
        if isinstance(self.rows, RowSpan):
            return self.rows.start, self.rows.start + self.rows.count
        if isinstance(self.rows, int):
            return (0, None) if self.seeded else (0, self.rows)
        if self.rows == "all":
            return 0, None
        first, _, last = self.rows.partition("-")
        return int(first), int(last) + 1

    @property
    def selection(self) -> Literal["all"] | int | tuple[int, int]:
        """All rows, a count that the seed chooses, or first row and one past the last."""
        start, end = self.span
        if self.seeded and isinstance(self.rows, int):
            return self.rows
        return "all" if end is None else (start, end)

    @property
    def count(self) -> int | None:
        """How many rows; None: all of them."""
        if isinstance(self.rows, int):
            return self.rows
        start, end = self.span
        return None if end is None else end - start


class DataSpec(Section):
    """The data: its format, how a row becomes the model's input, and which rows are for what.

    Whatever is said of images goes before what the model's own preprocessing says.
    """

    format: Format = Field(
        description="embedded: the digits of the embedded model; images: a folder with one sub-folder for each class; "
        "parquet: columns with images and labels; text: csv, tsv or jsonl; arrays: npz with one array for each input"
    )
    columns: dict[Columns, str | Index] = Field(
        {}, description="column names, or positions from 0 in a file without header", examples=[{"text": 0, "label": 1}]
    )
    header: bool = Field(True, description="whether the first line of a csv or tsv file names the columns")
    tokens: Annotated[int, Field(ge=1, le=1_048_576)] | None = Field(
        None, description="length that text is padded and cut to, in tokens"
    )
    image_size: Size | tuple[Size, Size] | None = Field(
        None, description="pixels of the model's input: one number, or height and width"
    )
    channels: Literal[1, 3] | None = Field(None, description="1 for grey, 3 for colour")
    mean: tuple[float, ...] | None = Field(
        None, min_length=1, max_length=3, description="subtracted from each channel, pixels in 0..1"
    )
    std: tuple[Annotated[float, Field(gt=0)], ...] | None = Field(
        None, min_length=1, max_length=3, description="divides each channel, pixels in 0..1"
    )
    resize: Size | tuple[Size, Size] | None = Field(
        None, description="pixels that an image is first resized to: the shorter edge, or height and width"
    )
    crop: bool | None = Field(None, description="whether image_size is then cut out of the middle")
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"] | None = Field(
        None, description="how images are resized"
    )
    calibration: Split = Field(Split(rows=128), description="rows that passes may look at")
    validation: Split | None = Field(
        None, description="labelled rows that passes may judge themselves by while they choose; they are not for the verdict"
    )
    evaluation: Split | None = Field(
        None, description="other rows, on which every file is judged; without them nothing is judged"
    )
    strict_splits: bool = Field(
        False,
        description="whether an evaluation row that is also a calibration or validation row stops the run (otherwise the "
        "report warns of it)",
    )
    metric: Literal["auto", "accuracy", "top5", "f1", "spearman", "pearson", "perplexity", "agreement"] = Field(
        "auto",
        description="the task's metric; auto takes the usual one of the task, and agreement with float without labels",
    )


class Limits(Section):
    """What a file may lose and must gain, all against the float model."""

    metric_drop: Annotated[float, Field(ge=-100, le=100)] | None = Field(
        None,
        description="largest loss of the metric against float: 0.01 is one point of accuracy, or one per cent of perplexity",
    )
    sqnr_db: Annotated[float, Field(ge=0, le=200)] | None = Field(
        None, description="least signal-to-quantization-noise ratio of the output against float, dB"
    )
    agreement: Annotated[float, Field(ge=0, le=1)] | None = Field(
        None, description="least share of rows with the same prediction as float"
    )
    latency_ratio: Annotated[float, Field(gt=0, le=100)] | None = Field(
        None, description="largest median time over that of the float file in the same runtime"
    )
    size_ratio: Annotated[float, Field(gt=0, le=100)] | None = Field(
        None, description="largest file size over that of the float file in the same format"
    )


class Accept(Limits):
    """The contract: limits for every file, limits for one runtime (they come first), and what may stay unvalidated."""

    onnx: Limits = Field(Limits(), description="limits for ONNX Runtime alone")
    openvino: Limits = Field(Limits(), description="limits for the ONNX file in OpenVINO alone")
    coreml: Limits = Field(Limits(), description="limits for Core ML alone")
    tensorrt: Limits = Field(Limits(), description="limits for TensorRT alone")
    unvalidated: tuple[Runtime, ...] = Field(
        (), description="runtimes whose file may stay without a run in its own runtime on this machine"
    )

    def limit(self, line: str, runtime: str) -> float | None:
        """The limit ``line`` that holds for a runtime; None where there is none."""
        own = getattr(self, runtime, None)
        value = getattr(own, line) if isinstance(own, Limits) else None
        found: float | None = value if value is not None else getattr(self, line)
        return found

    def silent(self, runtime: str) -> bool:
        """Whether no limit names this runtime."""
        own = getattr(self, runtime, None)
        return not isinstance(own, Limits) or own == Limits()

    def asks_for_rows(self) -> bool:
        """Whether any limit needs evaluation rows."""
        lines = ("metric_drop", "sqnr_db", "agreement", "latency_ratio")
        holders: tuple[Limits, ...] = (self, self.onnx, self.openvino, self.coreml, self.tensorrt)
        return any(getattr(holder, line) is not None for holder in holders for line in lines)


MeasureWhen = Annotated[
    Literal["end", "each_pass"],
    Field(
        description="end: files are written and judged after the last pass; each_pass: after every pass, so that the report "
        "says what each one brought"
    ),
]


class Measure(Section):
    """When files are judged, and how time is measured."""

    when: MeasureWhen = "end"
    batch_sizes: tuple[Annotated[int, Field(ge=1, le=4096)], ...] = Field(
        (1,), min_length=1, max_length=16, description="batch sizes that are timed, in rows"
    )
    repeats: int = Field(30, ge=3, le=10_000, description="timed runs at each batch size, interleaved with the float file")
    warmup: int = Field(5, ge=0, le=1000, description="runs before the timed ones")
