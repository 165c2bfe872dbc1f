"""Reports that the tests of the page are made of: one with everything in it, and the plainest there is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from compress import report as reports
from compress.report import (
    Audit,
    BlockFidelity,
    Check,
    Figure,
    Latency,
    Limit,
    Report,
    RoleBytes,
    Row,
    StepRecord,
    Worth,
)

HOSTILE = "<script>window.hurt=1</script><img src=x onerror='window.hurt=1'>{{7*7}}&\"' javascript:window.hurt=1"
"""A name that runs wherever it is taken for markup, for a template or for an address."""

MACHINE = {
    "processor": "AMD EPYC",
    "architecture": "x86_64",
    "system": "Linux 6.1",
    "python": "3.11.7",
    "cores": 2,
    "memory_bytes": 25_276_502_016,
    "threads": 1,
}


def metric(value: float, name: str = "accuracy", half: float = 0.0215, rows: int = 872) -> Figure:
    return Figure(name=name, value=value, low=value - half, high=value + half, rows=rows, method="wilson")


def drop(value: float, half: float = 0.0074) -> Figure:
    return Figure(name="accuracy lost", value=value, low=value - half, high=value + half, rows=872, method="paired adjusted wald")


def latency(batch: int, median: float, ratio: float | None, runtime: str) -> Latency:
    known: dict[str, Any] = {}
    if ratio is not None:
        known = {"ratio": ratio, "ratio_low": ratio * 0.97, "ratio_high": ratio * 1.04, "float_median_ms": median / ratio}
    return Latency(
        batch=batch,
        median_ms=median,
        low_ms=median * 0.98,
        high_ms=median * 1.1,
        runs=30,
        threads=1,
        processor="AMD EPYC",
        runtime=runtime,
        **known,
    )


def audit(weights: dict[str, int]) -> Audit:
    return Audit(layers=40, equal=40, codes=22_682_112, bytes_by_dtype=weights, float_layers=["classifier"])


def file_row(label: str, **known: Any) -> Row:
    made: dict[str, Any] = {
        "label": label,
        "format": label,
        "path": f"{label}/model.{label}",
        "runtime": f"{label} 1.2.3 CPU",
        "validated": "runtime",
        "metric": metric(0.8727),
        "drop": drop(0.0011),
        "agreement": Figure(name="agreement", value=0.9897, low=0.981, high=0.995, rows=872, method="wilson"),
        "sqnr_db": 27.13,
        "sqnr_to_compressed_db": 42.0,
        "agreement_to_compressed": Figure(name="agreement", value=0.9989, rows=872),
        "size_bytes": 23_141_592,
        "size_ratio": 0.2565,
        "audit": audit({"float32": 380_000, "int8": 22_682_112, "int64": 600, "uint8": 1}),
        "checks": [
            Check(name="outputs are finite", passed=True),
            Check(name="row alone equals row in a batch", passed=True, detail="inf dB over 4 rows"),
        ],
        "details": {"opset": 21, "nodes": 412, "run_in_float": []},
    }
    return Row(**(made | known))


def rows() -> list[Row]:
    onnx = [latency(1, 5.87, 0.387, "onnx"), latency(8, 40.02, 0.364, "onnx")]
    openvino = [latency(1, 4.93, 0.355, "openvino"), latency(8, 34.7, 0.331, "openvino")]
    float_times = [latency(1, 15.2, None, "onnx"), latency(8, 110.4, None, "onnx")]
    return [
        Row(
            label="float",
            format="torch",
            runtime="torch 2.13.0 CPU",
            validated="reference",
            metric=metric(0.8739),
            size_bytes=90_860_000,
            latency=float_times,
        ),
        file_row("onnx", latency=onnx),
        file_row("openvino", format="onnx", path="onnx/model.onnx", latency=openvino, metric=metric(0.8739), drop=drop(0.0)),
        file_row(
            "coreml",
            path="coreml/model.mlpackage",
            validated="interpreter",
            runtime="MIL interpreter (torch)",
            metric=metric(0.8716),
            size_bytes=22_990_000,
            size_ratio=0.509,
            checks=[Check(name="row alone equals row in a batch", passed=None, detail="the file takes exactly 1 row")],
            audit=audit({"float16": 190_000, "int8": 22_682_112}),
        ),
        file_row(
            "tensorrt",
            path="tensorrt/model.engine",
            validated="proxy",
            runtime="onnx 1.2.3 CPU (proxy for TensorRT-RTX 1.7)",
            sqnr_db=None,
            size_bytes=28_190_000,
            size_ratio=0.571,
            details={"run_in_float": ["bert.pooler.dense"], "kernels": 45},
        ),
    ]


def fidelity(values: list[float | None], gone: tuple[int, ...] = ()) -> list[BlockFidelity]:
    return [
        BlockFidelity(
            index=number,
            path=f"bert.encoder.layer.{number}",
            sqnr_db=None if number in gone else value,
            gone=number in gone,
            rows=64,
        )
        for number, value in enumerate(values)
    ]


def steps() -> list[StepRecord]:
    worth = Worth(
        label="onnx",
        compared=True,
        drop=drop(0.0011),
        agreement=Figure(name="agreement", value=0.99, rows=872),
        sqnr_db=27.1,
        size_bytes=23_141_592,
        size_ratio=0.2565,
        latency_ratio=0.387,
        latency_low=0.38,
        latency_high=0.40,
    )
    sites = {
        f"bert.encoder.layer.{block}.attention.{name}": {
            "bits": 8,
            "granularity": "channel",
            "scale": [0.00087, 0.0025],
            "weight_sqnr_db": 45.0 - 0.37 * ((block * 5 + place * 3) % 11),
            "activation": {"clipped_percent": 0.0885 * (block + 1), "zero_point": 0},
        }
        for block in range(12)
        for place, name in enumerate(("query", "key", "value", "out"))
    }
    first = fidelity([44.1, 41.5, 40.2, 38.8, 38.1, 37.0, 36.2, 35.8, 34.9, 34.1, 33.0, 33.4])
    second = fidelity([44.1, 41.5, 36.2, 30.4, 29.8, 27.0, 26.2, 25.8, 24.9, 24.1, 23.0, 24.4], gone=(4,))
    third = fidelity([36.1, 34.5, 33.2, 30.8, 31.1, 29.0, 27.2, 21.8, 24.9, 25.1, 25.0, 26.4])
    return [
        StepRecord(
            name="quantize",
            options={"weights": 8, "group_size": None, "skip": [], "activations": "static", "embeddings": 8},
            seconds=3.31,
            bytes_before=90_860_000,
            bytes_after=23_070_000,
            changed=206,
            report={"sites": sites, "skipped": {"bert.pooler.dense": "named under skip"}, "ties": [], "calibration_rows": 256},
            worth=[worth, worth.model_copy(update={"label": "coreml", "latency_ratio": None})],
            paid=True,
            rows=rows()[:3],
            says="quantize made the onnx file 0.26x as large and 0.39x as slow for 0.0011 of accuracy.",
            blocks=first,
        ),
        StepRecord(
            name="drop_layers",
            options={"blocks": [4]},
            seconds=0.04,
            bytes_before=23_070_000,
            bytes_after=21_200_000,
            changed=18,
            report={"blocks": ["bert.encoder.layer.4"], "projections": [], "skipped": {}},
            worth=[worth.model_copy(update={"drop": drop(0.021), "size_ratio": 0.92, "latency_ratio": 0.95})],
            paid=False,
            undone=True,
            says="drop_layers cost 0.0210 of accuracy and brought neither size nor speed: it was taken back.",
            blocks=second,
        ),
        StepRecord(
            name="quantize",
            options={"weights": 4, "sites": ["mlp.*"]},
            seconds=2.2,
            bytes_before=23_070_000,
            bytes_after=18_000_000,
            changed=90,
            report={"sites": {}, "skipped": {}, "ties": ["the head shares the codes of its table"]},
            blocks=third,
        ),
    ]


def full(**known: Any) -> Report:
    """A report with everything in it: a missed line, a pass taken back, an absent time, warnings."""
    says = "onnx: latency_ratio 0.387, at most 0.35: missed by 0.037"
    made: dict[str, Any] = {
        "name": "sst2-int8",
        "met": False,
        "exit_code": 1,
        "limits": [
            Limit(line="accept.metric_drop", artifact="onnx", limit=0.005, value=0.0011, met=True),
            Limit(line="accept.latency_ratio", artifact="onnx", limit=0.35, value=0.387, met=False, says=says),
            Limit(line="accept.unvalidated", artifact="tensorrt", limit="run", value="proxy", met=True, says="tensorrt: proxy"),
        ],
        "rows": rows(),
        "steps": steps(),
        "blocks": steps()[-1].blocks,
        "roles": [
            RoleBytes(role="embedding", before=47_000_000, after=11_900_000),
            RoleBytes(role="mlp.up", before=14_160_000, after=3_600_000),
            RoleBytes(role="mlp.down", before=14_160_000, after=3_600_000),
            RoleBytes(role="attention.query", before=3_540_000, after=900_000),
            RoleBytes(role="attention.key", before=3_540_000, after=900_000),
            RoleBytes(role="attention.value", before=3_540_000, after=900_000),
            RoleBytes(role="attention.out", before=3_540_000, after=0),
            RoleBytes(role="norm", before=40_000, after=40_000),
            RoleBytes(role="other", before=0, after=12_000),
        ],
        "warnings": ["3 rows are in both splits: calibration row 12 is evaluation row 40 ..."],
        "resumed": ["pass quantize"],
        "model": {"name": "sst2-minilm", "task": "text-classification", "float_bytes": 90_860_000, "notes": []},
        "data": {"evaluation": {"path": "data/dev.tsv", "rows": 872, "chosen": "all"}, "metric": "accuracy"},
        "machine": MACHINE,
        "seconds": {"load": 2.9, "anatomy": 0.74, "pass quantize": 3.3, "judge onnx": 34.3},
        "peak_memory_bytes": 1_111_110_000,
        "folder": "runs/sst2-int8",
    }
    return Report(**(made | known))


def plain(**known: Any) -> Report:
    """A report with nothing that may be absent: one file that was not run, no contract, no passes."""
    row = Row(label="onnx", format="onnx", path="onnx/model.onnx", validated="none", note="evaluation was switched off")
    made: dict[str, Any] = {
        "name": "plain",
        "met": True,
        "exit_code": 0,
        "limits": [],
        "rows": [row],
        "steps": [],
        "model": {},
        "data": {},
        "machine": {},
        "seconds": {},
        "peak_memory_bytes": 1,
    }
    return Report(**(made | known))


def manifest(**known: Any) -> dict[str, Any]:
    return {
        "version": 1,
        "recipe": "sst2-int8",
        "base": "../../recipes",
        "seed": 0,
        "model": {"source": "hf:models/sst2", "fingerprint": "5ea3453b"},
        "data": {"metric": "accuracy", "rows_in_both_by_content": 0},
        "files": {"onnx/model.onnx": {"sha256": "38f5021bba0a" * 5, "bytes": 23_141_592}},
        "versions": {"torch": "2.13.0", "onnx": "1.23.2"},
        "machine": MACHINE,
        **known,
    }


def folder(place: Path, report: Report, told: dict[str, Any] | None = None, validation: Report | None = None) -> Path:
    """A run folder with these files."""
    place.mkdir(parents=True, exist_ok=True)
    reports.write(report, place)
    if told is not None:
        (place / "manifest.json").write_text(json.dumps(told))
    if validation is not None:
        (place / "validation.json").write_text(validation.model_dump_json())
    return place
