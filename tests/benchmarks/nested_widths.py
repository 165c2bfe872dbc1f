"""One sorted text encoder, many sizes: accuracy, size and arithmetic of each, and of the same widths in random order.

    python tests/benchmarks/nested_widths.py [FOLDER] [--seeds N] [--quick]

Runs ``recipes/sst2-nested.yaml`` once, extracts uniform widths, mixed ones under budgets and repaired ones from it, and prints
a Markdown table; then the same from runs whose units stand in random order. ``--quick`` leaves out most of them.
Everything stays in FOLDER, and what is finished there is not made again.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import compress
from compress.recipe import Recipe, parse_recipe
from compress.report import Report
from compress.report import read as read_report

HERE = Path(__file__).parent
RECIPE = HERE / "recipes" / "sst2-nested.yaml"
UNIFORM: list[dict[str, Any]] = [{"width": width} for width in (1.0, 0.75, 0.5, 0.25)]
MIXED: list[dict[str, Any]] = [{"macs": macs} for macs in (0.8, 0.7, 0.6)] + [{"macs": 0.7, "heads": 1.0}, {"size_ratio": 0.8}]


@dataclass(frozen=True)
class Line:
    """One row of the table."""

    what: str
    order: str
    report: Report
    seconds: float

    def __str__(self) -> str:
        row = next(row for row in self.report.rows if row.label == "onnx")
        step = self.report.steps[0].report
        assert row.metric is not None
        assert row.drop is not None
        size = "-" if row.size_ratio is None else f"{row.size_ratio:.3f}"
        time = next((f"{one.ratio:.2f}" for one in row.latency if one.ratio is not None), "-")
        interval = f"{row.metric.low:.3f} to {row.metric.high:.3f}"
        cells = (self.what, self.order, f"{step.get('kept_share', 1):.3f}", size, f"{row.metric.value:.4f}", interval)
        return f"| {' | '.join(cells)} | {100 * row.drop.value:+.1f} | {row.sqnr_db or 0:.1f} | {time} | {self.seconds:.0f} |"


def nested(folder: Path, score: str, seed: int) -> Path:
    """The run that sorts the units, made once."""
    name = f"sst2-{score}" + (f"-{seed}" if score == "random" else "")
    text = RECIPE.read_text().replace("- nest_widths", f"- nest_widths: {{score: {score}}}").replace("seed: 0", f"seed: {seed}")
    recipe: Recipe = parse_recipe(text, where=str(RECIPE), base=RECIPE.parent, stem=name)
    run = folder / name
    if not (run / "report.json").is_file():
        compress.apply(recipe, run)
    return run


def extracted(run: Path, order: str, options: dict[str, Any]) -> Line:
    """One size of it."""
    what = ", ".join(f"{name} {value:g}" if value is not True else name for name, value in options.items())
    out = run.parent / f"{run.name} {what}"
    started = time.perf_counter()
    done = (out / "report.json").is_file()
    report = read_report(out) if done else compress.extract(run, out, **options)
    return Line(what, order, report, report.seconds.get("pass 1 extract_width", 0.0) if done else time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=None)
    parser.add_argument("--seeds", type=int, default=1, help="runs in random order")
    parser.add_argument("--quick", action="store_true")
    asked = parser.parse_args()
    folder = asked.folder or Path(tempfile.mkdtemp())
    wanted = [{"width": 0.5}, {"macs": 0.7}] if asked.quick else [*UNIFORM, *MIXED]
    if not asked.quick:
        wanted += [{**options, "repair": True} for options in ({"width": 0.5}, {"width": 0.25}, {"macs": 0.7})]
    print("| asked for | order | MACs of the blocks | size | accuracy | 95 % | points lost | SQNR dB | time | s |", flush=True)
    print("|---|---|---|---|---|---|---|---|---|---|")
    run = nested(folder, "trajectory", 0)
    for options in wanted:
        print(extracted(run, "importance", options), flush=True)
    for seed in range(asked.seeds):
        control = nested(folder, "random", seed)
        for options in ({"width": 0.75}, {"width": 0.5}, {"macs": 0.7, "heads": 1.0}):
            print(extracted(control, f"random {seed}", options), flush=True)


if __name__ == "__main__":
    main()
