"""Mistakes of a user, through the command line: each ends in one line *where: what* with a hint below it, exit code 2, and
nothing is written."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import struct
import sys
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from compress import cli
from compress.sources import settle_torchvision

settle_torchvision()
pytest.importorskip("onnxruntime", reason="needs the extra onnx")

DIGITS = """\
model: embedded:digits-vit
data: {format: embedded, calibration: {rows: 16}, evaluation: {rows: 0-15}}
passes: [quantize: {}]
export: [onnx]
measure: {repeats: 3, warmup: 0}
"""
TEXT = """\
model: hf:bert
data:
  format: text
  columns: {text: s, label: l}
  tokens: 12
  calibration: {path: a.tsv, rows: all}
  evaluation: {path: b.tsv}
passes: [quantize: {}]
export: [onnx]
"""
IMAGES = """\
model: hf:vit
data: {format: images, calibration: {path: a, rows: all}, evaluation: {path: b}}
passes: [quantize: {}]
export: [onnx]
"""
PARQUET = IMAGES.replace("images", "parquet").replace("path: a", "path: a.parquet").replace("path: b", "path: b.parquet")
ARRAYS = """\
model: embedded:digits-vit
data: {format: arrays, calibration: {path: a.npz, rows: 0-3}, evaluation: {path: b.npz}}
passes: [quantize: {}]
export: [onnx]
"""

Refused = Callable[..., None]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs ``compress`` in this process: exit code, what it printed, and what it complained of."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["compress", *arguments])
        with pytest.raises(SystemExit) as left:
            cli.main()
        told = capsys.readouterr()
        return int(left.value.code or 0), told.out, told.err

    return run


@pytest.fixture
def refused(command: Callable[..., tuple[int, str, str]], tmp_path: Path) -> Refused:
    """Checks that ``apply`` refuses a recipe by the law, and that ``plan``, asked for it too, says the same."""

    def run(recipe: str | bytes | None, says: str, *, plan: bool = False) -> None:
        path = tmp_path / "r.yaml"
        if recipe is not None:
            path.write_bytes(recipe if isinstance(recipe, bytes) else recipe.encode())
        before, told = contents(tmp_path), ""
        for arguments in (["plan", str(path)], ["apply", str(path), "--out", str(tmp_path / "runs" / "out"), "--quiet"])[
            not plan :
        ]:
            code, printed, err = command(*arguments)
            assert code == 2, err
            err = re.sub(
                r"(?m)^[^:\n]+: (stopped after )?[0-9.]+ s\n", "", err
            )  # progress, which plan cannot be asked not to show
            assert told == "" or told.split("\n")[::2] == err.split("\n")[::2], "both commands say the same"
            told = err
            assert printed == ""
            assert contents(tmp_path) == before, "nothing is written, no folder is left"
        one_line_each(told)
        told = told.replace(f"{tmp_path}/", "")
        assert re.search(says, told), told

    return run


def one_line_each(told: str) -> None:
    """The law: lines ``where: what``, each with an indented hint below it."""
    lines = told.rstrip("\n").split("\n")
    assert len(lines) % 2 == 0, told
    assert all(re.match(r"\S.*: \S", line) for line in lines[::2]), told
    assert all(re.match(r"  \S", line) for line in lines[1::2]), told
    assert "Traceback" not in told


def contents(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def test_a_recipe_in_order_is_carried_out(command: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    """Control: with nothing wrong the same command ends with 0; a file from Windows is nothing wrong."""
    text = DIGITS.replace("[onnx]", "[onnx: {openvino: false}]")
    (tmp_path / "r.yaml").write_bytes(text.replace("\n", "\r\n").encode("utf-8-sig"))
    code, printed, told = command("apply", str(tmp_path / "r.yaml"), "--out", str(tmp_path / "out"), "--quiet")
    assert (code, told) == (0, "")
    assert "onnx" in printed


# -- the recipe -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("quantize: {}", "quantize: {weigths: 8}", r"^r.yaml:3:21: unknown key 'weigths'\n  Did you mean weights\?"),
        ("measure:", "mesure:", r"^r.yaml:5:1: unknown key 'mesure'\n  Did you mean measure\?"),
        ("quantize: {}", "quantise", r"^r.yaml:3:10: 'quantise' is not the name of a pass\n  Did you mean quantize\?"),
        ("quantize: {}", "quantize: {group_size: 48}", r"^r.yaml:3:33: quantize: group_size 48 does not divide the 64 inputs of"
         r" blocks.0.attn.qkv\n  Divisors near it: 32, 64"),
        ("quantize: {}", "quantize: {sites: [attention.qurey]}", r"^r.yaml:3:\d+: quantize: .*'attention.qurey' matches nothing"
         r"\n  Nearest: attention.query"),
        ("quantize: {}", "quantize: {skip: ['blcks.*']}", r"^r.yaml:3:\d+: quantize: .*'blcks.\*' matches nothing\n  N"),
        ("[quantize: {}]", "[quantize: {weights: 8}, quantize: {sites: ['bloks.*']}]", r"^r.yaml:3:\d+: quantize: .*'bloks.\*' m"
         r"atches nothing\n  Nearest: blocks"),
        ("embedded:digits-vit", "{source: 'embedded:digits-vit', roles: {head: [haed]}}", r"^r.yaml:1:\d+: model.roles.head: patt"
         r"ern 'haed' matches nothing\n  Nearest: head"),
        ("embedded:digits-vit", "embedded:digits", r"^r.yaml:1:8: model: no embedded model 'digits'"),
        ("embedded:digits-vit", "hf:./bert", r"^r.yaml:1:8: hf:./bert: there is no such folder"),
        ("embedded:digits-vit", "hf:no/such/folder", r"^r.yaml:1:8: hf:no/such/folder: there is no such folder"),
        ("embedded:digits-vit", "hf:some/thing", r"^r.yaml:1:8: hf:some/thing: no such folder here, and the hub did not give it"),
        ("embedded:digits-vit", "mine.py:make", r"^r.yaml:1:8: model: there is no file mine.py"),
        ("embedded:digits-vit", "{source: 'timm:test_vit', checkpoint: w.pth}", r"^r.yaml:1:34: w.pth is not a safetensors file"),
        ("rows: 0-15", "rows: 0-999", r"^r.yaml:2:\d+: data.evaluation.rows: rows 0:1000 of 600 rows"),
        ("[onnx]", "[onyx]", r"^r.yaml:4:10: 'onyx' is not the name of an exporter\n  Did you mean onnx\?"),
        ("[onnx]", "[onnx: {dynamic: [tokns]}]", r"^r.yaml:4:\d+: export.dynamic: .*no dimension 'tokns'"),
    ],
)  # fmt: skip
def test_a_mistake_in_the_recipe(refused: Refused, old: str, new: str, says: str) -> None:
    assert old in DIGITS
    refused(DIGITS.replace(old, new, 1), says, plan=not old.startswith("rows: 0-15"))


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(9)
)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", r"^r.yaml:1:1: the file is empty"),
        (b"# nothing\n", r"^r.yaml:1:1: the file is empty"),
        (bytes(range(256)), r"^r.yaml:\d+:\d+: byte 0x80 is not UTF-8 text\n  Save the file as UTF-8"),
        (b"\x7fELF\x02\x01\x01\0" + bytes(1000), r"^r.yaml:1:1: character U\+007F is not allowed"),
        (DIGITS.encode("utf-16"), r"^r.yaml:1:1: byte 0xff is not UTF-8 text"),
        (DIGITS.encode("utf-16-le"), r"^r.yaml:1:2: character U\+0000 is not allowed in YAML"),
        (b"# x\n" * 2_500_000, r"^r.yaml:1:1: 10000000 bytes is too large for a recipe"),
        (BOMB.encode(), r"2:8: alias \*a is not allowed[\s\S]*r.yaml: and \d\d more faults\n  Correct these first"),
        (b"[" * 100_000, r"^r.yaml:1:25: nested deeper than 24 levels"),
        (b"a: [" + b"1, " * 50_000 + b"]", r"^r.yaml:1:\d+: more than 5000 values"),
        (b"model: !!python/object/apply:os.mkdir [ran]\n", r"^r.yaml:1:1: [\s\S]*1:8: the tag .*os.mkdir is not allowed"),
        (b"model: !!python/object/new:os.mkdir {args: [ran]}\n", r"1:8: the tag .*os.mkdir is not allowed"),
        (DIGITS.encode() + b"seed: 1\nseed: 2\n", r"^r.yaml:7:1: 'seed' appears twice\n  The first is on line 6"),
        (DIGITS.replace("export", "\texport").encode(), r"^r.yaml:4:1: a tab stands where YAML wants spaces"),
        (DIGITS.encode() + b"<<: {seed: 1}\n", r"^r.yaml:6:1: unknown key '<<'"),
        (DIGITS.encode() + b"accept: {metric_drop: .nan}\n", r"^r.yaml:6:23: .nan is not a finite number"),
        (DIGITS.encode() + b"accept: {metric_drop: -.inf}\n", r"^r.yaml:6:23: -.inf is not a finite number"),
        (DIGITS.encode() + b"seed: " + b"9" * 250 + b"\n", r"^r.yaml:6:7: seed is 9{60}, must be an integer from 0 to"),
        (DIGITS.encode() + b"seed: " + b"9" * 5000 + b"\n", r"^r.yaml:6:7: 9{40} is not a finite number"),
        (DIGITS.encode() + b"? [a, b]\n: 1\n", r"^r.yaml:6:3: a key must be text"),
        (DIGITS.encode() + b"---\nmodel: x\n", r"^r.yaml:6:1: a second document begins"),
        (b"- model: x\n", r"^r.yaml:1:1: a recipe is a mapping of keys to values"),
        (b"just words", r"^r.yaml:1:1: a recipe is a mapping of keys to values"),
    ],
)  # fmt: skip
def test_yaml_that_is_no_recipe(refused: Refused, tmp_path: Path, content: bytes, says: str) -> None:
    refused(content, says, plan=True)
    assert not Path("ran").exists()


def test_a_recipe_that_is_no_file(refused: Refused, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    refused(None, r"^r.yaml: no such recipe\n")
    path.mkdir()
    refused(None, r"^r.yaml: is a folder, a recipe is one YAML file")
    path.rmdir()
    os.mkfifo(path)
    refused(None, r"^r.yaml: is not a regular file")
    path.unlink()
    path.symlink_to(path)
    refused(None, r"^r.yaml: ")


# -- the model ------------------------------------------------------------------------------------------------------

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "film", "is", "good", "bad", "dog"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small text encoder with its tokenizer and a small vision transformer; tests copy what they change."""
    transformers = pytest.importorskip("transformers", reason="needs the extra hf")
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("models")
    sizes = {"vocab_size": 40, "max_position_embeddings": 24, "num_labels": 3}
    text = transformers.BertConfig(**SMALL, **sizes)
    transformers.BertForSequenceClassification(text).save_pretrained(folder / "bert")
    made = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=made, model_max_length=20, **special).save_pretrained(folder / "bert")
    image = transformers.ViTConfig(**SMALL, image_size=16, patch_size=4, num_labels=2)
    transformers.ViTForImageClassification(image).save_pretrained(folder / "vit")
    return folder


@pytest.fixture
def bert(models: Path, tmp_path: Path) -> Path:
    shutil.copytree(models / "bert", tmp_path / "bert")
    for name, rows in (("a", 12), ("b", 8)):
        lines = "".join(f"the film {name}{row} is {'good ' * (row % 3)}\t{row % 3}\n" for row in range(rows))
        (tmp_path / f"{name}.tsv").write_text(f"s\tl\n{lines}")
    return tmp_path / "bert"


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def reconfigure(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02cposix\nsystem\n")


def without_tokenizer(folder: Path) -> None:
    for file in folder.glob("*token*"):
        file.unlink()


WEIGHTS = "model.safetensors"
MODELS: dict[str, tuple[Callable[[Path], object], str]] = {
    "pickle": (pickled, r"^bert: its weights are a pickle .pytorch_model.bin., which is not read\n  Convert them where"),
    "cut in half": (
        lambda folder: os.truncate(folder / WEIGHTS, (folder / WEIGHTS).stat().st_size // 2),
        r"^bert/model.safetensors: is damaged or not a safetensors file .*\n  Copy or download it again",
    ),
    "cut to 5 bytes": (lambda folder: os.truncate(folder / WEIGHTS, 5), r"^bert/model.safetensors: is damaged or not"),
    "empty": (lambda folder: os.truncate(folder / WEIGHTS, 0), r"^bert/model.safetensors: is damaged or not"),
    "header of 2**62 bytes": (
        lambda folder: (folder / WEIGHTS).write_bytes(struct.pack("<Q", 2**62) + b"{}"),
        r"^bert/model.safetensors: is damaged or not a safetensors file .*header too large",
    ),
    "header of 100 MB": (
        lambda folder: (folder / WEIGHTS).write_bytes(struct.pack("<Q", 100_000_000) + b"{}"),
        r"^bert/model.safetensors: is damaged or not a safetensors file .*header",
    ),
    "another shape": (
        lambda folder: reconfigure(folder, intermediate_size=48),
        r"^bert: the weight bert.encoder.layer.0.intermediate.dense.bias is \[32\], by config.json it is \[48\]\n  The weights",
    ),
    "a layer less": (lambda folder: reconfigure(folder, num_hidden_layers=3), r"^bert: the weights lack bert.encoder.layer.2"),
    "a layer more": (lambda folder: reconfigure(folder, num_hidden_layers=1), r"^bert: the weights hold bert.encoder.layer.1"),
    "NaN": (
        lambda folder: rewrite(folder, lambda tensors: tensors["classifier.bias"].fill_(float("nan"))),
        r"^bert: the weight classifier.bias holds NaN or infinity\n  The file is damaged, or training diverged",
    ),
    "no config": (lambda folder: (folder / "config.json").unlink(), r"^bert: holds no config.json"),
    "config cut": (lambda folder: os.truncate(folder / "config.json", 9), r"^bert/config.json: is not JSON"),
    "config deep": (lambda folder: (folder / "config.json").write_text("[" * 100_000), r"^bert/config.json: is not JSON"),
    "config list": (lambda folder: (folder / "config.json").write_text("[]"), r"^bert/config.json: is not a JSON object"),
    "config of code": (
        lambda folder: reconfigure(folder, model_type="mine", auto_map={"AutoModel": "mine.Model"}),
        r"^bert/config.json: asks for code of its own, which is never run\n  Load it in a function of your own",
    ),
    "config of text": (lambda folder: reconfigure(folder, hidden_size="x"), r"^bert/config.json: is not a valid configuration"),
    "no tokenizer": (without_tokenizer, r"^r.yaml:3:11: bert has no tokenizer\n  Put its tokenizer.json into the model's folder"),
    "half a tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), r"^bert: its tokenizer cannot be read"),
    "index beyond": (
        lambda folder: (
            (folder / WEIGHTS).unlink(),
            (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../x.safetensors"}}'),
        ),
        r"^bert/model.safetensors.index.json: names ../x.safetensors, which is not in the folder",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", list(MODELS))
def test_a_model_that_cannot_be_used(refused: Refused, bert: Path, case: str) -> None:
    change, says = MODELS[case]
    change(bert)
    refused(TEXT, says, plan=True)


def test_a_checkpoint_of_timm_that_cannot_be_used(refused: Refused, tmp_path: Path) -> None:
    timm = pytest.importorskip("timm", exc_type=ImportError)
    text = DIGITS.replace("embedded:digits-vit", "{source: 'timm:test_vit', checkpoint: w.safetensors}")
    refused(text, r"^w.safetensors: there is no such file")
    (tmp_path / "w.safetensors").write_bytes(b"PK\x03\x04" + bytes(100))
    refused(text, r"^w.safetensors: is damaged or not a safetensors file")
    state = dict(timm.create_model("test_vit").state_dict())
    state["blocks.0.attn.qkv.weight"] = state["blocks.0.attn.qkv.weight"][:-1].contiguous()
    save_file(state, tmp_path / "w.safetensors")
    refused(text, r"^w.safetensors: blocks.0.attn.qkv.weight is \[191, 64\], the model has \[192, 64\]\n  It was saved from")


# -- the data -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "b", "says"),
    [
        (("text: s,", "text: sentence,"), None, r"^a.tsv:1: there is no column 'sentence'\n  There is: s, l"),
        (("label: l", "label: lable"), None, r"^a.tsv:1: there is no column 'lable'"),
        (("b.tsv", "c.tsv"), None, r"^r.yaml:7:22: there is no c.tsv .*\n  Nearest: "),
        (("b.tsv", "bert"), None, r"^r.yaml:3:3: bert is of no known kind of text"),
        (("b.tsv}", "b.tsv, rows: 4-99}"), None, r"^r.yaml:7:\d+: data.evaluation.rows: rows 4:100 of 8 rows"),
        (("format: text", "format: text\n  strict_splits: true"), b"s\tl\nthe film a3 is \t0\nx\t1\n",
         r"^r.yaml:8:\d+: 1 of the 2 evaluation rows are also calibration rows .the first is b.tsv:2.\n  Give each"),
        (("path: b.tsv", "path: a.tsv, rows: 3-5"), b"strict", r"^r.yaml:8:3: evaluation reads rows that calibration reads"),
        (("", ""), b"", r"^b.tsv: has no rows\n  The file is empty"),
        (("", ""), b"s\tl\n", r"^b.tsv: has no rows\n  The file is empty, or holds only a header"),
        (("", ""), b"s\tl\ncaf\xe9\t1\n", r"^b.tsv:2: is not UTF-8"),
        (("", ""), b"s\tl\na\t1\nb\n", r"^b.tsv:3: has 1 cells, the first line has 2"),
        (("", ""), b"s\tl\na\t1\nb\t7\n", r"^b.tsv:3: label '7' is not a class: the model has 3"),
        (("", ""), b"s\tl\na\t1\nb\t\n", r"^b.tsv:3: label '' is not one of"),
        (("b.tsv", "b.jsonl"), b'{"s": "x", "l": 1}\n{"s": \n', r"^b.jsonl:2: is not JSON"),
        (("b.tsv", "b.jsonl"), b"[" * 100_000, r"^b.jsonl:1: is not JSON"),
        (("b.tsv", "b.jsonl"), b'{"s": 5, "l": 1}\n', r"^b.jsonl:1: s is int, not text"),
        (("b.tsv", "b.csv"), b's,l\n"x,1\n', r"^b.csv:2: is not valid csv"),
    ],
)  # fmt: skip
def test_text_that_cannot_be_used(
    refused: Refused, bert: Path, tmp_path: Path, change: tuple[str, str], b: bytes | None, says: str
) -> None:
    text = TEXT.replace(*change, 1)
    if b == b"strict":
        text = text.replace("  tokens: 12\n", "  tokens: 12\n  strict_splits: true\n")
    elif b is not None:
        (tmp_path / (change[1] if change[1].startswith("b.") else "b.tsv")).write_bytes(b)
    refused(text, says)


def png(seed: int) -> bytes:
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def bomb() -> bytes:
    """A small file that says it holds 3.6 thousand million pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(999))) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (b"hello", "is not an image that can be read"),
        (b"", "is not an image that can be read"),
        (None, "is damaged"),
        (b"bomb", "is damaged .*decompression bomb"),
    ],
)
@pytest.mark.parametrize("kind", ["images", "parquet"])
def test_an_image_that_does_not_decode_is_named_with_its_row(
    refused: Refused, models: Path, tmp_path: Path, kind: str, raw: bytes | None, says: str
) -> None:
    pytest.importorskip("PIL", reason="needs the extra hf")
    shutil.copytree(models / "vit", tmp_path / "vit")
    images = {name: [png(seed * 10 + number) for number in range(4)] for seed, name in enumerate("ab")}
    images["b"][3] = {None: images["b"][3][:300], b"bomb": bomb()}.get(raw, raw or b"")
    for name, files in images.items():
        if kind == "images":
            for number, file in enumerate(files):
                folder = tmp_path / name / f"LABEL_{number // 2}"
                folder.mkdir(parents=True, exist_ok=True)
                (folder / f"{number}.png").write_bytes(file)
        else:
            parquet = pytest.importorskip("pyarrow.parquet")
            table = {"image": [{"bytes": file, "path": "x"} for file in files], "label": [0, 0, 1, 1]}
            parquet.write_table(pytest.importorskip("pyarrow").table(table), tmp_path / f"{name}.parquet")
    place = r"^b/LABEL_1/3.png: " if kind == "images" else r"^b.parquet: row 3: "
    refused(IMAGES if kind == "images" else PARQUET, f"{place}{says}.*\n  Repair or remove it")


def test_parquet_and_folders_that_cannot_be_used(refused: Refused, models: Path, tmp_path: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    shutil.copytree(models / "vit", tmp_path / "vit")
    for number, name in enumerate(("a", "b")):
        table = {"image": [{"bytes": png(4 * number + row), "path": "x"} for row in range(4)], "label": [0, 0, 1, 1]}
        parquet.write_table(arrow.table(table), tmp_path / f"{name}.parquet")
    named = PARQUET.replace("parquet,", "parquet, columns: {image: NAME},", 1)
    refused(named.replace("NAME", "label"), "^a.parquet: row 0: holds int, not the bytes of an image")
    refused(named.replace("NAME", "picture"), "^a.parquet: there is no column 'picture'\n")
    refused(PARQUET.replace("b.parquet", "c.parquet"), r"^r.yaml:2:\d+: there is no c.parquet .*\n  Nearest: ")
    nothing = {"image": arrow.array([], "binary"), "label": arrow.array([], "int64")}
    parquet.write_table(arrow.table(nothing), tmp_path / "b.parquet")
    refused(PARQUET, "^b.parquet: has no rows\n  Give a file with rows")
    os.truncate(tmp_path / "b.parquet", 100)
    refused(PARQUET, "^b.parquet: is not a parquet file that can be read")
    (tmp_path / "a" / "LABEL_0").mkdir(parents=True)
    (tmp_path / "a" / "LABEL_0" / "0.png").write_bytes(png(1))
    refused(IMAGES, r"^r.yaml:2:\d+: there is no b ")
    (tmp_path / "b").mkdir()
    refused(IMAGES, "^b: holds no images\n  Images end in")
    (tmp_path / "b" / "0.png").symlink_to(tmp_path / "nowhere.png")
    refused(IMAGES, "^b/0.png: is not a file that can be read\n  Repair or remove it")


def objects(path: Path) -> None:
    np.savez(path, pixels=np.array([{}] * 3, dtype=object))


def damaged(path: Path) -> None:
    np.savez_compressed(path, pixels=np.random.default_rng(0).random((40, 1, 8, 8), np.float32))
    raw = bytearray(path.read_bytes())
    raw[600:900] = b"\xff" * 300
    path.write_bytes(raw)


def boastful(path: Path) -> None:
    """A header that promises 25 TB of rows."""
    header = "{'descr': '<f4', 'fortran_order': False, 'shape': (99999999999, 1, 8, 8), }".ljust(117) + "\n"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("pixels.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode())


def saved(shape: tuple[int, ...], kind: Any = np.float32, fill: float = 0.0, labels: int = 0) -> Callable[[Path], None]:
    return lambda path: np.savez(path, pixels=np.full(shape, fill, kind), labels=np.arange(shape[0]) + labels)


@pytest.mark.parametrize(
    ("write", "says"),
    [
        (saved((0, 1, 8, 8)), "has no rows\n  Give a file with rows"),
        (saved((4, 1, 8, 8), fill=float("nan")), "row 0: the array pixels holds NaN or infinity"),
        (saved((4, 1, 8, 9)), r"array pixels is \[4, 1, 8, 9\], the model takes"),
        (saved((4, 1, 8, 8), complex), "array pixels is complex128, the model takes numbers"),
        (saved((4, 1, 8, 8), labels=8), "row 2: label 10 is not a class: the model has 10"),
        (objects, "the array pixels holds pickled objects, which are not read"),
        (damaged, r"row \d+: the array pixels is damaged"),
        (boastful, r"the array pixels says \[99999999999, 1, 8, 8\] and holds 0 bytes"),
        (lambda path: path.write_bytes(b"xx"), "is not an npz file that can be read"),
        (lambda path: np.savez(path, pixel=np.zeros(3)), "there is no column 'pixels'\n  Nearest: pixel"),
    ],
)
def test_arrays_that_cannot_be_used(refused: Refused, tmp_path: Path, write: Callable[[Path], object], says: str) -> None:
    saved((8, 1, 8, 8), fill=0.5)(tmp_path / "a.npz")
    write(tmp_path / "b.npz")
    refused(ARRAYS, f"^b.npz: {says}")


def test_overlapping_splits_are_a_warning_of_the_report(command: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    rows = np.random.default_rng(0).random((12, 1, 8, 8), np.float32)
    np.savez(tmp_path / "a.npz", pixels=rows[:8], labels=np.arange(8))
    np.savez(tmp_path / "b.npz", pixels=rows[6:], labels=np.arange(6))
    text = (
        ARRAYS.replace("rows: 0-3", "rows: all").replace("[onnx]", "[onnx: {openvino: false}]")
        + "measure: {repeats: 3, warmup: 0}\n"
    )
    (tmp_path / "r.yaml").write_text(text)
    code, printed, _ = command("apply", str(tmp_path / "r.yaml"), "--out", str(tmp_path / "out"), "--quiet")
    assert code == 0
    warning = "2 of the 6 evaluation rows were also calibration rows: the first is b.npz: row 0"
    assert f"warning: {warning}" in printed
    told = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [one.startswith(warning) for one in told["warnings"]].count(True) == 1
    assert told["data"]["rows_in_both_by_content"] == 2
