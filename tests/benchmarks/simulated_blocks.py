"""BCT whole, and what FQ-ViT does to softmax and layer norms: a simulation in torch. No file is written, none could be.

    python tests/benchmarks/simulated_blocks.py [sst2 | cifar10] [--bits 8 4] [--rows N] [--only WORD ...] [--out FILE]

Needs ``../shared``. BCT (arXiv 2304.01483) has no code; this is a reconstruction. Blocks of 64 neighbours have a scale that is a
power of two. Its parts are put on one after the other:

    weights       every linear layer, convolution and table, in --bits, to the nearest code; parameters that are added are not
    inputs        what every linear layer reads, 8 bits, each block with the scale that covers it when the model runs
    products      query, key, value and what leaves softmax, 8 bits, in blocks along what is summed
    GELU          read in blocks of 8 bits, by a table of 256 codes for each shift
    softmax       the exponential from a table of 128 steps of 1/16 (numbers of 16 bits), the quotient in 8 bits
    norms         what every layer norm reads, 8 bits in blocks; mean and root are float

Then, each alone on the float model: the same parts; GELU by one table, whose input and output have one power of two each from
64 calibration rows, as a static file would hold it; and FQ-ViT's (arXiv 2111.13824): softmax as powers of two in 4 bits (its
integer exponential is not simulated), and what norms read in 8 bits with one scale a tensor times 1, 2, 4 or 8 for each channel,
from 64 calibration rows, padded positions among them; beside each the plain grid of the same bits.

What is summed up in a product stays exact, and residual sums are float. Accuracy, the points of it that are lost with their
paired 95 % interval, agreement and SQNR on the evaluation rows (``--rows``: N, evenly spread).
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from ablation import Bench
from simulated_bits import judged
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from calibrate.grid import Grid
from compress.algorithms.rounding import codes_of, scales_of
from compress.depth.output_scores import first_rows

SIZE = 64
PARTS = ("weights", "inputs", "products", "GELU", "softmax", "norms")
ALONE = (
    *PARTS,
    "GELU by one table",
    "softmax in 4 bits",
    "softmax as powers of two",
    "norms per tensor",
    "norms with channel factors",
)
_ROWS, _FINEST, _STEPS, _WIDE = 64, 16, 128, 2**16


def block_codes(x: Tensor, bits: int = 8, size: int = SIZE) -> tuple[Tensor, Tensor]:
    """Codes and the scale of each, both in the shape of the values [..., C]: grids of powers of two, one for each block of
    neighbours; the last block may be shorter."""
    rest = -x.shape[-1] % size
    matrix = F.pad(x, (0, rest)).reshape(-1, x.shape[-1] + rest)
    grid = Grid(bits, granularity="group", group_size=size, power_of_two=True)
    blocks = grid.blocks(matrix)
    scale, _ = grid.parameters(blocks.amin(-1), blocks.amax(-1))
    made = grid.quantize(matrix, scale, None), scale.repeat_interleave(size, -1)
    codes, scales = (one[:, : x.shape[-1]].reshape(x.shape) for one in made)
    return codes, scales


def blocked(x: Tensor, bits: int = 8, size: int = SIZE) -> Tensor:
    """Values [..., C] rounded in blocks."""
    codes, scale = block_codes(x, bits, size)
    return codes * scale


def covering(values: Tensor) -> Tensor:
    """The power of two of an 8-bit grid that covers these values, zero-dimensional."""
    return Grid(8, granularity="tensor", power_of_two=True).parameters(values.amin(), values.amax())[0]


def gelu_by_tables(x: Tensor, gelu: Callable[[Tensor], Tensor] = F.gelu) -> Tensor:
    """GELU of values rounded in blocks, each block by the table of its shift; what a table gives has 8 bits too."""
    codes, scale = block_codes(x)
    exponents = torch.frexp(scale).exponent
    first, last = int(exponents.min()), int(exponents.max())
    shifts, which = 2.0 ** torch.arange(first - 1, last), (exponents - first).long()
    reach = torch.arange(-128.0, 128)
    given = torch.stack([covering(gelu(reach * one)) for one in shifts])
    tables = torch.stack([gelu_table(*pair, gelu) for pair in zip(shifts, given, strict=True)])
    return tables[which, codes.long() + 128] * given[which]


def gelu_table(scale: Tensor, given: Tensor, gelu: Callable[[Tensor], Tensor] = F.gelu) -> Tensor:
    """What GELU gives for each of 256 codes of its input, rounded to 8 bits of scale ``given``: [256] codes."""
    return (gelu(torch.arange(-128, 128) * scale) / given).round().clamp(-128, 127)


def exponential_table() -> Tensor:
    """``exp`` of 0, -1/16 ... -127/16 as numbers of 16 bits; the step after them gives 0, so that what is masked stays so."""
    table = ((-torch.arange(_STEPS + 1) / _FINEST).exp() * (_WIDE - 1)).round()
    table[-1] = 0
    return table


def table_softmax(scores: Tensor, dim: int = -1) -> Tensor:
    """Softmax whose exponential comes from the table and whose quotient has 8 bits, unsigned."""
    steps = ((scores.amax(dim, keepdim=True) - scores) * _FINEST).round().clamp(0, _STEPS)
    powers = exponential_table()[steps.nan_to_num(_STEPS).long()]
    return (powers / powers.sum(dim, keepdim=True) * 256).round().clamp(0, 255) / 256


def log2_rounded(p: Tensor, bits: int = 4) -> Tensor:
    """Numbers from 0 to 1 as the nearest power of two in the logarithm; the last code stands for zero (FQ-ViT, sec. 3.3)."""
    codes = (-p.log2()).round()
    return torch.where(codes >= 2**bits - 1, torch.zeros_like(p), 2.0**-codes)


def channel_factors(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """FQ-ViT's power-of-two factors for an input [N, C] of a norm (sec. 3.2): scale (zero-dimensional), zero point, factors [C]
    1, 2, 4 or 8, each the one with the least squared error of its channel. The whole range has the factor 8."""
    low, high = x.amin().clamp(max=0), x.amax().clamp(min=0)
    widest = (high - low) / 255
    zero = (-low / widest).round().clamp(0, 255)
    scale = widest / 8
    errors = [(one_scale(x, scale * 2**power, zero) - x).square().sum(0) for power in range(4)]
    return scale, zero, 2.0 ** torch.stack(errors).argmin(0)


def one_scale(x: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """Values on an unsigned grid of 8 bits; ``scale`` may be one number or one a channel."""
    return ((x / scale).round() + zero).clamp(0, 255).sub(zero) * scale


class Parts(TorchFunctionMode):
    """Computes the functions that a model calls with the parts of the method that are on.

    Args:
        on: names of ``ALONE``.
        seen: for the n-th call of GELU or of a norm in a forward pass what it read on calibration rows; None: writes that down.
    """

    def __init__(self, on: Sequence[str], bits: int = 8, seen: Mapping[tuple[str, int], Tensor] | None = None) -> None:
        super().__init__()
        self.on, self.bits, self.seen = frozenset(on), bits, seen
        self.calls: Counter[str] = Counter()
        self.noted: dict[tuple[str, int], Tensor] = {}
        self._weights: dict[int, tuple[Tensor, Tensor]] = {}
        self._settled: dict[tuple[str, int], Any] = {}
        self._ways: dict[Any, Callable[..., Tensor]] = {
            F.linear: self._linear, F.conv2d: self._conv2d, F.embedding: self._embedding, F.gelu: self._gelu,
            F.layer_norm: self._norm, F.scaled_dot_product_attention: self._attention,
        }  # fmt: skip

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        way = self._ways.get(func)
        if way is None:
            return func(*args, **(kwargs or {}))
        self.calls[func.__name__] += 1
        return way(*args, **(kwargs or {}))

    def begin(self, *_: Any) -> None:
        """Before each forward pass, so that calls are counted from its start."""
        self.calls.clear()

    def _coded(self, weight: Tensor) -> Tensor:
        if "weights" not in self.on:
            return weight
        if id(weight) not in self._weights:
            columns = weight[0].numel()
            size = SIZE if columns % SIZE == 0 else columns
            grid = Grid(self.bits, granularity="group", group_size=size, power_of_two=True)
            scale, _ = scales_of(weight, grid, "mse")
            self._weights[id(weight)] = weight, grid.dequantize(codes_of(weight, grid, scale, None), scale, None)
        return self._weights[id(weight)][1]

    def _linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.linear(blocked(x) if "inputs" in self.on else x, self._coded(weight), bias)

    def _conv2d(self, x: Tensor, weight: Tensor, *rest: Any, **more: Any) -> Tensor:
        return F.conv2d(x, self._coded(weight), *rest, **more)

    def _embedding(self, ids: Tensor, weight: Tensor, *rest: Any, **more: Any) -> Tensor:
        return F.embedding(ids, self._coded(weight), *rest, **more)

    def _gelu(self, x: Tensor, approximate: str = "none") -> Tensor:
        place = "gelu", self.calls["gelu"]
        if self.seen is None:
            ends = torch.stack([x.abs().amax(), F.gelu(x, approximate=approximate).abs().amax()])
            self.noted[place] = torch.maximum(ends, self.noted.get(place, ends))
        gelu = functools.partial(F.gelu, approximate=approximate)
        if "GELU" in self.on:
            return gelu_by_tables(x, gelu)
        if "GELU by one table" not in self.on or self.seen is None:
            return gelu(x)
        if place not in self._settled:
            scales = [covering(torch.stack([-end, end])) for end in self.seen[place]]
            self._settled[place] = *scales, gelu_table(scales[0], scales[1], gelu)
        scale, given, table = self._settled[place]
        return table[(x / scale).round().clamp(-128, 127).long() + 128] * given

    def _norm(self, x: Tensor, *rest: Any, **more: Any) -> Tensor:
        place = "norm", self.calls["layer_norm"]
        if self.seen is None:
            flat = x.reshape(-1, x.shape[-1])
            self.noted[place] = torch.cat([self.noted[place], flat]) if place in self.noted else flat
        elif "norms" in self.on:
            x = blocked(x)
        elif self.on & {"norms per tensor", "norms with channel factors"}:
            if place not in self._settled:
                self._settled[place] = channel_factors(self.seen[place])
            scale, zero, factors = self._settled[place]
            x = one_scale(x, scale * (factors if "norms with channel factors" in self.on else 8), zero)
        return F.layer_norm(x, *rest, **more)

    def _attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if is_causal or enable_gqa or dropout_p:
            raise NotImplementedError("attention of encoders only")
        products = "products" in self.on
        query = query * (query.shape[-1] ** -0.5 if scale is None else scale)
        if products:
            query, key = blocked(query), blocked(key)
            value = blocked(value.transpose(-1, -2)).transpose(-1, -2)
        scores = query @ key.transpose(-1, -2)
        if attn_mask is not None:
            hidden = torch.zeros_like(scores).masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else attn_mask
            scores = scores + hidden
        p = self._softmax(scores)
        return (blocked(p) if products else p) @ value

    def _softmax(self, scores: Tensor) -> Tensor:
        if "softmax" in self.on:
            return table_softmax(scores)
        p = scores.softmax(-1)
        if "softmax in 4 bits" in self.on:
            return (p * 15).round() / 15
        return log2_rounded(p) if "softmax as powers of two" in self.on else p


def run(bench: Bench, mode: Parts) -> dict[str, Any]:
    """The float model, judged while it computes with these parts."""
    model: nn.Module = bench.source.model
    handle = model.register_forward_pre_hook(mode.begin)
    with mode:
        found = judged(bench, model)
    handle.remove()
    return found


def noted(bench: Bench) -> dict[tuple[str, int], Tensor]:
    """What GELU and the norms read on calibration rows."""
    from calibrate.modes import evaluating

    model, mode = bench.source.model, Parts(())
    handle = model.register_forward_pre_hook(mode.begin)
    with mode, evaluating(model):
        for rows in first_rows(bench.data.calibration_batches(), _ROWS):
            bench.source.signature.call(model, rows)
    handle.remove()
    missing = {"linear", "gelu", "layer_norm", "scaled_dot_product_attention"} - set(mode.calls)
    if missing:
        sys.exit(f"the model does not call {', '.join(sorted(missing))}: a part would be left out")
    print(f"calls in a forward pass: {', '.join(f'{name} {count}' for name, count in sorted(mode.calls.items()))}")
    return mode.noted


def variants(bits: Sequence[int]) -> dict[str, tuple[tuple[str, ...], int]]:
    """Name -> the parts that are on, and the bits of weights."""
    found: dict[str, tuple[tuple[str, ...], int]] = {"float, attention written out": ((), 8)}
    for width in bits:
        for count in range(1, len(PARTS) + 1):
            first = f"weights in {width} bits" if count == 1 else f"{width} bits, + {PARTS[count - 1]}"
            found[first] = PARTS[:count], width
    return found | {f"only {part}": ((part,), 8) for part in ALONE if part != "weights"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=("sst2", "cifar10"), nargs="?", default="sst2")
    parser.add_argument("--bits", type=int, nargs="*", choices=(4, 8), default=[8, 4])
    parser.add_argument("--rows", type=int)
    parser.add_argument("--only", nargs="*", default=[], help="variants whose names begin with one of these")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    bench = Bench.of(options.task, 8, options.rows)
    print(f"{options.task}, simulated, {len(bench.labels)} rows, float accuracy {bench.accuracy:.4f}")
    seen = noted(bench)
    print(f"{'variant':36s} accuracy  points lost      agreement  SQNR dB")
    found: dict[str, Any] = {}
    for name, (on, bits) in variants(options.bits).items():
        if options.only and not name.startswith(tuple(options.only)):
            continue
        one = found[name] = run(bench, Parts(on, bits, seen))
        print(
            f"{name:36s} {one['accuracy']:8.4f} {one['points_lost']:6.2f} +- {one['half_interval']:4.2f} "
            f"{one['agreement']:12.4f} {one['sqnr_db']:8.1f}",
            flush=True,
        )
        if options.out:
            options.out.write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
