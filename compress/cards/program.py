"""What a small program needs to know to run a file on new rows: inputs, preprocessing, and what the output means."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from compress.cards.interface import Interface, Port
    from compress.report import Report
    from compress.sources import Source

__all__ = ["Answer", "Program", "Reads", "labels_of"]

Answer = Literal["classes", "score", "embedding", "token", "features"]
"""What the output is: scores of classes, one score, an embedding, scores of the next token, or states."""

Reads = Literal["text", "running text", "images", "arrays"]
"""What rows are made from: one text (or pair) a line, one text of any length, image files, or an npz file."""


@dataclass(frozen=True)
class Program:
    """What is filled into the templates.

    Attributes:
        settings: the preprocessing of the run: ``ImageEncoder``'s settings, or those of the text.
        tokens: length that text is padded and cut to; 0 for other data.
        labels: names of the classes in order, or an empty list.
        library: for TensorRT, the Python module: ``tensorrt`` or ``tensorrt_rtx``.
    """

    model: str
    task: str
    interface: Interface
    answer: Answer
    reads: Reads
    settings: dict[str, Any] = field(default_factory=dict)
    tokens: int = 0
    labels: list[str] = field(default_factory=list)
    library: str = "tensorrt"
    kept: bool = False

    @classmethod
    def of(cls, report: Report, source: Source, interface: Interface, *, library: str, kept: bool) -> Program:
        """Reads it from the report and the model's source."""
        rows = report.data["calibration"]
        settings = dict(rows["preprocessing"])
        reads: Reads = "arrays"
        if "mean" in settings and "size" in settings:
            reads = "images"
        elif "tokenizer" in settings and source.tokenizer is not None:
            reads = "running text" if "windows" in rows else "text"
        return cls(
            model=source.name,
            task=source.task,
            interface=interface,
            answer=_answer(source),
            reads=reads,
            settings=settings,
            tokens=int(settings.get("tokens") or rows.get("windows", {}).get("tokens", 0)),
            labels=labels_of(source),
            library=library,
            kept=kept,
        )

    @property
    def inputs(self) -> tuple[Port, ...]:
        return self.interface.inputs

    @property
    def output(self) -> Port:
        return self.interface.output

    @property
    def least(self) -> int:
        """The fewest rows the file takes at once."""
        return self.interface.least

    @property
    def step(self) -> int:
        """Rows given to the file at once."""
        return self.interface.most or 16

    @property
    def pairs(self) -> bool:
        """Whether a row of data is two sentences whose embeddings are compared."""
        return self.settings.get("pairing") == "separate"

    @property
    def joint(self) -> bool:
        """Whether a row of data is two texts in one input."""
        return self.settings.get("pairing") == "joint"

    @property
    def masked(self) -> bool:
        """Whether the model takes an attention mask."""
        return any(port.name == "attention_mask" for port in self.inputs)

    @property
    def needs(self) -> str:
        """Python packages that make rows, beside numpy and safetensors."""
        return {"text": "transformers", "running text": "transformers", "images": "pillow"}.get(self.reads, "")


def labels_of(source: Source) -> list[str]:
    """The names of the classes in the order of the output, each on one line; empty where the model names none."""
    if not source.labels or source.classes in (None, 1):
        return []
    return [" ".join(str(source.labels.get(number, number)).split()) or str(number) for number in range(source.classes or 0)]


def _answer(source: Source) -> Answer:
    if source.task in ("image-classification", "text-classification"):
        return "score" if source.classes == 1 else "classes"
    answers: dict[str, Answer] = {"sentence-embedding": "embedding", "causal-lm": "token"}
    return answers.get(source.task, "features")
