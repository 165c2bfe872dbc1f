"""Fusing models that were trained from different seeds: their parents, the plain average, fused, and all trained a little more.

    python tests/benchmarks/fuse_models.py                 # everything, about half an hour after the models are there
    python tests/benchmarks/fuse_models.py --fuse          # metrics, transports, ways of joining plans, alpha
    python tests/benchmarks/fuse_models.py --tune STEPS    # the pass's own training, on 20,000 train rows without labels
    python tests/benchmarks/fuse_models.py --labels STEPS  # training with labels on train rows, as in the paper

Needs ``../shared/data/cifar10``. Trains the models first where ``--models FOLDER`` holds none (``cifar10_seeds.py``);
``--without-wide`` leaves out the wide one. Models are matched on 200 train rows. The average that is not matched is trained in
the same way, and with labels each parent too (controls). Accuracy is on all 5,000 dev rows, which nothing was chosen by;
intervals are 95 %: Wilson, and paired over rows against the better parent. What was measured is kept (``--keep FILE``) and not
measured again. Exits with 1 where fusing loses to averaging, or the tuned fusion to the better parent.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor

SAMPLES, TUNED, ROWS = 200, 20_000, 64
FUSED: dict[str, dict[str, Any]] = {
    "average, not matched": {"transport": "none"},
    "fused": {},
    "fused, sinkhorn": {"transport": "sinkhorn"},
    "fused, weights": {"metric": "weights"},
    "fused, weights, sinkhorn": {"metric": "weights", "transport": "sinkhorn"},
    "fused, residual mean": {"residual": "mean"},
    "fused, residual weighted_scalar": {"residual": "weighted_scalar"},
    "fused, residual weighted_matrix": {"residual": "weighted_matrix"},
    "fused, residual only_residual": {"residual": "only_residual"},
    "fused, residual only_branch": {"residual": "only_branch"},
    "fused, alpha 0": {"alpha": 0.0},
    "fused, alpha 0.25": {"alpha": 0.25},
    "fused, alpha 0.75": {"alpha": 0.75},
}


class Bench:
    """The models and their rows; what was found is written to ``kept`` at once."""

    def __init__(self, folder: Path, kept: Path, wide: bool) -> None:
        sys.path.insert(0, str(Path(__file__).parent))
        import cifar10_seeds

        from compress.sources import load_model

        torch.set_num_threads(1)
        self.seeds = cifar10_seeds
        self.folders = cifar10_seeds.make(folder, names=("one", "two", *(["wide"] if wide else [])))
        self.sources = {name: load_model(f"hf:{place}", base=Path()) for name, place in self.folders.items()}
        self.kept = kept
        self.found: dict[str, list[int]] = json.loads(kept.read_text()) if kept.exists() else {}
        self.dev, self.train = cifar10_seeds.images("dev"), cifar10_seeds.images("train")

    def rows(self, label: str, model: Callable[[], Any]) -> Tensor:
        """Whether each dev row is right, [5000]."""
        if label not in self.found:
            started, right = time.perf_counter(), []
            made = model()
            with torch.inference_mode():
                for pixels, labels in zip(*(part.split(250) for part in self.dev), strict=True):
                    right.append(made(pixel_values=self.seeds.floats(pixels)).logits.argmax(-1) == labels)
            self.found[label] = torch.cat(right).int().tolist()
            self.kept.parent.mkdir(parents=True, exist_ok=True)
            self.kept.write_text(json.dumps(self.found))
            print(
                f"{label}: {sum(self.found[label]) / len(self.found[label]):.4f}, {time.perf_counter() - started:.0f} s",
                flush=True,
            )
        return torch.tensor(self.found[label]).double()

    def fused(self, anchor: str, others: list[str], calibration: int = SAMPLES, **options: Any) -> Any:
        """A copy of a model after ``fuse_models``; calibration rows are drawn from the train rows."""
        from compress.anatomy import find
        from compress.passes.contract import Context
        from compress.passes.fuse_models import FuseModels
        from compress.surgery import Surgery

        source = self.sources[anchor]
        chosen = torch.randperm(len(self.train[0]), generator=torch.Generator().manual_seed(0))[:calibration]
        batches = [{"pixel_values": self.seeds.floats(self.train[0][part])} for part in chosen.split(ROWS)]
        step = FuseModels(others=tuple(f"hf:{self.folders[name]}" for name in others), samples=SAMPLES, **options)
        model = copy.deepcopy(source.model)
        anatomy = find(model, source.signature, {"pixel_values": batches[0]["pixel_values"][:2]})
        context = Context(source.signature, anatomy, lambda: iter(batches), Surgery(), rows=calibration)
        model = step.run(model, context)
        if "training" in context.report:
            print(f"  {context.report['training']}", flush=True)
        return model

    def labelled(self, model: Any, steps: int) -> Any:
        """The model trained with labels on train rows."""
        model.requires_grad_(True)
        return self.seeds.fit(model, 1, 11, rate=3e-4, limit=steps)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "transformer-compress"
    parser.add_argument("--models", type=Path, default=cache / "cifar10-seeds", help="where the models are, or will be kept")
    parser.add_argument("--keep", type=Path, default=cache / "fuse-models.json", help="what was measured")
    parser.add_argument("--fuse", action="store_true")
    parser.add_argument("--tune", type=int, help="steps without labels")
    parser.add_argument("--labels", type=int, help="steps with labels")
    parser.add_argument("--without-wide", action="store_true", help="the two seeds only")
    given = parser.parse_args()
    every = not given.fuse and given.tune is None and given.labels is None
    bench = Bench(given.models, given.keep, not given.without_wide)
    for name, source in bench.sources.items():
        bench.rows(name, lambda source=source: source.model)
    for title, anchor, others in (("two seeds", "one", ["two"]), ("a wide one into a narrow one", "one", ["wide"])):
        if others[0] not in bench.sources:
            continue
        if given.fuse or every:
            for label, options in FUSED.items():
                if options.get("transport") != "none" or others != ["wide"]:
                    bench.rows(f"{title}: {label}", lambda o=options, a=anchor, b=others: bench.fused(a, b, **o))
    steps = given.tune or (600 if every else 0)
    if steps:
        free = {"calibration": TUNED, "tune": steps, "tune_rows": ROWS}
        for label, options in (("fused", {}), ("average", {"transport": "none"})):
            bench.rows(f"two seeds: {label}, tuned {steps}", lambda o=options: bench.fused("one", ["two"], **free, **o))
        if "wide" in bench.sources:
            bench.rows(f"a wide one into a narrow one: fused, tuned {steps}", lambda: bench.fused("one", ["wide"], **free))
    steps = given.labels or (390 if every else 0)
    if steps:
        for label, options in (("fused", {}), ("average", {"transport": "none"})):
            name = f"two seeds: {label}, {steps} steps with labels"
            bench.rows(name, lambda o=options: bench.labelled(bench.fused("one", ["two"], **o), steps))
        for name in ("one", "two"):
            source = bench.sources[name]
            bench.rows(f"{name}, {steps} steps with labels", lambda s=source: bench.labelled(copy.deepcopy(s.model), steps))
    return table(bench)


def table(bench: Bench) -> int:
    from calibrate.metrics import metric

    accuracy = metric("accuracy")
    found = {label: torch.tensor(right).double() for label, right in bench.found.items()}
    better = max(("one", "two"), key=lambda name: float(found[name].mean()))
    print(f"\n{'':58}  {'accuracy, 5,000 dev rows':>26}  {f'above {better} (the better parent)':>30}")
    for label, right in found.items():
        own, drop = accuracy.estimate(right), accuracy.drop(found[better], right)
        above = f"{-drop.value:+.4f} [{-drop.high:+.4f}, {-drop.low:+.4f}]"
        print(f"{label:58}  {f'{own.value:.4f} [{own.low:.3f}, {own.high:.3f}]':>26}  {above:>30}")
    failed = []
    plain, fused = found.get("two seeds: average, not matched"), found.get("two seeds: fused")
    if plain is not None and fused is not None and accuracy.drop(fused, plain).low <= 0:
        failed.append("fused is not better than averaged")
    for label, right in found.items():
        if label.startswith("two seeds: fused, tuned") and accuracy.drop(found[better], right).low > 0:
            failed.append(f"{label} is worse than the better parent")
    for one in failed:
        print(one)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
