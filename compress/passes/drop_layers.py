"""Removing whole blocks, attention sublayers or MLP sublayers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator
from torch import nn

from calibrate.errors import UserError
from compress.anatomy import Anatomy, Block, Site
from compress.layers import Absent
from compress.layers.conversion import matrix_shape, obstacle
from compress.passes.contract import Context, Pass, Target
from compress.surgery import Surgery

__all__ = ["DropLayers"]

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


class DropLayers(Pass):
    """Take out blocks, attention sublayers or MLP sublayers that the recipe names by number.

    Blocks are numbered as ``compress inspect`` prints them, from 0; negative numbers count from the end. A dropped block
    leaves its list, and the positions that the others keep (for key-value caches) and the counts in the model's config
    are put right. A dropped sublayer adds nothing to the residual stream, ``x + 0``: its norm stays where it stands after
    the join, as in BERT (He et al. 2024, arXiv 2406.15786, sec. 3), and its weights are gone.
    """

    name: ClassVar[str] = "drop_layers"
    source: ClassVar[str] = "He et al. 2024, arXiv 2406.15786"

    blocks: list[int] = Field([], description="Numbers of the blocks to take out whole; -1 is the last.")
    attention: list[int] = Field([], description="Numbers of the blocks whose attention is taken out.")
    mlp: list[int] = Field([], description="Numbers of the blocks whose MLP is taken out.")

    @model_validator(mode="after")
    def _something(self) -> DropLayers:
        if not (self.blocks or self.attention or self.mlp):
            raise ValueError("name at least one number under blocks, attention or mlp")
        return self

    def targets(self, model: nn.Module, anatomy: Anatomy) -> list[Target]:
        gone = self._blocks(anatomy)
        targets = [Target(block.path, "block", "taken out") for block in gone]
        for part, site in self._projections(model, anatomy, gone):
            targets.append(Target(site.path, ", ".join(site.roles), f"taken out with its {part}"))
        return targets

    def rehearse(self, model: nn.Module, anatomy: Anatomy, surgery: Surgery) -> None:
        gone = self._blocks(anatomy)
        self._take_out(model, surgery, gone, self._projections(model, anatomy, gone))

    def run(self, model: nn.Module, context: Context) -> nn.Module:
        gone = self._blocks(context.anatomy)
        projections = self._projections(model, context.anatomy, gone)
        self._take_out(model, context.surgery, gone, projections)
        context.report |= {
            "blocks": [block.path for block in gone],
            "projections": [site.path for _, site in projections],
            "skipped": {},
        }
        return model

    def _take_out(
        self,
        model: nn.Module,
        surgery: Surgery,
        gone: list[Block],
        projections: list[tuple[Literal["attention", "mlp"], Site]],
    ) -> None:
        for _, site in projections:
            outputs, _ = matrix_shape(model.get_submodule(site.path), site.kind)
            surgery.replace(model, site.path, Absent(outputs))
        for container in dict.fromkeys(block.container for block in gone):
            assert container is not None
            positions = [block.position for block in gone if block.container == container]
            _shorten(model, surgery, container, positions)

    def _blocks(self, anatomy: Anatomy) -> list[Block]:
        """The blocks to take out, each once.

        Raises:
            UserError: a number that no block has; a block that is in no list; a list that would be left empty.
        """
        gone = self._numbered(anatomy, self.blocks, "blocks")
        for block in gone:
            if block.container is None:
                raise UserError(self.name, f"{block.path} is in no list of blocks", "Only blocks in a list can be dropped.")
            inside = [other for other in anatomy.blocks if other.container == block.container]
            if all(other in gone for other in inside):
                raise UserError(
                    self.name, f"blocks takes out all {len(inside)} blocks of {block.container}", "Keep at least one."
                )
        return gone

    def _numbered(self, anatomy: Anatomy, numbers: list[int], option: str) -> list[Block]:
        count = len(anatomy.blocks)
        for number in numbers:
            if not -count <= number < count:
                raise UserError(self.name, f"{option}: there is no block {number}", _numbers_there(count))
        wanted = {number % count for number in numbers}
        return [anatomy.blocks[number] for number in sorted(wanted)]

    def _projections(
        self, model: nn.Module, anatomy: Anatomy, gone: list[Block]
    ) -> list[tuple[Literal["attention", "mlp"], Site]]:
        """The projections of the sublayers to take out, and which sublayer each is of.

        Raises:
            UserError: a sublayer that the block lacks, or one that cannot be taken out exactly.
        """
        parts: tuple[Literal["attention", "mlp"], ...] = ("attention", "mlp")
        found = []
        for part in parts:
            for block in self._numbered(anatomy, getattr(self, part), part):
                if block in gone:
                    raise UserError(
                        self.name, f"{part}: block {block.index} is taken out whole", f"Take {block.index} off {part}."
                    )
                found += [(part, site) for site in self._sublayer(model, block, part)]
        return found

    def _sublayer(self, model: nn.Module, block: Block, part: Literal["attention", "mlp"]) -> Iterator[Site]:
        last = "attention.out" if part == "attention" else "mlp.down"
        sites = [site for site in block.sites if any(role.startswith(f"{part}.") for role in site.roles)]
        ends = [site for site in sites if last in site.roles]
        if not ends:
            raise UserError(self.name, f"{block.path} has no {last}", "See what it has with: compress inspect.")
        for site in sites:
            reason = obstacle(model, site.path, site.kind)
            if site.kind not in ("linear", "conv1d"):
                reason = reason or f"it is a {site.kind}, and only linear layers can be taken out"
            if reason:
                raise UserError(self.name, f"{site.path} cannot be taken out: {reason}", f"Leave block {block.index} off {part}.")
        yield from sites


def _shorten(model: nn.Module, surgery: Surgery, container: str, positions: list[int]) -> None:
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


def _numbers_there(count: int) -> str:
    return f"There are {count}: 0 to {count - 1}." if count else "No blocks were found; see: compress inspect."
