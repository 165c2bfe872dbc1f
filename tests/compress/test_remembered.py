"""The memory that the tests have of ``find`` (``tests/remembered.py``): it never answers for another model."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from remembered import content, remembered
from torch import nn

from calibrate.signature import Batch, Signature, TensorSpec
from compress.anatomy import Anatomy, finding
from compress.embedded import digits_model, digits_rows

DIGITS = Signature((TensorSpec("pixels", torch.float32, ("batch", 1, 8, 8)),))


def batch(rows: int = 2) -> Batch:
    return next(digits_rows("calibration", rows).batches(rows))


def digits() -> nn.Module:
    return digits_model().eval()


def counted() -> tuple[Callable[..., Anatomy], list[nn.Module]]:
    """``find`` without a memory, and the models that it is asked for."""
    asked: list[nn.Module] = []

    def find(model: nn.Module, *rest: Any) -> Anatomy:
        asked.append(model)
        made: Anatomy = finding.find.__wrapped__(model, *rest)  # type: ignore[attr-defined]
        return made

    return find, asked


def test_an_equal_model_is_traced_once_and_has_the_same_parts() -> None:
    real, asked = counted()
    found, model = remembered(real), digits()
    first = found(model, DIGITS, batch())
    again = found(copy.deepcopy(model), DIGITS, batch())
    assert (len(asked), first) == (1, again)
    assert again == real(digits(), DIGITS, batch())
    assert again.example is not first.example
    assert len(asked) == 2


def test_a_class_from_a_file_that_a_test_wrote_is_not_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "written_here.py").write_text("from torch import nn\n\nclass Norm(nn.LayerNorm):\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    model = digits()
    model.norm = importlib.import_module("written_here").Norm(64)
    real, asked = counted()
    found = remembered(real)
    assert found(model, DIGITS, batch()) == found(copy.deepcopy(model), DIGITS, batch())
    assert len(asked) == 2


def another_weight(model: nn.Module) -> None:
    with torch.no_grad():
        model.get_parameter("blocks.1.mlp.fc1.weight")[0, 0] += 1


def other_heads(model: nn.Module) -> None:
    model.get_submodule("blocks.1.attn").heads = 8  # type: ignore[assignment]


def equal(model: nn.Module) -> None:
    first = model.get_parameter("blocks.0.norm1.weight")
    model.get_submodule("blocks.1.norm1").weight = nn.Parameter(first.detach().clone())


def shared(model: nn.Module) -> None:
    model.get_submodule("blocks.1.norm1").weight = model.get_parameter("blocks.0.norm1.weight")


def training(model: nn.Module) -> None:
    model.get_submodule("blocks.1").train()


def another_class(model: nn.Module) -> None:
    model.get_submodule("blocks.1.mlp").act = nn.ReLU()


def as_is(model: nn.Module) -> None:
    pass


CHANGES: list[Callable[[nn.Module], None]] = [as_is, another_weight, other_heads, equal, shared, training, another_class]


def test_models_that_differ_in_anything_have_another_content() -> None:
    seen: dict[bytes | None, str] = {}
    for change in CHANGES:
        model = digits()
        change(model)
        assert content(model) == content(copy.deepcopy(model)) is not None
        assert seen.setdefault(content(model), change.__name__) == change.__name__
    assert len(seen) == len(CHANGES)


def test_what_else_is_asked_for_counts_too() -> None:
    asked = [{"roles": None}, {"roles": {"head": ["head"]}}, {"shape": (1, 8, 8)}, {"shape": (1, 8, 9)}]
    assert len({content(one) for one in asked}) == len(asked)


def test_a_model_that_cannot_be_written_down_is_not_remembered() -> None:
    class Local(nn.Linear):
        pass

    hooked = digits()
    hooked.register_forward_hook(lambda *_: None)
    assert content(Local(2, 2)) is None
    assert content(hooked) is None
