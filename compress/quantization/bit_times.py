"""Bits under a budget of measured time: what each kind of layer takes at each setting, in files, and the choice whose own file
takes no longer than asked.

Groups of one role and size are timed together, everything else as it was, so that what a setting saves stands out of the noise;
each then counts for its share. Layers are timed with codes that mean nothing, since kernels take the same time for any. Times of
groups are taken to add up; how far that holds is measured on the chosen bits, really rounded, and the budget is corrected by
what was found.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import nn

from calibrate.errors import UserError
from calibrate.latency import Timing
from compress.algorithms.knapsack import frontier
from compress.quantization.bit_groups import FLOAT, BitGroup
from compress.rehearsal import stand_in
from compress.surgery import Surgery
from compress.time_budget import Fit, fit, short

if TYPE_CHECKING:
    from compress.passes.contract import Context, Latency
    from compress.passes.quantize import Quantize

__all__ = ["SettingTimes", "Settings", "in_time", "setting_times"]

Settings = dict[str, str]
"""The setting of each group by its name."""

_UNIT = 1e-5
"""Of the whole model's time: the step in which times are added up."""
_NOISE = 0.02


@dataclass(frozen=True)
class SettingTimes:
    """What settings take.

    Attributes:
        groups: in the order of ``added``.
        added: for each group, by setting, time beyond that of the group as it was, as a share of the whole model's; below 0 where
            it saves.
        table: for each kind of group and setting what was measured, as a report tells it.
    """

    groups: Sequence[BitGroup]
    added: list[dict[str, float]]
    table: list[dict[str, Any]]

    @property
    def least(self) -> float:
        """The time of the fastest assignment, as a share of that of the whole model."""
        return 1.0 + sum(min(one.values()) for one in self.added)

    def proposals(self, losses: Sequence[Mapping[str, float]]) -> Callable[[float, bool], tuple[Settings, float]]:
        """For a budget of time the assignment of least loss, and the time that is predicted for it (see ``fit``).

        Args:
            losses: of each group by setting; they add up.

        Raises:
            UserError: when it is first called, with a budget that no assignment meets.
        """
        cheapest = [min(one.values()) for one in self.added]
        names = [list(group.settings) for group in self.groups]
        costs = [
            [round((one[name] - low) / _UNIT) for name in own] for one, low, own in zip(self.added, cheapest, names, strict=True)
        ]
        curve = frontier(costs, [[lost[name] for name in own] for lost, own in zip(losses, names, strict=True)])

        def propose(budget: float, first: bool) -> tuple[Settings, float]:
            point = curve.within((budget - self.least) / _UNIT)
            if point is None and first:
                enough = self.least + _NOISE
                hint = f"Ask for {enough:.2f} or more, or add faster candidates, or sites."
                if enough > 1:
                    hint = "None of them is faster than float here: add float, or ask for size_ratio or loss_db instead."
                raise UserError(
                    "quantize",
                    f"mixed asks for latency_ratio {budget:g}, and the least that is expected of these candidates is about "
                    f"{self.least:.3f}",
                    hint,
                )
            point = point or 0
            picked = zip(self.groups, names, curve.choices(point), strict=True)
            return {group.name: own[choice] for group, own, choice in picked}, self.least + float(curve.costs[point]) * _UNIT

        return propose


def setting_times(
    model: nn.Module, groups: Sequence[BitGroup], make: Callable[[Settings], nn.Module], latency: Latency
) -> SettingTimes:
    """Times the model with each kind of group at each of its settings, in interleaved runs.

    Args:
        make: the model with groups at settings, the others as they were, with layers as they will be but for the values.
    """
    alike: dict[tuple[Any, ...], list[int]] = {}
    for number, group in enumerate(groups):
        alike.setdefault((group.role, group.numbers, tuple(group.sizes.items())), []).append(number)
    asked = [(members, name) for members in alike.values() for name in groups[members[0]].settings if name != FLOAT]

    def models() -> Iterator[nn.Module]:
        yield model
        for members, name in asked:
            yield make({groups[number].name: name for number in members})

    added: list[dict[str, float]] = [{FLOAT: 0.0} if FLOAT in group.settings else {} for group in groups]
    table = []
    for (members, name), timing in zip(asked, latency(models())[1:], strict=True):
        assert timing.ratio is not None
        for number in members:
            added[number][name] = (timing.ratio.value - 1.0) / len(members)
        first = groups[members[0]]
        table.append(
            {
                "role": first.role,
                "like": first.name,
                "groups": len(members),
                "setting": name,
                "measured": short(timing.ratio.value),
                "low": short(timing.ratio.low),
                "high": short(timing.ratio.high),
            }
        )
    return SettingTimes(groups, added, table)


def in_time(
    step: Quantize,
    model: nn.Module,
    context: Context,
    groups: Sequence[BitGroup],
    losses: Sequence[Mapping[str, float]],
    ratio: float,
    fixed: Callable[[Settings], Quantize],
) -> tuple[Fit[Settings], dict[str, Any]]:
    """The settings of least loss with which a file takes no longer than a share of the time, and what is to be told.

    Args:
        losses: of each group by setting.
        fixed: the pass with given settings, and no budget.

    Raises:
        UserError: no file can be timed, or not even the fastest settings are predicted to be so fast.
    """
    latency = context.latency
    if latency is None:
        what = "mixed: latency_ratio is measured, and no file can be timed here"
        raise UserError(step.name, what, "Write size_ratio or loss_db, or add onnx to export.")

    def make(settings: Settings) -> nn.Module:
        trial = stand_in(model)
        rest = {group.name: FLOAT for group in groups if group.name not in settings}
        fixed(rest | settings).rehearse(trial, context.anatomy, Surgery())
        return trial

    def measure(settings: Settings) -> Sequence[Timing]:
        rounds = set(settings.values()) != {FLOAT}
        trial = fixed(settings).run(stand_in(model), replace(context, report={}, surgery=Surgery())) if rounds else model
        context.progress(1, 2, "time of the chosen bits")
        return latency([model, trial])

    context.progress(0, 2, "time of each setting")
    times = setting_times(model, groups, make, latency)
    done = fit(times.proposals(losses), ratio, measure)
    return done, done.json() | {"table": times.table} | latency.conditions
