"""What lies in a Hugging Face folder: configuration, weights, tokenizer; read with care and refused with reason."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from calibrate.errors import UserError
from calibrate.signature import Batch
from compress.sources import digest_files, nearest

__all__ = [
    "Tokenizer",
    "check_pooling",
    "find_folder",
    "line",
    "quiet",
    "read_config",
    "read_json",
    "read_tokenizer",
    "weight_files",
]

_AGAIN = "Copy or download it again."

_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json", "tokenizer.model", "spiece.model",
    "sentencepiece.bpe.model",
)  # fmt: skip


@dataclass(frozen=True)
class Tokenizer:
    """A model's own tokenizer, as the data needs it.

    Attributes:
        raw: the tokenizer of transformers.
        names: the model inputs that it makes (``input_ids``, ``attention_mask`` ...).
        fingerprint: SHA-256 over its files.
    """

    raw: Any
    names: tuple[str, ...]
    fingerprint: str

    def __call__(self, texts: Sequence[str], pairs: Sequence[str] | None = None, *, tokens: int) -> tuple[Batch, list[bool]]:
        """Named int64 tensors [B, tokens], padded or cut to ``tokens``, and for each text whether it was cut."""
        second = {} if pairs is None else {"text_pair": list(pairs)}
        encoded = self.raw(list(texts), **second, padding="max_length", truncation=True, max_length=tokens)
        batch = {name: torch.tensor(encoded[name], dtype=torch.int64) for name in self.names}
        if encoded.encodings:
            return batch, [bool(encoding.overflowing) for encoding in encoded.encodings]
        whole = self.raw(list(texts), **second, padding=False, truncation=False)["input_ids"]
        return batch, [len(ids) > tokens for ids in whole]

    def ids(self, text: str) -> list[int]:
        """Token ids of a running text, without special tokens."""
        ids: list[int] = self.raw(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids


def find_folder(name: str, base: Path) -> Path:
    """The folder that ``hf:name`` means: one here (relative to ``base``), or what the hub has under that id.

    Raises:
        UserError: neither; names the nearest folder.
    """
    path = Path(name).expanduser()
    folder = path if path.is_absolute() else base / path
    if os.path.isdir(folder):  # unlike Path.is_dir, takes names of any length
        return folder
    if os.path.exists(folder):
        raise UserError(f"hf:{name}", "is a file, not a folder", "Name the folder that holds config.json and model.safetensors.")
    told = f"hf:{name}" if len(name) <= 200 else f"hf:{name[:80]} ... ({len(name)} characters)"
    names = [entry.name for entry in folder.parent.iterdir() if entry.is_dir()] if os.path.isdir(folder.parent) else []
    near = nearest(folder.name, names) if names else ""
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1 or name.endswith("/"):
        hint = near or "Name the folder that model.save_pretrained wrote, relative to the recipe, or a hub id (owner/name)."
        raise UserError(told, "there is no such folder", hint)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model"]))
    except Exception as error:  # the hub's own errors, the network's, and invalid ids
        reason = f"no such folder here, and the hub did not give it ({type(error).__name__})"
        raise UserError(told, reason, f"Folders are looked for from {base.resolve()}. {near}".rstrip()) from None


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model, each opened once to see that it is whole.

    Raises:
        UserError: no configuration, no safetensors (a pickle is refused), a part missing, a damaged file.
    """
    from safetensors import SafetensorError, safe_open

    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if not (folder / "config.json").is_file():
        raise UserError(str(folder), "holds no config.json", "Name the folder that model.save_pretrained wrote.")
    if single.is_file():
        weights = [single]
    elif index.is_file():
        weights = _indexed(folder, index)
    elif pickled := sorted(folder.glob("*.bin")):
        hint = "Convert them where you trust them: AutoModel.from_pretrained(folder).save_pretrained(new_folder)."
        raise UserError(str(folder), f"its weights are a pickle ({pickled[0].name}), which is not read", hint)
    else:
        raise UserError(str(folder), "holds no model.safetensors", "Name the folder that model.save_pretrained wrote.")
    for path in weights:
        try:
            with safe_open(path, framework="pt"):
                pass
        except SafetensorError as error:
            raise UserError(str(path), f"is damaged or not a safetensors file ({error})", _AGAIN) from None
        except OSError as error:
            raise UserError(str(path), f"cannot be read: {error.strerror}", "Check the permissions of the file.") from None
    return weights


def _indexed(folder: Path, index: Path) -> list[Path]:
    """The parts that an index names; only files of the folder itself."""
    named = read_json(index, dict).get("weight_map")
    files = list(named.values()) if isinstance(named, dict) else []
    if not files or not all(isinstance(file, str) for file in files):
        raise UserError(str(index), "names no files of weights", _AGAIN)
    if outside := [file for file in files if file != os.path.basename(file)]:
        raise UserError(str(index), f"names {outside[0]}, which is not in the folder", _AGAIN)
    if missing := [file for file in sorted(set(files)) if not (folder / file).is_file()]:
        raise UserError(str(folder), f"{missing[0]} is missing", "Its index names it; copy or download it again.")
    return [folder / file for file in sorted(set(files))]


def read_json(path: Path, kind: type[Any]) -> Any:
    """What a JSON file holds: a ``dict`` or a ``list``.

    Raises:
        UserError: it cannot be read, is not JSON, or holds something else.
    """
    try:
        plain = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(str(path), f"cannot be read: {error.strerror}", "Check the permissions of the file.") from None
    except (ValueError, RecursionError) as error:
        raise UserError(str(path), f"is not JSON ({error})", _AGAIN) from None
    if not isinstance(plain, kind):
        raise UserError(str(path), f"is not a JSON {'object' if kind is dict else 'list'}", _AGAIN)
    return plain


def read_config(transformers: Any, folder: Path) -> Any:
    """The configuration; one that needs code of its own is refused.

    Raises:
        UserError: not JSON, an unknown ``model_type``, or values that its class refuses.
    """
    path = folder / "config.json"
    plain = read_json(path, dict)
    kind = plain.get("model_type")
    known = transformers.models.auto.configuration_auto.CONFIG_MAPPING_NAMES
    if not isinstance(kind, str) or kind not in known:
        if "auto_map" in plain:
            hint = "Load it in a function of your own, which you can read: model: file.py:function."
            raise UserError(str(path), "asks for code of its own, which is never run", hint)
        hint = nearest(kind, known) if isinstance(kind, str) else "model_type is missing."
        raise UserError(str(path), f"has the unknown model_type {kind!r}", hint)
    names = plain.get("architectures") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(str(path), "architectures is not a list of names", _AGAIN)
    try:
        return transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever the class of a configuration raises for values that it does not know
        hint = "Correct it, or copy or download it again."
        raise UserError(str(path), f"is not a valid configuration: {line(error)}", hint) from None


def read_tokenizer(transformers: Any, folder: Path) -> Tokenizer | None:
    """The tokenizer; None where the folder has none. One without a padding token pads with its end token (masked).

    Raises:
        UserError: its files cannot be read.
    """
    present = [folder / name for name in _TOKENIZER_FILES if (folder / name).is_file()]
    if not present:
        return None
    try:
        raw = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # tokenizers raise bare exceptions for damaged files
        raise UserError(str(folder), f"its tokenizer cannot be read: {line(error)}", "Copy its files again.") from None
    if raw.pad_token is None:
        raw.pad_token = raw.eos_token or raw.unk_token
    names = ("input_ids", "attention_mask", *(["token_type_ids"] if "token_type_ids" in raw.model_input_names else []))
    whole = hashlib.sha256(digest_files(present).encode())
    return Tokenizer(raw, names, whole.hexdigest())


def check_pooling(folder: Path) -> None:
    """Refuses sentence encoders that do anything but pool by the mean after the transformer.

    Raises:
        UserError: names the pooling, or the further layer.
    """
    pooling = folder / "1_Pooling" / "config.json"
    if pooling.is_file():
        said = read_json(pooling, dict)
        modes = [key.removeprefix("pooling_mode_") for key, on in said.items() if key.startswith("pooling_mode_") and on is True]
        modes = modes or [str(said.get("pooling_mode", "nothing"))]
        if modes not in (["mean_tokens"], ["mean"]):
            hint = "Mean pooling is supported; give task: features for the token states themselves."
            raise UserError(str(pooling), f"pools by {', '.join(modes)}", hint)
    modules = folder / "modules.json"
    if modules.is_file():
        listed = read_json(modules, list)
        kinds = [str(module.get("type") if isinstance(module, dict) else module).rpartition(".")[2] for module in listed]
        if extra := [kind for kind in kinds if kind not in ("Transformer", "Pooling", "Normalize")]:
            raise UserError(str(modules), f"has the layer {extra[0]} after the transformer", "It is not supported.")


@contextmanager
def quiet(transformers: Any) -> Iterator[None]:
    """No warnings, logs or bars; what must be said is said by errors and notes."""
    logging = transformers.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def line(error: BaseException) -> str:
    """The first line of an error's message, with the next one where it only announces that."""
    first, _, rest = str(error).strip().partition("\n")
    told = f"{first.rstrip()} {rest.strip().partition(chr(10))[0]}".strip() if first.rstrip().endswith(":") else first
    return told.rstrip(". ")[:200] or type(error).__name__
