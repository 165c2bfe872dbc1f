"""Operations and energy of binarized layers, and of what they stand for: counted from shapes, not measured.

The energies are those of Horowitz, "Computing's energy problem (and what we can do about it)", ISSCC 2014, fig. 1.1.9, for 45 nm
and 0.9 V: of arithmetic alone, without memory, instructions or control, which on a processor cost far more. The table has no
figure for one bit: an XNOR and a bit of a count are taken as an eighth of an 8-bit addition each, which is an estimate.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

__all__ = ["PICOJOULES", "Arithmetic", "counted"]

Arithmetic = Literal["float", "int8", "sign_int8", "sign_float", "binary"]

PICOJOULES: dict[Arithmetic, float] = {
    "float": 3.7 + 0.9,
    "int8": 0.2 + 0.1,
    "sign_int8": 0.1,
    "sign_float": 0.9,
    "binary": 2 * 0.03 / 8,
}
"""Of one multiply-accumulate: float32 product and sum; 8-bit product and 32-bit sum; a 32-bit sum, and a float32 sum, where the
weight is a sign; XNOR and count where both are."""

SOURCE = (
    "Horowitz, ISSCC 2014, fig. 1.1.9 (45 nm, arithmetic alone); one-bit operations estimated as an eighth of an 8-bit addition"
)


def counted(sites: Mapping[str, tuple[int, int, str]], float_macs: int) -> dict[str, Any]:
    """What the layers would cost a device that computes with bits, a CPU that runs them as INT8, and in float.

    Args:
        sites: path -> (multiply-accumulates for one row, bases, "static", "binary" or "none": how inputs are rounded).
        float_macs: multiply-accumulates of all the rest, for one row.

    Returns:
        JSON: for each layer its multiply-accumulates, the bit operations, and microjoules by arithmetic; and the sums.
    """
    layers = {path: _layer(*given) for path, given in sites.items()}
    rest = float_macs * PICOJOULES["float"] / 1e6
    totals = {
        key: sum(layer[key] for layer in layers.values())
        for key in ("macs", "microjoules_float", "microjoules_int8", "microjoules_bits")
    }
    totals |= {"rest_macs": float_macs, "microjoules_rest_float": rest}
    return {"source": SOURCE, "picojoules": dict(PICOJOULES), "layers": layers, "totals": totals}


def _layer(macs: int, bases: int, inputs: str) -> dict[str, Any]:
    kinds: dict[str, tuple[Arithmetic, Arithmetic]] = {
        "static": ("int8", "sign_int8"),
        "binary": ("int8", "binary"),
        "none": ("float", "sign_float"),
    }
    runs, could = kinds[inputs]
    return {
        "macs": macs,
        "arithmetic": could,
        "operations": macs * bases,
        "runs_as": runs,
        "microjoules_float": macs * PICOJOULES["float"] / 1e6,
        "microjoules_int8": macs * PICOJOULES[runs] / 1e6,
        "microjoules_bits": macs * bases * PICOJOULES[could] / 1e6,
    }
