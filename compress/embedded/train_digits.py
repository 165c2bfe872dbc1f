"""Trains the digits model that ships with the package: ``python -m compress.embedded.train_digits FOLDER``.

Needs scikit-learn for the images (``sklearn.datasets.load_digits``) unless ``FOLDER`` already holds ``digits.npz``.
About two minutes on one CPU core; the seed and the schedule are fixed, the last epoch is kept, and nothing is chosen
by the test rows.
"""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from compress.embedded.digits_vit import DigitsViT

__all__ = ["augment", "main", "make_digits", "train"]

TEST_ROWS, CALIBRATION_ROWS = 600, 256
EPOCHS, BATCH, PEAK_RATE = 160, 64, 2e-3


def make_digits(seed: int = 0) -> dict[str, np.ndarray[Any, Any]]:
    """The 1,797 images (uint8, 0..16), labels and split: 600 rows for the test, 60 of each digit as far as they go; the
    other 1,197 to train on, of which the first 256 of a shuffled order are the calibration rows."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    labels = digits.target.astype(np.uint8)
    order = np.random.default_rng(seed).permutation(len(labels))
    by_class = [order[labels[order] == digit] for digit in range(10)]
    test = np.concatenate([rows[: TEST_ROWS // 10] for rows in by_class])
    train_rows = order[~np.isin(order, test)]
    return {
        "images": digits.images.astype(np.uint8),
        "labels": labels,
        "train": train_rows.astype(np.int16),
        "calibration": np.sort(train_rows[:CALIBRATION_ROWS]).astype(np.int16),
        "test": np.sort(test).astype(np.int16),
    }


def augment(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Each image [B, 1, 8, 8] rotated, scaled, sheared and shifted a little (by up to one pixel); the ground is -1."""
    rows = pixels.shape[0]

    def spread(limit: float) -> Tensor:
        return (torch.rand(rows, generator=generator) * 2 - 1) * limit

    angle, scale, shear = spread(math.radians(12)), 1 + spread(0.12), spread(0.15)
    cos, sin = torch.cos(angle) * scale, torch.sin(angle) * scale
    top = torch.stack((cos, -sin + shear, spread(0.25)), 1)
    bottom = torch.stack((sin, cos, spread(0.25)), 1)
    grid = F.affine_grid(torch.stack((top, bottom), 1), list(pixels.shape), align_corners=False)
    return F.grid_sample(pixels + 1, grid, align_corners=False) - 1


def train(images: Tensor, labels: Tensor, seed: int = 0, epochs: int = EPOCHS) -> DigitsViT:
    """A model trained on pixels [N, 1, 8, 8] in [-1, 1]: AdamW, one cycle, label smoothing, the augmentation above."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = DigitsViT()
    steps = epochs * (len(images) // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_RATE, total_steps=steps, pct_start=0.15)
    for _ in range(epochs):
        order = torch.randperm(len(images), generator=generator)
        for chosen in torch.split(order[: len(images) // BATCH * BATCH], BATCH):
            loss = F.cross_entropy(model(augment(images[chosen], generator)), labels[chosen], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    return model.eval()


def main(folder: Path, seed: int = 0) -> None:
    from safetensors.torch import save_file

    torch.set_num_threads(1)
    file = folder / "digits.npz"
    if not file.exists():
        with open(folder / "digits.npz.part", "wb") as stream:
            np.savez_compressed(stream, **make_digits(seed))  # type: ignore[arg-type]
        os.replace(folder / "digits.npz.part", file)
    with np.load(file, allow_pickle=False) as arrays:
        digits = dict(arrays)
    pixels = torch.from_numpy(digits["images"]).float().unsqueeze(1) / 8 - 1
    labels = torch.from_numpy(digits["labels"]).long()
    rows = {split: torch.from_numpy(digits[split]).long() for split in ("train", "test")}
    model = train(pixels[rows["train"]], labels[rows["train"]], seed)
    for split, chosen in rows.items():
        right = (model(pixels[chosen]).argmax(1) == labels[chosen]).sum().item()
        print(f"{split}: {right} of {len(chosen)} right ({right / len(chosen):.4f})")
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, folder / "digits-vit.part")
    os.replace(folder / "digits-vit.part", folder / "digits-vit.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
