"""The run folder: one run at a time, never another recipe's, and a disk that is full or closed is said in one line."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from calibrate.errors import UserError
from compress import manifest
from compress.journal import FOLDER
from export.disk import FULL

if TYPE_CHECKING:
    from compress.recipe import Recipe

__all__ = ["LOCK", "locked", "outdated", "own", "prepare", "writable"]

LOCK = ".lock"

_BEGUN = ".recipe.yaml.part"
_STALE = ("report.json", "report.html", "validation.json", "manifest.json", "kept.safetensors", "model.safetensors")
_STALE_FOLDERS = ("onnx", "coreml", "tensorrt", "baseline", "source", "nested")

_DISK = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied",
}
_SAID = re.compile(r"no space left on device|disk quota exceeded|read-only file system", re.IGNORECASE)
_LEAST_BYTES = 64 * 1024


def own(out: Path, name: str, *, fresh: bool = False) -> None:
    """Checks that a folder may be used for runs of the recipe ``name``: it does not exist, is empty, or holds such a run.

    Raises:
        UserError: it holds something else, or a run of another recipe, which only ``fresh`` permits.
    """
    with _usable(out):
        if out.is_file():
            raise UserError(str(out), "is a file", "Name a folder with --out.")
        if not out.is_dir():
            return
        there = {entry.name for entry in out.iterdir()} - {LOCK, FOLDER, _BEGUN}
        marked = (out / "recipe.yaml").is_file()
    if there and not marked:
        raise UserError(str(out), "exists and is not a run folder", "Name another folder with --out, or remove it.")
    for state, key in ((f"{FOLDER}/run.json", "name"), ("manifest.json", "recipe")):
        found = (manifest.read_json(out / state) or {}).get(key, name)
        if found != name and not fresh:
            hint = "Name another folder with --out, or give --fresh to remove that run."
            raise UserError(str(out), f"holds a run of the recipe {found}, this is {name}", hint)


def outdated(out: Path, recipe: Recipe) -> bool:
    """Whether the folder holds a finished run of the same name whose recipe read otherwise."""
    report, text = out / "report.json", out / "recipe.yaml"
    return report.is_file() and text.is_file() and text.read_text(errors="replace") != recipe.text


def prepare(out: Path, recipe: Recipe) -> None:
    """Makes the folder ready for a run from the beginning: what an earlier run left is removed, the report first."""
    for stale in _STALE:
        (out / stale).unlink(missing_ok=True)
    folders = {*_STALE_FOLDERS, *(exporter.filename.partition("/")[0] for exporter in recipe.export)}
    for stale in folders:
        if (out / stale).exists():
            shutil.rmtree(out / stale)
    unfinished = out / _BEGUN
    try:
        unfinished.write_text(recipe.text)
        os.replace(unfinished, out / "recipe.yaml")
    finally:
        unfinished.unlink(missing_ok=True)


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Holds the folder for this process. The lock is the kernel's: it goes with the process, however that ends. A folder that
    holds nothing at the end is removed, where this made it.

    Raises:
        UserError: another process holds it.
    """
    from filelock import FileLock, Timeout

    path = out / LOCK
    with _usable(out):
        made = [folder for folder in (out, *out.parents) if not folder.exists()]
        out.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path, timeout=0)
    try:
        with _usable(out):
            lock.acquire()
    except Timeout:
        told = path.read_text().strip()
        who = f"process {told}" if told.isdigit() else "another process"
        raise UserError(str(out), f"{who} is at work in this folder", "Wait for it, or name another with --out.") from None
    try:
        path.write_text(str(os.getpid()))
        yield
    finally:
        path.unlink(missing_ok=True)
        lock.release()
        _remove_empty(made)


@contextmanager
def writable(out: Path) -> Iterator[None]:
    """Turns what the system and the libraries raise where a disk is full, read-only or closed into one line.

    Raises:
        UserError: names the file, or the folder where the error does not.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _DISK:
            raise
        where = Path(error.filename) if error.filename else out
        inside = out.resolve() in where.resolve().parents
        raise _refused(out if inside and error.errno in FULL else where, error.errno) from error
    except Exception as error:
        said = _SAID.search(str(error))
        if not said and (isinstance(error, UserError) or _free(out) >= _LEAST_BYTES):
            raise
        closed = said is not None and said.group().lower().startswith("read-only")
        raise _refused(out, errno.EROFS if closed else errno.ENOSPC) from error


def _refused(where: Path, number: int) -> UserError:
    if number in FULL:
        what = f"{_DISK[number]}: {_free(where) / 1e6:.2f} MB are free, and that is too little"
        return UserError(str(where), what, "Make room; the same command goes on from here.")
    return UserError(str(where), _DISK[number], "Name another folder with --out, or change the permissions.")


def _free(out: Path) -> int:
    """Bytes that still fit; some libraries do not say why they could not write."""
    folder = next((folder for folder in (out, *out.parents) if folder.is_dir()), Path())
    return shutil.disk_usage(folder).free


@contextmanager
def _usable(out: Path) -> Iterator[None]:
    """Whatever the system has against a path as a folder to work in, in one line."""
    try:
        yield
    except TimeoutError:  # of a lock that another process holds
        raise
    except OSError as error:
        what = f"cannot be a run folder: {(error.strerror or str(error)).lower()}"
        raise UserError(str(out), what, "Name another folder with --out, or change its permissions.") from None


def _remove_empty(folders: list[Path]) -> None:
    """Removes folders that hold nothing, from the innermost."""
    for folder in folders:
        try:
            folder.rmdir()
        except OSError:
            return
