"""Training and eval modes: a model is run in eval mode, and each of its modules has its own mode back after."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

__all__ = ["evaluating", "frozen", "modes_kept"]


@contextmanager
def modes_kept(model: nn.Module) -> Iterator[nn.Module]:
    """Each module's own mode is put back after; a module that came in meanwhile takes the model's."""
    modes, own = {module: module.training for module in model.modules()}, model.training
    try:
        yield model
    finally:
        for module in (*modes, *model.modules()):
            module.training = modes.get(module, own)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """The model in eval mode and inference mode, whose tensors no gradient can be asked of later."""
    with modes_kept(model), torch.inference_mode():
        yield model.eval()


@contextmanager
def frozen(model: nn.Module) -> Iterator[nn.Module]:
    """The model in eval mode and without gradients; unlike in inference mode, parameters can be made."""
    with modes_kept(model), torch.no_grad():
        yield model.eval()
