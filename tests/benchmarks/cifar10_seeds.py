"""Trains small vision transformers on CIFAR-10 from different seeds, on a CPU, for the benchmark of model fusion.

    python tests/benchmarks/cifar10_seeds.py [--out FOLDER] [--epochs N]

Needs ``../shared/data/cifar10``. Two models of one shape from two seeds, and a wider one from a third: 8x8 patches (17 tokens), 4
blocks; 128 wide with 4 heads, or 192 wide with 6. Each epoch is kept, so that a run that was stopped goes on; a model that is
already in FOLDER is used again.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT.parent / "shared" / "data" / "cifar10"
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "transformer-compress" / "cifar10-seeds"
CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
WIDTHS = {"one": 128, "two": 128, "wide": 192}
SEEDS = {"one": 1, "two": 2, "wide": 3}
EPOCHS, BATCH, RATE = 6, 128, 2e-3


def images(part: str) -> tuple[Tensor, Tensor]:
    """Pixels [N, 3, 32, 32] as bytes, and labels."""
    import io

    import numpy as np
    import pyarrow.parquet as parquet
    from PIL import Image

    table = parquet.read_table(DATA / f"{part}.parquet").to_pydict()
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(one["bytes"])).convert("RGB")) for one in table["image"]])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), torch.tensor(table["label"])


def floats(pixels: Tensor) -> Tensor:
    """As the models read them: [-1, 1]."""
    return pixels.float() / 127.5 - 1


def moved(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Mirrored or not, and shifted by up to 3 pixels, each image its own way."""
    rows = len(pixels)
    x = torch.where(torch.rand(rows, 1, 1, 1, generator=generator) < 0.5, pixels.flip(3), pixels)
    x = F.pad(x, (3, 3, 3, 3))
    down, right = torch.randint(0, 7, (2, rows, 1), generator=generator)
    x = x[torch.arange(rows)[:, None], :, down + torch.arange(32)]  # [B, 32, 3, 38]
    return x.permute(0, 3, 1, 2)[torch.arange(rows)[:, None], right + torch.arange(32)].permute(0, 3, 2, 1)


def vit(width: int, seed: int) -> Any:
    from compress.sources import settle_torchvision

    settle_torchvision()
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(seed)
    return ViTForImageClassification(
        ViTConfig(
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=4,
            num_attention_heads=width // 32,
            image_size=32,
            patch_size=8,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            id2label=dict(enumerate(CLASSES)),
            label2id={name: number for number, name in enumerate(CLASSES)},
        )
    )


def fit(model: Any, epochs: int, seed: int, rate: float = RATE, kept: Path | None = None, limit: int | None = None) -> Any:
    """Trains with labels on the train rows (AdamW, one cycle, mirrored and shifted images); with ``kept`` it resumes from there.

    Args:
        limit: steps at most; the cycle has this length then.
    """
    pixels, labels = images("train")
    each = len(pixels) // BATCH
    steps = min(epochs * each, limit or epochs * each)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.05, fused=True)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.15)
    first = 0
    if kept is not None and kept.exists():
        state = torch.load(kept, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        cycle.load_state_dict(state["cycle"])
        first = state["epoch"]
    model.train()
    for epoch in range(first, -(-steps // each)):
        generator, started, losses = torch.Generator().manual_seed(1000 * seed + epoch), time.perf_counter(), []
        for rows in torch.randperm(len(pixels), generator=generator)[: each * BATCH].view(each, BATCH)[: steps - epoch * each]:
            x = floats(moved(pixels[rows], generator))
            loss = F.cross_entropy(model(pixel_values=x).logits, labels[rows])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            cycle.step()
            losses.append(float(loss.detach()))
        print(f"  epoch {epoch + 1}: loss {sum(losses) / len(losses):.3f}, {time.perf_counter() - started:.0f} s", flush=True)
        if kept is not None:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "cycle": cycle.state_dict()}
            torch.save({**state, "epoch": epoch + 1}, kept.with_suffix(".part"))
            kept.with_suffix(".part").replace(kept)
    return model.eval()


def make(folder: Path = CACHE, epochs: int = EPOCHS, names: Collection[str] = tuple(WIDTHS)) -> dict[str, Path]:
    """The folders of the models, trained where they are not there yet."""
    torch.set_num_threads(1)
    folder.mkdir(parents=True, exist_ok=True)
    found = {}
    for name, width in WIDTHS.items():
        if name not in names:
            continue
        found[name] = folder / name
        if (found[name] / "config.json").exists():
            continue
        print(f"training {name}: {width} wide, {epochs} epochs", flush=True)
        fitted = fit(vit(width, SEEDS[name]), epochs, SEEDS[name], kept=folder / f"{name}.pt")
        fitted.save_pretrained(folder / f"{name}.part")
        (folder / f"{name}.part").replace(found[name])
        (folder / f"{name}.pt").unlink()
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=CACHE, help="where the models are, or will be kept")
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    given = parser.parse_args()
    for name, place in make(given.out, given.epochs).items():
        print(name, place)
