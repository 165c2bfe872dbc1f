"""The sentences of a model card: how a file was run, what a reader must not conclude, how to run it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from compress.cards import wording

if TYPE_CHECKING:
    from compress.cards.card import Card
    from compress.cards.program import Program
    from compress.report import Row

__all__ = ["how", "limits", "making_of_rows", "no_time", "running"]


def limits(card: Card) -> Iterator[str]:
    """What a reader must not conclude."""
    row, report = card.first, card.report
    yield from (f"Warning of the run: {warning}" for warning in report.warnings)
    unlike = [found for found in card.of if found.validated in ("interpreter", "proxy", "none")]
    if unlike:
        yield f"The file was never run in {card.kind} itself; what it rounds differently there is not seen, nor is its time."
    in_float = row.details.get("run_in_float") or []
    if in_float:
        yield f"Quantized, but computed in floating point by the runtime: {wording.listed(in_float)}."
    if row.audit is not None and row.audit.float_layers:
        yield f"Matrix weights stored in floating point: {wording.listed(row.audit.float_layers)}."
    elif row.audit is not None:
        yield "No matrix weight of the file is stored in floating point."
    calibration = report.data["calibration"]
    yield (
        f"Passes saw {calibration['rows']} calibration rows of {calibration['path']}; inputs unlike those can lie outside the "
        "ranges that were set from them."
    )
    if report.data.get("rows_in_both_by_content"):
        yield f"{report.data['rows_in_both_by_content']} evaluation rows have the same content as a calibration row."
    if validation := report.data.get("validation"):
        yield (
            f"Passes may have chosen by the labels of {validation['rows']} validation rows of {validation['path']}: figures on "
            "those rows would flatter the file, and none is told here."
        )
    if count := report.data.get("rows_in_validation_and_evaluation_by_content"):
        yield f"{count} evaluation rows have the same content as a validation row."
    sizes = [f"`{port.name}` {port.written}" for port in card.program.inputs]
    yield f"Inputs have the shapes {'; '.join(sizes)}; others are refused."
    yield "Not measured: figures by group of people or kind of input, robustness, energy, memory, times on other processors."
    yield "Bias and other faults of the float model are kept as they are; they were not assessed."
    yield from (f"Of the writer: {note}" for note in [*row.details.get("notes", []), *row.details.get("warnings", [])])


def running(card: Card) -> str:
    program = card.program
    rows = {"text": "FILE.txt", "running text": "FILE.txt", "images": "IMAGE.png", "arrays": "ROWS.npz"}[program.reads]
    kept = "Without an argument it runs on rows that the run kept (`../kept.safetensors`). " if program.kept else ""
    packages = f" {program.needs}" if program.needs else ""
    if card.exporter.format == "onnx":
        unrun = "It was written with the file, and not run when the file was made: the figures above are of another program."
        return f"```bash\npip install onnxruntime numpy safetensors{packages}\npython run.py {rows}\n```\n\n{kept}{unrun}"
    if card.exporter.format == "coreml":
        return (
            "On macOS, with Xcode's command line tools:\n\n"
            f"```bash\nswiftc -O Run.swift -o run\n{'./run' if program.kept else './run rows.safetensors'}\n```\n\n"
            f"{kept}Rows of your own are made by `python prepare.py {rows} --save rows.safetensors` "
            f"(`pip install numpy safetensors{packages}`), then `./run rows.safetensors`.\n"
            "`Run.swift` was neither compiled nor run: there was no Mac."
        )
    package = "tensorrt-rtx" if program.library == "tensorrt_rtx" else "tensorrt"
    gpu = "" if card.first.validated == "runtime" else "\nNeither was run with this engine: there was no GPU that runs it."
    return (
        f"On a machine with an NVIDIA GPU that the engine was built for:\n\n```bash\npip install {package} cuda-python numpy "
        f"safetensors{packages}\npython run.py {rows}\n```\n\n{kept}`run.cpp` does the same in C++ (its first lines say how to "
        f"build it), on rows that `python run.py {rows} --save rows.safetensors` made.{gpu}"
    )


def how(row: Row, kind: str) -> str:
    """How a file was run, in plain words."""
    if row.validated == "runtime":
        return f"In its own runtime: {row.runtime} ran this very file on all evaluation rows."
    if row.validated == "interpreter":
        return (
            f"By an interpreter, not by {kind}: the saved program was read back and run operator by operator ({row.runtime}). "
            "That shows whether the file is right, and nothing about its speed."
        )
    if row.validated == "proxy":
        return (
            f"By a proxy, not by {kind}: the exact graph that the engine was built from (`{row.details.get('qdq_file', '')}`) "
            f"ran in {row.runtime}. The engine itself was built and not run."
        )
    return f"Not run: {row.note or row.runtime or 'no reason is recorded'}."


def no_time(row: Row) -> str:
    reasons = {
        "interpreter": "an interpreter's time says nothing about a device",
        "proxy": "the time of a proxy says nothing about a GPU",
    }
    return reasons.get(row.validated, row.note or "no batch size of the recipe fits the file")


def making_of_rows(program: Program) -> str:
    """How a text, an image or an array becomes a row of the inputs."""
    settings = program.settings
    if program.reads == "images":
        formula = f"`(byte * {settings['scale']} - mean) / std` with mean {settings['mean']} and std {settings['std']}"
        return f"{_fitting(settings)}; pixels become {formula} (from: {settings['from']})."
    if program.reads == "running text":
        return f"A row is {program.tokens} tokens of running text, without special tokens (tokenizer: `../source`)."
    if program.reads == "text":
        two = ", of two texts in one input" if program.joint else ", two rows for a pair" if program.pairs else ""
        return f"A text is padded or cut to {program.tokens} tokens{two} (tokenizer: `../source`)."
    plain = {name: said for name, said in settings.items() if name in {port.name for port in program.inputs}}
    return " ".join(f"`{name}`: {said}." for name, said in plain.items())


def _fitting(settings: dict[str, Any]) -> str:
    height, width = settings["size"]
    resize, filled = settings["resize"], f"{height} x {width}"
    if list(resize if isinstance(resize, list | tuple) else []) == [height, width]:
        return f"An image is resized to {filled} pixels ({settings['interpolation']})"
    sizes = " x ".join(map(str, resize or [])) if not isinstance(resize, int) else ""
    first = f"an image is resized to {sizes}" if sizes else f"the shorter edge of an image becomes {resize}"
    then = f"{filled} is cut out of the middle" if settings["crop"] else f"it is resized to {filled}"
    return f"Pixels (height x width, {settings['interpolation']}): {first}, then {then}"
