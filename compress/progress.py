"""How far a run is: silent by default, lines in a log, a live view on a terminal."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["LineProgress", "LiveProgress", "Pace", "Progress", "duration"]

Clock = Callable[[], float]

_QUIET_S = 2.0
"""A step that takes less is told when it is done and not before."""
_EVERY_S = 4.0
"""Between two lines of one step."""
_BEAT_S = 0.5
_BAR, _WIDE = 20, 100
"""Columns of the bar, and of the narrowest terminal that has one."""


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
        """How far the current step is: ``done`` of ``total`` (0: nobody knows), and at what."""

    def note(self, line: str) -> None:
        """Something to know that is no step, in one line."""


def duration(seconds: float) -> str:
    """``8 s``, ``2 min 5 s``, ``1 h 4 min``."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if minutes else f"{hours} h"


@dataclass
class Pace:
    """One step: when it began, how far it is, and by its pace so far what remains.

    A step may count several things one after the other (rows, then timed rounds): when the total changes, or the count falls,
    the pace is taken anew from there.
    """

    name: str
    started: float
    done: int = 0
    total: int = 0
    what: str = ""
    _since: float = field(init=False)
    _first: tuple[float, int] | None = None
    _latest: float = field(init=False)

    def __post_init__(self) -> None:
        self._since = self._latest = self.started

    def told(self, now: float, done: int, total: int, what: str) -> None:
        """Takes in what a run said at ``now`` (seconds of the same clock as ``started``)."""
        if total != self.total or done < self.done:
            self._since, self._first = self._latest, None
        if self._first is None:
            self._first = (now, done)
        self.done, self.total, self.what, self._latest = done, total, what, now

    def left(self, now: float) -> float | None:
        """Seconds until ``total`` at the pace so far, less the time since it was last told; None where nothing is known."""
        if self._first is None or not 0 < self.done < self.total:
            return None
        since, before = self._first if self.done > self._first[1] else (self._since, 0)
        each = (self._latest - since) / (self.done - before)
        return max(0.0, each * (self.total - self.done) - (now - self._latest))

    def says(self, now: float) -> str:
        """``320 of 872, 37 %, about 9 s left``; empty where nothing is counted."""
        if self.total <= 0 or not 0 <= self.done <= self.total:
            return ""
        left = self.left(now)
        rest = f", about {duration(left)} left" if left is not None and left >= 0.5 else ""
        return f"{self.done} of {self.total}, {100 * self.done // self.total} %{rest}"


class LineProgress(Progress):
    """Lines for a log: one for each finished step with its seconds; while a step takes longer than two seconds, one every few
    seconds that says how far it is and about how long it will still take.

    A thread looks at the clock while the run is inside ``with``, for steps that cannot count (the build of an engine); it ends
    with the block. With ``beat_s=None`` there is none, and ``tick`` does what it does.
    """

    def __init__(
        self, write: Callable[[str], None], clock: Clock = time.monotonic, beat_s: float | None = _BEAT_S, name: str = "start"
    ) -> None:
        self._write, self._clock, self._beat_s = write, clock, beat_s
        self._steps: list[Pace] = []
        self._outside = Pace(name, clock())
        self._spoke = clock()
        self._lock = threading.RLock()  # a signal may arrive while it is held
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Progress:
        self._spoke = self._outside.started = self._clock()
        if self._beat_s is not None:
            self._thread = threading.Thread(target=self._watch, name="progress", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        pace = Pace(name, self._clock())
        with self._lock:
            self._steps.append(pace)
        finished = False
        try:
            yield
            finished = True
        finally:
            with self._lock:
                self._steps.remove(pace)
                seconds = f"{self._clock() - pace.started:.1f} s"
                self._say(f"{name}: {seconds}" if finished else f"{name}: stopped after {seconds}")
                self._outside = Pace("next step", self._clock())

    def update(self, done: int, total: int, what: str = "") -> None:
        with self._lock:
            if self._steps:
                self._steps[-1].told(self._clock(), done, total, what)
        self.tick()

    def tick(self) -> None:
        """Writes a line where one is due."""
        with self._lock:
            now = self._clock()
            pace = self._steps[-1] if self._steps else self._outside
            if now - pace.started < _QUIET_S or (self._spoke > pace.started and now - self._spoke < _EVERY_S):
                return
            far = " ".join(filter(None, (pace.what, pace.says(now))))
            so_far = f"{duration(now - pace.started)} so far"
            self._say(f"{pace.name}: {far}, {so_far}" if far else f"{pace.name}: {so_far}")

    def note(self, line: str) -> None:
        with self._lock:
            self._say(line)

    def _say(self, line: str) -> None:
        self._spoke = self._clock()
        self._write(line)

    def _watch(self) -> None:
        while not self._ended.wait(self._beat_s):
            try:
                self.tick()
            except (OSError, ValueError):  # nobody reads the log any more; the run itself will meet that, or need not
                return


class LiveProgress(Progress):
    """A live view on a terminal: finished steps, the time of the whole run, and the current step with a bar, its time so far
    and what remains."""

    def __init__(self, console: Console, clock: Clock = time.monotonic) -> None:
        from rich.progress import BarColumn, ProgressColumn, SpinnerColumn, Task
        from rich.progress import Progress as Bars
        from rich.text import Text

        class Line(ProgressColumn):
            def render(_, task: Task) -> Text:
                return Text(self._line(task.fields["pace"], self._room))

        plain = not console.encoding.lower().startswith("utf")
        bar = [BarColumn(bar_width=_BAR)] if console.width >= _WIDE else []
        self._room = console.width - 2 - (_BAR + 1 if bar else 0)
        self._bars = Bars(SpinnerColumn("line" if plain else "dots"), *bar, Line(), console=console)
        self._done = "+" if plain else "[green]✓[/]"
        self._clock = clock
        self._steps: list[tuple[Any, Pace]] = []
        self._whole = Pace("whole run", clock())
        self._finished = 0

    def __enter__(self) -> Progress:
        self._whole.started = self._clock()
        self._bars.add_task("", total=1, pace=self._whole)
        self._bars.start()
        return self

    def __exit__(self, *error: object) -> None:
        for task in self._bars.task_ids:
            self._bars.remove_task(task)
        self._bars.stop()

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        from rich.markup import escape

        pace = Pace(name, self._clock())
        entry = (self._bars.add_task("", total=None, pace=pace), pace)
        self._steps.append(entry)
        mark = "[red]stopped[/]"
        try:
            yield
            mark = self._done
        finally:
            self._steps.remove(entry)
            self._bars.remove_task(entry[0])
            self._finished += 1
            self._whole.what = f"steps done: {self._finished}"
            seconds = f"{self._clock() - pace.started:.1f} s"
            self._bars.console.print(f"{mark} {escape(name)}  [dim]{seconds}[/]", highlight=False)

    def update(self, done: int, total: int, what: str = "") -> None:
        if self._steps:
            task, pace = self._steps[-1]
            pace.told(self._clock(), done, total, what)
            self._bars.update(task, completed=done, total=total or None)

    def note(self, line: str) -> None:
        from rich.text import Text

        self._bars.console.print(Text(line, style="dim"))

    def _line(self, pace: Pace, room: int) -> str:
        """What is said of a step, in at most ``room`` characters: first goes what it is at, then the end of its name."""
        now = self._clock()
        far = ", ".join(filter(None, (duration(now - pace.started), pace.says(now))))
        whole = f"{pace.name}  {far}  {pace.what}".rstrip()
        if len(whole) <= room:
            return whole
        left = room - len(far) - 2
        name = pace.name if len(pace.name) <= left else pace.name[: max(1, left - 2)] + ".."
        return f"{name}  {far}"[:room]
