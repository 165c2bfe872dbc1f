"""Fewer, larger operators that compute the same function."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field
from torch import nn

from calibrate.errors import UserError
from calibrate.signature import Batch
from compress.anatomy import Anatomy
from compress.passes.contract import Context, Pass, Target, unknown
from compress.rehearsal import stand_in
from compress.rewrites.applying import RULES, SINGLE_LIMIT, Applied, Applying
from compress.rewrites.rule import Rule
from compress.surgery import Surgery

__all__ = ["Fuse"]

_ROWS = 4
"""Rows that outputs are compared on."""


class Fuse(Pass):
    """Rewrite a model into one of fewer operators that gives the same, each rewrite proved by the model's graph and checked.

    ``branches``: parallel branches of convolutions, BatchNorm and the value itself become one convolution (RepVGG, MobileOne,
    FastViT). ``batch_norm``: into the convolution or linear layer before or behind it. ``layer_scale``: into the layer before.
    ``linear_chain``: a linear layer right after another becomes one with it, where that costs no more. ``rms_norm``,
    ``layer_norm``: the norm's weights go into the linear layers that read it. ``attention_scale``: the scale of the scores goes
    into the query projection. ``dropout``: what does nothing is taken out. ``duplicates``: equal layers become one. ``qkv``:
    query, key and value projections of one tensor become one product.

    Each rule looks at the traced graph, not at names of classes: who reads a value and what happens between. A place that looks
    alike and is left is reported with the reason. After each rule the model's output is compared with that before it, in float64
    on calibration rows; where it moved by more than 1e-9 of its largest value the rule is taken back and the run stops. A model
    with an operation that does not exist in float64 is judged in float32, to 1e-5, and the report says so.

    Quantized and cast layers are left as they are; the rest of the model is rewritten around them. By default all rules are
    applied but those that bring no runtime anything: ``layer_norm``, which takes from a later ``quantize`` the place where its
    factors cost nothing, ``attention_scale``, which costs a later ``quantize`` accuracy, and ``dropout``, which files do not have
    anyway.
    """

    name: ClassVar[str] = "fuse"
    source: ClassVar[str] = "Ding et al. 2021, RepVGG, arXiv 2101.03697, sec. 3.3; Jacob et al. 2018, arXiv 1712.05877, sec. 3.2"

    rules: list[str] | None = Field(
        None,
        min_length=1,
        description="The rules that are applied, in an order of their own: "
        + ", ".join(rule.name for rule in RULES)
        + ". One that is named and matches nothing is an error. Default: all but layer_norm, attention_scale and dropout.",
        json_schema_extra={
            "anyOf": [
                {"type": "array", "minItems": 1, "items": {"type": "string", "enum": [rule.name for rule in RULES]}},
                {"type": "null"},
            ]
        },
    )

    def targets(self, model: nn.Module, anatomy: Anatomy) -> list[Target]:
        touched: dict[str, list[str]] = {}
        for applied in self._rehearsed(stand_in(model), anatomy, Surgery()):
            for rewrite in applied.rewrites:
                for path, action in rewrite.touches.items():
                    touched.setdefault(path, []).append(action)
        roles = {site.path: ", ".join(site.roles) for site in anatomy.sites}
        return [Target(path, roles.get(path, "module"), ", ".join(dict.fromkeys(actions))) for path, actions in touched.items()]

    def skips(self, model: nn.Module, anatomy: Anatomy) -> dict[str, str]:
        if self.rules is None:
            return {}
        found = self._rehearsed(stand_in(model), anatomy, Surgery())
        return {path: f"{applied.rule.name}: {reason}" for applied in found for path, reason in applied.left.items()}

    def rehearse(self, model: nn.Module, anatomy: Anatomy, surgery: Surgery) -> None:
        self._rehearsed(model, anatomy, surgery)

    def run(self, model: nn.Module, context: Context) -> nn.Module:
        signature, example = context.anatomy.traced
        rows = next(iter(context.calibration()), None) or example
        judged: Batch = {name: tensor[:_ROWS] for name, tensor in rows.items()}
        applying = Applying(model, signature, example, context.surgery, judged)
        chosen = self._chosen()
        for number, rule in enumerate(chosen):
            context.progress(number, len(chosen), rule.name)
            applying.run([rule], f"{self.name}: {rule.name}")
        self._demand(applying.done)
        before = applying.before
        context.report |= {
            "rules": {applied.rule.name: _told(applied) for applied in applying.done},
            "operations_before": before,
            "operations_after": applying.operations(),
            "rows": len(next(iter(judged.values()))),
        }
        warnings = [] if any(applied.rewrites for applied in applying.done) else ["no rule matched: the model is as it was"]
        if applying.single:
            warnings.append(f"outputs were compared in float32, to {SINGLE_LIMIT:g}: {applying.single}")
        if warnings:
            context.report["warnings"] = warnings
        return model

    def _chosen(self) -> list[Rule]:
        """The rules that are applied, in order.

        Raises:
            UserError: a name that no rule has.
        """
        known = [rule.name for rule in RULES]
        for name in self.rules or ():
            if name not in known:
                raise unknown(f"{self.name}.rules", "rule", str(name), known)
        return [rule for rule in RULES if (rule.default if self.rules is None else rule.name in self.rules)]

    def _rehearsed(self, model: nn.Module, anatomy: Anatomy, surgery: Surgery) -> list[Applied]:
        signature, example = anatomy.traced
        done = Applying(model, signature, example, surgery).run(self._chosen(), self.name)
        self._demand(done)
        return done

    def _demand(self, done: list[Applied]) -> None:
        """Refuses a rule that was named and matched nothing."""
        for applied in done:
            if self.rules is not None and not applied.rewrites:
                reasons = [f"{path}: {reason}." for path, reason in applied.left.items()]
                hint = " ".join(reasons[:2]) or "Nothing in the model looks like it."
                raise UserError(f"{self.name}.rules", f"{applied.rule.name} matches nothing in this model", hint)


def _told(applied: Applied) -> dict[str, Any]:
    sites = [rewrite.site for rewrite in applied.rewrites]
    told: dict[str, Any] = {"matched": len(sites), "sites": sites, "left": applied.left}
    return told if applied.difference is None else told | {"difference": applied.difference}
