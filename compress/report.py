"""The report of a run: every figure of the final table and more, as data (``report.json``) and as a table for a terminal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from calibrate.errors import UserError
from compress import wording
from export.disk import renamed

if TYPE_CHECKING:
    from rich.table import Table

__all__ = [
    "Audit",
    "BlockFidelity",
    "Check",
    "Figure",
    "Latency",
    "Limit",
    "Report",
    "RoleBytes",
    "Row",
    "StepRecord",
    "Worth",
    "read",
    "schema",
    "table",
    "write",
]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Figure(_Record):
    """A measured figure with its 95 % confidence interval."""

    name: str = Field(description="what was measured, e.g. accuracy")
    value: float
    low: float | None = Field(None, description="lower end of the 95 % confidence interval")
    high: float | None = Field(None, description="upper end of the 95 % confidence interval")
    rows: int = Field(description="evaluation rows the figure rests on")
    method: str = Field("", description="how the interval was made, e.g. Wilson, paired bootstrap")


class Latency(_Record):
    """Times of one file and of the float file in the same runtime, interleaved in one run after warm-up."""

    batch: int = Field(description="rows in a batch")
    median_ms: float = Field(description="median time of one batch, milliseconds")
    low_ms: float = Field(description="10th percentile, milliseconds")
    high_ms: float = Field(description="90th percentile, milliseconds")
    runs: int = Field(description="timed runs")
    threads: int
    processor: str
    runtime: str = Field("", description="what ran the file")
    float_median_ms: float | None = Field(None, description="median of the float file in the same runtime, milliseconds")
    float_low_ms: float | None = Field(None, description="10th percentile of the float file, milliseconds")
    float_high_ms: float | None = Field(None, description="90th percentile of the float file, milliseconds")
    ratio: float | None = Field(None, description="this median over the float file's in the same runtime; below 1 is faster")
    ratio_low: float | None = Field(None, description="lower end of the ratio's 95 % interval (bootstrap over paired runs)")
    ratio_high: float | None = Field(None, description="upper end of the ratio's 95 % interval")


class Check(_Record):
    """One check of a file that needs no labels."""

    name: str
    passed: bool | None = Field(description="null where the check does not apply to this file")
    detail: str = ""


class Audit(_Record):
    """What the file holds, read back from disk, against what the compressed model promised."""

    layers: int = Field(description="quantized layers the model promised")
    equal: int = Field(description="layers whose integer codes in the file equal the model's")
    codes: int = Field(description="integer codes compared")
    bytes_by_dtype: dict[str, int] = Field(description="weight bytes in the file by element type")
    float_layers: list[str] = Field(description="matrix weights that are stored in floating point")


class Row(_Record):
    """One line of the final table: the float model, or one file in one runtime."""

    label: str = Field(description="float, onnx, openvino, coreml, tensorrt")
    format: str
    path: str = Field("", description="the file, relative to the run folder")
    runtime: str = Field("", description="what ran it, with version and device")
    validated: Literal["runtime", "interpreter", "proxy", "none", "reference"] = Field(
        description="runtime: in its own runtime; interpreter: our interpreter of the saved file; proxy: an equivalent file in "
        "another runtime; none: not run; reference: the float model itself"
    )
    metric: Figure | None = None
    drop: Figure | None = Field(None, description="loss against float on the same rows (paired); positive is worse")
    agreement: Figure | None = Field(None, description="share of rows whose prediction equals the float model's")
    sqnr_db: float | None = Field(None, description="signal to quantization noise against float, dB; null when equal")
    sqnr_to_compressed_db: float | None = Field(None, description="the same against the compressed torch model: what export lost")
    agreement_to_compressed: Figure | None = None
    latency: list[Latency] = []
    size_bytes: int | None = None
    size_ratio: float | None = Field(None, description="size over that of the float file in the same format")
    audit: Audit | None = None
    checks: list[Check] = []
    details: dict[str, Any] = Field({}, description="what the writer says: opset, dialect, fused kernels ...")
    note: str = Field("", description="why a figure is missing")


class Worth(_Record):
    """What one pass brought to one file, against the file before it (the float file before the first), in one runtime."""

    label: str = Field(description="onnx, openvino, coreml, tensorrt")
    compared: bool = Field(False, description="whether both files were run on the evaluation rows")
    drop: Figure | None = Field(None, description="metric lost by this pass on the same rows (paired); positive is worse")
    agreement: Figure | None = Field(None, description="share of rows predicted as the file before the pass predicted them")
    sqnr_db: float | None = Field(None, description="against the file before the pass, dB; null when equal or not measured")
    sqnr_before_db: float | None = Field(None, description="against the float model, before the pass, dB; null when equal")
    sqnr_after_db: float | None = Field(None, description="against the float model, after the pass, dB; null when equal")
    size_bytes: int | None = None
    size_ratio: float | None = Field(None, description="size over that of the file before the pass")
    latency_ratio: float | None = Field(
        None, description="median time over that of the file before the pass, interleaved, at the batch size that gained least"
    )
    latency_runs: int | None = Field(None, description="timed runs of each file that the ratio rests on")
    latency_low: float | None = Field(None, description="lower end of the ratio's 95 % interval")
    latency_high: float | None = Field(None, description="upper end of the ratio's 95 % interval")


class BlockFidelity(_Record):
    """How much of a block's output was kept: the compressed model against the float model, both fed the same rows."""

    index: int = Field(description="number of the block in the float model, from 0")
    path: str = Field(description="module path of the block in the float model")
    sqnr_db: float | None = Field(description="of the block's output, dB; null when equal or when the block is gone")
    gone: bool = Field(False, description="whether a pass took the block out")
    rows: int = Field(description="calibration rows compared")
    note: str = Field("", description="why there is no figure, e.g. a pass shortened the sequence")


class RoleBytes(_Record):
    """Bytes of the parameters of one role in memory, before and after all passes (tied tensors counted once)."""

    role: str = Field(description="attention.query ... as `compress inspect` prints them; other: parameters of no role")
    before: int
    after: int


class StepRecord(_Record):
    """One pass: what it was asked, what it changed, what it says."""

    name: str
    options: dict[str, Any]
    seconds: float
    bytes_before: int
    bytes_after: int
    changed: int = Field(description="tensors added, removed or changed")
    sites: int = Field(0, description="layers of the model before the pass with such a tensor")
    report: dict[str, Any] = {}
    rows: list[Row] = Field([], description="with measure: each_pass, the table after this pass")
    worth: list[Worth] = Field([], description="with measure: each_pass, what this pass brought to each file")
    paid: bool | None = Field(None, description="whether the pass was worth it; null where it was not measured")
    undone: bool = Field(False, description="whether the pass was taken back (undo: unpaid)")
    says: str = Field("", description="the sentence for a person: what the pass brought, and whether it was taken back")
    blocks: list[BlockFidelity] = Field([], description="SQNR of each block after this pass")


class Limit(_Record):
    """One line of ``accept`` and whether it was met."""

    line: str = Field(description="the key in the recipe, e.g. accept.metric_drop")
    artifact: str
    limit: float | str
    value: float | str | None
    met: bool
    says: str = Field("", description="the sentence for a person")


class Report(_Record):
    """Everything a run measured. Programs may rely on the fields: they are only ever added to within one version."""

    version: Literal[1] = 1
    name: str
    met: bool = Field(description="whether every line of accept was met")
    exit_code: int = Field(description="0 met, 1 a line of accept was missed")
    limits: list[Limit]
    rows: list[Row] = Field(description="the final table: float first, then one for each file and runtime")
    compressed: Row | None = Field(None, description="the compressed torch model: what files are compared with")
    steps: list[StepRecord]
    blocks: list[BlockFidelity] = Field([], description="SQNR of each block of the compressed model")
    roles: list[RoleBytes] = Field([], description="bytes by role before and after all passes")
    warnings: list[str] = Field([], description="what a reader of the figures has to know, e.g. splits that overlap")
    resumed: list[str] = Field([], description="parts taken over from an interrupted run of the same recipe")
    model: dict[str, Any]
    data: dict[str, Any]
    machine: dict[str, Any]
    seconds: dict[str, float] = Field(description="wall time of each part of the run")
    peak_memory_bytes: int = Field(
        description="largest resident size of the process; while TensorRT builds, of it and the builder's process together"
    )
    folder: str = Field("", description="the run folder as it was named")


def schema() -> dict[str, Any]:
    """The JSON Schema of ``report.json``."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Report.model_json_schema()}


def write(report: Report, folder: Path) -> Path:
    """Writes ``report.json`` (temporary name, then renamed)."""
    path = folder / "report.json"
    with renamed(path) as unfinished:
        unfinished.write_text(json.dumps(report.model_dump(mode="json"), indent=2, allow_nan=False) + "\n")
    return path


def read(folder: Path, name: str = "report.json") -> Report:
    """The report of a run folder; ``validation.json`` is one too.

    Raises:
        UserError: it cannot be read, or was written by a later version of this program.
    """
    path = folder / name
    try:
        return Report.model_validate_json(path.read_bytes())
    except OSError as error:
        raise UserError(str(path), f"cannot be read: {error.strerror}", "Name the folder of a finished run.") from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        says = f"{place}: {first['msg']}" if place else first["msg"].partition("\n")[0]
        later = first["type"] == "extra_forbidden" or place == "version"
        hint = "A later version of this program may have written it; update, or run the recipe again."
        what = f"is not a report that this version can read: {says}"
        raise UserError(str(path), what, hint if later else "Run the recipe again.") from None


def table(report: Report) -> Table:
    """The final table: one row for float and one for each artifact; intervals and ratios stand below their figures."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    latencies = sorted({latency.batch for row in report.rows for latency in row.latency})
    metric = next((row.metric.name for row in report.rows if row.metric), "metric")
    made = Table(title=report.name, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    times = [f"ms,\nbatch {batch}" for batch in latencies]
    for heading in ("", f"{metric}\n[95 %]", "drop", "agreement", "SQNR dB", *times, "size", "validated"):
        words = heading in ("", "validated")
        made.add_column(heading, justify="left" if words else "right", max_width=24 if heading == "validated" else None)
    for row in report.rows:
        measured = {latency.batch: latency for latency in row.latency}
        made.add_row(
            row.label,
            _interval(row.metric),
            "" if row.validated == "reference" else _interval(row.drop, "+"),
            "" if row.validated == "reference" else _share(row.agreement),
            "" if row.validated == "reference" else wording.decibel(row),
            *(_time(measured.get(batch), row) for batch in latencies),
            _size(row),
            _validated(row),
        )
    return made


def _interval(figure: Figure | None, sign: str = "") -> str:
    """The value and, below it, its interval; ``sign`` is ``+`` where a plus sign is to be seen."""
    if figure is None:
        return "-"
    return f"{wording.figure(figure.value, sign)}\n{wording.interval(figure, sign)}".rstrip()


def _share(share: Figure | None) -> str:
    return "-" if share is None else wording.share(share)


def _time(latency: Latency | None, row: Row) -> str:
    if latency is None:
        return "not\nmeasured" if row.path else "-"
    return f"{latency.median_ms:.3g}" + (f"\n({wording.ratio(latency.ratio)})" if latency.ratio is not None else "")


def _size(row: Row) -> str:
    if row.size_bytes is None:
        return "-"
    return wording.size(row.size_bytes) + (f"\n({wording.ratio(row.size_ratio)})" if row.size_ratio is not None else "")


def _validated(row: Row) -> str:
    words = {"reference": row.runtime, "none": f"not run: {row.note}" if row.note else "not run"}
    return words.get(row.validated, f"{row.validated}: {row.runtime}".replace(" (", "\n("))


if __name__ == "__main__":
    print(json.dumps(schema(), indent=2))
