"""What ``scales: power_of_two`` means for the other options of ``quantize``, and what of BCT no file computes in integers."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from compress.passes.quantize import Quantize

__all__ = ["left_float", "power_of_two_refusal"]


def power_of_two_refusal(step: Quantize) -> str | None:
    """What does not go with powers of two and, on a second line, the way out; None where all is well."""
    if step.scales == "free":
        return None
    if step.activations == "dynamic":
        return "scales: power_of_two: a runtime makes the scales of dynamic inputs\nUse activations: static or none."
    if step.smooth == "repq" and step.activations == "static":
        return "scales: power_of_two: smooth: repq takes the mean of many scales\nUse another smooth."
    if step.scale_rounds:
        return "scales: power_of_two: scale_rounds fits scales freely\nLeave one of them out."
    return None


def left_float(step: Quantize) -> str:
    """The parts of BCT (Dong et al. 2023, arXiv 2304.01483) that every file computes in floating point; nothing without it."""
    if step.scales == "free":
        return ""
    inputs = "and inputs of layers" if step.activations == "none" else "(inputs of layers: one scale a tensor)"
    return f"of BCT's parts stay float: attention products, softmax, norms, activation functions, residual sums {inputs}"
