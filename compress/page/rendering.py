"""Puts the page together: the template, the figures, plotly's program, and a policy that lets nothing else run."""

from __future__ import annotations

import base64
import hashlib
import os
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calibrate.errors import UserError
from compress.page import block_plot, outcome, sizes, story, trade_off, wording
from compress.page.folder import Found, read
from compress.page.judged import judged
from compress.page.steps import steps

if TYPE_CHECKING:
    from jinja2 import Environment

__all__ = ["TEMPLATES", "environment", "plotly_program", "policy", "render", "write"]

TEMPLATES = Path(__file__).parent / "templates"


def write(folder: Path) -> Path:
    """Writes ``report.html`` into a run folder, from the files that lie there (temporary name, then renamed).

    Raises:
        UserError: the folder holds no report, or cannot be written.
    """
    page = render(read(folder))
    path, unfinished = folder / "report.html", folder / ".report.html.part"
    try:
        unfinished.write_text(page, "utf-8", newline="\n")
        os.replace(unfinished, path)
    except OSError as error:
        with suppress(OSError):
            unfinished.unlink()
        raise UserError(str(path), f"cannot be written: {error.strerror}", "Make room there, or make it writable.") from None
    return path


def render(found: Found) -> str:
    """The page as text: a pure function of what the folder holds.

    Everything that comes from a recipe is text: jinja2 escapes it, and a content security policy allows no script but the
    two of the page (by their hashes) and no request at all.
    """
    from markupsafe import Markup

    figures = _figures(found)
    scripts = [plotly_program(), (TEMPLATES / "page.js").read_text("utf-8")] if figures["drawn"] else []
    template = environment().get_template("page.html")
    return template.render(
        report=found.report,
        manifest=found.manifest,
        validation=_validation(found),
        about=story.about(found.report),
        notes=story.notes(found.report),
        measured_on=story.measured_on(found.report),
        verdict=outcome.verdict(found.report),
        gains=outcome.gains(found.report),
        table=outcome.table(found.report),
        untimed=trade_off.untimed(found.report),
        roles=sizes.roles(found.report),
        files=sizes.files(found.report),
        legend=sizes.legend(found.report),
        steps=steps(found.report, found.words),
        judged=judged(found.report, found.beside),
        parts=story.parts(found.report),
        again=story.again(found),
        marks=outcome.marks(found.report.rows),
        style=Markup((TEMPLATES / "style.css").read_text("utf-8")),
        scripts=[Markup(script) for script in scripts],
        blocks_by_need=block_plot.by_need(found.report.blocks),
        policy=policy(scripts),
        **figures,
    )


@cache
def environment() -> Environment:
    """jinja2 over the templates of the pages; kept, with those that it has compiled."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    loader = FileSystemLoader(TEMPLATES)
    made = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    made.filters |= {"size": wording.size, "memory": wording.memory, "seconds": wording.seconds}
    made.filters |= {"plain": wording.plain, "link": story.link, "pairs": wording.pairs}
    return made


def _figures(found: Found) -> dict[str, Any]:
    """The plots by place, and their data in one piece for the page's program."""
    name, against_time = trade_off.trade_off(found.report)
    quality = None if against_time else trade_off.quality(found.report)
    blocks = block_plot.blocks(found.report)
    every = [*against_time, *(plot for plot in (quality, blocks) if plot)]
    drawn = {plot.name: {"data": plot.data, "layout": plot.layout} for plot in every}
    return {
        "quality_name": name,
        "better": "down" if name == "perplexity" else "up",
        "trade_off": against_time,
        "quality": quality,
        "blocks": blocks,
        "drawn": drawn,
    }


def _validation(found: Found) -> dict[str, Any] | None:
    if found.validation is None:
        return None
    return {
        "rows": found.validation.data.get("validated_on", ""),
        "machine": story.measured_on(found.validation),
        "verdict": outcome.verdict(found.validation),
        "table": outcome.table(found.validation),
        "judged": judged(found.validation),
    }


@cache
def plotly_program() -> str:
    """plotly.js, minified, as the Python package carries it: its one bundle, 4.8 MB."""
    from plotly.offline import get_plotlyjs  # type: ignore[import-untyped]

    program: str = get_plotlyjs()
    assert "</script" not in program.lower()
    assert "<!--" not in program
    return program


def policy(scripts: list[str]) -> str:
    """A content security policy that allows these scripts and nothing else."""
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    allowed = " ".join(f"'sha256-{one}'" for one in hashes) or "'none'"
    rest = "style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
    return f"default-src 'none'; script-src {allowed}; {rest}"
