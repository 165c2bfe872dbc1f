"""Bytes of a model by the role of what holds them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from calibrate.inventory import inventory
from compress.anatomy import Anatomy
from compress.report import RoleBytes
from compress.surgery import Edit
from compress.whereabouts import Whereabouts

__all__ = ["Roles", "bytes_by_role", "holders_of"]

_OTHER = "other"


@dataclass(frozen=True)
class Roles:
    """The layers of the float model with their roles, where they are, and the bytes of each role.

    Attributes:
        holders: paths of the layers -> their roles in one string.
        before: bytes by role.
    """

    holders: Mapping[str, str]
    whereabouts: Whereabouts
    before: Mapping[str, int]

    @classmethod
    def of(cls, model: nn.Module, anatomy: Anatomy) -> Roles:
        """Those of a model that no pass has changed."""
        holders = holders_of(anatomy)
        return cls(holders, Whereabouts.of(model, holders), bytes_by_role(model, holders))

    def after(self, model: nn.Module, edits: Sequence[Edit]) -> list[RoleBytes]:
        """Bytes by role before and after the edits that made this model, the largest first and what has no role last."""
        places = {path: self.whereabouts.after(path, edits) for path in self.holders}
        now = bytes_by_role(model, {place: self.holders[path] for path, place in places.items() if place is not None})
        roles = sorted(self.before.keys() | now.keys(), key=lambda role: (role == _OTHER, -self.before.get(role, 0), role))
        return [RoleBytes(role=role, before=self.before.get(role, 0), after=now.get(role, 0)) for role in roles]


def holders_of(anatomy: Anatomy) -> dict[str, str]:
    """The layers of a model by path, with their roles in one string (``attention.query, attention.key``: a fused one); those
    that own what they hold come before those that are tied to them."""
    ordered = sorted(anatomy.sites, key=lambda site: site.tied is not None)
    return {site.path: ", ".join(site.roles) or _OTHER for site in ordered}


def bytes_by_role(model: nn.Module, holders: Mapping[str, str]) -> dict[str, int]:
    """Bytes of all parameters and buffers by the role of the innermost layer that holds them; their sum is that of
    ``inventory``. A tied tensor counts once, for the first of its holders; what no layer holds is ``other``."""
    first: dict[int, tuple[int, str]] = {}
    order = {path: place for place, path in enumerate(holders)}
    tensors = _tensors(model)
    for name, tensor in tensors.items():
        holder = _holder(name, holders)
        found = (len(order), _OTHER) if holder is None else (order[holder], holders[holder])
        first[id(tensor)] = min(first.get(id(tensor), found), found)
    totals: dict[str, int] = {}
    for name, entry in inventory(model).items():
        role = first[id(tensors[name])][1]
        totals[role] = totals.get(role, 0) + entry.bytes
    return totals


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer under each of its names."""
    return dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))


def _holder(name: str, holders: Mapping[str, str]) -> str | None:
    path = name
    while path and path not in holders:
        path = path.rpartition(".")[0]
    return path if path in holders else None
