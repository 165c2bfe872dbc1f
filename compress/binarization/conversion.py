"""The run of ``binarize``: which sites, their bits, the repair, the ranges of inputs, and the layers that stay."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from calibrate.capture import capture
from calibrate.errors import UserError
from calibrate.fidelity import sqnr_db
from calibrate.grid import Grid
from calibrate.ranges import Channels
from calibrate.signature import Batch
from compress.algorithms.binarizing import Binarized
from compress.binarization.binary_sites import BinaryJob, binary_layer, bits_of, plan_binary
from compress.binarization.costs import counted
from compress.binarization.latent import Latent, LatentActivation
from compress.binarization.products import attach_products
from compress.binarization.repair import Plan, repaired
from compress.depth.grafts import grafting
from compress.depth.repair import Judge, finite, parted
from compress.layers import BinaryActivation, BinaryCodes
from compress.layers.conversion import weight_of
from compress.layers.fitting import Seen, fit_input
from compress.quantization.calibrated_inputs import calibrated
from compress.quantization.quantized_sites import Job, input_grid
from compress.quantization.sensitivity import losses_alone

if TYPE_CHECKING:
    from compress.passes.binarize import Binarize
    from compress.passes.contract import Context

__all__ = ["binarize"]


def binarize(step: Binarize, model: nn.Module, context: Context) -> nn.Module:
    """Replaces the module at every site that ``step`` takes, trains the layers, and reports what was done.

    Raises:
        UserError: calibration rows do not reach a site, or there are none and the options need them.
    """
    return _Binarizing(step, model, context).run()


_RUNS_AS = {
    "static": "INT8 products of signs and inputs of 8 bits: no runtime here has a kernel for bits",
    "binary": "INT8 products of codes -1, 0 and 1: no runtime here has a kernel for bits, and inputs of one bit bring no speed",
    "none": "float products: the weights are made float when the file is loaded",
}


class _Binarizing:
    """One run of the pass."""

    def __init__(self, step: Binarize, model: nn.Module, context: Context) -> None:
        self.step, self.model, self.context = step, model, context
        self.jobs, self.skipped = plan_binary(step, model, context.anatomy)
        self.told: dict[str, Any] = {}
        rows = list(context.calibration()) if step.calibrates else []
        if step.calibrates and not rows:
            raise UserError(step.name, "there are no calibration rows", "Name some under data.calibration.")
        self.rows = rows
        self.fit, self.held = parted(rows) if rows else ([], [])
        self.few = _first(rows, step.input_rows)

    def run(self) -> nn.Module:
        step, model, context = self.step, self.model, self.context
        seen = self._channels()
        bits = {job.site.path: bits_of(step, self._weight(job)) for job in self.jobs}
        latents = {job.site.path: self._latent(job, bits[job.site.path], seen) for job in self.jobs}
        others = self._choose(latents)
        attentions, unlike = step.attentions(model, context.anatomy)
        judge = Judge(model, context.call, self.held) if self.rows else None
        original = copy.deepcopy(model) if step.repairs else None
        sites = {path: self._says(path, bits[path]) for path in latents}
        products = attach_products(model, context, attentions, self.few)
        with grafting(model, latents):
            self._judged("before", judge)
            if original is not None:
                for layer in products:
                    layer.learning = True
                self._repair(original, latents)
                for layer in products:
                    layer.learning = False
                self._judged("after", judge)
            del original
            self.told |= {"rows": _count(self.fit), "held_rows": _count(self.held)} if self.rows else {}
            inputs = self._inputs(latents)
        for number, job in enumerate(self.jobs):
            path = job.site.path
            context.progress(number, len(self.jobs), path)
            self._put(job, latents[path], bits[path], inputs.get(path), sites[path])
        context.progress(len(self.jobs), len(self.jobs), "binarized")
        costs = self._costs()
        for path, layer in costs.pop("layers").items():
            sites[path] |= layer
        kept = {path: sites[path] for path in latents}
        context.report |= {"sites": kept, "skipped": self.skipped | others | unlike, "repair": self.told, "costs": costs}
        context.report["runs_as"] = _RUNS_AS[step.activations]
        self._rest(others)
        return model

    def _weight(self, job: BinaryJob) -> Tensor:
        return weight_of(self.model.get_submodule(job.site.path), job.site.kind)

    def _channels(self) -> dict[str, Channels]:
        """What each site's input channels are like on the rows."""
        if not self.rows or not (self.step.bias_correction or self.step.activations == "binary"):
            return {}
        requests = {job.site.path: (Channels(),) for job in self.jobs}
        captured = capture(
            self.model,
            self.context.call,
            self.few,
            requests,
            batch_size=self.step.batch_size,
            progress=lambda rows: self.context.progress(rows, _count(self.few), "calibration rows"),
        )
        if captured.silent:
            silent = ", ".join(captured.silent)
            hint = f"Leave out what does not run: skip: [{silent}]."
            raise UserError(self.step.name, f"{silent} never ran on the calibration rows", hint)
        found: dict[str, Channels] = {}
        for path, observers in captured.observers.items():
            assert isinstance(observers[0], Channels)
            found[path] = observers[0]
        return found

    @torch.no_grad()
    def _latent(self, job: BinaryJob, bits: Binarized, seen: Mapping[str, Channels]) -> Latent:
        module, channels = self.model.get_submodule(job.site.path), seen.get(job.site.path)
        bias = getattr(module, "bias", None)
        latent = Latent(module, job.site.kind, bits, bias)
        if channels is not None and latent.bias is not None and self.step.bias_correction:
            lost = (latent.weight - latent.binary()).flatten(1)
            if lost.shape[1] == channels.mean.numel():
                latent.bias.data += lost @ channels.mean.to(lost)
        if job.activations == "binary" and channels is not None:
            mean, nonnegative = channels.mean, bool((channels.low >= 0).all())
            spread = (channels.mean_square - mean.square()).clamp(min=0.0).sqrt().mean()
            size = 1.6 * spread if nonnegative else 0.8 * spread
            latent.activation = LatentActivation(mean, size.clamp(min=1e-6), nonnegative)
        return latent

    def _choose(self, latents: dict[str, Latent]) -> dict[str, str]:
        """With ``count`` leaves the sites that lose least alone; returns why the others are left."""
        count = self.step.count
        if count is None:
            return {}
        progress = self.context.progress
        losses = losses_alone(self.model, self.context, latents, self.step.sensitivity_rows, progress)
        order = sorted(latents, key=lambda path: losses[path].noise)
        others = dict.fromkeys(order[count:], f"count: {count} sites lose less alone")
        self.told["alone"] = {path: losses[path].json() for path in order}
        for path in others:
            del latents[path]
        self.jobs = [job for job in self.jobs if job.site.path in latents]
        return others

    def _judged(self, when: str, judge: Judge | None) -> None:
        """The model on the held-out rows, and by labels where there are rows that may judge."""
        if judge is None:
            return
        self.told[f"sqnr_db_{when}"] = finite(judge.sqnr_db(self.model))
        if self.context.validation is not None:
            self.told[f"validation_{when}"] = self.context.validation.judge(self.model).json()

    def _repair(self, original: nn.Module, latents: Mapping[str, Latent]) -> None:
        step = self.step
        seconds = None if step.minutes is None else 60.0 * step.minutes
        seed = self.context.seed
        plan = Plan(step.block_repair, step.repair, step.repair_rows, step.rate, step.patience, seconds, seed)
        self.told |= repaired(self.model, original, self.context, latents, (self.fit, self.held), plan)

    def _inputs(self, latents: Mapping[str, Latent]) -> dict[str, Seen]:
        """What inputs of 8 bits have to hold, as the layers are now."""
        sites = [job.site for job in self.jobs if job.activations == "static"]
        if not sites:
            return {}
        grid = Grid(8)
        kinds = [replace(site, kind="linear") if site.kind == "conv1d" else site for site in sites]  # a Latent has [O, I]
        jobs = [Job(site, grid, rounds_input=True) for site in kinds]
        context = replace(self.context, calibration=lambda: iter(self.few), rows=_count(self.few))
        captured = calibrated(self.step.ranges([site.path for site in sites]), self.model, context, jobs)
        assert captured is not None
        return {site.path: Seen.of(captured, site.path) for site in sites}

    @torch.no_grad()
    def _put(self, job: BinaryJob, latent: Latent, began: Binarized, seen: Seen | None, says: dict[str, Any]) -> None:
        """Replaces one module by the layer that holds what was learnt."""
        path, activation = job.site.path, latent.activation
        nonnegative = isinstance(activation, LatentActivation) and activation.nonnegative
        layer = binary_layer(self.step, self.model, job, nonnegative)
        bits, held = latent.bits(began), layer.quantized_weight
        assert isinstance(held, BinaryCodes)
        held.store(bits.planes.reshape(len(bits.planes), *held.shape), bits.multiples, bits.shift, bits.scale)
        if layer.bias is not None and latent.bias is not None:
            layer.bias.copy_(latent.bias)
        if isinstance(activation, LatentActivation) and isinstance(layer.activation, BinaryActivation):
            layer.activation.threshold.copy_(activation.threshold)
            layer.activation.scale.copy_(activation.scale.clamp(2.0**-14, 65504.0).half())
            says["activation"] = {"kind": "binary", "scale": float(layer.activation.scale), "nonnegative": nonnegative}
        if seen is not None:
            if seen.nothing:
                what = f"the input of {path} is always 0 on the calibration rows: it has no range"
                raise UserError(self.step.name, what, f"Use rows that reach it, or skip: [{path}].")
            says["activation"] = fit_input(layer, seen, input_grid(self.step.ranges([path])), self.step.range)
        says["signs_changed"] = float((bits.planes != began.planes).float().mean())
        says["scale"] = [float(bits.scale.min()), float(bits.scale.max())]
        self.context.surgery.replace(self.model, path, layer)

    def _says(self, path: str, bits: Binarized) -> dict[str, Any]:
        job = next(job for job in self.jobs if job.site.path == path)
        weight = self._weight(job).float().flatten(1)
        return {
            "bits": self.step.bases,
            "granularity": self.step.granularity,
            "group_size": self.step.group_size,
            "shift": self.step.shift,
            "weight_sqnr_db": finite(sqnr_db(weight, bits.values)),
        }

    def _costs(self) -> dict[str, Any]:
        taken = {job.site.path: (job.site.flops // 2, self.step.bases, job.activations) for job in self.jobs}
        whole = self.context.anatomy.totals["flops"] // 2
        return counted(taken, whole - sum(macs for macs, _, _ in taken.values()))

    def _rest(self, others: Mapping[str, str]) -> None:
        """What ``count`` left becomes INT8, by quantize's defaults, on the rows that inputs are measured on."""
        if self.step.rest != "8" or not others:
            return
        own = replace(self.context, report={}, calibration=lambda: iter(self.few), rows=_count(self.few))
        self.step.eight_bits(list(others)).run(self.model, own)
        self.context.report["rest"] = own.report["sites"]


def _first(batches: Sequence[Batch], rows: int) -> list[Batch]:
    """The first rows."""
    found: list[Batch] = []
    for batch in batches:
        if rows > 0:
            found.append({name: tensor[:rows] for name, tensor in batch.items()})
            rows -= _count([batch])
    return found


def _count(batches: Sequence[Batch]) -> int:
    return sum(next(iter(batch.values())).shape[0] for batch in batches)
