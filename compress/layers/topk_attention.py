"""Hard attention: each query looks at the keys with its k largest scores only."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from compress.layers.attention_terms import AttentionCall
from compress.layers.redirected import Redirecting

__all__ = ["TopKAttention", "attentions"]

_SOFTMAX = (torch.softmax, F.softmax, Tensor.softmax, torch.special.softmax)


class TopKAttention(Redirecting):
    """Attention whose softmax runs over the ``k`` largest scores of each query; the other keys get the weight 0.

    It is attached to a module and changes every ``scaled_dot_product_attention``, and every softmax over the last axis, that
    runs in the module's forward. Scores equal to the k-th largest are kept with it. Masked keys have the lowest scores and, as
    in soft attention, no weight, also where there are fewer than k others. With no more than k keys it is soft attention,
    exactly.
    """

    def __init__(self, k: int) -> None:
        super().__init__()
        self.k = k

    def config(self) -> dict[str, Any]:
        """What makes it again, as JSON."""
        return {"k": self.k}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> TopKAttention:
        return cls(**config)

    def redirect(self, func: Any, args: Any, kwargs: Any) -> Any:
        if func is F.scaled_dot_product_attention:
            return _attend(self.k, AttentionCall(*args, **kwargs))
        if func in _SOFTMAX and _over_keys(args, kwargs):
            rest = {name: value for name, value in kwargs.items() if name != "input"}
            return func(_largest(_given(args, kwargs, 0, "input"), self.k), *args[1:], **rest)
        return func(*args, **kwargs)


@contextmanager
def attentions() -> Iterator[list[int]]:
    """While it is open, the number of keys of every attention that runs, where ``TopKAttention`` would know it."""
    mode = _Counted()
    with mode:
        yield mode.keys


class _Counted(TorchFunctionMode):
    """Notes the keys of attentions and of softmaxes like theirs."""

    def __init__(self) -> None:
        super().__init__()
        self.keys = list[int]()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            self.keys.append(_given(args, kwargs, 1, "key").shape[-2])
        elif func in _SOFTMAX and _over_keys(args, kwargs):
            self.keys.append(_given(args, kwargs, 0, "input").shape[-1])
        return func(*args, **kwargs)


def _given(args: Any, kwargs: Any, position: int, name: str) -> Tensor:
    found: Tensor = args[position] if len(args) > position else kwargs[name]
    return found


def _over_keys(args: Any, kwargs: Any) -> bool:
    """Whether a softmax runs over the last axis of scores [..., T, S]."""
    scores = _given(args, kwargs, 0, "input")
    axis = args[1] if len(args) > 1 else kwargs.get("dim")
    return scores.dim() >= 3 and axis in (-1, scores.dim() - 1)


def _largest(scores: Tensor, k: int) -> Tensor:
    """Scores [..., T, S] with all but the k largest of each query at the lowest number."""
    if k >= scores.shape[-1]:
        return scores
    least = scores.topk(k, dim=-1).values[..., k - 1 : k]
    return scores.masked_fill(scores < least, torch.finfo(scores.dtype).min)


def _attend(k: int, call: AttentionCall) -> Tensor:
    """Attention over the k largest scores of each query."""
    if k >= call.key.shape[-2]:
        return call.softmax_attention()
    call = call.expanded
    weights = _largest(call.scores, k).softmax(-1)
    return F.dropout(weights, call.dropout_p) @ call.value if call.dropout_p else weights @ call.value
