"""NNCF as the engine of ``quantize``: its own algorithms on the torch model, their result in this package's layers.

NNCF works on copies of the model. Only the weights and inputs of the chosen layers are in its scope, so that everything it
rounds has a layer here that carries it; what it would have rounded besides is told by name.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, Literal

from torch import Tensor, nn

from calibrate.errors import UserError
from calibrate.grid import Grid
from calibrate.modes import evaluating
from calibrate.signature import Batch, Signature, raw_path
from compress.quantization.nncf_reading import Operation, Read, decompressed, operations, read, rounded_elsewhere

__all__ = ["NncfResult", "NncfSettings", "nncf_quantized", "nncf_weights"]

_OUTSIDE = "NNCF would round its inputs; only weights and the inputs of layers can be carried"


@dataclass(frozen=True)
class NncfSettings:
    """What is asked of NNCF, in its own terms.

    Attributes:
        alpha: of SmoothQuant; negative: none.
        symmetric_inputs: signed inputs without zero point; else with one.
        range: how its statistics become ranges; None for its own choice.
        percentile: per cent of the values inside, for ``percentile``.
    """

    alpha: float = 0.95
    symmetric_inputs: bool = True
    per_channel: bool = True
    range: Literal["minmax", "percentile"] | None = None
    percentile: float = 99.99
    correct_biases: bool = True
    scale_estimation: bool = False


@dataclass
class NncfResult:
    """What NNCF made.

    Attributes:
        layers: by module path.
        biases: corrected ones, by the parameter's path; those of norms too, where NNCF corrects a convolution's there.
        left: layers it left in float, and what it would have rounded outside of the scope, with the reason.
        models: its own fake-quantized or compressed models, called with the model's inputs by name.
    """

    layers: dict[str, Read] = field(default_factory=dict)
    biases: dict[str, Tensor] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    models: list[nn.Module] = field(default_factory=list)


def nncf_quantized(
    model: nn.Module,
    signature: Signature,
    rows: Sequence[Batch],
    paths: Sequence[str],
    settings: NncfSettings,
    progress: Callable[[int, int, str], None] = lambda done, total, what: None,
) -> NncfResult:
    """Weights and inputs of the layers at ``paths`` to 8 bits by ``nncf.quantize``: SmoothQuant, ranges, fast bias correction.

    Args:
        rows: calibration batches of one row each.

    Raises:
        UserError: NNCF cannot handle the model.
    """
    bound = signature.bind(model)
    result = NncfResult()
    with _quiet() as nncf, evaluating(model):
        graph = _graph(_call(nncf, bound, rows[:1], NncfSettings(alpha=-1.0, correct_biases=False), []), rows[0])
        found = operations(graph)
        chosen = _chosen(found, paths, result)
        names = {operation.name for operation in chosen}
        outside = rounded_elsewhere(graph, {operation.name for operation in found})
        result.left |= {raw_path(name.replace("/", ".")): _OUTSIDE for name in outside}
        ignored = [node.node_name for node in graph.get_all_nodes() if node.node_name not in names]
        made = _call(nncf, bound, _Told(rows, progress), settings, ignored)
        graph = _graph(made, rows[0])
        for operation in chosen:
            layer = read(graph, made, operation)
            if layer is None:
                result.left[operation.path] = "NNCF leaves its weight in float"
            else:
                result.layers[operation.path] = layer
    result.biases = _corrected(model, made)
    result.models.append(made)
    return result


def nncf_weights(
    model: nn.Module, signature: Signature, rows: Sequence[Batch], grids: Mapping[str, Grid], settings: NncfSettings
) -> NncfResult:
    """Weights of the layers in ``grids`` by ``nncf.compress_weights``: 8 bits per channel, or 4 per channel or group.

    Raises:
        UserError: NNCF cannot handle the model.
    """
    bound = signature.bind(model)
    result = NncfResult()
    with _quiet() as nncf, evaluating(model):
        from nncf.torch.function_hook import wrap_model

        found = operations(_graph(wrap_model(copy.deepcopy(bound)), rows[0]))
        for grid in dict.fromkeys(grids.values()):
            chosen = _chosen(found, [path for path, own in grids.items() if own == grid], result)
            names = {operation.name for operation in chosen}
            ignored = nncf.IgnoredScope(names=[each.name for each in found if each.name not in names], validate=False)
            options: dict[str, Any] = {"mode": _mode(nncf, grid), "dataset": nncf.Dataset(rows), "ignored_scope": ignored}
            if grid.bits < 8:
                options |= {"ratio": 1.0, "group_size": grid.group_size or -1, "all_layers": True}
                options |= {"scale_estimation": True} if settings.scale_estimation else {}
            with _told_as_user_error():
                made = nncf.compress_weights(copy.deepcopy(bound), **options)
            _unpacked(model, made, chosen, grid, result)
            result.models.append(made)
    return result


def _mode(nncf: Any, grid: Grid) -> Any:
    return getattr(nncf.CompressWeightsMode, f"INT{grid.bits}_{'SYM' if grid.symmetric else 'ASYM'}")


def _unpacked(model: nn.Module, made: nn.Module, chosen: Sequence[Operation], grid: Grid, result: NncfResult) -> None:
    """Reads the codes of each chosen layer out of a model that ``nncf.compress_weights`` gave back."""
    hooks = dict(made.named_modules())
    for operation in chosen:
        path = operation.path
        hook = hooks.get(f"__nncf_hooks.post_hooks.model:{path.replace('.', ':')}:weight__0.0")
        if hook is None or f"INT{grid.bits}" not in type(hook).__name__:
            result.left[path] = f"NNCF does not make it {grid.bits} bits"
            continue
        shape = model.get_submodule(path).get_parameter("weight").shape
        result.layers[path] = decompressed(hook, made.get_parameter(f"model.{path}.weight"), shape, grid)


def _chosen(found: Sequence[Operation], paths: Sequence[str], result: NncfResult) -> list[Operation]:
    """The operations of the layers at ``paths`` that run exactly once; the others are told.

    A head that is tied to a table has the table's path in NNCF's graph: of a table only the look-up counts.
    """
    calls: dict[str, list[Operation]] = {}
    for operation in found:
        calls.setdefault(operation.path, []).append(operation)
    chosen = []
    for path in paths:
        own = calls.get(path, [])
        own = [operation for operation in own if operation.data is None] or own
        if len(own) == 1:
            chosen.append(own[0])
        else:
            result.left[path] = f"it runs {len(own)} times in a forward pass" if own else "NNCF does not see it in its graph"
    return chosen


def _call(nncf: Any, bound: nn.Module, rows: Any, settings: NncfSettings, ignored: list[str]) -> nn.Module:
    """``nncf.quantize`` with its preset for transformers; inputs by tensor, though it would take depthwise ones by channel."""
    from nncf.quantization.advanced_parameters import QuantizationParameters

    advanced = nncf.AdvancedQuantizationParameters(
        disable_bias_correction=not settings.correct_biases,
        smooth_quant_alphas=nncf.AdvancedSmoothQuantParameters(matmul=settings.alpha),
        activations_quantization_params=QuantizationParameters(per_channel=False),
    )
    if not settings.per_channel:
        advanced.weights_quantization_params = QuantizationParameters(per_channel=False)
    if settings.range is not None:
        advanced.activations_range_estimator_params = _ranges(settings)
    with _told_as_user_error():
        made: nn.Module = nncf.quantize(
            bound,
            nncf.Dataset(rows),
            preset=nncf.QuantizationPreset.PERFORMANCE if settings.symmetric_inputs else nncf.QuantizationPreset.MIXED,
            model_type=nncf.ModelType.TRANSFORMER,
            subset_size=len(rows),
            ignored_scope=nncf.IgnoredScope(names=ignored, validate=False),
            advanced_parameters=advanced,
        )
    return made


def _ranges(settings: NncfSettings) -> Any:
    from nncf.quantization.range_estimator import (
        AggregatorType,
        RangeEstimatorParameters,
        RangeEstimatorParametersSet,
        StatisticsCollectorParameters,
        StatisticsType,
    )

    if settings.range == "minmax":
        return RangeEstimatorParametersSet.MINMAX
    outside = (100 - settings.percentile) / 200
    ends = [
        StatisticsCollectorParameters(StatisticsType.QUANTILE, AggregatorType.MEAN, quantile_outlier_prob=outside)
        for _ in range(2)
    ]
    return RangeEstimatorParameters(*ends)


@contextlib.contextmanager
def _told_as_user_error() -> Iterator[None]:
    """What NNCF says of a model that it cannot handle, in one line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # NNCF raises classes of its own, of torch and of Python alike
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError("quantize.engine", f"NNCF cannot handle the model: {first}", "Use engine: own.") from error


class _Told:
    """Calibration rows that tell how far NNCF has come through them."""

    def __init__(self, rows: Sequence[Batch], progress: Callable[[int, int, str], None]) -> None:
        self.rows, self.progress = rows, progress

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Batch]:
        for number, row in enumerate(self.rows):
            self.progress(number, len(self.rows), "calibration rows (NNCF)")
            yield row


@contextlib.contextmanager
def _quiet() -> Iterator[Any]:
    """NNCF imported, without its telemetry, its prints, and the C++ extension that it would compile at first use."""
    os.environ["NNCF_CI"] = "1"
    import nncf
    from nncf.torch.quantization.extensions import QuantizedFunctionsCPU
    from nncf.torch.quantization.reference import ReferenceBackendType, ReferenceQuantize

    plain = ReferenceQuantize(ReferenceBackendType.TORCH)
    log, functions = logging.getLogger("nncf"), QuantizedFunctionsCPU._loaded_namespace
    level = log.level
    log.setLevel(logging.ERROR)
    QuantizedFunctionsCPU._loaded_namespace = SimpleNamespace(Quantize_forward=plain.forward)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield nncf
    finally:
        log.setLevel(level)
        QuantizedFunctionsCPU._loaded_namespace = functions


def _graph(model: nn.Module, row: Batch) -> Any:
    from nncf.torch.function_hook.nncf_graph.nncf_graph_builder import build_nncf_graph

    with _told_as_user_error():
        return build_nncf_graph(model, dict(row))


def _corrected(model: nn.Module, made: nn.Module) -> dict[str, Tensor]:
    """Biases that NNCF changed, by path."""
    before: Iterable[tuple[str, nn.Parameter]] = model.named_parameters()
    now = dict(made.named_parameters())
    found = {}
    for name, parameter in before:
        new = now.get(f"model.{name}")
        if name.endswith("bias") and new is not None and not parameter.equal(new):
            found[name] = new.detach().clone()
    return found
