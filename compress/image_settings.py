"""How a model wants its images, read from what came with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from calibrate.errors import UserError
from compress.huggingface_folder import read_json
from compress.sources import need

__all__ = ["hf_preprocessing"]

_KEYS = ("image_mean", "image_std", "resample", "size", "crop_size", "do_resize", "do_center_crop", "do_normalize",
         "do_rescale", "rescale_factor")  # fmt: skip
_INTERPOLATIONS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}


def hf_preprocessing(transformers: Any, config: Any, folder: Path) -> dict[str, Any]:
    """Settings for ``calibrate.images.ImageEncoder`` out of ``preprocessor_config.json``; what that leaves open (all,
    where there is no such file) is taken from the class that transformers uses for the architecture, at the model's
    image size.

    Keys: ``size`` [height, width] of the result, ``channels``, ``mean``, ``std`` (lists, or None where nothing states
        them), ``scale`` (factor on the bytes), ``interpolation``, ``resize`` ([height, width], or the length of the
        shortest edge), ``crop`` (whether ``size`` is cut from the middle), ``from`` (who says so).
    """
    path = folder / "preprocessor_config.json"
    defaults, named = _class_defaults(transformers, config.model_type)
    if path.is_file():
        said = defaults | {key: value for key, value in read_json(path, dict).items() if value is not None}
        try:
            return _settings(said, config, "preprocessor_config.json")
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            hint = "Correct it, or take it away and state mean, std and resize in the recipe."
            raise UserError(str(path), f"has a value that is not understood ({error})", hint) from None
    # Sizes of a class are those of its best-known model; the configuration knows this one's.
    open_size = {key: value for key, value in defaults.items() if key not in ("size", "crop_size", "do_center_crop")}
    return _settings(open_size, config, named)


def _settings(said: dict[str, Any], config: Any, origin: str) -> dict[str, Any]:
    own = getattr(config, "image_size", None) or 224
    height, width = (own, own) if isinstance(own, int) else own
    resize = _size(said.get("size")) if said.get("do_resize", True) else None
    crop = bool(said.get("do_center_crop")) and said.get("crop_size") is not None
    normal = said.get("do_normalize", True)
    channels = int(getattr(config, "num_channels", 3))
    scale = float(said.get("rescale_factor") or 1 / 255)
    mean, std = ([float(value) for value in said[key]] if said.get(key) else None for key in ("image_mean", "image_std"))
    if std is not None and not all(value > 0 for value in std):
        raise ValueError(f"image_std is {std}")
    return {
        "size": [int(height), int(width)],
        "channels": channels,
        "mean": mean if normal else [0.0] * channels,
        "std": std if normal else [1.0] * channels,
        "scale": scale if said.get("do_rescale", True) else 1.0,
        "interpolation": _INTERPOLATIONS.get(int(said.get("resample", 2)), "bilinear"),
        "resize": resize if resize is not None else [int(height), int(width)],
        "crop": crop,
        "from": origin,
    }


def _size(size: Any) -> list[int] | int | None:
    if isinstance(size, int):
        return [size, size]
    if isinstance(size, dict) and "height" in size:
        return [int(size["height"]), int(size["width"])]
    if isinstance(size, dict) and "shortest_edge" in size:
        return int(size["shortest_edge"])
    return None


def _class_defaults(transformers: Any, model_type: str) -> tuple[dict[str, Any], str]:
    from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES

    need("PIL", "hf")  # without it the class is a stand-in that raises on every look at it
    entry = IMAGE_PROCESSOR_MAPPING_NAMES.get(model_type)
    name = entry.get("pil") if isinstance(entry, dict) else None
    found = getattr(transformers, name, None) if name else None
    if found is None:
        return {}, "nothing states them"
    values = {key: getattr(found, key, None) for key in _KEYS}
    return {key: value for key, value in values.items() if value is not None}, f"defaults of {name}"
