"""Modes are put back one by one, in any case, and what comes in meanwhile takes the model's."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from calibrate.modes import evaluating, frozen, modes_kept


def mixed() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Dropout(), nn.Linear(2, 2))).train()
    model[1].eval()
    model[1][0].train()
    return model


@pytest.mark.parametrize("context", [evaluating, frozen])
def test_mixed_modes_come_back(context) -> None:  # type: ignore[no-untyped-def]
    model = mixed()
    modes = [module.training for module in model.modules()]
    with context(model) as inside:
        assert inside is model
        assert not any(module.training for module in model.modules())
        assert not model(torch.ones(1, 2)).requires_grad
    assert [module.training for module in model.modules()] == modes
    with pytest.raises(RuntimeError, match="stop"), context(model):
        raise RuntimeError("stop")
    assert [module.training for module in model.modules()] == modes
    assert torch.is_grad_enabled()


def test_a_module_that_came_in_meanwhile_takes_the_models_mode() -> None:
    model = mixed()
    gone = model[0]
    with modes_kept(model):
        model.eval()
        model[0] = nn.Linear(2, 2).eval()
    assert model[0].training
    assert gone.training
    assert not model[1].training


def test_only_inference_mode_marks_its_tensors() -> None:
    model = mixed()
    with evaluating(model):
        assert torch.ones(1).is_inference()
    with frozen(model):
        assert not torch.ones(1).is_inference()
