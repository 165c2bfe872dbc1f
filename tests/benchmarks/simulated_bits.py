"""Weights and activations of 6 or 4 bits, which no runtime has: a simulation in torch. No file is written, none could be.

    python tests/benchmarks/simulated_bits.py [cifar10 | sst2 | hybrid] [--bits 4 6 8] [--rows N] [--only WORD ...] [--out FILE]

Needs ``../shared``, and ``hybrid`` the model that ``cifar10_hybrid.py`` makes: BatchNorm is folded, and its convolutions are
rounded too, but the first. Codes of 6 bits lie in -32 to 31, of 4 in -8 to 7, one scale for each output channel of a weight and
each activation; all projections inside the blocks are rounded, embeddings, head and the products of attention are not.
Calibration rows are those of the benchmark's INT8 recipe; the recipe language knows neither. Accuracy, the points of it that are
lost with their paired 95 % interval, agreement and SQNR on the evaluation rows (``--rows``: N, evenly spread).

``--twin`` puts twin ranges on what leaves GELU or SiLU (PTQ4ViT, arXiv 2111.12293, sec. 3.1), one for negative and one
for positive values: ``one code``, as in the paper, gives each half of the codes; ``two products`` gives each all of them,
which a file can say with two pairs of QuantizeLinear and DequantizeLinear and two products with one weight. The toolkit has
neither.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from ablation import Bench
from torch import Tensor, nn

SMOOTH = {"smooth": "balanced", "smooth_below_db": 60}
GPTQ = {"rounding": "gptq", "damping": 0.05}
VARIANTS: dict[str, dict[str, Any]] = {
    "min-max": {"range": "minmax", "bias_correction": False, "smooth": False},
    "squared error": {"range": "mse", "bias_correction": False, "smooth": False},
    "gradients": {"range": "hessian", "bias_correction": False, "smooth": False},
    "gradients, biases": {"range": "hessian", "smooth": False},
    "factors, biases": {**SMOOTH, "range": "mse"},
    "factors of SmoothQuant, biases": {**SMOOTH, "smooth": True, "range": "mse"},
    "channels (RepQ), biases": {**SMOOTH, "smooth": "repq", "range": "mse"},
    "channels (RepQ), biases, GPTQ": {**SMOOTH, **GPTQ, "smooth": "repq", "range": "mse"},
    "factors, gradients, biases": {**SMOOTH, "range": "hessian"},
    "factors, biases, GPTQ": {**SMOOTH, **GPTQ, "range": "mse"},
    "factors, gradients, biases, GPTQ": {**SMOOTH, **GPTQ, "range": "hessian"},
}


ALONE = {"smooth": False, "bias_correction": False}
HYBRID: dict[str, dict[str, Any]] = {
    "min-max, symmetric": {**ALONE, "range": "minmax", "activation_symmetric": True},
    "min-max": {**ALONE, "range": "minmax"},
    "squared error": {**ALONE, "range": "mse"},
    "gradients": {**ALONE, "range": "hessian"},
    "gradients, bridges": {**ALONE, "range": "hessian", "bridges": "joint"},
    "gradients, bridges, best scheme": {**ALONE, "range": "hessian", "bridges": "joint", "activation_symmetric": "best"},
    "the same, factors, biases": {"range": "hessian", "bridges": "joint", "activation_symmetric": "best"},
}
TWINS = ("one code", "two products")
_SMALLEST = -0.2785
"""What SiLU gives at least; GELU gives more."""


class TwinGrid(nn.Module):
    """Rounds negative values with one scale and positive ones with another, and adds the two, of which one is zero.

    Each part is an ordinary quantization whose zero point lies at the end of the codes, so that the other sign is clipped to
    zero: nothing is counted twice, as it is in the paper's code.
    """

    def __init__(self, own: nn.Module, low: float, high: float, bits: int) -> None:
        super().__init__()
        self.factor, self.bits = own.factor, bits
        levels, self.first, self.last = 2**bits - 1, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        self.negative, self.positive = (torch.tensor(max(end, 1e-8) / levels) for end in (-low, high))

    def forward(self, x: Tensor) -> Tensor:
        from calibrate.ops import quantize_dequantize

        x = x if self.factor is None else x * self.factor
        ends = (self.negative, self.last), (self.positive, self.first)
        return sum(quantize_dequantize(x, scale, torch.tensor(end, dtype=torch.int8), self.bits) for scale, end in ends)


def twinned(model: nn.Module, report: dict[str, Any], bits: int, how: str) -> int:
    """Puts twin grids in front of the layers whose inputs come from GELU or SiLU; how many there are."""
    count = 0
    for path, says in report["sites"].items():
        seen, own = says["activation"]["seen"], model.get_submodule(path).activation
        if _SMALLEST <= seen[0] < -0.05 and seen[1] > 4 * -seen[0]:
            low, high = says["activation"]["range"]
            model.get_submodule(path).activation = TwinGrid(own, low, high, bits - (how == "one code"))
            count += 1
    return count


def simulated(bench: Bench, options: dict[str, Any], bits: int, twin: str | None = None) -> nn.Module:
    """The float model with weights and inputs on grids of so many bits; it is never exported."""
    from compress.anatomy import find
    from compress.passes.contract import Context
    from compress.passes.quantize import Quantize
    from compress.surgery import Surgery

    model = copy.deepcopy(bench.source.model)
    *first, last = bench.recipe.passes
    sites = {} if not first else {"sites": getattr(last, "sites", None)}
    step = Quantize.model_validate({"activation_symmetric": False, "granularity": "channel", **sites, **options})
    for one in (*first, step.model_copy(update={"weights": bits, "activation_bits": bits})):
        anatomy = find(model, bench.source.signature, bench.data.example)
        context = Context(bench.source.signature, anatomy, bench.data.calibration_batches, Surgery(), seed=bench.recipe.seed)
        model = one.run(model, context)
    if twin is not None and not twinned(model, context.report, bits, twin):
        sys.exit("no layer reads what leaves GELU or SiLU")
    return model


def judged(bench: Bench, model: nn.Module) -> dict[str, Any]:
    from calibrate.fidelity import agreement, sqnr_db

    given = bench.outputs(model)
    right, was = given.argmax(-1) == bench.labels, bench.wanted.argmax(-1) == bench.labels
    lost = was.double() - right.double()
    return {
        "accuracy": float(right.float().mean()),
        "points_lost": 100 * float(lost.mean()),
        "half_interval": 196 * float(lost.std()) / len(lost) ** 0.5,
        "agreement": agreement(bench.wanted, given),
        "sqnr_db": sqnr_db(bench.wanted, given),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=("cifar10", "sst2", "hybrid"), nargs="?", default="cifar10")
    parser.add_argument("--bits", type=int, nargs="*", choices=(4, 6, 8), default=[6])
    parser.add_argument("--rows", type=int)
    parser.add_argument("--only", nargs="*", default=[], help="variants with these names")
    parser.add_argument("--twin", choices=TWINS, help="with twin ranges after GELU and SiLU")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    bench = Bench.of(options.task, 8, options.rows)
    print(f"{options.task}, simulated, {len(bench.labels)} rows, float accuracy {bench.accuracy:.4f}")
    print(f"{'variant':36s} bits accuracy  points lost      agreement  SQNR dB  CPU s")
    found: dict[str, Any] = {}
    for bits in options.bits:
        for name, changes in (HYBRID if options.task == "hybrid" else VARIANTS).items():
            if options.only and name not in options.only:
                continue
            started = time.process_time()
            model = simulated(bench, changes, bits, options.twin)
            seconds = time.process_time() - started
            one = found[f"{name}, {bits} bits"] = judged(bench, model) | {"seconds": seconds}
            print(
                f"{name:36s} {bits:4d} {one['accuracy']:8.4f} {one['points_lost']:6.2f} +- {one['half_interval']:4.2f} "
                f"{one['agreement']:12.4f} {one['sqnr_db']:8.1f} {one['seconds']:6.1f}",
                flush=True,
            )
            if options.out:
                options.out.write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
