"""The INT8 benchmark on a text encoder: our files and the peers', made from the same rows and timed in one interleaved run.

    python tests/benchmarks/sst2_int8.py [--out FOLDER] [--repeats N] [--recipes NAME ...]

With ``--recipes`` (for example ``sst2-int8-best sst2-int4 sst2-w4a8``) the files of these recipes of the benchmarks stand beside
the peers', and the cost of ``sst2-int8`` with other numbers of rows is not measured. Needs ``../shared`` (the fine-tuned MiniLM
and SST-2) and onnxscript. Every ratio, OpenVINO's too, is over the plain ``torch.onnx.export`` float file in ONNX Runtime, one
thread, no session options but the thread count. OpenVINO's precision hint is f32 for every file.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
RECIPES = Path(__file__).parent / "recipes"
SHARED = ROOT.parent / "shared"


def timed(command: list[str]) -> tuple[float, float, int]:
    """Wall seconds, peak resident MB and exit code of a command in a process of its own (children counted)."""
    started = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    peak = _watch(process)
    return time.perf_counter() - started, peak / 1e6, process.returncode


def _watch(process: subprocess.Popen[bytes]) -> int:
    """Largest sum of resident sizes of a process and its children, sampled every 20 ms."""
    import psutil

    peak, parent = 0, psutil.Process(process.pid)
    while process.poll() is None:
        with contextlib.suppress(psutil.Error):
            peak = max(peak, sum(p.memory_info().rss for p in (parent, *parent.children(recursive=True))))
        time.sleep(0.02)
    return peak


def variant(out: Path, name: str, **changes: Any) -> Path:
    """The benchmark's recipe with some keys changed, as a file of its own."""
    import yaml

    content = yaml.safe_load((RECIPES / "sst2-int8.yaml").read_text())
    for path in ("calibration", "evaluation"):
        if path in content["data"]:
            content["data"][path]["path"] = str((RECIPES / content["data"][path]["path"]).resolve())
    content["model"] = "hf:" + str((RECIPES / str(content["model"]).removeprefix("hf:")).resolve())
    if "rows" in changes:
        content["data"]["calibration"]["rows"] = changes["rows"]
    if "export" in changes:
        content["export"] = changes["export"]
    content["name"] = name
    path = out / f"{name}.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def make(out: Path) -> dict[str, dict[str, Any]]:
    """Makes every file; returns seconds and peak MB of each maker."""
    from calibrate.errors import UserError  # noqa: F401 - fails early where the package is not installed
    from compress.recipe import read
    from compress.sources import load_model

    sys.path.insert(0, str(Path(__file__).parent))
    from peers import PEERS, plain_export

    made: dict[str, dict[str, Any]] = {}
    recipe = read(RECIPES / "sst2-int8.yaml")
    source = load_model(recipe.model.source, base=recipe.base)
    from compress.datasets import load_data

    data = load_data(recipe, source, evaluation=True)
    rows = list(data.calibration.batches(16))
    arrays = {name: torch.cat([batch[name] for batch in rows]).numpy() for name in source.signature.names}
    np.savez(out / "calibration.npz", **arrays)
    started = time.perf_counter()
    plain_export(source.signature.bind(source.model), {k: v[:2] for k, v in arrays.items()}, out / "float.onnx")
    made["torch.onnx.export, float"] = {"file": out / "float.onnx", "seconds": time.perf_counter() - started, "mb": None}
    for name in PEERS:
        file = out / (name.replace(" ", "-").replace(",", "").replace("(", "").replace(")", "") + ".onnx")
        script = str(Path(__file__).parent / "peers.py")
        given = [str(out / "float.onnx"), str(file), str(out / "calibration.npz")]
        seconds, peak, code = timed([sys.executable, script, name, *given])
        if code:
            print(f"{name}: did not finish (exit {code})", file=sys.stderr)
            continue
        made[name] = {"file": file, "seconds": seconds, "mb": peak}
    return made


def ours(out: Path) -> dict[str, Any]:
    """``compress apply`` on variants of the recipe: seconds and peak MB without evaluation, and with another number of rows."""
    program = [str(Path(sys.executable).parent / "compress"), "apply"]
    found: dict[str, Any] = {}
    cases: dict[str, dict[str, Any]] = {
        "onnx": {"export": ["onnx"]},
        "all": {},
        "onnx-16-rows": {"export": ["onnx"], "rows": 16},
        "onnx-512-rows": {"export": ["onnx"], "rows": 512},
    }
    for name, changes in cases.items():
        recipe = variant(out, f"sst2-{name}", **changes)
        seconds, peak, code = timed([*program, str(recipe), "--out", str(out / name), "--no-evaluation"])
        found[name] = {"seconds": seconds, "mb": peak, "exit": code}
    return found


def of_recipes(out: Path, names: list[str]) -> dict[str, dict[str, Any]]:
    """``compress apply`` on recipes of the benchmarks: the file, seconds and peak MB of each."""
    program = [str(Path(sys.executable).parent / "compress"), "apply"]
    found: dict[str, dict[str, Any]] = {}
    for name in names:
        seconds, peak, code = timed([*program, str(RECIPES / f"{name}.yaml"), "--out", str(out / name), "--no-evaluation"])
        file = out / name / "onnx" / "model.onnx"
        if code:
            print(f"{name}: exit {code}", file=sys.stderr)
        if file.exists():
            found[f"ours, {name}"] = {"file": file, "seconds": seconds, "mb": peak}
    return found


def judge(files: dict[str, Path], repeats: int) -> list[dict[str, Any]]:
    """Accuracy, agreement, SQNR on all evaluation rows and interleaved times at batch 1 and 8, in both runtimes."""
    import onnxruntime

    from calibrate.fidelity import agreement, sqnr_db
    from calibrate.latency import interleave
    from compress.datasets import load_data
    from compress.recipe import read
    from compress.sources import load_model

    recipe = read(RECIPES / "sst2-int8.yaml")
    source = load_model(recipe.model.source, base=recipe.base)
    data = load_data(recipe, source, evaluation=True)
    assert data.evaluation is not None
    batches = [{k: v.numpy() for k, v in batch.items()} for batch in data.evaluation.batches(1)]
    labels = data.evaluation.labels
    assert labels is not None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    sessions = {name: onnxruntime.InferenceSession(str(path), options) for name, path in files.items()}
    rows, reference = [], None
    for name, session in sessions.items():
        outputs = torch.cat([torch.from_numpy(session.run(None, _named(session, batch))[0]) for batch in batches])
        reference = outputs if reference is None else reference
        rows.append(
            {
                "file": name,
                "accuracy": float((outputs.argmax(-1) == labels).float().mean()),
                "agreement": agreement(reference, outputs),
                "sqnr_db": sqnr_db(reference, outputs),
                "mb": files[name].stat().st_size / 1e6,
                "rows": len(batches),
            }
        )
    for size in (1, 8):
        feed = {key: np.concatenate([batch[key] for batch in batches[:size]]) for key in batches[0]}
        runs = {name: _runner(session, feed) for name, session in sessions.items()}
        for row, timing in zip(rows, interleave(runs, repeats=repeats, warmup=5).values(), strict=True):
            row[f"b{size}_ms"] = timing.median_ms
        runs = {name: _openvino(path, feed) for name, path in files.items() if "dynamic" not in name}
        timings = interleave(runs, repeats=repeats, warmup=5)
        for row in rows:
            if row["file"] in timings:
                row[f"openvino_b{size}_ms"] = timings[row["file"]].median_ms
    return rows


def _named(session: Any, batch: dict[str, Any]) -> dict[str, Any]:
    return {item.name: batch[item.name] for item in session.get_inputs()}


def _runner(session: Any, feed: dict[str, Any]) -> Any:
    named = _named(session, feed)
    return lambda: session.run(None, named)


def _openvino(path: Path, feed: dict[str, Any]) -> Any:
    import openvino

    core = openvino.Core()
    model = core.read_model(str(path))
    model.reshape({port.any_name: list(feed[port.any_name].shape) for port in model.inputs})
    hints = {"INFERENCE_NUM_THREADS": 1, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    request = core.compile_model(model, "CPU", hints).create_infer_request()
    named = {port.any_name: feed[port.any_name] for port in model.inputs}
    return lambda: request.infer(named)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark-sst2-int8"))
    parser.add_argument("--repeats", type=int, default=60)
    parser.add_argument("--recipes", nargs="+", default=[], metavar="NAME", help="recipes of the benchmarks, without .yaml")
    options = parser.parse_args()
    if not SHARED.is_dir():
        sys.exit("../shared is absent: the benchmark's model and data are not here")
    out: Path = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    costs = ours(out) if not options.recipes else {}
    made = make(out) | of_recipes(out, options.recipes)
    files = {name: entry["file"] for name, entry in made.items()}
    if costs:
        files["ours"] = out / "onnx" / "onnx" / "model.onnx"
    rows = judge(files, options.repeats)
    _show(rows, made, costs, out)
    (out / "benchmark.json").write_text(json.dumps({"rows": rows, "ours": costs}, indent=2, default=str))


def _show(rows: list[dict[str, Any]], made: dict[str, Any], costs: dict[str, Any], out: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    from calibrate.latency import processor_name
    from compress.manifest import size_bytes

    title = f"SST-2, padded to 64 tokens, {rows[0]['rows']} rows, 1 thread, {processor_name()}"
    table = Table(title=title, title_justify="left")
    times = ("ORT b1", "ORT b8", "OpenVINO b1", "OpenVINO b8")
    for heading in ("file", "accuracy", "agreement", "SQNR dB", "MB", *times, "make s", "peak MB"):
        table.add_column(heading, justify="left" if heading == "file" else "right")
    base = rows[0]
    for row in rows:
        cost = made[row["file"]] if row["file"] in made else costs["onnx"]
        keys = ("b1_ms", "b8_ms", "openvino_b1_ms", "openvino_b8_ms")
        ratios = [f"{base[key.removeprefix('openvino_')] / row[key]:.2f}x" if key in row else "-" for key in keys]
        peak = f"{cost['mb']:.0f}" if cost["mb"] else "-"
        table.add_row(
            row["file"], f"{row['accuracy']:.4f}", f"{row['agreement']:.4f}", f"{row['sqnr_db']:.1f}", f"{row['mb']:.1f}",
            *ratios, f"{cost['seconds']:.1f}", peak,
        )  # fmt: skip
    console = Console(width=160)
    console.print(table)
    console.print(f"float file: {base['b1_ms']:.2f} ms at batch 1, {base['b8_ms']:.2f} ms at batch 8 in ONNX Runtime")
    for name, cost in costs.items():
        took = f"{cost['seconds']:.1f} s, peak {cost['mb']:.0f} MB, exit {cost['exit']}"
        console.print(f"compress apply --no-evaluation, {name}: {took}")
    for name in () if not costs else ("onnx/model.onnx", "coreml/model.mlpackage", "tensorrt/model.engine"):
        console.print(f"{name}: {size_bytes(out / 'all' / name) / 1e6:.2f} MB")
    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    console.print(f"(the benchmark's own process peaked at {usage:.0f} MB)")


if __name__ == "__main__":
    main()
