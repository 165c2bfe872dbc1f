"""Sources that need no library: the embedded model and the user's own file; and names that lead nowhere."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from calibrate.errors import UserError
from calibrate.fidelity import sqnr_db
from compress import sources
from compress.sources import Source, load_model, rebuild_model

NET = """
import torch
from torch import nn

from words import VOCABULARY


class Net(nn.Module):
    def __init__(self, classes=3):
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, 8)
        self.head = nn.Linear(8, classes)

    def forward(self, ids, mask):
        states = self.table(ids) * mask.unsqueeze(-1)
        return {"logits": self.head(states.mean(1))}


def text():
    return Net(), {"ids": torch.randint(0, VOCABULARY, (2, 7)), "mask": torch.ones(2, 7, dtype=torch.long)}


def image():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 5)), torch.randn(2, 3, 8, 8)


def pair():
    class Two(nn.Module):
        def forward(self, left, right):
            return left + right, left

    return Two(), (torch.randn(3, 4), torch.randn(3, 4))


def half():
    return Net().half(), text()[1]


def nan():
    net = Net()
    net.head.bias.data[0] = float("nan")
    return net, text()[1]


def no_pair():
    return Net()


def wrong_example():
    return Net(), {"ids": "words"}


def wrong_batch():
    return Net(), {"ids": torch.zeros(2, 7).long(), "mask": torch.zeros(3, 7).long()}


def unlike():
    return Net(), {"ids": torch.zeros(2, 7).long(), "other": torch.zeros(2, 7).long()}


def scalar():
    class Sum(nn.Module):
        def forward(self, x):
            return x.sum()

    return Sum(), torch.randn(2, 3)


def text_out():
    class Text(nn.Module):
        def forward(self, x):
            return "x"

    return Text(), torch.randn(2, 3)


def raises():
    raise RuntimeError("the weights are not here\\nsecond line")
"""


@pytest.fixture
def base(tmp_path: Path) -> Path:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "net.py").write_text(NET)
    (tmp_path / "models" / "words.py").write_text("VOCABULARY = 50\n")
    return tmp_path


def rebuilt(source: Source, run: Path) -> float:
    """SQNR of the rebuilt model with the weights put in, against the model itself."""
    source.save_files(run / "source")
    model = rebuild_model(source.rebuild, run, trust=True)
    model.load_state_dict(source.model.state_dict())
    batch = source.example()
    return sqnr_db(source.signature.call(source.model, batch), source.signature.call(model, batch))


def user(base: Path, function: str, **options: Any) -> Source:
    return load_model(f"models/net.py:{function}", base=base, trust=True, **options)


def test_embedded(tmp_path: Path) -> None:
    source = load_model("embedded:digits-vit", base=tmp_path)
    assert (source.name, source.task, source.classes) == ("digits-vit", "image-classification", 10)
    assert source.signature.call(source.model, source.example()).shape == (4, 10)
    assert not source.model.training
    assert rebuilt(source, tmp_path) == float("inf")
    assert len(source.fingerprint) == 64


def test_a_file_is_not_run_without_leave(base: Path) -> None:
    (base / "models" / "net.py").write_text("raise SystemExit('was run')\ndef text(): ...\n")
    with pytest.raises(UserError, match=r"would run text\(\) in .*net.py, which needs leave\n.*--trust"):
        load_model("models/net.py:text", base=base)


def test_a_function_gives_module_and_inputs(base: Path) -> None:
    source = user(base, "text")
    assert [(spec.name, spec.shape) for spec in source.signature.inputs] == [
        ("ids", ("batch", "tokens")),
        ("mask", ("batch", "tokens")),
    ]
    assert (source.task, source.classes) == ("text-classification", 3)
    assert source.signature.call(source.model, source.example()).shape == (4, 3)
    assert not source.model.training


def test_a_tensor_and_a_tuple_take_the_names_of_forward(base: Path) -> None:
    image = user(base, "image")
    assert [(spec.name, spec.shape) for spec in image.signature.inputs] == [("input", ("batch", 3, 8, 8))]
    assert (image.task, image.classes) == ("image-classification", 5)
    pair = user(base, "pair")
    assert pair.signature.names == ("left", "right")
    assert pair.task == "features"
    assert user(base, "image", task="features").classes is None


def test_weights_become_float32(base: Path) -> None:
    assert {tensor.dtype for tensor in user(base, "half").model.state_dict().values()} == {torch.float32}


def test_random_weights_follow_the_seed(base: Path) -> None:
    assert user(base, "text", seed=1).fingerprint == user(base, "text", seed=1).fingerprint
    assert user(base, "text", seed=1).fingerprint != user(base, "text", seed=2).fingerprint


def test_the_fingerprint_changes_with_the_file(base: Path) -> None:
    before = user(base, "text").fingerprint
    (base / "models" / "net.py").write_text(NET + "\n# changed\n")
    assert user(base, "text").fingerprint != before


def test_a_file_is_rebuilt_from_the_original_or_from_its_copy(base: Path) -> None:
    run = base / "runs" / "a"
    run.mkdir(parents=True)
    (run / "manifest.json").write_text('{"base": "../.."}')
    source = user(base, "text")
    assert rebuilt(source, run) == float("inf")  # imports words.py beside the original
    with pytest.raises(UserError, match="needs leave"):
        rebuild_model(source.rebuild, run)
    (base / "models" / "net.py").write_text("raise RuntimeError('changed')")
    (run / "source" / "words.py").write_text("VOCABULARY = 50\n")
    sys.modules.pop("words", None)
    assert rebuilt_copy(source, run) == float("inf")


def rebuilt_copy(source: Source, run: Path) -> float:
    model = rebuild_model(source.rebuild, run, trust=True)
    model.load_state_dict(source.model.state_dict())
    batch = source.example()
    return sqnr_db(source.signature.call(source.model, batch), source.signature.call(model, batch))


@pytest.mark.parametrize(
    ("function", "says"),
    [
        ("txt", r"defines no function 'txt'\n  Nearest: text"),
        ("no_pair", r"models/net.py:no_pair: returned Net\n  Return \(module, example_inputs\)"),
        ("wrong_example", "not tensors that fit forward"),
        ("wrong_batch", r"input mask is \[3, 7\]"),
        ("unlike", "the model fails on its example inputs: TypeError"),
        ("scalar", r"the output is \[\] for 2 rows"),
        ("text_out", "the model returns str"),
        ("raises", r"net.py:\d+: RuntimeError: the weights are not here\n  The file raised this"),
        ("nan", "the weight head.bias holds NaN"),
    ],
)
def test_what_a_file_does_wrong_is_told_in_one_line(base: Path, function: str, says: str) -> None:
    with pytest.raises(UserError, match=says) as caught:
        user(base, function)
    assert "\n" not in caught.value.what


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("embedded:digits", "no embedded model 'digits'\n  There is: embedded:digits-vit"),
        ("models", "names no source of models\n  For a folder of a Hugging Face model write hf:models"),
        ("nothing", "names no source"),
        ("models/net.py", "names no function"),
        ("models/nt.py:text", "there is no file models/nt.py\n  Nearest: net.py"),
        ("none/net.py:text", "there is no file none/net.py"),
    ],
)
def test_names_that_lead_nowhere(base: Path, source: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        load_model(source, base=base, trust=True)


def test_options_that_do_not_apply(base: Path) -> None:
    with pytest.raises(UserError, match=r"model.checkpoint: does not apply"):
        load_model("embedded:digits-vit", base=base, checkpoint=Path("x.safetensors"))
    with pytest.raises(UserError, match="unknown task 'classification'"):
        load_model("embedded:digits-vit", base=base, task="classification")
    with pytest.raises(UserError, match="does not say how to rebuild"):
        rebuild_model({"kind": "other"}, base)


def test_a_file_that_is_not_python(base: Path) -> None:
    (base / "models" / "net.py").write_text("def text(:\n")
    with pytest.raises(UserError, match=r"models/net.py:1:\d+: is not valid Python"):
        user(base, "text")


def test_a_torchvision_that_cannot_be_imported_is_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text("import torchvision.part\nraise RuntimeError('built for another')\n")
    (tmp_path / "torchvision" / "part.py").write_text("")
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sources, "_hidden", {})
    assert sources.settle_torchvision() == "built for another"
    assert sources.settle_torchvision() == "built for another"
    assert "torchvision.part" not in sys.modules
    with pytest.raises(ImportError):
        __import__("torchvision")
    monkeypatch.delitem(sys.modules, "torchvision")


def test_two_files_that_import_other_modules_of_one_name_are_refused(tmp_path: Path) -> None:
    """The second would get the module of the first."""
    for folder, name in (("a", "fusing_net"), ("b", "fusing_net"), ("c", "fusing_net_c")):
        (tmp_path / folder).mkdir()
        text = f"import torch\n\nNet = lambda: torch.nn.Linear(3, 3)\nFOLDER = {folder!r}\n"
        (tmp_path / folder / f"{name}.py").write_text(text)
        (tmp_path / folder / "make.py").write_text(
            f"import torch\n\n\ndef make():\n    import {name}\n\n    return {name}.Net(), torch.zeros(2, 3)\n"
        )
    for _ in range(2):
        load_model("a/make.py:make", base=tmp_path, trust=True)
    load_model("c/make.py:make", base=tmp_path, trust=True)
    with pytest.raises(UserError, match=r"imports fusing_net from .*, but .*fusing_net\.py was imported under") as refusal:
        load_model("b/make.py:make", base=tmp_path, trust=True)
    assert "another name" in refusal.value.hint
