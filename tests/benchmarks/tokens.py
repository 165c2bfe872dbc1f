"""Fewer tokens: what they lose, how much faster their files are, and what choosing them takes.

    python tests/benchmarks/tokens.py              # everything, about an hour
    python tests/benchmarks/tokens.py --quality    # cifar10-vit: methods at shares of FLOPs, all dev rows, random as the control
    python tests/benchmarks/tokens.py --margin     # how far the best methods there are above random, over five seeds
    python tests/benchmarks/tokens.py --text       # sst2-minilm padded to 64: accuracy of schedules, chosen on training rows
    python tests/benchmarks/tokens.py --speed      # ONNX files, interleaved, one thread; and a DeiT-S of random weights
    python tests/benchmarks/tokens.py --search     # seconds that the search of a schedule for a latency takes

Needs ``../shared`` (the models and their data). Calibration rows choose schedules; evaluation rows only judge. Accuracies have
95 % intervals over rows, losses are paired on the same rows. Parts that ran before are kept in the folder (``--out``) and shown
again in the table. Times mean something on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

ROOT = Path(__file__).resolve().parents[2]
RECIPES = Path(__file__).parent / "recipes"
MODELS = {"sst2-minilm": "sst2-tokens-int8.yaml", "cifar10-vit": "cifar10-tokens.yaml"}
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "zero_tprune": ("prune_tokens", {}),
    "received": ("prune_tokens", {"score": "received"}),
    "first_token": ("prune_tokens", {"score": "first_token"}),
    "merge": ("merge_tokens", {}),
    "fuse": ("fuse_tokens", {}),
    "random": ("prune_tokens", {"score": "random"}),
}
TEXT: tuple[dict[str, Any], ...] = ({"flops": 0.55}, {"flops": 0.45})
SHARES = (0.85, 0.7, 0.55)
BEST = ("merge", "fuse")
SEEDS = 5


@dataclass
class Bench:
    """One model with its rows."""

    name: str
    source: Any
    data: Any

    @classmethod
    def of(cls, name: str) -> Bench:
        from compress.datasets import load_data
        from compress.preparation import model_of
        from compress.recipe import read

        recipe = read(RECIPES / MODELS[name])
        source = model_of(recipe, trust=False)
        return cls(name, source, load_data(recipe, source, evaluation=True))

    def reduced(self, method: str, **options: Any) -> tuple[torch.nn.Module, dict[str, Any]]:
        """The model after a pass, and what the pass reports."""
        source, data = self.source, self.data
        given: tuple[torch.nn.Module, dict[str, Any]]
        given = reduced(source.model, source.signature, data.example, data.calibration_batches, method, **options)
        return given

    def statistics(self, model: torch.nn.Module) -> Any:
        """What the metric keeps of the model's outputs on the evaluation rows."""
        from export.validate import evaluate

        def call(batch: dict[str, torch.Tensor]) -> torch.Tensor:
            given: torch.Tensor = self.source.signature.call(model, batch)
            return given

        with torch.inference_mode():
            model.eval()
            return evaluate(call, self.data.evaluation, self.data.metric, batch_size=64).statistics


def reduced(model: Any, signature: Any, example: Any, calibration: Any, method: str, **options: Any) -> Any:
    from compress.anatomy import find
    from compress.passes import known_passes
    from compress.passes.contract import Context
    from compress.surgery import Surgery

    name, own = METHODS[method]
    model = copy.deepcopy(model)
    context = Context(signature, find(model, signature, example), calibration, Surgery(), seed=options.pop("seed", 0))
    step: Any = known_passes()[name]
    return step(**own, **options).run(model, context), context.report


def quality(bench: Bench, out: Path) -> dict[str, Any]:
    """Accuracy and loss of each method at each share of FLOPs, on all evaluation rows."""
    metric = bench.data.metric
    whole = bench.statistics(bench.source.model)
    found = _read(out)
    found["float"] = _figure(metric.estimate(whole))
    for share in SHARES:
        for method in METHODS:
            key = f"{method} {share:g}"
            if key in found:
                continue
            began = time.perf_counter()
            model, told = bench.reduced(method, flops=share)
            seconds = time.perf_counter() - began
            now = bench.statistics(model)
            found[key] = {
                "accuracy": _figure(metric.estimate(now)),
                "lost": _figure(metric.drop(whole, now)),
                "flops": round(told["flops_share"], 4),
                "keep": told["keep"],
                "search_s": round(seconds, 1),
            }
            print(f"{bench.name} {key}: {json.dumps(found[key])}", flush=True)
            out.write_text(json.dumps(found, indent=1))
    return found


def margin(bench: Bench, out: Path) -> dict[str, Any]:
    """How many points more than random pruning the best methods have: each with the schedule that was found for it, random ones
    averaged over seeds; mean of the rows' differences, 95 % interval by its standard error."""
    known, found = _read(out.with_name("quality.json")), _read(out)
    for share in SHARES:
        asked = {method: known[f"{method} {share:g}"]["keep"] for method in (*BEST, "random")}
        draws = [bench.statistics(bench.reduced("random", keep=asked["random"], seed=seed)[0]) for seed in range(SEEDS)]
        random = torch.stack(draws).mean(0)
        found[f"random {share:g}"] = [round(float(one.mean()), 4) for one in draws]
        for method in BEST:
            ahead = bench.statistics(bench.reduced(method, keep=asked[method])[0]) - random
            error = 1.96 * float(ahead.std()) / len(ahead) ** 0.5
            mean = float(ahead.mean())
            found[f"{method} {share:g}"] = [round(mean, 4), round(mean - error, 4), round(mean + error, 4)]
        print(
            f"{bench.name} {share:g}: {json.dumps({key: at for key, at in found.items() if key.endswith(f' {share:g}')})}",
            flush=True,
        )
        out.write_text(json.dumps(found, indent=1))
    return found


def text(bench: Bench, out: Path) -> dict[str, Any]:
    """Accuracy of schedules for padded text, on all evaluation rows; calibration rows, which are training rows, choose them."""
    metric = bench.data.metric
    whole = bench.statistics(bench.source.model)
    found = _read(out)
    found["float"] = _figure(metric.estimate(whole))
    for options in TEXT:
        for method in ("merge", "received", "random", "zero_tprune", "fuse"):
            key = f"{method} {json.dumps(options)}"
            if key in found:
                continue
            model, told = bench.reduced(method, **options)
            now = bench.statistics(model)
            found[key] = {
                "accuracy": _figure(metric.estimate(now)),
                "lost": _figure(metric.drop(whole, now)),
                "flops": round(told["flops_share"], 4),
                "keep": told["keep"],
            }
            print(f"{bench.name} {key}: {json.dumps(found[key])}", flush=True)
            out.write_text(json.dumps(found, indent=1))
    return found


def evenly(model: Any, signature: Any, example: Any, method: str, share: float) -> Any:
    """The model with a schedule that takes as much out at each block, without data."""
    from compress.anatomy import find
    from compress.passes import known_passes
    from compress.surgery import Surgery
    from compress.tokens.attaching import attach, place_of
    from compress.tokens.layout import find_layout
    from compress.tokens.search import Problem, even

    name, own = METHODS[method]
    made: Any = known_passes()[name]
    step = made(**own, flops=share)
    anatomy = find(model, signature, example)
    layout = find_layout(name, model, anatomy)
    how = step.how(layout)
    place = place_of(name, model, anatomy, layout, how)
    schedule = even(Problem(name, model, anatomy, layout, how, place, layout.numbers), share)
    attach(model, Surgery(), layout, schedule, how, place)
    return model


def speed(out: Path, repeats: int) -> dict[str, Any]:
    """ONNX files in ONNX Runtime, one thread, interleaved with the float file: time over what fewer FLOPs promise."""
    found = _read(out)
    for name, share in (("deit-s", 0.65), ("cifar10-vit", 0.7)):
        found[name] = _timed(*_subject(name), [(method, share) for method in METHODS], repeats)
        print(f"{name}: {json.dumps(found[name])}", flush=True)
        out.write_text(json.dumps(found, indent=1))
    bench = Bench.of("sst2-minilm")
    models = {}
    for key, told in _read(out.with_name("text.json")).items():
        method, _, options = key.partition(" ")
        if method in ("received", "merge"):
            entered = {name: at for name, at in json.loads(options).items() if name == "enter"}
            models[key] = bench.reduced(method, keep=told["keep"], **entered)[0]
    found["sst2-minilm"] = _files(bench.source.model, models, bench.source.signature, bench.data.example, repeats)
    print(f"sst2-minilm: {json.dumps(found['sst2-minilm'])}", flush=True)
    out.write_text(json.dumps(found, indent=1))
    return found


def _subject(name: str) -> tuple[Any, Any, Any]:
    """A model, its signature, and rows."""
    if name != "deit-s":
        bench = Bench.of(name)
        return bench.source.model, bench.source.signature, bench.data.example
    from calibrate.signature import Signature, TensorSpec
    from compress.sources import settle_torchvision

    settle_torchvision()
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    model = ViTForImageClassification(ViTConfig(hidden_size=384, num_attention_heads=6, intermediate_size=1536)).eval()
    signature = Signature((TensorSpec("pixel_values", torch.float32, ("batch", 3, 224, 224)),), "logits")
    return model, signature, {"pixel_values": torch.randn(2, 3, 224, 224)}


def _timed(model: Any, signature: Any, example: Any, wanted: list[tuple[str, float]], repeats: int) -> dict[str, Any]:
    models = {}
    for method, share in wanted:
        models[f"{method} {share:g}"] = evenly(copy.deepcopy(model), signature, example, method, share)
    found = _files(model, models, signature, example, repeats)
    for method, share in wanted:
        found[f"{method} {share:g}"]["of_the_promise"] = round(share / found[f"{method} {share:g}"]["ratio"][0], 3)
    return found


def _files(model: Any, models: dict[str, Any], signature: Any, example: Any, repeats: int) -> dict[str, Any]:
    import tempfile

    from calibrate.latency import interleave
    from export.graph import Traceable
    from export.to_onnx import OnnxExporter

    exporter, runs = OnnxExporter(), {}
    batch = {key: value[:1] for key, value in example.items()}
    with tempfile.TemporaryDirectory() as folder:
        for number, one in enumerate([model, *models.values()]):
            path = Path(folder) / str(number) / "model.onnx"
            path.parent.mkdir()
            runner = exporter.open(exporter.write(Traceable(one, signature, example), path).path, 1)
            runs[["float", *models][number]] = lambda runner=runner: runner(batch)
        timings = interleave(runs, repeats=repeats, warmup=3)
    return {
        name: {"ms": round(timing.median_ms, 3), **({"ratio": _figure(timing.ratio)} if timing.ratio else {})}
        for name, timing in timings.items()
    }


def search(out: Path) -> dict[str, Any]:
    """Seconds that a latency target takes, timed in ONNX files."""
    from compress.anatomy import find
    from compress.file_latency import FileLatency
    from compress.passes import known_passes
    from compress.passes.contract import Context
    from compress.surgery import Surgery
    from export.graph import Traceable
    from export.to_onnx import OnnxExporter

    bench = Bench.of("cifar10-vit")
    source, data = bench.source, bench.data

    def traceable(model: torch.nn.Module) -> Traceable:
        return Traceable(model, source.signature, data.example)

    began = time.perf_counter()
    model = copy.deepcopy(source.model)
    anatomy = find(model, source.signature, data.example)
    latency = FileLatency(OnnxExporter(), traceable, data.example, out.parent)
    context = Context(source.signature, anatomy, data.calibration_batches, Surgery(), latency=latency)
    step: Any = known_passes()["merge_tokens"]
    step(latency_ratio=0.8).run(model, context)
    found = {"seconds": round(time.perf_counter() - began, 1), "keep": context.report["keep"], **context.report["latency"]}
    print(f"search: {json.dumps(found)}", flush=True)
    out.write_text(json.dumps(found, indent=1))
    return found


def _figure(estimate: Any) -> list[float]:
    return [round(estimate.value, 4), round(estimate.low, 4), round(estimate.high, 4)]


def _read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ("quality", "margin", "text", "speed", "search")
    for part in parts:
        parser.add_argument(f"--{part}", action="store_true")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path("runs/tokens"))
    chosen = parser.parse_args()
    chosen.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    every = not any(getattr(chosen, part) for part in parts)
    if chosen.quality or every:
        quality(Bench.of("cifar10-vit"), chosen.out / "quality.json")
    if chosen.margin or every:
        margin(Bench.of("cifar10-vit"), chosen.out / "margin.json")
    if chosen.text or every:
        text(Bench.of("sst2-minilm"), chosen.out / "text.json")
    if chosen.speed or every:
        speed(chosen.out / "speed.json", chosen.repeats)
    if chosen.search or every:
        search(chosen.out / "search.json")


if __name__ == "__main__":
    main()
