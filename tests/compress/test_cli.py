"""The command line: what it prints, where, and with which exit code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from calibrate.errors import MissingRuntime, UserError
from compress import api, cli
from compress.passes import known_passes
from compress.progress import LineProgress, LiveProgress, Progress
from compress.report import Limit, Report
from compress.shipped import find_recipe, recipes_folder, shipped_recipes
from compress.terminal import print_table

COMMANDS = ("apply", "plan", "sensitivity", "extract", "inspect", "validate", "report", "passes", "schema", "recipes")


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Exit code of ``compress <arguments>``."""
    monkeypatch.setattr(sys, "argv", ["compress", *arguments])
    with pytest.raises(SystemExit) as left:
        cli.main()
    return int(left.value.code or 0)


def report(exit_code: int = 0, limits: list[Limit] | None = None) -> Report:
    return Report(
        name="made",
        met=exit_code == 0,
        exit_code=exit_code,
        limits=limits or [],
        rows=[],
        steps=[],
        model={},
        data={},
        machine={"processor": "a processor", "threads": 1},
        seconds={},
        peak_memory_bytes=1,
        folder="runs/made",
    )


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_a_purpose_an_example_and_exit_codes(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, command, "--help") == 0
    text = capsys.readouterr().out
    assert f"compress {command}" in text
    assert "Examples" in text
    if command in ("apply", "plan", "sensitivity", "extract", "inspect", "validate", "report", "passes"):
        assert "Exit codes" in text


def test_no_command_and_help_list_the_commands(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "--help") == 0
    text = capsys.readouterr().out
    assert all(command in text for command in COMMANDS)


def test_help_imports_nothing_heavy() -> None:
    program = (
        "import sys\nsys.argv = ['compress', '--help']\nfrom compress.cli import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "print(sorted({name.partition('.')[0] for name in sys.modules} & "
        "{'torch', 'transformers', 'numpy', 'onnx', 'coremltools', 'timm', 'pydantic'}), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"


def test_a_mistake_is_one_line_with_its_place_and_exit_code_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("model: embedded:digits-vit\nsede: 1\n")
    assert run(monkeypatch, "apply", str(path)) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert f"{path}:2:1: unknown key 'sede'\n  Did you mean seed?" in told.err
    assert "Traceback" not in told.err


@pytest.mark.parametrize(
    ("model", "rest", "says"),
    [
        ("hf:./nowhere/at/all", "", ":1:8: hf:./nowhere/at/all: there is no such folder"),
        ("embedded:none", "", ":1:8: model: no embedded model 'none'"),
        ("embedded:digits-vit", "  calibration: {rows: 999999}\n", ":4:23: data.calibration.rows: 999999 rows asked for"),
    ],
)
def test_mistakes_that_turn_up_later_have_their_place_too(
    model: str, rest: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(f"model: {model}\ndata:\n  format: embedded\n{rest}passes: []\nexport: []\n")
    assert run(monkeypatch, "apply", str(path), "--out", str(tmp_path / "out")) == 2
    told = capsys.readouterr().err
    assert f"{path}{says}" in told
    assert "Traceback" not in told


def test_a_recipe_that_does_not_exist_names_the_nearest(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "apply", "quikstart") == 2
    assert "Did you mean `quickstart`?" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["apply"], ["aply", "x"], ["apply", "x", "--no-such-option"], ["validate", "nowhere"]])
def test_wrong_usage_has_exit_code_2(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(monkeypatch, *arguments) == 2


def test_a_missing_runtime_has_exit_code_3(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def absent(*_: Any, **__: Any) -> Report:
        raise MissingRuntime("export.onnx", "onnxruntime is not installed", "pip install 'transformer-compress[onnx]'")

    monkeypatch.setattr(api, "apply", absent)
    assert run(monkeypatch, "apply", "quickstart") == 3
    assert "pip install 'transformer-compress[onnx]'" in capsys.readouterr().err


def test_a_defect_of_ours_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> Report:
        raise RuntimeError("ours")

    monkeypatch.setattr(api, "apply", broken)
    monkeypatch.setattr(sys, "argv", ["compress", "apply", "quickstart", "--quiet"])
    with pytest.raises(RuntimeError, match="ours"):
        cli.main()


@pytest.mark.parametrize("exit_code", [0, 1])
def test_apply_prints_the_verdict_and_the_folder(
    exit_code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given: dict[str, Any] = {}
    limit = Limit(line="accept.sqnr_db", artifact="onnx", limit=20, value=3, met=exit_code == 0, says="onnx: sqnr_db 3")

    def applied(recipe: Any, out: Any, **options: Any) -> Report:
        given.update(options, recipe=recipe, out=out)
        return report(exit_code, [limit])

    monkeypatch.setattr(api, "apply", applied)
    arguments = ["apply", "quickstart", "--out", "there", "--trust", "--no-evaluation", "--quiet"]
    assert run(monkeypatch, *arguments) == exit_code
    told = capsys.readouterr()
    assert (given["recipe"], given["out"], given["trust"], given["evaluate"]) == ("quickstart", Path("there"), True, False)
    assert type(given["progress"]) is Progress
    assert told.out.rstrip().endswith("runs/made")
    assert ("missed: accept.sqnr_db: onnx: sqnr_db 3" in told.out) == (exit_code == 1)
    assert told.err == ""


def test_apply_writes_to_runs_and_the_recipe_name(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}

    def applied(recipe: Any, out: Path, **_: Any) -> Report:
        given.update(recipe=recipe, out=out)
        return report()

    monkeypatch.setattr("compress.run.apply", applied)
    api.apply("quickstart")
    assert given["recipe"].name == "quickstart"
    assert given["out"] == Path("runs/quickstart")


def test_passes_lists_every_option_and_source(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "passes") == 0
    text = capsys.readouterr().out
    for name, entry in known_passes().items():
        assert name in text
        assert all(option in text for option in entry.model_fields)
    assert run(monkeypatch, "passes", "--json") == 0
    told = {one["name"]: one for one in json.loads(capsys.readouterr().out)}
    assert set(told) == set(known_passes())
    assert set(told["quantize"]["options"]["properties"]) == set(known_passes()["quantize"].model_fields)
    assert told["quantize"]["source"]


def test_schema_is_json(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from compress.editor_schema import editor_schema

    assert run(monkeypatch, "schema") == 0
    assert json.loads(capsys.readouterr().out) == editor_schema()


def test_recipes_lists_each_with_a_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "recipes") == 0
    text = capsys.readouterr().out
    for shipped in shipped_recipes():
        assert f"{shipped.name} " in text
        assert shipped.title in text
        assert len(shipped.title) > 20


def test_recipes_are_found_by_name_and_by_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_recipe("quickstart") == recipes_folder() / "quickstart.yaml"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quickstart").write_text("model: x")
    assert find_recipe("quickstart") == Path("quickstart")
    with pytest.raises(UserError, match="no such recipe"):
        find_recipe("nothing/like/it.yaml")


def test_progress_in_lines_names_each_step_and_where_it_stopped() -> None:
    lines: list[str] = []
    with LineProgress(lines.append) as progress:
        with progress.step("first"):
            progress.update(1, 2, "rows")
        with pytest.raises(ValueError, match="x"), progress.step("second"):
            raise ValueError("x")
    assert [line.partition(":")[0] for line in lines] == ["first", "second"]
    assert "stopped" in lines[1]


def test_the_live_view_shows_steps_and_their_detail() -> None:
    from rich.console import Console

    console = Console(record=True, width=120, force_terminal=True)
    with LiveProgress(console) as progress:
        with progress.step("calibrate [x]"):
            progress.update(3, 8, "rows [1]")
            progress.update(0, 0)
        with pytest.raises(ValueError, match="x"), progress.step("write"):
            raise ValueError("x")
    text = console.export_text()
    assert "calibrate [x]" in text
    assert "stopped" in text


def test_a_narrow_terminal_cuts_no_figure() -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("", *(f"figure {number}" for number in range(8)))
    table.add_row("onnx", *(f"0.{number}234567 [0.1, 0.2]" for number in range(7)), "")
    narrow, wide = (Console(record=True, width=width) for width in (60, 400))
    print_table(narrow, table)
    print_table(wide, table)
    for text in (narrow.export_text(), wide.export_text()):
        assert all(f"0.{number}234567 [0.1, 0.2]" in text for number in range(7))
        assert "figure 0" in text


def test_a_terminal_without_unicode_is_served() -> None:
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    environment.pop("PYTHONIOENCODING", None)
    for arguments in (["inspect", "quickstart"], ["--help"]):
        command = [sys.executable, "-m", "compress.cli", *arguments]
        done = subprocess.run(command, capture_output=True, env=environment)
        assert done.returncode == 0, done.stderr
        assert done.stdout.decode("ascii")
