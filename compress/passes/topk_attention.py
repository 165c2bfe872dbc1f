"""Hard attention: in chosen blocks each query looks at the keys with its k largest scores only."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, ClassVar

from pydantic import Field, model_validator
from torch import nn
from torch.utils.hooks import RemovableHandle

from calibrate.errors import UserError
from calibrate.modes import evaluating
from compress.anatomy import Anatomy, Block
from compress.depth.greedy import Change, Greedy
from compress.layers import BinaryProducts, HashedAttention, TopKAttention
from compress.layers.attached import attached_to
from compress.layers.topk_attention import attentions
from compress.passes.contract import Context, Pass, Target
from compress.surgery import Surgery

__all__ = ["TopkAttention"]


class TopkAttention(Pass):
    """Let each query attend to its ``k`` highest-scored keys only: the softmax runs over them, all others get the weight 0.

    The hard attention of AxFormer (Nagarajan et al. 2020, arXiv 2010.03688), which leaves out what scores low and can make a
    fine-tuned model more accurate. It makes nothing smaller, and no dense runtime faster: all scores are still computed, and
    their selection comes on top. ``measure: each_pass`` shows what it costs. Scores that equal the k-th stay with it; padded
    keys are never chosen; with no more keys than ``k`` nothing changes.

    ``accuracy_driven`` tries the blocks one by one, the last first, and keeps those with which the task loss on the recipe's
    labelled validation rows does not rise by more than ``tolerance``. Any attention is found that calls torch's attention or a
    softmax over its scores, once in a block; others are left and named.
    """

    name: ClassVar[str] = "topk_attention"
    source: ClassVar[str] = "Nagarajan et al. 2020, arXiv 2010.03688"

    k: int = Field(ge=1, le=65_536, description="Keys that a query attends to.")
    blocks: list[int] = Field([], description="Numbers of the blocks, -1 is the last; none named: all that have such attention.")
    accuracy_driven: bool = Field(False, description="Keep it only in blocks where the loss on data.validation allows it.")
    tolerance: float = Field(
        0.0,
        ge=0.0,
        le=10.0,
        description="With accuracy_driven: how far the loss may stay above the lowest seen, as a share of the loss at the start.",
    )
    evaluations: int = Field(
        100,
        ge=4,
        le=100_000,
        description="With accuracy_driven: most runs over the validation rows; blocks that they do not reach stay as they are.",
    )

    @model_validator(mode="after")
    def _driven(self) -> TopkAttention:
        for option in ("tolerance", "evaluations"):
            if not self.accuracy_driven and getattr(self, option) != type(self).model_fields[option].get_default():
                raise ValueError(f"{option} goes with accuracy_driven\nAdd accuracy_driven: true, or take {option} out.")
        return self

    @property
    def validates(self) -> bool:
        return self.accuracy_driven

    def targets(self, model: nn.Module, anatomy: Anatomy) -> list[Target]:
        where = ", where the validation rows allow it" if self.accuracy_driven else ""
        return [
            Target(block.path, "attention", f"its {self.k} largest scores of {keys} keys count{where}")
            for block, keys in self._found(model, anatomy)[0]
        ]

    def skips(self, model: nn.Module, anatomy: Anatomy) -> dict[str, str]:
        return self._found(model, anatomy)[1]

    def rehearse(self, model: nn.Module, anatomy: Anatomy, surgery: Surgery) -> None:
        for block, _ in self._found(model, anatomy)[0]:
            surgery.attach(model, block.path, TopKAttention(self.k))

    def run(self, model: nn.Module, context: Context) -> nn.Module:
        found, skipped = self._found(model, context.anatomy)
        changes = [_Hard(model, context.surgery, block, self.k) for block, _ in reversed(found)]
        context.report |= {"keys": {block.path: keys for block, keys in found}, "skipped": skipped}
        if self.accuracy_driven:
            greedy = Greedy(model, context.judge(self.name), self.tolerance, self.evaluations, context.progress)
            hard = [trial.change for trial in greedy.run(changes, reserved=0) if trial.taken]
            context.report["accuracy_driven"] = greedy.json()
        else:
            hard = list(changes)
            for change in changes:
                change.do()
        context.report["hard"] = [change.told["path"] for change in reversed(hard)]
        return model

    def _found(self, model: nn.Module, anatomy: Anatomy) -> tuple[list[tuple[Block, int]], dict[str, str]]:
        """The blocks with an attention that can be made hard, each with its number of keys; and why others cannot, by path.

        Raises:
            UserError: a number that no block has, a named block that cannot, or none that can.
        """
        count = len(anatomy.blocks)
        for number in self.blocks:
            if not -count <= number < count:
                there = f"There are {count}: 0 to {count - 1}." if count else "No blocks were found; see: compress inspect."
                raise UserError(self.name, f"blocks: there is no block {number}", there)
        named = {number % count for number in self.blocks}
        reasons, found = _attentions(model, anatomy)
        skipped = {}
        for block in anatomy.blocks:
            if block.path in reasons and block.index in named:
                hint = f"Take {block.index} off blocks."
                raise UserError(self.name, f"{block.path}: {reasons[block.path]}", hint)
            if block.path in reasons and not named:
                skipped[block.path] = reasons[block.path]
        chosen = [(block, found[block.path]) for block in anatomy.blocks if block.path in found]
        chosen = [(block, keys) for block, keys in chosen if not named or block.index in named]
        if not chosen:
            why = next((f"{path}: {reason}." for path, reason in skipped.items()), "See what it has with: compress inspect.")
            raise UserError(self.name, "no block has an attention that can be made hard", why)
        return chosen, skipped


class _Hard(Change):
    """The attention of one block made hard."""

    def __init__(self, model: nn.Module, surgery: Surgery, block: Block, k: int) -> None:
        self.model, self.surgery, self.block, self.k = model, surgery, block, k
        self.told = {"block": block.index, "part": "attention", "path": block.path}
        self.what = f"soft attention in block {block.index}"
        self.handles: list[RemovableHandle] = []

    def do(self) -> None:
        self.done = len(self.surgery.edits)
        self.handles = self.surgery.attach(self.model, self.block.path, TopKAttention(self.k))

    def undo(self) -> None:
        for handle in self.handles:
            handle.remove()
        del self.surgery.edits[self.done :]


def _attentions(model: nn.Module, anatomy: Anatomy) -> tuple[dict[str, str], dict[str, int]]:
    """By the path of each block: why its attention cannot be made hard, or how many keys it has. The model runs once."""
    signature, example = anatomy.traced
    heard: dict[str, list[list[int]]] = {block.path: [] for block in anatomy.blocks}
    with evaluating(model), _listening(model, heard):
        signature.call(model, example)
    reasons, found = {}, {}
    for block in anatomy.blocks:
        calls = heard[block.path]
        reason = _reason(model, block, calls)
        if reason:
            reasons[block.path] = reason
        else:
            found[block.path] = calls[0][0]
    return reasons, found


def _reason(model: nn.Module, block: Block, calls: list[list[int]]) -> str:
    module = model.get_submodule(block.path)
    hard = attached_to(module, TopKAttention)
    if hard is not None:
        return f"its {hard.k} largest scores count already"
    if any(attached_to(module, kind) is not None for kind in (HashedAttention, BinaryProducts)):
        return "hash codes or products of one bit stand for its attention already"
    if not any("attention.value" in site.roles for site in block.sites):
        return "it has no attention"
    if not calls:
        return "it does not run"
    if any(not keys for keys in calls):
        return "its attention runs neither torch's scaled_dot_product_attention nor a softmax over scores"
    most = max(len(keys) for keys in calls)
    return f"{most} attentions, or softmaxes like theirs, run in it" if most > 1 else ""


@contextmanager
def _listening(model: nn.Module, heard: dict[str, list[list[int]]]) -> Iterator[None]:
    """While it is open, notes for each call of the modules at the given paths the keys of the attentions that run in it."""
    handles: list[RemovableHandle] = []
    for path, calls in heard.items():
        module, listener = model.get_submodule(path), _Listener(calls)
        handles.append(module.register_forward_pre_hook(listener.before))
        handles.append(module.register_forward_hook(listener.after, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Listener:
    def __init__(self, calls: list[list[int]]) -> None:
        self.calls = calls
        self.open: list[AbstractContextManager[list[int]]] = []

    def before(self, module: nn.Module, inputs: Any) -> None:
        self.open.append(attentions())
        self.calls.append(self.open[-1].__enter__())

    def after(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if self.open:
            self.open.pop().__exit__(None, None, None)
