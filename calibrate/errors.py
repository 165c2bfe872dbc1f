"""The one error class of the user's side: *where: what* and, on the next line, the way out."""

from __future__ import annotations

__all__ = ["LostInExport", "MissingRuntime", "UserError"]


class UserError(Exception):
    """A mistake of the user, or something the user can change; printed without traceback, exit code 2.

    Args:
        where: file:line:column, a module path, a file name or an option; empty when there is no place.
        what: what is wrong, in one line.
        hint: the way out, in one line; printed indented on the next line.
    """

    exit_code = 2

    def __init__(self, where: str, what: str, hint: str = "") -> None:
        self.where, self.what, self.hint = where, what, hint
        super().__init__(what)

    def __str__(self) -> str:
        line = f"{self.where}: {self.what}" if self.where else self.what
        return f"{line}\n  {self.hint}" if self.hint else line


class MissingRuntime(UserError):
    """A library or a device that the run needs is absent; the hint names the extra to install. Exit code 3."""

    exit_code = 3


class LostInExport(RuntimeError):
    """A file holds fewer integer codes than the model promised: a defect of the exporter, never of the user."""
