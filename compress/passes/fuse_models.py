"""Two or more trained models become one."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import ConfigDict, Field, NonNegativeInt, PositiveFloat, PositiveInt, PrivateAttr, model_validator
from torch import Tensor, nn

from calibrate.errors import UserError
from compress.algorithms.transport import Solver
from compress.anatomy import Anatomy
from compress.fusion.activations import listen
from compress.fusion.axes import Layout, layout_of
from compress.fusion.matching import Pair, Residual, plans_by_activations, plans_by_weights
from compress.fusion.others import Loaded, Other, files_of, load, parameters_of
from compress.fusion.tuning import tune
from compress.norms.replacing import own_parameters
from compress.passes.contract import Context, Pass, Target
from compress.rehearsal import stand_in
from compress.surgery import Surgery

__all__ = ["FuseModels"]


class FuseModels(Pass):
    """Fuse other trained models of the same architecture and depth, of the same or another width, into the recipe's model: their
    units are matched with its units by optimal transport, and weights of matched units are averaged.

    Transformer fusion (Imfeld et al. 2024, arXiv 2310.05719). Which units are alike is told by what they do on the same
    calibration rows (``metric: activations``, no labels; about 200 rows) or by their weights. The result has the shape of
    the recipe's model, which is the anchor.

    What differs from the paper: heads are matched with heads, and units move inside them only; queries and keys of a head have
    one plan; models of other widths have the right marginals (what is made is averaged, what is read is spread); and the
    residual stream has one plan for all of its places (``residual: shared``), as its channels have one order in each model: what
    is matched one to one then leaves the other model's function alone. The paper's ways of joining plans at each residual
    connection are the other values of ``residual``.

    Two models from different seeds lose accuracy when they are fused, less than when they are averaged as they are; the
    paper trains the fused model for a short while, with labels. ``tune`` does that without them, on all calibration rows
    (thousands are better): the fused model learns to give the mean of its parents' probabilities (of their outputs, for one
    number or several labels at once). The last fourth of the rows, 64 at most, is held out and says which state is kept; an
    interrupted run goes on from the last hundred steps.

    Models that were fine-tuned from the same weights are matched already: ``transport: none`` averages them as they are.

    That the heads, neurons and channels of a model can be put in another order is tried on the model first; one that then
    computes something else is refused (grouped queries, relative positions by head, streams that change their width).
    """

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    name: ClassVar[str] = "fuse_models"
    source: ClassVar[str] = "Imfeld et al. 2024, arXiv 2310.05719"
    writes: ClassVar[bool] = True

    others: str | Other | tuple[str | Other, ...] = Field(
        alias="with",
        description="The other model, or several: as in model.source (relative to the recipe), a safetensors file with other "
        "weights of the recipe's own model, or {source: timm:name, checkpoint: file}.",
    )
    alpha: float | None = Field(
        None, ge=0, le=1, description="Share of the recipe's model; the others share the rest. Default: the same for all."
    )
    metric: Literal["activations", "weights"] = Field("activations", description="What tells that two units are alike.")
    transport: Literal["emd", "sinkhorn", "none"] = Field(
        "emd", description="emd: exact, one to one for equal widths; sinkhorn: soft; none: weights are averaged as they are."
    )
    regularization: PositiveFloat = Field(0.06, description="Of sinkhorn, for costs of which the largest is 1.")
    residual: Residual = Field(
        "shared",
        description="Plan of the residual stream: one for all places (shared), or joined at each connection: mean of the "
        "stream's and the branch's plan, weighted by how large both are (one number, or one a channel), or one of them.",
    )
    samples: PositiveInt = Field(200, description="Calibration rows that activations are compared on.")
    tune: NonNegativeInt = Field(0, description="Steps of training after the fusion, without labels.")
    tune_rows: PositiveInt = Field(32, description="Calibration rows in one step of training.")
    tune_rate: PositiveFloat = Field(5e-4, description="The largest learning rate of the training, of Adam.")

    _fingerprints: list[str] = PrivateAttr(default_factory=list)

    @model_validator(mode="after")
    def _whole(self) -> FuseModels:
        if not self.models:
            raise ValueError("with names no model\nName one, such as with: hf:path/to/other.")
        if self.metric == "weights" and self.residual.startswith("weighted"):
            what = f"residual: {self.residual} weighs activations, and metric is weights"
            raise ValueError(f"{what}\nTake residual: mean or shared.")
        if wrong := self._useless():
            raise ValueError(wrong)
        return self

    def _useless(self) -> str | None:
        """An option that would say nothing, and the way out."""
        for option in ("metric", "residual", "samples"):
            if option in self.chosen and self.transport == "none":
                return f"{option} says nothing with transport: none\nLeave it out, or use transport: emd."
        if "samples" in self.chosen and self.metric == "weights":
            return "samples says nothing with metric: weights\nLeave it out, or use metric: activations."
        if "regularization" in self.chosen and self.transport != "sinkhorn":
            return f"regularization says nothing with transport: {self.transport}\nLeave it out, or use transport: sinkhorn."
        for option in ("tune_rows", "tune_rate"):
            if option in self.chosen and not self.tune:
                return f"{option} says nothing without training\nLeave it out, or add tune: 1000."
        return None

    @property
    def models(self) -> tuple[Other, ...]:
        """The other models."""
        named = self.others if isinstance(self.others, tuple) else (self.others,)
        return tuple(Other(source=one) if isinstance(one, str) else one for one in named)

    @property
    def shares(self) -> list[float]:
        """Of the anchor and the other models in the average."""
        count = len(self.models)
        alpha = 1 / (count + 1) if self.alpha is None else self.alpha
        return [alpha, *[(1 - alpha) / count] * count]

    @property
    def calibrates(self) -> bool:
        return bool(self.tune) or (self.metric == "activations" and self.transport != "none")

    @property
    def reads(self) -> list[Path]:
        return [file for one in self.models for file in files_of(one, self.base)]

    @property
    def fingerprints(self) -> list[str]:
        return self._fingerprints

    @property
    def assumes(self) -> str:
        return "how much of its parents' accuracy the fused model keeps is found by the run"

    def targets(self, model: nn.Module, anatomy: Anatomy) -> list[Target]:
        layout, loaded = self._loaded(model, anatomy)
        roles = {site.path: ", ".join(site.roles) for site in anatomy.sites}
        owners = dict.fromkeys(name.rpartition(".")[0] for name, _ in model.named_parameters() if name not in layout.left)
        action = "averaged with " + ", ".join(one.name for one in loaded)
        return [Target(path, roles.get(path, ""), action) for path in owners if path]

    def skips(self, model: nn.Module, anatomy: Anatomy) -> dict[str, str]:
        left = layout_of(model, anatomy, self.name).left
        return {name.rpartition(".")[0]: reason for name, reason in left.items()}

    def rehearse(self, model: nn.Module, anatomy: Anatomy, surgery: Surgery) -> None:
        pass

    def run(self, model: nn.Module, context: Context) -> nn.Module:
        layout, loaded = self._loaded(model, context.anatomy)
        anchor = stand_in(model)
        own_parameters(model)
        pairs, told = [], []
        for one in loaded:
            pair = Pair((parameters_of(one.model), parameters_of(anchor)), (one.layout, layout), self._solver, self.residual)
            pairs.append((pair, self._plans(pair, one, anchor, context)))
            told.append({"from": one.name, "fingerprint": one.fingerprint, **_distances(*pairs[-1])})
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name not in layout.left:
                    parts = [parameter.double(), *(pair.moved(name, plans) for pair, plans in pairs)]
                    parameter.copy_(_mean(parts, self.shares))
        context.report |= {
            "models": told,
            "shares": self.shares,
            "matched_by": "nothing" if self.transport == "none" else f"{self.metric}, {self.transport}, residual {self.residual}",
            "left": self.skips(model, context.anatomy),
        }
        if self.tune:
            self._tune(model, [anchor, *(one.model for one in loaded)], layout, context)
        return model

    @property
    def _solver(self) -> Solver:
        return Solver("sinkhorn" if self.transport == "sinkhorn" else "emd", self.regularization)

    def _loaded(self, model: nn.Module, anatomy: Anatomy) -> tuple[Layout, list[Loaded]]:
        """The axes of the recipe's model, and the other models, each checked against it."""
        if self.transport != "none" and importlib.util.find_spec("ot") is None:
            raise UserError(self.name, "POT is not installed", "pip install 'transformer-compress[fusion]'")
        layout = layout_of(model, anatomy, self.name)
        if self.residual != "shared" and layout.scales:
            what = f"residual: {self.residual} would match {layout.scales[0]}, which scales a branch, as the stream is behind it"
            raise UserError(self.name, what, "Take residual: shared for models with LayerScale.")
        loaded = [load(one, model, anatomy, layout, self.base, self.given, self.name) for one in self.models]
        self._fingerprints = [one.fingerprint for one in loaded]
        for one in loaded:
            if self.transport == "none" and one.layout.axes != layout.axes:
                what = f"{one.name} is of another width or has other heads, and transport: none averages weights as they are"
                raise UserError(self.name, what, "Take transport: emd.")
        return layout, loaded

    def _plans(self, pair: Pair, one: Loaded, anchor: nn.Module, context: Context) -> dict[str, Tensor]:
        if self.transport == "none":
            return {name: torch.eye(axis.size, dtype=torch.float64) / axis.size for name, axis in pair.layouts[1].axes.items()}
        if self.metric == "weights":
            return plans_by_weights(pair)
        models = one.model, anchor
        found = listen(models, pair.layouts, context.call, context.calibration(), self.samples, context.progress)
        context.report["rows"] = found.rows
        return plans_by_activations(pair, found)

    def _tune(self, model: nn.Module, parents: list[nn.Module], layout: Layout, context: Context) -> None:
        """Models whose output is the stream itself learn from the anchor alone: the others' channels have another order."""
        if layout.output:
            parents, shares = parents[:1], [1.0]
        else:
            shares = self.shares
        taught = tune(model, parents, shares, context, self.tune, self.tune_rows, self.tune_rate)
        context.report["training"] = taught.json()
        warnings = [f"training stopped: {taught.stopped}"] if taught.stopped else []
        if not taught.best_step:
            warnings.append("training brought nothing; give more calibration rows, or another tune_rate")
        context.report["warnings"] = warnings


def _mean(parts: list[Tensor], shares: list[float]) -> Tensor:
    """Parts without a share do not count, whatever they hold."""
    found = [share * part for share, part in zip(shares, parts, strict=True) if share]
    return found[0] if len(found) == 1 and max(shares) == 1 else torch.stack(found).sum(0)


def _distances(pair: Pair, plans: dict[str, Tensor]) -> dict[str, Any]:
    """Of the other model's weights from the anchor's, over the anchor's size: matched, and as they were (null: other shapes)."""
    sums = [0.0, 0.0, 0.0]
    alike = True
    for name, own in pair.weights[1].items():
        if name in pair.layouts[1].left:
            continue
        its, size = pair.weights[0][name], own.double()
        sums[0] += float((pair.moved(name, plans) - size).square().sum())
        alike = alike and its.shape == own.shape
        sums[1] += float((its.double() - size).square().sum()) if alike else 0.0
        sums[2] += float(size.square().sum())
    matched, given = ((total / max(sums[2], 1e-300)) ** 0.5 for total in sums[:2])
    return {"distance_matched": matched, "distance_as_given": given if alike else None}
