"""A full disk, said as such: libraries that write files often report it as a failure of their own."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["FULL", "space"]

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
