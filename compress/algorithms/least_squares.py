"""Least squares from sums that are gathered batch by batch, with a pull towards the weights that are there."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["Moments", "solve"]


class Moments:
    """Second moments of inputs and wanted outputs, in float64; memory does not grow with the positions.

    Attributes:
        gram: sum of x x', [I, I], where x ends with a 1 if there is an offset.
        cross: sum of x y', [I, O].
        power: sum of the squares of y.
        count: positions.
    """

    def __init__(self, inputs: int, outputs: int, offset: bool) -> None:
        width = inputs + int(offset)
        self.offset = offset
        self.gram = torch.zeros(width, width, dtype=torch.float64)
        self.cross = torch.zeros(width, outputs, dtype=torch.float64)
        self.power = 0.0
        self.count = 0

    def add(self, inputs: Tensor, wanted: Tensor) -> None:
        """Adds positions: inputs [N, I] and what is wanted for them, [N, O]."""
        x, y = inputs.detach().double().cpu(), wanted.detach().double().cpu()
        if self.offset:
            x = torch.cat([x, x.new_ones(x.shape[0], 1)], 1)
        self.gram += x.T @ x
        self.cross += x.T @ y
        self.power += float(y.square().sum())
        self.count += x.shape[0]

    def error(self, weights: Tensor) -> float:
        """Squared error of x' weights over the power of what is wanted; weights [I, O] in float64."""
        residue = self.power - 2 * float((weights * self.cross).sum()) + float((weights * (self.gram @ weights)).sum())
        return max(residue, 0.0) / self.power if self.power else 0.0


def solve(moments: Moments, weights: Tensor, ridge: float) -> Tensor:
    """The W' [I, O] with the least |X W' - Y|^2 + ridge * m * |W' - W|^2, m being the mean diagonal of X'X.

    The offset (last row) is not pulled. Everything in float64.
    """
    diagonal = moments.gram.diagonal()
    size = len(diagonal) - int(moments.offset)
    pull = torch.zeros_like(diagonal)
    if size:
        pull[:size] = ridge * diagonal[:size].mean().clamp(min=torch.finfo(torch.float64).tiny)
    if moments.offset:
        pull[size:] = 1e-12 * max(moments.count, 1)
    right = moments.cross - moments.gram @ weights
    factor, failed = torch.linalg.cholesky_ex(moments.gram + torch.diag(pull))
    if int(failed):
        return weights
    change = torch.cholesky_solve(right, factor)
    return weights + change
