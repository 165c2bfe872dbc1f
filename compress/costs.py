"""What a run will take: memory in each of its parts, and room in its folder, each as a sum of few named terms.

The terms that hang on the machine and the model are measured: this process, which has loaded the same libraries and the same
model and has traced it; one calibration batch. What the runtimes add was measured once (resident size, Linux, x86-64) on files
of 0.1 to 91 MB and is stated with each constant. Memory that a library gives back to its allocator but not to the system stays
in the sums that follow, as it does in a run.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict, Field

from compress.facts import Facts
from export.contract import Exporter, Forecast

__all__ = ["Disk", "Memory", "Moment", "Term", "disk", "memory"]

_MB = 1_000_000
_LIBRARIES = {"coremltools": 47 * _MB, "onnxruntime": 18 * _MB, "openvino": 66 * _MB}
"""Resident size that importing each adds after torch and onnx; of OpenVINO with its plugin and generated kernels."""
_SESSION = (5 * _MB, 2.0, 1.4)
"""ONNX Runtime: a session, and how many times the file's bytes for codes and for floats: weights and their packed form."""
_OPENVINO_READ = (1.0, 1.3)
_OPENVINO_SHAPE = (7 * _MB, 1.0, 0.55)
"""OpenVINO: the file as it is read; and for each shape of the inputs a compiled model with weights of its own (codes, floats)."""
_KEPT = 0.2
"""Share of a runtime's memory, libraries left out, that is resident after it was closed (0.15 to 0.5 seen, less of more)."""
_PAGE = 5 * _MB
"""Report, page (its plots need 4.8 MB of script), cards and programs."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Term(_Record):
    """One summand."""

    name: str
    bytes: int


class Moment(_Record):
    """A part of the run and the memory it is expected to need, with what that is made of."""

    part: str
    bytes: int
    terms: list[Term]


class Memory(_Record):
    """The expected peak of memory, comparable with ``peak_memory_bytes`` of a report, and where in the run it is."""

    peak_bytes: int = Field(description="largest resident size, with the process that builds TensorRT engines")
    part: str = Field(description="the part of the run that needs most")
    parts: list[Moment]


class Disk(_Record):
    """The expected room in the run folder."""

    bytes: int = Field(description="of the finished run folder")
    running_bytes: int = Field(description="beside it, while the run goes on")
    terms: list[Term]
    running: list[Term]
    unknown: list[str] = Field(description="what is not in the sums, and why")


def memory(facts: Facts) -> Memory:
    """The memory of each part of a run, in its order."""
    here = [Term(name="interpreter, libraries, float model, trace", bytes=facts.resident)]
    parts = [
        _moment("load and trace", [Term(name="as measured in this process", bytes=facts.peak)]),
        _moment(
            "passes",
            [
                *here,
                Term(name="compressed model", bytes=facts.compressed),
                Term(name="activations of a batch and their statistics", bytes=2 * facts.activations),
                Term(name="rounding of the largest weight", bytes=facts.largest),
            ],
        ),
    ]
    if facts.evaluates:
        for exporter, _, baseline in facts.files:
            if baseline is not None:
                parts.append(_moment(f"{exporter.format}: float file", [*here, *_writing(exporter, baseline, here)]))
    for exporter, forecast, baseline in facts.files:
        parts.append(_moment(f"{exporter.format}: write", [*here, *_writing(exporter, forecast, here)]))
        if baseline is None:
            continue
        for part, library, terms in _judging(exporter, forecast, baseline, facts):
            if library:
                _imported(library, here)
            parts.append(_moment(f"{exporter.format}: {part}", [*here, *terms]))
            kept = int(_KEPT * sum(term.bytes for term in terms))
            here.append(Term(name=f"kept after {part}", bytes=kept))
    peak = max(parts, key=lambda moment: moment.bytes)
    return Memory(peak_bytes=peak.bytes, part=peak.part, parts=parts)


def _moment(part: str, terms: Sequence[Term]) -> Moment:
    return Moment(part=part, bytes=sum(term.bytes for term in terms), terms=list(terms))


def _writing(exporter: Exporter, forecast: Forecast, here: list[Term]) -> list[Term]:
    """What writing a file adds; a library that is imported for it stays."""
    if exporter.format == "coreml":
        _imported("coremltools", here)
    return [Term(name=f"writing {exporter.format}", bytes=forecast.peak_bytes)]


def _imported(library: str, here: list[Term]) -> None:
    name = f"{library}, imported"
    if library not in sys.modules and all(term.name != name for term in here):
        here.append(Term(name=name, bytes=_LIBRARIES[library]))


def _judging(exporter: Exporter, forecast: Forecast, baseline: Forecast, facts: Facts) -> list[tuple[str, str, list[Term]]]:
    """The runtimes that run a file on this machine, the library of each, and what it adds."""
    size, base = forecast.size_bytes, baseline.size_bytes
    if exporter.format == "coreml":
        dense = Term(name="dense weights of the interpreter", bytes=int(1.2 * facts.floats))
        return [("interpreter", "", [dense, Term(name="activations", bytes=2 * facts.activations)])]
    if exporter.format == "tensorrt":
        size, base = min(size, facts.compressed), min(base, facts.floats // 2)
    fixed, codes, floats = _SESSION
    sessions = [
        Term(name="ONNX Runtime: the file", bytes=fixed + int(codes * size)),
        Term(name="ONNX Runtime: the float file", bytes=fixed + int(floats * base)),
        Term(name="ONNX Runtime: activations", bytes=2 * facts.activations),
    ]
    found = [("ONNX Runtime", "onnxruntime", sessions)]
    if getattr(exporter, "wants_openvino", False):
        many, few = facts.sizes
        fixed, codes, floats = _OPENVINO_SHAPE
        compiled = [
            Term(name="OpenVINO: both files, read", bytes=int(_OPENVINO_READ[0] * size + _OPENVINO_READ[1] * base)),
            Term(name=f"OpenVINO: the file, compiled for {many} shapes", bytes=many * (fixed + int(codes * size))),
            Term(name=f"OpenVINO: the float file, for {few} shapes", bytes=few * (fixed + int(floats * base))),
        ]
        found.append(("OpenVINO", "openvino", compiled))
    return found


def disk(facts: Facts) -> Disk:
    """Room in the run folder, finished and while the run goes on."""
    terms = [Term(name="model.safetensors", bytes=facts.compressed), Term(name="configuration, tokenizer", bytes=facts.source)]
    for exporter, forecast, baseline in facts.files:
        terms.append(Term(name=exporter.filename, bytes=forecast.size_bytes + forecast.beside_bytes))
        if baseline is not None:
            terms.append(Term(name=f"baseline/{exporter.filename}", bytes=baseline.size_bytes + baseline.beside_bytes))
    if facts.evaluates:
        terms.append(Term(name="kept.safetensors", bytes=facts.kept))
    terms.append(Term(name="report, page, cards", bytes=_PAGE))
    running = [Term(name="outputs of the float model's blocks", bytes=facts.blocks)]
    if len(facts.checkpoints) > 1:
        pairs = [sum(facts.checkpoints[number - 1 : number + 1]) for number in range(1, len(facts.checkpoints))]
        running.append(Term(name="models between passes", bytes=max(pairs) - facts.checkpoints[-1]))
    if facts.outputs:
        running.append(Term(name="outputs on the evaluation rows", bytes=facts.outputs))
    if facts.each_pass:
        files = sum(forecast.size_bytes + forecast.beside_bytes for _, forecast, _ in facts.files)
        running.append(Term(name="files after each pass but the last", bytes=files * (len(facts.checkpoints) - 1)))
    unknown = []
    if facts.evaluates and facts.outputs is None:
        unknown.append("outputs on the evaluation rows: their number is not known without reading them")
    return Disk(
        bytes=sum(term.bytes for term in terms),
        running_bytes=sum(term.bytes for term in running),
        terms=terms,
        running=running,
        unknown=unknown,
    )
