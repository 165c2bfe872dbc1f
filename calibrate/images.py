"""Images: folders with one sub-folder for each class, decoded and scaled as a model wants them."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from calibrate.data import Encoder, Item, Table
from calibrate.errors import UserError
from calibrate.signature import Batch

__all__ = ["ImageEncoder", "ImageFolder"]

_SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".ppm", ".pgm", ".tif", ".tiff"))
_RESAMPLING = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3, "box": 4, "hamming": 5}


class ImageFolder(Table):
    """``folder/class/image.png``: sub-folders in sorted order are the classes, their images in sorted order the rows.

    A folder that holds images and no sub-folders has rows without labels.

    Attributes:
        class_names: the sub-folders; None without labels.
    """

    format = "images"
    scattered = True

    def __init__(self, path: Path, name: str) -> None:
        """Lists the files; opens none.

        Raises:
            UserError: not a folder, or without images.
        """
        if not path.is_dir():
            what = "is not a folder" if path.exists() else "there is no such folder"
            raise UserError(name, what, "Name the folder that holds one sub-folder of images for each class.")
        self.path, self.name = path, name
        folders = sorted(entry.name for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))
        try:
            listed = [(number, file) for number, folder in enumerate(folders) for file in _files(path / folder)]
        except OSError as error:
            raise UserError(name, f"cannot be read: {error.strerror}", "Check the permissions of its folders.") from None
        images = [(number, file) for number, file in listed if file.suffix.lower() in _SUFFIXES]
        if not folders:
            images = [(0, file) for file in _files(path) if file.suffix.lower() in _SUFFIXES]
        if not images:
            raise UserError(name, "holds no images", f"Images end in {', '.join(sorted(_SUFFIXES))}.")
        self.class_names: list[str] | None = folders or None
        self._files = [file for _, file in images]
        self._numbers = [number for number, _ in images]
        self._others = len(listed) - len(images) if folders else 0

    def __len__(self) -> int:
        return len(self._files)

    def items(self, indices: Sequence[int]) -> Iterator[Item]:
        for index in indices:
            if not os.path.isfile(self._files[index]):  # a pipe would be waited for
                raise UserError(self.place(index), "is not a file that can be read", "Repair or remove it.")
            try:
                yield (self._files[index].read_bytes(),)
            except OSError as error:
                hint = "Check the permissions of the file, or remove it."
                raise UserError(self.place(index), f"cannot be read: {error.strerror}", hint) from None

    def label_values(self) -> Sequence[Any] | None:
        return self._numbers if self.class_names else None

    def place(self, index: int) -> str:
        assert self.path is not None
        return f"{self.name}/{self._files[index].relative_to(self.path).as_posix()}"

    def describe(self) -> dict[str, Any]:
        return {"classes": self.class_names, "files_that_are_no_images": self._others}


class ImageEncoder(Encoder):
    """Image files (bytes) to float32 [B, channels, height, width]: ``(pixel * scale - mean) / std``.

    An image is first resized to ``resize`` ([height, width], or its shortest edge to one number), then, if its size
    is another, cut in the middle (``crop``) or resized to ``size``.
    """

    def __init__(self, name: str, settings: Mapping[str, Any]) -> None:
        """``settings``: size [height, width], channels, mean, std, scale, interpolation, resize, crop."""
        self._name, self._settings = name, dict(settings)
        channels = int(settings["channels"])
        for key in ("mean", "std"):
            if len(settings[key]) not in (1, channels):
                what = f"{key} has {len(settings[key])} numbers, the images have {channels} channels"
                raise UserError(f"data.{key}", what, "Give one number for each channel.")
        self._mean = np.asarray(settings["mean"], np.float32).reshape(-1, 1, 1)
        self._std = np.asarray(settings["std"], np.float32).reshape(-1, 1, 1)

    def encode(self, items: Sequence[Item], places: Sequence[str]) -> Batch:
        pixels = [self._pixels(item[0], place) for item, place in zip(items, places, strict=True)]
        return {self._name: torch.from_numpy(np.stack(pixels))}

    def check(self, item: Item, place: str) -> None:
        _decoded(item[0], self._settings["channels"], place)

    def describe(self) -> dict[str, Any]:
        return {"input": self._name, **self._settings}

    def _pixels(self, raw: bytes, place: str) -> np.ndarray[Any, Any]:
        settings = self._settings
        image = _decoded(raw, settings["channels"], place)
        filter_number = _pillow().Resampling(_RESAMPLING[settings["interpolation"]])
        image = _fitted(image, settings["resize"], settings["size"], bool(settings["crop"]), filter_number)
        values = np.asarray(image, np.float32)
        values = values[None] if values.ndim == 2 else values.transpose(2, 0, 1)
        scaled: np.ndarray[Any, Any] = (values * np.float32(settings["scale"]) - self._mean) / self._std
        return np.ascontiguousarray(scaled, np.float32)


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError:
        raise UserError("data", "Pillow is not installed", "pip install 'transformer-compress[hf]'") from None
    return Image


def _decoded(raw: Any, channels: int, place: str) -> Any:
    """The image in the bytes of a file, grey or in colour.

    Raises:
        UserError: it cannot be decoded; names the row.
    """
    pillow = _pillow()
    if not isinstance(raw, bytes):
        hint = "Name the column with the images: columns: {image: NAME}."
        raise UserError(place, f"holds {type(raw).__name__}, not the bytes of an image", hint)
    try:
        with pillow.open(io.BytesIO(raw)) as opened:
            return opened.convert("L" if channels == 1 else "RGB")
    except pillow.UnidentifiedImageError:
        raise UserError(place, "is not an image that can be read", "Repair or remove it.") from None
    except Exception as error:  # decoders raise whatever they meet in damaged bytes
        what = str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__
        raise UserError(place, f"is damaged ({what})", "Repair or remove it.") from None


def _fitted(image: Any, resize: Any, size: Sequence[int], crop: bool, filter_number: Any) -> Any:
    height, width = size
    if isinstance(resize, int):
        # The other edge is cut down to whole pixels, as torchvision and transformers do.
        short = min(image.size)
        target = tuple(resize if edge == short else int(resize * edge / short) for edge in image.size)
    else:
        target = (resize[1], resize[0]) if resize is not None else image.size
    if image.size != target:
        image = image.resize(target, filter_number)
    if image.size == (width, height):
        return image
    if crop:
        left, top = (image.size[0] - width) // 2, (image.size[1] - height) // 2
        return image.crop((left, top, left + width, top + height))
    return image.resize((width, height), filter_number)


def _files(folder: Path) -> list[Path]:
    """What lies in a folder and is no folder; a link to nowhere too, so that it is refused and not left out."""
    return sorted(entry for entry in folder.iterdir() if not entry.is_dir() and not entry.name.startswith("."))
