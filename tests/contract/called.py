"""Calls the command line inside this process and gathers what it says; for programs that prepare a process for it."""

from __future__ import annotations

import contextlib
import io
import sys
import traceback

__all__ = ["called"]


def called(*arguments: str) -> tuple[int, str, str]:
    """Exit code, -1 for a traceback; what was printed; what was told on the error output."""
    from compress import cli

    out, err = io.StringIO(), io.StringIO()
    sys.argv = ["compress", *arguments]
    code = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.main()
        except SystemExit as left:
            code = int(left.code or 0)
        except BaseException:
            traceback.print_exc()
            code = -1
    return code, out.getvalue(), err.getvalue()
