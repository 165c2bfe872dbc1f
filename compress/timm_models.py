"""Models of timm by name, with the weights of a safetensors file, with timm's own, or with random ones."""

from __future__ import annotations

import inspect
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from calibrate.errors import UserError
from calibrate.signature import Signature, TensorSpec
from compress.sources import (
    Source,
    check_finite,
    digest_tensors,
    nearest,
    need,
    random_images,
    read_weights,
    settle_torchvision,
)

__all__ = ["load_timm", "rebuild_timm"]


def load_timm(name: str, base: Path, checkpoint: Path | None, seed: int, task: str) -> Source:
    """A model of timm; see ``compress.sources.load_model``.

    Without a checkpoint the weights are random, made from the seed: such a model is good for sizes and times, and
    ``Source.notes`` says so. ``checkpoint: pretrained`` fetches the weights that timm publishes.
    """
    if task not in ("auto", "image-classification", "features"):
        raise UserError("model.task", f"timm models do not do {task}", "Give task: image-classification, or features.")
    timm = _timm()
    if name not in timm.list_models():
        known = timm.list_models()
        if name.partition(".")[0] not in known:
            raise UserError("model", f"timm {timm.__version__} has no model {name!r}", nearest(name, known))
    model, classes = _made(timm, name, None, seed), None
    if checkpoint is not None:
        file = _published(model, name) if str(checkpoint) == "pretrained" else base / checkpoint
        weights = read_weights(file)
        classes = _classes(model, weights)
        if classes is not None:
            model = _made(timm, name, classes, seed)
        _fill(model, weights, str(file))
    check_finite(model, f"timm:{name}")
    settings = timm.data.resolve_data_config({}, model=model)
    signature = _signature(model, settings, f"timm:{name}")
    shape = tuple(int(size) for size in signature.inputs[0].shape[1:])
    found = _task(model, signature, task)
    return Source(
        model=model,
        signature=signature,
        name=name,
        task=found,  # type: ignore[arg-type]
        fingerprint=digest_tensors(model.state_dict(), f"timm:{name}".encode()),
        rebuild={"kind": "timm", "name": name, "classes": classes},
        make_example=lambda: {signature.names[0]: random_images((4, *shape))},
        classes=int(model.num_classes) if found == "image-classification" else None,  # type: ignore[arg-type]
        preprocessing=_preprocessing(settings),
        notes=() if checkpoint else (f"random weights (seed {seed}): no checkpoint was given",),
    )


def rebuild_timm(rebuild: dict[str, Any]) -> nn.Module:
    """The architecture, with random weights."""
    return _made(_timm(), rebuild["name"], rebuild["classes"], 0)


def _timm() -> Any:
    reason = settle_torchvision()
    try:
        return need("timm", "timm")
    except ImportError:
        if reason is None:
            raise
        hint = "Install the torchvision that was built for this torch, from the same index as torch."
        what = f"timm needs torchvision, which cannot be imported here: {reason}"
        raise UserError("model", what, hint) from None


def _made(timm: Any, name: str, classes: int | None, seed: int) -> nn.Module:
    arguments = {} if classes is None else {"num_classes": classes}
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        model: nn.Module = timm.create_model(name, pretrained=False, **arguments)
    return model.eval().requires_grad_(False).float()


def _published(model: Any, name: str) -> Path:
    """The safetensors file that timm publishes for a model."""
    from huggingface_hub import snapshot_download

    published = getattr(model, "pretrained_cfg", {}).get("hf_hub_id")
    try:
        if not published:
            raise FileNotFoundError
        return Path(snapshot_download(published, allow_patterns=["model.safetensors"])) / "model.safetensors"
    except Exception as error:  # the hub's own errors and the network's
        what = f"its published weights cannot be fetched ({type(error).__name__})"
        raise UserError(f"timm:{name}", what, "Give checkpoint: a safetensors file.") from None


def _classes(usual: Any, weights: dict[str, torch.Tensor]) -> int | None:
    """How many classes a checkpoint has, when its head is not of the usual size."""
    head = getattr(usual, "pretrained_cfg", {}).get("classifier")
    head = head[0] if isinstance(head, list | tuple) else head
    stored = weights.get(f"{head}.bias")
    return None if stored is None or len(stored) == usual.num_classes else len(stored)


def _fill(model: nn.Module, weights: dict[str, torch.Tensor], where: str) -> None:
    own = model.state_dict()
    if absent := sorted(set(own) - set(weights)):
        more = f" (and {len(absent) - 1} more)" if len(absent) > 1 else ""
        raise UserError(where, f"lacks the weight {absent[0]}{more}", "It was saved from another model.")
    if strange := sorted(set(weights) - set(own)):
        more = f" (and {len(strange) - 1} more)" if len(strange) > 1 else ""
        raise UserError(where, f"has the weight {strange[0]}{more} that the model lacks", "It was saved from another model.")
    for key, value in own.items():
        if value.shape != weights[key].shape:
            what = f"{key} is {list(weights[key].shape)}, the model has {list(value.shape)}"
            raise UserError(where, what, "It was saved from another model.")
    model.load_state_dict(weights)


def _signature(model: nn.Module, settings: dict[str, Any], where: str) -> Signature:
    name = next(iter(inspect.signature(model.forward).parameters))
    inputs = (TensorSpec(name, torch.float32, ("batch", *(int(size) for size in settings["input_size"]))),)
    with torch.inference_mode():
        output = model(random_images((1, *settings["input_size"])))
    if not isinstance(output, torch.Tensor):
        raise UserError(where, f"returns {type(output).__name__}, not one tensor", "Models with one output are supported.")
    return Signature(inputs, "tensor", "logits" if getattr(model, "num_classes", 0) else "features")


def _task(model: nn.Module, signature: Signature, task: str) -> str:
    classifies = signature.output_name == "logits"
    if task == "image-classification" and not classifies:
        raise UserError("model.task", "this timm model has no classes", "Give task: features.")
    return "image-classification" if classifies and task != "features" else "features"


def _preprocessing(settings: dict[str, Any]) -> dict[str, Any]:
    """timm's data configuration in the keys of ``calibrate.images.ImageEncoder`` (its evaluation transform)."""
    channels, height, width = settings["input_size"]
    ratio, mode = settings.get("crop_pct") or 1.0, settings.get("crop_mode", "center")
    scaled = [int(height / ratio), int(width / ratio)]
    interpolation = settings.get("interpolation", "bicubic")
    return {
        "size": [height, width],
        "channels": channels,
        "mean": list(settings["mean"]),
        "std": list(settings["std"]),
        "scale": 1 / 255,
        "interpolation": interpolation if interpolation != "random" else "bicubic",
        "resize": scaled[0] if mode == "center" and height == width else scaled,
        "crop": True,
        "from": "timm's data configuration",
    }
