"""A run that is killed goes on where it stopped, and ends with the bytes of one that was not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from calibrate.errors import UserError
from compress import report
from compress.journal import FOLDER, Journal
from compress.progress import Progress
from compress.recipe import read
from compress.run import apply
from compress.run_folder import LOCK, locked, own
from compress.validation import validate

pytest.importorskip("onnxruntime", reason="needs the extra onnx")

RECIPE = """\
model: embedded:digits-vit
data: {format: embedded, calibration: {rows: 32}, evaluation: {rows: 0-49}}
passes:
  - drop_layers: {mlp: [1]}
  - quantize: {weights: 8, activations: static}
export:
  - onnx: {openvino: false, dynamic: []}
measure: {repeats: 3, warmup: 1}
"""
ARTIFACTS = ("recipe.yaml", "model.safetensors", "kept.safetensors", "onnx/model.onnx")
PARTS = (
    "rows", "float blocks", "float reference", "float file onnx", "pass 1 drop_layers", "pass 2 quantize", "compressed model",
    "write onnx", "judge onnx",
)  # fmt: skip
KILLS = (
    ("naming", "recipe.yaml"), ("naming", "run.json"), ("naming", "float.npy"), ("after", "float reference"),
    ("naming", "model.onnx"), ("after", "pass 1 drop_layers"), ("before", "pass 2 quantize"), ("after", "pass 2 quantize"),
    ("naming", "kept.safetensors"), ("before", "write onnx"), ("after", "judge onnx"), ("naming", "manifest.json"),
    ("naming", "report.html"),
)  # fmt: skip


def content(out: Path) -> dict[str, bytes]:
    return {name: (out / name).read_bytes() for name in ARTIFACTS}


def runs(folder: Path, jobs: list[dict[str, Any]]) -> list[int]:
    """The exit statuses of jobs (see ``killed_runs.py``) of the recipe above."""
    (folder / "digits.yaml").write_text(RECIPE)
    (folder / "jobs.json").write_text(json.dumps(jobs))
    command = [sys.executable, str(Path(__file__).with_name("killed_runs.py")), "digits.yaml", "jobs.json"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    statuses: list[int] = json.loads(done.stdout.splitlines()[-1])
    return statuses


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three runs of one recipe: undisturbed; killed at every one of KILLS, one after the other; killed and then damaged."""
    folder = tmp_path_factory.mktemp("resume")
    checkpoint, file = f"{FOLDER}/pass-2/model.safetensors", "onnx/model.onnx"
    jobs = [
        {"out": "undisturbed"},
        *({"out": "killed", "at": at} for at in KILLS),
        {"out": "killed"},
        {"out": "damaged", "at": ["after", "pass 2 quantize"]},
        {"out": "damaged", "at": ["after", "write onnx"], "damage": checkpoint},
        {"out": "damaged", "damage": file},
    ]
    assert runs(folder, jobs) == [0, *[-signal.SIGKILL] * len(KILLS), 0, -signal.SIGKILL, -signal.SIGKILL, 0]
    return folder


def test_a_run_killed_at_every_stage_ends_with_the_bytes_of_an_undisturbed_one(folder: Path) -> None:
    assert content(folder / "killed") == content(folder / "undisturbed")


def test_the_report_of_a_resumed_run_gives_the_same_figures(folder: Path) -> None:
    def figures(name: str) -> dict[str, Any]:
        told = report.read(folder / name).model_dump(mode="json")
        rows = [*told["rows"], told["compressed"]]
        for row in rows:
            row["latency"], row["details"] = [], {}
        steps = [{key: value for key, value in step.items() if key != "seconds"} for step in told["steps"]]
        return {"rows": rows, "steps": steps} | {key: told[key] for key in ("data", "model", "blocks", "roles", "warnings")}

    assert figures("killed") == figures("damaged") == figures("undisturbed")


def test_nothing_that_was_finished_is_done_again_and_the_report_says_so(folder: Path) -> None:
    assert report.read(folder / "undisturbed").resumed == []
    killed = report.read(folder / "killed")
    assert killed.resumed == list(PARTS)
    assert set(PARTS) <= killed.seconds.keys(), "what a part took is told, whichever process it was made in"


def test_a_finished_run_leaves_nothing_unfinished(folder: Path) -> None:
    for name in ("undisturbed", "killed", "damaged"):
        assert [path.name for path in (folder / name).rglob("*") if path.name.startswith(".") or "part" in path.name] == []


def test_a_damaged_file_of_an_unfinished_run_is_made_again_and_not_trusted(folder: Path) -> None:
    assert content(folder / "damaged") == content(folder / "undisturbed")
    resumed = report.read(folder / "damaged").resumed
    assert "pass 2 quantize" in resumed
    assert "compressed model" in resumed
    assert "write onnx" not in resumed
    assert "judge onnx" not in resumed


class Stop(Progress):
    """Stops a run at a step, as Ctrl-C would, and hears what it says."""

    def __init__(self, at: str = "") -> None:
        self.at, self.notes, self.steps = at, list[str](), list[str]()

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        self.steps.append(name)
        if name == self.at:
            raise KeyboardInterrupt
        yield

    def note(self, line: str) -> None:
        self.notes.append(line)


MODEL = """\
import torch
from safetensors.torch import load_file
from pathlib import Path
from layers import Net

def make():
    model = Net()
    model.load_state_dict(load_file(Path(__file__).with_name("weights.safetensors")))
    return model, torch.rand(4, 8)
"""
LAYERS = """\
import torch

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = torch.nn.Linear(8, 8), torch.nn.Linear(8, 4)

    def forward(self, x):
        return self.second(torch.relu(self.first(x)))
"""
OWN = """\
model: mine.py:make
data: {format: arrays, calibration: {path: seen.npz, rows: all}, evaluation: {path: held.npz, rows: all}}
passes: []
export:
  - onnx: {openvino: false}
measure: {repeats: 3, warmup: 1}
"""


def project(folder: Path, **changed: int) -> Path:
    """A recipe with a model and data of its own; ``changed`` names what is to be another than usual."""
    names = {"first.weight": (8, 8), "first.bias": (8,), "second.weight": (4, 8), "second.bias": (4,)}
    generator = torch.Generator().manual_seed(changed.get("weights", 0))
    weights = {name: torch.randn(shape, generator=generator) for name, shape in names.items()}
    save_file(weights, folder / "weights.safetensors")
    for number, name in enumerate(("seen", "held")):
        x = np.random.default_rng(10 * number + changed.get(name, 0)).normal(size=(16, 8)).astype(np.float32)
        np.savez(folder / f"{name}.npz", x=x)
    (folder / "mine.py").write_text(MODEL)
    (folder / "layers.py").write_text(LAYERS + "# another\n" * changed.get("layers", 0))
    (folder / "own.yaml").write_text(OWN + f"seed: {changed.get('seed', 0)}\n")
    return folder / "own.yaml"


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({}, None),
        ({"seed": 1}, "the recipe changed"),
        ({"weights": 1}, "the weights changed"),
        ({"seen": 1}, "the calibration rows changed"),
        ({"held": 1}, "the evaluation rows changed"),
        ({"layers": 1}, "the program changed"),
        ({"seen": 1, "held": 1}, "the calibration rows and the evaluation rows changed"),
    ],
)
def test_a_run_goes_on_only_if_everything_is_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: dict[str, int], says: str | None
) -> None:
    monkeypatch.delitem(sys.modules, "layers", raising=False)
    stop = "onnx: float file, to compare with"
    with pytest.raises(KeyboardInterrupt):
        apply(read(project(tmp_path)), tmp_path / "out", trust=True, progress=Stop(stop))
    monkeypatch.delitem(sys.modules, "layers", raising=False)
    again = Stop(stop)
    with pytest.raises(KeyboardInterrupt):
        apply(read(project(tmp_path, **changed)), tmp_path / "out", trust=True, progress=again)
    monkeypatch.delitem(sys.modules, "layers", raising=False)
    assert ("float model: reference outputs" in again.steps) == (says is not None)
    if says is None:
        assert all(note.endswith("taken over") for note in again.notes)
    else:
        assert again.notes == [f"started again: {says} since the interrupted run"]


def test_it_runs_in_the_folder_of_the_model_where_modules_seem_to_lie_that_have_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``torch.classes`` says that its file is ``_classes.py``: relative, and nowhere."""
    assert str(torch.classes.__file__) == "_classes.py", "a control: the module that does so is there"
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "layers", raising=False)
    with pytest.raises(KeyboardInterrupt):
        apply(read(project(tmp_path)), tmp_path / "out", trust=True, progress=Stop("onnx: float file, to compare with"))


def test_a_report_says_that_a_run_started_again(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        apply(read(project(tmp_path)), tmp_path / "out", trust=True, progress=Stop("onnx: write"))
    made = apply(read(project(tmp_path, held=1)), tmp_path / "out", trust=True)
    assert made.resumed == []
    assert made.warnings == ["started again: the evaluation rows changed since the interrupted run"]
    again = apply(read(project(tmp_path, held=1)), tmp_path / "out", trust=True)
    assert (again.resumed, again.warnings) == ([], []), "a finished run is replaced, and nothing of it is taken over"


def test_fresh_takes_nothing_over(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        apply(read(project(tmp_path)), tmp_path / "out", trust=True, progress=Stop("onnx: write"))
    assert apply(read(project(tmp_path)), tmp_path / "out", trust=True, fresh=True).resumed == []


@pytest.mark.parametrize(("state", "key"), [("manifest.json", "recipe"), (f"{FOLDER}/run.json", "name")])
def test_the_run_of_another_recipe_is_not_overwritten(tmp_path: Path, state: str, key: str) -> None:
    (tmp_path / FOLDER).mkdir()
    (tmp_path / "recipe.yaml").write_text("")
    (tmp_path / state).write_text(json.dumps({key: "precious"}))
    with pytest.raises(UserError, match="holds a run of the recipe precious, this is mine") as refused:
        own(tmp_path, "mine")
    assert "--fresh" in refused.value.hint
    assert refused.value.exit_code == 2
    own(tmp_path, "precious")
    own(tmp_path, "mine", fresh=True)


def test_fresh_does_not_permit_a_folder_that_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="not a run folder"):
        own(tmp_path, "mine", fresh=True)


def test_a_folder_that_a_killed_run_had_only_begun_is_taken(tmp_path: Path) -> None:
    (tmp_path / LOCK).write_text("1")
    (tmp_path / FOLDER).mkdir()
    own(tmp_path, "mine")


HOLD = """\
import sys, time
from pathlib import Path
from compress.run_folder import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_run_in_a_folder_is_refused_until_the_first_is_gone(tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(out)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    try:
        with pytest.raises(UserError, match=f"process {holder.pid} is at work in this folder") as refused, locked(out):
            pytest.fail("two runs in one folder")
        assert refused.value.exit_code == 2
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()
    with locked(out):
        assert (out / LOCK).read_text() == str(os.getpid())
    assert list(out.iterdir()) == [], "the lock leaves nothing"


def test_an_interrupted_run_is_not_validated(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text("{}")
    (tmp_path / FOLDER).mkdir()
    with pytest.raises(UserError, match="not the folder of a finished run") as refused:
        validate(tmp_path)
    assert "interrupted" in refused.value.hint


def test_a_folder_that_was_made_for_nothing_goes(tmp_path: Path) -> None:
    with pytest.raises(UserError), locked(tmp_path / "runs" / "out"):
        raise UserError("", "refused")
    assert list(tmp_path.iterdir()) == []


COMMAND = """\
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from compress.cli import main
main()
"""


@pytest.mark.parametrize(
    ("sent", "code", "export", "at"),
    [
        (signal.SIGINT, 130, "onnx: {openvino: false, dynamic: []}", f"{FOLDER}/float-reference.part.json"),
        (signal.SIGTERM, 143, "tensorrt", "baseline/tensorrt/.building-*"),
    ],
)
def test_a_stopped_command_says_one_line_and_leaves_no_process(
    tmp_path: Path, sent: signal.Signals, code: int, export: str, at: str
) -> None:
    if export == "tensorrt":
        pytest.importorskip("tensorrt_rtx", reason="needs the extra tensorrt-rtx")
    import psutil

    (tmp_path / "digits.yaml").write_text(RECIPE.replace("onnx: {openvino: false, dynamic: []}", export))
    command = [sys.executable, "-c", COMMAND, "apply", "digits.yaml", "--out", "out"]
    run = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    family: list[psutil.Process] = []
    limit = time.monotonic() + 120
    while not list((tmp_path / "out").glob(at)) and run.poll() is None and time.monotonic() < limit:
        time.sleep(0.02)
    if export == "tensorrt":
        while not family and run.poll() is None and time.monotonic() < limit:
            family = psutil.Process(run.pid).children(recursive=True)
    run.send_signal(sent)
    said = run.communicate(timeout=60)[1]
    assert run.returncode == code, said
    assert said.splitlines()[-1] == "stopped; the same command goes on from here"
    assert "Traceback" not in said
    assert not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in family)
    with pytest.raises(KeyboardInterrupt):
        apply(read(tmp_path / "digits.yaml"), tmp_path / "out", progress=(again := Stop("pass 1 of 2: drop_layers")))
    assert "float model: reference outputs: taken over" in again.notes


def journal(out: Path) -> Journal:
    made = Journal(out, seed=3)
    if not made.begin("digits", {"the recipe": "1"}):
        made.start()
    return made


def made(path: Path, text: str) -> int:
    path.write_text(text)
    return len(text)


def test_a_part_is_made_once_and_again_only_when_its_files_are_not_its_own(tmp_path: Path) -> None:
    file = tmp_path / "file"
    assert journal(tmp_path).part("one", int, lambda: made(file, "abc"), makes=[file]) == 3
    again = journal(tmp_path)
    assert again.part("one", int, lambda: pytest.fail("made again"), makes=[file]) == 3
    assert again.resumed == ["one"]
    file.write_text("abd")
    assert journal(tmp_path).part("one", int, lambda: made(file, "abcd"), makes=[file]) == 4
    file.unlink()
    assert journal(tmp_path).part("one", int, lambda: made(file, "abcde"), makes=[file]) == 5


def test_what_followed_a_part_that_comes_out_otherwise_is_not_believed(tmp_path: Path) -> None:
    file = tmp_path / "file"
    for text, expected in (("first", 1), ("first", 1), ("other", 2)):
        file.unlink(missing_ok=True)
        again = journal(tmp_path)
        again.part("one", int, lambda text=text: made(file, text), makes=[file])  # type: ignore[misc]
        assert again.part("two", int, lambda expected=expected: expected) == expected  # type: ignore[misc]


def test_a_part_gives_the_same_whatever_ran_before_it(tmp_path: Path) -> None:
    def drawn() -> list[float]:
        return [float(torch.rand(())), float(np.random.random())]

    (tmp_path / "a").mkdir()
    first = journal(tmp_path / "a")
    values = [first.part(name, list[float], drawn) for name in ("one", "two", "three")]
    (tmp_path / "b").mkdir()
    assert journal(tmp_path / "b").part("three", list[float], drawn) == values[2]
    assert values[0] != values[1] != values[2]


def test_a_record_that_is_cut_off_counts_as_none(tmp_path: Path) -> None:
    journal(tmp_path).part("one", int, lambda: 1)
    record = next((tmp_path / FOLDER).glob("*.part.json"))
    record.write_text(record.read_text()[:-20])
    assert journal(tmp_path).part("one", int, lambda: 2) == 2
