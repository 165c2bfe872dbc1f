"""Models from a Hugging Face folder or hub id: safetensors only, never remote code, float32 in eval mode."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from calibrate.errors import UserError
from calibrate.signature import Batch, Output, Signature, TensorSpec
from compress.huggingface_folder import (
    Tokenizer,
    check_pooling,
    find_folder,
    line,
    quiet,
    read_config,
    read_tokenizer,
    weight_files,
)
from compress.image_settings import hf_preprocessing
from compress.sources import Source, check_finite, digest_files, need, random_images

__all__ = ["load_hf", "rebuild_hf"]

_SMALL_FILES = (
    "config.json", "preprocessor_config.json", "modules.json", "1_Pooling/config.json", "sentence_bert_config.json",
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.txt",
    "vocab.json", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model",
)  # fmt: skip
_DOES_NOT_FIT = "The weights and config.json do not belong together."
_SENTENCES = (
    "The quick brown fox jumps over the lazy dog.",
    "A model that was never measured is a rumour.",
    "It rains.",
    "Nobody had expected that the film would be so good.",
)


def load_hf(name: str, base: Path, task: str) -> Source:
    """The model in a folder (or of a hub id); see ``compress.sources.load_model``."""
    transformers = need("transformers", "hf")
    folder = find_folder(name, base)
    weights = weight_files(folder)
    with quiet(transformers):
        config = read_config(transformers, folder)
        model_class, output, found = _what(transformers, config, folder, task)
        tokenizer = read_tokenizer(transformers, folder)
        settings = _settings(model_class, config, output, tokenizer)
        model, notes = _load(model_class, config, folder, weights, settings)
    check_finite(model, str(folder))
    signature = _signature(model, config, output, tokenizer)
    example = _example(config, signature, tokenizer)
    _try(model, signature, example, name)
    # A key of the hub's cache says nothing: the name is the folder's own, or the id's last part.
    short = name.rstrip("/").rpartition("/")[2] or folder.name
    num_labels = int(config.num_labels) if "classification" in found else None
    return Source(
        model=model,
        signature=signature,
        name=short,
        task=found,  # type: ignore[arg-type]
        fingerprint=digest_files([folder / "config.json", *weights]),
        rebuild={"kind": "hf", "class": model_class.__name__, **settings},
        make_example=example,
        classes=num_labels,
        labels={int(number): str(label) for number, label in config.id2label.items()} if num_labels else None,
        tokenizer=tokenizer,
        preprocessing=hf_preprocessing(transformers, config, folder) if signature.names == ("pixel_values",) else None,
        max_tokens=_longest(model, config, tokenizer),
        notes=notes,
        files={folder / file: file for file in _SMALL_FILES if (folder / file).is_file()},
    )


def rebuild_hf(rebuild: dict[str, Any], folder: Path) -> nn.Module:
    """The architecture from ``folder/source/config.json``; weights are not read and not initialised."""
    transformers = need("transformers", "hf")
    with quiet(transformers):
        config = read_config(transformers, folder / "source")
        settings = {key: value for key, value in rebuild.items() if key not in ("kind", "class")}
        model_class = getattr(transformers, rebuild["class"], None)
        if model_class is None:
            raise UserError(str(folder), f"this transformers has no {rebuild['class']}", "Install the version of the run.")
        _prepare(config, settings)
        with _no_initialisation():
            model: nn.Module = model_class._from_config(
                config, attn_implementation=settings["attention"], dtype=torch.float32, **settings["arguments"]
            )
    return model.eval().requires_grad_(False)


def _what(transformers: Any, config: Any, folder: Path, task: str) -> tuple[Any, Output, str]:
    """The model class, how its output is taken, and the task."""
    where = str(folder / "config.json")
    if getattr(config, "is_encoder_decoder", False):
        hint = "Encoders and decoders are: classification, sentence embeddings, causal language models."
        raise UserError(where, f"{config.model_type} is an encoder-decoder, which is not supported", hint)
    names = config.architectures or []
    name = names[0] if names else ""
    endings: dict[str, tuple[Output, str]] = {
        "ForSequenceClassification": ("logits", "text-classification"),
        "ForImageClassification": ("logits", "image-classification"),
        "ForImageClassificationWithTeacher": ("logits", "image-classification"),
        "ForCausalLM": ("logits", "causal-lm"),
        "LMHeadModel": ("logits", "causal-lm"),
    }
    found = next((value for ending, value in endings.items() if name.endswith(ending)), None)
    sentences = task == "sentence-embedding" or (task == "auto" and (folder / "modules.json").is_file())
    if not sentences and task != "features" and found is not None:
        if task not in ("auto", found[1]):
            raise UserError("model.task", f"{name} does {found[1]}, not {task}", f"Give task: {found[1]}, or auto.")
        return _class(transformers, name, where), *found
    if sentences:
        check_pooling(folder)
        return _base_class(transformers, config, where), "mean_pooling", "sentence-embedding"
    if task in ("auto", "features"):
        if name.endswith("ForMaskedLM"):
            return _class(transformers, name, where), "logits", "features"
        if name and not name.endswith("Model") and found is None:
            hint = "Give task: features to take the model without its head."
            if task == "auto":
                raise UserError(where, f"the task of {name} is not supported", hint)
        return _base_class(transformers, config, where), "last_hidden_state", "features"
    hint = "Only a model that was trained for the task has the head for it."
    raise UserError("model.task", f"{name or 'this model'} cannot do {task}", hint)


def _class(transformers: Any, name: str, where: str) -> Any:
    found = getattr(transformers, name, None)
    if found is None:
        raise UserError(where, f"transformers {transformers.__version__} has no {name}", "Install the version that it needs.")
    return found


def _base_class(transformers: Any, config: Any, where: str) -> Any:
    name = transformers.models.auto.modeling_auto.MODEL_MAPPING_NAMES.get(config.model_type)
    if isinstance(name, list | tuple):
        name = name[0]
    return _class(transformers, name or f"model for {config.model_type}", where)


def _settings(model_class: Any, config: Any, output: Output, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """What is asked of the model beyond its config.json, as JSON; ``rebuild_hf`` asks the same."""
    arguments: dict[str, Any] = {}
    unused = output in ("last_hidden_state", "mean_pooling")
    if unused and "add_pooling_layer" in inspect.signature(model_class.__init__).parameters:
        arguments["add_pooling_layer"] = False
    pad = None
    if getattr(config, "pad_token_id", None) is None and tokenizer is not None:
        pad = tokenizer.raw.pad_token_id
    attention = "sdpa" if getattr(model_class, "_supports_sdpa", False) else "eager"
    return {"attention": attention, "arguments": arguments, "pad_token_id": pad}


def _prepare(config: Any, settings: dict[str, Any]) -> None:
    if settings["pad_token_id"] is not None:
        config.pad_token_id = settings["pad_token_id"]


def _load(
    model_class: Any, config: Any, folder: Path, weights: list[Path], settings: dict[str, Any]
) -> tuple[nn.Module, tuple[str, ...]]:
    """The model with its weights, and a note on what the file holds beyond them."""
    _prepare(config, settings)
    where, name = str(folder), model_class.__name__
    try:
        model, found = model_class.from_pretrained(
            folder,
            config=config,
            dtype=torch.float32,
            use_safetensors=True,
            local_files_only=True,
            attn_implementation=settings["attention"],
            output_loading_info=True,
            **settings["arguments"],
        )
    except Exception as error:  # whatever the class of a model raises for values that it does not know
        if told := _other_shape(model_class, config, weights, settings):
            raise UserError(where, told, _DOES_NOT_FIT) from None
        told = line(error) if isinstance(error, OSError | ValueError | RuntimeError) else f"{type(error).__name__}: {line(error)}"
        raise UserError(where, f"{name} cannot be loaded: {told}", _DOES_NOT_FIT) from None
    if absent := sorted(found["missing_keys"]):
        raise UserError(where, f"the weights lack {_first(absent)}", f"{_DOES_NOT_FIT[:-1]}, or the model has another task.")
    unused = sorted(found["unexpected_keys"])
    if layers := _layers(model, unused):
        raise UserError(where, f"the weights hold {_first(layers)}, a layer that config.json does not have", _DOES_NOT_FIT)
    note = f"{len(unused)} weights of the file are not part of {name}: {_first(unused)}" if unused else ""
    return model.eval().requires_grad_(False), (note,) if note else ()


def _first(names: list[str]) -> str:
    return names[0] + (f" (and {len(names) - 1} more)" if len(names) > 1 else "")


def _layers(model: Any, unused: list[str]) -> list[str]:
    """Those of the unused weights that differ from one of the model's in a number only: of a layer more."""

    def pattern(name: str) -> str:
        return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)

    known = {pattern(name) for name in model.state_dict()}
    prefix = f"{model.base_model_prefix}."
    return [name for name in unused if {pattern(name), pattern(name).removeprefix(prefix)} & known]


def _other_shape(model_class: Any, config: Any, weights: list[Path], settings: dict[str, Any]) -> str:
    """Says which weight has another shape than the configuration asks for; empty where it cannot be told."""
    from safetensors import safe_open

    try:
        with torch.device("meta"):
            own = model_class._from_config(config, **settings["arguments"]).state_dict()
    except Exception:  # the same values that could not be loaded
        return ""
    prefix = f"{model_class.base_model_prefix}."
    for path in weights:
        with safe_open(path, framework="pt") as file:
            for key in sorted(file.keys()):
                shape = list(file.get_slice(key).get_shape())
                for name in (key, f"{prefix}{key}", key.removeprefix(prefix)):
                    if name in own and list(own[name].shape) != shape:
                        return f"the weight {key} is {shape}, by config.json it is {list(own[name].shape)}"
    return ""


def _signature(model: Any, config: Any, output: Output, tokenizer: Tokenizer | None) -> Signature:
    name = "logits" if output == "logits" else {"mean_pooling": "embedding"}.get(output, output)
    if model.main_input_name == "pixel_values":
        height, width = _image_size(config)
        shape = ("batch", int(getattr(config, "num_channels", 3)), height, width)
        return Signature((TensorSpec("pixel_values", torch.float32, shape),), output, name)
    if model.main_input_name != "input_ids":
        hint = "Models of text (input_ids) and of images (pixel_values) are supported."
        raise UserError(f"hf:{config.model_type}", f"its input is {model.main_input_name}", hint)
    accepted = inspect.signature(model.forward).parameters
    names = tokenizer.names if tokenizer else ("input_ids", "attention_mask")
    inputs = tuple(TensorSpec(name, torch.int64, ("batch", "tokens")) for name in names if name in accepted)
    constants = {"use_cache": False} if "use_cache" in accepted else {}
    return Signature(inputs, output, name, constants)


def _image_size(config: Any) -> tuple[int, int]:
    size = getattr(config, "image_size", None) or 224
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def _longest(model: nn.Module, config: Any, tokenizer: Tokenizer | None) -> int | None:
    """The longest text the model takes; a table of positions with a row for padding (RoBERTa's) starts after that row."""
    limits = [getattr(config, "max_position_embeddings", None), tokenizer.raw.model_max_length if tokenizer else None]
    for name, table in model.named_modules():
        if isinstance(table, nn.Embedding) and name.endswith("position_embeddings") and table.padding_idx is not None:
            limits.append(table.num_embeddings - table.padding_idx - 1)
    known = [value for value in limits if isinstance(value, int) and 0 < value < 10**9]
    return min(known) if known else None


def _try(model: nn.Module, signature: Signature, example: Callable[[], Batch], name: str) -> None:
    """Calls the model once, so that one that needs other inputs or gives other outputs is refused here."""
    try:
        with torch.inference_mode():
            signature.call(model, {key: value[:1] for key, value in example().items()})
    except (AttributeError, KeyError, TypeError, ValueError, IndexError, RuntimeError) as error:
        what = f"{type(model).__name__} does not run on {', '.join(signature.names)} ({line(error)})"
        raise UserError(f"hf:{name}", what, "Wrap it in a function of yours: model: file.py:function.") from None


def _example(config: Any, signature: Signature, tokenizer: Tokenizer | None) -> Callable[[], Batch]:
    if signature.names == ("pixel_values",):
        channels, height, width = (int(size) for size in signature.inputs[0].shape[1:])
        return lambda: {"pixel_values": random_images((4, channels, height, width))}
    if tokenizer is not None:

        def from_text() -> Batch:
            batch = tokenizer(_SENTENCES, tokens=16)[0]
            return {name: batch[name] for name in signature.names}

        return from_text
    return lambda: _random_text(config, signature)


def _random_text(config: Any, signature: Signature) -> Batch:
    """4 rows of 16, 11, 7 and 4 random ids, padded to 16."""
    pad = config.pad_token_id if isinstance(getattr(config, "pad_token_id", None), int) else 0
    ids = torch.randint(config.vocab_size // 2, config.vocab_size, (4, 16), generator=torch.Generator().manual_seed(0))
    ids = torch.where(ids == pad, pad - 1 if pad else pad + 1, ids)
    mask: Tensor = (torch.arange(16) < torch.tensor([16, 11, 7, 4]).unsqueeze(1)).long()
    batch = {"input_ids": torch.where(mask.bool(), ids, pad), "attention_mask": mask}
    return {name: batch[name] for name in signature.names}


@contextmanager
def _no_initialisation() -> Iterator[None]:
    from transformers.initialization import no_init_weights

    with no_init_weights():
        yield
