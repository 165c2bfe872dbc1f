"""Kills a run at random moments and lets it go on: are the files those of an undisturbed run?

    python tests/benchmarks/kill_campaign.py [--recipe quickstart] [--kills 20] [--seed 0] [--out FOLDER]

Runs the recipe undisturbed once. Then, for each kill, a run in a folder of its own is ended by SIGKILL (the whole process group)
at a moment drawn uniformly over the time of the undisturbed run, and started again until it finishes; one start in three is
killed again. Ends with exit code 1 if any file differs by a byte or something else went wrong.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

ARTIFACTS = (
    "recipe.yaml", "model.safetensors", "kept.safetensors", "onnx/model.onnx", "onnx/model.onnx.data", "coreml/model.mlpackage",
    "tensorrt/model.engine", "tensorrt/model.qdq.onnx",
)  # fmt: skip


@dataclass
class Trial:
    """One run that was killed and went on."""

    moments: list[float] = field(default_factory=list)
    reached: list[int | None] = field(default_factory=list)
    finished_first: bool = False
    taken_over: int = 0
    saved_s: float = 0.0
    wrong: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        stages = ["finished" if parts is None else f"{parts} parts done" for parts in self.reached]
        kills = ", ".join(f"{moment:.1f} s ({stage})" for moment, stage in zip(self.moments, stages, strict=True))
        told = f"killed at {kills}" if kills else "not killed"
        if self.finished_first:
            told += ", then done before the next kill" if kills else ": done before the kill"
        verdict = f"DIFFERENT: {'; '.join(self.wrong)}" if self.wrong else "same bytes"
        return f"{told}: took over {self.taken_over} parts ({self.saved_s:.1f} s): {verdict}"


def command(recipe: str, out: Path) -> list[str]:
    """The command of a run, as a user gives it."""
    return [sys.executable, "-m", "compress.cli", "apply", recipe, "--out", str(out), "--quiet"]


def started(recipe: str, out: Path) -> subprocess.Popen[bytes]:
    """A run in a process group of its own."""
    log = out.with_suffix(".log").open("ab")
    return subprocess.Popen(command(recipe, out), stdout=log, stderr=log, start_new_session=True)


def killed_after(run: subprocess.Popen[bytes], seconds: float) -> bool:
    """Whether the run was still at work when it was killed."""
    try:
        run.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(run.pid, signal.SIGKILL)
        run.wait()
        return True
    return False


def digests(out: Path) -> dict[str, str]:
    """SHA-256 of each file of the artifacts that are there."""
    files = [file for name in ARTIFACTS for file in ([out / name] if (out / name).is_file() else sorted((out / name).rglob("*")))]
    return {file.relative_to(out).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest() for file in files if file.is_file()}


def leftovers(out: Path) -> list[str]:
    """What a finished run must not leave: the journal, the lock and unfinished files."""
    return sorted(path.relative_to(out).as_posix() for path in out.rglob(".*")) + [
        path.relative_to(out).as_posix() for path in out.rglob("*.partial")
    ]


def trial(recipe: str, out: Path, usual_s: float, expected: dict[str, str], draw: random.Random) -> Trial:
    """Kills and resumes one run, and compares its files with the undisturbed ones."""
    made = Trial()
    again = True
    while again:
        moment = draw.uniform(0, usual_s)
        run = started(recipe, out)
        if not killed_after(run, moment):
            made.finished_first = True
            break
        made.moments.append(moment)
        done = (out / "report.json").is_file() and not (out / ".unfinished/run.json").is_file()
        made.reached.append(None if done else len(list(out.glob(".unfinished/*.part.json"))))
        again = draw.random() < 1 / 3
    code = run.returncode if made.finished_first else started(recipe, out).wait()
    if code not in (0, 1):
        made.wrong.append(f"exit code {code}, see {out.with_suffix('.log')}")
        return made
    report = json.loads((out / "report.json").read_text())
    made.taken_over, made.saved_s = len(report["resumed"]), sum(report["seconds"][part] for part in report["resumed"])
    found = digests(out)
    made.wrong += [f"{name} differs" for name in sorted(expected.keys() | found.keys()) if expected.get(name) != found.get(name)]
    made.wrong += [f"{name} is left over" for name in leftovers(out)]
    return made


def killed_trial(recipe: str, out: Path, usual_s: float, expected: dict[str, str], draw: random.Random) -> Trial:
    """A trial that was killed while it was at work; one that was done before is made again with another moment."""
    while True:
        made = trial(recipe, out, usual_s, expected, draw)
        if made.wrong or any(parts is not None for parts in made.reached):
            return made
        shutil.rmtree(out)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="quickstart")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="folder for the runs, which stay there (default: a temporary one)")
    options = parser.parse_args()
    draw = random.Random(options.seed)
    folder = options.out or Path(tempfile.mkdtemp(prefix="kill-campaign-"))
    folder.mkdir(parents=True, exist_ok=True)
    begun = time.perf_counter()
    if started(options.recipe, folder / "undisturbed").wait() not in (0, 1):
        sys.exit(f"the undisturbed run failed:\n{(folder / 'undisturbed.log').read_text()}")
    usual_s = time.perf_counter() - begun
    expected = digests(folder / "undisturbed")
    print(f"{options.recipe}: {usual_s:.1f} s undisturbed, {len(expected)} files; seed {options.seed}", flush=True)
    trials = []
    for number in range(1, options.kills + 1):
        trials.append(killed_trial(options.recipe, folder / f"run-{number}", usual_s, expected, draw))
        print(f"{number:3}  {trials[-1]}", flush=True)
        if not trials[-1].wrong:
            shutil.rmtree(folder / f"run-{number}")
    wrong = sum(bool(one.wrong) for one in trials)
    kills, taken = sum(len(one.moments) for one in trials), sum(one.taken_over for one in trials)
    print(
        f"{len(trials)} runs, {kills} kills, {len(trials) - wrong} with the bytes of the undisturbed run, {wrong} wrong; "
        f"{taken} parts taken over, {sum(one.saved_s for one in trials):.0f} s saved"
    )
    if options.out is None and not wrong:
        shutil.rmtree(folder)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
