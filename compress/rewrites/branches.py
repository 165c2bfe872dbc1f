"""Parallel branches of convolutions, norms and identities into one convolution.

Shapes: O outputs, I inputs, g groups, kh and kw the kernel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from compress.anatomy.grouping import within
from compress.layers.plain import Conv2d
from compress.rewrites.batch_norm import scaling_of
from compress.rewrites.rule import Found, Rewrite, Rule, View

__all__ = ["BranchesMerged"]

_MOST = 4
"""Ways to read one value that are followed."""
_KEEPS = frozenset({"dropout", "feature_dropout", "clone", "contiguous", "alias", "detach"})


@dataclass(frozen=True)
class _Form:
    """A value as a convolution of the value at step ``base``: kernel [O, I/g, kh, kw] with odd sides, centred, and a bias [O].

    ``groups`` 0: each channel by itself, a kernel [O, 1, 1, 1]. ``branches`` counts the terms, ``steps`` are those it is made of.
    """

    base: int
    kernel: Tensor
    bias: Tensor
    groups: int
    stride: tuple[int, int]
    branches: int
    steps: frozenset[int]

    def scaled(self, factor: Tensor, shift: Tensor | None, step: int) -> _Form:
        bias = self.bias * factor if shift is None else self.bias * factor + shift
        kernel = self.kernel * factor.reshape(-1, 1, 1, 1)
        return _Form(self.base, kernel, bias, self.groups, self.stride, self.branches, self.steps | {step})

    def plus(self, other: _Form, sign: float, step: int) -> _Form | None:
        """The sum, where both are convolutions of the same value with the same groups and stride."""
        if self.base != other.base or self.stride != other.stride or len(self.bias) != len(other.bias):
            return None
        if self.groups and other.groups and self.groups != other.groups:
            return None
        groups = self.groups or other.groups
        width = max(form.kernel.shape[1] for form in (self, other))
        sides = [max(form.kernel.shape[axis] for form in (self, other)) for axis in (2, 3)]
        one, two = (_spread(form, groups, width, sides) for form in (self, other))
        steps = self.steps | other.steps | {step}
        branches = self.branches + other.branches
        return _Form(self.base, one + sign * two, self.bias + sign * other.bias, groups, self.stride, branches, steps)


class BranchesMerged(Rule):
    """Convolution is linear in its kernel: sum_i a_i (K_i * x + b_i) = (sum_i a_i K_i) * x + sum_i a_i b_i, with smaller kernels
    padded to the largest around their middle, a BatchNorm as the factor and shift of its channels, and the value itself as the
    kernel that is one in the middle (RepVGG, Ding et al. 2021, arXiv 2101.03697, sec. 3.3; MobileOne, Vasu et al. 2022, arXiv
    2206.04040, sec. 3.3; FastViT, Vasu et al. 2023, arXiv 2303.14189, sec. 3.2).

    Found in the graph, not by the name of a class: a module whose output is such a sum of one tensor, or children of it applied
    to that sum. The branches have to share stride and groups and to be padded to the same size.
    """

    name = "branches"

    def find(self, view: View) -> Found:
        found = Found()
        forms = _forms(view)
        placed: set[int] = set()
        left: dict[str, tuple[frozenset[int], str]] = {}
        for index in sorted(forms, reverse=True):
            sums = [form for form in forms[index] if form.branches > 1]
            if not sums or index in placed:
                continue
            tried = [_place(view, index, form) for form in sums]
            made = next(((form, one) for form, one in zip(sums, tried, strict=True) if isinstance(one, Rewrite)), None)
            if made is not None:
                placed |= made[0].steps
                found.rewrites.append(made[1])
            else:
                left.setdefault(view.flow.steps[index].path or f"step {index}", (sums[0].steps, str(tried[0])))
        found.left = {path: reason for path, (steps, reason) in left.items() if not steps & placed}
        return found


Forms = dict[int, list[_Form]]
"""By step, the ways in which its value is a convolution of an earlier one."""


def _forms(view: View) -> Forms:
    forms: Forms = {}
    for step in view.flow.steps:
        made = _of(view, step.index, forms) if step.live and len(step.shape) == 4 else []
        if made:
            forms[step.index] = made
    return forms


def _of(view: View, index: int, forms: Forms) -> list[_Form]:
    flow, step = view.flow, view.flow.steps[index]
    if index in flow.projections:
        made = _convolution(view, index)
        return [] if made is None else [made]
    if index in flow.norms and "batch_norm" in step.op and flow.norms[index]:
        scaling, source = scaling_of(view.model.get_submodule(flow.norms[index])), flow.given(index, 0)
        if scaling is None or source is None:
            return []
        # The trace shows what the norm's module does after it as steps of their own.
        return [form.scaled(scaling.factor, scaling.shift, index) for form in _with_itself(view, source, forms)]
    live = [source for source in step.inputs if flow.steps[source].live]
    if step.op in _KEEPS or (step.op == "add" and len(step.inputs) == 1 and 0 in step.arguments[1:]):
        return [form.scaled(torch.ones_like(form.bias), None, index) for source in live for form in forms.get(source, [])]
    if step.op == "mul" and len(live) == 1 and len(step.inputs) == 2:
        stored = next(source for source in step.inputs if source != live[0])
        factor = _per_channel(view, stored, step.shape)
        return [] if factor is None else [form.scaled(factor, None, index) for form in forms.get(live[0], [])]
    if step.op in ("add", "sub") and len(live) == 2 and not step.options and len(step.arguments) == 2:
        one, two = (flow.given(index, position) for position in (0, 1))
        if one is not None and two is not None:
            return _sums(view, one, two, -1.0 if step.op == "sub" else 1.0, index, forms)
    return []


def _with_itself(view: View, index: int, forms: Forms) -> list[_Form]:
    return [*forms.get(index, []), _itself(view, index)]


def _sums(view: View, one: int, two: int, sign: float, index: int, forms: Forms) -> list[_Form]:
    """The sums of two values that are one convolution; a value alone is one of itself."""
    pairs = [(a, b) for a in _with_itself(view, one, forms) for b in _with_itself(view, two, forms)]
    made = [a.plus(b, sign, index) for a, b in pairs if view.flow.steps[one].shape == view.flow.steps[two].shape]
    return [form for form in made if form is not None][:_MOST]


def _convolution(view: View, index: int) -> _Form | None:
    weight = view.flow.projections[index]
    if weight.kind != "conv2d" or view.fixed(index):
        return None
    module: Any = view.model.get_submodule(weight.path)
    kernel = module.weight.detach().double()
    sides = kernel.shape[2:]
    centred = all(side % 2 and pad == side // 2 for side, pad in zip(sides, module.padding, strict=False))
    if isinstance(module.padding, str) or not centred or any(size != 1 for size in module.dilation):
        return None
    bias = kernel.new_zeros(len(kernel)) if module.bias is None else module.bias.detach().double()
    return _Form(view.flow.data(index), kernel, bias, module.groups, (module.stride[0], module.stride[1]), 1, frozenset({index}))


def _itself(view: View, index: int) -> _Form:
    channels = view.flow.steps[index].shape[1]
    ones = torch.ones(channels, 1, 1, 1, dtype=torch.float64)
    return _Form(index, ones, torch.zeros(channels, dtype=torch.float64), 0, (1, 1), 1, frozenset())


def _per_channel(view: View, stored: int, shape: tuple[int, ...]) -> Tensor | None:
    """A stored factor of each channel [C], or None."""
    step = view.flow.steps[stored]
    if step.tensor is None or len(step.shape) < 3 or step.shape[-2:] != (1, 1) or step.shape[-3] != shape[1]:
        return None
    holder, _, name = step.tensor.rpartition(".")
    tensor: Tensor = getattr(view.model.get_submodule(holder), name)
    return tensor.detach().double().flatten() if tensor.numel() == shape[1] else None


def _spread(form: _Form, groups: int, width: int, sides: list[int]) -> Tensor:
    """The kernel [O, I/g, kh, kw] for so many groups and of that size."""
    kernel = form.kernel
    if not form.groups and groups:
        outputs = len(kernel)
        spread = kernel.new_zeros(outputs, width, 1, 1)
        rows = torch.arange(outputs)
        spread[rows, rows % width] = kernel[:, 0]
        kernel = spread
    high, wide = ((side - size) // 2 for side, size in zip(sides, kernel.shape[2:], strict=True))
    return F.pad(kernel, (wide, wide, high, high))


def _place(view: View, index: int, form: _Form) -> Rewrite | str:
    """The module that the merged convolution takes the place of, or why there is none."""
    flow = view.flow
    path = flow.steps[index].path
    if not path or form.groups == 0:
        return "the sum is made by the model itself" if not path else "no convolution is among the branches"
    inside = {step.index for step in flow.steps if step.live and within(step.path, path)}
    if not form.steps <= inside or form.base in inside:
        return "its branches lie in other modules too"
    if any(user not in form.steps for step in form.steps - {index} for user in flow.steps[step].users):
        return "a branch is read by more than the sum"
    then = _after(view, path, index, inside - form.steps)
    if isinstance(then, str):
        return then
    if reason := view.watched(path):
        return reason
    outputs, stride = len(form.bias), form.stride
    inputs = form.kernel.shape[1] * form.groups
    sides: Any = tuple(form.kernel.shape[2:])
    with torch.device("meta"):
        layer = Conv2d(
            inputs,
            outputs,
            sides,
            stride=stride,
            padding=tuple(side // 2 for side in sides),
            groups=form.groups,
        ).requires_grad_(False)

    def values() -> dict[str, dict[str, Tensor]]:
        kind = next(parameter.dtype for parameter in view.model.parameters() if parameter.is_floating_point())
        return {f"{path}.merged": {"weight": form.kernel.to(kind), "bias": form.bias.to(kind)}}

    says = {path: f"{form.branches} branches become one convolution"}
    return Rewrite(path, says, values, merges={path: (layer, then)})


def _after(view: View, path: str, start: int, rest: set[int]) -> list[str] | str:
    """The children of a module that run on the sum, one after the other, up to the module's output."""
    flow, order, current = view.flow, [], start
    while rest:
        users = [user for user in flow.steps[current].users if user in rest]
        if not users or any(user not in rest for user in flow.steps[current].users):
            return "code of its own follows the sum"
        name = flow.steps[users[0]].path.removeprefix(path + ".").partition(".")[0]
        child = f"{path}.{name}"
        if flow.steps[users[0]].path == path or name in order or "." in name:
            return "code of its own follows the sum"
        mine = {step for step in rest if within(flow.steps[step].path, child)}
        outside = [s for step in mine for s in flow.steps[step].inputs if flow.steps[s].live and s not in mine and s != current]
        ends = [step for step in mine if any(user not in mine for user in flow.steps[step].users)]
        if outside or len(ends) != 1 or not set(users) <= mine:
            return "code of its own follows the sum"
        order.append(name)
        rest, current = rest - mine, ends[0]
    return order
