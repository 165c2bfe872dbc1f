"""Takes heads and neurons out of a model for good: the weights get smaller, nothing is masked.

After each block the result is compared with the model in which the same units were switched off. A layout that was read
wrongly, or a module that counts its heads in a way not known here, is thus found at once, and named.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from calibrate.errors import UserError
from calibrate.fidelity import sqnr_db
from calibrate.signature import Batch, Signature
from compress.layers import Absent
from compress.layers.conversion import is_conv1d, outputs_of
from compress.surgery import Surgery
from compress.width.units import Units, masked

__all__ = ["head_tables", "output_axes", "put_back", "slice_units"]

_HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "num_head", "heads", "nhead")
_SHARED = ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "kv_heads")
_WIDTHS = (
    "all_head_size", "attn_dim", "inner_dim", "embed_dim", "hidden_size", "split_size", "d_model", "dim", "attention_dim",
    "val_attn_dim", "key_attn_dim",
)  # fmt: skip
_SAME_DB = 80.0
"""Least agreement of the sliced model with the masked one: float32 sums in another order differ by 120 dB or more."""


def slice_units(
    model: nn.Module, surgery: Surgery, signature: Signature, example: Batch, units: Units, gone: Sequence[int]
) -> None:
    """Removes the units with the given numbers from one block.

    A block that loses all of them keeps what its last projection adds in any case, the bias.

    Raises:
        UserError: the smaller model does not compute what the masked one does; names the block, which is left as it was.
    """
    if not gone:
        return
    kept = [unit for unit in range(len(units)) if unit not in set(gone)]
    with torch.inference_mode(), masked(model, units, gone):
        expected = signature.call(model, example)
    done = len(surgery.edits)
    with put_back(model, units):
        try:
            if kept:
                _narrow(model, surgery, units, kept)
            else:
                _remove(model, surgery, units)
            _settle(model, surgery, signature, example, expected, units, kept)
        except BaseException:
            del surgery.edits[done:]
            raise


@contextmanager
def put_back(model: nn.Module, units: Units) -> Iterator[None]:
    """Gives the modules that hold the units their old tensors, children and numbers again if something is raised."""
    paths = {_holder(units), units.sink, *units.rows}
    modules = {module for path in paths for module in model.get_submodule(path).modules()}
    before = [(module, _shallow(module)) for module in modules]
    try:
        yield
    except BaseException:
        for module, (holders, numbers) in before:
            for name, entries in holders.items():
                held = vars(module)[name]
                held.clear()
                held.update(entries)
            vars(module).update(numbers)
        raise


def _shallow(module: nn.Module) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """Parameters, buffers and children, and the plain numbers, of one module."""
    held = {name: dict(vars(module)[name]) for name in ("_parameters", "_buffers", "_modules")}
    return held, {name: value for name, value in vars(module).items() if isinstance(value, int)}


def _narrow(model: nn.Module, surgery: Surgery, units: Units, kept: list[int]) -> None:
    for path, rows in units.rows.items():
        _narrow_outputs(model, surgery, path, rows, kept)
    columns = sorted(units.columns[kept].flatten().tolist())
    _narrow_inputs(model, surgery, units.sink, model.get_submodule(units.sink), columns)


def _remove(model: nn.Module, surgery: Surgery, units: Units) -> None:
    sink = model.get_submodule(units.sink)
    bias = getattr(sink, "bias", None)
    outputs = outputs_of(sink)
    if isinstance(sink, nn.Conv2d):
        raise UserError(units.sink, "a convolutional MLP cannot lose all of its neurons", "Keep at least one.")
    nothing = Absent(outputs, bias=bias is not None)
    if bias is not None and nothing.bias is not None:
        nothing.bias.data.copy_(bias.detach())
    surgery.replace(model, units.sink, nothing)
    for path in units.rows:
        module = model.get_submodule(path)
        if isinstance(module, nn.Linear) or is_conv1d(module):
            surgery.replace(model, path, Absent(outputs_of(module)))


def _narrow_outputs(model: nn.Module, surgery: Surgery, path: str, rows: Tensor, kept: list[int]) -> None:
    """Keeps the rows of the kept units, and those that no unit owns, in their old order."""
    module = model.get_submodule(path)
    norm = isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d))
    count = int(module.get_parameter("weight").shape[0]) if norm else outputs_of(module)
    owned = set(rows.flatten().tolist())
    staying = set(rows[kept].flatten().tolist())
    order = [row for row in range(count) if row in staying or row not in owned]
    for name, axis in output_axes(module, count):
        surgery.narrow(model, path, name, axis, order)
    sizes = {"num_features": len(order)} if norm else {"out_features": len(order), "nf": len(order), "out_channels": len(order)}
    if isinstance(module, nn.Conv2d) and module.groups == module.in_channels > 1:
        sizes |= {"in_channels": len(order), "groups": len(order)}
    _set_known(model, surgery, path, sizes)


def output_axes(module: nn.Module, count: int) -> Iterator[tuple[str, int]]:
    """Names of a layer's parameters and buffers with a value for each of its ``count`` outputs, and the axis."""
    tensors = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    for name, tensor in tensors:
        if is_conv1d(module) and name == "weight":
            yield name, 1
        elif tensor.ndim and tensor.shape[0] == count:
            yield name, 0


def _narrow_inputs(model: nn.Module, surgery: Surgery, path: str, module: nn.Module, columns: list[int]) -> None:
    surgery.narrow(model, path, "weight", 0 if is_conv1d(module) else 1, columns)
    _set_known(model, surgery, path, {"in_features": len(columns), "nx": len(columns), "in_channels": len(columns)})


def _set_known(model: nn.Module, surgery: Surgery, path: str, values: dict[str, int]) -> None:
    module = model.get_submodule(path)
    for name, value in values.items():
        if name in vars(module):
            surgery.set(model, path, name, value)


def _tried(model: nn.Module, signature: Signature, example: Batch) -> Tensor | None:
    try:
        with torch.inference_mode():
            return signature.call(model, example)
    except (RuntimeError, ValueError, IndexError, TypeError):
        return None


def _same(found: Tensor, expected: Tensor) -> bool:
    if found.shape != expected.shape:
        return False
    level = sqnr_db(expected, found)
    return level == math.inf or level >= _SAME_DB


def _settle(
    model: nn.Module, surgery: Surgery, signature: Signature, example: Batch, expected: Tensor, units: Units, kept: list[int]
) -> None:
    """Puts right the numbers by which the attention module cuts its projections into heads, and tables with a value a head.

    Names of such numbers are known; which of them matter is tried, the smallest change first.

    Raises:
        UserError: nothing made the model compute what it should.
    """
    heads = (len(units) * units.heads, len(kept) * units.heads)
    width = (int(units.columns.numel()), len(kept) * int(units.columns.shape[1]))
    counts = {**dict.fromkeys(_HEADS, heads), **dict.fromkeys(_SHARED, (len(units), len(kept)))}
    tries: list[tuple[dict[str, tuple[int, int]], bool]] = [({}, False)]
    if units.kind == "head" and kept:
        more = {**counts, **dict.fromkeys(_WIDTHS, width)}
        tries += [(counts, False), (more, False), (counts, True), (more, True)]
    found = None
    for names, tables in tries:
        trial = Surgery()
        try:
            with put_back(model, units):
                _renumber(model, trial, _holder(units), names)
                if tables:
                    _narrow_tables(model, trial, units, kept)
                found = _tried(model, signature, example)
                if found is None or not _same(found, expected):
                    raise UserError(units.sink, "not yet", "")
        except UserError:
            continue
        surgery.edits += trial.edits
        return
    why = "does not run" if found is None else "computes something else"
    what = f"after its {units.kind}s were taken out, block {units.block} {why}"
    raise UserError(units.sink, what, f"Leave the {units.kind}s of block {units.block} as they are.")


def _renumber(model: nn.Module, trial: Surgery, holder: str, names: dict[str, tuple[int, int]]) -> None:
    for path, module in list(model.get_submodule(holder).named_modules()):
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            continue
        where = ".".join(filter(None, (holder, path)))
        for name, (before, after) in names.items():
            if vars(module).get(name) == before and before != after:
                trial.set(model, where, name, after)


def _narrow_tables(model: nn.Module, trial: Surgery, units: Units, kept: list[int]) -> None:
    each = int(units.columns.numel()) // (len(units) * units.heads)
    staying = sorted({column // each for column in units.columns[kept].flatten().tolist()})
    for path, name, axis in list(head_tables(model, units)):
        trial.narrow(model, path, name, axis, staying)


def head_tables(model: nn.Module, units: Units) -> Iterator[tuple[str, str, int]]:
    """Parameters and buffers of the attention with one axis as long as there are heads: position biases, temperatures. Path of
    the module, name, axis."""
    holder, known = _holder(units), {units.sink, *units.rows}
    heads = len(units) * units.heads
    for path, module in list(model.get_submodule(holder).named_modules()):
        where = ".".join(filter(None, (holder, path)))
        if where in known or isinstance(module, (nn.Linear, nn.Conv2d)):
            continue
        for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            axes = [axis for axis, size in enumerate(tensor.shape) if size == heads]
            if len(axes) == 1:
                yield where, name, axes[0]


def _holder(units: Units) -> str:
    """The smallest module that holds the sink and all layers that make the units."""
    split = [path.split(".")[:-1] for path in (units.sink, *units.rows)]
    common = []
    for pieces in zip(*split, strict=False):
        if len(set(pieces)) > 1:
            break
        common.append(pieces[0])
    return ".".join(common)
