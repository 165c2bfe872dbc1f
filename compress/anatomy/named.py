"""Roles that a recipe names: they correct what was found, and stand alone where a model cannot be traced."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

from torch import nn

from calibrate.errors import UserError
from compress.anatomy.parts import ROLES, Kind

__all__ = ["kind_of", "layers", "must_name", "named_blocks", "resolve"]


def layers(model: nn.Module) -> dict[str, Kind]:
    """Paths of all modules that hold a weight of their own, and what kind they look like without a trace."""
    found: dict[str, Kind] = {}
    for path, module in model.named_modules():
        kind = kind_of(module)
        if kind and path and not path.endswith(".quantized_weight"):
            found[path] = kind
    return found


def kind_of(module: nn.Module) -> Kind | None:
    """The kind of a layer by its type, None for a module that is not one."""
    from compress.layers.cast import CastConv2d, CastEmbedding, CastLinear
    from compress.layers.quantized import QuantConv2d, QuantEmbedding, QuantLinear

    if isinstance(module, (nn.Linear, QuantLinear, CastLinear)):
        return "linear"
    if isinstance(module, (nn.Conv2d, QuantConv2d, CastConv2d)):
        return "conv2d"
    if isinstance(module, (nn.Embedding, QuantEmbedding, CastEmbedding)):
        return "embedding"
    weight = module._parameters.get("weight")
    if weight is None or list(module.children()):
        return None
    if sum(size > 1 for size in weight.shape) <= 1:
        return "norm"
    # The layer of GPT-2 keeps its widths as nx and nf and its weight as [I, O].
    return "conv1d" if weight.ndim == 2 and getattr(module, "nf", None) == weight.shape[1] else "other"


def resolve(roles: Mapping[str, Sequence[str]], paths: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """For each path that a pattern names, the roles it was given.

    Raises:
        UserError: an unknown role, or a pattern that matches no layer; the nearest names are told.
    """
    from compress.passes.contract import unknown

    given: dict[str, list[str]] = {}
    for role, patterns in roles.items():
        if role not in ROLES:
            raise unknown("roles", "role", role, ROLES)
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            matched = [path for path in paths if fnmatchcase(path, pattern)]
            if not matched:
                raise unknown(f"model.roles.{role}", "pattern", pattern, paths)
            for path in matched:
                given.setdefault(path, []).append(role)
    return {path: tuple(role for role in ROLES if role in found) for path, found in given.items()}


def named_blocks(model: nn.Module, given: Mapping[str, Sequence[str]], known: Sequence[str]) -> list[str]:
    """Entries of module lists that hold named attention or MLP roles and lie in no block that is known already.

    The innermost list whose entries hold an attention and an MLP, or the innermost of all.
    """
    found: dict[str, None] = {}
    placed = {path: roles for path, roles in given.items() if any(r.startswith(("attention.", "mlp.")) for r in roles)}
    for path in placed:
        if any(path.startswith(block + ".") for block in known):
            continue
        around = _entries(model, path)
        whole = [entry for entry in around if _halves(entry, placed) == {"attention", "mlp"}]
        if whole or around:
            found.setdefault((whole or around)[0])
    return [path for path in found if not any(path.startswith(other + ".") for other in found)]


def _entries(model: nn.Module, path: str) -> list[str]:
    """The modules around a path that are entries of a list, the innermost first."""
    around = []
    while path:
        parent = path.rpartition(".")[0]
        if isinstance(model.get_submodule(parent), (nn.ModuleList, nn.Sequential)):
            around.append(path)
        path = parent
    return around


def _halves(entry: str, placed: Mapping[str, Sequence[str]]) -> set[str]:
    inside = [roles for path, roles in placed.items() if path.startswith(entry + ".")]
    return {role.split(".")[0] for roles in inside for role in roles} & {"attention", "mlp"}


def must_name(reason: str) -> UserError:
    """The error for a model that cannot be traced."""
    return UserError(
        "model", f"torch.export could not trace it: {reason}",
        "Name its roles in the recipe, e.g. roles: {attention.query: ['blocks.*.attn.q'], mlp.up: ['blocks.*.fc1']}.",
    )  # fmt: skip
