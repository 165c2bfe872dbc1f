"""How far a change moves what a model computes later: the features of later blocks, and the outputs.

The two distances of OPTIN (Khaki & Plataniotis 2024, arXiv 2403.17921, sec. 3.2), each a mean over what counts, so that it does
not depend on how rows are batched: products of positions are taken within a row, where the paper's code samples them from the
whole batch. For each distance there is a ``probe``: a random linear form whose squared change is, in the mean over many drawings,
the distance to second order; one backward pass through it tells the effect of every part of a model at once.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["divergence", "divergence_probe", "gram", "manifold_distance", "manifold_probe", "relative_error", "relative_probe"]


def gram(features: Tensor, valid: Tensor | None = None) -> Tensor:
    """Cosines between the positions of each row, [B, T, T]; 0 where a position does not count.

    Args:
        features: [B, T, C].
        valid: [B, T], True where a position counts; None: all do.
    """
    unit = features / features.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    if valid is not None:
        unit = unit * valid.unsqueeze(-1).to(unit.dtype)
    return torch.bmm(unit, unit.transpose(1, 2))


def manifold_distance(reference: Tensor, features: Tensor, valid: Tensor | None = None) -> Tensor:
    """Mean squared change of the cosines between positions, [B]; 0 for equal features."""
    change = gram(features, valid) - gram(reference, valid)
    return change.square().sum((1, 2)) / _counted(features, valid).square()


def manifold_probe(features: Tensor, valid: Tensor | None, signs: Tensor) -> Tensor:
    """One number whose squared change is ``manifold_distance`` of a row in the mean over signs, summed over rows.

    Args:
        signs: [B, T, T] of -1 and 1.
    """
    return ((signs * gram(features, valid)).sum((1, 2)) / _counted(features, valid)).sum()


def divergence(reference: Tensor, logits: Tensor, valid: Tensor | None = None) -> Tensor:
    """Kullback-Leibler divergence of softmaxed logits from those of the reference, mean over positions, [B].

    Args:
        reference: [B, C] or [B, T, C], as logits.
        valid: [B, T]; not used for [B, C].
    """
    wanted = reference.log_softmax(-1)
    each = (wanted.exp() * (wanted - logits.log_softmax(-1))).sum(-1)
    return _mean(each, valid)


def divergence_probe(logits: Tensor, valid: Tensor | None, signs: Tensor) -> Tensor:
    """One number whose squared change is ``divergence`` to second order in the mean over signs (of the shape of logits)."""
    p = logits.detach().softmax(-1)
    drawn = p.sqrt() * signs
    direction = drawn - p * (p.sqrt() * signs).sum(-1, keepdim=True)
    return _spread((direction * logits).sum(-1) * 0.5**0.5, valid).sum()


def relative_error(reference: Tensor, outputs: Tensor, valid: Tensor | None = None) -> Tensor:
    """Squared error of an output that is no logits, over the mean square of the reference in its row, [B]."""
    each = (outputs - reference).square().mean(-1) / _power(reference)
    return _mean(each, valid)


def relative_probe(outputs: Tensor, valid: Tensor | None, signs: Tensor) -> Tensor:
    """One number whose squared change is ``relative_error`` in the mean over signs (of the shape of the outputs)."""
    each = (signs * outputs).sum(-1) / (outputs.shape[-1] * _power(outputs.detach())).sqrt()
    return _spread(each, valid).sum()


def _power(reference: Tensor) -> Tensor:
    """Mean square of each row, with ones for the axes between, so that a small position does not weigh more."""
    power = reference.square().flatten(1).mean(1).clamp(min=torch.finfo(reference.dtype).tiny)
    return power.reshape(-1, *[1] * (reference.dim() - 2))


def _counted(features: Tensor, valid: Tensor | None) -> Tensor:
    if valid is None:
        return torch.full((features.shape[0],), float(features.shape[1]), device=features.device)
    return valid.sum(1).clamp(min=1).to(features.dtype)


def _mean(each: Tensor, valid: Tensor | None) -> Tensor:
    """The mean over what follows the first axis, of what counts."""
    if each.dim() == 2 and valid is not None and valid.shape == each.shape:
        return (each * valid).sum(1) / valid.sum(1).clamp(min=1)
    return each.reshape(each.shape[0], -1).mean(1)


def _spread(each: Tensor, valid: Tensor | None) -> Tensor:
    """Sums over positions, scaled so that the square of a sum of independent terms is the mean of their squares."""
    if each.dim() == 2 and valid is not None and valid.shape == each.shape:
        return (each * valid).sum(1) / valid.sum(1).clamp(min=1).sqrt()
    flat = each.reshape(each.shape[0], -1)
    return flat.sum(1) / math.sqrt(flat.shape[1])
