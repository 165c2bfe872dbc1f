"""The compressed torch model on disk: ``model.safetensors`` holds its tensors and, as metadata, what rebuilds the modules."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from calibrate.errors import UserError
from calibrate.signature import Signature, TensorSpec
from compress.surgery import Edit, Surgery
from export.disk import renamed

__all__ = ["Saved", "load", "read", "reload", "restore", "save", "signature_from", "signature_json"]

_KEY = "compress"
_FILE = "model.safetensors"


class Saved:
    """What ``model.safetensors`` says about itself, without its tensors.

    Attributes:
        edits: the changes that passes made to the module tree, in order.
        rebuild: what makes the float architecture (``compress.sources.rebuild_model``).
        signature: inputs and output of the model.
        tied: state-dict names that share a stored tensor (tied weights): name -> stored name.
    """

    def __init__(self, metadata: dict[str, Any]) -> None:
        self.edits = [Edit(**edit) for edit in metadata["edits"]]
        self.rebuild: dict[str, Any] = dict(metadata["rebuild"])
        self.signature = signature_from(metadata["signature"])
        self.tied: dict[str, str] = dict(metadata["tied"])


def save(model: nn.Module, edits: list[Edit], rebuild: dict[str, Any], signature: Signature, folder: Path) -> Path:
    """Writes ``model.safetensors`` (temporary name, then renamed) and returns its path.

    Tensors that share storage (tied weights) are written once.
    """
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    first: dict[tuple[object, ...], str] = {}
    for name, tensor in model.state_dict().items():
        key = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
        if tensor.numel() and key in first:
            tied[name] = first[key]
            continue
        first[key] = name
        tensors[name] = tensor.detach().contiguous()
    described = {
        "version": 1,
        "edits": [edit.json() for edit in edits],
        "rebuild": rebuild,
        "signature": signature_json(signature),
        "tied": tied,
    }
    path = folder / _FILE
    with renamed(path) as unfinished:
        # One key only: safetensors writes several in an order that changes from process to process.
        save_file(tensors, unfinished, metadata={_KEY: json.dumps(described, sort_keys=True)})
    return path


def read(folder: Path) -> Saved:
    """Reads what ``model.safetensors`` of a run folder says about itself.

    Raises:
        UserError: the folder holds no compressed model, or one that this version cannot read.
    """
    from safetensors import SafetensorError, safe_open

    path = folder / _FILE
    if not path.is_file():
        raise UserError(str(path), "there is no such file", "Name the folder of a finished run, such as runs/quickstart.")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise UserError(str(path), f"not a safetensors file ({error})", "Run the recipe again.") from None
    if _KEY not in metadata:
        raise UserError(str(path), "was not written by compress", "Name the folder of a finished run.")
    try:
        described = json.loads(metadata[_KEY])
        if described["version"] != 1:
            what = f"has version {described['version']}, this program reads version 1"
            raise UserError(str(path), what, "Update the package.")
        return Saved(described)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        what = f"does not say how its model is made ({type(error).__name__}: {error})"
        raise UserError(str(path), what, "Run the recipe again.") from None


def load(folder: str | Path, *, trust: bool = False) -> nn.Module:
    """The compressed torch model of a run folder, in eval mode; the float weights are not needed.

    Args:
        folder: a run folder (``runs/quickstart``).
        trust: whether the user's own Python file may be run again, for a model that came from ``file.py:function``.

    Raises:
        UserError: no such folder, the model came from a Python file and ``trust`` is False, or the file is not the one that the
            run wrote and cannot be used.
    """
    from compress.sources import rebuild_model

    folder = Path(folder)
    model = rebuild_model(read(folder).rebuild, folder, trust=trust)
    try:
        restore(model, folder)
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        if _as_written(folder):
            raise
        told = str(error).strip().rpartition("\n")[2].strip()
        raise UserError(
            str(folder / _FILE), f"is not the file that the run wrote: {told[:200]}", "Run the recipe again."
        ) from None
    return model.eval().requires_grad_(False)


def _as_written(folder: Path) -> bool:
    """Whether the file has the hash that the run's manifest records: then what fails is our defect."""
    from compress import manifest

    try:
        return bool(manifest.digest(folder / _FILE) == manifest.read(folder)["files"][_FILE]["sha256"])
    except (UserError, KeyError):
        return True


def restore(model: nn.Module, folder: Path) -> Surgery:
    """Makes a float model of the same architecture the model that ``save`` wrote into ``folder``; returns the edits made."""
    surgery = Surgery()
    surgery.replay(model, read(folder).edits)
    reload(model, folder)
    return surgery


def reload(model: nn.Module, folder: Path) -> None:
    """Puts the tensors that ``save`` wrote into ``folder`` in the place of the model's own; they are mapped, not read."""
    from safetensors.torch import load_file

    saved = read(folder)
    tensors = load_file(folder / _FILE)
    tensors |= {name: tensors[stored] for name, stored in saved.tied.items()}
    model.load_state_dict(tensors, assign=True)
    _tie(model, saved.tied)


def _tie(model: nn.Module, tied: dict[str, str]) -> None:
    """Makes names that were one parameter one parameter again."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, stored in tied.items():
        if name in parameters and stored in parameters:
            holder, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(holder), leaf, parameters[stored])


def signature_json(signature: Signature) -> dict[str, Any]:
    """A signature as JSON."""
    plain = asdict(signature)
    for spec in plain["inputs"]:
        spec["dtype"] = str(spec["dtype"]).removeprefix("torch.")
    return plain


def signature_from(plain: dict[str, Any]) -> Signature:
    """The inverse of ``signature_json``."""
    inputs = tuple(TensorSpec(spec["name"], _dtype(spec["dtype"]), tuple(spec["shape"])) for spec in plain["inputs"])
    return Signature(inputs, plain["output"], plain["output_name"], plain["constants"])


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"{name!r} is no type of elements")
    return found
