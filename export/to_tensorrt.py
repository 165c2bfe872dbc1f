"""Writes a TensorRT engine from an explicit Q/DQ graph: strongly typed, float16 around INT8 by default.

Two builders take the same graph. ``tensorrt`` builds for the NVIDIA GPU in the machine, and the engine is run and
judged. ``tensorrt-rtx`` builds ahead of time on a CPU, for the compute capabilities named; the engine cannot be run
there, so the exact Q/DQ file that the builder was given is kept next to it and is what gets judged (``proxy``).
"""

from __future__ import annotations

import importlib.util
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, PositiveInt, field_validator
from torch import Tensor, nn

from calibrate.errors import MissingRuntime, UserError
from calibrate.signature import TensorSpec
from export.contract import Artifact, Contents, Exporter, Forecast, NotRun, Runner
from export.engine_listing import builder_of
from export.graph import Traceable, cast_layers, is_float8, weight_only
from export.memory import resident_bytes
from export.tensorrt_contents import engine_contents, engine_report, qdq_path
from export.tensorrt_job import LIBRARIES, build_engine, product
from export.tensorrt_runners import EngineRunner, ProxyRunner, gpu_name

__all__ = ["TensorRTExporter"]

Range = tuple[PositiveInt, PositiveInt, PositiveInt]
ComputeCapability = Literal["7.5", "8.0", "8.6", "8.9", "12.0", "12.1"]
BuilderName = Literal["tensorrt", "tensorrt-rtx"]

_OPSET, _FLOAT8_SINCE = 21, 8.9


class TensorRTExporter(Exporter):
    """TensorRT engine (``tensorrt/model.engine``) and the Q/DQ file it was built from (``tensorrt/model.qdq.onnx``).

    INT8 and INT4 weights stay integers in the engine; static INT8 activations run on integer kernels. What TensorRT has
    not is refused: asymmetric codes, activation grids made at run time, group scales under quantized activations.
    """

    format: ClassVar[str] = "tensorrt"
    extra: ClassVar[str] = "tensorrt-rtx"
    filename: ClassVar[str] = "tensorrt/model.engine"

    precision: Literal["float16", "float32"] = Field(
        "float16", description="the floating point around the integers; after the pass cast the model's own types hold"
    )
    dynamic: tuple[str, ...] = Field(("batch",), description="dimensions that stay free, such as batch and tokens")
    batch: PositiveInt = Field(1, description="rows of the engine where batch is not dynamic")
    profile: dict[str, Range] = Field(
        {}, description="[minimum, optimum, maximum] of dynamic dimensions; batch 1, 1, 16 and tokens up to the data's"
    )
    compute_capabilities: tuple[ComputeCapability, ...] = Field(
        (),
        description="GPUs that tensorrt-rtx builds for; empty: those that it takes by itself, 8.0 and later (FP8: 8.9), "
        "which the report names",
    )
    optimization_level: int | None = Field(None, ge=0, le=5, description="builder effort; empty: the builder's own")
    builder: Literal["auto", "tensorrt", "tensorrt-rtx"] = Field(
        "auto", description="auto: tensorrt where it is installed and there is an NVIDIA GPU, else tensorrt-rtx"
    )

    @field_validator("profile")
    @classmethod
    def _ordered(cls, profile: dict[str, Range]) -> dict[str, Range]:
        for name, (low, best, high) in profile.items():
            if not low <= best <= high:
                raise ValueError(f"{name}: minimum {low}, optimum {best}, maximum {high} are not in order")
        return profile

    def missing(self) -> str | None:
        """The library that is absent: the builder, or ``onnx`` and ``onnx-ir``, which write the graph."""
        builder = self._builder()
        if not _installed(LIBRARIES[builder]):
            return f"{product(builder)} is not installed"
        if builder == "tensorrt" and gpu_name() is None:
            return "TensorRT builds only where there is an NVIDIA GPU, and there is none; tensorrt-rtx needs none"
        absent = next((name for name in ("onnx", "onnx_ir") if not _installed(name)), None)
        return absent and f"{absent} is not installed, which writes the graph for the builder"

    def installs(self) -> str:
        builder = self._builder()
        return "tensorrt-rtx" if builder == "tensorrt" and _installed("tensorrt") and gpu_name() is None else builder

    def refuses(self, model: nn.Module) -> list[tuple[str, str]]:
        """What TensorRT has no form for. Codes of 2 and 3 bits are taken: they are stored, unchanged, as INT4."""
        old = [name for name in self.compute_capabilities if float(name) < _FLOAT8_SINCE]
        fp8 = f"GPUs of compute capability {', '.join(old)} have no FP8: {_FLOAT8_SINCE} and later have; leave those out"
        return [
            (path, reason)
            for path, module in model.named_modules()
            if hasattr(module, "quantized_weight")
            for reason in [*_refusals(module), *([fp8] if old and is_float8(module) else [])]
        ]

    def forecast(self, source: Traceable) -> Forecast:
        """The size by the formula of ``export.tensorrt_forecast``; the memory is that of the builder's process, which runs beside
        this one, or of reading the engine again, whichever is more."""
        from export.onnx_file import made_bytes, written_bytes
        from export.tensorrt_forecast import UNCERTAIN, builder_bytes, engine_bytes

        self._ready()
        graph = self._lower(source)
        size, given, copies = engine_bytes(graph), written_bytes(graph), made_bytes(graph, source.model)
        reason = f"its inputs are not quantized: the weight is made {self.precision} and multiplied so"
        peak = max(builder_bytes(given, size), 2 * size + given) + copies
        unsure = int(UNCERTAIN * max(0, size - given))
        return Forecast(size, peak, dict.fromkeys(weight_only(source.model), reason), given, unsure)

    def write(self, source: Traceable, path: Path) -> Artifact:
        """Lowers the model, keeps the Q/DQ file and builds the engine; afterwards both are there, or neither.

        Raises:
            MissingRuntime: a library is absent.
            UserError: an option names a dimension that the model does not have, or the builder refuses the graph.
        """
        builder, ranges = self._ready(), self._ranges(source)

        from export.onnx_file import write

        graph = self._lower(source)
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".building-", dir=path.parent) as folder:
            engine = Path(folder) / path.name
            onnx = qdq_path(engine)
            write(graph, onnx)
            del graph
            built = build_engine(
                builder,
                onnx,
                engine,
                profile=_profile(source, ranges),
                compute_capabilities=self.compute_capabilities,
                optimization_level=self.optimization_level,
            )
            details = {
                "builder": f"{product(builder)} {built.version}",
                "precision": self.precision,
                "opset": _OPSET,
                "profile": ranges,
                "build_seconds": round(built.seconds, 3),
                "peak_memory_bytes": resident_bytes() + built.peak_bytes,
                "qdq_file": onnx.name,
                **engine_report(engine),
                "warnings": sorted(set(built.warnings))[:8],
            }
            _move(Path(folder), path)
        return Artifact(self.format, path, path.stat().st_size, details)

    def timed_here(self) -> bool:
        return self.missing() is None and not _no_gpu(self._builder())

    def open(self, path: Path, threads: int) -> Runner:
        """The engine on the GPU if its library and a CUDA build of torch are there; else the Q/DQ file (``proxy``)."""
        if not path.is_file():
            raise UserError(str(path), "there is no such engine", "Run the recipe again.")
        with path.open("rb") as file:
            library, version = builder_of(file.read(64))
        title = f"{product(library)} {version}".strip()
        reason = _no_gpu(library)
        if not reason:
            try:
                return EngineRunner(path.read_bytes(), LIBRARIES[library], product(library))
            except RuntimeError as error:
                reason = f"it does not load on {torch.cuda.get_device_name()}: {_first_line(error)}"
        return _proxy(path, title, reason, threads)

    def contents(self, path: Path) -> Contents:
        """Codes that the Q/DQ file and the engine both hold; bytes by type from the engine's own listing."""
        return engine_contents(path)

    def _lower(self, source: Traceable) -> Any:
        """The explicit Q/DQ graph (``onnx_ir.Model``)."""
        from export.tensorrt_lowering import explicit, float32_scales
        from export.to_onnx import lower

        half = self.precision == "float16" and not cast_layers(source.model)
        with explicit():
            graph = lower(source, "tensorrt", self.dynamic, self.batch, _OPSET, float16=half)
        if half and "7.5" not in self.compute_capabilities:  # which has no product typed float32, integers or not
            float32_scales(graph, source)
        return graph

    def _builder(self) -> BuilderName:
        if self.builder != "auto":
            return self.builder
        return "tensorrt" if _installed("tensorrt") and gpu_name() else "tensorrt-rtx"

    def _ready(self) -> BuilderName:
        builder = self._builder()
        if reason := self.missing():
            raise MissingRuntime("export.tensorrt", reason, f"pip install 'transformer-compress[{self.installs()}]'")
        if builder == "tensorrt" and self.compute_capabilities:
            raise UserError(
                "export.tensorrt.compute_capabilities",
                "TensorRT builds for the GPU in this machine",
                "Leave compute_capabilities empty, or set `builder: tensorrt-rtx`.",
            )
        return builder

    def check(self, source: Traceable) -> None:
        self._ranges(source)

    def _ranges(self, source: Traceable) -> dict[str, list[int]]:
        """[minimum, optimum, maximum] of each dynamic dimension."""
        sizes = _sizes(source)
        known = f"It has: {', '.join(sorted(sizes))}."
        for option, names in (("dynamic", self.dynamic), ("profile", list(self.profile))):
            for name in names:
                if name not in sizes:
                    raise UserError(f"export.tensorrt.{option}", f"the model has no dimension {name!r}", known)
                if name not in self.dynamic:
                    hint = f"Add {name} to dynamic, or take it out of profile."
                    raise UserError(f"export.tensorrt.{option}", f"{name} is not dynamic", hint)
        usual = {name: [min(2, size), size, size] for name, size in sizes.items()} | {"batch": [1, 1, 16]}
        return {name: list(self.profile.get(name, usual[name])) for name in self.dynamic}


def _move(folder: Path, path: Path) -> None:
    """Renames the finished files into place, the engine last; weights that an earlier Q/DQ file kept apart go."""
    names = sorted((file.name for file in folder.iterdir()), key=lambda name: name == path.name)
    for name in names:
        os.replace(folder / name, path.parent / name)
    data = f"{qdq_path(path).name}.data"
    if data not in names:
        (path.parent / data).unlink(missing_ok=True)


def _refusals(module: nn.Module) -> Iterator[str]:
    weight: Any = module.quantized_weight
    activation: Any = getattr(module, "activation", None)
    if not hasattr(weight, "grid"):  # bits become codes per channel, of 4 or 8 bits
        yield from _input_refusals(activation)
        return
    grid, codes = weight.grid, torch.Size(weight.shape).numel()
    grouped = grid.granularity == "group"
    if not grid.symmetric:
        yield "its weight codes are asymmetric, and TensorRT takes symmetric ones only"
    if grouped and len(weight.shape) == 4:
        yield "TensorRT scales a convolution's weights by channel, not by group"
    if grouped and grid.group_size == 1:
        yield "a group of one weight is no group to TensorRT; take 2 or more"
    if grid.bits < 8 and codes % 2:
        yield f"TensorRT packs INT4 codes in pairs, and its {codes} codes are an odd number"
    yield from _input_refusals(activation)
    if activation is not None and grouped:
        yield "TensorRT has no kernel for group scales under quantized activations; scale by channel"


def _input_refusals(activation: Any) -> Iterator[str]:
    if activation is None:
        return
    if activation.kind == "dynamic":
        yield "its activation grid is made at run time, and TensorRT takes static scales only"
    elif not activation.symmetric or _shifted(activation.zero_point):
        yield "its activation codes are asymmetric, and TensorRT takes symmetric ones only"
    if activation.bits != 8:
        yield f"its activations have {activation.bits} bits, and TensorRT has 8-bit ones only"


def _shifted(zero_point: Tensor) -> bool:
    """Whether a zero point is not zero; one without data (a preview of the model) is not judged."""
    return not zero_point.is_meta and bool((zero_point != 0).any())


def _profile(source: Traceable, ranges: Mapping[str, list[int]]) -> dict[str, list[list[int]]]:
    """[minimum, optimum, maximum] shapes of each input that has a dynamic dimension."""
    sizes = _sizes(source)

    def shape(spec: TensorSpec, which: int) -> list[int]:
        return [size if isinstance(size, int) else ranges[size][which] if size in ranges else sizes[size] for size in spec.shape]

    return {
        spec.name: [shape(spec, which) for which in range(3)]
        for spec in source.signature.inputs
        if any(size in ranges for size in spec.shape)
    }


def _sizes(source: Traceable) -> dict[str, int]:
    """The named dimensions of the model's inputs, and their sizes in the example."""
    return {
        size: source.example[spec.name].shape[axis]
        for spec in source.signature.inputs
        for axis, size in enumerate(spec.shape)
        if isinstance(size, str)
    }


def _no_gpu(library: str) -> str:
    """Why an engine of this library cannot run here, or an empty string."""
    if gpu_name() is None:
        return "there is no NVIDIA GPU"
    if not _installed(LIBRARIES[library]):
        return f"{product(library)} is not installed"
    return "" if torch.cuda.is_available() else "torch here has no CUDA"


def _proxy(path: Path, title: str, reason: str, threads: int) -> Runner:
    onnx = qdq_path(path)
    if not onnx.is_file():
        return NotRun(path, f"{reason}, and {onnx.name}, which could stand in, is gone")
    if not _installed("onnxruntime"):
        return NotRun(path, f"{reason}, and onnxruntime, which could run {onnx.name}, is not installed")
    told = title if gpu_name() is None else f"{title}; {reason}"
    try:
        return ProxyRunner(onnx, told, threads)
    except Exception as error:  # ONNX Runtime raises classes of its own extension module
        return NotRun(path, f"{reason}, and ONNX Runtime cannot run {onnx.name}: {_first_line(error)}")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None
