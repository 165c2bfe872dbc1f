"""Trains a small MobileViT on CIFAR-10, on a CPU, for the benchmarks of hybrids: about ten minutes of a core that is free.
After its 4 epochs it names 52 % of the 5000 dev rows rightly.

    python tests/benchmarks/cifar10_hybrid.py [--out FOLDER] [--epochs N]

Needs ``../shared/data/cifar10``. Images stay 32 x 32; inverted residuals (pointwise, depthwise, pointwise convolutions, each with
BatchNorm; SiLU) make 4 x 4 and then 2 x 2 features, whose positions attend to each other in three MobileViT blocks: three bridges
from convolutions to tokens and three back. Each epoch is kept, so that a run that was stopped goes on; a model that is already in
FOLDER is used again. The folder is one of transformers, which a recipe names with ``hf:``.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from cifar10_seeds import CACHE as SEEDS_CACHE
from cifar10_seeds import CLASSES, fit, floats, images
from torch import nn

CACHE = SEEDS_CACHE.parent / "cifar10-hybrid"
EPOCHS, SEED, RATE = 4, 1, 3e-3
_SETTINGS = {  # as `floats` makes the images
    "do_resize": False,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "do_flip_channel_order": False,
    "size": {"height": 32, "width": 32},
}


def hybrid(seed: int = SEED) -> Any:
    """A MobileViT of 0.8 million parameters with random weights, larger than transformers draws them: it learns sooner."""
    from compress.sources import settle_torchvision

    settle_torchvision()
    from transformers import MobileViTConfig, MobileViTForImageClassification

    torch.manual_seed(seed)
    model = MobileViTForImageClassification(
        MobileViTConfig(
            image_size=32,
            patch_size=1,
            hidden_sizes=[48, 64, 80],
            neck_hidden_sizes=[16, 16, 24, 48, 64, 80, 192],
            expand_ratio=2.0,
            output_stride=16,
            hidden_dropout_prob=0.0,
            classifier_dropout_prob=0.0,
            id2label=dict(enumerate(CLASSES)),
            label2id={name: number for number, name in enumerate(CLASSES)},
        )
    )
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out" if module.groups == 1 else "fan_in")
        elif isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
    return model


@torch.no_grad()
def accuracy(model: Any, part: str = "dev") -> float:
    """Share of the rows that the model names rightly."""
    pixels, labels = images(part)
    rows = zip(pixels.split(250), labels.split(250), strict=True)
    return sum(int((model(pixel_values=floats(x)).logits.argmax(1) == y).sum()) for x, y in rows) / len(labels)


def make(folder: Path = CACHE, epochs: int = EPOCHS) -> Path:
    """The folder of the model, trained where it is not there yet."""
    torch.set_num_threads(1)
    if (folder / "config.json").exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    kept, part = folder.with_suffix(".pt"), folder.with_suffix(".part")
    made = hybrid().to(memory_format=torch.channels_last)
    print(f"training: {sum(one.numel() for one in made.parameters()):,} parameters, {epochs} epochs", flush=True)
    made = fit(made, epochs, SEED, RATE, kept=kept).to(memory_format=torch.contiguous_format)
    made.save_pretrained(part)
    (part / "preprocessor_config.json").write_text(json.dumps(_SETTINGS, indent=2))
    part.replace(folder)
    kept.unlink(missing_ok=True)
    print(f"accuracy on the dev rows: {accuracy(made):.4f}", flush=True)
    return folder


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=CACHE, help="where the model is, or will be kept")
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    given = parser.parse_args()
    print(make(given.out, given.epochs))
