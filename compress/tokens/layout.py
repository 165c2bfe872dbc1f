"""Where a model's tokens can leave it, found by running it: no table of class names.

A block that hands tokens to the next one is run again with its tokens in another order. If it gives the same in that order, it
does not know where a token stands, so that any may go; windows, relative positions and rotations are found out in that way. The
tokens that the head reads are those whose change, after the last block, changes the output.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from calibrate.errors import UserError
from calibrate.fidelity import sqnr_db
from calibrate.modes import evaluating
from calibrate.signature import Batch
from compress.anatomy import Anatomy, Block
from compress.layers import TokenIds, TokenReducer
from compress.layers.attached import attached_to
from compress.layers.token_reducer import hidden_of
from compress.layers.topk_attention import attentions
from compress.width.restart import Restart, first_tensor

__all__ = ["Layout", "find_layout"]

_SAME_DB = 60.0
"""Two computations of the same are nearer than this, different ones are not."""


@dataclass(frozen=True)
class Layout:
    """What is known of the tokens of a model.

    Attributes:
        blocks: those that hand tokens on, in the order in which they run.
        tokens: how many the first one gets; width: channels of each.
        masked: whether they get a mask of padded tokens; causal: whether a token sees only those before it.
        prefix: tokens at the start that the head reads alone, or 1 where it reads others too and there is a class token.
        reads_all: whether the head reads other tokens than those.
        per_token: whether the output has one entry a token.
        ids: path of the embedding that reads token ids, or "".
        separators: ids that every traced row ends with.
    """

    blocks: tuple[Block, ...]
    tokens: int
    width: int
    masked: bool
    causal: bool
    prefix: int
    reads_all: bool
    per_token: bool
    ids: str = ""
    separators: tuple[int, ...] = ()

    @property
    def numbers(self) -> list[int]:
        """Numbers of the blocks, in the order in which they run."""
        return [block.index for block in self.blocks]


@dataclass
class _Call:
    """One call of a block."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any
    attentions: list[int] = field(default_factory=list)

    @property
    def hidden(self) -> Tensor:
        return hidden_of(self.args, self.kwargs)


def find_layout(where: str, model: nn.Module, anatomy: Anatomy) -> Layout:
    """Runs the model on the rows that it was traced with, a few times.

    Raises:
        UserError: tokens cannot leave this model, and why.
    """
    signature, example = anatomy.traced
    blocks = [block for block in anatomy.blocks if any("attention.value" in site.roles for site in block.sites)]
    if not blocks:
        raise UserError(where, "no block with attention was found", "See what the model has with: compress inspect.")
    _unattached(where, model)
    with torch.no_grad(), evaluating(model):
        calls, order = _calls(model, lambda: signature.call(model, example), blocks)
        blocks = [next(block for block in blocks if block.path == path) for path in order]
        for block in blocks:
            reason = _reason(model.get_submodule(block.path), calls[block.path], calls[blocks[0].path][0])
            if reason:
                raise UserError(
                    where, f"{block.path}: {reason}", "Tokens can leave encoders whose blocks all see all tokens alike."
                )
        first = calls[blocks[0].path][0]
        masks = _masks(first)
        causal = any(_causal(mask) for mask in masks)
        masked = bool(masks) or "attention_mask" in signature.names
        tokens = first.hidden.shape[1]
        output = signature.call(model, example)
        per_token = output.dim() > 2 and output.shape[1] == tokens
        reads = _Reads(model, signature.call, [block.path for block in blocks], example)
        prefix = next((count for count in (1, 2) if not reads.after(count)), 0)
        reads_all = not prefix
        if reads_all:
            prefix = 1 if reads.at(0) and not causal else 0
    ids, separators = _separators(model, anatomy, example, lambda: signature.call(model, example))
    return Layout(tuple(blocks), tokens, first.hidden.shape[2], masked, causal, prefix, reads_all, per_token, ids, separators)


def _unattached(where: str, model: nn.Module) -> None:
    for path, module in model.named_modules():
        if attached_to(module, TokenReducer) or attached_to(module, TokenIds):
            raise UserError(where, f"{path}: its tokens are reduced already", "Name one pass that takes tokens out.")


def _calls(model: nn.Module, run: Callable[[], Tensor], blocks: list[Block]) -> tuple[dict[str, list[_Call]], list[str]]:
    """The calls of each block in one run, and the paths in the order in which they began."""
    found: dict[str, list[_Call]] = {block.path: [] for block in blocks}
    order: list[str] = []
    handles = []
    open_: list[Any] = []

    def before(path: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            if path not in order:
                order.append(path)
            open_.append(attentions())
            given, named = _copies((args, kwargs))
            found[path].append(_Call(given, named, None, open_[-1].__enter__()))

        return hook

    def after(path: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            open_.pop().__exit__(None, None, None)
            found[path][-1].output = _copies(output)

        return hook

    for block in blocks:
        module = model.get_submodule(block.path)
        handles.append(module.register_forward_pre_hook(before(block.path), with_kwargs=True))
        handles.append(module.register_forward_hook(after(block.path), always_call=True))
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return found, order


def _copies(value: Any) -> Any:
    return _pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, value)


def _masks(call: _Call) -> list[Tensor]:
    tokens = call.hidden.shape[1]
    leaves = _pytree.tree_leaves((call.args, call.kwargs))
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.dim() == 4 and leaf.shape[-1] == tokens]


def _causal(mask: Tensor) -> bool:
    """Whether what a query sees depends on where it stands."""
    seen = mask if mask.dtype == torch.bool else mask > -1
    return mask.shape[2] > 1 and not bool((seen == seen[:, :, -1:]).all())


def _reason(module: nn.Module, calls: list[_Call], first: _Call) -> str:
    """Why tokens cannot leave at, or before, a block; or nothing."""
    if len(calls) != 1:
        return f"it runs {len(calls)} times with the same weights" if calls else "it does not run"
    call = calls[0]
    hidden = call.hidden
    if hidden.dim() != 3 or not hidden.is_floating_point():
        return f"it gets {list(hidden.shape)}, not rows of tokens [batch, tokens, channels]"
    tensors = [leaf for leaf in _pytree.tree_leaves(call.output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    if not tensors:
        return "it hands on no tensor"
    given = tensors[0]
    if given.shape != hidden.shape:
        return f"it makes {list(given.shape)} of {list(hidden.shape)}: a stage of a hierarchy"
    if hidden.shape != first.hidden.shape:
        return f"it gets {list(hidden.shape)} where the first block gets {list(first.hidden.shape)}: a stage of a hierarchy"
    tokens = hidden.shape[1]
    if not call.attentions:
        return "its attention cannot be observed: it runs neither torch's scaled_dot_product_attention nor a softmax over scores"
    if len(call.attentions) > 1:
        return f"{len(call.attentions)} attentions, or softmaxes like theirs, run in it"
    if call.attentions[0] != tokens:
        return f"its attention runs over {call.attentions[0]} of {tokens} tokens: windows, or another arrangement"
    for leaf in _pytree.tree_leaves((call.args, call.kwargs)):
        if isinstance(leaf, Tensor) and leaf is not hidden and not _is_mask(leaf, tokens) and tokens in leaf.shape:
            return f"it also gets a tensor {list(leaf.shape)} with an entry for each position: rotary or relative positions"
    return (
        ""
        if _same_in_any_order(module, call)
        else (
            "it gives something else for the same tokens in another order: relative positions, rotation, windows or convolutions"
        )
    )


def _is_mask(leaf: Tensor, tokens: int) -> bool:
    return leaf.dim() == 4 and leaf.shape[1] == 1 and leaf.shape[-1] == tokens and leaf.shape[2] in (1, tokens)


def _same_in_any_order(module: nn.Module, call: _Call) -> bool:
    """Whether a block gives, for its tokens in another order, what it gave, in that order."""
    hidden = call.hidden
    tokens = hidden.shape[1]
    order = torch.randperm(tokens, generator=torch.Generator().manual_seed(0)).to(hidden.device)

    def moved(leaf: Any) -> Any:
        if leaf is hidden:
            return leaf[:, order]
        if isinstance(leaf, Tensor) and _is_mask(leaf, tokens):
            leaf = leaf[..., order]
            return leaf[:, :, order] if leaf.shape[2] == tokens else leaf
        return leaf

    args, kwargs = _pytree.tree_map(moved, (call.args, call.kwargs))
    level = sqnr_db(first_tensor(call.output)[:, order], first_tensor(module(*args, **kwargs)))
    return level > _SAME_DB or level == math.inf


class _Reads:
    """Which tokens, as the last block gives them, the output depends on."""

    def __init__(self, model: nn.Module, call: Any, paths: list[str], example: Batch) -> None:
        self.model, self.last = model, paths[-1]
        self.restart = Restart(model, call, paths)
        self.restart.begin(example)

    def after(self, first: int) -> bool:
        """Whether any from this position on is read."""
        return self._changes(slice(first, None))

    def at(self, position: int) -> bool:
        return self._changes(slice(position, position + 1))

    def _changes(self, where: slice) -> bool:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            leaves, spec = _pytree.tree_flatten(output)
            number = next(number for number, leaf in enumerate(leaves) if isinstance(leaf, Tensor))
            changed = leaves[number].clone()
            noise = torch.randn(changed.shape, generator=torch.Generator().manual_seed(1)).to(changed)
            changed[:, where] += noise[:, where] * changed.std()
            leaves[number] = changed
            return _pytree.tree_unflatten(leaves, spec)

        handle = self.model.get_submodule(self.last).register_forward_hook(hook)
        try:
            found = self.restart.run(0, self.last).output
        finally:
            handle.remove()
        return not torch.equal(found, self.restart.reference(0).output)


def _separators(model: nn.Module, anatomy: Anatomy, example: Batch, run: Callable[[], Any]) -> tuple[str, tuple[int, ...]]:
    """The embedding that reads token ids, and the id that all rows end with."""
    ids = example.get("input_ids")
    if ids is None or ids.dim() != 2:
        return "", ()
    tables = [site.path for site in anatomy.sites if "embedding" in site.roles and site.kind == "embedding"]
    with _inputs(model, tables) as heard, torch.no_grad(), evaluating(model):
        run()
    path = next((path for path, given in heard.items() if given.shape == ids.shape and bool((given == ids).all())), "")
    mask = example.get("attention_mask")
    last = torch.full((ids.shape[0],), ids.shape[1] - 1)
    if mask is not None:
        last = (mask != 0).long().mul(torch.arange(1, ids.shape[1] + 1)).argmax(1)
    ends = set(ids[torch.arange(ids.shape[0]), last].tolist())
    return (path, (ends.pop(),)) if path and len(ends) == 1 else (path, ())


@contextmanager
def _inputs(model: nn.Module, paths: list[str]) -> Iterator[Mapping[str, Tensor]]:
    heard: dict[str, Tensor] = {}
    handles = []

    def hook(path: str) -> Any:
        def listen(module: nn.Module, args: Any) -> None:
            if args and isinstance(args[0], Tensor):
                heard[path] = args[0]

        return listen

    for path in paths:
        handles.append(model.get_submodule(path).register_forward_pre_hook(hook(path)))
    try:
        yield heard
    finally:
        for handle in handles:
            handle.remove()
