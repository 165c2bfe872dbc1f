"""How far a run is: what lines and the live view say, by a clock that the tests turn; no test sleeps for it."""

from __future__ import annotations

import io
import itertools
import os
import pty
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from rich.console import Console

from compress import cli
from compress.progress import LineProgress, LiveProgress, Pace, Progress, duration


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Log(LineProgress):
    """Lines with the second at which each was written, from the entering of the block."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.lines: list[tuple[float, str]] = []
        super().__init__(lambda line: self.lines.append((self.clock.now - 1000.0, line)), clock=self.clock, beat_s=None)

    def wait(self, seconds: float) -> None:
        """As the thread of a run does: it looks every half second."""
        for _ in range(round(2 * seconds)):
            self.clock.now += 0.5
            self.tick()


def texts(log: Log) -> list[str]:
    return [line for _, line in log.lines]


def test_a_short_step_is_one_line_when_it_is_done() -> None:
    with Log() as log, log.step("load"):
        assert isinstance(log, Log)
        log.update(1, 2, "rows")
        log.wait(1.5)
        assert log.lines == []
    assert texts(log) == ["load: 1.5 s"]


def test_no_silence_is_longer_than_five_seconds_and_no_step_speaks_more_than_every_four() -> None:
    log = Log()
    with log:
        log.wait(7)
        with log.step("write"):
            log.wait(30)
        log.wait(3)
        with log.step("judge"):
            for done in range(0, 1000, 3):
                log.update(done, 1000, "rows")
                log.clock.now += 0.1
        end = log.clock.now - 1000.0
    times = [0.0, *(moment for moment, _ in log.lines), end]
    assert max(after - before for before, after in itertools.pairwise(times)) <= 5.0
    within = [moment for moment, line in log.lines if line.startswith("judge:")][:-1]
    assert len(within) > 3
    assert min(after - before for before, after in itertools.pairwise(within)) >= 4.0


def test_what_remains_is_right_for_a_steady_pace() -> None:
    with Log() as log:
        assert isinstance(log, Log)
        with log.step("onnx: judge"):
            for done in range(0, 100, 10):
                log.update(done, 100, "onnx: rows")
                log.clock.now += 1.0
    assert log.lines[0] == (2.0, "onnx: judge: onnx: rows 20 of 100, 20 %, about 8 s left, 2 s so far")
    assert log.lines[1] == (6.0, "onnx: judge: onnx: rows 60 of 100, 60 %, about 4 s left, 6 s so far")


def test_what_remains_is_taken_anew_when_something_else_is_counted() -> None:
    """A slow phase does not make the next one look slow."""
    pace = Pace("judge", 0.0)
    for second in range(11):
        pace.told(float(second), second * 10, 100, "rows")
    assert pace.left(10.0) is None, "it is done"
    pace.told(10.1, 1, 35, "rounds")
    pace.told(10.2, 2, 35, "rounds")
    assert pace.left(10.2) == pytest.approx(3.3)
    pace.told(10.3, 1, 35, "rounds at batch 8")
    assert pace.left(10.3) == pytest.approx(34 * 0.1)


def test_what_remains_shrinks_while_nothing_is_told_and_is_never_negative() -> None:
    pace = Pace("judge", 0.0)
    pace.told(0.0, 0, 10, "")
    assert pace.left(0.0) is None
    pace.told(1.0, 1, 10, "")
    assert [pace.left(now) for now in (1.0, 5.0, 20.0)] == [9.0, 5.0, 0.0]
    assert "left" not in pace.says(20.0)


@pytest.mark.parametrize(("done", "total"), [(0, 0), (5, 0), (7, 5), (-1, 5)])
def test_counts_that_mean_nothing_are_not_told(done: int, total: int) -> None:
    pace = Pace("judge", 0.0)
    pace.told(1.0, done, total, "rows")
    assert pace.says(2.0) == ""


def test_steps_inside_a_step_each_have_their_line() -> None:
    with Log() as log:
        assert isinstance(log, Log)
        with log.step("outer"):
            log.wait(1)
            with log.step("inner"):
                log.wait(2.5)
            log.wait(4)
    assert texts(log) == ["inner: 2 s so far", "inner: 2.5 s", "outer: 8 s so far", "outer: 7.5 s"]


def test_a_step_that_fails_says_where_it_stopped() -> None:
    log = Log()

    def interrupted() -> None:
        with log, log.step("write"):
            log.wait(1)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert texts(log) == ["write: stopped after 1.0 s"]


def test_notes_are_lines() -> None:
    with Log() as log:
        log.note("a warning")
    assert isinstance(log, Log)
    assert texts(log) == ["a warning"]


@pytest.mark.parametrize(
    ("seconds", "told"),
    [(0.2, "0 s"), (59.4, "59 s"), (59.6, "1 min"), (125, "2 min 5 s"), (3600, "1 h"), (3661, "1 h 1 min"), (-1, "0 s")],
)
def test_durations_are_short(seconds: float, told: str) -> None:
    assert duration(seconds) == told


def test_the_thread_speaks_for_a_step_that_cannot_and_ends_with_the_run() -> None:
    """An engine build counts nothing. The clock runs fast here, so that nothing has to be waited for."""
    spoken = threading.Event()
    lines: list[str] = []

    def write(line: str) -> None:
        lines.append(line)
        spoken.set()

    started = time.monotonic()
    with LineProgress(write, clock=lambda: 100 * (time.monotonic() - started), beat_s=0.005) as progress:
        with progress.step("tensorrt: write"):
            assert spoken.wait(10)
        assert "progress" in {thread.name for thread in threading.enumerate()}
    assert lines[0].startswith("tensorrt: write: ")
    assert lines[0].endswith(" so far")
    assert "progress" not in {thread.name for thread in threading.enumerate()}


def test_a_log_that_nobody_reads_ends_the_thread_and_not_the_run() -> None:
    def write(line: str) -> None:
        raise BrokenPipeError

    started = time.monotonic()
    with LineProgress(write, clock=lambda: 1000 * (time.monotonic() - started), beat_s=0.005) as progress:
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline and "progress" in {thread.name for thread in threading.enumerate()}:
            time.sleep(0.005)
        assert "progress" not in {thread.name for thread in threading.enumerate()}
    assert isinstance(progress, Progress)


def live(width: int, encoding: str = "utf-8") -> tuple[LiveProgress, Clock, Console]:
    clock = Clock()
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="strict")
    console = Console(file=file, record=True, width=width, force_terminal=True)
    return LiveProgress(console, clock=clock), clock, console


def shown(progress: LiveProgress, console: Console) -> list[str]:
    """The lines of the live view as they are now."""
    other = Console(file=io.StringIO(), record=True, width=console.width, force_terminal=True)
    other.print(progress._bars.get_renderable())
    return [line.rstrip() for line in other.export_text().splitlines() if line.strip()]


@pytest.mark.parametrize("width", [24, 50, 80, 120, 200])
def test_the_live_view_fits_and_keeps_its_figures(width: int) -> None:
    progress, clock, console = live(width)
    with progress:
        with progress.step("load"):
            clock.now += 3
        with progress.step("onnx: open, run, judge"):
            for done in (0, 16, 32, 48):
                progress.update(done, 872, "openvino: evaluation rows, and a long text [brackets]")
                clock.now += 2
            whole, current = shown(progress, console)
    assert all(len(line) <= width for line in (whole, current))
    assert "whole run" in whole
    if width >= 50:
        assert "8 s, 48 of 872, 5 %" in current
        assert "about 1 min" in current
        assert "11 s" in whole
    assert ("openvino" in current) == (width == 200)
    assert ("━" in current) == (width >= 100)
    assert "load  3.0 s" in console.export_text()


def test_the_live_view_is_gone_when_the_run_ends_and_the_steps_stay() -> None:
    progress, clock, console = live(100)

    def failing() -> None:
        with progress:
            with progress.step("load [x]"):
                clock.now += 1
            progress.note("taken over: [load]")
            with progress.step("write"):
                raise ValueError("x")

    with pytest.raises(ValueError, match="x"):
        failing()
    assert not progress._bars.task_ids
    text = console.export_text()
    assert "load [x]  1.0 s" in text
    assert "stopped write" in text
    assert "taken over: [load]" in text


def test_a_terminal_that_knows_ascii_only_gets_ascii() -> None:
    progress, clock, console = live(60, encoding="ascii")
    with progress:
        with progress.step("load"):
            clock.now += 1
        with progress.step("a step with a name that is much too long for it"):
            progress.update(1, 10, "rows")
            clock.now += 1
            shown(progress, console)
    assert console.export_text().isascii()


PROGRAM = """
import sys, time
from compress import cli
with cli._progress(False) as progress:
    with progress.step("first"):
        pass
    with progress.step("second"):
        print("ready", flush=True)
        time.sleep(60)
"""


def in_terminal(kind: str, **environment: str) -> bytes:
    """What a program under a pseudo-terminal writes until Ctrl-C ends it."""
    ours, theirs = pty.openpty()
    known = {**os.environ, "TERM": kind, "COLUMNS": "80", **environment}
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=known,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # tests that run in the background ignore it
    )
    os.close(theirs)
    output, interrupted = b"", False
    while True:
        try:
            output += os.read(ours, 65536)
        except OSError:  # the other end is closed
            break
        if b"ready" in output and not interrupted:
            interrupted = True
            process.send_signal(signal.SIGINT)
    process.wait(30)
    os.close(ours)
    assert interrupted
    return output


@pytest.mark.skipif(sys.platform == "win32", reason="pseudo-terminals are of Unix")
def test_ctrl_c_leaves_a_terminal_that_can_be_used() -> None:
    output = in_terminal("xterm")
    assert b"\x1b[?25l" in output, "the live view hides the cursor"
    assert output.rindex(b"\x1b[?25h") > output.rindex(b"\x1b[?25l"), "and shows it again"
    assert b"stopped" in output
    assert b"KeyboardInterrupt" in output.rpartition(b"\x1b[?25h")[2], "nothing is drawn after the end"


@pytest.mark.skipif(sys.platform == "win32", reason="pseudo-terminals are of Unix")
def test_a_dumb_terminal_gets_lines() -> None:
    output = in_terminal("dumb")
    assert b"\x1b" not in output
    assert b"first: 0." in output
    assert b"second: stopped after" in output


def test_a_log_gets_lines_even_where_colours_are_forced(tmp_path: Path) -> None:
    program = "from compress import cli\nwith cli._progress(False) as p, p.step('only'):\n    pass\n"
    known = {**os.environ, "FORCE_COLOR": "1", "TERM": "xterm"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, env=known, check=True)
    assert done.stderr.decode().startswith("only: 0.")
    assert b"\x1b" not in done.stderr


def test_no_color_means_no_color(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=100)
    with LiveProgress(console) as progress, progress.step("load"):
        progress.update(1, 2, "rows")
    assert "\x1b[3" not in file.getvalue()
    assert "load" in file.getvalue()


def test_quiet_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with cli._progress(True) as progress, progress.step("load"):
        progress.update(1, 2, "rows")
        progress.note("something")
    assert capsys.readouterr() == ("", "")
