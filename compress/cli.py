"""The command line: the only place that prints or exits. Nothing heavy is imported before a command runs."""

from __future__ import annotations

import io
import itertools
import json
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from calibrate.errors import UserError

if TYPE_CHECKING:
    from compress.progress import Progress
    from compress.report import Report

__all__ = [
    "app",
    "apply",
    "extract",
    "inspect",
    "main",
    "passes",
    "plan",
    "recipes",
    "report",
    "schema",
    "sensitivity",
    "validate",
]

EXIT_CODES = (
    "Exit codes: 0 done and met; 1 a line of accept was missed; 2 a mistake of yours; 3 a runtime is not installed; "
    "130 stopped by Ctrl-C, 143 by SIGTERM: the same command goes on from there."
)

app = typer.Typer(
    name="compress",
    help="One recipe turns a trained transformer into ONNX, Core ML and TensorRT files, and proves what that cost."
    "\n\nStart with `compress apply quickstart`: a small model that ships with the package, in under a minute."
    f"\n\n{EXIT_CODES}",
    epilog="Every command has its own --help with examples.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)

Trust = Annotated[
    bool, typer.Option("--trust", help="Run the Python file that the recipe names (file.py:function). Read it first.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]


def main() -> None:
    """The command ``compress``: a user's mistake ends in one line and an exit code, our defect in a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that knows ASCII only still shows every figure
    try:
        app()
    except UserError as error:
        print(str(error), file=sys.stderr)
        sys.exit(error.exit_code)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(1)


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False) -> None:
    if version:
        from importlib.metadata import version as installed

        print(installed("transformer-compress"))
        raise typer.Exit


@app.command()
def apply(
    recipe: Annotated[
        str, typer.Argument(metavar="RECIPE", help="A YAML file, or the name of a shipped recipe (`compress recipes`).")
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FOLDER", readable=False, help="The run folder; by default runs/ and the recipe's name."),
    ] = None,
    trust: Trust = False,
    no_evaluation: Annotated[
        bool, typer.Option("--no-evaluation", help="Write and audit the files; run nothing on the evaluation rows.")
    ] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start again, removing what a run left in the folder.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress; only the final table.")] = False,
) -> None:
    """Carry out a recipe: compress the model, write the files, run each one and judge it against float.

    The run folder holds the recipe, the compressed model, the files and report.json. A run that misses a line of the
    recipe's `accept` keeps its files, says which line and by how much, and exits with code 1.

    A run that was stopped or killed goes on from there when the same command is given again, if recipe, weights, data and
    program are the same; otherwise it starts again and says why.

    **Examples**

        compress apply quickstart
        compress apply my.yaml --out runs/first
        compress apply own-model.yaml --trust

    Exit codes: 0 met; 1 a line of accept was missed; 2 a mistake in the recipe or the data (file:line:column); 3 a
    runtime is not installed; 130 stopped by Ctrl-C; 143 stopped by SIGTERM.
    """
    with _stoppable("stopped; the same command goes on from here"), _progress(quiet) as progress:
        from compress import api

        report = api.apply(recipe, out, trust=trust, evaluate=not no_evaluation, fresh=fresh, progress=progress)
    _finish(report)


@app.command()
def plan(
    recipe: Annotated[
        str, typer.Argument(metavar="RECIPE", help="A YAML file, or the name of a shipped recipe (`compress recipes`).")
    ],
    as_json: Json = False,
    trust: Trust = False,
    no_evaluation: Annotated[
        bool, typer.Option("--no-evaluation", help="Plan a run that judges nothing (`compress apply --no-evaluation`).")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress; only the plan.")] = False,
) -> None:
    """Tell what a recipe will do and cost before it runs: in seconds, writing nothing, reading no evaluation data.

    Every pass is rehearsed on what the passes before it leave: the places it will touch and those it will not, and bytes
    before and after. Then the size of each file, what stays in float, and the peak of memory and disk. A mistake that would
    stop the run later stops the plan now.

    **Examples**

        compress plan quickstart
        compress plan my.yaml --json
        compress plan own-model.yaml --trust

    Exit codes: 0 done; 2 a mistake in the recipe or the data (file:line:column); 3 a runtime is not installed.
    """
    from rich.table import Table

    from compress import api

    with _stoppable("stopped; nothing was written"), _progress(quiet) as progress:
        found = api.plan(recipe, trust=trust, evaluate=not no_evaluation, progress=progress)
    if as_json:
        print(found.model_dump_json(indent=2))
        return
    from compress.plan_table import render
    from compress.terminal import console, print_table

    for part in render(found):
        if isinstance(part, Table):
            print_table(console(), part)
        else:
            print(part)


@app.command()
def sensitivity(
    recipe: Annotated[
        str, typer.Argument(metavar="RECIPE", help="A YAML file, or the name of a shipped recipe (`compress recipes`).")
    ],
    as_json: Json = False,
    html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", readable=False, help="Write a page with the plot too.")
    ] = None,
    by: Annotated[
        str | None, typer.Option("--by", metavar="SETTING", help="Setting by whose loss the sites are sorted (the first).")
    ] = None,
    rows: Annotated[int | None, typer.Option("--rows", min=1, help="Calibration rows on which losses are measured (64).")] = None,
    step: Annotated[
        str | None,
        typer.Option("--pass", metavar="NAME", help="Pass that is measured (quantize, or else a token pass)."),
    ] = None,
    trust: Trust = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress; only the table.")] = False,
) -> None:
    """Show where it hurts: what the model's outputs lose when one site alone is quantized, or tokens leave at one block alone.

    No labels are read. Passes before the measured one are carried out first, in memory. Of a `quantize` each site is rounded at
    each candidate of its `mixed`, or else at 8 bits (with its input rounded, and with the weights alone), 4, 3 and 2 bits. Of
    `prune_tokens`, `merge_tokens` or `fuse_tokens` each block hands on 90, 75, 50 and 25 % of the tokens. Loss is the SQNR of the
    outputs in dB: higher is better. Nothing is written but the page.

    **Examples**

        compress sensitivity quickstart
        compress sensitivity my.yaml --by 4 --html sensitivity.html
        compress sensitivity my.yaml --pass merge_tokens
        compress sensitivity my.yaml --json

    Exit codes: 0 done; 2 a mistake in the recipe or the data (file:line:column); 3 a library is not installed.
    """
    from rich.table import Table

    from compress import api

    with _stoppable("stopped; nothing was written"), _progress(quiet) as progress:
        found = api.sensitivity(recipe, step=step, trust=trust, rows=rows, by=by, progress=progress)
    chosen = by or found.settings[0]
    view = found.view()
    if html is not None:
        from compress.page.sensitivity import write_sensitivity

        write_sensitivity(view, chosen, html)
    if as_json:
        print(found.model_dump_json(indent=2))
        return
    from compress.inspection import size
    from compress.sensitivity_view import render
    from compress.terminal import console, print_table

    for part in render(view, chosen, size(found.bytes_before)):
        if isinstance(part, Table):
            print_table(console(), part)
        else:
            print(part)
    if html is not None:
        print(html)


@app.command()
def extract(
    run: Annotated[
        Path, typer.Argument(metavar="RUN_FOLDER", readable=False, help="The folder of a finished run with `nest_widths`.")
    ],
    width: Annotated[
        str | None, typer.Option("--width", metavar="SHARE", help="Share of the neurons that stays in every block.")
    ] = None,
    widths: Annotated[
        str | None, typer.Option("--widths", metavar="SHARE,...", help="Share of the neurons that stays in each block.")
    ] = None,
    macs: Annotated[
        str | None, typer.Option("--macs", metavar="SHARE", help="Share of the blocks' multiply-accumulates that stays.")
    ] = None,
    size_ratio: Annotated[
        str | None, typer.Option("--size-ratio", metavar="SHARE", help="Share of the model's bytes in memory that stays.")
    ] = None,
    heads: Annotated[
        str | None,
        typer.Option(
            "--heads", metavar="SHARE[,...]", help="Share of the attention heads that stays, of every block or of each."
        ),
    ] = None,
    round_to: Annotated[int | None, typer.Option("--round-to", help="Neurons that stay are a multiple of it (16).")] = None,
    repair: Annotated[
        bool, typer.Option("--repair", help="Fit the projections behind what is cut to the calibration rows of the recipe.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FOLDER", readable=False, help="The new run folder; by default beside RUN_FOLDER."),
    ] = None,
    trust: Trust = False,
    no_evaluation: Annotated[
        bool, typer.Option("--no-evaluation", help="Write and audit the files; run nothing on the evaluation rows.")
    ] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start again, removing what a run left in the folder.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress; only the final table.")] = False,
) -> None:
    """Cut a smaller model out of a run whose recipe has `nest_widths`, without scoring anything again, and judge its files.

    That run sorted the units of every block by importance, so that the first ones are a smaller model: the same share of
    every block (--width), a share for each (--widths, Mix'n'Match), or what a budget leaves (--macs, --size-ratio), chosen by
    the importance that the run recorded. What follows is the run's own recipe: the passes after `nest_widths`, exporters, rows
    and contract. The files are judged against the float model of that recipe, which must be where it was, as must its rows.

    **Examples**

        compress extract runs/nested --width 0.5
        compress extract runs/nested --widths 1,1,0.75,0.75,0.5,0.5 --out runs/mixed
        compress extract runs/nested --macs 0.7 --repair

    Exit codes: 0 met; 1 a line of accept was missed; 2 no such run, it sorted nothing, or a width that it cannot give; 3 a
    runtime is not installed; 130 stopped by Ctrl-C; 143 stopped by SIGTERM.
    """
    with _stoppable("stopped; the same command goes on from here"), _progress(quiet) as progress:
        from compress import api
        from compress.width.extraction import shares

        asked = {"width": width, "widths": widths, "macs": macs, "size_ratio": size_ratio, "heads": heads}
        report = api.extract(
            run, out, trust=trust, evaluate=not no_evaluation, fresh=fresh, progress=progress,
            **shares(asked), round_to=round_to, repair=repair or None,
        )  # fmt: skip
    _finish(report)


@app.command()
def inspect(
    target: Annotated[
        str,
        typer.Argument(metavar="RECIPE_OR_MODEL", help="A recipe, or a model: hf:path, timm:name, file.py:function."),
    ],
    as_json: Json = False,
    trust: Trust = False,
) -> None:
    """Show the parts of a model as a tree: blocks, roles, parameters, FLOPs and bytes, and what could not be placed.

    Roles are what passes and recipes speak of (attention.query, mlp.up ...). They are found from the model's own graph.

    **Examples**

        compress inspect quickstart
        compress inspect hf:path/to/model --json
        compress inspect my_model.py:build --trust

    Exit codes: 0 done; 2 the model cannot be found or loaded; 3 a library is not installed.
    """
    from compress import api

    _, anatomy = api.inspect(target, trust=trust)
    from compress.inspection import render, to_json
    from compress.terminal import console

    if as_json:
        print(to_json(anatomy))
    else:
        console().print(render(anatomy))


@app.command()
def validate(
    folder: Annotated[Path, typer.Argument(metavar="RUN_FOLDER", readable=False, help="The folder of a finished run.")],
    trust: Trust = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress; only the final table.")] = False,
) -> None:
    """Open the files of a finished run again, run them and judge them; later, or on another machine.

    **Examples**

        compress validate runs/quickstart

    Exit codes: 0 met; 1 a line of accept was missed; 2 no such run, or its files changed; 3 a runtime is not installed;
    130 stopped by Ctrl-C; 143 stopped by SIGTERM.
    """
    with _stoppable("stopped; the files are as they were"), _progress(quiet) as progress:
        from compress import api

        report = api.validate(folder, trust=trust, progress=progress)
    _finish(report)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(metavar="RUN_FOLDER", readable=False, help="The folder of a finished run.")],
) -> None:
    """Print the table of a finished run again, and write its report.html anew.

    The page is one file without anything beside it: it opens offline, in any browser.

    **Examples**

        compress report runs/quickstart

    Exit codes: 0 done; 2 there is no report in the folder, or the page cannot be written.
    """
    from compress import page

    written = page.write(folder)
    _show(page.read(folder).report)
    print(written)


@app.command()
def passes(as_json: Json = False) -> None:
    """List every pass that a recipe can name, with its options, their defaults and its source.

    **Examples**

        compress passes
        compress passes --json

    Exit codes: 0 done; 2 an installed package adds a pass that cannot be loaded.
    """
    from compress.passes import known_passes
    from compress.shipped import summary
    from compress.terminal import console, show_passes

    found = known_passes()
    if as_json:
        described = [
            {
                "name": name,
                "summary": summary(entry),
                "source": entry.source,
                "needs_calibration": entry.needs_calibration,
                "options": entry.model_json_schema(),
            }
            for name, entry in found.items()
        ]
        print(json.dumps(described, indent=2))
        return
    show_passes(console(), found)


@app.command()
def schema() -> None:
    """Print the JSON Schema of recipes, with every option of every pass and exporter, for editors and programs.

    **Examples**

        compress schema > recipe.schema.json

    In VS Code with the YAML extension, the first line of a recipe then switches completion and checking on:

        # yaml-language-server: $schema=recipe.schema.json
    """
    from compress.editor_schema import editor_schema

    print(json.dumps(editor_schema(), indent=2))


@app.command()
def recipes(
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the text of recipes/README.md.")] = False,
) -> None:
    """List the recipes that come with the package, with one line each.

    **Examples**

        compress recipes
        compress apply quickstart
    """
    from compress.shipped import readme, recipes_folder, shipped_recipes

    if markdown:
        print(readme(), end="")
        return
    found = shipped_recipes()
    width = max((len(one.name) for one in found), default=0)
    for kind, group in itertools.groupby(found, key=lambda one: one.kind):
        print(kind)
        for one in group:
            print(f"  {one.name:{width}}  {one.title}")
    print(f"\nCopy one from {recipes_folder()} and change it, or run it by its name: compress apply NAME.")


class _Terminated(KeyboardInterrupt):
    """SIGTERM, which ends a command as Ctrl-C does."""


@contextmanager
def _stoppable(line: str) -> Iterator[None]:
    """Ends a command that is stopped from outside in one line, with the exit code that shells give."""

    def terminated(number: int, frame: object) -> None:
        raise _Terminated

    before = signal.signal(signal.SIGTERM, terminated)
    try:
        yield
    except KeyboardInterrupt as stop:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # impatience must not end in a traceback now
        print(line, file=sys.stderr)
        raise typer.Exit(143 if isinstance(stop, _Terminated) else 130) from None
    finally:
        signal.signal(signal.SIGTERM, before)


def _progress(quiet: bool) -> Progress:
    from compress.progress import LineProgress, LiveProgress, Progress
    from compress.terminal import console

    if quiet:
        return Progress()
    shown = console(stderr=True)
    if shown.is_interactive and sys.stderr.isatty():  # no dumb terminal, and no log that wants colours
        return LiveProgress(shown)
    return LineProgress(lambda line: print(line, file=sys.stderr, flush=True))


def _finish(report: Report) -> None:
    _show(report)
    print(report.folder)
    raise typer.Exit(report.exit_code)


def _show(report: Report) -> None:
    """The table, what was run on what, what was missed, and the verdict."""
    from compress.report import table
    from compress.terminal import console, lines, print_table

    print_table(console(), table(report))
    for line in lines(report):
        print(line)


if __name__ == "__main__":
    main()
