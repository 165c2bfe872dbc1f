"""Feed-forward layers: projection, nonlinearity (times a gate), projection back into the residual stream."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from compress.anatomy.flow import Flow
from compress.anatomy.joins import rejoins

__all__ = ["FeedForward", "find_feedforward"]

NONLINEAR = frozenset(
    {
        "relu",
        "relu6",
        "gelu",
        "silu",
        "sigmoid",
        "hardswish",
        "hardsigmoid",
        "hardtanh",
        "tanh",
        "erf",
        "leaky_relu",
        "elu",
        "selu",
        "celu",
        "softplus",
        "mish",
        "pow",
        "square",
        "exp",
        "clamp",
        "clamp_min",
        "glu",
        "prelu",
        "rrelu",
        "threshold",
        "softsign",
        "log_sigmoid",
        "log_sigmoid_forward",
        "maximum",
    }
)

_Part = tuple[int, object]
"""A projection and which piece of its output (packed gate and up are pieces of one)."""


@dataclass(frozen=True)
class FeedForward:
    """One MLP: projections (steps of the graph) by role.

    ``inner`` describes what lies between up and down if filters (grouped convolutions) do, else it is empty: such a chain
    is an MLP in one model and an inverted residual, a plain convolution block, in another.
    """

    roles: dict[str, tuple[int, ...]]
    inner: tuple[str, ...]

    @property
    def projections(self) -> list[int]:
        return sorted({index for indices in self.roles.values() for index in indices})


def find_feedforward(flow: Flow, joins: set[int], cores: set[int], taken: set[int]) -> list[FeedForward]:
    """All MLPs in order of the graph; ``taken`` are projections that have a role already."""
    ends = joins | cores
    found = []
    for down, weight in flow.projections.items():
        if down in taken or not weight.pointwise or not flow.steps[down].live:
            continue
        roles = _sources(flow, down, ends)
        ups = roles["mlp.up"] + roles["mlp.gate"] if roles else ()
        if roles and not taken & set(ups) and _rejoins(flow, down, ups, joins):
            found.append(FeedForward({**roles, "mlp.down": (down,)}, _inner(flow, roles["mlp.up"], down)))
    return found


def _rejoins(flow: Flow, down: int, ups: tuple[int, ...], joins: set[int]) -> bool:
    """Whether the output reaches the join around the MLP with nothing but norms, scales and sums on the way."""

    def stop(index: int) -> bool:
        if index in joins or index in flow.projections or index in flow.products:
            return True
        return flow.steps[index].op in NONLINEAR and flow.steps[index].path not in flow.norm_modules

    return any(index in joins and rejoins(flow, index, (down, *ups)) for index in flow.forward(down, stop))


def _sources(flow: Flow, down: int, ends: set[int]) -> dict[str, tuple[int, ...]] | None:
    """Up and gate of a down projection, from whether the ways to them pass a nonlinearity; None if it is no MLP."""
    parts = _parts(flow, flow.data(down), ends)
    active = sorted({index for (index, _), ways in parts.items() if True in ways})
    plain = sorted({index for (index, _), ways in parts.items() if True not in ways})
    if len(active) != 1 or len(plain) > 1:
        return None
    if not all(flow.projections[index].pointwise and flow.steps[index].live for index in active + plain):
        return None
    return {"mlp.up": tuple(plain or active), "mlp.gate": tuple(active) if plain else ()}


def _parts(flow: Flow, start: int, ends: set[int]) -> dict[_Part, set[bool]]:
    """For each piece of a projection before ``start``: whether ways from it pass a nonlinearity, and whether ways do not."""
    parts: dict[_Part, set[bool]] = defaultdict(set)
    seen: set[tuple[int, bool, object]] = set()
    queue: list[tuple[int, bool, object]] = [(start, False, None)]
    while queue:
        state = queue.pop()
        index, active, piece = state
        if state in seen or index in ends or index in flow.products or not flow.steps[index].live:
            continue
        seen.add(state)
        step = flow.steps[index]
        if index in flow.projections:
            beneath = _filtered(flow, index, ends)
            if not beneath:
                parts[index, piece].add(active)
                continue
        elif step.op == "glu":
            queue += [(source, way, f"half {way}") for source in step.inputs for way in (False, True)]
            continue
        elif step.op in ("getitem", "select", "slice", "narrow"):
            piece = (step.op, *(argument for argument in step.arguments[1:] if isinstance(argument, int)))
        active = active or (step.op in NONLINEAR and step.path not in flow.norm_modules)
        queue += [(source, active, piece) for source in flow.sources(index)]
    return parts


def _filtered(flow: Flow, index: int, ends: set[int]) -> list[int]:
    """The projections right before a grouped convolution; it is only a filter on what they give."""
    return flow.backward_projections(flow.data(index), ends) if flow.projections[index].groups > 1 else []


def _inner(flow: Flow, ups: tuple[int, ...], down: int) -> tuple[str, ...]:
    between = [index for index in range(ups[0] + 1, down) if flow.after[ups[0]] >> index & 1 and flow.before[down] >> index & 1]
    if not any(index in flow.projections for index in between):
        return ()
    names = [
        f"{flow.steps[index].op}{flow.projections[index].shape[2:] if index in flow.projections else ''}"
        for index in between
        if index in flow.projections or index in flow.norms or flow.steps[index].op in NONLINEAR
    ]
    return (flow.projections[down].kind, *names)
