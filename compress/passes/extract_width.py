"""A smaller model cut out of one whose units are sorted: prefixes of its blocks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import Field, model_validator
from torch import nn

from calibrate.errors import UserError
from calibrate.modes import frozen
from compress.anatomy import Anatomy
from compress.passes.contract import Context, Pass, Target
from compress.rehearsal import stand_in
from compress.saved import read as read_saved
from compress.saved import reload
from compress.sections import FilePath
from compress.surgery import Surgery
from compress.width.nested import FOLDER, Nested, read
from compress.width.prefixes import by_budget, by_shares, kept_share
from compress.width.repaired import repair_behind
from compress.width.slicing import slice_units

__all__ = ["ExtractWidth"]

Share = Annotated[float, Field(gt=0, le=1)]


class ExtractWidth(Pass):
    """Take the sorted model of a run with ``nest_widths`` and keep the first units of every block.

    Mix'n'Match of MatFormer (Devvrit et al. 2023, arXiv 2310.07707, sec. 3.3): one width for all blocks, a width for each, or the
    prefixes that miss least under a budget, by the importance that the run recorded; nothing is scored again. The passes that the
    run had before ``nest_widths`` are taken over with it, so this comes first. The files are judged against the float model of
    the recipe, as ever. ``compress extract`` writes such a recipe and carries it out.
    """

    name: ClassVar[str] = "extract_width"
    source: ClassVar[str] = "Devvrit et al. 2023, arXiv 2310.07707"
    begins: ClassVar[bool] = True

    run_folder: FilePath = Field(description="Folder of the finished run with nest_widths, relative to the recipe.")
    width: Share | None = Field(None, description="Share of the neurons that stays in every block.")
    widths: tuple[Share, ...] = Field((), description="Share of the neurons that stays in each block, first block first.")
    macs: Share | None = Field(None, description="Share of the blocks' multiply-accumulates that stays.")
    size_ratio: Share | None = Field(None, description="Share of the model's bytes in memory that stays.")
    heads: Share | tuple[Share, ...] | None = Field(
        None,
        description="Share of the attention heads that stays, of every block or of each; without it all stay, and under a budget "
        "heads go as neurons do.",
    )
    round_to: int = Field(16, ge=1, le=1024, description="Neurons that stay in a block are a multiple of it, as kernels like.")
    repair: bool = Field(False, description="Whether the projections behind are fitted to the calibration rows.")

    @model_validator(mode="after")
    def _whole(self) -> ExtractWidth:
        named = [self.width is not None, bool(self.widths), self.macs is not None, self.size_ratio is not None]
        if sum(named) > 1:
            raise ValueError("name one of width, widths, macs and size_ratio\nFor example width: 0.5")
        if not sum(named) and self.heads is None:
            raise ValueError("nothing says how wide the blocks stay\nName width, widths, macs, size_ratio or heads.")
        return self

    @property
    def calibrates(self) -> bool:
        return self.repair

    @property
    def reads(self) -> list[Path]:
        folder = self.folder / FOLDER
        return [folder / "widths.json", folder / "model.safetensors"]

    @property
    def folder(self) -> Path:
        """The folder of the run that is cut from."""
        return self.base / self.run_folder

    def kept(self, nested: Nested) -> list[int]:
        """How many of each of ``nested.units`` stay.

        Raises:
            UserError: less than the least that can stay is asked for, or of what is not sorted.
        """
        if self.macs is not None or self.size_ratio is not None:
            return by_budget(nested, macs=self.macs, size_ratio=self.size_ratio, heads=self.heads, round_to=self.round_to)
        widths = self.widths or (1.0 if self.width is None else self.width)
        return by_shares(nested, widths, 1.0 if self.heads is None else self.heads, self.round_to)

    def targets(self, model: nn.Module, anatomy: Anatomy) -> list[Target]:
        nested = read(self.folder)
        found = []
        for one, stay in zip(nested.units, self.kept(nested), strict=True):
            action = f"{stay} of {len(one)} {one.kind}{'s' if one.heads < 2 else ' groups'} stay"
            for path in (*one.rows, one.sink):
                roles = next((site.roles for site in anatomy.sites if site.path == path), ())
                found.append(Target(path, ", ".join(roles), action))
        return found

    def skips(self, model: nn.Module, anatomy: Anatomy) -> dict[str, str]:
        return read(self.folder).skipped

    def rehearse(self, model: nn.Module, anatomy: Anatomy, surgery: Surgery) -> None:
        nested = read(self.folder)
        with frozen(model):
            self._begin(model, surgery)
            self._cut(model, anatomy, surgery, nested, lambda done, total, what: None)

    def run(self, model: nn.Module, context: Context) -> nn.Module:
        nested = read(self.folder, whole=True)
        if context.fingerprint and nested.fingerprint != context.fingerprint:
            what = "the run was made from another model than that of this recipe"
            raise UserError(f"{self.name}: {self.folder}", what, "Run its recipe again, or name the model that it was made from.")
        with frozen(model):
            self._begin(model, context.surgery)
            original = stand_in(model) if self.repair else None
            kept = self._cut(model, context.anatomy, context.surgery, nested, context.progress)
            context.report |= {
                "from": {"run": str(self.run_folder), "model_sha256": nested.model_sha256, "score": nested.score},
                "gone": [_told(one, stay) for one, stay in zip(nested.units, kept, strict=True)],
                "kept_share": kept_share(nested, kept, macs=True),
                "kept_bytes_share": kept_share(nested, kept, macs=False),
                "skipped": nested.skipped,
            }
            if original is not None:
                touched = [one.sink for one, stay in zip(nested.units, kept, strict=True) if stay < len(one)]
                context.report["repair"] = repair_behind(model, original, context, touched)
        return model

    def _begin(self, model: nn.Module, surgery: Surgery) -> None:
        """Makes the float model the sorted one.

        Raises:
            UserError: passes have changed it before, or it is another model.
        """
        if surgery.edits:
            raise UserError(self.name, "comes after a pass that changed the model", "Put it first: it begins with a saved model.")
        folder = self.folder / FOLDER
        saved = read_saved(folder)
        try:
            surgery.replay(model, saved.edits)
            reload(model, folder)
        except (AttributeError, KeyError, IndexError, RuntimeError, TypeError, ValueError) as error:
            told = str(error).strip().rpartition("\n")[2].strip()[:200]
            what = f"{folder} holds another model than that of this recipe, or is damaged: {told}"
            raise UserError(self.name, what, "Run its recipe again, or name the model that it was made from.") from None

    def _cut(self, model: nn.Module, anatomy: Anatomy, surgery: Surgery, nested: Nested, progress: Any) -> list[int]:
        kept = self.kept(nested)
        signature, example = anatomy.traced
        for number, (one, stay) in enumerate(zip(nested.units, kept, strict=True)):
            progress(number, len(kept), f"{one.kind}s of block {one.block}: the first {stay} of {len(one)}")
            try:
                slice_units(model, surgery, signature, example, one.units, range(stay, len(one)))
            except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
                path = self.folder / FOLDER / "widths.json"
                what = f"{path} does not describe the model beside it ({type(error).__name__} at {one.sink})"
                raise UserError(self.name, what, "Run its recipe again.") from error
        return kept


def _told(units: Any, stay: int) -> dict[str, Any]:
    whole = sum(units.importance)
    gone = list(units.order[stay:])
    return {
        "block": units.block,
        "kind": units.kind,
        "sink": units.sink,
        "of": len(units),
        "stay": stay,
        "units": gone if units.kind == "head" else len(gone),
        "score_gone": sum(units.importance[stay:]),
        "score_all": whole,
    }
