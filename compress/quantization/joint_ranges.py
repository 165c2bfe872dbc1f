"""Bridges of hybrids, calibrated jointly: later layers are searched on what the earlier ones give when they are rounded.

Lee et al. 2023 (Q-HyViT, arXiv 2303.12557): ranges change most where features of convolutions become tokens and back, and what
one side of that boundary loses the other has to take. So the layers of a bridge keep running rounded while the ranges of those
after them are searched, by the same weighted error of the outputs; the rest of the model is float meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from calibrate.errors import UserError
from compress.algorithms.range_search import Ranges, Reader, search_ranges
from compress.anatomy import Anatomy, Bridge
from compress.depth.grafts import grafting
from compress.depth.output_scores import first_rows
from compress.layers.fitting import Seen, finite
from compress.quantization.hessian_ranges import POSITIONS, best_of, decibels, readers, schemes, settled
from compress.quantization.output_gradients import Felt, felt, felt_again
from compress.quantization.quantized_sites import Job, by_tensor, input_grid

if TYPE_CHECKING:
    from compress.passes.contract import Context
    from compress.passes.quantize import Quantize

__all__ = ["joint_ranges", "require_bridges"]

Made = Callable[[Job, Seen], nn.Module]
"""The layer that will stand at a site, with the ranges that were seen."""


def require_bridges(step: Quantize, anatomy: Anatomy, jobs: Sequence[Job]) -> None:
    """Refuses to calibrate bridges jointly where there are none, or none with both sides rounded.

    Raises:
        UserError: so.
    """
    if step.bridges == "alone":
        return
    if not anatomy.bridges:
        what = "bridges: joint: no convolution of this model makes features that become tokens of an attention"
        raise UserError(step.name, what, "Leave bridges out.")
    rounded = {job.site.path for job in jobs if job.rounds_input}
    if not any(rounded & set(bridge.before) and rounded & set(bridge.after) for bridge in anatomy.bridges):
        first = anatomy.bridges[0]
        what = f"bridges: joint: no bridge has both sides rounded (the first: {first.before[-1]} to {first.after[0]})"
        raise UserError(step.name, what, 'Name the convolutions too: sites: ["attention.*", "mlp.*", conv].')


def joint_ranges(
    step: Quantize, model: nn.Module, context: Context, jobs: list[Job], inputs: dict[str, Seen], made: Made
) -> dict[str, Seen]:
    """What was seen, with new ranges for those layers of each bridge that come after others of it; the report names them.

    A search begins with what was found for the layer alone, so that the error of the bridge never grows by it.
    """
    if step.bridges == "alone" or step.range != "hessian":
        return inputs
    found, said = dict(inputs), []
    rows = first_rows(context.calibration(), step.range_rows)
    for number, bridge in enumerate(context.anatomy.bridges):
        context.progress(number, len(context.anatomy.bridges), f"bridge at {bridge.before[-1]}")
        groups = _groups(bridge, jobs, found)
        says: dict[str, Any] = {"crossing": bridge.crossing, "before": list(bridge.before), "after": list(bridge.after)}
        if len(groups) < 2:
            said.append(says | {"calibrated": "alone: fewer than two of its inputs are rounded by searched ranges"})
            continue
        paths = [job.site.path for group in groups for job in group]
        heard = felt(model, context.call, rows, paths, positions=POSITIONS, seed=context.seed)
        one = _Bridge(step, model, context, rows, heard, made)
        errors = [one.calibrate(groups[:place], group, found) for place, group in enumerate(groups) if place]
        gain = decibels(sum(error[0] for error in errors), sum(error[1] for error in errors))
        said.append(says | {"calibrated": "jointly", "gain_db": finite(gain)})
    context.report["bridges"] = said
    return found


def _groups(bridge: Bridge, jobs: Sequence[Job], inputs: Mapping[str, Seen]) -> list[list[Job]]:
    """The layers of a bridge with searched ranges, and all that read a tensor with one of them: by tensor, in order."""
    searched = [job for job in jobs if job.rounds_input and job.site.path in inputs and inputs[job.site.path].searched]
    return [group for group in by_tensor(searched, inputs).values() if {job.site.path for job in group} & set(bridge.paths)]


@dataclass(frozen=True)
class _Bridge:
    """What the layers of a bridge receive in the float model, and how the outputs hang on what they give."""

    step: Quantize
    model: nn.Module
    context: Context
    rows: list[dict[str, Tensor]]
    heard: dict[str, Felt]
    made: Made

    @torch.no_grad()
    def calibrate(self, earlier: Sequence[list[Job]], group: list[Job], found: dict[str, Seen]) -> tuple[float, float]:
        """Puts new ranges of a group into ``found``; the error with those found for it alone, and with the new ones."""
        layers = {job.site.path: self.made(job, found[job.site.path]) for one in earlier for job in one}
        leader = group[0].site.path
        with grafting(self.model, layers):
            given = felt_again(self.model, self.context.call, self.rows, {leader: self.heard[leader]})[leader]
        factor = found[leader].factor
        clean, given = (x if factor is None else x * factor for x in (self.heard[leader].inputs, given))
        alone = {scheme: self._alone(group, found, clean, scheme) for scheme in schemes(self.step)}
        mine = readers(self.step, self.model, group, found[leader], self.heard)
        wanted = [replace(reader, wanted=reader.apply(clean, reader.weight)) for reader in mine]
        searches = {scheme: self._search(found[leader], given, wanted, scheme, begun) for scheme, begun in alone.items()}
        chosen = found[leader].searched
        assert chosen is not None
        before = searches[chosen.symmetric].before
        found |= settled(group, found, searches, chosen.gain_db)
        return before, best_of(searches)[1].after

    def _alone(self, group: list[Job], found: dict[str, Seen], clean: Tensor, symmetric: bool) -> Ranges:
        """The ranges that were found for a group alone, or are, for the scheme that was not taken."""
        searched = [found[job.site.path].searched for job in group]
        kept = [one for one in searched if one is not None and one.symmetric == symmetric]
        if len(kept) == len(group):
            return Ranges(kept[0].low, kept[0].high, tuple((one.scale, one.zero_point) for one in kept), 0.0, 0.0)
        seen = found[group[0].site.path]
        return self._search(seen, clean, readers(self.step, self.model, group, seen, self.heard), symmetric)

    def _search(self, seen: Seen, given: Tensor, readers: list[Reader], symmetric: bool, begun: Ranges | None = None) -> Ranges:
        grid = input_grid(self.step, symmetric)
        return search_ranges(given, readers, grid, *seen.range(grid), begun=begun)
