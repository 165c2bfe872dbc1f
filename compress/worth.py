"""What each pass brought and what it cost: the files after it against the files before it, in the same runtimes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from compress.figures import agreement, decibels, figure
from compress.judgement import Judge
from compress.promise import Promise
from compress.report import Figure, Latency, Row, Worth

if TYPE_CHECKING:
    from export.contract import Artifact, Exporter
    from export.validate import Evaluated

__all__ = ["Standing", "brings", "costs", "measured", "paid", "says"]

_LEAST = 0.01
"""Least gain that counts: one per cent of a file's size or of a runtime's time."""
_RUNS = 10
"""Fewest timed runs that can show a gain: of fewer, by chance alone, all may favour one file."""
_ROUNDING_DB = 60.0
"""Outputs nearer to float than this differ by rounding."""
_POINTS = ("accuracy", "top5", "f1")


class Standing:
    """The files that the next pass is compared with (the float files before the first), and what they give on the evaluation
    rows; they are run when that is first asked for."""

    def __init__(self, artifacts: Mapping[str, Artifact], given: Mapping[str, Mapping[str, Evaluated]] | None = None) -> None:
        """``artifacts`` by format; ``given``: by format and runtime label, as far as it is known."""
        self.artifacts = dict(artifacts)
        self._given = dict(given or {})

    def given(self, judge: Judge, exporter: Exporter) -> Mapping[str, Evaluated]:
        """What the file of this format gives in each runtime that runs it, by label."""
        if exporter.format not in self._given:
            self._given[exporter.format] = judge.gives(exporter, self.artifacts[exporter.format])
        return self._given[exporter.format]


def measured(
    judge: Judge, exporters: Iterable[Exporter], before: Standing, artifacts: Mapping[str, Artifact], promise: Promise
) -> tuple[list[Row], list[Worth], Standing]:
    """Judges the files after a pass, as at the end of a run, and compares each with the file before the pass.

    Args:
        judge: with the outputs of the torch model after the pass.
        artifacts: the files after the pass, by format.

    Returns:
        Rows and worth, one for each runtime label, and the new files as the standing of a next pass.
    """
    rows: list[Row] = []
    worth: list[Worth] = []
    given: dict[str, Mapping[str, Evaluated]] = {}
    for exporter in exporters:
        old, new = before.artifacts[exporter.format], artifacts[exporter.format]
        known, kept = before.given(judge, exporter), dict[str, "Evaluated"]()
        judged = judge.file(exporter, new, promise, known, kept)
        for row in judged:
            if old is judge.floats.get(exporter.format):
                times = row.latency  # it was timed against this very file
            else:
                times = judge.against(row.label, exporter, new, old) if row.label in known and row.latency else []
            worth.append(_worth(judge, row, known.get(row.label), kept.get(row.label), old.size_bytes, times))
        rows += judged
        given[exporter.format] = kept
    return rows, worth, Standing(artifacts, given)


def _worth(
    judge: Judge, row: Row, before: Evaluated | None, after: Evaluated | None, size: int, times: Sequence[Latency]
) -> Worth:
    compared = after.fidelity.get("before") if before is not None and after is not None else None
    drop = None
    if judge.metric is not None and before is not None and after is not None:
        assert before.statistics is not None
        assert after.statistics is not None
        drop = figure(f"{judge.metric_name} lost", judge.metric.drop(before.statistics, after.statistics))
    slowest = max((time for time in times if time.ratio is not None), key=lambda time: time.ratio or 0.0, default=None)
    return Worth(
        label=row.label,
        compared=compared is not None,
        drop=drop,
        agreement=agreement(compared),
        sqnr_db=decibels(compared),
        sqnr_before_db=decibels(before.fidelity.get("float")) if before is not None else None,
        sqnr_after_db=decibels(after.fidelity.get("float")) if after is not None else None,
        size_bytes=row.size_bytes,
        size_ratio=row.size_bytes / size if row.size_bytes is not None and size else None,
        latency_ratio=slowest.ratio if slowest else None,
        latency_runs=slowest.runs if slowest else None,
        latency_low=slowest.ratio_low if slowest else None,
        latency_high=slowest.ratio_high if slowest else None,
    )


def paid(worth: Sequence[Worth]) -> bool | None:
    """Whether a pass was worth it: it brings something, or it costs nothing.

    - It *brings size* when some file shrinks by at least 1 %.
    - It *brings speed* when in some runtime the 95 % interval of the ratio of times lies wholly below 1 and the ratio is at
      most 0.99, at the batch size that gained least, from at least ten timed runs: noise alone does not pay.
    - It *costs* when in some runtime the metric is lower than before on the same rows (the paired estimate itself, not its
      interval: a loss need not be proved to count), or when the metric stays and the outputs are further from float, by at
      least 1 dB and to less than 60 dB. Without a metric: when a prediction or an output differs at all.

    None where no runtime could run a file both before and after, and no file shrank: then there is nothing to judge by.
    """
    if brings(worth):
        return True
    if not any(one.compared for one in worth):
        return None
    return not costs(worth)


def brings(worth: Sequence[Worth]) -> list[str]:
    """Out of ``size`` and ``speed``, what a pass brings (see ``paid``)."""
    found = []
    if any(one.size_ratio is not None and one.size_ratio <= 1 - _LEAST for one in worth):
        found.append("size")
    if any(_faster(one) for one in worth):
        found.append("speed")
    return found


def costs(worth: Sequence[Worth]) -> bool:
    """Whether a pass costs something in some runtime (see ``paid``)."""
    return any(_loses(one) for one in worth)


def says(worth: Sequence[Worth], verdict: bool | None, undone: bool) -> str:
    """The sentence for a person: the figures of each runtime, and what follows from them."""
    figures = "; ".join(f"{one.label}: {', '.join(_figures(one))}" for one in worth)
    return f"{figures}. {_conclusion(worth, verdict, undone)}"


def _conclusion(worth: Sequence[Worth], verdict: bool | None, undone: bool) -> str:
    if verdict is None:
        return "It cannot be judged: no runtime here ran the files."
    if verdict and brings(worth):
        return f"It brings {' and '.join(brings(worth))}{'' if costs(worth) else ' and costs nothing'}."
    if verdict:
        return "It brings neither size nor speed, and costs nothing."
    return f"It {_cost(worth)} and brings neither size nor speed: {'taken back' if undone else 'it does not pay'}."


def _cost(worth: Sequence[Worth]) -> str:
    worse = next((one.drop.name.removesuffix(" lost") for one in worth if one.drop is not None and one.drop.value > 0), None)
    if worse:
        return f"makes {worse} worse"
    return "moves outputs away from float" if any(one.drop is not None for one in worth) else "changes outputs"


def _faster(one: Worth) -> bool:
    if one.latency_ratio is None or one.latency_high is None or (one.latency_runs or 0) < _RUNS:
        return False
    return one.latency_high < 1 and one.latency_ratio <= 1 - _LEAST


def _loses(one: Worth) -> bool:
    if one.drop is not None:
        return one.drop.value > 0 or (one.drop.value == 0 and _further(one))
    return one.sqnr_db is not None or (one.agreement is not None and one.agreement.value < 1)


def _further(one: Worth) -> bool:
    """Whether the outputs moved away from the float model's, beyond rounding."""
    before = one.sqnr_before_db if one.sqnr_before_db is not None else math.inf
    return one.sqnr_after_db is not None and one.sqnr_after_db < _ROUNDING_DB and one.sqnr_after_db <= before - 1


def _figures(one: Worth) -> list[str]:
    said = []
    if one.size_ratio is not None:
        said.append("the same size" if abs(one.size_ratio - 1) < 0.005 else f"{one.size_ratio:.2f}x the size")
    if one.latency_ratio is not None:
        said.append(_time(one))
    if one.drop is not None:
        said.append(_lost(one.drop) + (f" at {one.sqnr_after_db:.1f} dB" if _further(one) else ""))
        return said
    if one.agreement is not None:
        said.append(f"{one.agreement.value:.1%} of the predictions kept")
    if one.compared:
        said.append("outputs equal" if one.sqnr_db is None else f"{one.sqnr_db:.1f} dB")
    else:
        said.append("not run")
    return said


def _time(one: Worth) -> str:
    said = f"{one.latency_ratio:.2f}x the time"
    if (one.latency_runs or 0) < _RUNS:
        return f"{said} (too few runs to tell)"
    noise = one.latency_low is not None and one.latency_high is not None and one.latency_low <= 1 <= one.latency_high
    return said + (" (within noise)" if noise else "")


def _lost(drop: Figure) -> str:
    name = drop.name.removesuffix(" lost")
    if drop.value == 0:
        return f"{name} kept"
    way, size = ("lost" if drop.value > 0 else "gained"), abs(drop.value)
    noise = " (within noise)" if drop.low is not None and drop.high is not None and drop.low <= 0 <= drop.high else ""
    if name in _POINTS:
        return f"{_short(100 * size)} points of {name} {way}{noise}"
    if name == "perplexity":
        return f"perplexity {_short(100 * size)} % {'higher' if drop.value > 0 else 'lower'}{noise}"
    return f"{_short(size)} of {name} {way}{noise}"


def _short(number: float) -> str:
    return f"{number:.1f}" if number >= 0.95 else f"{number:.1g}"
