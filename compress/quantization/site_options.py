"""What a recipe may say of single sites of ``quantize``, and of bits that are chosen site by site."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from calibrate.errors import UserError
from calibrate.grid import Bits
from compress.anatomy import Anatomy

__all__ = ["Choice", "Mixed", "SiteOptions", "label", "options_of", "overridden"]

Choice = Bits | Literal["float"]


class SiteOptions(BaseModel):
    """How the sites of one pattern differ from the others."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    weights: Choice | None = Field(None, description="Bits of each weight, or float. Default: as everywhere.")
    activations: Literal["none"] | None = Field(None, description="none: the input stays float. Default: as everywhere.")


class Mixed(BaseModel):
    """Bits chosen site by site under one budget."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    candidates: tuple[Choice | SiteOptions, ...] = Field(
        (8, 4, "float"), min_length=1, description="What a site may become: bits of its weights, float, or options of a site."
    )
    size_ratio: float | None = Field(
        None, gt=0, le=1, description="Most bytes of all parameters and buffers, as a share of those the pass is given."
    )
    size_mb: float | None = Field(None, gt=0, description="The same in megabytes (10^6 bytes).")
    loss_db: float | None = Field(
        None, description="Least SQNR of the model's outputs on those rows, in dB; the smallest model that is found to have it."
    )
    latency_ratio: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Longest time of the model's file over that of the model as the pass is given it: measured in the runtime of "
        "the first file of the recipe that runs on this machine.",
    )
    rows: int = Field(64, ge=1, description="Calibration rows on which each site's loss is measured.")
    score: Literal["sensitivity", "random"] = Field(
        "sensitivity", description="random: losses are dealt out at random, as a control."
    )

    @model_validator(mode="after")
    def _consistent(self) -> Mixed:
        labels = [label(options_of(one)) for one in self.candidates]
        if len(set(labels)) < len(labels):
            raise ValueError("candidates names one setting twice\nName each once.")
        if labels == ["float"]:
            raise ValueError("candidates leaves every site float\nName bits too: [8, 4, float].")
        if len(self.budgets) > 1:
            raise ValueError(f"{' and '.join(self.budgets)} are two budgets\nKeep one.")
        return self

    @property
    def budgets(self) -> dict[str, float]:
        """The budget by its option."""
        found = {name: getattr(self, name) for name in ("size_ratio", "size_mb", "loss_db", "latency_ratio")}
        return {name: value for name, value in found.items() if value is not None}


def options_of(choice: Choice | SiteOptions) -> SiteOptions:
    """The long form of a choice."""
    return choice if isinstance(choice, SiteOptions) else SiteOptions(weights=choice)


def label(options: SiteOptions) -> str:
    """A setting in a word or two: ``4``, ``float``, ``8 weights only``."""
    weights = "as everywhere" if options.weights is None else str(options.weights)
    return weights if options.activations is None or weights == "float" else f"{weights} weights only"


def overridden(
    anatomy: Anatomy, overrides: Mapping[str, Choice | SiteOptions], chosen: set[str], where: str
) -> dict[str, SiteOptions]:
    """What is said of single sites, by path; of two patterns that name a site the later one holds, option by option.

    Raises:
        UserError: a pattern matches nothing, or nothing that the pass takes.
    """
    found: dict[str, SiteOptions] = {}
    for pattern, choice in overrides.items():
        paths = [site.path for site in anatomy.select([pattern], where) if site.path in chosen]
        if not paths:
            raise UserError(where, f"overrides: {pattern} names no site that is quantized", "Name it under sites too.")
        said = options_of(choice).model_dump(exclude_none=True)
        for path in paths:
            found[path] = found.get(path, SiteOptions()).model_copy(update=said)
    return found
