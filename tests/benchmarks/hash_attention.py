"""Hash attention: from how many tokens on it is faster than softmax attention, and what it costs in accuracy.

    python tests/benchmarks/hash_attention.py --speed                        # two ONNX files, interleaved, one thread, 2 minutes
    python tests/benchmarks/hash_attention.py --quality --model cifar10      # each block alone, all, with keep, with distill
    python tests/benchmarks/hash_attention.py --quality --model sst2

``--quality`` needs ``../shared`` (the models and their data): 256 calibration rows, accuracy in torch on all
rows of dev or the first ``--rows``, and what it lost against float with the paired 95 % interval. ``--speed`` times the attention
alone, without the projections around it: 3 heads of 64, 16 bits, 25 anchors; times mean something on a machine that does nothing
else.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import math
import os
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor, nn
from torch.nn import functional as F

HEADS, WIDTH, BITS, ANCHORS = 3, 64, 16, 25
TOKENS = (64, 96, 128, 192, 256, 384, 512, 768, 1024, 2048, 4096)


class Attention(nn.Module):
    """Attention alone; queries, keys and values are its inputs."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value)


def speed(seconds: float) -> None:
    """Writes both files once, with a free number of tokens, and times them in turn."""
    from calibrate.latency import interleave, processor_name
    from calibrate.signature import Signature, TensorSpec
    from compress.layers import HashedAttention
    from export.graph import Traceable
    from export.to_onnx import OnnxExporter

    shape = ("batch", HEADS, "tokens", WIDTH)
    signature = Signature(tuple(TensorSpec(name, torch.float32, shape) for name in ("query", "key", "value")))
    hashed = Attention()
    layer = HashedAttention(HEADS, WIDTH, BITS, ANCHORS)
    generator = torch.Generator().manual_seed(0)
    for name in ("centre", "anchors", "projection", "gate"):
        getattr(layer, name).copy_(torch.randn(getattr(layer, name).shape, generator=generator) / WIDTH**0.5)
    layer.attach(hashed, "")

    def batch(tokens: int) -> dict[str, Tensor]:
        return {name: torch.randn(1, HEADS, tokens, WIDTH, generator=generator) for name in signature.names}

    print(f"{processor_name()}, 1 thread, batch 1, {HEADS} heads of {WIDTH}, {BITS} bits, {ANCHORS} anchors")
    print("tokens  softmax ms   hash ms   hash over softmax [95 %]")
    ratios = {}
    with tempfile.TemporaryDirectory() as folder:
        runners = {}
        exporter = OnnxExporter(dynamic=("batch", "tokens"))
        for name, model in (("softmax", Attention()), ("hash", hashed)):
            example = {key: tensor.repeat(2, 1, 1, 1) for key, tensor in batch(48).items()}
            artifact = exporter.write(Traceable(model.eval(), signature, example, name), Path(folder) / name)
            runners[name] = exporter.open(artifact.path, 1)
        for tokens in TOKENS:
            given = batch(tokens)
            calls = {name: functools.partial(runner, given) for name, runner in runners.items()}
            soft, hard = interleave(calls, repeats=200, minimum=7, budget_s=seconds).values()
            ratio = hard.ratio
            assert ratio is not None
            ratios[tokens] = ratio.value
            told = f"{ratio.value:6.3f} [{ratio.low:.3f}, {ratio.high:.3f}]"
            print(f"{tokens:6} {soft.median_ms:11.3f} {hard.median_ms:9.3f}   {told}  {hard.runs} runs", flush=True)
    print(f"fewer multiply-accumulates from {fewer_macs()} tokens on; faster from {fall_over(ratios)} tokens on")


def fall_over(ratios: dict[int, float]) -> str:
    """From where on the ratio stays below one: by a straight line, in logarithms, between the two lengths around it."""
    lengths = sorted(ratios)
    slow = [tokens for tokens in lengths if ratios[tokens] >= 1]
    if not slow:
        return f"{lengths[0]} or fewer"
    if slow[-1] == lengths[-1]:
        return f"more than {lengths[-1]}"
    below, above = slow[-1], lengths[lengths.index(slow[-1]) + 1]
    share = math.log(ratios[below]) / (math.log(ratios[below]) - math.log(ratios[above]))
    return f"about {round(below * (above / below) ** share)}"


def fewer_macs() -> int:
    from compress.anatomy import Block
    from compress.hashing.attentions import Hashable

    block = Block(0, "", None, 0, HEADS, HEADS, WIDTH, ())
    return Hashable(block, HEADS, WIDTH, WIDTH, 1, 1).even_tokens(BITS, ANCHORS)


def quality(name: str, settings: list[dict[str, Any]], rows: int | None) -> None:
    """What each block loses alone, all of them, and with each of the settings."""
    from drop_layers import Bench

    from compress.anatomy import find
    from compress.passes.contract import Context
    from compress.passes.hash_attention import HashAttention
    from compress.surgery import Surgery

    bench = Bench("attention", 1, 0, 256, name, rows)
    print(f"{name}, {len(bench.labels)} rows of dev; float {float(bench.right(bench.float).mean()):.4f}", flush=True)
    anatomy = find(bench.source.model, bench.source.signature, bench.example)
    given = settings or [{}, {"distill": 8}, {"keep": 3}, {"keep": 3, "distill": 8}]
    given += [] if settings else [{"blocks": [block.index]} for block in anatomy.blocks]
    for options in given:
        started = time.perf_counter()
        model = copy.deepcopy(bench.source.model)
        context = Context(bench.source.signature, anatomy, lambda: iter(bench.calibration), Surgery(), rows=bench.rows)
        HashAttention(**options).run(model, context)
        told = context.report
        level = told.get("distillation", {}).get("sqnr_db_after") or told["sqnr_db"]
        took = time.perf_counter() - started
        print(f"{json.dumps(options):<32} {bench.figures(bench.outputs(model))}  {level:5.1f} dB  ({took:.0f} s)", flush=True)
        if not options:
            for path, block in told["blocks"].items():
                print(f"  {path}: KL {block['row_kl_nats']}, correlation {block['correlation']}")
                print(
                    f"    alone {block['sqnr_db_alone']:.1f} dB, fewer MACs from {block['fewer_macs_from_tokens']} tokens",
                    flush=True,
                )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--seconds", type=float, default=10.0, help="for each number of tokens")
    parser.add_argument("--quality", action="store_true")
    parser.add_argument("--model", choices=["cifar10", "sst2"], default="cifar10")
    parser.add_argument("--options", default="[]", help="a JSON list of options of the pass, instead of the usual ones")
    parser.add_argument("--rows", type=int, help="evaluation rows, evenly spread; by default all")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.speed or not given.quality:
        speed(given.seconds)
    if given.quality:
        quality(given.model, json.loads(given.options), given.rows)


if __name__ == "__main__":
    main()
