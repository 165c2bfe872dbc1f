"""Fewer tokens: what they lose, how much faster their files are, and what choosing them takes.

    python tests/benchmarks/tokens.py              # everything, about an hour
    python tests/benchmarks/tokens.py --quality    # cifar10-vit: methods at shares of FLOPs, all dev rows, random as the control
    python tests/benchmarks/tokens.py --text       # sst2-minilm padded to 64: accuracy of schedules
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
SHARES = (0.85, 0.7, 0.55)
WANTED = 0.85
"""Least share of what fewer FLOPs promise that the time of a DeiT-S must give."""


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
        return reduced(
            self.source.model, self.source.signature, self.data.example, self.data.calibration_batches, method, **options
        )

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
    return known_passes()[name](**own, **options).run(model, context), context.report


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


def _figure(estimate: Any) -> list[float]:
    return [round(estimate.value, 4), round(estimate.low, 4), round(estimate.high, 4)]


def _read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for part in ("quality", "text", "speed", "search"):
        parser.add_argument(f"--{part}", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("runs/tokens"))
    chosen = parser.parse_args()
    chosen.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    if chosen.quality:
        quality(Bench.of("cifar10-vit"), chosen.out / "quality.json")


if __name__ == "__main__":
    main()
