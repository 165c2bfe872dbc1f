"""Rules applied to a model one after the other, each judged by the model's output before and after it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from calibrate.errors import UserError
from calibrate.signature import Batch, Signature
from compress.rewrites.attention_scale import AttentionScaleIntoQuery
from compress.rewrites.batch_norm import BatchNormIntoLayer
from compress.rewrites.branches import BranchesMerged
from compress.rewrites.layer_scale import LayerScaleIntoLayer
from compress.rewrites.linear_chain import LinearAfterLinear
from compress.rewrites.norms import LayerNormIntoReaders, RmsNormIntoReaders
from compress.rewrites.packing import QueryKeyValuePacked
from compress.rewrites.precision import difference, doubled, output, single_output
from compress.rewrites.rule import Found, Rewrite, Rule, View
from compress.rewrites.unneeded import DropoutRemoved, DuplicatesTied
from compress.surgery import Surgery

__all__ = ["LIMIT", "RULES", "SINGLE_LIMIT", "Applied", "Applying"]

RULES: tuple[Rule, ...] = (
    BranchesMerged(), BatchNormIntoLayer(), LayerScaleIntoLayer(), LinearAfterLinear(), RmsNormIntoReaders(),
    LayerNormIntoReaders(), AttentionScaleIntoQuery(), DropoutRemoved(), DuplicatesTied(), QueryKeyValuePacked(),
)  # fmt: skip
"""In the order in which they are applied: what makes layers plain comes before what joins them."""

LIMIT = 1e-9
"""How far outputs may move in float64, relative to the largest."""
SINGLE_LIMIT = 1e-5
"""The same in float32, where a model cannot be run in float64."""


@dataclass
class Applied:
    """What became of one rule: the places it rewrote, those it left and why, and how far the output moved (None: not run)."""

    rule: Rule
    rewrites: list[Rewrite]
    left: dict[str, str]
    difference: float | None = None


@dataclass
class Applying:
    """Applies rules to a model, in place.

    Attributes:
        example: two rows that the model is traced with.
        judged: rows that outputs are compared on; None rehearses: shapes only, nothing is computed.
        single: why the model cannot be run in float64, or empty.
    """

    model: nn.Module
    signature: Signature
    example: Batch
    surgery: Surgery
    judged: Batch | None = None
    done: list[Applied] = field(default_factory=list)
    before: int = 0
    single: str = ""
    _view: View | None = None
    _stale: bool = False

    def run(self, rules: Sequence[Rule], where: str) -> list[Applied]:
        """What became of each rule, in order.

        Raises:
            UserError: a rule moved the output; it is taken back.
        """
        if not self.done:
            self.before = self.operations()
        for rule in rules:
            self.done.append(self._apply(rule, where))
        return self.done

    def operations(self) -> int:
        """Operations in the model's graph that depend on its inputs and on which its output depends."""
        if self._stale:
            self._view = None
        flow = self._seen().flow
        output = flow.steps[-1].index
        return sum(step.live and step.op not in ("placeholder", "getitem") and bool(flow.after[step.index] >> output & 1)
                   for step in flow.steps)  # fmt: skip

    def _seen(self) -> View:
        if self._view is None:
            self._view, self._stale = View(self.model, self.signature, self.example), False
        return self._view

    def _apply(self, rule: Rule, where: str) -> Applied:
        found = rule.find(self._seen())
        if not found.rewrites:
            return Applied(rule, [], found.left)
        if type(rule).holds is not Rule.holds:
            self._try(rule, found)
        moved = self._put_in(rule, found, where) if found.rewrites else None
        if rule.reshapes:
            self._view = None
        else:
            self._seen().forget()
            self._stale = True
        return Applied(rule, found.rewrites, found.left, moved)

    def _try(self, rule: Rule, found: Found) -> None:
        """Takes out of what was found what the graph after it shows not to hold; the model is as it was."""
        back = [rewrite.apply(self.model, self.surgery, rehearsed=True) for rewrite in found.rewrites]
        try:
            after = View(self.model, self.signature, self.example)
        finally:
            for one in reversed(back):
                one()
        reasons = {rewrite.site: reason for rewrite in found.rewrites if (reason := rule.holds(after, rewrite))}
        found.rewrites = [rewrite for rewrite in found.rewrites if rewrite.site not in reasons]
        found.left |= reasons

    def _put_in(self, rule: Rule, found: Found, where: str) -> float | None:
        if self.judged is None:
            for rewrite in found.rewrites:
                rewrite.apply(self.model, self.surgery, rehearsed=True)
            return None
        with contextlib.nullcontext() if self._runs_in_single() else doubled(self.model):
            return self._checked(rule, found, where)

    def _runs_in_single(self) -> bool:
        """Whether the model has an operation that does not exist in float64; found out once."""
        if not self.single:
            assert self.judged is not None
            with doubled(self.model):
                try:
                    output(self.model, self.signature, self.judged)
                except (RuntimeError, TypeError, NotImplementedError) as error:
                    self.single = str(error).strip().splitlines()[0]
        return bool(self.single)

    def _checked(self, rule: Rule, found: Found, where: str) -> float:
        """Puts everything in, or nothing where the output moved."""
        assert self.judged is not None
        run: Callable[..., Tensor] = single_output if self.single else output
        limit, kind = (SINGLE_LIMIT, "float32") if self.single else (LIMIT, "float64")
        before = run(self.model, self.signature, self.judged)
        back: list[Callable[[], None]] = []
        try:
            for rewrite in found.rewrites:
                back.append(rewrite.apply(self.model, self.surgery))
            moved = difference(before, run(self.model, self.signature, self.judged))
            if not moved <= limit:
                what = f"rule {rule.name} moved the output by {moved:.2e} of its largest value in {kind}, more than {limit:g}"
                raise UserError(where, f"{what}; it was taken back", f"Leave {rule.name} off rules.")
        except Exception:
            for one in reversed(back):
                one()
            raise
        return moved
