"""Optimal transport between the units of two layers, and the maps of weights that follow from it.

Imfeld et al. 2024, "Transformer Fusion with Optimal Transport" (arXiv 2310.05719, sec. 4). The solvers are those of POT.

Shapes: N units of the other model, M units of the anchor, H heads, D units in a head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from calibrate.errors import UserError

__all__ = ["Solver", "averaged", "head_plans", "spread"]

_ITERATIONS = 50_000_000


@dataclass(frozen=True)
class Solver:
    """How a plan is found from costs: exactly (``emd``: for equal counts a permutation), or entropy-regularized (``sinkhorn``).

    ``regularization`` is that of Sinkhorn, for costs of which the largest is 1.
    """

    transport: Literal["emd", "sinkhorn"] = "emd"
    regularization: float = 0.06

    def plan(self, cost: Tensor) -> Tensor:
        """The plan [N, M] of least cost between uniform masses: rows sum to 1 / N, columns to 1 / M.

        Args:
            cost: [N, M], not negative.
        """
        return _solved(cost, self)


def _solved(cost: Tensor, solver: Solver) -> Tensor:
    import numpy as np
    import ot

    rows, columns = cost.shape
    scaled: Any = (cost.double() / cost.max().clamp(min=1e-300)).numpy()
    masses = np.full(rows, 1 / rows), np.full(columns, 1 / columns)
    if solver.transport == "emd":
        plan, told = ot.emd(*masses, scaled, numItermax=_ITERATIONS, log=True)
        if told["warning"] is not None:
            raise UserError("transport: emd", f"found no plan for {rows} x {columns} units", "Take transport: sinkhorn.")
    else:
        plan = ot.sinkhorn(*masses, scaled, solver.regularization, method="sinkhorn_log", numItermax=10_000, warn=False)
    return torch.from_numpy(np.ascontiguousarray(plan))


def head_plans(costs: tuple[Tensor, ...], heads: tuple[int, int], solver: Solver) -> tuple[Tensor, ...]:
    """Plans that keep heads together: heads are assigned to heads, by what moving one into the other costs at best, and units
    move inside the pairs only. One assignment of heads for all of the costs.

    A plan that crosses heads would tear the sums apart from which a softmax is made (the paper's sec. 4.2 lets it).

    Args:
        costs: [H0 * D0, H1 * D1] each, of the units of queries and keys, and of those of values.
        heads: of the other model, of the anchor.
    """
    parted = [cost.reshape(heads[0], cost.shape[0] // heads[0], heads[1], -1).transpose(1, 2) for cost in costs]
    inside = [[[solver.plan(part[g, h]) for h in range(heads[1])] for g in range(heads[0])] for part in parted]
    between = torch.zeros(heads, dtype=torch.float64)
    for part, plans in zip(parted, inside, strict=True):
        scale = part.max().clamp(min=1e-300)
        for g in range(heads[0]):
            for h in range(heads[1]):
                between[g, h] += (part[g, h].double() * plans[g][h]).sum() / scale
    assigned = Solver("emd").plan(between)
    return tuple(
        torch.cat([torch.cat([assigned[g, h] * plans[g][h] for h in range(heads[1])], 1) for g in range(heads[0])])
        for plans in inside
    )


def averaged(plan: Tensor) -> Tensor:
    """[N, M] for what units give: each unit of the anchor gets an average of those that move to it; columns sum to 1."""
    return plan / plan.sum(0, keepdim=True)


def spread(plan: Tensor) -> Tensor:
    """[N, M] for what reads units: what read one unit reads those that it moves to, in shares; rows sum to 1.

    For models of different width this is another matrix than ``averaged``: with one normalisation for both, what is read
    grows by the ratio of the widths.
    """
    return plan / plan.sum(1, keepdim=True)
