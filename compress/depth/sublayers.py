"""The parts that make a model deep, and taking them out: whole blocks, attention sublayers, MLP sublayers.

A sublayer goes with its norm where nothing else reads that norm (pre-norm), and with what scales or normalises its output before
it joins the residual stream (norms on both sides). A norm that stands after the join stays: LN(x + 0) (post-norm, BERT).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from calibrate.modes import evaluating
from compress.anatomy import Anatomy, Block, Site
from compress.depth.residual_stream import Path, follow
from compress.layers import Absent
from compress.layers.conversion import matrix_shape, obstacle
from compress.surgery import Surgery

__all__ = ["PARTS", "Part", "Sublayer", "find_sublayers", "shorten", "take_out"]

Part = Literal["attention", "mlp"]
PARTS: tuple[Part, ...] = ("attention", "mlp")
_LAST = {"attention": "attention.out", "mlp": "mlp.down"}
_NUMBERS = ("layer_idx", "layer_id", "layer_index", "layer_number")
"""Names under which modules keep their own position (key-value caches are indexed by it)."""
_COUNTS = (
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_layers",
    "encoder_layers",
    "decoder_layers",
    "num_decoder_layers",
)


@dataclass(frozen=True)
class Sublayer:
    """The attention, or the MLP, of one block.

    Attributes:
        sites: its projections.
        sink: the last of them.
        norms: paths of the norms that only it reads.
        after: paths of the modules with weights between the sink and the join.
        constant: path of the layer whose output is what joins, where a constant may stay; None: there is no such layer.
        width: channels of the residual stream.
        obstacle: why it cannot be taken out, or "".
        unfit: why a similarity cannot choose it, or "".
    """

    block: int
    part: Part
    sites: tuple[Site, ...]
    sink: str
    norms: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    constant: str | None = None
    width: int = 0
    obstacle: str = ""
    unfit: str = ""

    @property
    def parameters(self) -> int:
        return sum(site.parameters for site in self.sites)


def find_sublayers(model: nn.Module, anatomy: Anatomy, blocks: Sequence[Block], part: Part) -> list[Sublayer]:
    """The sublayers of one kind of the given blocks; a block without one has none. The model runs once, on the rows it was
    traced with."""
    drafts = [draft for block in blocks if (draft := _draft(model, block, part)) is not None]
    if not drafts or anatomy.signature is None or anatomy.example is None:
        return drafts
    signature, example = anatomy.signature, anatomy.example
    modules = dict(model.named_modules(remove_duplicate=False))
    layers = [site.path for site in anatomy.sites if site.kind != "norm" and site.path in modules]
    norms = [site.path for site in anatomy.sites if "norm" in site.roles and site.path in modules]
    with evaluating(model):
        joined = follow(model, lambda: signature.call(model, example), [draft.sink for draft in drafts], layers, norms)
    return [_settled(model, draft, joined.paths[draft.sink], joined.only_for([s.path for s in draft.sites])) for draft in drafts]


def take_out(model: nn.Module, surgery: Surgery, sublayer: Sublayer, constant: bool) -> None:
    """Puts ``Absent`` layers in the place of a sublayer's weights; ``constant``: the last keeps a bias, of zeros."""
    for path, width in _widths(model, sublayer).items():
        surgery.replace(model, path, Absent(width, bias=constant and path == sublayer.constant))


def shorten(model: nn.Module, surgery: Surgery, container: str, positions: Sequence[int]) -> None:
    """Takes the children at ``positions`` out of a list and puts right what counts them."""
    before = len(list(model.get_submodule(container).children()))
    kept = [position for position in range(before) if position not in positions]
    surgery.keep(model, container, kept)
    for new, old in enumerate(kept):
        for path, module in list(model.get_submodule(f"{container}.{new}").named_modules()):
            for name in _NUMBERS:
                if vars(module).get(name) == old and new != old:
                    surgery.set(model, ".".join(filter(None, (container, str(new), path))), name, new)
    for path, name, value in _counted(model, container, before, kept):
        surgery.set(model, path, f"config.{name}", value)


def _draft(model: nn.Module, block: Block, part: Part) -> Sublayer | None:
    sites = tuple(site for site in block.sites if any(role.startswith(f"{part}.") for role in site.roles))
    ends = [site for site in sites if _LAST[part] in site.roles]
    if not ends:
        return None
    sink = ends[-1]
    why = next((f"{site.path}: {reason}" for site in sites if (reason := _reason(model, site))), "")
    unfit = f"{len(ends)} layers end its {part}" if len(ends) > 1 else ""
    width = matrix_shape(model.get_submodule(sink.path), sink.kind)[0] if not why else 0
    return Sublayer(block.index, part, sites, sink.path, width=width, obstacle=why, unfit=unfit)


def _reason(model: nn.Module, site: Site) -> str | None:
    reason = obstacle(model, site.path, site.kind)
    if reason is None and site.kind not in ("linear", "conv1d"):
        return f"it is a {site.kind}, and only linear layers can be taken out"
    return reason


def _settled(model: nn.Module, draft: Sublayer, way: Path, own: list[str]) -> Sublayer:
    unfit = draft.unfit
    if way.calls != 1:
        unfit = unfit or (f"it runs {way.calls} times with the same weights" if way.calls else "it does not run")
    elif way.joins != 1:
        unfit = unfit or "no add was found where its output joins the residual stream"
    after = way.after if way.joins and not unfit else ()
    if any(_vector_width(model, path) != draft.width for path in after):
        unfit, after = unfit or f"{after[-1]} works on its output before it joins the residual stream", ()
    norms = tuple(path for path in own if _vector_width(model, path))
    constant = (after[-1] if after else draft.sink) if way.plain and not unfit else None
    return Sublayer(draft.block, draft.part, draft.sites, draft.sink, norms, after, constant, draft.width, draft.obstacle, unfit)


def _vector_width(model: nn.Module, path: str) -> int:
    """Channels of a module that only scales, shifts or normalises the last axis; 0 if it may be something else."""
    module = model.get_submodule(path)
    vectors = [parameter for parameter in module._parameters.values() if parameter is not None]
    if list(module.children()) or isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d, nn.GroupNorm)) or not vectors:
        return 0
    widths = {parameter.shape[0] if parameter.dim() == 1 else 0 for parameter in vectors}
    return widths.pop() if len(widths) == 1 else 0


def _widths(model: nn.Module, sublayer: Sublayer) -> dict[str, int]:
    """What is replaced, and how many channels it gives."""
    found = {site.path: matrix_shape(model.get_submodule(site.path), site.kind)[0] for site in sublayer.sites}
    found |= {path: _vector_width(model, path) for path in (*sublayer.norms, *sublayer.after)}
    return found


def _counted(model: nn.Module, container: str, before: int, kept: list[int]) -> list[tuple[str, str, Any]]:
    """Entries of configs on the way to the list that count its children, or hold one value for each: (path, name, value)."""
    found: list[tuple[str, str, Any]] = []
    seen: set[int] = set()
    pieces = container.split(".")
    for depth in range(len(pieces)):
        path = ".".join(pieces[:depth])
        config = vars(model.get_submodule(path)).get("config")
        if config is None or id(config) in seen:
            continue
        seen.add(id(config))
        entries = vars(config)
        other = "decoder" if "encoder" in container else "encoder" if "decoder" in container else None
        for name, value in entries.items():
            if other and other in name:
                continue
            if name in _COUNTS and value == before:
                found.append((path, name, len(kept)))
            elif "layer" in name and isinstance(value, (list, tuple)) and len(value) == before:
                found.append((path, name, [value[position] for position in kept]))
    return found
