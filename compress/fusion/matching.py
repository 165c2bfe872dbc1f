"""Which units of one model are which units of another: a transport plan for each axis, from what the units do on the same rows or
from their weights; and the other model's weights along those plans.

Imfeld et al. 2024, arXiv 2310.05719, sec. 4.

Shapes: N units of the other model, M units of the anchor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from compress.algorithms.transport import Solver, averaged, head_plans, spread
from compress.fusion.activations import Activations
from compress.fusion.axes import Axis, Layout

__all__ = ["Pair", "Residual", "plans_by_activations", "plans_by_weights"]

Residual = Literal["shared", "mean", "weighted_scalar", "weighted_matrix", "only_residual", "only_branch"]
Plans = dict[str, Tensor]
_ROUNDS = 10


@dataclass(frozen=True)
class Pair:
    """Two models (the other, the anchor) by their weights and axes, and how the stream's plans are joined (``residual``).

    ``shared`` has one plan for the whole residual stream, as there is one order of its channels in a model: then, and only
    then, a plan that is a permutation leaves the other model's function alone.
    """

    weights: tuple[Mapping[str, Tensor], Mapping[str, Tensor]]
    layouts: tuple[Layout, Layout]
    solver: Solver
    residual: Residual = "shared"

    def axes(self, name: str) -> tuple[Axis, Axis]:
        return self.layouts[0].axes[name], self.layouts[1].axes[name]

    @property
    def names(self) -> list[str]:
        return list(self.layouts[1].axes)

    @property
    def stream(self) -> list[str]:
        return [name for name, axis in self.layouts[1].axes.items() if axis.kind == "stream"]

    @property
    def everywhere(self) -> list[str]:
        """Every axis that counts the channels of the stream."""
        return [name for name, axis in self.layouts[1].axes.items() if axis.kind in ("stream", "branch")]

    def moved(self, name: str, plans: Mapping[str, Tensor], but: int | None = None) -> Tensor:
        """A parameter of the other model in the anchor's axes (``but`` one dimension), in float64.

        What a layer gives becomes an average over the units that move to one; what it reads is spread over the units that one
        moves to. Scores of heads of another width are divided by another root: queries and keys make up for that.
        """
        x = self.weights[0][name].double()
        for dim, pieces in self.layouts[0].uses.get(name, {}).items():
            if dim == but:
                continue
            mapped = []
            for piece, target in zip(pieces, self.layouts[1].uses[name][dim], strict=True):
                plan = plans[target.axis]
                along = averaged(plan) * self._gain(target.axis) if piece.side == "out" else spread(plan)
                mapped.append(x.narrow(dim, piece.start, piece.size).movedim(dim, -1) @ along)
            x = torch.cat(mapped, -1).movedim(-1, dim)
        return x

    def _gain(self, name: str) -> float:
        one, other = self.axes(name)
        ratio: float = (one.size / one.heads) / (other.size / other.heads)
        return ratio**0.25 if one.kind == "query_key" else 1.0

    def solved(self, costs: Mapping[str, Tensor]) -> Plans:
        """Plans for axes out of their costs; queries and keys of a block go with its values."""
        plans: Plans = {}
        for name, cost in costs.items():
            one, other = self.axes(name)
            if name in plans:
                continue
            if one.kind in ("query_key", "value"):
                fellows = [key for key in (f"query_key.{one.block}", f"value.{one.block}") if key in costs]
                given = tuple(self._within(costs[key], key) for key in fellows)
                plans |= dict(zip(fellows, head_plans(given, (one.heads, other.heads), self.solver), strict=True))
            else:
                plans[name] = self.solver.plan(cost)
        return plans

    def _within(self, cost: Tensor, name: str) -> Tensor:
        """Units with an order of their own stay at their places in the head: any other place costs far more."""
        one, other = self.axes(name)
        if not one.ordered and not other.ordered:
            return cost
        size = one.size // one.heads
        there = torch.eye(size, dtype=torch.bool).repeat(one.heads, other.heads)
        return torch.where(there, cost, 1e3 * cost.max().clamp(min=1.0))

    def joined(self, before: Tensor, branch: Tensor, place: int, found: Activations | None) -> Tensor:
        """The stream's plan behind join ``place``, out of its plan before and that of what is added (the paper's sec. 4.3)."""
        if self.residual == "only_residual":
            return before
        if self.residual == "only_branch":
            return branch
        if self.residual == "mean" or found is None:
            return (before + branch) / 2
        quiet, loud = found.loudness[f"stream.{place - 1}"], found.loudness[f"branch.{place}"]
        if self.residual == "weighted_scalar":
            quiet, loud = quiet.mean(), loud.mean()
        share = loud / (quiet + loud).clamp(min=1e-30)
        return before * (1 - share) + branch * share


def plans_by_activations(pair: Pair, found: Activations) -> Plans:
    """A plan for each axis, from how alike its units are on the same rows."""
    inside = [name for name in pair.names if name not in pair.everywhere]
    plans = pair.solved({name: found.cost(name) for name in inside})
    if pair.residual == "shared":
        return plans | dict.fromkeys(pair.everywhere, pair.solver.plan(found.cost(*pair.stream)))
    plans["stream.0"] = pair.solver.plan(found.cost("stream.0"))
    for place, _ in enumerate(pair.layouts[1].sinks, 1):
        plans[f"branch.{place}"] = pair.solver.plan(found.cost(f"branch.{place}"))
        plans[f"stream.{place}"] = pair.joined(plans[f"stream.{place - 1}"], plans[f"branch.{place}"], place, found)
    return plans


def plans_by_weights(pair: Pair) -> Plans:
    """A plan for each axis, from how alike the weights of its units are once what they read is in the anchor's order.

    With one plan for the stream (``shared``) it is found from the embeddings first, and again from all layers, until it stays.
    """
    plans: Plans = {}
    if pair.residual != "shared":
        plans["stream.0"] = pair.solver.plan(_weight_cost(pair, ["stream.0"], plans)[0])
        for place, _ in enumerate(pair.layouts[1].sinks, 1):
            _within_reach(pair, plans)
            plans[f"branch.{place}"] = pair.solver.plan(_weight_cost(pair, [f"branch.{place}"], plans)[0])
            plans[f"stream.{place}"] = pair.joined(plans[f"stream.{place - 1}"], plans[f"branch.{place}"], place, None)
        _within_reach(pair, plans)
        return plans
    for _ in range(_ROUNDS):
        stream = pair.solver.plan(_weight_cost(pair, pair.everywhere, plans)[0])
        if "stream.0" in plans and torch.allclose(stream, plans["stream.0"], rtol=0, atol=1e-12):
            break
        plans = dict.fromkeys(pair.everywhere, stream)
        _within_reach(pair, plans)
    return plans


def _within_reach(pair: Pair, plans: Plans) -> None:
    """Plans of the axes whose layers read what has a plan already; in order, so that one may follow from another."""
    done = False
    while not done:
        open_ = [name for name in pair.names if name not in plans and name not in pair.everywhere]
        asked = {name: _weight_cost(pair, [name], plans) for name in open_}
        costs = {name: cost for name, (cost, known) in asked.items() if known}
        ready = {name: cost for name, cost in costs.items() if pair.axes(name)[0].kind not in ("query_key", "value")}
        for name, cost in costs.items():
            block = pair.axes(name)[0].block
            if {f"query_key.{block}", f"value.{block}"} <= costs.keys():
                ready[name] = cost
        plans |= pair.solved(ready)
        done = not ready


def _weight_cost(pair: Pair, names: list[str], plans: Plans) -> tuple[Tensor, bool]:
    """[N, M]: distance between weights of units of these axes (one and the same axis), over all parameters whose other axes have
    plans; and whether there are others than vectors among them. What reads units counts for models of one width only: of two
    units that do the work of one, each is read with half the weight."""
    one, other = pair.axes(names[0])
    total, matrices = torch.zeros(one.size, other.size, dtype=torch.float64), 0
    for name, dims in pair.layouts[1].uses.items():
        for dim, pieces in dims.items():
            others = {at: inner for at, inner in dims.items() if at != dim}
            if any(piece.axis not in plans for inner in others.values() for piece in inner):
                continue
            if not any(piece.axis in names for piece in pieces):
                continue
            x, y = pair.moved(name, plans, but=dim).movedim(dim, 0), pair.weights[1][name].double().movedim(dim, 0)
            for piece, target in zip(pair.layouts[0].uses[name][dim], pieces, strict=True):
                if target.axis in names and (target.side == "out" or one.size == other.size):
                    a, b = x.narrow(0, piece.start, piece.size), y.narrow(0, target.start, target.size)
                    total += _squared_distance(a.reshape(len(a), -1), b.reshape(len(b), -1))
                    matrices += y.dim() > 1
    return total.sqrt(), matrices > 0


def _squared_distance(a: Tensor, b: Tensor) -> Tensor:
    """Between the rows of two matrices."""
    return (a.square().sum(1)[:, None] + b.square().sum(1) - 2 * a @ b.T).clamp(min=0)
