"""Repairs a projection without labels: the least-squares weights with which it gives the outputs that are wanted of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from calibrate.capture import counted, given, received
from calibrate.signature import Batch
from compress.algorithms.least_squares import Moments, solve
from compress.layers import Absent
from compress.layers.conversion import is_conv1d

__all__ = ["Repaired", "Wanted", "held_out", "outputs_at", "repair"]

Call = Callable[[nn.Module, Batch], Tensor]
Wanted = Callable[[Batch], Tensor]
"""What a projection should give for a batch, in the layout in which it gives it."""

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Pulls towards the old weights that are tried, in mean squares of the inputs; the held-out rows choose."""
_LESS, _ROUNDING = 0.999, 1e-12
"""What counts as better: this share of the error, where that is more than rounding in float32."""


@dataclass(frozen=True)
class Repaired:
    """What was done at one projection.

    Attributes:
        before, after: squared error over the power of what is wanted, on the held-out rows.
        ridge: the pull that was chosen; None: the old weights stay, because nothing was better.
    """

    path: str
    before: float
    after: float
    ridge: float | None
    because: str = ""

    def json(self) -> dict[str, Any]:
        return asdict(self)


def repair(model: nn.Module, call: Call, path: str, wanted: Wanted, fit: Iterable[Batch], held: Iterable[Batch]) -> Repaired:
    """Gives the projection at ``path`` the weights (and bias, if it has one) with which it comes nearest to what is wanted.

    W' = argmin |X W' - Y|^2 + ridge |W' - W|^2 over the rows of ``fit``, X being what the projection receives in the model
    as it is now; padded positions do not count. It is applied only where the error on the rows of ``held`` gets smaller.
    The parameters are replaced, not written into, so that another model that shares them keeps its own.

    Args:
        path: of a linear layer, a GPT-2 ``Conv1D``, a 1 x 1 convolution, or an ``Absent`` layer with a bias.
        wanted: what it should give, such as ``outputs_at(original, call, path)``.
        held: rows that are not in ``fit``.
    """
    module = model.get_submodule(path)
    reason = _obstacle(module)
    if reason:
        return Repaired(path, 0.0, 0.0, None, reason)
    weights, offset = _weights(module)
    sums = [Moments(weights.shape[0] - int(offset), weights.shape[1], offset) for _ in range(2)]
    for rows, moments in zip((fit, held), sums, strict=True):
        _gather(model, call, path, wanted, rows, moments)
    before = sums[1].error(weights)
    best, ridge = before, None
    chosen = weights
    for pull in RIDGES:
        found = solve(sums[0], weights, pull)
        error = sums[1].error(found)
        if error < min(best, _LESS * before) and before > _ROUNDING:
            best, ridge, chosen = error, pull, found
    if ridge is None:
        return Repaired(path, before, before, None, "nothing was better on the held-out rows")
    _store(module, chosen, offset)
    return Repaired(path, before, best, ridge)


def outputs_at(model: nn.Module, call: Call, path: str) -> Wanted:
    """What the module at ``path`` of a model gives for a batch (in its first call)."""
    return lambda batch: given(model, call, path, batch)


def held_out(batches: Iterable[Batch], share: float = 0.25) -> tuple[list[Batch], list[Batch]]:
    """The batches to fit on, and those to judge on: of every so many rows the last ones, at least one row each."""
    fit: list[Batch] = []
    held: list[Batch] = []
    for batch in batches:
        rows = next(iter(batch.values())).shape[0]
        cut = rows - max(1, round(rows * share)) if rows > 1 else len(fit) <= 3 * len(held)
        for part, chosen in ((fit, slice(0, int(cut))), (held, slice(int(cut), rows))):
            if chosen.start < chosen.stop:
                part.append({name: tensor[chosen] for name, tensor in batch.items()})
    return fit, held


def _obstacle(module: nn.Module) -> str:
    if isinstance(module, Absent):
        return "" if module.bias is not None else "nothing is left of it, and it has no bias"
    weight = getattr(module, "weight", None)
    if not isinstance(weight, nn.Parameter):
        return "its weight is quantized"
    if isinstance(module, nn.Conv2d):
        plain = module.kernel_size == (1, 1) and module.groups == 1 and module.stride == (1, 1)
        return "" if plain else "it is a convolution with a window"
    return "" if weight.dim() == 2 else "it is no linear layer"


def _weights(module: nn.Module) -> tuple[Tensor, bool]:
    """Weights [I (+ 1), O] in float64, the bias as the last row, and whether there is one."""
    bias = getattr(module, "bias", None)
    weight = getattr(module, "weight", None)
    if weight is None:
        matrix = torch.zeros(0, len(bias), dtype=torch.float64)  # type: ignore[arg-type]
    elif is_conv1d(module):
        matrix = weight.detach().double().cpu()
    else:
        matrix = weight.detach().double().cpu().flatten(1).T
    if bias is None:
        return matrix, False
    return torch.cat([matrix, bias.detach().double().cpu().unsqueeze(0)]), True


def _store(module: nn.Module, weights: Tensor, offset: bool) -> None:
    if offset:
        bias = module.get_parameter("bias")
        module.register_parameter("bias", _like(bias, weights[-1]))
        weights = weights[:-1]
    if getattr(module, "weight", None) is not None:
        weight = module.get_parameter("weight")
        matrix = weights if is_conv1d(module) else weights.T.reshape(weight.shape)
        module.register_parameter("weight", _like(weight, matrix))


def _like(old: Tensor, values: Tensor) -> nn.Parameter:
    return nn.Parameter(values.to(old.dtype).to(old.device).contiguous(), requires_grad=old.requires_grad)


def _gather(model: nn.Module, call: Call, path: str, wanted: Wanted, rows: Iterable[Batch], sums: Moments) -> None:
    """Adds what the projection receives and what is wanted of it, at positions that count."""
    inputs, outputs = len(sums.gram) - int(sums.offset), sums.cross.shape[1]
    axis = 1 if isinstance(model.get_submodule(path), nn.Conv2d) else -1
    for batch in rows:
        x, y = received(model, call, path, batch).movedim(axis, -1), wanted(batch).movedim(axis, -1)
        valid = counted(y, batch.get("attention_mask"))
        if valid is not None:
            x, y = x[valid.to(x.device)], y[valid.to(y.device)]
        y = y.reshape(-1, outputs)
        sums.add(x.reshape(-1, inputs) if inputs else y.new_zeros(len(y), 0), y)
