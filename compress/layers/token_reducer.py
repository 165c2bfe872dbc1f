"""Blocks that hand on fewer tokens than they get."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree
from torch.utils.hooks import RemovableHandle

from compress.algorithms.token_matching import criteria, fusion, most_merged, soft_matching, split
from compress.algorithms.token_moves import Merge, assigned, mixed, picked
from compress.algorithms.token_ranking import attention_from_first, attention_received, kept, zero_tprune
from compress.layers.attached import attached_to
from compress.layers.attention_terms import AttentionCall
from compress.layers.token_stream import TokenStream

__all__ = ["Method", "Place", "TokenIds", "TokenReducer", "hidden_of", "prunes"]

Method = Literal["zero_tprune", "received", "first_token", "random", "similarity", "criteria"]
Place = Literal["attention", "block"]

_SOFTMAX = (torch.softmax, F.softmax, Tensor.softmax, torch.special.softmax)
_PRODUCTS = (torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm)
_ADDS = frozenset({"add", "add_", "__add__", "__radd__", "__iadd__"})
_PRUNES = frozenset({"zero_tprune", "received", "first_token", "random"})
_PROBABILITIES = frozenset({"zero_tprune", "received", "first_token", "criteria"})
"""Methods that look at the attention's weights; the others leave it to the fused kernel."""


def prunes(method: Method) -> bool:
    """Whether tokens leave; with the other methods they are merged."""
    return method in _PRUNES


def _stream_of(model: nn.Module) -> TokenStream:
    """The one that the layers attached to a model share; a new one where there is none."""
    for module in model.modules():
        reducer, ids = attached_to(module, TokenReducer), attached_to(module, TokenIds)
        if reducer is not None or ids is not None:
            return reducer.stream if reducer is not None else ids.stream  # type: ignore[union-attr]
    return TokenStream()


class TokenIds:
    """Tells the token ids that an embedding is asked for: separators are found by them."""

    def __init__(self) -> None:
        self.stream = TokenStream()

    def config(self) -> dict[str, Any]:
        """What makes it again, as JSON."""
        return {}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> TokenIds:
        return cls(**config)

    def attach(self, model: nn.Module, path: str) -> list[RemovableHandle]:
        """From now on the stream of the model knows the ids that the embedding at ``path`` gets."""
        self.stream = _stream_of(model)
        module = model.get_submodule(path)
        return [module.register_forward_pre_hook(self._before), module.register_forward_hook(self._after)]

    def _before(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        self.stream.ids = inputs[0] if inputs else None

    def _after(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        pass


class TokenReducer:
    """A block that hands on ``keep`` tokens, or one after it that gets masks and sizes that fit what is left.

    Tokens leave where the attention joins the residual stream, so that the block's MLP has fewer already; for pruning that is
    the same function as between two blocks, because the MLP works token by token. Where no such add is seen they leave after
    the block (``place``). With ``criteria`` the values of the block's attention are pooled too: each token's value becomes the
    weighted mean of those it is merged with, and so, after the merge, its output: the one-step-ahead attention of MCTF, whose
    queries and keys are those of the tokens before.

    Attributes:
        number: of the block; later blocks have higher ones.
        keep: tokens that are handed on; None: all. A shorter sequence stays as it is.
        method: how they are chosen, or what they are merged by.
        prefix: tokens at the start that stay.
        place: where they leave.
        proportional: whether later attentions count a token as often as it stands for others.
        masked: whether tokens can be padded; if not, a mask that a trace makes of nothing is left out.
        causal: whether the masks are causal.
        traced: whether it is kept where tokens come from; restores: whether the block gives as many tokens as the first one got.
        last: whether it is the last block that knows of the stream.
        enter: tokens that are kept before the block runs, by padding alone.
        separators: ids whose tokens stay.
        votes, similar: of ``zero_tprune``; temperatures, both_ways: of ``criteria``; seed: of ``random``.
    """

    def __init__(
        self,
        number: int,
        keep: int | None,
        method: Method,
        prefix: int = 1,
        place: Place = "attention",
        proportional: bool = True,
        masked: bool = True,
        causal: bool = False,
        traced: bool = False,
        restores: bool = False,
        last: bool = False,
        enter: int | None = None,
        separators: list[int] | None = None,
        votes: int = 1,
        similar: float = 0.0,
        temperatures: list[float] | None = None,
        both_ways: bool = True,
        seed: int = 0,
    ) -> None:
        self.number, self.keep, self.method, self.prefix, self.place = number, keep, method, prefix, place
        self.proportional, self.masked, self.causal, self.traced = proportional, masked, causal, traced
        self.restores, self.last = restores, last
        self.enter, self.separators = enter, separators or []
        self.votes, self.similar, self.both_ways, self.seed = votes, similar, both_ways, seed
        self.temperatures = temperatures or [1.0, 20.0, 40.0]
        self.stream = TokenStream()
        self._open: list[_Watched] = []

    def config(self) -> dict[str, Any]:
        """What makes it again, as JSON."""
        names = (
            "number", "keep", "method", "prefix", "place", "proportional", "masked", "causal", "traced", "restores", "last",
            "enter", "separators", "votes", "similar", "temperatures", "both_ways", "seed",
        )  # fmt: skip
        return {name: getattr(self, name) for name in names}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> TokenReducer:
        return cls(**config)

    def __deepcopy__(self, memo: dict[int, Any]) -> TokenReducer:
        copied = memo[id(self)] = TokenReducer(**self.config())
        copied.stream = memo.get(id(self.stream)) or self.stream.__deepcopy__(memo)
        return copied

    def attach(self, model: nn.Module, path: str) -> list[RemovableHandle]:
        """From now on the block at ``path`` does so; removing the handles ends it."""
        self.stream = _stream_of(model)
        module = model.get_submodule(path)
        return [
            module.register_forward_pre_hook(self._before, with_kwargs=True),
            module.register_forward_hook(self._after, always_call=True),
        ]

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        hidden, stream = hidden_of(args, kwargs), self.stream
        if not self.masked:
            args, kwargs = _pytree.tree_map(_without_mask, (args, kwargs))
        masks = [leaf for leaf in _pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.dim() == 4]
        stream.enter(self.number, hidden, masks, self.causal, self.traced, self.separators)
        if self.enter is not None and self.enter < stream.now:
            order = torch.zeros(hidden.shape[0], stream.now, device=hidden.device)
            index = kept(order, self.enter, self.prefix, stream.valid, stream.held)
            stream.keep(index)
            stream.noted()
            shorter = picked(hidden, index)
            args, kwargs = _pytree.tree_map(lambda leaf: shorter if leaf is hidden else leaf, (args, kwargs))
            hidden = shorter
        args, kwargs = stream.masked(args, kwargs)
        self._open.append(_Watched(self, hidden))
        self._open[-1].__enter__()  # type: ignore[no-untyped-call]
        return args, kwargs

    def _after(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        if not self._open:
            return None
        watched = self._open.pop()
        watched.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        if output is None:  # it failed
            self.stream.leave()
            return None
        if watched.goes and not watched.joined:
            output = _replaced(output, watched.reduced)
        if self.restores and self.stream.shorter:
            output = _replaced(output, self.stream.restored)
        if self.last:
            self.stream.leave()
        return output


def hidden_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The tokens [B, T, C] that a block gets: its first tensor."""
    found = [leaf for leaf in _pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    return found[0]


def _without_mask(leaf: Any) -> Any:
    return None if isinstance(leaf, Tensor) and leaf.dim() == 4 else leaf


def _replaced(output: Any, change: Any) -> Any:
    """What a block returned, with its first tensor changed."""
    leaves, spec = _pytree.tree_flatten(output)
    number = next(number for number, leaf in enumerate(leaves) if isinstance(leaf, Tensor))
    leaves[number] = change(leaves[number])
    return _pytree.tree_unflatten(leaves, spec)


class _Watched(TorchFunctionMode):
    """The forward of one block: its attention is seen, and the stream is shortened where it joins."""

    def __init__(self, reducer: TokenReducer, hidden: Tensor) -> None:
        super().__init__()
        self.reducer, self.stream, self.hidden = reducer, reducer.stream, hidden
        self.goes = reducer.keep is not None and reducer.keep < hidden.shape[1]
        self.attended = self.joined = False
        self.keys: Tensor | None = None
        self.weights: Tensor | None = None
        self.fusing: tuple[Merge, Tensor] | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return self._fused(AttentionCall(*args, **kwargs))
        if func in _SOFTMAX and self._over_keys(args, kwargs):
            return self._softmax(func, args, kwargs)
        if func in _PRODUCTS:
            return self._product(func, args, kwargs)
        result = func(*args, **kwargs)
        if (
            self.goes
            and self.reducer.place == "attention"
            and self.attended
            and not self.joined
            and self._joins(func, args, result)
        ):
            self.joined = True
            return self.reduced(result)
        return result

    def _joins(self, func: Any, args: Any, result: Any) -> bool:
        if getattr(func, "__name__", "") not in _ADDS or not isinstance(result, Tensor):
            return False
        sides = [side for side in args[:2] if isinstance(side, Tensor)]
        return len(sides) == 2 and all(side.shape == self.hidden.shape for side in sides)

    def _over_keys(self, args: Any, kwargs: Any) -> bool:
        """Whether a softmax runs over the keys of scores [B, H, T, T]."""
        scores = args[0] if args else kwargs["input"]
        axis = args[1] if len(args) > 1 else kwargs.get("dim")
        return scores.dim() == 4 and axis in (-1, 3) and scores.shape[-1] == self.hidden.shape[1]

    def _bias(self, dtype: torch.dtype) -> Tensor | None:
        return self.stream.bias(dtype) if self.reducer.proportional else None

    def _softmax(self, func: Any, args: Any, kwargs: Any) -> Tensor:
        scores, rest = (args[0], args[1:]) if args else (kwargs["input"], ())
        bias = self._bias(scores.dtype)
        named = {name: value for name, value in kwargs.items() if name != "input"}
        weights: Tensor = func(scores if bias is None else scores + bias, *rest, **named)
        self.attended, self.weights = True, weights
        return weights

    def _product(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Notes the keys of scores, and pools the values that the weights are multiplied with."""
        if self.goes and len(args) == 2 and all(isinstance(side, Tensor) and side.dim() == 4 for side in args):
            left, right = args
            tokens = self.hidden.shape[1]
            if not self.attended and right.shape[-1] == tokens:
                self.keys = right.transpose(-1, -2)
            elif self.attended and left.shape[-1] == tokens and self.fusing is None and self.reducer.method == "criteria":
                return func(left, self._pooled(right), **kwargs)
        return func(*args, **kwargs)

    def _fused(self, call: AttentionCall) -> Tensor:
        bias = self._bias(call.query.dtype)
        self.attended, self.keys = True, call.key
        if bias is not None:
            mask = call.attn_mask
            call = replace(call, attn_mask=bias if mask is None else _added(mask, call.query.dtype) + bias)
        if not (self.goes and self.reducer.method in _PROBABILITIES):
            return call.softmax_attention()
        call = call.expanded
        self.keys = call.key
        self.weights = call.scores.softmax(-1)
        return self.weights @ (self._pooled(call.value) if self.reducer.method == "criteria" else call.value)

    # -- which tokens go ------------------------------------------------------------------------------------------

    def reduced(self, hidden: Tensor) -> Tensor:
        """The tokens that are left, [B, T, C] -> [B, keep, C]."""
        reducer, stream = self.reducer, self.stream
        assert reducer.keep is not None
        if reducer.method in _PRUNES:
            index = self._chosen(reducer.keep)
            stream.keep(index)
            hidden = picked(hidden, index)
        elif reducer.method == "similarity":
            assert self.keys is not None
            merge = soft_matching(self.keys.mean(1), self._removed, reducer.prefix, stream.valid, stream.held)
            hidden = stream.merge(hidden, stream.sizes(hidden.shape[0], hidden.device), merge)
        else:
            if self.fusing is None:
                self.fusing = self._match()
            hidden = stream.merge(hidden, self.fusing[1].to(hidden.dtype), self.fusing[0])
        stream.noted()
        return hidden

    @property
    def _removed(self) -> int:
        assert self.reducer.keep is not None
        tokens = self.hidden.shape[1]
        return min(tokens - self.reducer.keep, most_merged(tokens, self.reducer.prefix))

    def _chosen(self, keep: int) -> Tensor:
        reducer, stream = self.reducer, self.stream
        if reducer.method == "random":
            tokens = self.hidden.shape[1]
            order = random.Random(reducer.seed).sample(range(tokens), tokens)
            score = torch.tensor([[position / tokens for position in order]], device=self.hidden.device)
            return kept(score.expand(self.hidden.shape[0], -1), keep, reducer.prefix, stream.valid, stream.held)
        assert self.weights is not None
        if reducer.method == "zero_tprune":
            assert self.keys is not None
            options = (keep, reducer.votes, reducer.similar, reducer.prefix, stream.valid, stream.held)
            return zero_tprune(self.weights, self.keys, *options)
        score = (
            attention_received(self.weights, stream.valid) if reducer.method == "received" else attention_from_first(self.weights)
        )
        return kept(score, keep, reducer.prefix, stream.valid, stream.held)

    def _match(self) -> tuple[Merge, Tensor]:
        """What ``criteria`` merges, and the weight that each token has in what it becomes, [B, T]."""
        reducer, stream, hidden = self.reducer, self.stream, self.hidden
        assert self.weights is not None
        received = attention_received(self.weights, stream.valid)
        size = stream.sizes(hidden.shape[0], hidden.device)
        halves = split(hidden.shape[1], reducer.prefix, hidden, stream.valid, stream.held, reducer.both_ways)
        similarity, information, sizes = reducer.temperatures
        scores = criteria(hidden, received, size, halves[1], halves[2], (similarity, information, sizes))
        merge = fusion(scores, self._removed, halves, reducer.both_ways, stream.valid, stream.held)
        return merge, received.clamp(min=1e-6) * size / size.amax(1, keepdim=True)

    def _pooled(self, value: Tensor) -> Tensor:
        """Values [B, H, T, D] with each token's replaced by the weighted mean of those it is merged with."""
        self.fusing = self._match()
        merge, weight = self.fusing
        heads, tokens, width = value.shape[1:]
        pooled = mixed(value.transpose(1, 2).flatten(2), weight.to(value.dtype), merge)
        return picked(pooled, assigned(merge, tokens)).reshape(-1, tokens, heads, width).transpose(1, 2)


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask as numbers that are added to scores."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
