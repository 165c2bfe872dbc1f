"""Shows an anatomy: as a tree for people, as JSON for programs."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from compress.anatomy import ROLES, Anatomy, Block, Site

if TYPE_CHECKING:
    from rich.text import Text
    from rich.tree import Tree

__all__ = ["count", "render", "size", "to_json"]

_OUTSIDE = (
    ("embedding", "embeddings"),
    ("conv", "convolutions"),
    ("norm", "norms"),
    ("linear", "other layers"),
    ("head", "head"),
)
"""Sections of sites outside blocks; the first stands before the blocks, the others after."""


def render(anatomy: Anatomy) -> Tree:
    """A tree of the model's parts with parameters, FLOPs of one row and bytes; blocks that are alike are shown once.

    Two blocks are alike when their paths differ in numbers only and their layers have the same roles and shapes.
    """
    from rich.tree import Tree

    totals = anatomy.totals
    tree = Tree(_line(anatomy.model, "", totals["parameters"], totals["flops"], totals["bytes"], style="bold"))
    outside = [site for site in anatomy.sites if site.block is None]
    for role, title in _OUTSIDE[:1]:
        _section(tree, title, [site for site in outside if role in site.roles])
    for alike in _runs(anatomy.blocks):
        _block(tree, alike)
    for role, title in _OUTSIDE[1:]:
        _section(tree, title, [site for site in outside if role in site.roles and "embedding" not in site.roles])
    _section(tree, "loose parameters", [site for site in outside if not site.roles])
    _unplaced(tree, anatomy)
    return tree


def to_json(anatomy: Anatomy) -> str:
    """``Anatomy.json()`` as text, indented."""
    return json.dumps(anatomy.json(), indent=2)


def count(number: int) -> str:
    """A number to three digits: 1.23 M."""
    for limit, unit in ((10**12, " T"), (10**9, " G"), (10**6, " M"), (10**3, " k")):
        if number >= limit:
            return f"{number / limit:.3g}{unit}"
    return str(number)


def size(number: int) -> str:
    """Bytes to three digits: 1.23 MB (10**6)."""
    return f"{count(number)}B" if number >= 1000 else f"{number} B"


def _line(name: str, note: str, parameters: int, flops: int, stored: int, style: str = "") -> Text:
    from rich.text import Text

    text = Text(name, style=style)
    if note:
        text.append(f"  {note}", style="cyan")
    text.append(f"  {count(parameters)} parameters · {count(flops)} FLOPs · {size(stored)}", style="dim")
    return text


def _sums(sites: Iterable[Site]) -> tuple[int, int, int]:
    found = list(sites)
    return (
        sum(site.parameters - site.tied_parameters for site in found),
        sum(site.flops for site in found),
        sum(site.bytes - site.tied_bytes for site in found),
    )


def _section(tree: Tree, title: str, sites: Sequence[Site]) -> None:
    if not sites:
        return
    branch = tree.add(_line(title, "", *_sums(sites)))
    for site in sites:
        branch.add(_site(site, site.path))


def _site(site: Site, name: str) -> Text:
    shape = "×".join(map(str, site.shape))
    tied = f", tied to {site.tied}" if site.tied else ""
    return _line(name, f"{site.kind} {shape}{tied}", site.parameters, site.flops, site.bytes)


def _runs(blocks: Sequence[Block]) -> list[list[Block]]:
    """Neighbouring blocks that are alike, together."""
    runs: list[list[Block]] = []
    for block in blocks:
        if runs and _make(runs[-1][0]) == _make(block) and runs[-1][0].container == block.container:
            runs[-1].append(block)
        else:
            runs.append([block])
    return runs


def _make(block: Block) -> list[tuple[object, ...]]:
    cut = len(block.path) + 1
    return [(site.path[cut:], site.roles, site.kind, site.shape, site.bytes) for site in block.sites]


def _block(tree: Tree, alike: Sequence[Block]) -> None:
    block = alike[0]
    numbers = f"block {block.index}" if len(alike) == 1 else f"blocks {block.index}-{alike[-1].index}"
    branch = tree.add(_line(f"{numbers} {block.path}", _heads(alike), block.parameters, block.flops, block.bytes))
    cut = len(block.path) + 1 if block.path else 0
    for part in ("attention", "mlp"):
        sites = [site for site in block.sites if any(role.startswith(part + ".") for role in site.roles)]
        if sites:
            parameters, flops, stored = _sums(sites)
            flops += block.attention_flops if part == "attention" else 0
            inner = branch.add(_line(part, "", parameters, flops, stored))
            for names, site in _named(sites, part):
                inner.add(_site(site, f"{names}: {site.path[cut:]}"))
    rest = [site for site in block.sites if not any("." in role for role in site.roles)]
    for role in (*ROLES, ""):
        for site in rest:
            if (site.roles[0] if site.roles else "") == role:
                branch.add(_site(site, f"{role or 'parameter'}: {site.path[cut:]}"))


def _named(sites: Iterable[Site], part: str) -> list[tuple[str, Site]]:
    """Each site with its roles in this part, in the order of the roles."""
    found = []
    for site in sites:
        roles = [role for role in site.roles if role.startswith(part + ".")]
        found.append((ROLES.index(roles[0]), " + ".join(role.split(".")[1] for role in roles), site))
    return [(names, site) for _, names, site in sorted(found, key=lambda item: item[0])]


def _heads(alike: Sequence[Block]) -> str:
    block = alike[0]
    notes = [f"{len(alike)} alike, each"] if len(alike) > 1 else []
    if block.heads:
        shared = f" ({block.kv_heads} for keys and values)" if block.kv_heads != block.heads else ""
        notes.append(f"{block.heads} head{'s'[: block.heads != 1]}{shared} of {block.head_dim}")
    return ", ".join(notes)


def _unplaced(tree: Tree, anatomy: Anatomy) -> None:
    from rich.text import Text

    if not anatomy.unplaced:
        tree.add(Text("every layer has a role", style="green"))
        return
    branch = tree.add(Text(f"not placed: {len(anatomy.unplaced)} (name their roles in the recipe)", style="yellow"))
    for path in anatomy.unplaced:
        branch.add(Text(path, style="yellow"))
