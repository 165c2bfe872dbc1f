"""Images: folders, parquet, decoding, and images that cannot be read."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from calibrate.data import Rows
from calibrate.errors import UserError
from calibrate.images import ImageEncoder, ImageFolder
from calibrate.parquet import Parquet

Image = pytest.importorskip("PIL.Image")
pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

PLAIN: dict[str, Any] = {
    "size": [6, 8],
    "channels": 3,
    "mean": [0.0],
    "std": [1.0],
    "scale": 1 / 255,
    "interpolation": "bilinear",
    "resize": [6, 8],
    "crop": False,
}


def pixels(seed: int, height: int = 6, width: int = 8) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def png(values: np.ndarray[Any, Any], kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    Image.fromarray(values).save(stream, kind)
    return stream.getvalue()


def folder(path: Path, classes: tuple[str, ...] = ("cat", "dog"), each: int = 2) -> Path:
    for number, name in enumerate(classes):
        (path / name).mkdir(parents=True)
        for index in range(each):
            (path / name / f"{index}.png").write_bytes(png(pixels(10 * number + index)))
    return path


def test_folders_are_classes_in_sorted_order(tmp_path: Path) -> None:
    table = ImageFolder(folder(tmp_path / "a", ("dog", "cat")), "a")
    assert table.class_names == ["cat", "dog"]
    assert list(table.label_values() or []) == [0, 0, 1, 1]
    assert table.place(2) == "a/dog/0.png"
    batch = next(Rows(table, ImageEncoder("x", PLAIN), range(4)).batches(4))["x"]
    expected = torch.from_numpy(pixels(10)).permute(2, 0, 1) / 255
    assert torch.allclose(batch[0], expected, atol=1e-7)


def test_a_flat_folder_has_no_labels_and_other_files_are_told(tmp_path: Path) -> None:
    (tmp_path / "0.png").write_bytes(png(pixels(0)))
    assert ImageFolder(tmp_path, "flat").label_values() is None
    both = folder(tmp_path / "b")
    (both / "cat" / "notes.txt").write_text("x")
    (both / "cat" / ".hidden.png").write_text("x")
    table = ImageFolder(both, "b")
    assert len(table) == 4
    assert table.describe()["files_that_are_no_images"] == 1


def test_folders_that_are_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no such folder"):
        ImageFolder(tmp_path / "none", "none")
    with pytest.raises(UserError, match="holds no images"):
        ImageFolder(tmp_path, "empty")
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="is not a folder"):
        ImageFolder(tmp_path / "file", "file")


@pytest.mark.parametrize("damage", ["cut", "text", "empty"])
def test_damaged_images_are_named(tmp_path: Path, damage: str) -> None:
    path = folder(tmp_path / "a") / "dog" / "1.png"
    whole = path.read_bytes()
    path.write_bytes({"cut": whole[: len(whole) // 2], "text": b"no image", "empty": b""}[damage])
    rows = Rows(ImageFolder(tmp_path / "a", "a"), ImageEncoder("x", PLAIN), range(4))
    with pytest.raises(UserError, match=r"a/dog/1.png: is (damaged|not an image)"):
        list(rows.batches(2))


def test_mean_std_and_grey(tmp_path: Path) -> None:
    values = pixels(3)
    colour = ImageEncoder("x", PLAIN | {"mean": [0.5, 0.4, 0.3], "std": [0.5, 0.25, 0.2]})
    found = colour.encode([(png(values),)], ["a"])["x"][0]
    expected = (values / 255.0 - [0.5, 0.4, 0.3]) / [0.5, 0.25, 0.2]
    assert np.allclose(found.permute(1, 2, 0), expected, atol=1e-5)
    grey = ImageEncoder("x", PLAIN | {"channels": 1}).encode([(png(values),)], ["a"])["x"]
    assert tuple(grey.shape) == (1, 1, 6, 8)
    with pytest.raises(UserError, match=r"data.mean: mean has 3 numbers, the images have 1 channels"):
        ImageEncoder("x", PLAIN | {"channels": 1, "mean": [0.5, 0.5, 0.5]})


def test_palettes_and_transparency_become_rgb() -> None:
    image = Image.fromarray(pixels(4))
    for mode in ("P", "RGBA", "L", "CMYK"):
        stream = io.BytesIO()
        image.convert(mode).save(stream, "TIFF" if mode == "CMYK" else "PNG")
        assert tuple(ImageEncoder("x", PLAIN).encode([(stream.getvalue(),)], ["a"])["x"].shape) == (1, 3, 6, 8)


def test_resize_of_the_shortest_edge_and_crop_are_those_of_torchvision() -> None:
    """Oracle: what torchvision's Resize and CenterCrop do, in Pillow: 40x60 -> shortest 20 -> 20x30 -> centre 16x16."""
    values = pixels(5, 40, 60)
    settings = PLAIN | {"size": [16, 16], "resize": 20, "crop": True, "interpolation": "bicubic"}
    found = ImageEncoder("x", settings).encode([(png(values),)], ["a"])["x"][0]
    small = Image.fromarray(values).resize((30, 20), Image.Resampling.BICUBIC)
    expected = np.asarray(small)[2:18, 7:23] / 255.0
    assert np.allclose(found.permute(1, 2, 0), expected, atol=1e-6)


def test_images_of_another_size_are_resized() -> None:
    found = ImageEncoder("x", PLAIN).encode([(png(pixels(6, 20, 20)),), (png(pixels(7)),)], ["a", "b"])["x"]
    assert tuple(found.shape) == (2, 3, 6, 8)


def write_parquet(path: Path, count: int, layout: str = "struct", groups: int = 3, names: list[str] | None = None) -> Path:
    images = [png(pixels(number)) for number in range(count)]
    cells = [{"bytes": image, "path": None} for image in images] if layout == "struct" else images
    table = pa.table({"image": cells, "label": [number % 2 for number in range(count)]})
    if names:
        import json

        info = {"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}}
        table = table.replace_schema_metadata({b"huggingface": json.dumps(info).encode()})
    pq.write_table(table, path, row_group_size=-(-count // groups))
    return path


@pytest.mark.parametrize("layout", ["struct", "plain"])
@pytest.mark.parametrize("indices", [[0], [4, 5, 6], [0, 3, 9], list(range(10)), [9]])
def test_parquet_gives_the_chosen_rows_over_row_groups(tmp_path: Path, layout: str, indices: list[int]) -> None:
    table = Parquet(write_parquet(tmp_path / "a.parquet", 10, layout), "a.parquet", ["image"], "label")
    assert len(table) == 10
    assert list(table.items(indices)) == [(png(pixels(index)),) for index in indices]
    assert list(table.label_values() or [])[:3] == [0, 1, 0]


def test_parquet_over_many_pieces_of_one_row_group(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": [f"t{number}" for number in range(500)]}), tmp_path / "a.parquet", row_group_size=400)
    table = Parquet(tmp_path / "a.parquet", "a.parquet", ["text"])
    wanted = [0, 63, 64, 65, 200, 399, 400, 499]
    assert list(table.items(wanted)) == [(f"t{number}",) for number in wanted]
    assert table.label_values() is None


def test_parquet_knows_the_names_of_classes(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", 4, names=["dog", "cat"])
    assert Parquet(path, "a.parquet", ["image"], "label").class_names == ["dog", "cat"]
    assert Parquet(path, "a.parquet", [0], 1).describe()["columns"] == {"inputs": ["image"], "label": "label"}


def test_parquet_errors(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", 4)
    with pytest.raises(UserError, match="no column 'imgae'\n  Nearest: image"):
        Parquet(path, "a.parquet", ["imgae"])
    with pytest.raises(UserError, match="has 2 columns, there is no column 5"):
        Parquet(path, "a.parquet", [5])
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="is not a parquet file"):
        Parquet(path, "a.parquet", ["image"])
    empty = pa.table({"image": [{"bytes": None, "path": "x.png"}, {"bytes": png(pixels(0)), "path": None}], "label": [0, 1]})
    pq.write_table(empty, path)
    with pytest.raises(UserError, match=r"a.parquet: row 0: column 'image' is empty"):
        list(Parquet(path, "a.parquet", ["image"]).items([0]))
    pq.write_table(empty.slice(0, 0), path)
    with pytest.raises(UserError, match="has no rows"):
        Parquet(path, "a.parquet", ["image"])
