"""Fewer operators: how many ``fuse`` takes out of models of many families, and what each rewrite brings in time.

    python tests/benchmarks/fusion.py                      # operators before and after, torch graph and ONNX file; 5 minutes
    python tests/benchmarks/fusion.py --speed              # times, one thread, interleaved; 3 minutes on a quiet machine
    python tests/benchmarks/fusion.py --speed --model deit-s --seconds 60
    python tests/benchmarks/fusion.py --engines            # what TensorRT and Core ML make of it: kernels, operators, attentions

``--speed`` needs onnxscript, for ``torch.onnx.export``. It writes for sst2-minilm (batch 1 and 8, needs ``../shared``) and for a
DeiT-S of random weights (batch 1) the file of ``torch.onnx.export``, the same with each two-operand Add as Sum, the file of this
toolkit, the same with each Sum as Add, and one file for each rule of ``fuse`` that matches alone and for all of them. Ratios are
over ``torch.onnx.export``. For DeiT-S the share of the core's float peak is told: its FLOPs over its time, against a product of
1024 x 1024 matrices.
"""

from __future__ import annotations

import argparse
import copy
import functools
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared"
FAMILIES = (
    "bert", "sentence_bert", "distilbert", "albert", "t5_encoder", "llama", "gemma", "opt", "clip_text", "vit", "deit", "dinov2",
    "beit", "swin", "segformer", "cvt", "mobilevit", "mobilevitv2", "timm_levit", "timm_efficientformer", "timm_fastvit",
    "timm_mobilevit",
)  # fmt: skip

ENGINES = ("vit", "dinov2", "llama", "swin", "timm_levit", "timm_fastvit", "timm_mobilevit")


def fused(model: torch.nn.Module, signature: Any, example: Any, rules: list[str] | None = None) -> tuple[torch.nn.Module, Any]:
    """A copy of a model after the pass, and what the pass reports."""
    from compress.anatomy import find
    from compress.passes.contract import Context
    from compress.passes.fuse import Fuse
    from compress.surgery import Surgery

    after = copy.deepcopy(model)
    anatomy = find(after, signature, {name: tensor[:2] for name, tensor in example.items()})
    context = Context(signature, anatomy, lambda: iter([example]), Surgery())
    return Fuse(rules=rules).run(after, context), context.report


def written(model: torch.nn.Module, signature: Any, example: Any, folder: Path, batch: bool = True) -> Path:
    from export.graph import Traceable
    from export.to_onnx import OnnxExporter

    exporter = OnnxExporter(dynamic=("batch",) if batch else ())
    path: Path = exporter.write(Traceable(model.eval(), signature, example), folder).path
    return path


def operators(path: Path) -> Counter[str]:
    import onnx

    return Counter(node.op_type for node in onnx.load(str(path), load_external_data=False).graph.node)


def families() -> Any:
    """``build`` of the tests' small models; timm can be imported after the tests' conftest."""
    import compress  # noqa: F401  before tests/, which holds a folder of that name

    sys.path[:0] = [str(ROOT / "tests" / "compress"), str(ROOT / "tests")]
    import conftest  # noqa: F401
    from families import build

    return build


def count(names: list[str]) -> None:
    build = families()

    print("family                 torch graph     ONNX nodes   fewer                         more")
    for name in names:
        model, signature, example = build(name)
        after, report = fused(model, signature, example)
        graph = f"{report['operations_before']:4} -> {report['operations_after']:4}"
        try:
            with tempfile.TemporaryDirectory() as folder:
                pair = (model, after)
                one, two = (operators(written(m, signature, example, Path(folder) / str(i))) for i, m in enumerate(pair))
        except Exception as error:  # a family that the exporter does not write still has its graph counted
            print(f"{name:20} {graph}    not written: {str(error).splitlines()[0][:60]}", flush=True)
            continue
        fewer, more = one - two, two - one
        told = [", ".join(f"{n} {kind}" for kind, n in sorted(found.items())) for found in (fewer, more)]
        print(f"{name:20} {graph}   {one.total():4} -> {two.total():4}   {told[0]:40} {told[1]}", flush=True)
        rules = {rule: found["matched"] for rule, found in report["rules"].items() if found["matched"]}
        print(f"{'':20} {rules}", flush=True)


def swapped(path: Path, old: str, new: str) -> Path:
    """The file with each operator of two operands written as another."""
    import onnx

    made = onnx.load(str(path))
    for node in made.graph.node:
        if node.op_type == old and len(node.input) == 2:
            node.op_type = new
    out = path.with_name(f"{path.stem}-{new}.onnx")
    onnx.save(made, str(out))
    return out


def subject(name: str) -> tuple[torch.nn.Module, Any, Any, tuple[int, ...]]:
    """Model, signature, eight rows, and the batch sizes that are timed."""
    if name == "deit-s":
        from calibrate.signature import Signature, TensorSpec
        from compress.sources import settle_torchvision

        settle_torchvision()
        import transformers

        torch.manual_seed(0)
        config = transformers.DeiTConfig(hidden_size=384, num_hidden_layers=12, num_attention_heads=6, intermediate_size=1536)
        config.num_labels = 1000
        model = transformers.DeiTForImageClassification(config).eval()
        signature = Signature((TensorSpec("pixel_values", torch.float32, ("batch", 3, 224, 224)),), "logits")
        return model, signature, {"pixel_values": torch.randn(8, 3, 224, 224)}, (1,)
    from compress.datasets import load_data
    from compress.preparation import model_of
    from compress.recipe import read

    recipe = read(Path(__file__).parent / "recipes" / "sst2-tokens-int8.yaml")
    source = model_of(recipe, trust=False)
    rows = next(iter(load_data(recipe, source, evaluation=True).calibration.batches(8)))
    return source.model, source.signature, {name: rows[name] for name in source.signature.names}, (1, 8)


def files(name: str, model: torch.nn.Module, signature: Any, example: Any, folder: Path) -> Iterator[tuple[str, Path]]:
    from compress.rewrites.applying import RULES

    sys.path.insert(0, str(Path(__file__).parent))
    from peers import plain_export

    plain = folder / "plain.onnx"
    plain_export(signature.bind(model), {key: tensor[:2].numpy() for key, tensor in example.items()}, plain)
    yield "torch.onnx.export", plain
    yield "  every Add as Sum", swapped(plain, "Add", "Sum")
    ours = written(model, signature, example, folder / "ours")
    yield "this toolkit", ours
    yield "  every Sum as Add", swapped(ours, "Sum", "Add")
    _, report = fused(model, signature, example)
    matching = [rule for rule, found in report["rules"].items() if found["matched"]]
    named = {"layer_norm", "attention_scale"}  # not among the default rules
    singles: list[list[str] | None] = [[rule.name] for rule in RULES if rule.name in {*matching, *named}]
    for rules in [*singles, None]:
        label = "fuse" if rules is None else f"  fuse: {rules[0]}"
        try:
            after, _ = fused(model, signature, example, rules)
        except Exception as error:  # a rule that matches nothing here
            print(f"{name}: {label.strip()}: {str(error).splitlines()[0]}")
            continue
        yield label, written(after, signature, example, folder / label.strip().replace(": ", "-"))


def speed(names: list[str], seconds: float) -> None:
    from calibrate.latency import interleave, processor_name
    from export.to_onnx import OnnxExporter

    print(f"{processor_name()}, ONNX Runtime, 1 thread, interleaved")
    for name in names:
        model, signature, example, batches = subject(name)
        with tempfile.TemporaryDirectory() as folder:
            made = dict(files(name, model, signature, example, Path(folder)))
            runners = {label: OnnxExporter().open(path, 1) for label, path in made.items()}
            nodes = {label: operators(path).total() for label, path in made.items()}
            for batch in batches:
                rows = {key: tensor[:batch] for key, tensor in example.items()}
                calls = {label: functools.partial(runner, rows) for label, runner in runners.items()}
                timed = interleave(calls, repeats=400, minimum=7, budget_s=seconds)
                print(f"{name}, batch {batch}        nodes      ms   times as fast as torch.onnx.export [95 %]   runs")
                for label, timing in timed.items():
                    ratio = timing.ratio
                    told = "" if ratio is None else f"{1 / ratio.value:.3f} [{1 / ratio.high:.3f}, {1 / ratio.low:.3f}]"
                    print(f"{label:24} {nodes[label]:5} {timing.median_ms:9.3f}   {told:28} {timing.runs}", flush=True)
                if name == "deit-s":
                    peak(model, signature, example, timed["this toolkit"].median_ms)


def engines(names: list[str]) -> None:
    """Kernels of the TensorRT engine (built, not run), operators of the Core ML program (iOS 18), before and after ``fuse``."""
    build = families()

    print(f"{'':20} TensorRT kernels      products      Core ML operators      attentions")
    for name in names:
        real = name == "sst2-minilm"
        model, signature, example = subject(name)[:3] if real else build(name)
        after, _ = fused(model, signature, example)
        with tempfile.TemporaryDirectory() as folder:
            pair = [_inside(m, signature, example, Path(folder) / str(i)) for i, m in enumerate((model, after))]
        told = [f"{one} -> {two}" for one, two in zip(*pair, strict=True)]
        print(f"{name:20} {told[0]:21} {told[1]:13} {told[2]:22} {told[3]}", flush=True)


def _inside(model: torch.nn.Module, signature: Any, example: Any, folder: Path) -> tuple[Any, ...]:
    """Kernels and matrix products of the engine; operators of the Core ML program and fused attentions among them."""
    from export.engine_listing import read_listing
    from export.graph import Traceable
    from export.mil_package import Package
    from export.to_coreml import CoreMLExporter
    from export.to_tensorrt import TensorRTExporter

    folder.mkdir()
    source = Traceable(model.eval(), signature, example)
    told: list[Any] = ["?", "?", "?", "?"]
    try:
        engine = TensorRTExporter().write(source, folder / "model.engine").path
        listing = read_listing(engine.read_bytes())
        if listing is not None:
            told[:2] = listing.kernels, listing.fully_connected
    except Exception as error:
        print(f"TensorRT: {str(error).splitlines()[0][:100]}")
    try:
        package = CoreMLExporter(target="iOS18").write(source, folder / "model.mlpackage").path
        kinds = Counter(op.kind for op in Package(package).ops)
        told[2:] = kinds.total() - kinds["const"], kinds["scaled_dot_product_attention"]
    except Exception as error:
        print(f"Core ML: {str(error).splitlines()[0][:100]}")
    return tuple(told)


def peak(model: torch.nn.Module, signature: Any, example: Any, milliseconds: float) -> None:
    """What share of the core's float peak a time is."""
    from compress.anatomy import find

    flops = find(model, signature, {key: tensor[:2] for key, tensor in example.items()}).totals["flops"]
    one, two = torch.randn(1024, 1024), torch.randn(1024, 1024)
    taken = []
    for _ in range(30):
        started = time.perf_counter()
        one @ two
        taken.append(time.perf_counter() - started)
    best = 2 * 1024**3 / min(taken)
    reached = flops / milliseconds * 1e3
    told = f"{reached / 1e9:.1f} GFLOP/s, {reached / best:.0%} of {best / 1e9:.1f}"
    print(f"{flops / 1e9:.2f} GFLOP in {milliseconds:.1f} ms: {told}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--engines", action="store_true")
    parser.add_argument("--seconds", type=float, default=25.0, help="for each model and batch size")
    parser.add_argument("--model", choices=["sst2-minilm", "deit-s"], help="one of them (default: both)")
    parser.add_argument("--families", nargs="*", default=list(FAMILIES))
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.speed:
        speed([given.model] if given.model else ["sst2-minilm", "deit-s"], given.seconds)
    elif given.engines:
        engines(["sst2-minilm", *(name for name in given.families if name in ENGINES)])
    else:
        count(given.families)


if __name__ == "__main__":
    main()
