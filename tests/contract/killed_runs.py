"""Runs a recipe many times in children that are forked off one process, and kills them where they are told to.

    python killed_runs.py recipe.yaml jobs.json

A job is ``{"out": folder, "at": null or [what, name], "damage": null or path in the folder}``: the file is damaged, then the
recipe is run. ``at`` is ``["before", part]`` or ``["after", part]`` the record of a part is written, or ``["naming", file]``:
before a file gets that name. Prints, as JSON, the exit status of each job (-9: killed).
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

from compress.journal import Journal
from compress.recipe import read
from compress.run import apply


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _unless(name: str, real: Any) -> Any:
    def replace(source: Any, target: Any, **options: Any) -> Any:
        if Path(target).name == name:
            die()
        return real(source, target, **options)

    return replace


def die_at(what: str, where: str) -> None:
    """Kills this process at a moment that is still to come."""
    if what == "naming":
        os.replace, os.rename = _unless(where, os.replace), _unless(where, os.rename)
        return
    real = Journal._write

    def written(self: Journal, name: str, *rest: Any) -> None:
        if (what, where) == ("before", name):
            die()
        real(self, name, *rest)
        if (what, where) == ("after", name):
            die()

    Journal._write = written  # type: ignore[method-assign]


def forked(recipe: Path, job: dict[str, Any]) -> int:
    """The exit status of one run in a child of this process."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        if job.get("at"):
            die_at(*job["at"])
        apply(read(recipe), Path(job["out"]))
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(70)


def damage(path: Path) -> None:
    """Flips a bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def main() -> None:
    recipe, jobs = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text())
    warm = Path(jobs[0]["out"]).with_name("warm")
    apply(read(recipe), warm)  # what is imported on the way is imported once, for all children
    given = []
    for job in jobs:
        if job.get("damage"):
            damage(Path(job["out"]) / job["damage"])
        given.append(forked(recipe, job))
    print(json.dumps(given))


if __name__ == "__main__":
    main()
