"""A disk that is full, read-only or closed ends a run in one line; when there is room the same command goes on. For real: a small
tmpfs, and permissions that hold for this process too."""

from __future__ import annotations

import ctypes
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

for library, extra in (("onnxruntime", "onnx"), ("coremltools", "coreml"), ("tensorrt_rtx", "tensorrt-rtx")):
    pytest.importorskip(library, reason=f"needs the extra {extra}")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs tmpfs and Linux capabilities")

RECIPE = """\
model: embedded:digits-vit
data: {format: embedded, calibration: {rows: 16}, evaluation: {rows: 0-15}}
passes: [quantize: {}]
export: [onnx, coreml, tensorrt]
measure: {repeats: 3, warmup: 0}
"""
KILOBYTES = ["100", "700", "1300", "2500", "5000", "5500", "9700", "40000"]
FREE = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).resolve().parents[2])}


def one_line(told: str) -> None:
    assert re.fullmatch(r"\S[^\n]*: \S[^\n]*\n  \S[^\n]*\n", told), told


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("disk")
    (folder / "disk").mkdir()
    (folder / "r.yaml").write_text(RECIPE)
    alone = [] if os.geteuid() == 0 else ["unshare", "--user", "--map-root-user", "--mount"]
    if alone and not shutil.which("unshare"):
        pytest.skip("needs root or unshare to mount a tmpfs")
    tried = subprocess.run(
        [*alone, "sh", "-c", f"mount -t tmpfs tmpfs {folder}/disk && umount {folder}/disk"], capture_output=True
    )
    if tried.returncode:
        pytest.skip(f"a tmpfs cannot be mounted here: {tried.stderr.decode(errors='replace').strip()}")
    program = str(Path(__file__).with_name("disk_jobs.py"))
    command = [*alone, sys.executable, program, str(folder / "r.yaml"), str(folder / "disk"), *KILOBYTES]
    done = subprocess.run(command, capture_output=True, text=True, env=FREE)
    assert done.returncode == 0, done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(answers: list[dict[str, Any]]) -> None:
    full = [answer for answer in answers[: len(KILOBYTES)] if answer["code"]]
    assert len(full) >= 4, "it must be full at several stages of a run"
    for answer in full:
        assert answer["code"] == 2, answer["told"]
        one_line(answer["told"])
        assert re.search(
            r"/disk/run: the disk is full: \d+\.\d\d MB are free, .*\n  Make room; the same command goes on", answer["told"]
        )
        assert answer["unfinished"] == []
        assert answer["printed"] == ""


def test_with_room_the_same_command_goes_on_to_the_end(answers: list[dict[str, Any]]) -> None:
    last = answers[len(KILOBYTES) - 1]
    assert (last["code"], last["told"], last["unfinished"]) == (0, "", [])
    assert all(name in last["printed"] for name in ("onnx", "coreml", "tensorrt"))


def test_a_read_only_disk_is_one_line(answers: list[dict[str, Any]]) -> None:
    for answer in answers[len(KILOBYTES) :]:
        assert answer["code"] == 2, answer["told"]
        one_line(answer["told"])
        assert "read-only file system" in answer["told"].lower().replace("the file system is read-only", "read-only file system")


@pytest.fixture(scope="module")
def closed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders that may not be written or entered, a file, and links to nowhere and to themselves."""
    folder = tmp_path_factory.mktemp("closed")
    (folder / "r.yaml").write_text(RECIPE)
    (folder / "file").write_text("x")
    (folder / "dangling").symlink_to(folder / "nowhere" / "at all")
    (folder / "loop").symlink_to(folder / "loop")
    (folder / "secret.yaml").write_text(RECIPE)
    (folder / "secret.yaml").chmod(0)
    for name, mode in (("unwritable", 0o555), ("closed", 0)):
        (folder / name).mkdir()
        (folder / name).chmod(mode)
    return folder


PROGRAM = """
import json, sys
sys.path.insert(0, sys.argv[1])
import disk_jobs
print(json.dumps([disk_jobs.command(*arguments) for arguments in json.loads(sys.argv[2])]))
"""


def obedient() -> None:
    """Permissions hold for root too: takes the capabilities that override them from what this process may start."""
    for capability in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
        ctypes.CDLL(None).prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP


def test_a_folder_that_cannot_be_used_is_one_line(closed: Path) -> None:
    told = "cannot be a run folder"
    outs = {
        "unwritable": f"{told}: permission denied",
        "unwritable/run": f"{told}: permission denied",
        "closed": f"{told}: permission denied",
        "closed/run": f"{told}: permission denied",
        "file": "is a file",
        "file/run": f"{told}: not a directory",
        "dangling": f"{told}: file exists",
        "loop/run": f"{told}: too many levels of symbolic links",
        "n" * 300: f"{told}: file name too long",
    }
    recipe = str(closed / "r.yaml")
    cases = [(["apply", recipe, "--out", str(closed / out), "--quiet"], out, says) for out, says in outs.items()]
    cases += [
        (["apply", str(closed / "secret.yaml")], "secret.yaml", "cannot be read: Permission denied"),
        (["validate", str(closed / "closed")], "closed", "is not the folder of a finished run"),
        (["report", str(closed / "closed")], "closed", "holds no report.json"),
    ]
    before = sorted(str(path) for path in closed.iterdir())
    here = str(Path(__file__).parent)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, here, json.dumps([case[0] for case in cases])],
        capture_output=True,
        text=True,
        env=FREE,
        preexec_fn=obedient if os.geteuid() == 0 else None,
    )
    assert done.returncode == 0, done.stderr
    for (_, name, says), answer in zip(cases, json.loads(done.stdout), strict=True):
        assert answer["code"] == 2, (name, answer["told"])
        one_line(answer["told"])
        assert answer["told"].startswith(f"{closed / name}: {says}"), (name, answer["told"])
    assert sorted(str(path) for path in closed.iterdir()) == before
