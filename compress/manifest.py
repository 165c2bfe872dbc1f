"""What a run was made of: hashes, versions, seed and machine, so that it can be told apart and made again."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calibrate.errors import UserError
from export.disk import renamed

if TYPE_CHECKING:
    from compress.recipe import Recipe
    from compress.sources import Source
    from export.contract import Artifact

__all__ = ["digest", "machine", "read", "read_json", "size_bytes", "versions", "write", "write_json"]

_LIBRARIES = (
    "transformer-compress", "torch", "numpy", "onnx", "onnx-ir", "onnxruntime", "openvino", "coremltools",
    "tensorrt", "tensorrt_rtx", "transformers", "timm", "nncf", "pot", "safetensors", "pydantic",
)  # fmt: skip


def digest(path: Path) -> str:
    """SHA-256 of a file, or of a folder: of its files' relative names and contents, in sorted order."""
    whole = hashlib.sha256()
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    for file in files:
        if file != path:
            whole.update(file.relative_to(path).as_posix().encode() + b"\0")
        with file.open("rb") as opened:
            while chunk := opened.read(1 << 20):
                whole.update(chunk)
    return whole.hexdigest()


def size_bytes(path: Path) -> int:
    """Bytes of a file with its external data, or of all files in a folder."""
    if path.is_dir():
        return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    data = path.with_name(path.name + ".data")
    return path.stat().st_size + (data.stat().st_size if data.is_file() else 0)


def versions() -> dict[str, str]:
    """Installed versions of the libraries that a run can use."""
    found = {}
    for name in _LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def machine(threads: int) -> dict[str, Any]:
    """The processor, cores, memory and system the run was made on."""
    import psutil

    from calibrate.latency import processor_name

    return {
        "processor": processor_name(),
        "architecture": platform.machine(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "threads": threads,
    }


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes JSON under a temporary name and renames it, so that the file is whole whenever it is there."""
    with renamed(path) as unfinished, unfinished.open("w") as file:
        file.write(json.dumps(content, indent=2, sort_keys=True, allow_nan=False) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_json(path: Path) -> dict[str, Any] | None:
    """A JSON object, or None where there is none; a file that is damaged or holds anything else counts as none."""
    try:
        content = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def write(out: Path, recipe: Recipe, source: Source, data: dict[str, Any], artifacts: Mapping[str, Artifact]) -> None:
    """Writes ``manifest.json``, with the hashes of the recipe, the compressed model and the files; ``data`` as
    ``compress.datasets.Data`` describes itself."""
    files = {"recipe.yaml": out / "recipe.yaml", "model.safetensors": out / "model.safetensors"}
    files |= {file.relative_to(out).as_posix(): file for file in sorted((out / "nested").glob("*"))}
    files |= {artifact.path.relative_to(out).as_posix(): artifact.path for artifact in artifacts.values()}
    content = {
        "version": 1,
        "recipe": recipe.name,
        "base": os.path.relpath(recipe.base, out),
        "seed": recipe.seed,
        "model": {"source": recipe.model.source, "fingerprint": source.fingerprint},
        "data": data,
        "files": {name: {"sha256": digest(path), "bytes": size_bytes(path)} for name, path in files.items()},
        "versions": versions(),
        "machine": machine(recipe.threads),
    }
    write_json(out / "manifest.json", content)


def read(folder: Path) -> dict[str, Any]:
    """The manifest of a run folder, with ``base`` and ``files`` as ``write`` makes them.

    Raises:
        UserError: it cannot be read, or was written by a later version of this program.
    """
    path = folder / "manifest.json"
    try:
        told = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(str(path), f"cannot be read: {error.strerror}", "Name the folder of a finished run.") from None
    except (ValueError, RecursionError):
        raise UserError(str(path), "is not JSON", "Run the recipe again.") from None
    if isinstance(told, dict) and told.get("version") not in (None, 1):
        raise UserError(str(path), f"has version {told['version']}, this program reads version 1", "Update the package.")
    files = told.get("files") if isinstance(told, dict) else None
    whole = isinstance(files, dict) and all(isinstance(entry, dict) and "sha256" in entry for entry in files.values())
    if not whole or not isinstance(told.get("base"), str):
        raise UserError(str(path), "is not a manifest", "Run the recipe again.")
    found: dict[str, Any] = told
    return found
