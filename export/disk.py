"""Files that are whole or not there; and a full disk said as such, which libraries often report as a failure of their own."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

__all__ = ["FULL", "readable", "renamed", "space"]

FULL = (errno.ENOSPC, errno.EDQUOT)
"""System errors of a disk, or a share of one, that takes no more."""

_LEAST_BYTES = 64 * 1024


@contextmanager
def space(folder: Path) -> Iterator[None]:
    """Whatever fails inside while ``folder`` or the system's temporary folder is full is the disk's fault.

    What was half written has to be there still, so this goes inside what removes it.

    Raises:
        OSError: ``ENOSPC``, with the folder that is full.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) and error.errno in FULL:
            raise
        for place in (folder, Path(tempfile.gettempdir())):
            if shutil.disk_usage(place).free < _LEAST_BYTES:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(place)) from error
        raise


@contextmanager
def renamed(path: Path) -> Iterator[Path]:
    """A temporary name beside ``path`` to write to: it becomes ``path`` at the end, and is removed if anything fails."""
    unfinished = path.with_name(f".{path.name}.part")
    try:
        yield unfinished
        readable(unfinished)
        os.replace(unfinished, path)
    except BaseException:
        with suppress(OSError):
            unfinished.unlink()
        raise


def readable(path: Path) -> None:
    """Gives a file, or a folder and all in it, the permissions that new ones get here: some writers keep theirs to the user."""
    mask = os.umask(0)
    os.umask(mask)
    for one in (path, *path.rglob("*")) if path.is_dir() else (path,):
        if one.exists():
            one.chmod((0o777 if one.is_dir() else 0o666) & ~mask)
