"""Models whose fusion is known: the same function in another order, or twice as wide with every unit there twice."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from calibrate.signature import Batch, Signature
from compress.anatomy import Anatomy, find
from compress.fusion.axes import Layout, Piece, layout_of, random_orders, reordered


def parts(model: nn.Module, signature: Signature, rows: list[Batch]) -> tuple[Anatomy, Layout]:
    anatomy = find(model, signature, {name: tensor[:2] for name, tensor in rows[0].items()})
    return anatomy, layout_of(model, anatomy, "the model")


def permuted(model: nn.Module, layout: Layout, seed: int = 1) -> nn.Module:
    """A copy with its heads, neurons and channels in another order: the same function."""
    other, orders = copy.deepcopy(model), random_orders(layout, seed)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            parameter.copy_(reordered(parameter, layout.uses.get(name, {}), orders))
    return other


def stored(model: nn.Module, path: Path) -> str:
    """The weights in a file, tied ones once; its name."""
    save_file({name: one.detach().clone() for name, one in model.named_parameters()}, path)
    return str(path)


def doubled(model: nn.Module, wide: nn.Module, layouts: tuple[Layout, Layout], heads: bool) -> None:
    """Fills ``wide``, whose axes are twice as long, so that it computes what ``model`` does: every unit is there twice, and what
    reads it reads each with half the weight.

    Args:
        layouts: of the model and of the wide one.
        heads: whether there are twice as many heads, rather than heads twice as wide.
    """
    weights = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in wide.named_parameters():
            x = weights[name].detach()
            for dim, pieces in layouts[0].uses.get(name, {}).items():
                x = torch.cat([_twice(x.narrow(dim, p.start, p.size), dim, p, layouts[0], heads) for p in pieces], dim)
            parameter.copy_(x)


def _twice(x: Tensor, dim: int, piece: Piece, layout: Layout, heads: bool) -> Tensor:
    axis = layout.axes[piece.axis]
    if heads and axis.heads > 1:
        shape = (axis.heads, axis.size // axis.heads)
        order = torch.arange(axis.size).reshape(shape).repeat_interleave(2, 0).flatten()
    else:
        order = torch.arange(axis.size).repeat_interleave(2)
    x = x.index_select(dim, order)
    if piece.side == "in":
        return x / 2
    # Scores of wider heads are divided by a larger root, and are sums of twice as many products.
    return x * 2**-0.25 if axis.kind == "query_key" and not heads else x
