"""No norms: each becomes factors of the layers after it, by training without labels."""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt
from torch import nn

from calibrate.capture import split
from calibrate.errors import UserError
from calibrate.signature import Batch
from compress.anatomy import Anatomy
from compress.depth.repair import parted
from compress.distillation.progressive import Road, Travelled, travel
from compress.distillation.training import LiveLesson
from compress.hashing.attentions import Hashable, find_attentions
from compress.layers import ChannelAffine, FadedActivation, LinearAttention, is_quantized
from compress.norms.first_blocks import FirstBlocks, first_blocks
from compress.norms.joining import Joinable, join, joinable
from compress.norms.merging import candidates, merge
from compress.norms.replacing import NormExchange, Other, obstacles, own_parameters
from compress.passes.contract import Context, Pass, Target
from compress.rehearsal import stand_in
from compress.surgery import Surgery

__all__ = ["ReplaceNorms"]

_FIRST = 4.0
"""Times the rate of the model is that of its first blocks alone."""


class ReplaceNorms(Pass):
    """Train the layer norms (or RMS norms) of a model away: what is left of each is one factor and one constant a channel, which
    the linear layers after it take in.

    The progressive re-parameterised batch normalisation of SLAB (Guo et al. 2024, arXiv 2405.11582, sec. 3.1): a norm's share
    falls from 1 to 0 over the first part of the training, that of RepBN(x) = BN(x) + alpha x rises. The training is a
    distillation without labels: the model should give again, at each block and as its output, what it gave with its norms, on
    calibration rows. The more rows there are the better (thousands); a fourth, 64 at most, is held out and says which state is
    kept. An interrupted run goes on from the last hundred steps. RepBN begins as near to its norm as it can be.

    Where nine tenths of the error arise in the first blocks, as behind a patch embedding, those learn alone first
    (``first_steps``), to give again what they gave: such a step costs a fraction of one of the whole model, and leaves less to
    it.

    Factors go into a norm's readers where those are linear layers and nothing else reads it: that is tried, not looked up. In
    models that add what a norm gives (BERT) one product and one sum stay, which are no normalisation. Norms over other axes, or
    that run more than once, stay and are named.

    ``attention: linear`` exchanges softmax attention in the same steps, for the simplified linear attention of sec. 3.2:
    rectified queries and keys, and a 5x5 convolution over the values of patches. Any attention is found that calls torch's
    scaled_dot_product_attention, once in a block, without a causal mask; others stay and are named.

    ``fade`` names blocks whose MLP loses its activation in the same steps, as in VanillaNet's deep training (Chen et al. 2023,
    arXiv 2305.12972, sec. 3.1): its two layers then are one of the model's own width, an eighth of the operations where the MLP
    was four times as wide. What that costs the report shows; MLPs with gates are refused.
    """

    name: ClassVar[str] = "replace_norms"
    source: ClassVar[str] = "Guo et al. 2024, arXiv 2405.11582"
    needs_calibration: ClassVar[bool] = True

    sites: list[str] | None = Field(None, description="Roles or module paths, wildcards allowed. Default: every norm.")
    skip: list[str] = Field([], description="Roles or module paths whose norms stay, wildcards allowed.")
    steps: PositiveInt = Field(3000, description="Steps of training.")
    rows: PositiveInt = Field(32, description="Calibration rows in one step.")
    rate: PositiveFloat = Field(5e-4, description="The largest learning rate, of Adam.")
    decay: float = Field(0.7, ge=0, le=0.9, description="Share of the steps over which the norms fade.")
    first_steps: NonNegativeInt | None = Field(
        None, description="Steps in which the first blocks alone learn, where the error arises there. Default: twice the steps."
    )
    statistics: Literal["fixed", "batch"] = Field(
        "fixed", description="Of RepBN in training: those of the calibration rows, or of each batch, as in the paper."
    )
    varied: bool = Field(False, description="Images are mirrored and shifted at random in training; for photographs.")

    attention: Literal["softmax", "linear"] = Field(
        "softmax",
        description="linear: softmax attention is exchanged too; its time then grows with the tokens, not their square.",
    )

    fade: list[int] = Field(
        [], description="Numbers of the blocks whose MLP becomes one linear layer, -1 is the last; none named: none does."
    )

    def targets(self, model: nn.Module, anatomy: Anatomy) -> list[Target]:
        found, _ = self._found(model, anatomy)
        if self.varied and not _images(anatomy):
            raise UserError(self.name, "varied: the model has no images [B, C, H, W] as an input", "Leave varied out.")
        roles = {site.path: ", ".join(site.roles) for site in anatomy.sites}
        targets = [Target(path, "norm", f"{count} channels: trained to factors and constants") for path, count in found.items()]
        learning = [
            path
            for path, module in model.named_modules()
            if path and path not in found and any(one.is_floating_point() for one in module.parameters(recurse=False))
        ]
        for path, one in self._attentions(model, anatomy)[0].items():
            targets.append(Target(path, "attention", f"linear attention over {one.keys} keys"))
        for path, mlp in self._fading(model, anatomy).items():
            targets.append(Target(path, "mlp", f"{mlp.up} and {mlp.down} become one layer"))
        return targets + [Target(path, roles.get(path, ""), "learns with them") for path in learning]

    def skips(self, model: nn.Module, anatomy: Anatomy) -> dict[str, str]:
        return self._found(model, anatomy)[1] | self._attentions(model, anatomy)[1]

    @property
    def assumes(self) -> str:
        return "what training brings is found by the run"

    def rehearse(self, model: nn.Module, anatomy: Anatomy, surgery: Surgery) -> None:
        found, _ = self._found(model, anatomy)
        for path, one in self._attentions(model, anatomy)[0].items():
            surgery.attach(model, path, _linear(one, anatomy))
        mlps = self._fading(model, anatomy)
        for path in mlps:
            surgery.attach(model, path, FadedActivation())
        with torch.no_grad():
            self._left(
                model, anatomy, surgery, mlps, {path: (torch.ones(count), torch.zeros(count)) for path, count in found.items()}
            )

    def run(self, model: nn.Module, context: Context) -> nn.Module:
        found, skipped = self._found(model, context.anatomy)
        attentions, soft = self._attentions(model, context.anatomy)
        fit, held = ([*split(part, self.rows)] for part in parted(context.calibration()))
        if not held:
            raise UserError(
                self.name, "there are no calibration rows to learn from", "Give it rows: thousands are better than few."
            )
        teacher = stand_in(model)
        own_parameters(model)
        logits = bool(context.anatomy.roles.get("head")) and context.signature.output in ("tensor", "logits")
        blocks = [block.path for block in context.anatomy.blocks]
        linear = {path: _linear(one, context.anatomy) for path, one in attentions.items()}
        mlps = self._fading(model, context.anatomy)
        faded = {path: FadedActivation() for path in mlps}
        others: list[Other] = [*linear.values(), *faded.values()]
        fixed = self.statistics == "fixed"
        exchange = NormExchange.of(model, found, fit, lambda batch: context.call(model, batch), others, fixed)
        for path, layer in zip([*linear, *faded], others, strict=True):
            context.surgery.attach(model, path, layer)
        first, warnings = self._first(
            model, teacher, (fit, held), exchange, [*zip([*linear, *faded], others, strict=True)], context
        )
        lesson = LiveLesson(teacher, context.call, (fit, held), blocks, "logits" if logits else "features")
        road = Road(self.steps, self.rate, self.decay, seed=context.seed, varied=self.varied)
        taught = travel(model, context.call, lesson, exchange, road, context.progress, context.scratch)
        affine = {}
        with torch.no_grad():
            for path, part in exchange.parts.items():
                factor, constant = part.affine()
                affine[path] = (factor.detach(), constant.detach())
            merged = self._left(model, context.anatomy, context.surgery, mlps, affine)
        context.report |= {
            "norms": {path: {"channels": found[path], "merged_into": merged[path]} for path in found},
            "attentions": list(linear),
            "joined": list(mlps),
            "skipped": skipped | soft,
            "first_blocks": first,
            "training": taught.json(),
            "warnings": warnings + _warnings(taught),
        }
        return model

    def _first(
        self,
        model: nn.Module,
        teacher: nn.Module,
        rows: tuple[list[Batch], list[Batch]],
        exchange: NormExchange,
        others: list[tuple[str, Other]],
        context: Context,
    ) -> tuple[dict[str, Any], list[str]]:
        """The first blocks learn alone; what there is to report, and what to warn of."""
        steps = 2 * self.steps if self.first_steps is None else self.first_steps
        blocks = [block.path for block in context.anatomy.blocks]
        if not steps:
            return {}, []
        first = FirstBlocks((), frozenset(), (), {}, "there are none")
        if blocks:
            first = first_blocks(model, context.call, rows[1], blocks, exchange, others)
        told: dict[str, Any] = {"errors": dict(first.errors), "paths": list(first.paths), "because": first.because}
        if not first.paths:
            return told, [f"first_steps: no block learns alone: {first.because}"] if self.first_steps else []
        lesson = LiveLesson(teacher, context.call, rows, first.paths)
        road = Road(steps, _FIRST * self.rate, 0.0, seed=context.seed, varied=self.varied)
        folder = None if context.scratch is None else context.scratch / "first-blocks"
        taught = travel(model, context.call, lesson, exchange, road, context.progress, folder)
        if taught.best_step:
            exchange.done, exchange.done_others = first.norms, first.others
        return told | {"training": taught.json()}, [f"first blocks: {one}" for one in _warnings(taught)]

    def _left(
        self,
        model: nn.Module,
        anatomy: Anatomy,
        surgery: Surgery,
        mlps: dict[str, Joinable],
        affine: dict[str, tuple[torch.Tensor, torch.Tensor]],
    ) -> dict[str, list[str]]:
        """Puts factors and constants in the place of norms, and into what reads them, and joins MLPs; by norm, what took them."""
        signature, example = anatomy.traced
        row = {name: tensor[:1] for name, tensor in example.items()}
        for path, (factor, constant) in affine.items():
            layer = ChannelAffine(len(factor))
            layer.weight.copy_(factor)
            layer.bias.copy_(constant)
            surgery.replace(model, path, layer)
        merged = {path: merge(model, surgery, path, signature.call, row, candidates(anatomy, path)) for path in affine}
        for one in mlps.values():
            join(model, surgery, one)
        return merged

    def _attentions(self, model: nn.Module, anatomy: Anatomy) -> tuple[dict[str, Hashable], dict[str, str]]:
        """The attentions that are exchanged, by the path of their block; and why others are not.

        Raises:
            UserError: there is none.
        """
        if self.attention == "softmax":
            return {}, {}
        found, reasons = find_attentions(model, anatomy)
        if not found:
            why = next((f"{path}: {reason}." for path, reason in reasons.items()), "See what it has with: compress inspect.")
            raise UserError(self.name, "attention: linear finds no attention that can be made linear", why)
        return found, reasons

    def _fading(self, model: nn.Module, anatomy: Anatomy) -> dict[str, Joinable]:
        """The MLPs that become one layer, by the path of their block.

        Raises:
            UserError: a block that does not exist, or one that cannot.
        """
        count = len(anatomy.blocks)
        for number in self.fade:
            if not -count <= number < count:
                there = f"There are {count}: 0 to {count - 1}." if count else "No blocks were found; see: compress inspect."
                raise UserError(self.name, f"fade: there is no block {number}", there)
        named = {number % count for number in self.fade}
        found, reasons = joinable(model, anatomy, [block for block in anatomy.blocks if block.index in named])
        for path, reason in reasons.items():
            raise UserError(self.name, f"fade: {path}: {reason}", "Take its number off fade.")
        return found

    def _found(self, model: nn.Module, anatomy: Anatomy) -> tuple[dict[str, int], dict[str, str]]:
        """The norms that are replaced, with their channels; and why others are not, by path.

        Raises:
            UserError: there is none, or the model is quantized.
        """
        if any(is_quantized(module) for module in model.modules()):
            what = "the model is quantized, and its codes cannot be trained"
            raise UserError(self.name, what, "Put replace_norms before quantize.")
        chosen = anatomy.sites if self.sites is None else anatomy.select(self.sites, self.name)
        norms = [site.path for site in chosen if site.kind == "norm"]
        left = {site.path for site in anatomy.select(self.skip, self.name)} if self.skip else set()
        signature, example = anatomy.traced
        reasons = {path: "named under skip" for path in norms if path in left}
        bare = {path for path in norms if model.get_submodule(path)._parameters.get("weight") is None}
        reasons |= dict.fromkeys(bare - left, "it has no weight")
        reasons |= obstacles(model, signature.call, example, [path for path in norms if path not in left | bare])
        found = {path: _channels(model.get_submodule(path)) for path in norms if path not in reasons}
        if not found:
            why = next((f"{path}: {reason}." for path, reason in reasons.items()), "See what it has with: compress inspect.")
            raise UserError(self.name, "no norm can be replaced", why)
        return found, reasons


def _images(anatomy: Anatomy) -> bool:
    return any(tensor.dim() == 4 and tensor.is_floating_point() for tensor in anatomy.traced[1].values())


def _linear(one: Hashable, anatomy: Anatomy) -> LinearAttention:
    """With a convolution where the tokens of an image are a square of patches, after one or two others."""
    for prefix in (0, 1, 2) if _images(anatomy) and one.queries == one.keys else ():
        side = math.isqrt(one.keys - prefix)
        if side > 1 and side**2 == one.keys - prefix:
            return LinearAttention(one.head_dim, one.value_dim, (side, side), prefix)
    return LinearAttention(one.head_dim, one.value_dim)


def _channels(module: nn.Module) -> int:
    return int(module.get_parameter("weight").numel())


def _warnings(taught: Travelled) -> list[str]:
    said = []
    if taught.stopped:
        said.append(f"training stopped: {taught.stopped}")
    if not taught.best_step:
        said.append("training brought nothing: the norms are what fits them best without training; give more rows or steps")
    return said
