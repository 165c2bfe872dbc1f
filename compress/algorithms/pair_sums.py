"""Weights whose products with 8-bit inputs fit the 16 bits in which older x86 processors add two of them.

Without VNNI instructions ONNX Runtime and OpenVINO multiply unsigned 8-bit inputs with signed 8-bit weights by ``vpmaddubsw``:
the products of inputs 2j and 2j + 1 are added in 16 bits, and what does not fit is cut off (onnxruntime.ai, "Quantize ONNX
models", on U8S8 and saturation). The usual cure, weights of 7 bits, doubles the step of all for the sake of few pairs. Here
only those pairs give way. Tensors in, tensors out. Shapes: O outputs, I inputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from calibrate.grid import Grid
from calibrate.ranges import storable

__all__ = ["PairLimit", "roomier"]

Places = tuple[int, int] | tuple[slice, slice]
_MOST = 128
"""Two products with inputs of 255 then sum to 32640 at most."""
_WIDER = (1.0, 1.05, 1.1, 1.17, 1.25, 1.4, 1.6, 2.0)
"""Scales that are tried, over the one that covers every weight."""


@dataclass(frozen=True)
class PairLimit:
    """What the codes of a weight [O, I] may be, so that no sum of two neighbouring products leaves 16 bits.

    Attributes:
        importance: [I], what an error of each input's weight counts when a pair has to give way.
    """

    importance: Tensor

    def holds(self, codes: Tensor) -> Tensor:
        """[O]: whether every pair of a row's codes [O, I] keeps to it."""
        positive, negative = self._sums(codes)
        return ((positive <= _MOST) & (negative <= _MOST)).all(1)

    def overflowing(self, codes: Tensor) -> float:
        """The share of the pairs of codes [O, I] that do not."""
        positive, negative = self._sums(codes)
        return float(((positive > _MOST) | (negative > _MOST)).float().mean())

    def loose(self, codes: Tensor) -> Tensor:
        """[O, I]: 1 where a code may move by one whatever its partner does, 0 elsewhere."""
        reach = codes.float().abs() + 1
        if reach.shape[1] % 2:
            reach = torch.nn.functional.pad(reach, (0, 1))
        fits = (reach.reshape(reach.shape[0], -1, 2).sum(-1) <= _MOST).float()
        return fits.repeat_interleave(2, 1)[:, : codes.shape[1]]

    def project(self, codes: Tensor) -> Tensor:
        """Codes [O, I] (int8) of which pairs that do not fit have moved towards zero, at the least error by importance."""
        if bool(self.holds(codes).all()):
            return codes
        made, even = codes.float(), codes.shape[1] // 2 * 2
        first, second = made[:, 0:even:2].clone(), made[:, 1:even:2].clone()
        places = slice(0, even, 2), slice(1, even, 2)
        kept = self.share(places, first, second).round()
        made[:, 1:even:2] = second.clamp(*self.bounds(kept))
        made[:, 0:even:2] = first.clamp(*self.bounds(made[:, 1:even:2]))
        return made.to(torch.int8)

    def share(self, places: Places, own: Tensor, partner: Tensor) -> Tensor:
        """What the codes at some inputs (not rounded) should be when those of their partners are going to be that: where both
        together do not fit, each gives way by its part of what is too much.

        Args:
            places: of the inputs and of their partners: two numbers (codes are [O]) or two slices (codes are [O, inputs]).
        """
        excess = ((own + partner).abs() - _MOST).clamp(min=0.0) * (own * partner > 0)
        weights = self.importance[places[0]], self.importance[places[1]]
        return own - own.sign() * excess * (weights[1] / (weights[0] + weights[1]))

    def bounds(self, partner: Tensor) -> tuple[Tensor, Tensor]:
        """The least and the largest codes of inputs, when their partners have these."""
        return -(_MOST + partner.clamp(max=0.0)).clamp(min=0.0), (_MOST - partner.clamp(min=0.0)).clamp(min=0.0)

    def _sums(self, codes: Tensor) -> tuple[Tensor, Tensor]:
        whole = codes.float()
        if whole.shape[1] % 2:
            whole = torch.nn.functional.pad(whole, (0, 1))
        pairs = whole.reshape(whole.shape[0], -1, 2)
        return pairs.clamp(min=0.0).sum(-1), (-pairs).clamp(min=0.0).sum(-1)


def roomier(weight: Tensor, grid: Grid, scale: Tensor, limit: PairLimit) -> Tensor:
    """Scales [O, 1] or [1, 1] of a symmetric grid, wider where pairs that have to give way would cost more than coarser steps.

    The error is that of ``project`` on the nearest codes, weighted by importance; the given scale is among those tried, and stays
    where every pair fits.
    """
    fits = limit.holds(grid.quantize(weight, scale, None)).unsqueeze(1)
    if bool(fits.all()):
        return scale
    best, least = scale, torch.full(scale.shape, torch.inf, device=weight.device)
    for wider in _WIDER:
        tried, _ = storable(grid, -scale * wider * grid.high, scale * wider * grid.high) if wider > 1 else (scale, None)
        codes = limit.project(grid.quantize(weight, tried, None))
        errors = ((weight.float() - grid.dequantize(codes, tried, None)).square() * limit.importance).sum(1, keepdim=True)
        error = errors if scale.shape[0] > 1 else errors.sum(0, keepdim=True)
        best, least = torch.where(error < least, tried, best), torch.minimum(error, least)
    return torch.where(fits, scale, best) if scale.shape[0] > 1 else best
