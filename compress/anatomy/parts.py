"""What ``find`` returns: sites with their roles, blocks, and the whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal

from calibrate.errors import UserError
from calibrate.signature import Batch, Signature
from compress.anatomy.bridges import Bridge

__all__ = ["ROLES", "Anatomy", "Block", "Kind", "Site"]

Kind = Literal["linear", "conv1d", "conv2d", "embedding", "norm", "other"]

ROLES = (
    "attention.query", "attention.key", "attention.value", "attention.out", "mlp.up", "mlp.gate", "mlp.down",
    "norm", "embedding", "head", "conv", "linear",
)  # fmt: skip
"""``linear`` is a projection that has none of the other roles; ``conv`` a convolution that has none."""


@dataclass(frozen=True)
class Site:
    """One layer with weights.

    Attributes:
        path: module path in the user's model; where no module of its own owns the weight, the path of the parameter
            (kind ``other``).
        roles: out of ``ROLES``; several for fused projections, none for parameters that are no layer.
        kind: ``conv1d`` is GPT-2's layer with a weight [I, O]; ``other`` is any weight that is not in a layer of the
            other kinds (1-D and 3-D convolutions among them).
        block: index of the block that holds it, or None.
        shape: of the weight.
        parameters: numbers in weight and bias (a quantized weight counts its values).
        flops: 2 * multiply-accumulates for one row of the batch, over all calls; 0 where the layer was not traced.
        bytes: parameters and buffers as they are stored.
        tied: path of the site that owns the same weight, and how many of the ``parameters`` and ``bytes`` it owns;
            totals count those there.
    """

    path: str
    roles: tuple[str, ...]
    kind: Kind
    block: int | None
    shape: tuple[int, ...]
    parameters: int
    flops: int
    bytes: int
    tied: str | None = None
    tied_parameters: int = 0
    tied_bytes: int = 0


@dataclass(frozen=True)
class Block:
    """The smallest module that holds one attention and its MLP (or one of them alone).

    ``container`` is the path of the ``ModuleList`` or ``Sequential`` that holds it, at ``position``. ``heads``,
    ``kv_heads`` and ``head_dim`` are those of its (largest) attention. ``attention_flops`` are those of the products of
    queries, keys and values, for one row.
    """

    index: int
    path: str
    container: str | None
    position: int
    heads: int | None
    kv_heads: int | None
    head_dim: int | None
    sites: tuple[Site, ...]
    attention_flops: int = 0

    @property
    def roles(self) -> dict[str, list[str]]:
        """Module paths by role."""
        return _by_role(self.sites)

    @property
    def parameters(self) -> int:
        return _total(self.sites, "parameters")

    @property
    def bytes(self) -> int:
        return _total(self.sites, "bytes")

    @property
    def flops(self) -> int:
        return sum(site.flops for site in self.sites) + self.attention_flops


@dataclass(frozen=True)
class Anatomy:
    """The parts of a transformer: every layer with weights is a site, in the order of the graph.

    ``unplaced`` are paths of linear layers, convolutions and embeddings that got no role, or that the trace did not reach.
    ``loose_flops`` are those of products of values outside all blocks, for one row.
    """

    model: str
    sites: tuple[Site, ...]
    blocks: tuple[Block, ...]
    joins: int
    unplaced: tuple[str, ...] = ()
    loose_flops: int = 0
    named: tuple[str, ...] = field(default=())
    """Paths whose roles the recipe named."""
    signature: Signature | None = field(default=None, repr=False, compare=False)
    example: Batch | None = field(default=None, repr=False, compare=False)
    """What the model was traced with: two rows."""
    bridges: tuple[Bridge, ...] = ()
    """Where features of convolutions become tokens, and back."""

    @property
    def roles(self) -> dict[str, list[str]]:
        """Module paths by role, over the whole model."""
        return _by_role(self.sites)

    @property
    def totals(self) -> dict[str, int]:
        """Parameters, FLOPs of one row, and bytes; tied weights count once."""
        flops = sum(site.flops for site in self.sites) + sum(b.attention_flops for b in self.blocks) + self.loose_flops
        return {"parameters": _total(self.sites, "parameters"), "flops": flops, "bytes": _total(self.sites, "bytes")}

    @property
    def traced(self) -> tuple[Signature, Batch]:
        """What the model takes and gives, and the two rows that it was traced with."""
        assert self.signature is not None
        assert self.example is not None
        return self.signature, self.example

    def site(self, path: str) -> Site:
        """The site at a path.

        Raises:
            KeyError: there is none.
        """
        return next((site for site in self.sites if site.path == path), None) or _missing(path)

    def select(self, patterns: Sequence[str], where: str = "") -> list[Site]:
        """Sites that any pattern names, each once, in the order of the graph.

        Args:
            patterns: roles (``attention.query``, ``mlp.*``) or module paths (``blocks.*.fc1``); ``*``, ``?`` and ``[]``
                as in ``fnmatch``.
            where: the place of the option, for the error.

        Raises:
            UserError: a pattern matches nothing; the nearest names that exist are told.
        """
        chosen: set[str] = set()
        for pattern in patterns:
            matched = {site.path for site in self.sites if _matches(site, pattern)}
            if not matched:
                raise self._unknown(pattern, where)
            chosen |= matched
        return [site for site in self.sites if site.path in chosen]

    def json(self) -> dict[str, Any]:
        """The same as plain values, for ``compress inspect --json``; every name in it is stable."""
        roles = self.roles
        return {
            "model": self.model,
            "blocks": [_block_json(block) for block in self.blocks],
            "embeddings": roles.get("embedding", []),
            "head": roles.get("head", []),
            "convolutions": roles.get("conv", []),
            "norms": roles.get("norm", []),
            "joins": self.joins,
            "bridges": [_bridge_json(bridge) for bridge in self.bridges],
            "unplaced": list(self.unplaced),
            "totals": self.totals,
            "sites": [_site_json(site) for site in self.sites],
        }

    def _unknown(self, pattern: str, where: str) -> UserError:
        from compress.passes.contract import unknown

        found = set(self.roles)
        if pattern in ROLES:
            there = ", ".join(role for role in ROLES if role in found) or "none"
            return UserError(where, f"this model has no {pattern!r}", f"Roles that were found: {there}.")
        return unknown(where, "target", pattern, found | {site.path for site in self.sites})


def _matches(site: Site, pattern: str) -> bool:
    return fnmatchcase(site.path, pattern) or any(fnmatchcase(role, pattern) for role in site.roles)


def _missing(path: str) -> Site:
    raise KeyError(path)


def _by_role(sites: Sequence[Site]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for role in ROLES:
        paths = [site.path for site in sites if role in site.roles]
        if paths:
            found[role] = paths
    return found


def _total(sites: Sequence[Site], what: Literal["parameters", "bytes"]) -> int:
    return sum(int(getattr(site, what)) - int(getattr(site, f"tied_{what}")) for site in sites)


def _block_json(block: Block) -> dict[str, Any]:
    names = ("index", "path", "container", "position", "heads", "kv_heads", "head_dim", "roles")
    return {name: getattr(block, name) for name in (*names, "parameters", "flops", "bytes")}


def _bridge_json(bridge: Bridge) -> dict[str, Any]:
    return {"crossing": bridge.crossing, "before": list(bridge.before), "after": list(bridge.after)}


def _site_json(site: Site) -> dict[str, Any]:
    return {**vars(site), "roles": list(site.roles), "shape": list(site.shape)}
