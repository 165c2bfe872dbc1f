"""What one bit a weight costs and brings: the speed of the files, and the metric against the number of binarized layers.

    python tests/benchmarks/binarize.py --speed            # about a minute: a 1024x1024 layer at 1, 16 and 128 rows
    python tests/benchmarks/binarize.py --files RUN ...    # times the files of finished runs against their float files
    python tests/benchmarks/binarize.py --curve RECIPE     # half an hour: naive, scaled, repaired, two bases

One thread; the times in ONNX Runtime, interleaved. ``--files`` takes run folders of ``compress apply``, as of the recipes
``sst2-1bit`` and ``cifar10-vit-1bit`` in ``recipes``; ``--curve`` takes such a recipe, binarizes the blocks alone, and judges
in torch; it needs their models and data (``../shared``). Without options: ``--speed``.
"""

from __future__ import annotations

import argparse
import copy
import functools
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[2]
ROWS = (1, 16, 128)
SETTINGS: dict[str, dict[str, Any]] = {
    "naive": {"granularity": "tensor", "bias_correction": False, "repair": 0},
    "scaled": {"repair": 0},
    "repaired": {},
    "2-base": {"bases": 2, "repair": 0},
    "2-base, repaired": {"bases": 2},
}


class Product(nn.Module):
    """One linear layer of 1024 inputs and outputs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer: nn.Module = nn.Linear(1024, 1024)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.layer(x)
        return made


def one_bit(bases: int) -> Product:
    """The same layer in bits, with inputs of 8 bits."""
    from compress.algorithms.binarizing import binarized
    from compress.layers import BinaryLinear

    model = Product()
    weight = {"shape": [1024, 1024], "bases": bases, "group_size": None, "shift": False}
    layer: Any = BinaryLinear(weight, {"kind": "static", "bits": 8, "symmetric": True}, True)
    bits = binarized(model.layer.weight.detach(), bases)  # type: ignore[union-attr, operator]
    layer.quantized_weight.store(bits.planes, bits.multiples, bits.shift, bits.scale)
    layer.bias.data = model.layer.bias.detach()  # type: ignore[union-attr, operator]
    layer.activation.scale.fill_(4 / 127)
    model.layer = layer.eval()
    return model.eval()


def speed(folder: Path) -> None:
    """Sizes, and times over the float file."""
    from calibrate.latency import interleave, processor_name
    from calibrate.signature import Signature, TensorSpec
    from export.graph import Traceable
    from export.onnx_runner import OnnxRunner
    from export.to_onnx import OnnxExporter

    signature = Signature((TensorSpec("x", torch.float32, ("batch", 1024)),))
    models = {"float": Product().eval(), "1 bit": one_bit(1), "2 bases": one_bit(2)}
    runners = {}
    print(f"1024x1024 layer, {processor_name()}, one thread")
    for name, model in models.items():
        source = Traceable(model, signature, {"x": torch.randn(4, 1024)})
        artifact = OnnxExporter().write(source, folder / f"{name}.onnx")
        runners[name] = OnnxRunner(artifact.path, 1)
        print(f"{name:8} {artifact.size_bytes:>10,} bytes")
    for rows in ROWS:
        batch = {"x": torch.randn(rows, 1024)}
        calls = {name: functools.partial(runner, batch) for name, runner in runners.items()}
        times = interleave(calls, repeats=200, budget_s=15)
        for name, timing in times.items():
            ratio = "" if timing.ratio is None else f"  {1 / timing.ratio.value:.2f}x faster"
            print(f"{rows:>4} rows  {name:8} {1000 * timing.median_ms:>8.0f} us{ratio}")


def files(runs: list[Path]) -> None:
    """Size, and time over the float file, of the ONNX files of finished runs."""
    from safetensors.torch import load_file

    from calibrate.latency import interleave
    from export.onnx_runner import OnnxRunner

    for run in runs:
        paths = {"float": run / "baseline/onnx/model.onnx", "1 bit": run / "onnx/model.onnx"}
        opened = {name: OnnxRunner(path, 1) for name, path in paths.items()}
        held = load_file(run / "kept.safetensors")
        rows = {name.removeprefix("inputs."): tensor for name, tensor in held.items() if name.startswith("inputs.")}
        print(f"{run.name}: " + ", ".join(f"{name} {path.stat().st_size / 1e6:.2f} MB" for name, path in paths.items()))
        for size in (1, 8):
            batch = {name: tensor[:1].repeat(size, *[1] * (tensor.dim() - 1)) for name, tensor in rows.items()}
            calls = {name: functools.partial(one, batch) for name, one in opened.items()}
            times = interleave(calls, repeats=60, budget_s=30)
            ratio = times["1 bit"].ratio
            assert ratio is not None
            print(f"  batch {size}: {times['float'].median_ms:.2f} ms, {times['1 bit'].median_ms:.2f} ms: {1 / ratio.value:.2f}x")


def curve(path: Path, counts: list[int], settings: list[str], steps: int, rows: int, batch: int) -> None:
    """The metric of the torch model, whose integers the files hold, for each setting and number of binarized layers: those that
    lose least alone first."""
    from drop_layers import short, spread

    from calibrate.fidelity import sqnr_db
    from calibrate.metrics import metric, paired_drop
    from compress.anatomy import find
    from compress.binarization.binary_sites import plan_binary
    from compress.datasets import load_data
    from compress.passes.binarize import Binarize
    from compress.passes.contract import Context
    from compress.preparation import model_of
    from compress.recipe import read
    from compress.surgery import Surgery

    recipe = read(path)
    source = model_of(recipe, False)
    data = load_data(recipe, source)
    assert data.evaluation is not None
    judged = spread(data.evaluation, rows)
    assert judged.labels is not None
    batches, labels = short(list(judged.batches(1)), judged.labels)
    accuracy = metric("accuracy")

    def outputs(model: nn.Module) -> Tensor:
        with torch.inference_mode():
            return torch.cat([source.signature.call(model.eval(), batch) for batch in batches])

    def run(model: nn.Module, **options: Any) -> dict[str, Any]:
        calibration = list(data.calibration_batches())
        anatomy = find(model, source.signature, data.example)
        context = Context(source.signature, anatomy, lambda: iter(calibration), Surgery())
        Binarize(**options).run(model, context)
        return context.report

    given = outputs(source.model)
    right = float((given.argmax(-1) == labels).double().mean())
    every = len(plan_binary(Binarize(), source.model, find(source.model, source.signature, data.example))[0])
    alone = run(copy.deepcopy(source.model), repair=0, count=every)["repair"]["alone"]
    order = sorted(alone, key=lambda site: alone[site]["noise"])
    print(f"{path.stem}: {len(labels)} rows, {every} layers, repair of {steps} steps of {batch} rows; float {right:.4f}")
    print("order:", ", ".join(order), flush=True)
    for name in settings or SETTINGS:
        for count in counts:
            own: dict[str, Any] = dict(SETTINGS[name])
            own |= {"sites": order[:count]} | ({} if own.get("repair") == 0 else {"repair": steps, "repair_rows": batch})
            started = time.perf_counter()
            model = copy.deepcopy(source.model)
            run(model, **own)
            now = outputs(model)
            lost = paired_drop(accuracy, labels, given, now)
            share = float((now.argmax(-1) == labels).double().mean())
            told = f"{100 * lost.value:5.2f} [{100 * lost.low:5.2f}, {100 * lost.high:5.2f}]  {sqnr_db(given, now):5.1f} dB"
            took = time.perf_counter() - started
            print(f"{name:<17} {count:>3} layers  {share:.4f}  lost {told}  ({took:.0f} s)", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--files", nargs="*", type=Path, default=[])
    parser.add_argument("--curve", type=Path)
    parser.add_argument("--counts", nargs="*", type=int, default=[6, 12, 24, 36])
    parser.add_argument("--settings", nargs="*", choices=list(SETTINGS), default=[])
    parser.add_argument("--steps", type=int, default=100, help="of the repair")
    parser.add_argument("--batch", type=int, default=16, help="rows of a step")
    parser.add_argument("--rows", type=int, default=2000, help="evaluation rows, evenly spread")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.speed or not (given.files or given.curve):
        with tempfile.TemporaryDirectory() as folder:
            speed(Path(folder))
    files(given.files)
    if given.curve:
        curve(given.curve, given.counts, given.settings, given.steps, given.rows, given.batch)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
