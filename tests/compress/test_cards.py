"""Model cards and programs: the programs give what the files give, on rows made from scratch; the cards say what was measured."""

from __future__ import annotations

import ast
import dataclasses
import json
import os
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from calibrate.fidelity import sqnr_db
from compress import cards, report
from compress.cards.program import plain_tokenizer
from compress.datasets import load_data
from compress.preparation import model_of
from compress.recipe import Recipe, read
from compress.run import apply
from compress.sources import Source
from export.validate import run_rows

for library, extra in (
    ("onnxruntime", "onnx"),
    ("coremltools", "coreml"),
    ("tensorrt_rtx", "tensorrt-rtx"),
    ("transformers", "hf"),
):
    pytest.importorskip(library, reason=f"needs the extra {extra}")
images = pytest.importorskip("PIL.Image", reason="needs the extra hf")
from test_sources_hf import GPT2, IMAGE, TEXT, add_tokenizer, save  # noqa: E402

STAND_INS = Path(__file__).with_name("stand_ins")
WORDS = ("the", "a", "film", "is", "was", "good", "bad", "it", "rains", "not", "dog", "cat")
OWN = """\
import torch

class Own(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.table, self.up, self.down = torch.nn.Embedding(9, 8), torch.nn.Linear(8, 32), torch.nn.Linear(32, 6)

    def forward(self, values, numbers, mask):
        hidden = torch.where(mask.unsqueeze(-1), values + self.table(numbers), 0.0)
        return self.down(torch.nn.functional.gelu(self.up(hidden)))

def make():
    return Own(), {"values": torch.rand(4, 5, 8), "numbers": torch.ones(4, 5, dtype=torch.int64),
                   "mask": torch.ones(4, 5, dtype=torch.bool)}
"""


@dataclasses.dataclass
class Run:
    """A finished run, and rows of its evaluation data as a user has them."""

    folder: Path
    recipe: Recipe
    source: Source
    given: list[str]
    """Arguments of the programs that stand for ``rows``."""
    rows: dict[str, torch.Tensor]
    """The same rows as the toolkit makes them."""

    @property
    def report(self) -> report.Report:
        return report.read(self.folder)

    def outputs(self, name: str) -> torch.Tensor:
        """What the toolkit's own runner of a file gives for ``rows``."""
        exporter = next(exporter for exporter in self.recipe.export if exporter.format == name)
        runner = exporter.open(self.folder / exporter.filename, 1)
        try:
            return run_rows(runner)(self.rows)
        finally:
            runner.close()

    def write(self, folder: Path | None = None, **changed: Any) -> list[Path]:
        told = self.report.model_copy(update=changed)
        return cards.write(folder or self.folder, told, self.recipe, self.source)


def sentences(count: int, seed: int) -> list[str]:
    draw = np.random.default_rng(seed)
    return [" ".join(draw.choice(WORDS, int(draw.integers(2, 9)))) for _ in range(count)]


def made(folder: Path, text: str, arguments: Callable[[Path], list[str]], take: Callable[[Any], Any]) -> Run:
    """Applies a recipe; ``take`` picks the rows of one batch of all evaluation rows that ``arguments`` stand for."""
    (folder / "recipe.yaml").write_text(text)
    recipe = read(folder / "recipe.yaml")
    apply(recipe, folder / "out", trust=True)
    source = model_of(recipe, True)
    evaluation = load_data(recipe, source).evaluation
    assert evaluation is not None
    batch = next(evaluation.batches(len(evaluation)))
    return Run(folder / "out", recipe, source, arguments(folder), take(batch))


def digits(folder: Path) -> Run:
    def rows(folder: Path) -> list[str]:
        np.savez(folder / "rows.npz", pixels=evaluated["pixels"].numpy())
        return [str(folder / "rows.npz")]

    def take(batch: Any) -> Any:
        evaluated.update({name: value[:5] for name, value in batch.items()})
        return evaluated

    evaluated: dict[str, torch.Tensor] = {}
    text = """\
model: embedded:digits-vit
data: {format: embedded, calibration: {rows: 32}, evaluation: {rows: 0-19}}
passes: [quantize: {weights: 8, activations: static}]
export: [onnx: {openvino: false}, coreml, tensorrt]
accept: {unvalidated: [tensorrt]}
measure: {repeats: 3, warmup: 1}
"""
    run = made(folder, text, lambda folder: [], take)
    return dataclasses.replace(run, given=rows(folder))


def bert(folder: Path) -> Run:
    save(folder / "bert", "BertForSequenceClassification", TEXT | {"id2label": {0: "bad", 1: "so so", 2: "good"}})
    add_tokenizer(folder / "bert")
    for name, count in (("train", 16), ("dev", 9)):
        lines = [f"{text}\t{number % 3}" for number, text in enumerate(sentences(count, count))]
        (folder / f"{name}.tsv").write_text("text\tlabel\n" + "\n".join(lines) + "\n")
    (folder / "rows.txt").write_text("\n".join(sentences(9, 9)[:5]) + "\n")
    text = """\
model: hf:bert
data:
  {format: text, columns: {text: text, label: label}, tokens: 12, calibration: {path: train.tsv}, evaluation: {path: dev.tsv}}
passes: [quantize: {weights: 8, activations: static}]
export: [onnx: {openvino: false, dynamic: [], batch: 2}, coreml, tensorrt: {profile: {batch: [2, 2, 4]}}]
accept: {unvalidated: [tensorrt]}
measure: {repeats: 3, warmup: 1}
""".replace("path: train.tsv}", "path: train.tsv, rows: all}")
    return made(folder, text, lambda folder: [str(folder / "rows.txt")], lambda batch: {k: v[:5] for k, v in batch.items()})


def sentence_pairs(folder: Path) -> Run:
    save(folder / "encoder", "BertModel", TEXT)
    add_tokenizer(folder / "encoder")
    for name, count in (("train", 8), ("dev", 6)):
        pairs = zip(sentences(count, count), sentences(count, 50 + count), strict=True)
        lines = [f"{one}\t{other}\t{number}" for number, (one, other) in enumerate(pairs)]
        (folder / f"{name}.tsv").write_text("a\tb\tscore\n" + "\n".join(lines) + "\n")
    pairs = list(zip(sentences(6, 6), sentences(6, 56), strict=True))
    (folder / "rows.txt").write_text("\n".join("\t".join(pair) for pair in pairs) + "\n")
    text = """\
model: {source: hf:encoder, task: sentence-embedding}
data:
  format: text
  columns: {text: a, pair: b, label: score}
  tokens: 12
  calibration: {path: train.tsv, rows: all}
  evaluation: {path: dev.tsv}
passes: []
export: [onnx: {openvino: false}]
measure: {repeats: 3, warmup: 1}
"""
    return made(folder, text, lambda folder: [str(folder / "rows.txt")], lambda batch: batch)


def vit(folder: Path) -> Run:
    save(folder / "vit", "ViTForImageClassification", IMAGE | {"id2label": {0: "cat", 1: "dog", 2: "owl"}})
    draw = np.random.default_rng(0)
    for number in range(12):
        part = folder / ("train" if number < 6 else "dev") / ("cat", "dog", "owl")[number % 3]
        part.mkdir(parents=True, exist_ok=True)
        pixels = draw.integers(0, 256, (18 + 3 * number, 40 - 2 * number, 3), np.uint8)
        images.fromarray(pixels).save(part / f"{number:02}.png")
    text = """\
model: hf:vit
data:
  format: images
  resize: 20
  crop: true
  interpolation: bicubic
  mean: [0.4, 0.5, 0.6]
  std: [0.2, 0.25, 0.3]
  calibration: {path: train, rows: all}
  evaluation: {path: dev}
passes: []
export: [onnx: {openvino: false}]
measure: {repeats: 3, warmup: 1}
"""
    return made(folder, text, lambda folder: [str(file) for file in sorted((folder / "dev").rglob("*.png"))], lambda batch: batch)


def causal(folder: Path) -> Run:
    save(folder / "gpt2", "GPT2LMHeadModel", GPT2)
    add_tokenizer(folder / "gpt2")
    draw = np.random.default_rng(1)
    for name in ("train", "dev"):
        (folder / f"{name}.txt").write_text(" ".join(draw.choice(WORDS, 40)))  # a word is a token: 4 rows of 10
    text = """\
model: hf:gpt2
data: {format: text, tokens: 10, calibration: {path: train.txt, rows: all}, evaluation: {path: dev.txt}}
passes: []
export: [onnx: {openvino: false}, tensorrt]
measure: {repeats: 3, warmup: 1}
"""
    return made(folder, text, lambda folder: [str(folder / "dev.txt")], lambda batch: {k: v[-1:] for k, v in batch.items()})


def own(folder: Path) -> Run:
    (folder / "own.py").write_text(OWN)
    draw = np.random.default_rng(2)
    for name, count in (("train", 8), ("dev", 5)):
        arrays = {"values": draw.normal(size=(count, 5, 8)), "numbers": draw.integers(0, 9, (count, 5)),
                  "mask": draw.random((count, 5)) > 0.4}  # fmt: skip
        np.savez(folder / f"{name}.npz", **arrays)
    text = """\
model: own.py:make
data: {format: arrays, calibration: {path: train.npz, rows: all}, evaluation: {path: dev.npz}}
passes: []
export: [onnx: {openvino: false}, tensorrt]
measure: {repeats: 3, warmup: 1}
"""
    return made(folder, text, lambda folder: [str(folder / "dev.npz")], lambda batch: batch)


FAMILIES = {"digits": digits, "bert": bert, "pairs": sentence_pairs, "vit": vit, "causal": causal, "own": own}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Run]:
    """The run of a family, made once; tests that change its folder copy it first."""
    found: dict[str, Run] = {}

    def run(name: str) -> Run:
        if name not in found:
            torch.manual_seed(0)
            found[name] = FAMILIES[name](tmp_path_factory.mktemp(name))
        return found[name]

    return run


def started(program: Path, *arguments: str, **environment: str) -> str:
    """What a program prints; it runs in its own process, in another folder, without this package's tests on its path."""
    ran = subprocess.run(
        [sys.executable, program, *arguments], capture_output=True, text=True, cwd="/", env={**os.environ, **environment}
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def answers(printed: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in printed.splitlines()]


def expected(run: Run, outputs: torch.Tensor) -> torch.Tensor:
    """The part of the outputs that a program tells: all of it, or for a language model the scores after the last token."""
    return outputs[:, -1] if run.source.task == "causal-lm" else outputs


@pytest.mark.parametrize("family", FAMILIES)
def test_the_onnx_program_gives_what_the_file_gives(runs: Callable[[str], Run], family: str) -> None:
    run = runs(family)
    told = answers(started(run.folder / "onnx/run.py", *run.given, "--json"))
    reference = expected(run, run.outputs("onnx"))
    outputs = torch.tensor([answer["output"] for answer in told])
    assert [answer["row"] for answer in told] == list(range(len(reference)))
    assert sqnr_db(reference, outputs) > 100, "the same file on the same rows: float32 rounding and nothing else"
    if family in ("digits", "bert", "vit"):
        assert [answer["class"] for answer in told] == reference.argmax(-1).tolist()
        assert [answer["label"] for answer in told] == [run.source.labels[int(row)] for row in reference.argmax(-1)]
        shares = reference.softmax(-1).amax(-1)
        assert sqnr_db(shares, torch.tensor([answer["probability"] for answer in told])) > 100
    if family == "causal":
        assert told[0]["token"] == int(reference.argmax())
        assert told[0]["text"] == run.source.tokenizer.raw.decode([told[0]["token"]])
    if family == "pairs":
        cosines = torch.cosine_similarity(reference[0::2], reference[1::2])
        assert sqnr_db(cosines, torch.tensor([answer["cosine"] for answer in told[0::2]])) > 100
        assert sqnr_db(torch.ones(len(told)), torch.tensor([answer["norm"] for answer in told])) > 100


def test_wrong_pixels_are_seen(runs: Callable[[str], Run], tmp_path: Path) -> None:
    """The control: with another filter, or another mean, the outputs are others."""
    run = runs("vit")
    for old, new in (("BICUBIC", "NEAREST"), ("0.4, 0.5, 0.6", "0.6, 0.5, 0.4")):
        copy = tmp_path / new[:4]
        shutil.copytree(run.folder / "onnx", copy)
        text = (copy / "run.py").read_text()
        assert old in text
        (copy / "run.py").write_text(text.replace(old, new))
        told = answers(started(copy / "run.py", *run.given, "--json"))
        assert sqnr_db(run.outputs("onnx"), torch.tensor([answer["output"] for answer in told])) < 60


def test_text_needs_transformers_only_where_the_file_is_not_all(runs: Callable[[str], Run], tmp_path: Path) -> None:
    """Where ``tokenizer.json`` says other things than the tokenizer of the run does, the program asks transformers, with the
    same result."""
    run = runs("bert")
    assert "transformers" not in (run.folder / "onnx/run.py").read_text()
    assert plain_tokenizer(run.source, run.folder) is not None
    shutil.copytree(run.folder, tmp_path / "run")
    stored = tmp_path / "run/source/tokenizer.json"
    whole = stored.read_text()
    stored.write_text(whole.replace('"good"', '"fine"'))
    assert stored.read_text() != whole
    assert plain_tokenizer(run.source, tmp_path / "run") is None
    run.write(tmp_path / "run")
    stored.write_text(whole)
    assert "tokenizers" not in (tmp_path / "run/onnx/run.py").read_text()
    told = answers(started(tmp_path / "run/onnx/run.py", *run.given, "--json"))
    assert sqnr_db(run.outputs("onnx"), torch.tensor([answer["output"] for answer in told])) > 100


@pytest.mark.parametrize("family", ["digits", "bert", "pairs", "causal"])
def test_without_arguments_it_runs_on_kept_rows(runs: Callable[[str], Run], family: str) -> None:
    run = runs(family)
    printed = started(run.folder / "onnx/run.py").splitlines()
    assert len(printed) == (8 if family == "pairs" else 4)
    told = answers(started(run.folder / "onnx/run.py", "--json"))
    if family == "digits":
        first = run.source.labels[told[0]["class"]]
        assert printed[0].startswith(f"row 0: {first} (")
        assert re.search(r"\(labelled \d\)$", printed[0])
    if family == "bert":
        assert printed[1].endswith("(labelled so so)")


def test_without_kept_rows_a_file_is_asked_for(runs: Callable[[str], Run], tmp_path: Path) -> None:
    run = runs("digits")
    shutil.copytree(run.folder, tmp_path / "bare")
    (tmp_path / "bare/kept.safetensors").unlink()
    run.write(tmp_path / "bare")
    for program in ("onnx/run.py", "tensorrt/run.py", "coreml/prepare.py"):
        ran = subprocess.run([sys.executable, tmp_path / "bare" / program], capture_output=True, text=True)
        assert ran.returncode == 2
        assert "give a file" in ran.stderr


@pytest.mark.parametrize(
    ("family", "program"), [("bert", "coreml/prepare.py"), ("bert", "tensorrt/run.py"), ("own", "tensorrt/run.py")]
)
def test_saved_rows_are_the_rows(runs: Callable[[str], Run], tmp_path: Path, family: str, program: str) -> None:
    from safetensors.torch import load_file

    run = runs(family)
    started(run.folder / program, *run.given, "--save", str(tmp_path / "rows.safetensors"))
    saved = load_file(tmp_path / "rows.safetensors")
    assert saved.keys() == {f"inputs.{name}" for name in run.rows}
    for name, value in run.rows.items():
        assert torch.equal(saved[f"inputs.{name}"], value.to(saved[f"inputs.{name}"].dtype)), name
        wanted = torch.int32 if program.startswith("coreml") else value.dtype
        assert saved[f"inputs.{name}"].dtype == wanted


def profile(run: Run) -> tuple[int, int]:
    low, _, high = next(row for row in run.report.rows if row.format == "tensorrt").details["profile"]["batch"]
    return low, high


@pytest.mark.parametrize("family", ["digits", "bert", "causal", "own"])
def test_the_tensorrt_program_moves_its_data_right(runs: Callable[[str], Run], family: str) -> None:
    """With stand-ins for the library and for CUDA, whose engine is the Q/DQ graph in ONNX Runtime. Five rows in pieces of two
    to four: the last piece is filled up, and what filled it is not told."""
    run = runs(family)
    stand_ins = {
        "PYTHONPATH": str(STAND_INS),
        "STAND_IN_GRAPH": str(run.folder / "tensorrt/model.qdq.onnx"),
        "STAND_IN_PROFILE": "{}-{}".format(*profile(run)),
    }
    told = answers(started(run.folder / "tensorrt/run.py", *run.given, "--json", **stand_ins))
    reference = expected(run, run.outputs("tensorrt"))
    assert len(told) == len(reference)
    assert sqnr_db(reference, torch.tensor([answer["output"] for answer in told])) > 100


@pytest.mark.gpu
def test_the_tensorrt_program_runs_on_the_gpu(runs: Callable[[str], Run]) -> None:
    pytest.importorskip("cuda.bindings", reason="needs cuda-python")
    run = runs("digits")
    if next(row for row in run.report.rows if row.format == "tensorrt").validated != "runtime":
        pytest.skip("needs an NVIDIA GPU that runs the engine")
    told = answers(started(run.folder / "tensorrt/run.py", *run.given, "--json"))
    assert sqnr_db(run.outputs("tensorrt"), torch.tensor([answer["output"] for answer in told])) > 60


def unknown_names(text: str, modules: dict[str, Any]) -> list[str]:
    """Attributes that a program asks of libraries and of their objects, and that those do not have."""
    return [
        f"{node.value.id}.{node.attr}"
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id in modules
        and not hasattr(modules[node.value.id], node.attr)
    ]


def test_the_names_of_the_tensorrt_program_exist(runs: Callable[[str], Run]) -> None:
    import tensorrt_rtx as trt

    modules = {"trt": trt, "runtime": trt.Runtime, "engine": trt.ICudaEngine, "context": trt.IExecutionContext}
    for family in ("bert", "causal", "own"):
        text = (runs(family).folder / "tensorrt/run.py").read_text()
        assert unknown_names(text, modules) == []
        assert unknown_names(text.replace("execute_async_v3", "execute_async_v9"), modules) == ["context.execute_async_v9"]
        names = {node.attr for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Attribute)}
        assert {"deserialize_cuda_engine", "set_tensor_address", "set_input_shape", "get_tensor_shape", "nptype"} <= names


def table(run: Run, path: Path) -> dict[str, str]:
    """What the C++ stand-in of the engine looks its rows up in; returns the environment that names it."""
    outputs = run.outputs("tensorrt").numpy()
    names = sorted(run.rows)
    keys = [b"".join(run.rows[name][row].numpy().tobytes() for name in names) for row in range(len(outputs))]
    numbers = [*profile(run), len(outputs), len(keys[0]), outputs[0].nbytes, outputs.ndim - 1, *outputs.shape[1:]]
    lines = b"".join(key + output.tobytes() for key, output in zip(keys, outputs, strict=True))
    path.write_bytes(struct.pack(f"<{len(numbers)}q", *numbers) + lines)
    return {"STAND_IN_TABLE": str(path), **{f"BYTES_{name}": str(run.rows[name].element_size()) for name in names}}


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
@pytest.mark.parametrize("family", ["bert", "causal"])
def test_the_cpp_program_tells_what_the_python_one_tells(runs: Callable[[str], Run], tmp_path: Path, family: str) -> None:
    """Compiled against stand-ins whose engine knows the right rows only; a wrong byte gives what is not a number."""
    run, program, rows = runs(family), tmp_path / "run", tmp_path / "rows.safetensors"
    compiler = ["g++", "-std=c++17", "-Wall", "-Wextra", "-Werror", f"-I{STAND_INS}"]
    subprocess.run([*compiler, run.folder / "tensorrt/run.cpp", "-o", program], check=True)
    started(run.folder / "tensorrt/run.py", *run.given, "--save", str(rows))
    environment = {**os.environ, **table(run, tmp_path / "table")}
    ran = subprocess.run([program, rows], cwd=run.folder / "tensorrt", capture_output=True, text=True, env=environment)
    assert ran.returncode == 0, ran.stderr
    reference = expected(run, run.outputs("tensorrt"))
    found = [re.fullmatch(r"row (\d+): (?:next token )?(.*) \(([\d.]+) %\)", line) for line in ran.stdout.splitlines()]
    assert len(found) == len(reference)
    for line, scores in zip(found, reference, strict=True):
        assert line is not None, ran.stdout
        best = int(scores.argmax())
        assert line[2] == (run.source.labels[best] if family == "bert" else str(best))
        assert float(line[3]) == pytest.approx(100 * float(scores.softmax(0)[best]), abs=0.006)
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(rows.read_bytes()[:100])
    ran = subprocess.run([program, broken], cwd=run.folder / "tensorrt", capture_output=True, text=True, env=environment)
    assert (ran.returncode, ran.stdout) == (1, "")


def balanced(text: str) -> bool:
    """Whether brackets and quotes of a Swift text close in order; interpolations in strings are looked into."""
    text = re.sub(r"//[^\n]*", "", text)
    waiting: list[str] = []
    closing = {"(": ")", "[": "]", "{": "}"}
    index = 0
    while index < len(text):
        letter, inside = text[index], bool(waiting) and waiting[-1] == '"'
        if inside and text.startswith("\\(", index):
            waiting.append(")")
            index += 1
        elif inside and letter == "\\":
            index += 1
        elif letter == '"':
            waiting.pop() if inside else waiting.append('"')
        elif inside:
            pass
        elif letter in closing:
            waiting.append(closing[letter])
        elif letter in closing.values() and (not waiting or waiting.pop() != letter):
            return False
        index += 1
    return not waiting


@pytest.mark.parametrize("family", ["digits", "bert"])
def test_the_swift_program_is_filled_in(runs: Callable[[str], Run], family: str) -> None:
    run = runs(family)
    text = (run.folder / "coreml/Run.swift").read_text()
    assert balanced(text)
    assert not balanced(text.replace("struct Rows {", "struct Rows"))
    assert not balanced(text.replace('"labels.txt"', '"labels.txt'))
    for spec in run.source.signature.inputs:
        kind = "floats" if spec.dtype.is_floating_point else "integers"
        assert f'rows.{kind}("inputs.{spec.name}")' in text
        assert f'"{spec.name}": MLFeatureValue(multiArray: batch(' in text
    assert 'static let output = "logits"' in text


@pytest.mark.parametrize("family", FAMILIES)
def test_the_written_text_is_neat_and_names_no_place(runs: Callable[[str], Run], tmp_path: Path, family: str) -> None:
    run = runs(family)
    before = {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file()}
    written = run.write()
    formats = {exporter.format for exporter in run.recipe.export}
    assert {path.parent.name for path in written if path.name == "README.md"} == formats
    for path in written:
        text = path.read_text()
        assert before[path] == path.read_bytes(), "the run wrote it, and writing it again gives the same bytes"
        assert str(run.folder.parent) not in text
        assert str(Path.home()) not in text
        assert not re.search(r"[ \t]\n|\n\n\n\n", text), path
        assert "Undefined" not in text
    assert {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file()} == before
    programs = tmp_path / "programs"
    for path in written:
        if path.suffix == ".py":
            (programs / path.parent.name).mkdir(parents=True)
            shutil.copy(path, programs / path.parent.name)
    for command in (["check", "--select", "E,F,I,UP,B,RET,PIE"], ["format", "--check"]):
        ruff = [sys.executable, "-m", "ruff", *command, "--isolated", "--line-length", "130", str(programs)]
        ran = subprocess.run(ruff, capture_output=True, text=True)
        assert ran.returncode == 0, ran.stdout


def test_hostile_names_stay_text(runs: Callable[[str], Run], tmp_path: Path) -> None:
    run = runs("digits")
    shutil.copytree(run.folder, tmp_path / "run")
    labels = {number: f'{number}"\n*/ | `' for number in range(10)}
    source = dataclasses.replace(run.source, name='x"""\n*/ print(1) | \\', labels=labels)
    for path in cards.write(tmp_path / "run", run.report, run.recipe, source):
        if path.suffix == ".py":
            ast.parse(path.read_text())
        if path.suffix == ".swift":
            assert balanced(path.read_text())
        if path.name == "labels.txt":
            assert len(path.read_text().splitlines()) == 10
        if path.name == "README.md":
            assert yaml.safe_load(path.read_text().split("---\n")[1])["model-index"][0]["name"] == source.name
    assert len(answers(started(tmp_path / "run/onnx/run.py", "--json"))) == 4


def card(run: Run, name: str) -> str:
    return (run.folder / name / "README.md").read_text()


@pytest.mark.parametrize("name", ["onnx", "coreml", "tensorrt"])
def test_a_card_says_what_the_report_says(runs: Callable[[str], Run], name: str) -> None:
    run = runs("digits")
    text, row = card(run, name), next(row for row in run.report.rows if row.format == name)
    front = yaml.safe_load(text.split("---\n")[1])
    assert front["library_name"] == name
    assert "license" not in front, "it is not known"
    assert front["model-index"][0]["results"][0]["metrics"][0]["value"] == row.metric.value
    for heading in (
        "Model details",
        "Intended use",
        "How it was made",
        "Figures",
        "How it was validated",
        "Limits",
        "How to run it",
    ):
        assert f"\n## {heading}\n" in text
    ends = f"[{row.metric.low:.4f}, {row.metric.high:.4f}]"
    assert f"| {row.metric.value:.4f} {ends} |" in text
    assert f"| {row.drop.value:+.4f} [{row.drop.low:+.4f}, {row.drop.high:+.4f}] |" in text
    assert f"| {row.sqnr_db:.1f} dB |" in text
    assert f"{row.size_bytes:,} bytes" in text
    assert "[report.html](../report.html)" in text
    assert run.report.model["fingerprint"] in text
    manifest = json.loads((run.folder / "manifest.json").read_text())
    assert manifest["files"][row.path]["sha256"] in text
    assert all(f"{library} {version}" in text for library, version in manifest["versions"].items())
    said = {
        "onnx": "In its own runtime",
        "coreml": "By an interpreter, not by Core ML",
        "tensorrt": "By a proxy, not by TensorRT",
    }
    if row.validated != "runtime":
        assert "time not measured: " in text
    assert said[name] in text or row.validated == "runtime"
    assert len([line for line in text.splitlines() if line.startswith("| ") and line.count("|") < 3]) == 0


def test_a_card_says_how_rows_are_made(runs: Callable[[str], Run]) -> None:
    assert "the shorter edge of an image becomes 20, then 16 x 16 is cut out of the middle; pixels" in card(runs("vit"), "onnx")
    assert "mean [0.4, 0.5, 0.6] and std [0.2, 0.25, 0.3]" in card(runs("vit"), "onnx")
    assert "The file takes exactly 2 rows at a time. A text is padded or cut to 12 tokens" in card(runs("bert"), "onnx")
    assert "The file takes 2 to 4 rows at a time." in card(runs("bert"), "tensorrt")
    assert "two rows for a pair" in card(runs("pairs"), "onnx")
    assert "10 tokens of running text, without special tokens" in card(runs("causal"), "onnx")
    assert "`pixels`: value / 8 - 1, in [-1, 1]" in card(runs("digits"), "coreml")
    assert "| `mask` | bool | [batch, 5] |" in card(runs("own"), "onnx")


FIGURES = (
    "metric",
    "drop",
    "agreement",
    "sqnr_db",
    "sqnr_to_compressed_db",
    "size_bytes",
    "size_ratio",
    "latency",
    "checks",
    "audit",
)


@pytest.mark.parametrize("changed", FIGURES)
def test_another_figure_makes_another_card(runs: Callable[[str], Run], tmp_path: Path, changed: str) -> None:
    """The control: every number of the report that a card is to tell reaches it."""
    run = runs("digits")
    shutil.copytree(run.folder, tmp_path / "run")
    row = run.report.rows[1]
    assert row.format == "onnx"

    def text(value: Any) -> str:
        rows = [found.model_copy(update={changed: value}) if found is row else found for found in rows_of]
        run.write(tmp_path / "run", rows=rows)
        return (tmp_path / "run/onnx/README.md").read_text()

    rows_of = [row if found.format == "onnx" else found for found in run.report.rows]
    same, value = text(getattr(row, changed)), getattr(row, changed)
    assert same == card(run, "onnx")
    if isinstance(value, report.Figure):
        others = [value.model_copy(update={end: getattr(value, end) + 0.01}) for end in ("value", "low", "high")]
    elif changed == "latency":
        fields = ("median_ms", "low_ms", "high_ms", "float_median_ms", "ratio", "ratio_low", "ratio_high")
        others = [[value[0].model_copy(update={name: 77.7})] for name in fields]
    elif changed == "checks":
        others = [[value[0].model_copy(update={"passed": False})]]
    elif changed == "audit":
        others = [value.model_copy(update={"equal": 3}), value.model_copy(update={"float_layers": ["other"]})]
    else:
        others = [value + 1, None] if changed != "size_bytes" else [value + 1]
    assert all(text(other) != same for other in others)
    if changed in ("metric", "drop", "agreement", "latency"):
        assert "not measured" in text([] if changed == "latency" else None)


def test_missing_figures_say_why(runs: Callable[[str], Run], tmp_path: Path) -> None:
    run = runs("digits")
    shutil.copytree(run.folder, tmp_path / "run")
    rows = [
        report.Row(
            label=row.label, format=row.format, path=row.path, validated="none", size_bytes=9, note="evaluation was switched off"
        )
        for row in run.report.rows[1:]
    ]
    run.write(tmp_path / "run", rows=rows, limits=[], data={**run.report.data, "evaluation": None})
    for name in ("onnx", "coreml", "tensorrt"):
        text = (tmp_path / "run" / name / "README.md").read_text()
        assert "Nothing was measured: evaluation was switched off." in text
        assert "Not run: evaluation was switched off." in text
        assert "model-index" not in text
    unlabelled = card(runs("own"), "onnx")
    assert "the rows have no labels, so there is no task metric" in unlabelled
    assert "the output holds no classes" in unlabelled


def test_warnings_undone_passes_and_paths(runs: Callable[[str], Run], tmp_path: Path) -> None:
    run = runs("digits")
    shutil.copytree(run.folder, tmp_path / "run")
    told = run.report
    step = told.steps[0].model_copy(update={"undone": True, "says": "taken back: it brought nothing"})
    model = {**told.model, "notes": ["random weights (seed 0): no checkpoint was given"]}
    data = {**told.data, "evaluation": {**told.data["evaluation"], "path": "/data/secret/place/dev.npz"}}
    run.write(tmp_path / "run", warnings=["3 rows are in both splits"], steps=[step], model=model, data=data)
    text = (tmp_path / "run/onnx/README.md").read_text()
    assert "- Warning of the run: 3 rows are in both splits" in text
    assert "(taken back)" in text
    assert "taken back: it brought nothing" in text
    assert "after no pass" in text
    assert "random weights" in text
    assert "dev.npz" in text
    assert "secret" not in text
    assert "[report.html](../report.html)" in text
