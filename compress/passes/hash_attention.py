"""Linear attention: in chosen blocks keys are weighed by how many bits of a learnt code they share with the query."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from torch import nn

from calibrate.errors import UserError
from compress.anatomy import Anatomy
from compress.hashing.attentions import Hashable, find_attentions
from compress.hashing.hashing import Hashing
from compress.layers import HashedAttention
from compress.passes.contract import Context, Pass, Target, blank
from compress.surgery import Surgery

__all__ = ["HashAttention"]


class HashAttention(Pass):
    """Replace softmax attention by products of hash codes, whose time grows with the number of tokens and not with its square.

    EcoFormer (Liu et al. 2022, arXiv 2209.09004). Queries and keys become codes of ``bits`` signs: of linear combinations of a
    Gaussian kernel to ``anchors`` tokens that were drawn from them (Liu et al. 2012). A key's weight grows with the bits that it
    shares with the query. The codes are learnt from the model's own attention maps on calibration rows, without labels: bit by
    bit, so that a query agrees with its ``pairs`` best-scored keys and not with its worst, and then all at once by the
    divergence of the rows. Three things differ from the paper, which trains the whole model with labels after. Queries and keys
    have projections of their own, since in a model trained with softmax they are not alike (``shared: true`` gives the paper's
    one). What the mean query gives each key is kept exactly, as a weight of the key. And every row of weights sums to one: the
    authors' code adds the constant of the agreement to the numerator per token instead of over all keys.

    It loses accuracy: a few bits cannot be as sharp as a softmax. ``keep`` leaves the blocks as they are that lose most,
    ``distill`` trains what is left on the calibration rows. It is faster only from some hundred tokens on; the report says from
    how many it has fewer operations. Runtimes have no arithmetic of single bits: codes are numbers of +-1 in products of
    matrices. Attention is found where torch's ``scaled_dot_product_attention`` runs once in a block, neither causal nor with a
    bias that differs from query to query; padded keys have the weight 0.
    """

    name: ClassVar[str] = "hash_attention"
    source: ClassVar[str] = "Liu et al. 2022, EcoFormer, arXiv 2209.09004"
    needs_calibration: ClassVar[bool] = True

    bits: int = Field(16, ge=1, le=256, description="Signs in the code of a query or key.")
    anchors: int = Field(
        25, ge=2, le=1024, description="Tokens that the kernel compares with; at most as many as there are keys."
    )
    blocks: list[int] = Field([], description="Numbers of the blocks, -1 is the last; none named: all that have such attention.")
    keep: int = Field(0, ge=0, description="So many of them keep softmax attention: those whose output it changes most.")
    pairs: int = Field(10, ge=1, description="Best-scored keys that share a query's bits, and as many of the worst that do not.")
    steps: int = Field(300, ge=0, le=100_000, description="Of the refinement by the divergence of rows, for each block.")
    shared: bool = Field(False, description="One projection for queries and keys, as in the paper.")
    distill: int = Field(
        0,
        ge=0,
        le=10_000,
        description="Times that each calibration row is learnt from, without labels, once the blocks are hashed.",
    )

    def targets(self, model: nn.Module, anatomy: Anatomy) -> list[Target]:
        kept = f", unless it is one of {self.keep} that lose most" if self.keep else ""
        return [
            Target(one.block.path, "attention", f"{self.bits}-bit codes of its {one.keys} keys instead of a softmax{kept}")
            for one in self._found(model, anatomy)[0]
        ]

    def skips(self, model: nn.Module, anatomy: Anatomy) -> dict[str, str]:
        return self._found(model, anatomy)[1]

    def preview(self, model: nn.Module, anatomy: Anatomy) -> dict[str, nn.Module]:
        found, _ = self._found(model, anatomy)
        layers = {one.block.path: one.layer(self.bits, self.anchors, self.shared) for one in found[: len(found) - self.keep]}
        return {f"{path}.{HashedAttention.child}": layer for path, layer in layers.items()}

    def rehearse(self, model: nn.Module, anatomy: Anatomy, surgery: Surgery) -> None:
        for path, layer in self.preview(model, anatomy).items():
            holder = path.rpartition(".")[0]
            surgery.attach(model, holder, blank(layer, len(surgery.edits)))  # type: ignore[arg-type]

    @property
    def assumes(self) -> str:
        return "that the first blocks are those that can be hashed" if self.keep else ""

    def run(self, model: nn.Module, context: Context) -> nn.Module:
        found, skipped = self._found(model, context.anatomy)
        context.report["skipped"] = skipped
        Hashing(self, model, context, found).run()
        return model

    def _found(self, model: nn.Module, anatomy: Anatomy) -> tuple[list[Hashable], dict[str, str]]:
        """The attentions that are replaced, and why others are not, by the path of their block.

        Raises:
            UserError: a number that no block has, a named block that cannot, none that can, or none that is left to hash.
        """
        count = len(anatomy.blocks)
        for number in self.blocks:
            if not -count <= number < count:
                there = f"There are {count}: 0 to {count - 1}." if count else "No blocks were found; see: compress inspect."
                raise UserError(self.name, f"blocks: there is no block {number}", there)
        named = {number % count for number in self.blocks}
        found, reasons = find_attentions(model, anatomy)
        for path, one in list(found.items()):
            if one.keys < self.anchors:
                reasons[path] = f"it has {one.keys} keys, fewer than the {self.anchors} anchors"
                del found[path]
        chosen = [block for block in anatomy.blocks if not named or block.index in named]
        skipped = {block.path: reasons[block.path] for block in chosen if block.path in reasons}
        for block in chosen if named else []:
            if block.path in reasons:
                raise UserError(self.name, f"{block.path}: {reasons[block.path]}", f"Take {block.index} off blocks.")
        these = [found[block.path] for block in chosen if block.path in found]
        if not these:
            why = next((f"{path}: {reason}." for path, reason in skipped.items()), "See what it has with: compress inspect.")
            raise UserError(self.name, "no block has an attention that can be hashed", why)
        if self.keep >= len(these):
            raise UserError(self.name, f"keep: {self.keep} leaves none of {len(these)} attentions", f"At most {len(these) - 1}.")
        return these, skipped
