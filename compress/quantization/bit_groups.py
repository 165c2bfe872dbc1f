"""Sites that have to share their bits, what each may become, and the bytes it has then. No data is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from calibrate.errors import UserError
from calibrate.grid import Grid
from compress.anatomy import Anatomy, Site
from compress.layers import QuantLinear
from compress.quantization.quantized_sites import plan_sites, site_job, site_layer
from compress.quantization.site_options import Choice, SiteOptions, label, options_of, overridden

if TYPE_CHECKING:
    from compress.layers.conversion import QuantizedLayer
    from compress.passes.quantize import Quantize

__all__ = ["FLOAT", "BitGroup", "bit_groups"]

FLOAT: Literal["float"] = "float"
_NOTHING = "no candidate that all sites with its weight can take"


@dataclass(frozen=True)
class BitGroup:
    """Sites that hold one weight, most often a single one.

    Attributes:
        paths: the sites, in the model's order.
        followers: those of them that are no target of their own and follow the first.
        role: of the first.
        block: index of the block that holds all of them, or None.
        numbers: of the weight.
        settings: what they may become, by label.
        refused: settings that they cannot take, with the reason.
        whole: bytes as they are now.
        sizes: bytes at each setting, room for the factors of smoothed inputs among them; what only they hold counts.
    """

    paths: tuple[str, ...]
    followers: tuple[str, ...]
    role: str
    block: int | None
    numbers: int
    settings: Mapping[str, SiteOptions]
    refused: Mapping[str, str]
    whole: int
    sizes: Mapping[str, int]

    @property
    def name(self) -> str:
        return self.paths[0]

    def override(self, setting: str) -> dict[str, Choice | SiteOptions]:
        """The option of ``quantize`` that gives the group this setting, or leaves it float."""
        options = SiteOptions(weights=FLOAT) if setting == FLOAT else self.settings[setting]
        value: Choice | SiteOptions = options if options.activations or options.weights is None else options.weights
        return {path: value for path in self.paths if path not in self.followers}


@dataclass
class _Draft:
    """One site while groups are made."""

    site: Site
    leader: Site | None
    settings: dict[str, SiteOptions] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    layers: dict[str, QuantizedLayer] = field(default_factory=dict)


def bit_groups(
    step: Quantize,
    model: nn.Module,
    anatomy: Anatomy,
    candidates: Sequence[Choice | SiteOptions],
    *,
    undo: bool = False,
    strict: bool = True,
) -> tuple[list[BitGroup], dict[str, str]]:
    """The groups of all sites that ``step`` would quantize, and sites that stay float whatever is chosen, with the reason.

    A group that can take none of the candidates has float as its only setting. A site that ``step.overrides`` names has that
    setting alone, with ``undo`` float too; a head that shares a table's codes has the table's settings.

    Args:
        step: without ``mixed`` and ``max_drop``.
        candidates: settings that a site may have.
        strict: whether each of them has to be one that some site can take.

    Raises:
        UserError: a candidate that no site can take, if ``strict``.
    """
    jobs, skipped = plan_sites(step, model, anatomy)
    own = overridden(anatomy, step.overrides, {job.site.path for job in jobs} | set(skipped), step.name)
    drafts = [_Draft(job.site, job.table) for job in jobs]
    wanted = {label(options): options for options in map(options_of, candidates)}
    for draft in drafts:
        path = (draft.leader or draft.site).path
        rest = {name: options for name, options in wanted.items() if undo and name == FLOAT}
        _settle(step, model, draft, {label(own[path]): own[path]} | rest if path in own else wanted)
    if strict:
        _refuse_untaken(step, drafts, wanted)
    found = [_group(model, members, step.smooth is not False) for members in _tied(model, drafts)]
    alone = [group for group in found if set(group.settings) == {FLOAT}]
    stuck = {path: "; ".join(group.refused.values()) or _NOTHING for group in alone for path in group.paths}
    return found, skipped | stuck


def _refuse_untaken(step: Quantize, drafts: Sequence[_Draft], wanted: Mapping[str, SiteOptions]) -> None:
    """Raises UserError for a candidate that no site can take."""
    for name, options in wanted.items():
        if not drafts or options.weights == FLOAT or any(name in draft.settings for draft in drafts):
            continue
        reason = next((draft.refused[name] for draft in drafts if name in draft.refused), "all sites have overrides")
        hint = "Name a group_size that fits, or take it out of candidates." if "group_size" in reason else ""
        raise UserError(step.name, f"mixed: no site can take {name}: {reason}", hint or "Take it out of candidates.")


def _settle(step: Quantize, model: nn.Module, draft: _Draft, wanted: Mapping[str, SiteOptions]) -> None:
    """Finds which of the settings a site can take, and its layers there."""
    for name, options in wanted.items():
        if options.weights == FLOAT:
            draft.settings[name] = options
            continue
        try:
            with torch.device("meta"):
                draft.layers[name] = site_layer(step, model, site_job(step, model, draft.site, options, draft.leader))
        except UserError as error:
            draft.refused[name] = error.what
        else:
            draft.settings[name] = options


def _tied(model: nn.Module, drafts: Sequence[_Draft]) -> list[list[_Draft]]:
    """The drafts by the weight that they hold."""
    found: dict[int, list[_Draft]] = {}
    for draft in drafts:
        found.setdefault(id(model.get_submodule(draft.site.path).weight), []).append(draft)
    return list(found.values())


def _group(model: nn.Module, members: Sequence[_Draft], factors: bool) -> BitGroup:
    first = members[0]
    paths = tuple(draft.site.path for draft in members)
    shared = {name: first.settings[name] for name in first.settings if all(name in draft.settings for draft in members)}
    shared = shared or {FLOAT: SiteOptions(weights=FLOAT)}
    refused = {name: reason for draft in members for name, reason in draft.refused.items()}
    blocks = {draft.site.block for draft in members}
    return BitGroup(
        paths=paths,
        followers=tuple(draft.site.path for draft in members if draft.leader),
        role=", ".join(first.site.roles),
        block=first.site.block if len(blocks) == 1 else None,
        numbers=int(model.get_submodule(first.site.path).get_parameter("weight").numel()),
        settings=shared,
        refused=refused,
        whole=_float_bytes(model, paths),
        sizes={name: _bytes(model, paths, [draft.layers.get(name) for draft in members], factors) for name in shared},
    )


def _bytes(model: nn.Module, paths: Sequence[str], layers: Sequence[QuantizedLayer | None], factors: bool) -> int:
    """What a group holds at one setting: equal grids share codes, and a weight that others hold too stays in float."""
    size = 0
    grids: list[Grid] = []
    for layer in layers:
        if layer is None:
            return _float_bytes(model, paths)
        codes, activation = layer.quantized_weight, layer.activation
        size += sum(tensor.nbytes for tensor in (*layer.parameters(), *layer.buffers()))
        if codes.grid in grids:
            size -= sum(tensor.nbytes for tensor in codes.buffers())
        grids.append(codes.grid)
        if factors and isinstance(layer, QuantLinear) and activation is not None and activation.kind == "static":
            size += 4 * layer.in_features
    modules = {id(model.get_submodule(path)) for path in paths}
    others = {id(tensor) for module in model.modules() if id(module) not in modules for tensor in _own(module)}
    return size + sum(tensor.nbytes for tensor in _parameters(model, paths) if id(tensor) in others)


def _float_bytes(model: nn.Module, paths: Sequence[str]) -> int:
    return sum(parameter.nbytes for parameter in _parameters(model, paths))


def _parameters(model: nn.Module, paths: Sequence[str]) -> list[Tensor]:
    found = {id(p): p for path in paths for p in _own(model.get_submodule(path))}
    return list(found.values())


def _own(module: nn.Module) -> list[Tensor]:
    return [parameter for parameter in module._parameters.values() if parameter is not None]
