"""What ``drop_layers`` loses on real rows: by similarity, by the model's output, by chance; as it is, repaired, trained.

    python tests/benchmarks/drop_layers.py [--model sst2|cifar10] [--part attention] [--count 2] [--rows 1024]
        [--distill 0] [--sets 15] [--ways search,similarity] [--train-random]

Needs ``../shared``. Accuracy on all rows of dev in torch, and what it lost against float with the paired 95 % interval. By chance
means the mean over all sets of that many parts, or ``--sets`` drawn ones; its line says how far a choice is above that mean, with
a bootstrap interval over rows.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import os
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor, nn

from calibrate.data import Rows
from calibrate.metrics import metric, paired_drop
from calibrate.signature import Batch
from compress.anatomy import find
from compress.datasets import load_data
from compress.passes.contract import Context
from compress.passes.drop_layers import DropLayers
from compress.preparation import model_of
from compress.recipe import read
from compress.surgery import Surgery

RECIPES = Path(__file__).parent / "recipes"
RECIPE = {"sst2": "sst2-drop-attention.yaml", "cifar10": "cifar10-vit-drop-attention.yaml"}
WAYS = {"similarity": ("similarity", "one_shot"), "output": ("output", "one_shot"), "search": ("output", "search")}
WAYS |= {"iterative": ("similarity", "iterative"), "greedy": ("output", "iterative")}
STAGES = ("as it is", "repaired", "trained")


@dataclass
class Bench:
    """A model, its calibration batches, and the evaluation rows without needless padding."""

    part: str
    count: int
    epochs: int
    rows: int
    name: str
    most: int | None = None
    """Evaluation rows, so many of them evenly spread; None: all."""

    def __post_init__(self) -> None:
        torch.set_num_threads(1)
        recipe = read(RECIPES / RECIPE[self.name])
        self.source = model_of(recipe, False)
        data = load_data(recipe, self.source)
        self.example = data.example
        self.calibration = list(first(data.calibration_batches(), self.rows))
        assert data.evaluation is not None
        judged = spread(data.evaluation, self.most)
        assert judged.labels is not None
        self.batches, self.labels = short(list(judged.batches(1)), judged.labels)
        self.float = self.outputs(self.source.model)

    def outputs(self, model: nn.Module) -> Tensor:
        with torch.inference_mode():
            return torch.cat([self.source.signature.call(model.eval(), batch) for batch in self.batches])

    def run(self, **options: Any) -> tuple[nn.Module, dict[str, Any]]:
        model = copy.deepcopy(self.source.model)
        anatomy = find(model, self.source.signature, self.example)
        self.blocks = len(anatomy.blocks)
        context = Context(self.source.signature, anatomy, lambda: iter(self.calibration), Surgery(), rows=self.rows)
        DropLayers(**options).run(model, context)
        return model, context.report

    def chosen(self, way: str) -> tuple[int, ...]:
        score, method = WAYS[way]
        options = {"sublayers": self.part, "count": self.count, "score": score, "method": method, "repair": False}
        return tuple(sorted(entry["block"] for entry in self.run(**options)[1]["dropped"]))

    def stage(self, numbers: tuple[int, ...], stage: str) -> Tensor:
        """The outputs without the numbered parts."""
        option = "blocks" if self.part == "block" else self.part
        trained = self.epochs if stage == "trained" else 0
        return self.outputs(self.run(**{option: list(numbers), "repair": stage != "as it is", "distill": trained})[0])

    def figures(self, outputs: Tensor) -> str:
        accuracy = metric("accuracy")
        lost = paired_drop(accuracy, self.labels, self.float, outputs)
        share = float(self.right(outputs).mean())
        return f"{share:.4f}  lost {100 * lost.value:5.2f} [{100 * lost.low:5.2f}, {100 * lost.high:5.2f}]"

    def right(self, outputs: Tensor) -> Tensor:
        return (outputs.argmax(-1) == self.labels).double()

    def above(self, outputs: Tensor, others: list[Tensor]) -> str:
        """How far the accuracy is above the mean of others, and a bootstrap interval over rows, in points."""
        gain = self.right(outputs) - torch.stack([self.right(other) for other in others]).mean(0)
        generator = torch.Generator().manual_seed(0)
        drawn = gain[torch.randint(len(gain), (2000, len(gain)), generator=generator)].mean(1)
        low, high = torch.quantile(drawn, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
        return f"{100 * float(gain.mean()):5.2f} [{100 * low:5.2f}, {100 * high:5.2f}]"


def first(batches: Any, rows: int) -> Iterator[Batch]:
    for batch in batches:
        if rows <= 0:
            return
        yield {name: tensor[:rows] for name, tensor in batch.items()}
        rows -= len(next(iter(batch.values())))


def spread(rows: Rows, most: int | None) -> Rows:
    """So many rows, evenly spread: a file may be sorted by class."""
    if most is None or most >= len(rows):
        return rows
    kept = [number * len(rows) // most for number in range(most)]
    labels = None if rows.labels is None else rows.labels[kept]
    return Rows(rows.table, rows.encoder, [rows.indices[number] for number in kept], labels, f"{most}, evenly spread")


def short(rows: list[Batch], labels: Tensor, step: int = 16) -> tuple[list[Batch], Tensor]:
    """Rows of one length class together, cut to the longest of a batch."""
    if "attention_mask" not in rows[0]:
        order, widths = list(range(len(rows))), [0] * len(rows)
    else:
        widths = [int(row["attention_mask"].sum()) for row in rows]
        order = sorted(range(len(rows)), key=lambda number: widths[number])
    batches = []
    for start in range(0, len(order), step):
        numbers = order[start : start + step]
        width = max(widths[number] for number in numbers) or None
        cut = slice(None, width)
        batches.append(
            {name: torch.cat([rows[n][name][:, cut] if width else rows[n][name] for n in numbers]) for name in rows[0]}
        )
    return batches, labels[torch.tensor(order)]


def drawn(blocks: int, count: int, most: int) -> list[tuple[int, ...]]:
    every = list(itertools.combinations(range(blocks), count))
    return every if len(every) <= most else sorted(random.Random(0).sample(every, most))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(RECIPE), default="sst2")
    parser.add_argument("--part", choices=["attention", "mlp", "block"], default="attention")
    parser.add_argument("--count", type=int, default=2)
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--distill", type=int, default=0)
    parser.add_argument("--sets", type=int, default=15)
    parser.add_argument("--ways", default="similarity,search")
    parser.add_argument("--train-random", action="store_true")
    given = parser.parse_args()
    bench = Bench(given.part, given.count, given.distill, given.rows, given.model)
    print(
        f"{given.model}: {given.part}, {given.count} of the blocks' parts; {len(bench.labels)} rows; {given.rows} to repair with"
    )
    print(f"float                                {float(bench.right(bench.float).mean()):.4f}")
    stages = STAGES[: 3 if given.distill else 2]
    found: dict[tuple[str, str], Tensor] = {}
    for way in given.ways.split(","):
        numbers = bench.chosen(way)
        for stage in stages:
            started = time.perf_counter()
            found[way, stage] = bench.stage(numbers, stage)
            seconds = time.perf_counter() - started
            print(f"{way:<11}{numbers!s:<14}{stage:<11} {bench.figures(found[way, stage])}  ({seconds:.0f} s)", flush=True)
    chance: dict[str, list[Tensor]] = {stage: [] for stage in stages if stage != "trained" or given.train_random}
    for stage, outputs in chance.items():
        for numbers in drawn(bench.blocks, given.count, given.sets) if given.sets else []:
            outputs.append(bench.stage(numbers, stage))
            print(f"{'random':<11}{numbers!s:<14}{stage:<11} {bench.figures(outputs[-1])}", flush=True)
    for stage, outputs in chance.items():
        if outputs:
            mean = float(torch.stack([bench.right(one).mean() for one in outputs]).mean())
            print(f"random, mean of {len(outputs)}, {stage}: {mean:.4f}")
            for (way, at), given_ in found.items():
                if at == stage:
                    print(f"  {way} is above it by {bench.above(given_, outputs)} points")


if __name__ == "__main__":
    main()
