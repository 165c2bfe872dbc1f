"""Runs a recipe on a small disk that grows: ``python disk_jobs.py recipe.yaml mount-point kilobytes...``; prints JSON.

The disk is a tmpfs. Root mounts it as it is; others run this program under ``unshare --user --map-root-user --mount``.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from called import called

__all__ = ["main"]


def command(*arguments: str) -> dict[str, Any]:
    code, printed, told = called(*arguments)
    return {"code": code, "printed": printed, "told": told}


def unfinished(folder: Path) -> list[str]:
    """What was begun and not finished; the journal's own records (``.part.json``) are finished."""
    begun = (".part", ".partial", ".building", ".coreml")
    return sorted(path.name for path in folder.rglob("*") if path.suffix in begun[:2] or path.name.startswith(begun[2:]))


def mount(folder: str, *options: str) -> None:
    subprocess.run(
        ["mount", "-o", ",".join(options), *(() if "remount" in options else ("-t", "tmpfs", "tmpfs")), folder], check=True
    )


def main(recipe: str, folder: str, *kilobytes: str) -> None:
    import torch

    torch.set_num_threads(1)
    mount(folder, f"size={kilobytes[0]}k")
    out = Path(folder, "run")
    apply = ("apply", recipe, "--out", str(out), "--quiet")
    answers = []
    try:
        for number, size in enumerate(kilobytes):
            if number:
                mount(folder, "remount", f"size={size}k")
            answers.append({**command(*apply), "size": size, "unfinished": unfinished(Path(folder))})
        mount(folder, "remount", "ro")
        for closed in (apply, ("validate", str(out), "--quiet"), ("report", str(out))):
            answers.append({**command(*closed), "size": "read-only", "unfinished": unfinished(Path(folder))})
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)
    print(json.dumps(answers))


if __name__ == "__main__":
    main(*sys.argv[1:])
