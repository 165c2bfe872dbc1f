"""Writes Core ML packages (ML programs) with weights in Core ML's own compressed storage, and runs them again."""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
import sys
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn
from torch.export import ExportedProgram

from calibrate.errors import UserError
from calibrate.signature import Batch, raw_path
from export.contract import Artifact, Contents, Exporter, Forecast, Runner, Validation
from export.coreml_contents import CODES, PARAMETERS, infinite, read_contents
from export.coreml_ops import Carrier, conversion, decomposed, finite, fused_attention
from export.coreml_weights import Target, binary_refusal, refusal
from export.disk import readable, space
from export.graph import Traceable, cast_layers, is_float8, weight_only
from export.mil_package import MODEL, Package, coremltools, package_files, quiet

__all__ = ["CoreMLExporter"]

Sizes = dict[str, PositiveInt]
Ranges = dict[str, Annotated[list[PositiveInt], Field(min_length=2, max_length=2)]]

# Passes that only matter for other front ends, or that would change what we carry.
_CONVERSION = 20_000_000
"""Memory of coremltools itself, as it was measured, and of its programs without weights."""
_LEFT_OUT = {"common::add_int16_cast", "common::merge_affine_dequantize_with_consecutive_ops"}


class CoreMLExporter(Exporter):
    """A Core ML package: an ML program in float16 or float32 around weights in Core ML's compressed storage.

    ``shapes``: ``fixed`` writes the sizes of the example; a list of ``{dimension: size}`` allows exactly those sizes (the
    first is the default); ``{dimension: [lowest, highest]}`` allows a range. Dimensions are those of the signature
    (``batch``, ``tokens``); what is not named stays fixed. In a float16 program scales are rounded to float16 too; codes
    never change.
    """

    format: ClassVar[str] = "coreml"
    extra: ClassVar[str] = "coreml"
    filename: ClassVar[str] = "coreml/model.mlpackage"

    target: Target = Field("iOS18", description="Oldest system that opens the file; older ones hold fewer kinds of weights.")
    precision: Literal["float16", "float32"] = Field(
        "float16", description="Floats around the integers; after the pass cast the model's own types hold."
    )
    batch: PositiveInt = Field(1, description="Rows that the file takes, where shapes does not free them.")
    shapes: Literal["fixed"] | list[Sizes] | Ranges = Field(
        "fixed",
        description="fixed: the example's sizes; a list of {tokens: 64}: those sizes, the first by default; "
        "{tokens: [1, 128]}: a range.",
    )
    fused_attention: bool = Field(
        True, description="Attention as one operation, which iOS 18 has; false: as products and a softmax, as for older systems."
    )

    def missing(self) -> str | None:
        from importlib.util import find_spec

        return None if find_spec("coremltools") else "coremltools is not installed"

    def refuses(self, model: nn.Module) -> list[tuple[str, str]]:
        refused: list[tuple[str, str]] = []
        short = cast_layers(model).items()
        refused += [(path, "Core ML has no bfloat16; cast to float16") for path, kind in short if kind == "bfloat16"]
        for path, module in model.named_modules():
            weight, activation = getattr(module, "quantized_weight", None), getattr(module, "activation", None)
            if weight is not None and hasattr(weight, "codes"):
                reason = _weight_refusal(self.target, weight)
                refused += [(path, reason)] if reason else []
            kind = getattr(activation, "kind", None)
            refused += [(path, "Core ML has no FP8; use weights: 8")] if is_float8(module) else []
            if kind == "dynamic":
                refused.append((path, "Core ML has no dynamic activation quantization; use static activations or none"))
            elif kind in ("static", "binary") and self.target == "iOS16":
                refused.append((path, "iOS16 cannot quantize activations; use target iOS17 or later"))
            elif kind == "static" and activation is not None and activation.bits != 8:
                refused.append((path, f"Core ML quantizes activations to 8 bits, not {activation.bits}"))
        return refused

    def forecast(self, source: Traceable) -> Forecast:
        """The size from the traced graph (``export.coreml_forecast``); the memory is ``_CONVERSION`` and 1.3 times the model's
        bytes (measured: 150 MB for a float model of 91 MB, 30 MB for one of 23 MB)."""
        from export.coreml_forecast import package_bytes

        self.check(source)
        stored = sum(tensor.nbytes for tensor in {id(t): t for t in source.model.state_dict().values()}.values())
        with quiet():
            size = package_bytes(self._program(source), self._floats(source.model) == "float16", self.target)
        reason = f"its inputs are not quantized: the weight is made {self.precision} and multiplied so"
        return Forecast(size, _CONVERSION + int(1.3 * stored), dict.fromkeys(weight_only(source.model), reason))

    def write(self, source: Traceable, path: Path) -> Artifact:
        """Writes the package.

        Raises:
            UserError: the model has an operation that Core ML lacks, something is refused, or ``shapes`` does not fit.
            MissingRuntime: coremltools is not installed.
        """
        library = coremltools()
        refused = self.refuses(source.model)
        if refused:
            raise UserError(refused[0][0], refused[0][1], f"{len(refused)} sites are refused.")
        self.check(source)
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=".coreml-", dir=path.parent))
        try:
            package = scratch / "model.mlpackage"
            with space(scratch):
                carrier, program = self._convert(library, source, package)
                self._describe(package, source, carrier, program)
                opened = Package(package)
            bad = infinite(opened)
            if bad:
                raise RuntimeError(f"constants of the program are not finite: {', '.join(bad[:5])}")
            kinds = sorted({op.kind for op in opened.ops} - {"const"})
            if path.exists():
                shutil.rmtree(path)
            readable(package)
            package.rename(path)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        details = {"target": self.target, "precision": self.precision, "operations": kinds, "sites": len(carrier.names)}
        return Artifact(self.format, path, sum(file.stat().st_size for file in package_files(path)), details)

    def timed_here(self) -> bool:
        return sys.platform == "darwin" and self.missing() is None

    def open(self, path: Path, threads: int) -> Runner:
        """Core ML itself on macOS, the interpreter elsewhere; ``threads`` is for torch (Core ML chooses its own)."""
        return _CoreML(path) if sys.platform == "darwin" else _Interpreted(path, threads)

    def contents(self, path: Path) -> Contents:
        return read_contents(path)

    def _convert(self, ct: Any, source: Traceable, package: Path) -> tuple[Carrier, ExportedProgram]:
        with quiet():
            program = finite(self._program(source), self._floats(source.model) == "float16")
            signature = program.graph_signature
            carrier = Carrier(self.target, {**signature.inputs_to_buffers, **signature.inputs_to_parameters})
            pipeline = ct.PassPipeline.DEFAULT
            pipeline.remove_passes(_LEFT_OUT)
            try:
                with conversion(carrier):
                    converted = ct.convert(
                        program,
                        convert_to="mlprogram",
                        inputs=self._inputs(ct, source),
                        outputs=[ct.TensorType(name=source.signature.output_name, dtype=np.float32)],
                        minimum_deployment_target=getattr(ct.target, self.target),
                        compute_precision=getattr(ct.precision, self._floats(source.model).upper()),
                        pass_pipeline=pipeline,
                        skip_model_load=True,
                        package_dir=str(package),
                    )
                converted._mil_program.validate(check_essential_scope=True)
            except UserError:
                raise
            except Exception as error:
                line = (str(error).strip() or type(error).__name__).splitlines()[0]
                what = f"Core ML cannot express this model: {line}"
                raise UserError(source.name, what, "Rewrite that operation, or leave coreml out.") from error
        return carrier, program

    def _floats(self, model: nn.Module) -> str:
        """The type of floats that the model leaves to the exporter: float32 where its layers say themselves which are short."""
        return "float32" if cast_layers(model) else self.precision

    def _program(self, source: Traceable) -> ExportedProgram:
        program = decomposed(self._traced(source))
        return fused_attention(program) if self.fused_attention and self.target == "iOS18" else program

    def _traced(self, source: Traceable) -> ExportedProgram:
        """The shared trace, copied on the surface; raises ``UserError`` where the model takes less than ``shapes`` allows."""
        free = self._free()
        traced = source.program(frozenset(free), self.batch)
        placeholders = {node.name: node.meta["val"] for node in traced.graph.nodes if node.op == "placeholder"}
        for spec in source.signature.inputs:
            for axis, name in enumerate(spec.shape):
                if name not in free:
                    continue
                size = placeholders[spec.name].shape[axis]
                bounds = traced.range_constraints.get(getattr(getattr(size, "node", None), "expr", None))
                if bounds is not None and max(free[str(name)]) > bounds.upper:
                    what = f"{name}: the model takes at most {int(bounds.upper)}, not {max(free[str(name)])}"
                    raise UserError("shapes", what, "Lower the upper end.")
        return copy.copy(traced)

    def _free(self) -> dict[str, list[int]]:
        """Sizes of the dimensions that vary: the enumerated ones, or [lowest, highest]."""
        if self.shapes == "fixed":
            return {}
        if isinstance(self.shapes, dict):
            return {name: list(bounds) for name, bounds in self.shapes.items() if bounds[0] != bounds[1]}
        names = {name for sizes in self.shapes for name in sizes}
        found = {name: [sizes[name] for sizes in self.shapes if name in sizes] for name in sorted(names)}
        return {name: sizes for name, sizes in found.items() if len(set(sizes)) > 1}

    def _inputs(self, ct: Any, source: Traceable) -> list[Any]:
        """Input types by name: int32 for whole numbers, one symbol a dimension, shared by all inputs that have it."""
        free = self._free()
        example = source.inputs(self.batch)
        dims = {}
        for name, sizes in free.items():
            given = self._default(name, sizes, example, source)
            dims[name] = ct.RangeDim(min(sizes), max(sizes), default=given, symbol=name)
        types = []
        for spec in source.signature.inputs:
            actual = example[spec.name].shape
            shape = [dims.get(str(size), int(actual[axis])) for axis, size in enumerate(spec.shape)]
            if spec.dtype == torch.bool:
                raise UserError(spec.name, "Core ML takes no boolean inputs", "Take an integer mask and compare in forward.")
            kind = np.float32 if spec.dtype.is_floating_point else np.int32
            types.append(ct.TensorType(name=spec.name, shape=shape, dtype=kind))
        return types

    def _default(self, name: str, sizes: list[int], example: Batch, source: Traceable) -> int:
        if isinstance(self.shapes, list):
            return sizes[0]
        given = next(
            example[spec.name].shape[axis]
            for spec in source.signature.inputs
            for axis, size in enumerate(spec.shape)
            if size == name
        )
        return int(given) if sizes[0] <= given <= sizes[1] else sizes[1]

    def check(self, source: Traceable) -> None:
        """Raises ``UserError`` for unknown dimensions, empty ranges, and what the target lacks."""
        known = {size for spec in source.signature.inputs for size in spec.shape if isinstance(size, str)}
        named = [] if self.shapes == "fixed" else [self.shapes] if isinstance(self.shapes, dict) else self.shapes
        for sizes in named:
            for name, bounds in sizes.items():
                if name not in known:
                    raise UserError("shapes", f"there is no dimension {name!r}", f"There is: {', '.join(sorted(known))}.")
                if isinstance(bounds, list) and bounds[0] > bounds[1]:
                    raise UserError("shapes", f"{name}: {bounds} is empty", "Give [lowest, highest].")
        if isinstance(self.shapes, list):
            if len({tuple(sorted(sizes)) for sizes in self.shapes}) > 1:
                raise UserError("shapes", "not every entry names the same dimensions", "Name them all in each entry.")
            varied = [spec.name for spec in source.signature.inputs if set(map(str, spec.shape)) & set(self._free())]
            if self.target != "iOS18" and len(varied) > 1:
                what = f"{self.target} allows enumerated shapes for one input, here {len(varied)} vary"
                raise UserError("shapes", what, "Use target iOS18, or a range such as tokens: [1, 128].")

    def _describe(self, package: Path, source: Traceable, carrier: Carrier, program: ExportedProgram) -> None:
        """Sets metadata and enumerated shapes, and makes the files' bytes depend on nothing but their content."""
        opened = Package(package)
        description = opened.spec.description
        metadata = description.metadata
        metadata.author, metadata.versionString = "transformer-compress", _version()
        metadata.shortDescription = f"{source.name}: {self.precision} ML program for {self.target} and later"
        signature = program.graph_signature
        parameters = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        how = {"target": self.target, "precision": self.precision, "batch": self.batch, "shapes": self.shapes}
        metadata.userDefined["compress.options"] = json.dumps(how)
        metadata.userDefined[CODES] = json.dumps(_code_names(opened, carrier, source.model))
        metadata.userDefined[PARAMETERS] = json.dumps(_parameter_names(opened, parameters))
        if isinstance(self.shapes, list) and self._free():
            for feature, spec in zip(description.input, source.signature.inputs, strict=True):
                self._enumerate(feature.type.multiArrayType, list(spec.shape))
        (package / MODEL).write_bytes(opened.spec.SerializeToString(deterministic=True))
        _settle_manifest(package)

    def _enumerate(self, array: Any, names: list[int | str]) -> None:
        """Replaces the range of an input by the sizes that ``shapes`` lists."""
        assert isinstance(self.shapes, list)
        default = [int(size) for size in array.shape]
        if not set(map(str, names)) & set(self._free()):
            return
        array.ClearField("ShapeFlexibility")
        for sizes in self.shapes:
            entry = array.enumeratedShapes.shapes.add()
            entry.shape.extend(sizes.get(str(name), default[axis]) for axis, name in enumerate(names))
        first = list(array.enumeratedShapes.shapes[0].shape)
        del array.shape[:]
        array.shape.extend(first)


class _Interpreted(Runner):
    """The saved program in our interpreter: says whether the file is right, nothing about its speed."""

    how: Validation = "interpreter"
    runtime = "MIL interpreter (torch)"
    measurable = False

    def __init__(self, path: Path, threads: int) -> None:
        from export.mil import Program

        self.program, self.threads = Program(path), threads
        self.rows = next(iter(self.program.package.inputs.values())).shape[0]

    def __call__(self, batch: Batch) -> Tensor:
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        try:
            outputs = self.program(batch)
        finally:
            torch.set_num_threads(before)
        return next(iter(outputs.values())).float()


class _CoreML(Runner):
    """The package in Core ML itself (macOS)."""

    def __init__(self, path: Path) -> None:
        import platform

        library = coremltools()
        with quiet():
            self.model = library.models.MLModel(str(path))
        package = Package(path)
        self.types, self.output = package.inputs, package.outputs[0]
        self.runtime = f"Core ML, macOS {platform.mac_ver()[0]}"
        self.rows = next(iter(self.types.values())).shape[0]

    def __call__(self, batch: Batch) -> Tensor:
        given = {
            name: batch[name].to(torch.float32 if kind.dtype.startswith("float") else torch.int32).numpy()
            for name, kind in self.types.items()
        }
        return torch.from_numpy(self.model.predict(given)[self.output]).float()


def _weight_refusal(target: Target, weight: Any) -> str | None:
    """Why the target has no form for a layer's codes, or None; planes of bits have no grid."""
    shape = tuple(weight.shape)
    if not hasattr(weight, "grid"):
        return binary_refusal(target, shape, weight.groups)
    return refusal(target, weight.grid.bits, shape, tuple(weight.scale.shape))


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("transformer-compress")
    except PackageNotFoundError:
        return "unknown"


def _site(buffer: str) -> str:
    return raw_path(buffer).removesuffix(".codes").removesuffix(".quantized_weight")


def _code_names(package: Package, carrier: Carrier, model: nn.Module) -> dict[str, list[str]]:
    """Weight operation in the saved program -> sites whose codes it holds (tied weights share one)."""
    shared: dict[int, list[str]] = {}
    for name, buffer in model.named_buffers(remove_duplicate=False):
        if name.endswith("quantized_weight.codes"):
            shared.setdefault(buffer.data_ptr(), []).append(_site(name))
    aliases = {path: paths for paths in shared.values() for path in paths}
    saved = [op.name for op in package.ops if op.kind.startswith("constexpr_")]
    found: dict[str, list[str]] = {}
    for name, buffers in carrier.names.items():
        kept = [op for op in saved if (op == name or op.startswith(f"{name}_")) and not op.startswith(f"{name}_table")]
        sites = (site for buffer in buffers for site in aliases.get(_site(buffer), [_site(buffer)]))
        found.update({op: list(dict.fromkeys(sites)) for op in kept[:1]})
    return found


def _parameter_names(package: Package, parameters: dict[str, str]) -> dict[str, str]:
    """Float constants with two dimensions or more -> the module they belong to."""
    found = {}
    for op in package.ops:
        kind = op.outputs[0][1]
        source = parameters.get(op.name.removesuffix("_to_fp16"))
        if op.kind == "const" and source and kind.dtype.startswith("float") and len(kind.shape) >= 2:
            found[op.name] = raw_path(source).removesuffix(".weight")
    return found


def _settle_manifest(package: Path) -> None:
    """coremltools names the parts of a package by random numbers; names made from the content do the same."""
    file = package / "Manifest.json"
    manifest = json.loads(file.read_text())
    entries, settled = manifest["itemInfoEntries"], {}
    root = manifest["rootModelIdentifier"]
    for key in sorted(entries, key=lambda entry: entries[entry]["path"]):
        content = hashlib.sha256()
        for part in _parts(package / "Data" / entries[key]["path"]):
            content.update(part.name.encode() + part.read_bytes())
        name = str(uuid.uuid5(uuid.NAMESPACE_OID, entries[key]["path"] + content.hexdigest())).upper()
        settled[name] = entries[key]
        root = name if key == manifest["rootModelIdentifier"] else root
    manifest.update(itemInfoEntries=settled, rootModelIdentifier=root)
    file.write_text(json.dumps(manifest, indent=4, sort_keys=True) + "\n")


def _parts(path: Path) -> Iterator[Path]:
    yield from ([path] if path.is_file() else package_files(path))
