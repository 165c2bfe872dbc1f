"""Small random models of the families that the shipped recipes are for, and made-up files of rows, under the names that the
recipes use: a copy of a recipe runs beside them."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from torch import nn

WORDS = (
    "the", "a", "film", "is", "was", "good", "bad", "it", "rains", "not", "very", "dog", "cat", "sees", "and", "slow", "quick",
    "seldom", "always", "again", "never", "but", "old", "new", "light", "dark", "story", "actor", "end", "begins", "well",
)  # fmt: skip
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
VOCABULARY = len(SPECIAL) + len(WORDS)

_BERT = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
    "max_position_embeddings": 600, "pad_token_id": 0,
}  # fmt: skip
_IMAGES = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "image_size": 16,
    "patch_size": 4,
}  # fmt: skip
_THREE = {"id2label": {0: "cat", 1: "dog", 2: "owl"}}
_SPECIAL_IDS = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertForSequenceClassification", _BERT),
    "roberta": ("RobertaForSequenceClassification", _BERT),
    "distilbert": (
        "DistilBertForSequenceClassification",
        {"vocab_size": VOCABULARY, "dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64, "max_position_embeddings": 64},
    ),
    "bert of five layers": ("BertForSequenceClassification", {**_BERT, "num_hidden_layers": 5, "hidden_size": 16}),
    "bert of 64 columns": ("BertForSequenceClassification", {**_BERT, "hidden_size": 64}),
    "minilm": ("BertModel", _BERT),
    "modernbert": (
        "ModernBertForSequenceClassification",
        {**_BERT, **_SPECIAL_IDS, "cls_token_id": 2, "sep_token_id": 3, "local_attention": 8, "global_attn_every_n_layers": 2},
    ),
    "gpt2": (
        "GPT2LMHeadModel",
        {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 128, **_SPECIAL_IDS},
    ),
    "llama": ("LlamaForCausalLM", {**_BERT, **_SPECIAL_IDS, "num_key_value_heads": 1}),
    "vit": ("ViTForImageClassification", {**_IMAGES, **_THREE}),
    "wide vit": (
        "ViTForImageClassification",
        {**_IMAGES, **_THREE, "hidden_size": 48, "num_attention_heads": 3, "intermediate_size": 96},
    ),
    "dinov2": ("Dinov2Model", {**_IMAGES, "mlp_ratio": 2}),
    "clip": ("CLIPVisionModel", _IMAGES),
    "siglip": ("SiglipVisionModel", _IMAGES),
    "mobilevit": (
        "MobileViTForImageClassification",
        {
            "image_size": 32, "hidden_sizes": [16, 24, 32], "neck_hidden_sizes": [8, 8, 8, 16, 16, 24, 32],
            "num_attention_heads": 2, "output_stride": 32, "id2label": {0: "cat", 1: "dog", 2: "owl"},
        },
    ),
}  # fmt: skip


def randomize(model: nn.Module) -> None:
    """Weights ~ N(0, 1 / fan_in) and running statistics that are not trivial, so that outputs differ from row to row."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                scale = 1.0 if "embedding" in name else parameter[0].numel() ** -0.5
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
            elif name.endswith("bias"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
        for name, buffer in model.named_buffers():
            if name.endswith("running_var"):
                buffer.copy_(0.8 + 0.4 * torch.rand(buffer.shape, generator=generator))


def save_hf(family: str, folder: Path) -> None:
    """A model of transformers with the tokenizer of ``WORDS``."""
    import transformers

    class_name, settings = FAMILIES[family]
    model_class = getattr(transformers, class_name)
    model = model_class(model_class.config_class(**settings))
    randomize(model)
    model.save_pretrained(folder)
    if "vocab_size" in settings:
        save_tokenizer(folder)
    else:
        (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.25] * 3}))


def save_tokenizer(folder: Path) -> None:
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    ids = {word: number for number, word in enumerate((*SPECIAL, *WORDS))}
    made = Tokenizer(models.WordLevel(ids, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", [("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "eos_token": "[SEP]"}
    wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=made, model_max_length=512, **names)
    wrapped.save_pretrained(folder)


def save_timm(name: str, path: Path) -> None:
    """Random weights of a timm model, as a safetensors file."""
    import timm
    from safetensors.torch import save_model

    model = timm.create_model(name, pretrained=False, num_classes=3)
    randomize(model)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_model(model, str(path))


def save_rows(folder: Path) -> None:
    """All files of rows that the recipes name, each with at least as many rows as they ask for."""
    drawn = random.Random(0)

    def sentence(most: int = 12) -> str:
        return " ".join(drawn.choices(WORDS, k=drawn.randint(3, most)))

    for name, count in (("train", 256), ("dev", 40)):
        rows = [f"{sentence()}\t{number % 2}" for number in range(count)]
        (folder / f"{name}.tsv").write_text("\n".join(["sentence\tlabel", *rows]) + "\n")
        pairs = [f"{sentence()},{sentence()},{5 * drawn.random():.2f}" for _ in range(count)]
        (folder / f"{name}.csv").write_text("\n".join(["sentence1,sentence2,score", *pairs]) + "\n")
        objects = [json.dumps({"text": sentence(60), "label": number % 2}) for number in range(count)]
        (folder / f"{name}.jsonl").write_text("\n".join(objects) + "\n")
    for name, count in (("train", 64), ("valid", 64)):
        (folder / f"{name}.txt").write_text(" ".join(drawn.choices(WORDS, k=128 * count + 1)))
    _save_images(folder)


def _save_images(folder: Path) -> None:
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image

    generator = np.random.default_rng(0)
    classes = ("cat", "dog", "owl")

    def image(path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse = generator.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((24, 24)).save(path)

    for number in range(256):
        image(folder / "path/to/train" / classes[number % 3] / f"{number}.png")
    for number in range(48):
        image(folder / "path/to/validation" / classes[number % 3] / f"{number}.png")
    for number in range(160):
        image(folder / "images" / f"{number}.png")
    files = sorted((folder / "images").iterdir())
    structs = [{"bytes": file.read_bytes(), "path": file.name} for file in files]
    pq.write_table(pa.table({"image": structs}), folder / "images.parquet")


OWN_MODEL = '''\
"""A model of one's own: two gated layers that no table of architectures knows."""

import torch
from torch import nn


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x):
        return x + self.second(torch.sin(self.first(x)))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Layer(), Layer()])

    def forward(self, rows):
        for layer in self.layers:
            rows = layer(rows)
        return rows


def build():
    torch.manual_seed(0)
    return Model(), {"rows": torch.rand(2, 16)}
'''


def save_own_model(folder: Path) -> None:
    import numpy as np

    (folder / "path/to").mkdir(parents=True, exist_ok=True)
    (folder / "path/to/model.py").write_text(OWN_MODEL)
    generator = np.random.default_rng(0)
    np.savez(folder / "rows.npz", rows=generator.standard_normal((256, 16)).astype(np.float32), label=np.arange(256) % 3)
