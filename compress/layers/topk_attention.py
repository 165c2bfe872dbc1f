"""Hard attention: each query looks at the keys with its k largest scores only."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

__all__ = ["TopKAttention", "attentions"]

_SOFTMAX = (torch.softmax, F.softmax, Tensor.softmax, torch.special.softmax)


class TopKAttention:
    """Attention whose softmax runs over the ``k`` largest scores of each query; the other keys get the weight 0.

    It is attached to a module and changes every ``scaled_dot_product_attention``, and every softmax over the last axis, that
    runs in the module's forward. Scores equal to the k-th largest are kept with it. Masked keys have the lowest scores and, as
    in soft attention, no weight, also where there are fewer than k others. With no more than k keys it is soft attention,
    exactly.
    """

    def __init__(self, k: int) -> None:
        self.k = k
        self._open: list[_Redirected] = []

    def config(self) -> dict[str, Any]:
        """What makes it again, as JSON."""
        return {"k": self.k}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> TopKAttention:
        return cls(**config)

    def attach(self, model: nn.Module, path: str) -> list[RemovableHandle]:
        """From now on the module at ``path`` attends so; removing the handles ends it. Copies of the module attend so too."""
        module = model.get_submodule(path)
        return [
            module.register_forward_pre_hook(self._before),
            module.register_forward_hook(self._after, always_call=True),
        ]

    def _before(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        self._open.append(_Redirected(self.k))
        self._open[-1].__enter__()  # type: ignore[no-untyped-call]

    def _after(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if self._open:
            self._open.pop().__exit__(None, None, None)  # type: ignore[no-untyped-call]


@contextmanager
def attentions() -> Iterator[list[int]]:
    """While it is open, the number of keys of every attention that runs, where ``TopKAttention`` would know it."""
    mode = _Redirected(None)
    with mode:
        yield mode.keys


class _Redirected(TorchFunctionMode):
    """Calls of attention and softmax, with all but the k largest scores masked; None: with all of them."""

    def __init__(self, k: int | None) -> None:
        super().__init__()
        self.k, self.keys = k, list[int]()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            self.keys.append(_given(args, kwargs, 1, "key").shape[-2])
            return func(*args, **kwargs) if self.k is None else _attend(self.k, *args, **kwargs)
        if func in _SOFTMAX and _over_keys(args, kwargs):
            scores = _given(args, kwargs, 0, "input")
            self.keys.append(scores.shape[-1])
            if self.k is not None:
                rest = {name: value for name, value in kwargs.items() if name != "input"}
                return func(_largest(scores, self.k), *args[1:], **rest)
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


def _attend(
    k: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """``scaled_dot_product_attention`` over the k largest scores: queries [..., H, T, D], keys and values [..., H, S, D]."""
    if k >= key.shape[-2]:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    if enable_gqa:
        key, value = (x.repeat_interleave(query.shape[-3] // x.shape[-3], -3) for x in (key, value))
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    lowest = torch.finfo(scores.dtype).min
    if is_causal:
        before = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~before, lowest)
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, lowest) if attn_mask.dtype == torch.bool else scores + attn_mask
    weights = _largest(scores, k).softmax(-1)
    return F.dropout(weights, dropout_p) @ value if dropout_p else weights @ value
