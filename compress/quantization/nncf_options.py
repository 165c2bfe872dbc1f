"""Which options of ``quantize`` NNCF has, and what they are called there."""

from __future__ import annotations

from typing import TYPE_CHECKING

from compress.anatomy import Site
from compress.quantization.nncf_engine import NncfSettings

if TYPE_CHECKING:
    from compress.passes.quantize import Quantize

__all__ = ["beyond_nncf", "nncf_refusal", "nncf_settings"]

_ALPHA = 0.95
_OURS = (
    "weight_range", "reduce_range", "overrides", "mixed", "max_drop", "evaluations", "scales", "group_scales",
    "embedding_group_size", "smooth_below_db", "damping", "column_order", "refinements", "unfactorable", "batch_size",
    "range_rows", "massive_activations", "embedding_rounding", "scale_rounds",
)  # fmt: skip
"""Options that only the own engine has."""


def nncf_refusal(step: Quantize) -> str | None:
    """What is wrong with the options of a step and, on a second line, the way out; None where all is well."""
    fields = type(step).model_fields
    given = step.chosen
    if step.engine == "own":
        theirs = sorted({"alpha", "scale_estimation"} & given)
        return f"{theirs[0]} is an option of engine: nncf\nAdd engine: nncf, or leave it out." if theirs else None
    leave = "Leave it out, or use engine: own."
    if ours := [name for name in _OURS if name in given]:
        return f"{ours[0]}: NNCF has no such option\n{leave}"
    if step.weights not in (8, 4):
        told = step.weights if step.weights == "fp8" else f"{step.weights} bits"
        return f"weights: NNCF has no weights of {told}\nUse 8 or 4, or engine: own."
    if step.activations == "dynamic":
        return "activations: NNCF has no dynamic activations\nUse static or none, or engine: own."
    if isinstance(step.smooth, str):
        return f"smooth: NNCF has no {step.smooth} factors\nUse true, with alpha if need be, or engine: own."
    if step.rounding != "nearest":
        return "rounding: NNCF has no GPTQ for torch models\nUse nearest, or engine: own."
    chosen = "range" in step.model_fields_set and len(step.model_fields_set) < len(fields)  # not all written out again
    if chosen and step.range not in ("minmax", "percentile"):
        return f"range: NNCF has no {step.range}\nUse minmax or percentile, leave it out for NNCF's choice, or use engine: own."
    return _static_refusal(step) if step.activations == "static" else _weights_refusal(step)


def _static_refusal(step: Quantize) -> str | None:
    if step.weights != 8:
        return "activations: NNCF rounds them with weights of 8 bits only\nUse weights: 8, activations: none, or engine: own."
    if step.granularity == "group" or step.group_size:
        return "granularity: NNCF has no groups where activations are rounded\nUse channel or tensor, or engine: own."
    if not step.symmetric:
        return "symmetric: NNCF's weights have no zero point where activations are rounded\nLeave it out, or use engine: own."
    if step.embeddings not in (None, 8):
        return "embeddings: NNCF rounds them to 8 bits where activations are rounded\nUse embeddings: 8, or engine: own."
    return "scale_estimation: NNCF has it for activations: none only\nLeave it out." if step.scale_estimation else None


def _weights_refusal(step: Quantize) -> str | None:
    if step.granularity == "tensor":
        return "granularity: NNCF compresses weights by channel or group\nUse channel or group, or engine: own."
    if step.weights == 8 and (step.granularity == "group" or step.group_size):
        return "granularity: NNCF has groups for weights of 4 bits only\nUse weights: 4, or engine: own."
    if step.embeddings in (2, 3):
        return f"embeddings: NNCF has no {step.embeddings} bits\nUse 8 or 4, or engine: own."
    if step.scale_estimation and step.weights == 8:
        return "scale_estimation: NNCF has it for weights of 4 bits only\nLeave it out."
    return None


def nncf_settings(step: Quantize) -> NncfSettings:
    """The options of a step in NNCF's terms."""
    chosen = "range" in step.model_fields_set and step.range != type(step).model_fields["range"].default
    alpha = _ALPHA if step.alpha is None else step.alpha
    return NncfSettings(
        alpha=alpha if step.smooth else -1.0,
        symmetric_inputs=step.activation_symmetric is True,
        per_channel=step.granularity != "tensor",
        range=step.range if chosen and step.range in ("minmax", "percentile") else None,
        percentile=step.percentile,
        correct_biases=step.bias_correction,
        scale_estimation=step.scale_estimation,
    )


def beyond_nncf(step: Quantize, site: Site, bits: int) -> str | None:
    """Why NNCF cannot take a site, or None."""
    if bits < 8 and site.kind in ("conv2d", "conv1d"):
        return f"NNCF has no {bits}-bit weights of a {'convolution' if site.kind == 'conv2d' else 'Conv1D'}"
    if site.tied and step.activations == "static" and site.kind != "embedding":
        return f"it holds the weight of {site.tied}, which NNCF's factors would change there too"
    return None
