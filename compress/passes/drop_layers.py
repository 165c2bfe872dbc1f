"""Removing whole blocks, attention sublayers or MLP sublayers: those that are named, or those that change the stream least."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator
from torch import nn

from calibrate.errors import UserError
from compress.anatomy import Anatomy, Block
from compress.depth.accuracy_driven import separable_heads
from compress.depth.choice import Candidates, find_candidates, refuse
from compress.depth.removal import Removal
from compress.depth.sublayers import PARTS, Part, Sublayer, find_sublayers, shorten, take_out
from compress.passes.contract import Context, Pass, Target
from compress.surgery import Surgery

__all__ = ["DropLayers"]


class DropLayers(Pass):
    """Take out blocks, attention sublayers or MLP sublayers: those named by number, or those that change the model least.

    With ``count`` or ``ratio`` the parts with the highest similarity go: the mean over tokens of the cosine between the
    residual stream before and after the part (He et al. 2024, arXiv 2406.15786, sec. 3). ``one_shot`` measures once,
    ``iterative`` again after each removal, ``consecutive`` takes the run of neighbouring blocks across which the stream
    changes least. With ``score: output`` those go without which the model's own output changes least, measured with the parts
    switched off, singly or, as ``iterative``, together with those that are gone; ``search`` looks for the best set, and tries
    all where they are few.

    Blocks are numbered as ``compress inspect`` prints them, from 0; negative numbers count from the end. A dropped block
    leaves its list, and the positions that the others keep (for key-value caches) and the counts in the model's config
    are put right. A dropped sublayer adds nothing to the residual stream, ``x + 0``: its weights are gone, with the norm
    that only it reads (pre-norm) and the one on its output; a norm after the join stays, as in BERT.

    ``accuracy_driven`` (AxFormer: Nagarajan et al. 2020, arXiv 2010.03688) needs no number: attention and MLP sublayers, the last
    ones first, then heads of the attentions that stayed, go where the task loss on the recipe's labelled validation rows does
    not rise by more than ``tolerance``. Rows that chose cannot judge: the evaluation rows are others.

    With ``repair`` the mean of what a sublayer added on the calibration rows stays as a bias, and the projections behind that
    add to the stream are fitted by least squares, first to last, so that the stream behind each is what it was; each only where
    the model's output on rows held out gets nearer to what it was. With ``distill`` what is left of the blocks is then
    trained, without labels, until their outputs and the model's are what they were; that too stays only where the held-out rows
    agree.
    """

    name: ClassVar[str] = "drop_layers"
    source: ClassVar[str] = "He et al. 2024, arXiv 2406.15786"

    blocks: list[int] = Field([], description="Numbers of the blocks to take out whole; -1 is the last.")
    attention: list[int] = Field([], description="Numbers of the blocks whose attention is taken out.")
    mlp: list[int] = Field([], description="Numbers of the blocks whose MLP is taken out.")
    sublayers: Literal["block", "attention", "mlp", "both"] | None = Field(
        None,
        description="What is chosen from; both: attention and MLP sublayers together. By default attention, and both where "
        "accuracy_driven chooses.",
    )
    count: Annotated[int, Field(gt=0)] | None = Field(None, description="How many go; the score chooses which.")
    ratio: Annotated[float, Field(ge=0.0, le=1.0)] | None = Field(
        None, description="The share that goes, instead of count; the number is rounded to the nearest."
    )
    method: Literal["one_shot", "consecutive", "iterative", "search"] = Field(
        "one_shot",
        description="one_shot: all at once; iterative: measured again after each; consecutive: neighbouring blocks "
        "(sublayers: block); search: the best set (score: output).",
    )
    score: Literal["similarity", "output", "random"] = Field(
        "similarity",
        description="similarity: of the residual stream before and after; output: what the model gives without them; "
        "random: a seeded choice, as a control.",
    )
    rows: int = Field(128, ge=1, description="Calibration rows that score: output looks at.")
    repair: bool | None = Field(
        None,
        description="Keep the mean that a sublayer added as a bias and refit the projections behind, where held-out rows say "
        "that it helps; by default with count and ratio. Reads calibration rows.",
    )
    distill: int = Field(
        0,
        ge=0,
        le=1000,
        description="After the repair: how often each calibration row is seen by a training, without labels, of the blocks that "
        "are left, so that they give what they gave. It wants 1000 rows or more; 0: no training.",
    )

    accuracy_driven: bool = Field(
        False, description="Take out sublayers, then heads, as long as the loss on data.validation allows it."
    )
    tolerance: float = Field(
        0.0,
        ge=0.0,
        le=10.0,
        description="With accuracy_driven: how far the loss may stay above the lowest seen, as a share of the loss at the start.",
    )
    evaluations: int = Field(
        100,
        ge=4,
        le=100_000,
        description="With accuracy_driven: most runs over the validation rows; what they do not reach stays.",
    )
    heads: bool = Field(True, description="With accuracy_driven: whether heads of the attentions that stay are tried too.")

    @model_validator(mode="after")
    def _driven(self) -> DropLayers:
        fields = type(self).model_fields
        given = {option for option, known in fields.items() if getattr(self, option) != known.get_default()}
        if not self.accuracy_driven:
            for option in ("tolerance", "evaluations", "heads"):
                if option in given:
                    raise ValueError(f"{option} goes with accuracy_driven\nAdd accuracy_driven: true, or take {option} out.")
            return self
        if self.chooses or self.blocks or self.attention or self.mlp:
            raise ValueError("accuracy_driven decides what goes and how much\nTake the numbers, count or ratio out.")
        if self.sublayers == "block":
            raise ValueError("accuracy_driven takes out sublayers and heads\nWrite sublayers: attention, mlp or both.")
        for option in ("method", "score", "rows"):
            if option in given:
                raise ValueError(f"{option} goes with count or ratio\nTake it out: accuracy_driven has its own.")
        return self

    @model_validator(mode="after")
    def _something(self) -> DropLayers:
        numbered = bool(self.blocks or self.attention or self.mlp)
        if not (numbered or self.chooses or self.accuracy_driven):
            hint = "Or say how many: count, or ratio; or accuracy_driven: true."
            raise ValueError(f"name at least one number under blocks, attention or mlp\n{hint}")
        if numbered and self.chooses:
            raise ValueError("numbers and count (or ratio) exclude each other\nUse two passes of drop_layers.")
        if self.count is not None and self.ratio is not None:
            raise ValueError("count and ratio both say how many\nKeep one of them.")
        for option in ("sublayers", "method", "score", "rows"):
            if numbered and option in self.chosen:
                raise ValueError(
                    f"{option} goes with count or ratio, and numbers say what goes\nTake {option} out, or the numbers."
                )
        if self.score != "output" and "rows" in self.chosen and not self.accuracy_driven:
            raise ValueError("rows goes with score: output\nAdd score: output, or take rows out.")
        if self.method == "consecutive" and self.sublayers != "block":
            raise ValueError("consecutive takes neighbouring blocks\nWrite sublayers: block, or another method.")
        if self.method == "search" and self.score != "output":
            raise ValueError("search looks at the model's output\nWrite score: output, or another method.")
        if self.distill and (self.repair is False or self.accuracy_driven):
            without = "accuracy_driven: true" if self.accuracy_driven else "repair: false"
            raise ValueError(f"distill does not go with {without}\nTake one of them out.")
        return self

    @property
    def chooses(self) -> bool:
        return self.count is not None or self.ratio is not None

    @property
    def repairs(self) -> bool:
        return self.chooses or bool(self.distill) if self.repair is None else self.repair

    @property
    def calibrates(self) -> bool:
        return self.repairs or (self.chooses and self.score != "random")

    @property
    def validates(self) -> bool:
        return self.accuracy_driven

    @property
    def kind(self) -> Literal["block", "attention", "mlp", "both"]:
        """What is chosen from."""
        return self.sublayers or ("both" if self.accuracy_driven else "attention")

    def targets(self, model: nn.Module, anatomy: Anatomy) -> list[Target]:
        if self.accuracy_driven:
            return self._may_go(model, anatomy)
        if self.chooses:
            candidates, count = self.candidates(model, anatomy)
            action = f"one of {len(candidates.these)}: {count} of these are taken out"
            return [Target(one.key, one.part, action) for one in candidates.these] if count else []
        targets = [Target(block.path, "block", "taken out") for block in self.named_blocks(anatomy)]
        for one in self.named_sublayers(model, anatomy):
            roles = {site.path: ", ".join(site.roles) for site in one.sites}
            roles |= dict.fromkeys((*one.norms, *one.after), "norm")
            targets += [Target(path, role, f"taken out with its {one.part}") for path, role in roles.items()]
        return targets

    def skips(self, model: nn.Module, anatomy: Anatomy) -> dict[str, str]:
        if self.accuracy_driven:
            heads = separable_heads(model, anatomy)[1] if self.tries_heads else {}
            return self.driven_candidates(model, anatomy).others | heads
        return self.candidates(model, anatomy)[0].others if self.chooses else {}

    def _may_go(self, model: nn.Module, anatomy: Anatomy) -> list[Target]:
        heads = separable_heads(model, anatomy)[0] if self.tries_heads else {}
        found = self.driven_candidates(model, anatomy).these
        where = "where the validation rows allow it"
        actions = {one.key: "taken out, whole or by heads, " if one.key in heads else "taken out " for one in found}
        return [Target(one.key, one.part, f"{actions[one.key]}{where}") for one in found]

    def rehearse(self, model: nn.Module, anatomy: Anatomy, surgery: Surgery) -> None:
        if self.accuracy_driven:
            return  # What goes is known when the validation rows have been run; that it is nothing is always possible.
        if self.chooses:
            candidates, count = self.candidates(model, anatomy)
            chosen = candidates.typical(count, near=self.method == "consecutive")
            blocks = [one.block.path for one in chosen if not one.sublayer]
            sublayers = [one.sublayer for one in chosen if one.sublayer]
        else:
            blocks, sublayers = [block.path for block in self.named_blocks(anatomy)], self.named_sublayers(model, anatomy)
        self.take_out_parts(model, surgery, blocks, sublayers)

    def run(self, model: nn.Module, context: Context) -> nn.Module:
        Removal(self, model, context).run()
        return model

    def take_out_parts(self, model: nn.Module, surgery: Surgery, blocks: Sequence[str], sublayers: Sequence[Sublayer]) -> None:
        for one in sublayers:
            take_out(model, surgery, one, constant=self.repairs)
        listed: dict[str, list[int]] = {}
        for path in blocks:
            container, _, name = path.rpartition(".")
            listed.setdefault(container, []).append(list(dict(model.get_submodule(container).named_children())).index(name))
        for container, positions in listed.items():
            shorten(model, surgery, container, positions)

    def candidates(self, model: nn.Module, anatomy: Anatomy) -> tuple[Candidates, int]:
        """The candidates, and how many of them go.

        Raises:
            UserError: there are none, or fewer.
        """
        candidates = find_candidates(model, anatomy, self.kind)
        count = self.count if self.count is not None else round((self.ratio or 0.0) * len(candidates.these))
        refuse(self.name, candidates, count, near=self.method == "consecutive")
        return candidates, count

    @property
    def tries_heads(self) -> bool:
        return self.heads and self.kind != "mlp"

    def driven_candidates(self, model: nn.Module, anatomy: Anatomy) -> Candidates:
        """The sublayers that validation rows may choose.

        Raises:
            UserError: there are none.
        """
        candidates = find_candidates(model, anatomy, self.kind)
        refuse(self.name, candidates, 0, near=False)
        return candidates

    def named_blocks(self, anatomy: Anatomy) -> list[Block]:
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

    def named_sublayers(self, model: nn.Module, anatomy: Anatomy) -> list[Sublayer]:
        """The sublayers named by number.

        Raises:
            UserError: a sublayer that the block lacks, or one that cannot be taken out exactly.
        """
        gone = self.named_blocks(anatomy)
        return [one for part in PARTS for one in self._of_part(model, anatomy, gone, part)]

    def _of_part(self, model: nn.Module, anatomy: Anatomy, gone: list[Block], part: Part) -> Iterator[Sublayer]:
        blocks = self._numbered(anatomy, getattr(self, part), part)
        found = {one.block: one for one in find_sublayers(model, anatomy, blocks, part)}
        for block in blocks:
            if block in gone:
                raise UserError(self.name, f"{part}: block {block.index} is taken out whole", f"Take {block.index} off {part}.")
            one = found.get(block.index)
            if one is None:
                last = "attention.out" if part == "attention" else "mlp.down"
                raise UserError(self.name, f"{block.path} has no {last}", "See what it has with: compress inspect.")
            if one.obstacle:
                path, _, reason = one.obstacle.partition(": ")
                hint = f"Leave block {block.index} off {part}."
                raise UserError(self.name, f"{path} cannot be taken out: {reason}", hint)
            yield one


def _numbers_there(count: int) -> str:
    return f"There are {count}: 0 to {count - 1}." if count else "No blocks were found; see: compress inspect."
