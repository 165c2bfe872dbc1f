"""Scales of a rounded weight fitted to its layer's output, in turn with its codes. Tensors in, tensors out.

Shapes: O outputs, I inputs, G groups.
"""

from __future__ import annotations

import torch
from torch import Tensor

from calibrate.grid import Grid
from compress.algorithms.gptq import output_error

__all__ = ["fitted_scales"]

_DAMPING = 1e-4
"""Of the mean diagonal of a row's system: groups whose codes are all zero say nothing."""


def fitted_scales(weight: Tensor, codes: Tensor, hessian: Tensor, grid: Grid, scale: Tensor, zero_point: Tensor | None) -> Tensor:
    """Scales [O, G] with the least output error for codes that stay as they are: no row's error ever grows.

    The output is linear in the scales, so that a row's are the solution of G equations: the half-step over the scales of
    Zhang et al. 2024 (COMQ, arXiv 2403.07134, sec. 3), for all groups of a row at once and with their correlations. They are
    rounded to float16, which every artifact holds; rows that this makes worse, and scales that are no positive normal float16
    number, stay as they were.

    Args:
        weight: [O, I].
        codes: int8 [O, I], of a grid whose scales belong to channels or groups.
        hessian: [I, I], the second moments of the layer's inputs.
    """
    steps = grid.blocks(codes).float()
    if zero_point is not None:
        steps = steps - zero_point.float().unsqueeze(-1)
    outputs, groups, size = steps.shape
    moments = hessian.float()
    matrix = torch.empty(outputs, groups, groups)
    for group in range(groups):
        reach = steps[:, group] @ moments[group * size : (group + 1) * size]
        matrix[:, group] = (reach.reshape(outputs, groups, size) * steps).sum(-1)
    right = ((weight.float() @ moments).reshape(outputs, groups, size) * steps).sum(-1)
    # What is solved for is the change: a damped system then stays where it says nothing.
    right = right - (matrix @ scale.unsqueeze(-1)).squeeze(-1)
    diagonal = matrix.diagonal(dim1=1, dim2=2)
    diagonal += _DAMPING * diagonal.mean(1, keepdim=True) + 1e-30
    found = (scale + torch.linalg.solve(matrix, right)).half().float()
    usable = ((found >= 2.0**-14) & found.isfinite()).all(1)
    errors = [output_error(weight, grid.dequantize(codes, one, zero_point), hessian) for one in (scale, found)]
    return torch.where((usable & (errors[1] < errors[0])).unsqueeze(1), found, scale)
