"""Rounding a weight so that its layer's output, not the weight itself, changes least. Tensors in, tensors out.

Shapes: O outputs, I inputs, G groups.
"""

from __future__ import annotations

import torch
from torch import Tensor

from calibrate.grid import Grid
from compress.algorithms.pair_sums import PairLimit

__all__ = ["NotPositiveDefinite", "gptq", "output_error", "refined"]

_COLUMNS = 128
"""Columns whose errors are handed on together."""


class NotPositiveDefinite(ValueError):
    """The damped Hessian cannot be factored."""


def gptq(
    weight: Tensor,
    hessian: Tensor,
    grid: Grid,
    scale: Tensor,
    zero_point: Tensor | None,
    *,
    damping: float = 0.01,
    order: bool = True,
    limit: PairLimit | None = None,
) -> Tensor:
    """Codes (int8 [O, I]) for a weight by GPTQ (Frantar et al. 2023, arXiv 2210.17323, algorithm 1).

    Columns are rounded one after the other; what rounding one costs is taken over by those that are not rounded yet, as the
    inverse Hessian says. Scales are given beforehand, so that the order of the columns does not move them. Inputs that never
    occurred (a zero on the Hessian's diagonal) are rounded to the nearest code. No row is worse than round-to-nearest on the
    given Hessian: where the greedy order loses, the nearest codes are kept. A diagonal Hessian gives the nearest codes.

    Args:
        weight: [O, I].
        hessian: [I, I], the second moments of the layer's inputs; any positive factor gives the same codes.
        scale, zero_point: of ``Grid``, as ``calibrate.ranges.storable`` makes them.
        damping: fraction of the mean diagonal that is added to the diagonal.
        order: round the columns with the largest second moments first.
        limit: what neighbouring codes of a symmetric grid may be together; the nearest codes that are kept are then those that it
            leaves.

    Raises:
        NotPositiveDefinite: the Hessian plus damping has no Cholesky factor.
    """
    weight = weight.float()
    steps, shifts = _columns(weight, grid, scale), None if zero_point is None else _columns(weight, grid, zero_point.float())
    moments = hessian.float().clone()
    diagonal = moments.diagonal()
    diagonal[diagonal <= 0] = 1.0
    places = diagonal.argsort(descending=True, stable=True) if order else torch.arange(len(diagonal), device=weight.device)
    factor = _inverse_factor(moments[places][:, places], damping)
    codes = torch.empty_like(weight)
    done = torch.zeros(len(places), dtype=torch.bool)
    order_of = torch.empty_like(places)
    order_of[places] = torch.arange(len(places), device=places.device)
    left = weight[:, places]
    for start in range(0, left.shape[1], _COLUMNS):
        end = min(start + _COLUMNS, left.shape[1])
        errors = torch.empty_like(left[:, start:end])
        for column in range(start, end):
            place = int(places[column])
            values = left[:, column]
            step, shift = steps[:, place], None if shifts is None else shifts[:, place]
            if limit is None or place ^ 1 >= len(places):
                chosen, back = _nearest(values, grid, step, shift)
            else:
                partner = place ^ 1
                waits = not bool(done[partner])
                beside = left[:, order_of[partner]] if waits else codes[:, partner]
                chosen, back = _within(limit, place, values, beside, waits, grid, (steps, shifts))
                done[place] = True
            codes[:, place] = chosen
            error = (values - back) / factor[column, column]
            left[:, column:end] -= error.unsqueeze(1) * factor[column, column:end]
            errors[:, column - start] = error
        left[:, end:] -= errors @ factor[start:end, end:]
    return _no_worse(weight, codes.to(torch.int8), hessian, grid, scale, zero_point, limit)


def refined(
    weight: Tensor,
    codes: Tensor,
    hessian: Tensor,
    grid: Grid,
    scale: Tensor,
    zero_point: Tensor | None,
    sweeps: int,
    limit: PairLimit | None = None,
) -> Tensor:
    """The codes after ``sweeps`` rounds of coordinate descent on the layer's output error: no row's error ever grows.

    Each column in turn takes the code that is best given all others (Behdin et al. 2023, arXiv 2309.01885, sec. 3).
    """
    steps, shifts = _columns(weight, grid, scale), None if zero_point is None else _columns(weight, grid, zero_point.float())
    weight, moments = weight.float(), hessian.float()
    values = grid.dequantize(codes, scale, zero_point)
    codes = codes.float()
    for _ in range(sweeps):
        before = codes.clone()
        error = weight - values
        for start in range(0, weight.shape[1], _COLUMNS):
            end = min(start + _COLUMNS, weight.shape[1])
            slopes = error @ moments[:, start:end]
            for column in range(start, end):
                curvature = float(moments[column, column])
                if curvature <= 0:
                    continue
                best = values[:, column] + slopes[:, column - start] / curvature
                shift = None if shifts is None else shifts[:, column]
                chosen, back = _nearest(best, grid, steps[:, column], shift)
                if limit is not None and column ^ 1 < weight.shape[1]:
                    chosen = chosen.clamp(*limit.bounds(codes[:, column ^ 1]))
                    back = _value(chosen, steps[:, column], shift)
                moved = values[:, column] - back
                codes[:, column], values[:, column] = chosen, back
                error[:, column] += moved
                slopes += moved.unsqueeze(1) * moments[column, start:end]
        if torch.equal(before, codes):
            break
    return codes.to(torch.int8)


def output_error(weight: Tensor, values: Tensor, hessian: Tensor) -> Tensor:
    """[O]: the squared error of each output when ``values`` stands for ``weight``, in units of the Hessian."""
    error = weight.float() - values.float()
    return ((error @ hessian.float()) * error).sum(1)


def _no_worse(
    weight: Tensor,
    codes: Tensor,
    hessian: Tensor,
    grid: Grid,
    scale: Tensor,
    zero_point: Tensor | None,
    limit: PairLimit | None,
) -> Tensor:
    nearest = grid.quantize(weight, scale, zero_point)
    if limit is not None:
        nearest = limit.project(nearest)
    errors = [output_error(weight, grid.dequantize(given, scale, zero_point), hessian) for given in (codes, nearest)]
    return torch.where((errors[0] <= errors[1]).unsqueeze(1), codes, nearest)


def _within(
    limit: PairLimit,
    place: int,
    values: Tensor,
    partner: Tensor,
    waits: bool,
    grid: Grid,
    parameters: tuple[Tensor, Tensor | None],
) -> tuple[Tensor, Tensor]:
    """As ``_nearest``, for one input beside its partner: that one's weights, while it waits to be rounded, or its codes."""
    steps, shifts = parameters
    step, shift = steps[:, place], None if shifts is None else shifts[:, place]
    if waits:
        mine, theirs = values / step, partner / steps[:, place ^ 1]
        chosen = limit.share((place, place ^ 1), mine, theirs).round().clamp(grid.low, grid.high)
    else:
        chosen = _nearest(values, grid, step, shift)[0].clamp(*limit.bounds(partner))
    return chosen, _value(chosen, step, shift)


def _value(codes: Tensor, step: Tensor, shift: Tensor | None) -> Tensor:
    return codes * step if shift is None else (codes - shift) * step


def _nearest(values: Tensor, grid: Grid, step: Tensor, shift: Tensor | None) -> tuple[Tensor, Tensor]:
    """Codes (as floats) of one column [O] and the values they stand for."""
    if shift is None:
        codes = (values / step).round().clamp(grid.low, grid.high)
        return codes, codes * step
    codes = ((values / step).round() + shift).clamp(grid.low, grid.high)
    return codes, (codes - shift) * step


def _columns(weight: Tensor, grid: Grid, parameter: Tensor) -> Tensor:
    """A parameter [O, G] or [1, 1] for each weight, [O, I], without memory of its own where it does not change."""
    outputs, inputs = weight.shape
    if parameter.shape[1] == 1:
        return parameter.expand(outputs, inputs)
    return parameter.repeat_interleave(inputs // parameter.shape[1], 1)


def _inverse_factor(moments: Tensor, damping: float) -> Tensor:
    """The upper Cholesky factor of the inverse of the damped Hessian, [I, I]."""
    moments.diagonal().add_(damping * float(moments.diagonal().mean()))
    lower, failed = torch.linalg.cholesky_ex(moments)
    upper = lower
    if not int(failed):
        upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
    if not int(failed) and bool(upper.isfinite().all()):
        factor: Tensor = upper
        return factor
    raise NotPositiveDefinite(f"the Hessian with {damping:g} of its mean diagonal added has no Cholesky factor")
