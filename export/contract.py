"""What an exporter is: it writes a file, opens it again, and tells what integers the file holds."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from calibrate.errors import UserError
from calibrate.signature import Batch
from export.graph import Traceable

__all__ = ["Artifact", "Contents", "Exporter", "Forecast", "NotRun", "Runner", "Validation"]

Validation = Literal["runtime", "interpreter", "proxy", "none"]
"""How an artifact was run: in its own runtime; by our interpreter of the saved file; an equivalent file in another runtime
(``proxy``); not at all."""


@dataclass(frozen=True)
class Artifact:
    """A written file or package.

    ``details`` is JSON and goes into the report: what the writer wants to say (opset, dialect, fused kernels, warnings).
    """

    format: str
    path: Path
    size_bytes: int
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Contents:
    """What is in a file, read back from disk.

    ``bytes_by_dtype``: weight bytes in the file by element type ("float32", "float16", "int8", "int4", "uint2" ...).
    ``codes``: for each quantized layer (module path in the user's model) its signed codes, int8, in the weight's own shape.
    ``float_layers``: module paths (or file names of tensors) of matrix weights that are stored in floating point.
    """

    bytes_by_dtype: Mapping[str, int]
    codes: Mapping[str, np.ndarray[Any, Any]]
    float_layers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Forecast:
    """What a file will be, told without writing it.

    ``size_bytes``: of the file with its weights. ``peak_bytes``: most memory that writing it takes beyond the model itself.
    ``uncertain_bytes``: how far off the size may be, where it was not counted but estimated.
    ``beside_bytes``: of what is written next to it (the Q/DQ file of an engine).
    ``float_sites``: quantized layers (module paths) that the runtime computes in floating point all the same, with the reason.
    """

    size_bytes: int
    peak_bytes: int
    float_sites: Mapping[str, str] = field(default_factory=dict)
    beside_bytes: int = 0
    uncertain_bytes: int = 0


class Runner(ABC):
    """An opened artifact.

    Attributes:
        how: whether this is the runtime itself, an interpreter or a proxy; reports repeat it.
        runtime: name and version, e.g. ``onnxruntime 1.31.1 CPU``.
        rows: the only batch size the file takes, or None where the batch is free.
        measurable: whether its time means anything for the device (an interpreter's does not).
    """

    how: Validation = "runtime"
    runtime: str = ""
    rows: int | None = None
    measurable: bool = True

    @abstractmethod
    def __call__(self, batch: Batch) -> Tensor:
        """The output tensor (float32, on the CPU) for one batch of named inputs."""

    def close(self) -> None:
        """Frees the session, the process or the device memory; the runner is not used afterwards."""
        return


class NotRun(Runner):
    """A file that nothing here can run; ``runtime`` says why."""

    how = "none"
    measurable = False

    def __init__(self, path: Path, reason: str, rows: int | None = None) -> None:
        self.path, self.runtime, self.rows = path, reason, rows

    def __call__(self, batch: Batch) -> Tensor:
        raise UserError(str(self.path), f"cannot be run here: {self.runtime}")


class Exporter(BaseModel, ABC):
    """The options of one runtime, and three verbs. Fields are the recipe's options.

    ``write`` must leave nothing half written: it writes under a temporary name and renames.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: ClassVar[str]
    extra: ClassVar[str]
    """The extra that installs what the exporter needs."""
    filename: ClassVar[str]
    """Where the file lies in the run folder, e.g. ``onnx/model.onnx``."""

    @abstractmethod
    def missing(self) -> str | None:
        """Why this exporter cannot work here (the library that is absent), or None."""

    def installs(self) -> str:
        """The extra that installs what ``missing`` misses."""
        return self.extra

    def timed_here(self) -> bool:
        """Whether a written file can be run on this machine in its own runtime, so that its time means something."""
        return False

    @abstractmethod
    def refuses(self, model: nn.Module) -> list[tuple[str, str]]:
        """(module path, reason) for each carried value of the compressed model that the runtime cannot hold. Cheap."""

    def check(self, source: Traceable) -> None:
        """Compares the options with what the model takes, without tracing it.

        Raises:
            UserError: an option names what the model does not have.
        """
        return

    def forecast(self, source: Traceable) -> Forecast | None:
        """What ``write`` would make of this model, from its shapes alone; None where the exporter cannot tell."""
        return None

    @abstractmethod
    def write(self, source: Traceable, path: Path) -> Artifact:
        """Writes the model to ``path``; raises ``UserError`` for what the user can change."""

    @abstractmethod
    def open(self, path: Path, threads: int) -> Runner:
        """Opens a written file, in another process or on another machine if need be."""

    def also(self, path: Path, threads: int) -> Iterator[tuple[str, Runner]]:
        """Other runtimes that take the same file, by label (``openvino`` for an ONNX file); opened one after the other."""
        return iter(())

    def kept_float(self, path: Path) -> list[str]:
        """Quantized layers (module paths) that the runtime would run in floating point, as far as it can be told."""
        return []

    @abstractmethod
    def contents(self, path: Path) -> Contents:
        """Reads the file again and tells what it stores; never from memory of having written it."""
