"""The second moments of a layer's inputs: what a rounding error of its weight does to its output.

Shapes: N positions, C channels.
"""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor

from calibrate.ranges import Observer

__all__ = ["SecondMoment"]


class SecondMoment(Observer):
    """``E[x x^T]`` over all counted positions as ``matrix`` [C, C] float32, and ``mean`` [C]; constant memory, 4 C**2 bytes.

    Up to a factor the Hessian of the squared output error in one row of the weight (Frantar et al. 2023, arXiv 2210.17323,
    sec. 3). Sums are kept in float32 over the mean so far: cuts into batches change it by rounding only.
    """

    def __init__(self) -> None:
        self.count = 0
        self.matrix = torch.zeros(0, 0)
        self.mean = torch.zeros(0)

    @property
    def key(self) -> Hashable:
        return "second moment"

    def update(self, values: Tensor) -> None:
        values = values.detach().float()
        if not self.count:
            self.matrix = torch.zeros(values.shape[1], values.shape[1], device=values.device)
            self.mean = torch.zeros(values.shape[1], device=values.device)
        total = self.count + values.shape[0]
        self.matrix.addmm_(values.t(), values, beta=self.count / total, alpha=1 / total)
        self.mean += (values.mean(0) - self.mean) * (values.shape[0] / total)
        self.count = total
