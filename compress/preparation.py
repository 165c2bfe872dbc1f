"""What a run and a later validation begin with: the runtimes are there, the recipe's model is loaded, a judge is made."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from calibrate.errors import MissingRuntime
from compress.judgement import Judge
from compress.passes.contract import Given
from compress.sources import Source, load_model

if TYPE_CHECKING:
    from calibrate.metrics import Metric
    from compress.progress import Progress
    from compress.recipe import Recipe
    from export.validate import Rows

__all__ = ["judge_of", "model_of", "require_runtimes"]


def require_runtimes(recipe: Recipe) -> None:
    """Raises ``MissingRuntime`` for the first exporter whose library is absent; names the extra that installs it."""
    for exporter in recipe.export:
        if reason := exporter.missing():
            install = f"pip install 'transformer-compress[{exporter.installs()}]'"
            raise MissingRuntime(f"export.{exporter.format}", reason, install)


def model_of(recipe: Recipe, trust: bool) -> Source:
    """The recipe's float model; its passes are told what is known of it."""
    spec = recipe.model
    source = load_model(spec.source, base=recipe.base, trust=trust, task=spec.task, checkpoint=spec.checkpoint, seed=recipe.seed)
    roles = {str(role): paths for role, paths in spec.roles.items()}
    given = Given(trust, spec.task, roles, source.labels, source.tokenizer, source.preprocessing)
    for step in recipe.passes:
        step._given = given
    return source


def judge_of(
    recipe: Recipe,
    task: str,
    rows: Rows,
    metric: Metric | None,
    metric_name: str,
    batch_size: int,
    folder: Path,
    progress: Progress,
    kept: Path | None = None,
) -> Judge:
    """A judge of the files in ``folder`` by these rows, which keeps reference outputs in ``kept``."""
    return Judge(
        rows=rows,
        metric=metric,
        metric_name=metric_name,
        batch_size=batch_size,
        measure=recipe.measure,
        threads=recipe.threads,
        folder=folder,
        classes=task not in ("sentence-embedding", "features"),
        kept=kept,
        say=progress.update,
    )
