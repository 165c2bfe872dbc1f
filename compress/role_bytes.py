"""Bytes of a model by the role of what holds them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from calibrate.inventory import inventory
from compress.anatomy import Anatomy
from compress.report import RoleBytes
from compress.surgery import Edit
from compress.whereabouts import Whereabouts

__all__ = ["bytes_by_role", "holders_after", "holders_of", "role_bytes"]

_OTHER = "other"


def holders_of(anatomy: Anatomy) -> dict[str, str]:
    """The layers of a model by path, with their roles in one string (``attention.query, attention.key``: a fused one); those
    that own what they hold come before those that are tied to them."""
    ordered = sorted(anatomy.sites, key=lambda site: site.tied is not None)
    return {site.path: ", ".join(site.roles) or _OTHER for site in ordered}


def holders_after(holders: Mapping[str, str], whereabouts: Whereabouts, edits: Sequence[Edit]) -> dict[str, str]:
    """The same layers where they are after the edits, without those that are gone."""
    now = {path: whereabouts.after(path, edits) for path in holders}
    return {place: holders[path] for path, place in now.items() if place is not None}


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


def role_bytes(before: Mapping[str, int], after: Mapping[str, int]) -> list[RoleBytes]:
    """Both of them, role by role, the largest first and what has no role last."""
    roles = sorted(before.keys() | after.keys(), key=lambda role: (role == _OTHER, -before.get(role, 0), role))
    return [RoleBytes(role=role, before=before.get(role, 0), after=after.get(role, 0)) for role in roles]


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer under each of its names."""
    return dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))


def _holder(name: str, holders: Mapping[str, str]) -> str | None:
    path = name
    while path and path not in holders:
        path = path.rpartition(".")[0]
    return path if path in holders else None
