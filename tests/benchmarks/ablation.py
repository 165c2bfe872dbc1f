"""Which method of ``quantize`` earns what: every option alone, added in turn, and left out of the best, judged in ONNX Runtime.

    python tests/benchmarks/ablation.py [sst2 | cifar10] [--bits 8 | 4] [--rows N] [--only WORD ...] [--out FILE]

Needs ``../shared``. Each variant is written as an ONNX file and run on the evaluation rows (``--rows``: N, evenly spread);
accuracy, agreement and SQNR are against the float torch model, and beside them stands what the file differs from the compressed
torch model by. Quality only: nothing is timed but the pass itself, in seconds of CPU.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor, nn

RECIPES = Path(__file__).parent / "recipes"
SHARED = Path(__file__).resolve().parents[3] / "shared"
SOURCES = {
    ("sst2", 8): "sst2-int8-best", ("sst2", 4): "sst2-w4a8",
    ("cifar10", 8): "cifar10-vit-int8", ("cifar10", 4): "cifar10-vit-w4a8",
    ("hybrid", 8): "cifar10-hybrid-int8",
}  # fmt: skip
STEPS: dict[str, dict[str, Any]] = {
    "zero points": {"activation_symmetric": False},
    "ranges by error": {"range": "mse"},
    "bias correction": {"bias_correction": True},
    "factors (smooth)": {"smooth": True, "smooth_below_db": 60},
    "factors by descent": {"smooth": "balanced", "smooth_below_db": 60},
    "GPTQ": {"rounding": "gptq", "damping": 0.05},
    "pairs in 16 bits": {"reduce_range": "pairs"},
    "ranges by gradients": {"range": "hessian"},
    "table by outputs": {"embedding_rounding": "gptq"},
    "reconstruction": {"rounding": "reconstruct", "damping": 0.05, "batch_size": 16},
}
PLAIN: dict[str, Any] = {
    "activation_symmetric": True, "range": "minmax", "bias_correction": False, "smooth": False, "rounding": "nearest",
    "reduce_range": False, "embedding_rounding": "nearest",
}  # fmt: skip
"""Round to nearest with min-max ranges; group sizes, sites and embeddings are those of the recipe."""
KEPT = ("weights", "group_size", "group_scales", "symmetric", "embeddings", "embedding_group_size", "sites", "skip")


WITHOUT: dict[str, dict[str, Any]] = {
    "ranges by gradients": {"range": "mse"}, "reconstruction": {"rounding": "gptq", "damping": 0.05},
}  # fmt: skip
"""What stands in the place of a step that is left out, where that is not ``PLAIN``."""


def variants(tables: bool) -> dict[str, dict[str, Any]]:
    """Name -> options over ``PLAIN``; ``tables``: whether there are embedding tables of few bits."""
    steps = {name: change for name, change in STEPS.items() if tables or name != "table by outputs"}
    found: dict[str, dict[str, Any]] = {"plain": {}}
    found |= {f"only {name}": change for name, change in steps.items()}
    together: dict[str, Any] = {}
    for name, change in steps.items():
        together = together | change
        found[f"+ {name}"] = dict(together)
    for name, change in steps.items():
        kept = {key: value for key, value in together.items() if key not in change}
        found[f"all but {name}"] = kept | WITHOUT.get(name, {})
    return found


class Bench:
    """The float model, its rows, and what it gives for them."""

    def __init__(self, name: str, rows: int | None) -> None:
        from compress.datasets import load_data
        from compress.recipe import read
        from compress.sources import load_model

        self.recipe = read(RECIPES / f"{name}.yaml")
        self.source = load_model(self.recipe.model.source, base=self.recipe.base)
        self.data = load_data(self.recipe, self.source, evaluation=True)
        assert self.data.evaluation is not None
        batches = list(self.data.evaluation.batches(16))
        wanted = len(batches) if rows is None else min(-(-rows // 16), len(batches))
        chosen = [number * len(batches) // wanted for number in range(wanted)]
        self.batches = [batches[number] for number in chosen]
        labels = self.data.evaluation.labels
        assert labels is not None
        self.labels = torch.cat([labels[16 * number : 16 * number + 16] for number in chosen])
        self.wanted = self.outputs(self.source.model)

    @classmethod
    def of(cls, task: str, bits: int, rows: int | None) -> Bench:
        """On one thread; leaves the program where the models and data are absent."""
        if not SHARED.is_dir():
            sys.exit("../shared is absent: the benchmark's models and data are not here")
        torch.set_num_threads(1)
        return cls(SOURCES[task, bits], rows)

    @property
    def accuracy(self) -> float:
        """Of the float model."""
        return float((self.wanted.argmax(-1) == self.labels).float().mean())

    def outputs(self, model: nn.Module) -> Tensor:
        from calibrate.modes import evaluating

        with evaluating(model):
            return torch.cat([self.source.signature.call(model, batch).detach().clone() for batch in self.batches])

    def made(self, options: dict[str, Any]) -> tuple[nn.Module, float]:
        """The model after the recipe's passes, the last one with these options, and seconds of CPU."""
        from compress.anatomy import find
        from compress.passes.contract import Context
        from compress.surgery import Surgery

        *first, last = self.recipe.passes
        kept = {key: value for key, value in last.model_dump(exclude_unset=True).items() if key in KEPT}
        steps = [*first, type(last)(**{**kept, **PLAIN, **options})]
        model, surgery, started = copy.deepcopy(self.source.model), Surgery(), time.process_time()
        for step in steps:
            anatomy = find(model, self.source.signature, self.data.example)
            context = Context(self.source.signature, anatomy, self.data.calibration_batches, surgery, seed=self.recipe.seed)
            model = step.run(model, context)
        return model, time.process_time() - started

    def judge(self, options: dict[str, Any], folder: Path) -> dict[str, Any]:
        import onnxruntime

        from calibrate.fidelity import agreement, sqnr_db
        from export.graph import Traceable

        model, seconds = self.made(options)
        path = folder / "model.onnx"
        self.recipe.export[0].write(Traceable(model, self.source.signature, self.data.example, self.source.name), path)
        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = 1
        session = onnxruntime.InferenceSession(str(path), settings)
        names = [item.name for item in session.get_inputs()]
        runs = [session.run(None, {name: batch[name].numpy() for name in names})[0] for batch in self.batches]
        given = torch.cat([torch.from_numpy(one) for one in runs])
        return {
            "accuracy": float((given.argmax(-1) == self.labels).float().mean()),
            "agreement": agreement(self.wanted, given),
            "sqnr_db": sqnr_db(self.wanted, given),
            "torch_sqnr_db": sqnr_db(self.wanted, self.outputs(model)),
            "mb": path.stat().st_size / 1e6,
            "seconds": seconds,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=("sst2", "cifar10"), nargs="?", default="sst2")
    parser.add_argument("--bits", type=int, choices=(8, 4), default=8)
    parser.add_argument("--rows", type=int)
    parser.add_argument("--only", nargs="*", default=[], help="variants whose names begin with one of these")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    bench = Bench.of(options.task, options.bits, options.rows)
    print(f"{options.task}, {options.bits} bits, {len(bench.labels)} rows, float accuracy {bench.accuracy:.4f}")
    print(f"{'variant':28s} accuracy agreement  SQNR dB  in torch     MB  CPU s")
    found: dict[str, Any] = {}
    for name, changes in variants(tables=(options.task, options.bits) == ("sst2", 4)).items():
        if options.only and not name.startswith(tuple(options.only)):
            continue
        with tempfile.TemporaryDirectory() as folder:
            one = found[name] = bench.judge(changes, Path(folder))
        print(
            f"{name:28s} {one['accuracy']:8.4f} {one['agreement']:9.4f} {one['sqnr_db']:8.1f} {one['torch_sqnr_db']:9.1f} "
            f"{one['mb']:6.2f} {one['seconds']:6.1f}",
            flush=True,
        )
        if options.out:
            options.out.write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
