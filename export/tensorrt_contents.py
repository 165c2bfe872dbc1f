"""What lies in a built engine: the codes of the Q/DQ file looked for in the plan, and the plan's own listing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from calibrate.errors import UserError
from export.contract import Contents
from export.engine_listing import Listing, holds, read_listing

__all__ = ["engine_contents", "engine_report", "qdq_path"]


def qdq_path(engine: Path) -> Path:
    """Where the Q/DQ file of an engine lies: ``model.qdq.onnx`` next to ``model.engine``."""
    return engine.with_name(f"{engine.stem}.qdq.onnx")


def engine_contents(path: Path) -> Contents:
    """Codes from the Q/DQ file, each looked for in the engine; bytes by type from the engine's own listing.

    A layer's codes count only if the engine has them: byte for byte in one of the known orders, or, for those that are
    not found so, if the engine holds at least as many integer bytes as the Q/DQ file. Otherwise they are left out, and
    the layer is named among those in floating point. Without a listing the Q/DQ file alone is told.

    Raises:
        UserError: the engine or its Q/DQ file is gone.
    """
    given, plan = _given(path), path.read_bytes()
    listing = read_listing(plan)
    if listing is None:
        return given
    lost = set(_not_found(plan, given)) if _fewer_integers(listing, given) else set()
    codes = {name: array for name, array in given.codes.items() if name not in lost}
    floats = tuple(dict.fromkeys([*given.float_layers, *sorted(lost)]))
    return Contents(dict(listing.constant_bytes), codes, floats)


def engine_report(path: Path) -> dict[str, Any]:
    """The same for a report, as JSON: kernels, what was fused, constant bytes by type, and whose codes were found."""
    given, plan = _given(path), path.read_bytes()
    missing = _not_found(plan, given)
    told: dict[str, Any] = {
        "codes_in_engine": {
            "layers": len(given.codes),
            "found": len(given.codes) - len(missing),
            "not_found": missing,
        }
    }
    if narrow := [name for name, codes in given.codes.items() if _few_bits(codes)]:
        told["note"] = f"codes of 2 or 3 bits are stored as INT4 ({len(narrow)} layers): TensorRT has nothing smaller"
    listing = read_listing(plan)
    if listing is None:
        return told | {"listing": "the engine holds no listing that can be read"}
    return told | {
        "targets": list(listing.targets),
        "kernels": listing.kernels,
        "fully_connected": listing.fully_connected,
        "convolutions": listing.convolutions,
        "constant_bytes": dict(listing.constant_bytes),
        "fused": [list(names) for names in listing.fused],
    }


def _given(path: Path) -> Contents:
    """What the Q/DQ file next to an engine holds."""
    from export.onnx_file import contents

    if not path.is_file():
        raise UserError(str(path), "there is no such engine", "Run the recipe again.")
    onnx = qdq_path(path)
    if not onnx.is_file():
        raise UserError(str(onnx), "the Q/DQ file that the engine was built from is gone", "Run the recipe again.")
    return contents(onnx)


def _not_found(plan: bytes, given: Contents) -> list[str]:
    """The layers whose codes are not in the plan byte for byte."""
    return [name for name, codes in given.codes.items() if not _held(plan, codes)]


def _held(plan: bytes, codes: np.ndarray[Any, Any]) -> bool:
    narrow = int(codes.min(initial=0)) >= -8 and int(codes.max(initial=0)) <= 7
    return (narrow and holds(plan, codes, 4)) or holds(plan, codes, 8)


def _fewer_integers(listing: Listing, given: Contents) -> bool:
    kinds = ("int8", "int4", "float8_e4m3")
    return any(listing.constant_bytes.get(kind, 0) < given.bytes_by_dtype.get(kind, 0) for kind in kinds)


def _few_bits(codes: np.ndarray[Any, Any]) -> bool:
    return codes.size > 0 and int(codes.min()) >= -4 and int(codes.max()) <= 3
