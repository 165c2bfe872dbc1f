"""What ``weights: fp8`` means for the other options of ``quantize``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from compress.quantization.site_options import options_of

if TYPE_CHECKING:
    from compress.passes.quantize import Quantize

__all__ = ["float8_refusal", "is_float8", "range_of", "smooths"]

_UNUSED = {
    "rounding": ("nearest", "its steps differ from number to number, and what chooses between codes knows even steps only"),
    "weight_range": ("minmax", "its scales come from the largest weight"),
    "range": ("minmax", "its scales come from the largest value"),
    "group_scales": ("free", "it has no groups"),
    "scales": ("free", "its codes have exponents of their own"),
    "reduce_range": (False, "it is for integer kernels of x86 processors"),
}
"""Options whose other values would be ignored, with the value that holds and the reason."""


def is_float8(step: Quantize) -> bool:
    return step.weights == "fp8"


def smooths(step: Quantize) -> bool:
    """Whether inputs are smoothed: numbers of 8-bit floating point are as exact in small channels as in large ones."""
    return bool(step.smooth) and not is_float8(step)


def range_of(step: Quantize) -> str:
    """How ranges of inputs are found."""
    return "minmax" if is_float8(step) else step.range


def float8_refusal(step: Quantize) -> str | None:
    """What does not go with ``weights: fp8`` and, on a second line, the way out; None where all is well."""
    if not is_float8(step):
        return None
    written = step.model_fields_set if len(step.model_fields_set) < len(type(step).model_fields) else set()  # as a report writes
    if step.activations != "static":
        return "weights: fp8 is for products with inputs of fp8\nUse activations: static, or weights: 8."
    if step.granularity == "group" or step.group_size:
        return "weights: fp8 has one scale a channel or tensor\nTake group_size and granularity: group out."
    if not (step.symmetric and step.activation_symmetric):
        return "weights: fp8 has no zero points\nTake symmetric and activation_symmetric out."
    if step.smooth and "smooth" in written:
        return "smooth: fp8 is as exact in small channels as in large ones\nLeave it out."
    for name, (value, reason) in _UNUSED.items():
        if name in written and getattr(step, name) not in (value, None):
            return f"{name}: {getattr(step, name)} has no meaning with weights: fp8: {reason}\nLeave it out."
    if step.mixed is not None or step.max_drop is not None:
        return "weights: fp8 stands alone, and mixed and max_drop choose among integers\nTake them out, or use weights: 8."
    if any(isinstance(options_of(one).weights, int) or options_of(one).activations for one in step.overrides.values()):
        return "overrides: beside weights: fp8 a site is fp8 or float\nUse a second quantize for sites of integers."
    return None
