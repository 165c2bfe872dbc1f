"""Attention whose products are of one-bit numbers, with what the bits leave estimated by products of rank one.

Shapes: B batch, H heads, T queries, S keys, D width of a head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from compress.algorithms.straight_through import stepped
from compress.layers.attention_terms import AttentionCall
from compress.layers.redirected import Redirecting

__all__ = ["BinaryProducts"]


class BinaryProducts(Redirecting, nn.Module):
    """The two products of attention in one bit (BiPFT: Xing et al. 2024, AAAI).

    Queries, keys and values are signs about a threshold of each channel times one scale, probabilities 0 or one scale. With
    (Qb + Rq)(Kb + Rk)^T = Qb Kb^T + Qb Rk^T + Rq Kb^T + Rq Rk^T, what the first term leaves is estimated from learnt vectors w:
    q_m k_p^T + q_p k_m^T + q_p k_p^T, with q_p = Q w and so on, each one number a token; and probabilities times v_p = V w are
    added to what the values give. With vectors of zeros nothing is added. Each head has its own; BiPFT's heads share theirs.

    It is attached to a module, is its child ``binary_products``, and takes the place of every ``scaled_dot_product_attention``
    that runs in the module's forward. No runtime has such products: they run in float, on numbers of two values.
    """

    child = "binary_products"
    learning = False
    """Whether gradients pass its signs."""

    query_plus: nn.Parameter
    query_minus: nn.Parameter
    key_plus: nn.Parameter
    key_minus: nn.Parameter
    value_plus: nn.Parameter

    def __init__(self, heads: int, head_dim: int, value_dim: int) -> None:
        super().__init__()
        self.heads, self.head_dim, self.value_dim = heads, head_dim, value_dim
        sizes = {"query": head_dim, "key": head_dim, "value": value_dim}
        for name, size in sizes.items():
            self.register_parameter(f"{name}_threshold", nn.Parameter(torch.zeros(heads, 1, size)))
            self.register_parameter(f"{name}_scale", nn.Parameter(torch.ones(())))
        self.probability_scale = nn.Parameter(torch.ones(()))
        for name in ("query_plus", "query_minus", "key_plus", "key_minus", "value_plus"):
            self.register_parameter(name, nn.Parameter(torch.zeros(heads, sizes[name.partition("_")[0]], 1)))
        self.requires_grad_(False)

    def config(self) -> dict[str, Any]:
        """What makes it again without its tensors, as JSON."""
        return {"heads": self.heads, "head_dim": self.head_dim, "value_dim": self.value_dim}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> BinaryProducts:
        return cls(**config)

    def attach(self, model: nn.Module, path: str) -> list[RemovableHandle]:
        module = model.get_submodule(path)
        self.train(module.training)
        module.add_module(self.child, self)
        return super().attach(model, path)

    @torch.no_grad()
    def begin(self, queries: Tensor, keys: Tensor, values: Tensor, chance: Tensor) -> None:
        """Thresholds at the means, and the mean distances from them as scales; for probabilities four times the mean, as BiPFT.

        Args:
            queries: [N, H, D]; keys, values: the same for all keys; of positions that count.
            chance: the mean probability of a key.
        """
        self.probability_scale.copy_(4 * chance)
        for name, x in (("query", queries), ("key", keys), ("value", values)):
            mean = x.mean(0).unsqueeze(1)
            self.get_parameter(f"{name}_threshold").copy_(mean)
            self.get_parameter(f"{name}_scale").copy_((x - mean.squeeze(1)).abs().mean().clamp(min=1e-6))

    def redirect(self, func: Any, args: Any, kwargs: Any) -> Any:
        return self._attend(AttentionCall(*args, **kwargs)) if func is F.scaled_dot_product_attention else func(*args, **kwargs)

    def _bits(self, x: Tensor, name: str) -> Tensor:
        threshold, scale = self.get_parameter(f"{name}_threshold"), self.get_parameter(f"{name}_scale")
        if self.learning:
            return stepped(x, threshold, scale, False)
        return torch.where(x >= threshold, scale, -scale)

    def _attend(self, call: AttentionCall) -> Tensor:
        """Attention dropout has no place in it."""
        call = call.expanded
        query, key, value = call.query, call.key, call.value
        signs = self._bits(query, "query") @ self._bits(key, "key").transpose(-1, -2)
        q_plus, q_minus = _along(query, self.query_plus), _along(query, self.query_minus)
        k_plus, k_minus = (_along(key, vector).transpose(-1, -2) for vector in (self.key_plus, self.key_minus))
        scores = (signs + q_minus * k_plus + q_plus * (k_minus + k_plus)) * call.factor
        chance = call.masked(scores).softmax(-1)
        half = self.probability_scale / 2
        if self.learning:
            few = stepped(chance, half, self.probability_scale, True)
        else:
            few = torch.where(chance >= half, self.probability_scale, torch.zeros_like(self.probability_scale))
        return few @ (self._bits(value, "value") + _along(value, self.value_plus))

    def extra_repr(self) -> str:
        return f"heads={self.heads}, head_dim={self.head_dim}, value_dim={self.value_dim}"


def _along(x: Tensor, vector: Tensor) -> Tensor:
    """[B, H, T, D] and [H, D, 1] -> [B, H, T, 1]: one number a token. As a sum, so that nobody takes the vector for a weight
    that projects tokens."""
    return (x * vector.transpose(-1, -2)).sum(-1, keepdim=True)
