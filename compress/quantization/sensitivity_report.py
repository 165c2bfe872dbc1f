"""Which sites of a recipe's model hurt when they are quantized: ``compress sensitivity``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, Field

from calibrate.errors import UserError
from compress.checks import placed
from compress.measured_pass import check_setting, reached
from compress.passes.quantize import Quantize
from compress.progress import Progress
from compress.quantization.bit_choice import Bits
from compress.quantization.bit_groups import FLOAT
from compress.quantization.float8 import is_float8
from compress.quantization.sensitivity import Sensitivity, decibels, measure
from compress.quantization.site_options import Choice, SiteOptions, label, options_of
from compress.sensitivity_view import Cell, Row, View
from compress.wording import size

if TYPE_CHECKING:
    from compress.recipe import Recipe

__all__ = ["SensitivityReport", "SettingLoss", "SiteLoss", "Uniform", "make"]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class SettingLoss(_Record):
    """One site, or sites that share a weight, at one setting, everything else in float."""

    bytes: int = Field(description="of the site's tensors, room for factors of its input among them")
    db: float | None = Field(description="SQNR of the model's outputs; null: nothing is lost")
    noise: float = Field(description="squared error of the outputs over their squares")
    kl: float | None = Field(description="mean divergence of the softmax of the outputs, in nats; null for single scores")
    agreement: float | None = Field(description="share of rows whose largest output stays; null for single scores")


class SiteLoss(_Record):
    """One site, or sites that share a weight."""

    sites: list[str]
    role: str
    settings: dict[str, SettingLoss]
    refused: dict[str, str] = Field(description="settings that it cannot take, with the reason")


class Uniform(_Record):
    """All sites at one setting; those that cannot take it stay float."""

    bytes: int = Field(description="of the whole model")
    predicted_db: float | None = Field(description="from the losses of the single sites, which add up")


class SensitivityReport(_Record):
    """The loss of every site at every setting. Fields are only ever added to within one version."""

    version: Literal[1] = 1
    name: str
    model: str
    before: list[str] = Field(description="passes that were carried out first")
    place: str = Field(description="file:line:column of the quantize pass")
    rows: int = Field(description="calibration rows on which losses were measured")
    calibration: int = Field(description="calibration rows that ranges come from")
    settings: list[str]
    bytes_before: int
    sites: list[SiteLoss]
    uniform: dict[str, Uniform]
    kept: dict[str, str] = Field(description="sites that stay float whatever is chosen, with the reason")

    def view(self) -> View:
        """As people read it."""
        return View(
            name=self.name,
            model=self.model,
            before=self.before,
            facts=f"{self.rows} of {self.calibration} calibration rows, no labels",
            title="SQNR of the model's outputs in dB when that site alone is rounded",
            lede="How much of the model’s outputs is kept when that site is rounded and everything else stays in float; higher "
            "is better.",
            place="site",
            settings=self.settings,
            cost="size",
            rows=[_row(one) for one in self.sites],
            total=Row(
                "all, predicted; the whole model",
                "",
                {name: Cell(one.predicted_db, size(one.bytes)) for name, one in self.uniform.items()},
            ),
            notes=[
                *(
                    f"{site.sites[0]} cannot take {name}: {reason}"
                    for site in self.sites
                    for name, reason in site.refused.items()
                ),
                *(f"{path} stays float: {reason}" for path, reason in self.kept.items()),
            ],
        )


def make(
    recipe: Recipe,
    number: int,
    step: Quantize,
    *,
    trust: bool = False,
    rows: int | None = None,
    by: str | None = None,
    progress: Progress | None = None,
) -> SensitivityReport:
    """Carries out the passes before a ``quantize`` in memory, then measures what that one's sites lose.

    The settings are the candidates of its ``mixed``, or else 8 bits with and without rounded inputs, 4, 3 and 2 bits, of
    which a site may refuse some.

    Args:
        number, step: the pass.
        trust: whether Python files that the recipe names may be run.
        rows: calibration rows on which losses are measured (default: as ``mixed`` says, or 64).
        by: a setting that has to be among those that are measured.

    Raises:
        UserError: it is one by NNCF or to FP8; ``by`` is not among the settings; or what would stop the
            run, with its place.
    """
    progress = progress or Progress()
    if step.engine != "own":
        what = f"quantize: sites are measured as the own engine rounds them, and the recipe has engine: {step.engine}"
        raise UserError(recipe.place("passes", number, step.name), what, "Take engine out in a copy of the recipe.")
    if is_float8(step):
        what = "quantize: weights: fp8 leaves nothing to choose among, and sites are measured at bits of integers"
        raise UserError(recipe.place("passes", number, step.name), what, "Use weights: 8 in a copy of the recipe.")
    candidates = _candidates(step)
    settings = [label(options_of(one)) for one in candidates]
    check_setting(by, settings)
    source, model, context = reached(recipe, number, trust, progress)
    with progress.step("the loss of each site"), placed(recipe, "passes", number, step.name):
        bits = Bits.of(step, model, context.anatomy, candidates, strict=step.mixed is not None)
        wanted = rows or (step.mixed.rows if step.mixed else 64)
        found = measure(step, model, context, bits.groups, wanted)
    return SensitivityReport(
        name=recipe.name,
        model=source.name,
        before=[one.name for one in recipe.passes[:number]],
        place=recipe.place("passes", number, step.name),
        rows=found.reference.rows,
        calibration=context.rows,
        settings=settings,
        bytes_before=bits.before,
        sites=[SiteLoss.model_validate(entry) for entry in found.json() if set(entry["settings"]) != {FLOAT}],
        uniform={name: _uniform(bits, found, name) for name in settings},
        kept=bits.stuck,
    )


def _row(site: SiteLoss) -> Row:
    cells = {name: Cell(one.db, size(one.bytes)) for name, one in site.settings.items()}
    return Row(", ".join(site.sites), site.role, cells)


def _candidates(step: Quantize) -> Sequence[Choice | SiteOptions]:
    if step.mixed is not None:
        return [one for one in step.mixed.candidates if options_of(one).weights != "float"]
    own: tuple[Choice | SiteOptions, ...] = (8, SiteOptions(weights=8, activations="none"), 4, 3, 2)
    return [one for one in own if step.activations != "none" or not isinstance(one, SiteOptions)]


def _uniform(bits: Bits, found: Sensitivity, name: str) -> Uniform:
    noise = sum(losses[name].noise for losses in found.losses if name in losses)
    size = bits.before + sum(group.sizes[name] - group.whole for group in bits.groups if name in group.sizes)
    return Uniform(bytes=size, predicted_db=decibels(noise))
