"""Where models come from: ``hf:``, ``timm:``, ``file.py:function`` and ``embedded:``; each becomes a ``Source``."""

from __future__ import annotations

import difflib
import hashlib
import importlib
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn

from calibrate.errors import UserError
from calibrate.signature import Batch, Signature, TensorSpec
from compress.layers.attention import split_attention

if TYPE_CHECKING:
    from compress.huggingface_folder import Tokenizer

__all__ = [
    "Source",
    "Task",
    "check_finite",
    "digest_files",
    "digest_tensors",
    "load_model",
    "nearest",
    "need",
    "random_images",
    "read_weights",
    "rebuild_model",
    "settle_torchvision",
]

Task = Literal["image-classification", "text-classification", "sentence-embedding", "causal-lm", "features"]


@dataclass(frozen=True)
class Source:
    """A float model in eval mode, and everything about it that is not in its modules.

    Attributes:
        signature: its named inputs and its one output.
        name: short, for files and reports (``sst2-minilm``).
        fingerprint: SHA-256 over configuration and weights.
        rebuild: JSON from which ``rebuild_model`` makes the architecture again, without weights.
        classes: scores in the output, where those are scores of classes; 1 for a regression head; None if unknown.
        labels: class number to name, where the model says them.
        tokenizer: the model's own, for text.
        preprocessing: how images become its input: size [height, width], mean, std, channels, interpolation, resize,
            from.
        max_tokens: the longest text the model takes.
        notes: what a report must say of the model, such as that its weights are random.
        files: small files that ``save_files`` copies: path here -> name there.
    """

    model: nn.Module
    signature: Signature
    name: str
    task: Task
    fingerprint: str
    rebuild: dict[str, Any]
    make_example: Callable[[], Batch]
    classes: int | None = None
    labels: dict[int, str] | None = None
    tokenizer: Tokenizer | None = None
    preprocessing: dict[str, Any] | None = None
    max_tokens: int | None = None
    notes: tuple[str, ...] = ()
    files: Mapping[Path, str] = field(default_factory=dict)

    def example(self) -> Batch:
        """A small valid batch (4 rows; text is ragged and padded) that needs no data."""
        return self.make_example()

    def save_files(self, folder: Path) -> None:
        """Copies what ``rebuild_model`` needs beside the weights (configuration, tokenizer) into ``folder``."""
        folder.mkdir(parents=True, exist_ok=True)
        for path, name in self.files.items():
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            unfinished = target.with_name(f".{target.name}.part")
            shutil.copyfile(path, unfinished)
            unfinished.replace(target)


def load_model(
    source: str,
    *,
    base: Path,
    trust: bool = False,
    task: str = "auto",
    checkpoint: Path | None = None,
    seed: int = 0,
) -> Source:
    """Loads the float model that a recipe names.

    Args:
        source: ``embedded:digits-vit``, ``hf:folder-or-id``, ``timm:name`` or ``path/file.py:function``.
        base: the folder that relative paths start from.
        trust: whether a Python file of the user's may be run.
        task: one of ``Task``, or ``auto`` to take it from the model.
        checkpoint: a safetensors file for ``timm:``; ``Path("pretrained")`` fetches timm's own weights.
        seed: of the weights where none are given (``timm:`` without checkpoint).

    Raises:
        UserError: no such source, or it cannot be read.
    """
    loaded = _load(source, base=base, trust=trust, task=task, checkpoint=checkpoint, seed=seed)
    if count := split_attention(loaded.model):
        note = f"{count} torch.nn.MultiheadAttention taken apart into linear layers (the same function)"
        loaded = replace(loaded, notes=(*loaded.notes, note))
    return loaded


def _load(source: str, *, base: Path, trust: bool, task: str, checkpoint: Path | None, seed: int) -> Source:
    if task != "auto" and task not in get_args(Task):
        raise UserError("model.task", f"unknown task {task!r}", nearest(task, ["auto", *get_args(Task)]))
    kind, _, rest = source.partition(":")
    if checkpoint is not None and kind != "timm":
        hint = "Leave it out; only timm: models take a checkpoint, the others bring their weights."
        raise UserError("model.checkpoint", f"does not apply to {source}", hint)
    if kind == "embedded":
        return _embedded(rest)
    if kind == "hf":
        from compress.huggingface import load_hf

        return load_hf(rest, base, task)
    if kind == "timm":
        from compress.timm_models import load_timm

        return load_timm(rest, base, checkpoint, seed, task)
    if source.rpartition(":")[0].endswith(".py") or source.endswith(".py"):
        from compress.user_file import load_file

        return load_file(source, base, trust, task, seed)
    hint = "Give hf:folder-or-id, timm:name, path/file.py:function or embedded:digits-vit."
    if (base / source).is_dir():
        hint = f"For a folder of a Hugging Face model write hf:{source}."
    raise UserError("model", f"{source!r} names no source of models", hint)


def rebuild_model(rebuild: dict[str, Any], folder: Path, trust: bool = False) -> nn.Module:
    """The float architecture that ``Source.rebuild`` describes, in eval mode, its weights of no meaning.

    Args:
        rebuild: as a run folder recorded it.
        folder: the run folder, whose ``source/`` holds the files that ``Source.save_files`` copied.
        trust: whether a Python file of the user's may be run again.

    Raises:
        UserError: the description is not known, or it needs ``trust``.
    """
    model = _rebuild(rebuild, folder, trust)
    split_attention(model)
    return model


def _rebuild(rebuild: dict[str, Any], folder: Path, trust: bool) -> nn.Module:
    kind = rebuild.get("kind")
    if kind == "embedded":
        from compress.embedded import digits_model

        return digits_model(weights=False)
    if kind == "hf":
        from compress.huggingface import rebuild_hf

        return rebuild_hf(rebuild, folder)
    if kind == "timm":
        from compress.timm_models import rebuild_timm

        return rebuild_timm(rebuild)
    if kind == "file":
        from compress.user_file import rebuild_file

        return rebuild_file(rebuild, folder, trust)
    raise UserError(str(folder), f"does not say how to rebuild its model ({kind!r})", "Run the recipe again.")


def nearest(given: str, known: Iterable[str]) -> str:
    """A hint that names the nearest of the known names."""
    names = sorted(set(known))
    near = difflib.get_close_matches(given, names, n=3, cutoff=0.4)
    if near:
        return f"Nearest: {', '.join(near)}."
    return f"There is: {', '.join(names[:12])}{' ...' if len(names) > 12 else ''}"


def need(module: str, extra: str) -> Any:
    """Imports an optional library.

    Raises:
        UserError: it is not installed; names the extra that installs it.
    """
    if module in ("transformers", "timm"):
        settle_torchvision()
    try:
        return importlib.import_module(module)
    except ImportError as error:
        if error.name is not None and error.name.partition(".")[0] != module.partition(".")[0]:
            raise
        hint = f"pip install 'transformer-compress[{extra}]'"
        raise UserError("model", f"{module} is not installed", hint) from None


def settle_torchvision() -> str | None:
    """Hides a torchvision that cannot be imported (built for another torch), which would break transformers with it.

    Returns why it cannot be imported; None where it is sound or absent.
    """
    if sys.modules.get("torchvision") is not None:
        return None
    if "torchvision" in sys.modules:
        return _hidden.get("torchvision")
    try:
        importlib.import_module("torchvision")
    except ModuleNotFoundError as error:
        if error.name == "torchvision":
            return None
        _hidden["torchvision"] = str(error)
    except Exception as error:  # whatever a mismatched binary raises while it is imported
        _hidden["torchvision"] = str(error).partition("\n")[0]
    else:
        return None
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    sys.modules["torchvision"] = None  # type: ignore[assignment]  # makes every later import of it fail at once
    return _hidden["torchvision"]


_hidden: dict[str, str] = {}


def digest_files(paths: Iterable[Path]) -> str:
    """SHA-256 over the bytes of files, in the given order, read in pieces."""
    whole = hashlib.sha256()
    for path in paths:
        with path.open("rb") as opened:
            while piece := opened.read(1 << 20):
                whole.update(piece)
    return whole.hexdigest()


def digest_tensors(tensors: Mapping[str, Tensor], start: bytes = b"") -> str:
    """SHA-256 over names, shapes, dtypes and bytes of tensors, one at a time."""
    whole = hashlib.sha256(start)
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        whole.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        whole.update(tensor.reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else b"")
    return whole.hexdigest()


def check_finite(model: nn.Module, where: str) -> None:
    """Refuses weights that hold NaN or infinity.

    Raises:
        UserError: names the first such weight.
    """
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise UserError(where, f"the weight {name} holds NaN or infinity", "The file is damaged, or training diverged.")


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Raises:
        UserError: no such file, not safetensors, or damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not os.path.isfile(path):
        raise UserError(str(path), "there is no such file", nearest(path.name, _siblings(path)))
    if path.suffix != ".safetensors":
        hint = "Convert it where you trust it: safetensors.torch.save_file(state_dict, 'model.safetensors')."
        raise UserError(str(path), "is not a safetensors file; pickled weights are not read", hint)
    try:
        return load_file(path)
    except SafetensorError as error:
        raise UserError(str(path), f"is damaged or not a safetensors file ({error})", "Copy or download it again.") from None


def random_images(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Pixels in [-1, 1] of the given shape."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def _siblings(path: Path) -> list[str]:
    return [entry.name for entry in path.parent.iterdir()] if os.path.isdir(path.parent) else []


def _embedded(name: str) -> Source:
    from compress.embedded import digits_model
    from compress.embedded.digits import WEIGHTS_FILE

    if name != "digits-vit":
        raise UserError("model", f"no embedded model {name!r}", "There is: embedded:digits-vit.")
    pixels = TensorSpec("pixels", torch.float32, ("batch", 1, 8, 8))
    return Source(
        model=digits_model(),
        signature=Signature((pixels,), "tensor", "logits"),
        name=name,
        task="image-classification",
        fingerprint=digest_files([WEIGHTS_FILE]),
        rebuild={"kind": "embedded", "name": name},
        make_example=lambda: {"pixels": random_images((4, 1, 8, 8))},
        classes=10,
        labels={digit: str(digit) for digit in range(10)},
    )
