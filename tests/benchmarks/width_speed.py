"""Narrower blocks: what they lose, how much faster their files are, and what choosing them takes.

    python tests/benchmarks/width_speed.py                 # everything, about 40 minutes
    python tests/benchmarks/width_speed.py --quality       # accuracy, repaired or not, and random removal as the control
    python tests/benchmarks/width_speed.py --speed         # ONNX files, interleaved, one thread, batch 1 and 8
    python tests/benchmarks/width_speed.py --cost          # seconds and peak memory of scoring heads and neurons

Needs ``../shared`` (the models and their data). Calibration rows choose and repair; evaluation rows only judge. Parts that ran
before are kept in the folder (``--out``) and shown again in the table. Accuracies have 95 % intervals over rows, losses are
paired on the same rows, and the control has an interval over its seeds. Times mean something on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

ROOT = Path(__file__).resolve().parents[2]
RECIPES = Path(__file__).parent / "recipes"
SHARED = ROOT.parent / "shared"
MODELS = {"sst2-minilm": "sst2-width.yaml", "cifar10-vit": "cifar10-width.yaml"}
WANTED = 0.9
"""Least share of what fewer multiply-accumulates promise that the time must give."""
_STUDENT = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36, 8: 2.31, 9: 2.26}


@dataclass
class Bench:
    """One model with its rows, and the scores of its units, which are found once."""

    name: str
    recipe: Any
    source: Any
    data: Any
    rows: dict[str, torch.Tensor]
    scores: dict[tuple[str, int], Any]

    @classmethod
    def of(cls, name: str) -> Bench:
        from compress.datasets import load_data
        from compress.preparation import model_of
        from compress.recipe import read

        recipe = read(RECIPES / MODELS[name])
        source = model_of(recipe, trust=False)
        data = load_data(recipe, source, evaluation=True)
        assert data.evaluation is not None
        return cls(name, recipe, source, data, next(iter(data.evaluation.batches(8))), {})

    def narrowed(self, seed: int = 0, **options: Any) -> tuple[torch.nn.Module, dict[str, Any]]:
        """The model after ``prune_width``, and what the pass reports."""
        from compress.anatomy import find
        from compress.passes import prune_width
        from compress.passes.contract import Context
        from compress.surgery import Surgery

        model = copy.deepcopy(self.source.model)
        anatomy = find(model, self.source.signature, self.data.example)
        context = Context(self.source.signature, anatomy, self.data.calibration_batches, Surgery(), seed=seed)
        step = prune_width.PruneWidth(**options)
        scored: Callable[..., Any] = vars(prune_width)["scored"]
        key = (step.score, seed)

        def once(*given: Any) -> Any:
            if key not in self.scores:
                self.scores[key] = scored(*given)
            return self.scores[key]

        vars(prune_width)["scored"] = once
        try:
            return step.run(model, context), context.report
        finally:
            vars(prune_width)["scored"] = scored

    def statistics(self, model: torch.nn.Module) -> Any:
        """What the metric keeps of the model's outputs on the evaluation rows."""
        from export.validate import evaluate

        def call(batch: dict[str, torch.Tensor]) -> torch.Tensor:
            given: torch.Tensor = self.source.signature.call(model, batch)
            return given

        with torch.inference_mode():
            model.eval()
            return evaluate(call, self.data.evaluation, self.data.metric, batch_size=64).statistics


def quality(bench: Bench, ratios: list[float], seeds: int, out: Path) -> dict[str, Any]:
    """Accuracy and loss at each share of the multiply-accumulates; the repaired models are written as files."""
    metric = bench.data.metric
    whole = bench.statistics(bench.source.model)
    found: dict[str, Any] = {"1": {"accuracy": _figure(metric.estimate(whole)), "kept": 1.0}}
    for ratio in ratios:
        entry: dict[str, Any] = {}
        for key, repair in (("unrepaired", False), ("repaired", True)):
            model, told = bench.narrowed(macs=ratio, repair=repair)
            now = bench.statistics(model)
            entry[key] = {"accuracy": _figure(metric.estimate(now)), "lost": _figure(metric.drop(whole, now))}
            entry["kept"] = told["kept_share"]
            control = []
            for seed in range(1, seeds + 1):
                other, _ = bench.narrowed(seed, macs=ratio, repair=repair, score="random")
                control.append(metric.estimate(bench.statistics(other)).value)
            entry[f"random {key}"] = _over_seeds(control)
            print(f"{bench.name} {ratio:g} {key}: {json.dumps(entry[key])} random {entry[f'random {key}']}", flush=True)
        keep(bench, model, told["kept_share"], _file(out, bench.name, ratio))
        found[f"{ratio:g}"] = entry
    return found


def write(bench: Bench, model: torch.nn.Module, path: Path) -> None:
    """The ONNX file of a model."""
    from export.graph import Traceable

    path.parent.mkdir(parents=True, exist_ok=True)
    bench.recipe.export[0].write(Traceable(model, bench.source.signature, bench.data.example, bench.source.name), path)


def keep(bench: Bench, model: torch.nn.Module, share: float, path: Path) -> None:
    """Writes the file of a narrowed model, and beside it which share of the multiply-accumulates it has."""
    write(bench, model, path)
    path.with_name("kept_share").write_text(repr(share), encoding="utf-8")


def speed(bench: Bench, ratios: list[float], repeats: int, out: Path) -> dict[str, Any]:
    """Times of the files against the float file, all in one interleaved measurement, by batch size."""
    from calibrate.latency import interleave, processor_name

    files = {"1": _file(out, bench.name, 1)}
    kept = {"1": 1.0}
    if not files["1"].is_file():
        write(bench, bench.source.model, files["1"])
    for ratio in ratios:
        path = files[f"{ratio:g}"] = _file(out, bench.name, ratio)
        share = path.with_name("kept_share")
        if not (path.is_file() and share.is_file()):
            model, told = bench.narrowed(macs=ratio, repair=False)
            keep(bench, model, told["kept_share"], path)
        kept[f"{ratio:g}"] = float(share.read_text(encoding="utf-8"))
    runners = {name: bench.recipe.export[0].open(path, 1) for name, path in files.items()}
    found: dict[str, Any] = {name: {"kept": kept[name], "processor": processor_name()} for name in files}
    for size in (1, 8):
        batch = {name: tensor[:size] for name, tensor in bench.rows.items()}
        runs = {name: _bound(runner, batch) for name, runner in runners.items()}
        for name, timing in interleave(runs, repeats=repeats, warmup=5).items():
            entry = {"ms": timing.median_ms}
            if timing.ratio is not None:
                entry |= {"faster": 1 / timing.ratio.value, "low": 1 / timing.ratio.high, "high": 1 / timing.ratio.low}
                entry["share"] = entry["faster"] * kept[name]
            found[name][f"batch {size}"] = entry
    return found


def _bound(runner: Any, batch: Any) -> Callable[[], Any]:
    return lambda: runner(batch)


def cost(name: str) -> dict[str, float]:
    """Wall seconds of scoring, and the peak memory of a process that does nothing else, on two threads."""
    sys.path.insert(0, str(Path(__file__).parent))
    from sst2_int8 import _watch

    command = [sys.executable, __file__, "--only-score", name]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "2"})
    peak = _watch(process)
    assert process.stdout is not None
    return {"seconds": float(process.stdout.read().decode().split()[-1]), "peak_mb": peak / 1e6}


def only_score(name: str) -> None:
    """Scores all heads and neurons and prints the seconds that it took."""
    from compress.anatomy import find
    from compress.passes.contract import Context
    from compress.surgery import Surgery
    from compress.width.unit_scores import scored
    from compress.width.units import Units, find_units

    torch.set_num_threads(2)
    bench = Bench.of(name)
    model, signature = bench.source.model.eval(), bench.source.signature
    anatomy = find(model, signature, bench.data.example)
    context = Context(signature, anatomy, bench.data.calibration_batches, Surgery())
    started = time.perf_counter()
    units = [one for one in find_units(model, signature, anatomy, bench.data.example) if isinstance(one, Units)]
    step = bench.recipe.passes[0]
    scored(model, context, units, step.score, step.rows)
    print(time.perf_counter() - started)


def _over_seeds(values: list[float]) -> dict[str, float]:
    """The mean over seeds with a 95 % interval (Student's t), and the best of them."""
    mean = statistics.fmean(values)
    wide = math.nan
    if len(values) > 1:
        wide = _STUDENT.get(len(values) - 1, 2.2) * statistics.stdev(values) / math.sqrt(len(values))
    return {"value": mean, "low": mean - wide, "high": mean + wide, "best": max(values), "seeds": len(values)}


def _figure(estimate: Any) -> dict[str, float]:
    return {"value": estimate.value, "low": estimate.low, "high": estimate.high}


def _file(out: Path, name: str, ratio: float) -> Path:
    return out / name / f"macs-{ratio:g}" / "model.onnx"


def show(results: dict[str, Any]) -> None:
    """One table a model, of the parts that ran."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=170)
    for name, parts in results.items():
        table = Table(title=name, title_justify="left")
        times = ("batch 1", "batch 8")
        for heading in ("MACs", "kept", "accuracy", "lost", "unrepaired", "random", "random, unrepaired"):
            table.add_column(heading)
        for heading in times:
            table.add_column(f"{heading}: speed-up")
            table.add_column("of 1/MACs")
        judged, timed = parts.get("quality", {}), parts.get("speed", {})
        for ratio in sorted({*judged, *timed}, key=float, reverse=True):
            entry = timed.get(ratio, {})
            cells = [cell for size in times for cell in _speed_cells(entry.get(size, {}))]
            table.add_row(*_quality_cells(ratio, judged.get(ratio, {}), entry), *cells)
        console.print(table)
        if "cost" in parts:
            told = parts["cost"]
            console.print(f"scoring heads and neurons: {told['seconds']:.0f} s, peak memory {told['peak_mb']:.0f} MB, 2 threads")
        low = [f"{ratio} at {size}" for ratio, entry in timed.items() for size in times if entry[size].get("share", 1) < WANTED]
        if timed:
            console.print(f"slower than {WANTED} of what fewer MACs promise: {', '.join(low) or 'none'}")


def _quality_cells(ratio: str, entry: dict[str, Any], timed: dict[str, Any]) -> list[str]:
    kept = f"{entry.get('kept', timed.get('kept', 1.0)):.4f}"
    if "repaired" not in entry:
        return [ratio, kept, _told(entry.get("accuracy")), "", "", "", ""]
    mine, plain = entry["repaired"], entry["unrepaired"]
    controls = [_told(entry["random repaired"]), _told(entry["random unrepaired"])]
    return [ratio, kept, _told(mine["accuracy"]), _points(mine["lost"]), _points(plain["lost"]), *controls]


def _told(figure: dict[str, float] | None) -> str:
    return "" if figure is None else f"{figure['value']:.4f} [{figure['low']:.3f}, {figure['high']:.3f}]"


def _points(figure: dict[str, float]) -> str:
    return f"{100 * figure['value']:+.2f} [{100 * figure['low']:+.1f}, {100 * figure['high']:+.1f}]"


def _speed_cells(entry: dict[str, float]) -> list[str]:
    if "faster" not in entry:
        return [f"{entry['ms']:.2f} ms", ""] if entry else ["", ""]
    return [f"{entry['faster']:.3f} [{entry['low']:.2f}, {entry['high']:.2f}]", f"{entry['share']:.3f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for part in ("quality", "speed", "cost"):
        parser.add_argument(f"--{part}", action="store_true")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--macs", nargs="+", type=float, default=[0.8, 0.7, 0.6, 0.5])
    parser.add_argument("--seeds", type=int, default=5, help="of the random control")
    parser.add_argument("--repeats", type=int, default=60)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark-width"))
    parser.add_argument("--only-score", choices=list(MODELS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not SHARED.is_dir():
        sys.exit("../shared is absent: the benchmark's models and data are not here")
    if options.only_score:
        only_score(options.only_score)
        return
    torch.set_num_threads(1)
    out: Path = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    kept = out / "width.json"
    results: dict[str, Any] = json.loads(kept.read_text()) if kept.is_file() else {}
    every = not (options.quality or options.speed or options.cost)
    for name in options.models:
        parts = results.setdefault(name, {})
        bench = Bench.of(name)
        if every or options.quality:
            parts.setdefault("quality", {}).update(quality(bench, options.macs, options.seeds, out))
        if every or options.speed:
            parts.setdefault("speed", {}).update(speed(bench, options.macs, options.repeats, out))
        if every or options.cost:
            parts["cost"] = cost(name)
        kept.write_text(json.dumps(results, indent=2) + "\n")
    show(results)


if __name__ == "__main__":
    main()
