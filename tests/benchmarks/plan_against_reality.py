"""Plans recipes, carries them out, and prints what was foretold beside what came: sizes, peak memory, disk, bytes of each pass.

    python tests/benchmarks/plan_against_reality.py [RECIPE ...] [--no-evaluation]

Without a recipe: the quickstart, and the INT8 benchmark where its model and data are there. Plan and run each have a process of
their own, because the peak of memory is that of a process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RECIPES = ("quickstart", str(HERE / "recipes" / "sst2-int8.yaml"))


def compress(*arguments: str) -> str:
    """What a command prints; a failure other than a missed contract ends the program."""
    program = "from compress.cli import main; main()"
    command = [sys.executable, "-P", "-c", program, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if done.returncode not in (0, 1):
        sys.exit(f"compress {' '.join(arguments)}: {done.stderr}")
    return done.stdout


def compared(recipe: str, options: list[str], folder: Path) -> list[tuple[str, float, float]]:
    """(what, foretold, came), bytes."""
    plan: dict[str, Any] = json.loads(compress("plan", recipe, "--trust", "--json", *options))
    compress("apply", recipe, "--trust", "--quiet", "--out", str(folder), *options)
    report: dict[str, Any] = json.loads((folder / "report.json").read_text())
    sizes = {row["label"]: row["size_bytes"] for row in report["rows"]}
    found = [(f"{file['format']} file", file["size_bytes"], sizes[file["format"]]) for file in plan["files"]]
    baselines = {row["format"]: row["size_bytes"] / row["size_ratio"] for row in report["rows"] if row["size_ratio"]}
    for file in plan["files"]:
        if file["float_size_bytes"]:
            found.append((f"{file['format']} float file", file["float_size_bytes"], baselines[file["format"]]))
    for step, done in zip(plan["passes"], report["steps"], strict=True):
        found.append((f"after {step['name']}", step["bytes_after"], done["bytes_after"]))
    found.append(("peak memory", plan["memory"]["peak_bytes"], report["peak_memory_bytes"]))
    files = [file.stat().st_size for file in folder.rglob("*") if file.is_file()]
    return [*found, ("disk", plan["disk"]["bytes"], sum(files))]


def main() -> None:
    options = [argument for argument in sys.argv[1:] if argument.startswith("--")]
    recipes = [argument for argument in sys.argv[1:] if not argument.startswith("--")] or list(RECIPES)
    for recipe in recipes:
        if recipe.endswith("sst2-int8.yaml") and not (HERE / "../../../shared/models").is_dir():
            print(f"{recipe}: its model and data are not there")
            continue
        with tempfile.TemporaryDirectory() as folder:
            print(f"{Path(recipe).stem} {' '.join(options)}")
            for what, foretold, came in compared(recipe, options, Path(folder) / "run"):
                print(
                    f"  {what:22} {foretold / 1e6:10.3f} MB foretold {came / 1e6:10.3f} MB came {foretold / came - 1:+8.1%}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
