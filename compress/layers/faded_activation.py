"""Activations that fade: a function on its way to the identity, after which two linear layers are one.

Chen et al. 2023 (VanillaNet, arXiv 2305.12972), sec. 3.1, deep training: ``(1 - s) act(x) + s x`` (eq. 1); ``s`` rises to 1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from compress.layers.redirected import Redirecting

__all__ = ["FadedActivation"]

_ACTIVATIONS = frozenset(
    {
        F.gelu, F.relu, F.silu, F.elu, F.hardswish, F.leaky_relu, F.mish, F.relu6, F.selu, F.softplus, F.tanh, F.sigmoid,
        torch.relu, torch.tanh, torch.sigmoid, Tensor.relu, Tensor.tanh, Tensor.sigmoid,
    }
)  # fmt: skip


class FadedActivation(Redirecting):
    """It is attached to a module, in whose forward every activation gives back its input.

    Attributes:
        share: of the activation while it fades; it counts only while ``learning``.
        calls: activations that ran since it was made.
    """

    def __init__(self) -> None:
        super().__init__()
        self.share, self.learning, self.calls = 1.0, False, 0

    def config(self) -> dict[str, Any]:
        """What makes it again, as JSON."""
        return {}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> FadedActivation:
        return cls(**config)

    def redirect(self, func: Any, args: Any, kwargs: Any) -> Any:
        if func not in _ACTIVATIONS:
            return func(*args, **kwargs)
        self.calls += 1
        x: Tensor = args[0] if args else kwargs["input"]
        share = self.share if self.learning else 0.0
        if not share:
            return x
        made: Tensor = func(*args, **{**kwargs, **({"inplace": False} if kwargs.get("inplace") else {})})
        return made if share == 1 else share * made + (1 - share) * x
