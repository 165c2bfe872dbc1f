"""The ONNX exporter: one lowering, three dialects."""

from __future__ import annotations

import difflib
import importlib.util
import json
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from pydantic import Field, PositiveInt
from torch import nn

from calibrate.errors import MissingRuntime, UserError
from export.contract import Artifact, Contents, Exporter, Forecast, NotRun, Runner
from export.graph import Traceable, cast_layers, is_float8
from export.onnx_file import CODES, LIMIT_BYTES, contents, made_bytes, write, written_bytes
from export.onnx_lowering import Dialect
from export.onnx_runner import OnnxRunner, OpenVinoRunner, executed_ops, optimized

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["OnnxExporter", "executed_ops", "lower", "open_openvino"]

_WIDENED = (
    "ONNX Runtime has no products in float16 on a CPU: it widens the weights when it opens the file and computes in float32, so "
    "that neither time is gained there nor what a GPU rounds is seen."
)
_FLOAT_KERNELS = ("MatMul", "Gemm", "FusedMatMul", "FusedGemm", "Conv", "FusedConv")


def lower(
    source: Traceable,
    dialect: Dialect = "onnxruntime",
    dynamic: tuple[str, ...] = ("batch",),
    batch: int = 1,
    opset: int = 21,
    float16: bool | None = None,
    unpacked: bool = False,
) -> ir.Model:
    """The model as an ONNX graph, in memory.

    Args:
        dialect: ``onnxruntime`` (uint8 activations, Sum for bias and residual, MatMulNBits for narrow weights),
            ``portable`` (the same with standard operators only), ``tensorrt`` (int8 activations with zero point 0, INT4 and
            INT8 weights, no contributed operators).
        dynamic: dimensions of the signature that stay symbolic.
        batch: rows where ``batch`` is not dynamic.
        float16: compute in float16 (strongly typed; inputs and output stay float32). Default: only for ``tensorrt``.
        unpacked: weights that meet float inputs are made float when the file is opened.

    Raises:
        UserError: an operation has no ONNX form, or a dynamic dimension cannot be kept; names the module.
    """
    from export.onnx_lowering import Lowering
    from export.onnx_walk import Walk

    typed = bool(cast_layers(source.model))
    half = (dialect == "tensorrt" if float16 is None else float16) and not typed
    _check_dimensions(source, dynamic)
    program = _lowerable(_traced(source, dynamic, batch))
    lowering = Lowering(dialect, opset, torch.float16 if half else torch.float32, typed=typed, unpacked=unpacked)
    if typed and dialect != "tensorrt":
        lowering.note(_WIDENED)
    model = Walk(lowering, program, source.signature).run(source.signature.output_name)
    model.producer_name = "transformer-compress"
    model.graph.name = source.name
    model.metadata_props["compress.name"] = source.name
    model.metadata_props["compress.dialect"] = dialect
    if lowering.codes:
        model.metadata_props[CODES] = json.dumps(_with_aliases(lowering.codes, source.model), sort_keys=True)
    model.meta["notes"] = lowering.notes
    return model


def _traced(source: Traceable, dynamic: tuple[str, ...], batch: int) -> Any:
    try:
        return source.program(frozenset(dynamic), batch)
    except Exception as error:
        if type(error).__module__.startswith("torch._dynamo") or "onstraint" in str(error):
            first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise UserError("export", f"the model cannot be traced with dynamic {list(dynamic)}: {first}",
                            "Leave the dimension fixed, or change the model's forward.") from error  # fmt: skip
        raise


def _check_dimensions(source: Traceable, dynamic: Iterable[str]) -> None:
    known = {size for spec in source.signature.inputs for size in spec.shape if isinstance(size, str)}
    for name in dynamic:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"Nearest: {near[0]}." if near else f"There is: {', '.join(sorted(known))}."
            raise UserError("export.dynamic", f"the inputs have no dimension {name!r}", hint)


def _lowerable(program: Any) -> Any:
    """The program as it is where every operation has a lowering; else with the others decomposed by torch."""
    from export import (  # noqa: F401
        onnx_carried,
        onnx_float8,
        onnx_ops,
        onnx_ops_activations,
        onnx_ops_made,
        onnx_ops_nn,
        onnx_ops_reduce,
        onnx_ops_shape,
    )
    from export.onnx_lowering import LOWERINGS

    if set(_targets(program.graph)) <= LOWERINGS.keys():
        return program
    defaults: Any = torch.export.default_decompositions()
    table = {op: how for op, how in defaults.items() if str(op) not in LOWERINGS}
    return program.run_decompositions(table)


def _targets(graph: Any) -> Iterator[str]:
    """Names of the operations of a graph and of the regions in it."""
    from export.onnx_walk import functional

    for node in graph.nodes:
        inner = getattr(graph.owning_module, node.target, None) if node.op == "get_attr" else None
        if isinstance(inner, torch.fx.GraphModule):
            yield from _targets(inner.graph)
        passed = str(node.target).startswith(("aten._assert", "aten.sym_", "aten._check"))
        if node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload) and not passed:
            yield functional(node)


def _with_aliases(codes: dict[str, dict[str, Any]], model: nn.Module) -> dict[str, dict[str, Any]]:
    """Adds the other module paths of layers whose codes are tied."""
    first: dict[int, str] = {}
    made = dict(codes)
    for path, module in _quantized(model):
        pointer = module.quantized_weight.codes.data_ptr()
        known = first.setdefault(pointer, path)
        if path in codes:
            first[pointer] = known = path
        if known in codes and path not in codes:
            made[path] = codes[known]
    for path, module in _quantized(model):
        known = first[module.quantized_weight.codes.data_ptr()]
        if known in codes and path not in made:
            made[path] = codes[known]
    return made


def _quantized(model: nn.Module) -> Iterator[tuple[str, Any]]:
    for path, module in model.named_modules(remove_duplicate=False):
        if hasattr(module, "quantized_weight"):
            yield path, module


def _float_products(model: ir.Model, sites: Iterable[str]) -> dict[str, str]:
    """Quantized layers whose product ONNX Runtime will run in floating point, with the reason.

    Its integer convolution needs quantized inputs and an output that is quantized again; its integer matrix product, and
    the one on narrow weights, need nothing of what follows.
    """
    found = {}
    known = set(sites)
    for node in model.graph:
        site = (node.name or "").rpartition("/")[0]
        if node.op_type != "Conv" or site not in known:
            continue
        before, after = node.inputs[0], [reader.op_type for reader, _ in node.outputs[0].uses()]
        producer = before.producer() if before is not None else None
        if producer is None or producer.op_type != "DequantizeLinear":
            found[site] = "its inputs are not quantized, and narrow weights of convolutions have no kernel"
        elif after != ["QuantizeLinear"]:
            found[site] = "its output is not quantized again, which ONNX Runtime's integer convolution needs"
    return found


class OnnxExporter(Exporter):
    """An ONNX file for CPUs: fast in ONNX Runtime without any session option, and in OpenVINO."""

    format: ClassVar[str] = "onnx"
    extra: ClassVar[str] = "onnx"
    filename: ClassVar[str] = "onnx/model.onnx"

    dialect: Literal["onnxruntime", "portable"] = Field(
        "onnxruntime",
        description="portable uses standard operators only; onnxruntime adds MatMulNBits for weights of fewer bits.",
    )
    weights_only: Literal["packed", "unpacked"] = Field(
        "packed",
        description="Weights that meet float inputs. packed: codes in memory (MatMulNBits in ONNX Runtime, which rounds "
        "inputs to 8 bits). unpacked: they are made float when the file is opened; as fast and as exact as float, in its memory.",
    )
    dynamic: tuple[str, ...] = Field(("batch",), description="Dimensions that stay free: batch, tokens.")
    batch: PositiveInt = Field(1, description="Rows of the file where batch is not dynamic.")
    opset: int = Field(21, ge=17, le=25, description="Version of the ONNX operators.")
    openvino: bool | Literal["auto"] = Field("auto", description="Measure the same file in OpenVINO too; auto: where installed.")

    def missing(self) -> str | None:
        absent = [name for name in ("onnx", "onnx_ir", "onnxruntime") if importlib.util.find_spec(name) is None]
        if self.openvino is True and importlib.util.find_spec("openvino") is None:
            absent.append("openvino")
        return f"{', '.join(absent)} {'is' if len(absent) == 1 else 'are'} not installed" if absent else None

    def installs(self) -> str:
        return "openvino" if self.openvino is True else "onnx"

    def timed_here(self) -> bool:
        return self.missing() is None

    def check(self, source: Traceable) -> None:
        _check_dimensions(source, self.dynamic)

    @property
    def wants_openvino(self) -> bool:
        """Whether a second row, the same file in OpenVINO, is wanted and possible."""
        return self.openvino is True or (self.openvino == "auto" and importlib.util.find_spec("openvino") is not None)

    def refuses(self, model: nn.Module) -> list[tuple[str, str]]:
        reason = "ONNX Runtime has no products in bfloat16 on a CPU; cast to float16"
        found = [(path, reason) for path, kind in cast_layers(model).items() if kind == "bfloat16"]
        floats = "no runtime multiplies FP8 on a CPU, where weights: 8 is as small and faster; export to tensorrt alone"
        found += [(path, floats) for path, module in _quantized(model) if is_float8(module)]
        for path, module in _quantized(model):
            activation = getattr(module, "activation", None)
            if activation is not None and activation.kind == "dynamic" and activation.bits != 8:
                found.append((path, f"dynamic activations of {activation.bits} bits have no ONNX form; use 8"))
        return found

    def forecast(self, source: Traceable) -> Forecast:
        """Exact but for values: single numbers that calibration tells apart, and factors for the channels of an input. Lowers
        the model as ``write`` does, and neither writes it nor reads its large tensors."""
        self._ready()
        model = self._lower(source)
        size = written_bytes(model, Path(self.filename).name)
        return Forecast(
            size, made_bytes(model, source.model), _float_products(model, [path for path, _ in _quantized(source.model)])
        )

    def _lower(self, source: Traceable) -> ir.Model:
        return lower(source, self.dialect, self.dynamic, self.batch, self.opset, unpacked=self.weights_only == "unpacked")

    def _ready(self) -> None:
        if (absent := self.missing()) is not None:
            raise MissingRuntime("export.onnx", absent, f"pip install 'transformer-compress[{self.installs()}]'")

    def write(self, source: Traceable, path: Path) -> Artifact:
        self._ready()
        started = time.perf_counter()
        _traced(source, self.dynamic, self.batch)
        traced = time.perf_counter()
        model = self._lower(source)
        files = write(model, path, LIMIT_BYTES)
        details = {
            "opset": self.opset, "dialect": self.dialect, "dynamic": list(self.dynamic), "batch": self.batch,
            "files": [file.name for file in files], "nodes": len(list(model.graph)), "notes": list(model.meta["notes"]),
            "trace_s": round(traced - started, 3), "lower_and_write_s": round(time.perf_counter() - traced, 3),
        }  # fmt: skip
        return Artifact(self.format, path, sum(file.stat().st_size for file in files), details)

    def open(self, path: Path, threads: int) -> Runner:
        return OnnxRunner(path, threads)

    def also(self, path: Path, threads: int) -> Iterator[tuple[str, Runner]]:
        """OpenVINO, where the recipe asks for it or, with ``auto``, where it is installed; a file that it refuses is said."""
        if not self.wants_openvino:
            return
        try:
            yield "openvino", self.open_openvino(path, threads)
        except (UserError, RuntimeError) as error:
            yield "openvino", NotRun(path, f"OpenVINO refuses the file: {str(error).strip().splitlines()[0]}")

    def open_openvino(self, path: Path, threads: int, precision_hint: str = "f32") -> Runner:
        """The same file in OpenVINO."""
        return open_openvino(path, threads, precision_hint)

    def contents(self, path: Path) -> Contents:
        return contents(path)

    def kept_float(self, path: Path) -> list[str]:
        """Quantized layers whose product ONNX Runtime runs in floating point, from the graph it would run."""
        sites = contents(path).codes
        names = [node.name or "" for node in optimized(path).graph if node.op_type in _FLOAT_KERNELS]
        return sorted(site for site in sites if any(name.startswith(f"{site}/") for name in names))


def open_openvino(path: Path, threads: int, precision_hint: str = "f32") -> Runner:
    """Opens an ONNX file in OpenVINO on the CPU; ``precision_hint``: "f32", or "bf16" to let it compute in bfloat16."""
    return OpenVinoRunner(path, threads, precision_hint)
