"""What every test starts from: one thread, the same seeds, and a torchvision that can be imported."""

from __future__ import annotations

import gc
import importlib.util
import os
import random
import sys

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import pytest
import torch
from hypothesis import settings

settings.register_profile("repository", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("repository")


def _declare_torchvision() -> torch.library.Library | None:
    """Declares two operators that torchvision describes at import but whose binary does not load beside this torch.

    timm and parts of transformers import it; beside a torch of another build that fails at ``torchvision::nms``.
    """
    if importlib.util.find_spec("torchvision") is None:
        return None
    try:
        importlib.import_module("torchvision")
    except Exception:
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return library
    return None


def _remember() -> None:
    """What ``find`` found is remembered, everywhere: before any other module takes hold of it."""
    from remembered import remembered

    import compress.anatomy

    vars(compress.anatomy)["find"] = vars(compress.anatomy.finding)["find"] = remembered(compress.anatomy.find)


_torchvision = _declare_torchvision()
_remember()
torch.set_num_threads(1)
gc.set_threshold(50_000, 20, 100)  # libraries hold millions of objects that live for ever


@pytest.fixture(autouse=True)
def _seeds() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="module")
def _what_lives_for_ever() -> None:
    """Libraries and all that earlier files left are not looked at again by each collection of garbage."""
    gc.collect()
    gc.freeze()
