"""What a small program needs to know to run a file on new rows: inputs, preprocessing, and what the output means."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from compress.cards.interface import Interface, Port
    from compress.report import Report
    from compress.sources import Source

__all__ = ["Answer", "Program", "Reads", "labels_of", "plain_tokenizer"]

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
        tokenizer: how ``tokenizers`` alone does what the run did; None where transformers is needed, or there is no text.
        library: for TensorRT, the Python module: ``tensorrt`` or ``tensorrt_rtx``.
        kept: whether the run folder keeps rows.
    """

    model: str
    task: str
    interface: Interface
    answer: Answer
    reads: Reads
    settings: dict[str, Any] = field(default_factory=dict)
    tokens: int = 0
    labels: list[str] = field(default_factory=list)
    tokenizer: dict[str, Any] | None = None
    library: str = "tensorrt"
    kept: bool = False

    @classmethod
    def of(cls, report: Report, source: Source, interface: Interface, folder: Path, library: str) -> Program:
        """Reads it from the report, the model's source and the run folder."""
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
            tokenizer=plain_tokenizer(source, folder) if "text" in reads else None,
            library=library,
            kept=(folder / "kept.safetensors").is_file(),
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
        text = "tokenizers" if self.tokenizer else "transformers"
        return {"text": text, "running text": text, "images": "pillow"}.get(self.reads, "")


def plain_tokenizer(source: Source, folder: Path) -> dict[str, Any] | None:
    """What padding and cutting need, where ``tokenizer.json`` in the run folder holds all of the model's tokenizer.

    None where transformers changes what that file says, or there is no such file.
    """
    from tokenizers import Tokenizer

    file = folder / "source" / "tokenizer.json"
    raw = source.tokenizer.raw if source.tokenizer is not None else None
    backend = getattr(raw, "backend_tokenizer", None)
    if raw is None or backend is None or not file.is_file():
        return None
    stored, used = Tokenizer.from_file(str(file)), Tokenizer.from_str(backend.to_str())
    for tokenizer in (stored, used):
        tokenizer.no_padding()
        tokenizer.no_truncation()
    if stored.to_str() != used.to_str() or raw.pad_token is None:
        return None
    padding = {"pad_id": raw.pad_token_id, "pad_token": str(raw.pad_token)}
    padding |= {"direction": raw.padding_side} if raw.padding_side != "right" else {}
    padding |= {"pad_type_id": raw.pad_token_type_id} if raw.pad_token_type_id else {}
    cutting = {"direction": raw.truncation_side} if raw.truncation_side != "right" else {}
    return {"padding": padding, "cutting": cutting}


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
