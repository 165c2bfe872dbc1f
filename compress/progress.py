"""How far a run is: silent by default, one line a step in a log, a live view on a terminal."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["LineProgress", "LiveProgress", "Progress"]


class Progress:
    """Told by a run what it does; this one says nothing. Used as a context manager around the whole run."""

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        return

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """One step of the run, from entering to leaving."""
        yield

    def update(self, done: int, total: int, what: str = "") -> None:
        """How far the current step is: ``done`` of ``total``, and at what."""


class LineProgress(Progress):
    """One line for each finished step: its name and its seconds."""

    def __init__(self, write: Callable[[str], None]) -> None:
        self._write = write

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        except BaseException:
            self._write(f"{name}: stopped after {time.perf_counter() - started:.1f} s")
            raise
        self._write(f"{name}: {time.perf_counter() - started:.1f} s")


class LiveProgress(Progress):
    """A live list of steps on a terminal, with a bar for the current one."""

    def __init__(self, console: Console) -> None:
        from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Bars

        self._bars = Bars(
            SpinnerColumn(finished_text="[green]✓"),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TimeElapsedColumn(),
            TextColumn("{task.fields[what]}", style="dim", markup=False),
            console=console,
        )
        self._current: Any = None

    def __enter__(self) -> Progress:
        self._bars.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bars.stop()

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        from rich.markup import escape

        outer, self._current = self._current, self._bars.add_task(escape(name), total=None, what="")
        try:
            yield
        except BaseException:
            self._bars.update(self._current, description=f"[red]{escape(name)}", what="stopped")
            self._bars.stop_task(self._current)
            raise
        else:
            self._bars.update(self._current, total=1, completed=1, what="")
            self._bars.stop_task(self._current)
        finally:
            self._current = outer

    def update(self, done: int, total: int, what: str = "") -> None:
        if self._current is not None:
            self._bars.update(self._current, completed=done, total=total or None, what=what)
