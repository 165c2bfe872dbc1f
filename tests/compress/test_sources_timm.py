"""timm by name: checkpoints, random weights that are told, and the nearest name."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from calibrate.errors import UserError
from calibrate.fidelity import sqnr_db
from compress import sources, timm_models
from compress.sources import load_model, rebuild_model

timm = pytest.importorskip("timm", exc_type=ImportError)
NAME = "test_vit"


def checkpoint(path: Path, classes: int | None = None) -> torch.nn.Module:
    arguments = {} if classes is None else {"num_classes": classes}
    model: torch.nn.Module = timm.create_model(NAME, **arguments).eval()
    save_file(model.state_dict(), path)
    return model


def test_random_weights_are_told_and_follow_the_seed(tmp_path: Path) -> None:
    source = load_model(f"timm:{NAME}", base=tmp_path, seed=3)
    assert source.notes == ("random weights (seed 3): no checkpoint was given",)
    assert source.fingerprint == load_model(f"timm:{NAME}", base=tmp_path, seed=3).fingerprint
    assert source.fingerprint != load_model(f"timm:{NAME}", base=tmp_path, seed=4).fingerprint
    assert (source.task, source.classes) == ("image-classification", 1000)
    assert source.preprocessing is not None
    assert source.preprocessing["size"] == list(source.signature.inputs[0].shape[2:])


@pytest.mark.parametrize("classes", [None, 7])
def test_a_checkpoint_is_loaded_whatever_its_number_of_classes(tmp_path: Path, classes: int | None) -> None:
    model = checkpoint(tmp_path / "a.safetensors", classes)
    source = load_model(f"timm:{NAME}", base=tmp_path, checkpoint=Path("a.safetensors"))
    assert source.notes == ()
    assert source.classes == (classes or 1000)
    batch = source.example()
    assert sqnr_db(model(*batch.values()), source.signature.call(source.model, batch)) > 100
    rebuilt = rebuild_model(source.rebuild, tmp_path)
    rebuilt.load_state_dict(source.model.state_dict())
    assert sqnr_db(model(*batch.values()), source.signature.call(rebuilt, batch)) > 100


def test_wrong_names_and_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no model 'vit_tny_patch16_224'\n  Nearest: vit_tiny_patch16_224"):
        load_model("timm:vit_tny_patch16_224", base=tmp_path)
    with pytest.raises(UserError, match="there is no such file"):
        load_model(f"timm:{NAME}", base=tmp_path, checkpoint=Path("none.safetensors"))
    (tmp_path / "a.pth").write_bytes(b"pickle")
    with pytest.raises(UserError, match="pickled weights are not read"):
        load_model(f"timm:{NAME}", base=tmp_path, checkpoint=Path("a.pth"))
    (tmp_path / "a.safetensors").write_bytes(b"no")
    with pytest.raises(UserError, match="is damaged or not a safetensors file"):
        load_model(f"timm:{NAME}", base=tmp_path, checkpoint=Path("a.safetensors"))
    state = timm.create_model(NAME).state_dict()
    first = next(iter(state))
    save_file({key: value for key, value in state.items() if key != first}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=f"lacks the weight {first}"):
        load_model(f"timm:{NAME}", base=tmp_path, checkpoint=Path("a.safetensors"))
    save_file(state | {"more": torch.zeros(1)}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="has the weight more that the model lacks"):
        load_model(f"timm:{NAME}", base=tmp_path, checkpoint=Path("a.safetensors"))
    with pytest.raises(UserError, match="timm models do not do causal-lm"):
        load_model(f"timm:{NAME}", base=tmp_path, task="causal-lm")
    with pytest.raises(UserError, match="published weights cannot be fetched"):
        load_model(f"timm:{NAME}", base=tmp_path, checkpoint=Path("pretrained"))


def test_a_torchvision_that_does_not_fit_is_explained(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(timm_models, "settle_torchvision", lambda: "operator torchvision::nms does not exist")
    for name in [name for name in sys.modules if name.partition(".")[0] == "timm"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torchvision", None)
    monkeypatch.setattr(sources, "_hidden", {"torchvision": "operator torchvision::nms does not exist"})
    with pytest.raises(UserError, match="timm needs torchvision, which cannot be imported here: operator"):
        load_model(f"timm:{NAME}", base=tmp_path)
