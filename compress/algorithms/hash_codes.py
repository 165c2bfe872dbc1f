"""Attention by hash codes: a softmax over scores as a weight of each key times an agreement of bits. Tensors in, tensors out.

EcoFormer (Liu et al. 2022, arXiv 2209.09004) weighs a key by how many bits its code shares with the query's. Its codes come from
kernelised hashing (Liu et al. 2012, CVPR, "Supervised hashing with kernels", sec. 2): the sign of linear combinations of a
Gaussian kernel to a few anchors. A model that was trained with softmax attention has queries and keys that are not alike; here

    exp(q.k / sqrt(D)) = exp(m.k / sqrt(D)) * exp((q - m).k / sqrt(D)),    m the mean of the queries,

so the first factor, which needs no query, is kept as it is (the key's gate), and the codes stand for the second alone, as

    1 + sum over bits of weight * code(q) * code(k)  >  0.

Both together are one row of weights over keys, divided by its sum: what is added to every key is added in the numerator and in
the denominator alike, and rows sum to one.

Shapes: B batch, H heads, T queries, S keys, D head width, M anchors, N bits, P 2 (queries and keys apart) or 1 (both alike).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

__all__ = ["FLOOR", "HashCodes", "blend", "row_weights", "sign", "softmax_rows", "through"]

FLOOR = 1 / 64
"""Least agreement: the weights of the bits sum to at most one minus this, so that no weight of a key is below zero or near it."""
_TINY = 1e-12


@dataclass(frozen=True)
class HashCodes:
    """What turns queries and keys into codes and codes into weights.

    Attributes:
        centre: [2, H, D], taken off queries and off keys before they are brought to length one.
        anchors: [H, M, D], of length one, drawn from both.
        width: [H], of the Gaussian kernel.
        projection: [P, H, N, M], from the kernel's values to the bits before their sign.
        shift: [P, H, N], taken off there: what the mean of the kernel's values gives, so that bits come out even.
        weights: [H, N], at least 0, of sum at most ``1 - FLOOR`` a head.
        gate: [H, D]; ``exp(gate.k)`` weighs the key k.
    """

    centre: Tensor
    anchors: Tensor
    width: Tensor
    projection: Tensor
    shift: Tensor
    weights: Tensor
    gate: Tensor

    def tensors(self) -> dict[str, Tensor]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def but(self, **changed: Any) -> HashCodes:
        return replace(self, **changed)

    def kernel(self, x: Tensor, side: int) -> Tensor:
        """Gaussian kernel of queries (side 0) or keys (side 1) [B, H, T, D] to the anchors, [B, H, T, M].

        Of length one they lie at ``|x|^2 + |a|^2 - 2 x.a`` from an anchor: a product and no differences of pairs.
        """
        moved = x - self.centre[side].unsqueeze(1)
        unit = moved * (moved.square().sum(-1, keepdim=True) + _TINY).rsqrt()
        squares = self.anchors.square().sum(-1).unsqueeze(-2) + 1
        distance = squares - 2 * (unit @ self.anchors.transpose(-1, -2))
        return torch.exp(distance * (-0.5 / self.width.square())[:, None, None])

    def signal(self, kernel: Tensor, side: int) -> Tensor:
        """The bits of queries or keys before their sign, [B, H, T, N], from their kernel's values [B, H, T, M]."""
        own = side % len(self.projection)
        return kernel @ self.projection[own].transpose(-1, -2) - self.shift[own].unsqueeze(1)

    def codes(self, x: Tensor, side: int, signed: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Codes in {-1, 1} of queries (side 0) or keys (side 1) [B, H, T, D], [B, H, T, N].

        Args:
            signed: ``through`` where gradients should pass; None: ``sign``.
        """
        return (signed or sign)(self.signal(self.kernel(x, side), side))

    def key_logits(self, keys: Tensor, bias: Tensor | None = None) -> Tensor:
        """Logarithm of the keys' weights without any query, [B, H, S, 1].

        Args:
            bias: [B, 1 or H, S, 1], what a mask adds to the scores of each key.
        """
        logits = keys @ self.gate.unsqueeze(-1)
        return logits if bias is None else logits + bias


def sign(x: Tensor) -> Tensor:
    """1 where x is at least 0, else -1."""
    return torch.where(x >= 0, 1.0, -1.0).to(x.dtype)


def through(x: Tensor) -> Tensor:
    """The sign, with the gradient of clamping to -1 and 1."""
    near = x.clamp(-1, 1)
    return near + (sign(x) - near).detach()


def blend(query_codes: Tensor, key_codes: Tensor, weights: Tensor, key_logits: Tensor, values: Tensor) -> Tensor:
    """Values weighed by agreement of codes and the keys' own weights, without a matrix of T x S.

    Args:
        query_codes: [B, H, T, N]; key_codes: [B, H, S, N].
        weights: [H, N]; key_logits: [B, H, S, 1]; values: [B, H, S, D].

    Returns:
        [B, H, T, D]; each row is a mean of the values, with weights that are at least 0 and sum to one.
    """
    gate = torch.exp(key_logits - key_logits.amax(-2, keepdim=True))
    gate = gate / gate.sum(-2, keepdim=True)
    gated = gate * key_codes
    weighed = query_codes * weights.unsqueeze(1)
    everywhere = (gate * values).sum(-2, keepdim=True)
    numerator = everywhere + weighed @ (gated.transpose(-1, -2) @ values)
    denominator = 1 + weighed @ gated.sum(-2).unsqueeze(-1)
    return numerator / denominator


def row_weights(query_codes: Tensor, key_codes: Tensor, weights: Tensor, key_logits: Tensor) -> Tensor:
    """The matrix [B, H, T, S] that ``blend`` does without; its rows sum to one."""
    gate = torch.exp(key_logits - key_logits.amax(-2, keepdim=True)).transpose(-1, -2)
    rows = gate * (1 + (query_codes * weights.unsqueeze(1)) @ key_codes.transpose(-1, -2))
    return rows / rows.sum(-1, keepdim=True)


def softmax_rows(queries: Tensor, keys: Tensor, scale: float, bias: Tensor | None = None) -> Tensor:
    """Softmax attention [B, H, T, S]; ``bias`` as in ``HashCodes.key_logits``."""
    scores = queries @ keys.transpose(-1, -2) * scale
    return (scores if bias is None else scores + bias.transpose(-1, -2)).softmax(-1)
