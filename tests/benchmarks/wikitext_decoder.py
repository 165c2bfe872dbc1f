"""Trains a small decoder on WikiText-2 text, on a CPU, for the benchmarks of language models.

    python tests/benchmarks/wikitext_decoder.py --out FOLDER [--steps N]

Needs ``../shared/data/wikitext2/valid.txt``. Its articles are parted into three files, which are written to FOLDER too: training
(the first 70 %), calibration (15 %) and evaluation (15 %). A byte-level BPE of 1024 tokens is trained on the first. The model is
a Llama of 8 blocks, 128 wide (grouped-query attention, gated MLP, tied head); the step with the least loss on the calibration
text is kept, so that the evaluation text was seen by nobody. A folder that is already there is used again.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parents[2]
TEXT = ROOT.parent / "shared" / "data" / "wikitext2" / "valid.txt"
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "transformer-compress" / "wikitext-decoder"
VOCABULARY, WINDOW, BATCH, STEPS = 1024, 128, 24, 900
SHARES = (0.70, 0.15)


def parts(text: str) -> dict[str, str]:
    """Whole articles for training, calibration and evaluation."""
    lines = text.splitlines(keepends=True)
    starts = [n for n, line in enumerate(lines) if line.startswith(" = ") and not line.startswith(" = =")]
    lengths = [len(line) for line in lines]
    cuts, wanted = [], 0.0
    for share in SHARES:
        wanted += share * sum(lengths)
        cuts.append(min(starts, key=lambda n: abs(sum(lengths[:n]) - wanted)))
    found = {"train": lines[: cuts[0]], "calibration": lines[cuts[0] : cuts[1]], "evaluation": lines[cuts[1] :]}
    return {name: "".join(part) for name, part in found.items()}


def tokenizer_of(text: str) -> Any:
    from compress.sources import settle_torchvision

    settle_torchvision()
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=["<s>"], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(text.splitlines(keepends=True), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="<s>", pad_token="<s>")


def decoder() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=128,
            intermediate_size=352,
            num_hidden_layers=8,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=0,
        )
    )


def loss_on(model: Any, ids: torch.Tensor) -> float:
    """Mean loss of the tokens of all whole windows."""
    windows = ids[: len(ids) // WINDOW * WINDOW].view(-1, WINDOW)
    model.eval()
    with torch.inference_mode():
        losses = [_loss(model, rows, "sum") for rows in windows.split(BATCH)]
    model.train()
    return float(sum(losses)) / (windows.numel() - len(windows))


def _loss(model: Any, rows: torch.Tensor, reduction: str = "mean") -> torch.Tensor:
    logits = model(input_ids=rows, use_cache=False).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten(), reduction=reduction)


def train(model: Any, ids: torch.Tensor, held: torch.Tensor, steps: int) -> list[dict[str, float]]:
    """AdamW with warm-up and cosine; leaves the weights of the best step in the model."""
    decay = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=2e-3, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda n: min(1.0, (n + 1) / 60) * (0.05 + 0.95 * (1 + math.cos(math.pi * n / steps)) / 2)
    )
    generator = torch.Generator().manual_seed(1)
    best, kept, told, started = math.inf, {}, [], time.perf_counter()
    for step in range(1, steps + 1):
        starts = torch.randint(0, len(ids) - WINDOW, (BATCH,), generator=generator)
        loss = _loss(model, torch.stack([ids[n : n + WINDOW] for n in starts.tolist()]))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 75 == 0 or step == steps:
            now = loss_on(model, held)
            told.append({"step": step, "train": round(loss.item(), 3), "held": round(now, 3)})
            print(f"{told[-1]}  {time.perf_counter() - started:.0f} s", flush=True)
            if now < best:
                best, kept = now, {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(kept)
    return told


def make(out: Path, steps: int = STEPS) -> Path:
    """The folder with the model and its texts, trained if it is not there yet."""
    if (out / "config.json").exists():
        return out
    draft = out.with_name(out.name + ".partial")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    texts = parts(TEXT.read_text(encoding="utf-8"))
    for name, text in texts.items():
        (draft / f"{name}.txt").write_text(text, encoding="utf-8")
    tokenizer = tokenizer_of(texts["train"])
    ids = {name: torch.tensor(tokenizer(text)["input_ids"]) for name, text in texts.items()}
    print({name: len(value) for name, value in ids.items()}, "tokens")
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    model = decoder()
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    started = time.perf_counter()
    told = train(model, ids["train"], ids["calibration"], steps)
    model.eval()
    found = {"seconds": round(time.perf_counter() - started), "steps": told}
    found["perplexity"] = {name: round(math.exp(loss_on(model, value)), 3) for name, value in ids.items()}
    print(found["perplexity"])
    model.save_pretrained(draft)
    tokenizer.save_pretrained(draft)
    (draft / "training.json").write_text(json.dumps(found, indent=1))
    draft.rename(out)
    return out


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=CACHE, help="where the model is kept (outside the repository)")
    parser.add_argument("--steps", type=int, default=STEPS)
    given = parser.parse_args()
    print(make(given.out, given.steps))
