"""The digits and the model trained on them, read from the package."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from calibrate.data import Encoder, Item, Rows, Selection, Table, select
from calibrate.errors import UserError
from calibrate.signature import Batch
from compress.embedded.digits_vit import DigitsViT

__all__ = ["DIGITS_FILE", "SPLITS", "WEIGHTS_FILE", "digits_model", "digits_rows"]

DIGITS_FILE = Path(__file__).with_name("digits.npz")
WEIGHTS_FILE = Path(__file__).with_name("digits-vit.safetensors")
SPLITS = ("train", "calibration", "validation", "test")


class _Digits(Table):
    """All 1,797 images (uint8 [8, 8], 0..16); rows are numbered as in UCI's file."""

    name, format, path, scattered = "embedded:digits", "embedded", DIGITS_FILE, True

    def __init__(self, split: str) -> None:
        self.split = split

    def __len__(self) -> int:
        return len(_arrays()["labels"])

    def items(self, indices: Sequence[int]) -> Iterator[Item]:
        images = _arrays()["images"]
        return ((images[index],) for index in indices)

    def label_values(self) -> Sequence[Any]:
        return [int(label) for label in _arrays()["labels"]]

    def describe(self) -> dict[str, Any]:
        return {"split": self.split}


class _Pixels(Encoder):
    def encode(self, items: Sequence[Item], places: Sequence[str]) -> Batch:
        images = torch.from_numpy(np.stack([item[0] for item in items]))
        return {"pixels": images.float().unsqueeze(1) / 8 - 1}

    def describe(self) -> dict[str, Any]:
        return {"pixels": "value / 8 - 1, in [-1, 1]"}


def digits_rows(split: str = "test", selection: Selection = "all", seed: int = 0) -> Rows:
    """Rows of one split: ``pixels`` float32 [B, 1, 8, 8] in [-1, 1], labels 0 to 9.

    ``train`` has 1,197 rows, ``calibration`` 256 of them and ``validation`` the others, ``test`` 600 that the model was not
    trained on.

    Raises:
        UserError: no such split, or a selection that the split does not have.
    """
    if split not in SPLITS:
        raise UserError("data", f"the embedded digits have no split {split!r}", f"There is: {', '.join(SPLITS)}.")
    numbers = np.sort(_arrays()[split])
    positions = select(len(numbers), selection, seed=seed, where=f"data.{'evaluation' if split == 'test' else split}.rows")
    indices = [int(numbers[position]) for position in positions]
    table = _Digits(split)
    labels = torch.from_numpy(_arrays()["labels"][indices]).long()
    return Rows(table, _Pixels(), indices, labels, "all" if selection is None else str(selection))


def digits_model(weights: bool = True) -> DigitsViT:
    """The digits model in eval mode, trained or (``weights=False``) as made at random."""
    from safetensors.torch import load_file

    model = DigitsViT()
    if weights:
        model.load_state_dict(load_file(WEIGHTS_FILE))
    return model.eval().requires_grad_(False)


@cache
def _arrays() -> dict[str, np.ndarray[Any, Any]]:
    with np.load(DIGITS_FILE, allow_pickle=False) as arrays:
        held = dict(arrays)
    return held | {"validation": np.setdiff1d(held["train"], held["calibration"])}
