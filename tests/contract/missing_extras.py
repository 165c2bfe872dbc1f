"""Runs commands where packages are truly absent: ``python -S missing_extras.py jobs.json``, the packages' folders in the job.

The interpreter is started without site-packages. Each job gets a folder of links to every installed package but those that it
lacks, in a process of its own, forked from one that has imported torch.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from called import called

__all__ = ["main"]


def linked(installed: Path, into: Path, leave_out: list[str]) -> Path:
    """A folder with links to all that is installed, but the named packages and what tells that they are installed."""
    into.mkdir()
    for entry in installed.iterdir():
        name = entry.name.partition(".dist-info")[0].rpartition("-")[0] if entry.name.endswith(".dist-info") else entry.name
        if name.lower().replace("-", "_").partition(".")[0] not in leave_out:
            (into / entry.name).symlink_to(entry)
    return into


def main(path: str) -> None:
    told = json.loads(Path(path).read_text())
    installed, scratch = Path(told["installed"]), Path(path).parent
    sys.path += [told["repository"], str(linked(installed, scratch / "bare", told["extras"]))]
    import torch
    from safetensors import safe_open  # noqa: F401 - imported before the fork, as torch is

    torch.set_num_threads(1)
    bare = sys.path.pop()
    for number, job in enumerate(told["jobs"]):
        child = os.fork()
        if not child:
            sys.path.append(str(linked(installed, scratch / f"without-{number}", job["without"])))
            sys.path_importer_cache.clear()
            answer = called(*job["arguments"])
            (scratch / f"answer-{number}.json").write_text(json.dumps(answer))
            os._exit(0)
        os.waitpid(child, 0)
    assert bare.endswith("bare")


if __name__ == "__main__":
    main(sys.argv[1])
