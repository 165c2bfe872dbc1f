"""Fusing blocks against dropping them: perplexity of a small decoder without a fourth of its blocks, on text that nobody saw.

    python tests/benchmarks/fuse_layers.py [--model FOLDER] [--random N] [--also NAME ...]

Trains the decoder first where FOLDER holds none (``wikitext_decoder.py``). Rows: the float model; ``fuse_layers`` as in
``recipes/wikitext-fuse.yaml``; the same blocks dropped (``wikitext-drop.yaml``), and N random choices of as many. ``--also base``
adds the same training with nothing taken over from the blocks that go, ``--also random`` fuses random blocks. Intervals are 95 %:
bootstrap over rows, paired where two models are compared. Exits with 1 if fusing is not better than dropping the same blocks.
"""

from __future__ import annotations

import argparse
import copy
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor

RECIPES = Path(__file__).parent / "recipes"
PLACEHOLDER = "../../../../wikitext-decoder"


def main() -> int:
    sys.path.insert(0, str(Path(__file__).parent))
    from wikitext_decoder import CACHE, make

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=CACHE, help="where the decoder is, or will be kept")
    parser.add_argument("--random", type=int, default=3, help="random choices of blocks that are dropped")
    parser.add_argument("--also", choices=["base", "random"], action="append", default=[])
    given = parser.parse_args()
    return compared(make(given.model), given.random, given.also)


def compared(folder: Path, randoms: int, also: list[str]) -> int:
    """Prints the table."""
    from calibrate.metrics import metric
    from compress.passes.drop_layers import DropLayers

    torch.set_num_threads(1)
    trial = Trial(folder, "wikitext-fuse")
    fuse = trial.recipe.passes[0]
    fused, report = trial.after(fuse)
    blocks = [trial.number(path) for path in report["blocks"]]
    named = Trial(folder, "wikitext-drop").recipe.passes[0]
    if sorted(named.blocks) != sorted(blocks):
        print(f"wikitext-drop.yaml names blocks {named.blocks}; fuse_layers chose {blocks}, and those are dropped here")
    rows: dict[str, Tensor] = {"float": trial.rows(trial.source.model)}
    rows["fused"] = trial.rows(fused)
    rows["dropped, the same blocks"] = trial.rows(trial.after(DropLayers(blocks=blocks))[0])
    for seed in range(randoms):
        step = DropLayers(sublayers="block", count=len(blocks), score="random", repair=False)
        model, told = trial.after(step, seed)
        rows[f"dropped at random: {[trial.number(path) for path in told['blocks']]}"] = trial.rows(model)
    for name in also:
        changes = {"blocks": blocks, "ratio": None, "coefficient_rate": 0.0} if name == "base" else {"score": "random"}
        model, told = trial.after(fuse.model_copy(update=changes))
        label = "the same training, nothing taken over" if name == "base" else f"fused at random: {told['blocks']}"
        rows[label] = trial.rows(model)
    perplexity, same = metric("perplexity"), rows["dropped, the same blocks"]
    print(f"\n{'blocks ' + str(blocks):44}  {'perplexity':>32}  {'against float':>32}  {'against dropping the same':>32}")
    for label, found in rows.items():
        said = [_said(perplexity.estimate(found), ".2f")]
        said += [_said(perplexity.drop(other, found), "+.1%") for other in (rows["float"], same)]
        print(f"{label:44}" + "".join(f"  {text:>32}" for text in said))
    for told in report["rounds"]:
        taught = told["training"]
        levels = f"{told['output_sqnr_db_dropped']:.1f} -> {told['output_sqnr_db_fused']:.1f} dB"
        loss = f"{taught['loss_before']:.4f} -> {taught['loss_after']:.4f}"
        print(f"{told['path']}: loss {loss}, step {taught['best_step']} of {taught['planned']}, output {levels}")
    better = perplexity.drop(same, rows["fused"]).high < 0
    print("fusing is better than dropping the same blocks" if better else "fusing is NOT better than dropping the same blocks")
    return int(not better)


def _said(estimate: Any, form: str) -> str:
    return f"{estimate.value:{form}} [{estimate.low:{form}}, {estimate.high:{form}}]"


class Trial:
    """A benchmark recipe on the decoder in a folder."""

    def __init__(self, folder: Path, name: str) -> None:
        from compress.anatomy import find
        from compress.datasets import load_data
        from compress.recipe import read
        from compress.sources import load_model

        with tempfile.TemporaryDirectory() as place:
            path = Path(place) / f"{name}.yaml"
            path.write_text((RECIPES / f"{name}.yaml").read_text().replace(PLACEHOLDER, str(folder.resolve())))
            self.recipe: Any = read(path)
        self.source = load_model(self.recipe.model.source, base=self.recipe.base)
        self.data = load_data(self.recipe, self.source)
        self.anatomy = find(self.source.model, self.source.signature, self.data.example)

    def number(self, path: str) -> int:
        return next(block.index for block in self.anatomy.blocks if block.path == path)

    def after(self, step: Any, seed: int | None = None) -> tuple[Any, dict[str, Any]]:
        """A copy of the model after a pass, and what the pass says."""
        from compress.passes.contract import Context
        from compress.surgery import Surgery

        started = time.perf_counter()
        model = copy.deepcopy(self.source.model)
        context = Context(
            signature=self.source.signature,
            anatomy=self.anatomy,
            calibration=self.data.calibration_batches,
            surgery=Surgery(),
            rows=len(self.data.calibration),
            seed=self.recipe.seed if seed is None else seed,
        )
        model = step.run(model, context)
        print(f"{step.name}: {context.report['blocks']}, {time.perf_counter() - started:.0f} s", flush=True)
        return model, context.report

    def rows(self, model: Any) -> Tensor:
        """The losses of the evaluation rows."""
        from calibrate.metrics import metric
        from compress.passes.contract import evaluating

        perplexity, found = metric("perplexity"), []
        with evaluating(model):
            for batch in self.data.evaluation.batches(16):
                found.append(perplexity.rows(self.source.signature.call(model, batch), batch, None))
        return torch.cat(found)


if __name__ == "__main__":
    sys.exit(main())
