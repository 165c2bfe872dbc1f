"""What became of the tokens of a few rows: for the report."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from calibrate.modes import evaluating
from calibrate.signature import Batch, Signature
from compress.layers import TokenReducer
from compress.layers.attached import attached_to

__all__ = ["grid", "longest", "pictures"]

_ROWS = 2
_BATCHES = 4
"""Most batches that rows are looked for in."""
_NONE = torch.zeros(())
_PIXELS = 32
"""Most pixels along a side of an image that is drawn."""


def longest(batches: Iterable[Batch], example: Batch) -> Batch:
    """The rows with the most tokens that are no padding in the batch that has the longest of the first batches; without a mask
    of tokens, the example. Batches may be padded to different lengths."""
    found = [batch for batch in itertools.islice(batches, _BATCHES) if batch.get("attention_mask", _NONE).dim() == 2]
    if not found:
        return example
    batch = max(found, key=lambda one: int(one["attention_mask"].sum(-1).max()))
    chosen = batch["attention_mask"].sum(-1).argsort(descending=True, stable=True)[:_ROWS]
    return {name: value[chosen] for name, value in batch.items()}


def pictures(model: nn.Module, signature: Signature, example: Batch, numbers: list[int]) -> list[dict[str, Any]]:
    """For a few rows, after each block that took tokens out, which token each of the start is in (-1: in none).

    Args:
        model: with the layers on it.
        numbers: what each of these places is called, in their order.

    Returns:
        JSON: ``stages`` with ``groups`` for each row, in which padded tokens are -1; of an image its pixels as hexadecimal
        colours, of text its ids and ``real``, how many of them are no padding.
    """
    layers = [attached_to(module, TokenReducer) for module in model.modules()]
    stream = next((layer.stream for layer in layers if layer is not None), None)
    if stream is None:
        return []
    rows = {name: value[:_ROWS] for name, value in example.items()}
    stream.watch = []
    try:
        with torch.no_grad(), evaluating(model):
            signature.call(model, rows)
        sources = stream.watch
    finally:
        stream.watch = None
    found = []
    mask = rows.get("attention_mask")
    for row in range(next(iter(rows.values())).shape[0]):
        real = mask[row].bool().tolist() if mask is not None and mask.dim() == 2 else None
        stages = [
            {"block": number, "groups": _groups(source[row], real)} for number, source in zip(numbers, sources, strict=False)
        ]
        found.append(_content(rows, row) | {"stages": stages})
    return found


def _groups(source: Tensor, real: list[bool] | None) -> list[int]:
    """[T, S] -> the number of the token that stands for each of the start; -1: none does, or it is padding."""
    most, which = source.max(dim=0)
    found = [int(number) if there > 0 else -1 for number, there in zip(which.tolist(), most.tolist(), strict=True)]
    return (
        found
        if real is None or len(real) != len(found)
        else [one if there else -1 for one, there in zip(found, real, strict=True)]
    )


def _content(rows: Batch, row: int) -> dict[str, Any]:
    ids = rows.get("input_ids")
    if ids is not None:
        mask = rows.get("attention_mask")
        real = ids[row] if mask is None or mask.shape != ids.shape else mask[row].nonzero()
        return {"ids": ids[row].tolist(), "real": len(real)}
    image = next((value[row] for value in rows.values() if value.dim() == 4), None)
    return {} if image is None else _image(image.float())


def _image(image: Tensor) -> dict[str, Any]:
    """Pixels [C, H, W], stretched to 0 to 255 and made smaller where there are many."""
    scale = min(1.0, _PIXELS / max(image.shape[1:]))
    height, width = (max(1, round(size * scale)) for size in image.shape[1:])
    small = F.adaptive_avg_pool2d(image.unsqueeze(0), (height, width))[0]
    small = small[:3] if small.shape[0] >= 3 else small[:1].expand(3, -1, -1)
    low, high = float(small.min()), float(small.max())
    values = ((small - low) / max(high - low, 1e-9) * 255).round().long().permute(1, 2, 0).reshape(-1, 3).tolist()
    return {"height": height, "width": width, "pixels": "".join("".join(f"{value:02x}" for value in pixel) for pixel in values)}


def grid(patches: int, height: int, width: int) -> tuple[int, int]:
    """Rows and columns of so many patches of an image; (0, 0) where they make no grid of its shape."""
    rows = round(math.sqrt(patches * height / width))
    return (rows, patches // rows) if rows and rows * (patches // rows) == patches else (0, 0)
